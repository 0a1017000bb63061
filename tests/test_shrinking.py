"""Memory that is missing, or goes missing: at every phase of a step, in every guise, as a limit, as a budget."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import talk
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_fit import chain, difference, tensors
from test_outofmemory import FACES as TEXTS
from test_tuning import EXAMPLES, WEIGHTS, example
from tiny import tiny_model

from edge_sdss import config
from edge_sdss.errors import BudgetExceeded
from edge_sdss.lm import LanguageModel
from edge_sdss.session import Session
from edge_sdss.tuning import adapter, budgeted, steps, supervisor, trainer
from edge_sdss.tuning.checkpoint import Checkpoints
from edge_sdss.tuning.fit import Fit
from edge_sdss.tuning.layers import lora
from edge_sdss.tuning.steps import Optimisation
from edge_sdss.tuning.trainer import Conditions, train
from edge_sdss.tuning.watchdog import OverBudget

MIB = 1 << 20
AMPLE = 4 << 30

# At every phase, in every guise

LONG = example("rain and the mat " * 8, "walk every day and sleep more " * 6)
SHORT = [*EXAMPLES[:6], LONG]
SETTINGS = config.Tuning(
    rank=4,
    batch_size=2,
    epochs=1,
    learning_rate=3e-3,
    dropout=0.1,
    max_tokens=128,
    checkpoint_every=1,
    loss_chunk=16,
    targets=("q_proj", "down_proj"),
)
LONGEST = 85  # of SHORT, in tokens of the tiny model
CHAIN = chain(Fit.of(SETTINGS).of_sequences(LONGEST, SETTINGS.batch_size))
GUISES: dict[str, Callable[[], Exception]] = {
    **{text.splitlines()[0][:50]: lambda text=text: RuntimeError(text) for text in TEXTS},
    "torch.OutOfMemoryError": lambda: torch.OutOfMemoryError("whatever it says"),
    "MemoryError": MemoryError,
    "OSError": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "SafetensorError": lambda: SafetensorError("Cannot allocate memory (os error 12)"),
    "std::bad_alloc": lambda: RuntimeError("std::bad_alloc"),
    "OverBudget": lambda: OverBudget("812 MiB in use, 700 MiB allowed"),
}
PHASES: dict[str, tuple[Any, str, int]] = {  # what is called, and which call of a step fails
    "forward": (lora._LoraMatmul, "forward", 3),
    "loss": (steps, "cross_entropy", 1),
    "backward": (lora._LoraMatmul, "backward", 2),
    "clipping": (torch.nn.utils, "clip_grad_norm_", 1),
    "update": (torch.optim.AdamW, "step", 1),
    "after the update": (torch.optim.AdamW, "step", 1),
}


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Each step-down collects garbage; what there was before is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def lm(tiny: Path) -> LanguageModel:
    return LanguageModel.load(config.Model(name=str(tiny), device="cpu"))


@pytest.fixture(scope="module")
def undisturbed(lm: LanguageModel) -> tuple[dict[str, Any], list[float]]:
    """Weights, moments and losses of a round whose steps have these fits from the start, nothing failing."""
    encoded = {each.max_tokens: [lm.encode(row, each.max_tokens) for row in SHORT] for each in CHAIN}
    assert len(encoded[64][-1].ids) < len(encoded[LONGEST][-1].ids) == LONGEST, "the last fit cuts something"
    torch.manual_seed(SETTINGS.seed)
    with torch.random.fork_rng(), adapter.trainable(lm, SETTINGS, None) as adapted:
        run = Optimisation(adapted, encoded[LONGEST], SETTINGS)
        for fit in CHAIN[1:]:
            run.shorten(encoded[fit.max_tokens])
            run.advance(fit)
        assert len(run.done) == run.steps == 4
        found = {name: tensor.detach().clone() for name, tensor in run.tensors().items()}
    return found, [step.loss for step in run.done]


def once_in_each_step(monkeypatch: pytest.MonkeyPatch, phase: str, guise: Callable[[], Exception]) -> set[int]:
    """Has the first attempt at each step fail. Returns the numbers of the steps where it did, as they come."""
    owner, name, at = PHASES[phase]
    plain, plain_step = getattr(owner, name), Optimisation._step
    failed: set[int] = set()
    now = calls = 0

    def step(self: Any, number: int, fit: Fit) -> None:
        nonlocal now, calls
        now, calls = number, 0
        plain_step(self, number, fit)

    def planted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        fails = now not in failed and calls == at
        if fails and phase == "after the update":
            plain(*arguments, **named)
        if fails:
            failed.add(now)
            raise guise()
        return plain(*arguments, **named)

    static = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    monkeypatch.setattr(owner, name, staticmethod(planted) if static else planted)
    monkeypatch.setattr(Optimisation, "_step", step)
    return failed


@pytest.mark.parametrize(
    ("phase", "guise"),
    [*itertools.product(("forward", "backward", "update"), GUISES)]
    + [(phase, "MemoryError") for phase in PHASES if phase not in ("forward", "backward", "update")],
)
def test_a_step_done_again_with_less_is_that_step_bit_for_bit(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, phase: str, guise: str
) -> None:
    """At each of the four steps something is given up, down to shorter sequences."""
    failed = once_in_each_step(monkeypatch, phase, GUISES[guise])
    moments: dict[str, Any] = {}
    plain = trainer.Course._measured

    def kept(self: Any, run: Any) -> Any:
        moments.update({name: tensor.detach().clone() for name, tensor in run.tensors().items()})
        return plain(self, run)

    monkeypatch.setattr(trainer.Course, "_measured", kept)
    found = train(lm, SHORT, SETTINGS, tmp_path / "a")
    assert failed == {0, 1, 2, 3}
    card = json.loads((found.adapter / "edge_sdss.json").read_text())
    assert [each["fit"] for each in card["stepped_down"]] == [asdict(fit) for fit in CHAIN[1:]]
    assert [each["step"] for each in card["stepped_down"]] == [1, 2, 3, 4]
    wanted, losses = undisturbed
    assert [step.loss for step in found.losses] == losses
    assert moments.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(moments[name], tensor)] == []
    assert all(torch.equal(moments[f"weight.{name}"], tensor) for name, tensor in tensors(found.adapter).items())


def test_a_smaller_fit_changes_rounding_only(lm: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    """Chunks and micro-batches add up in another order; layers that are recomputed, in the same."""
    plain = SETTINGS.model_copy(update={"dropout": 0.0})
    whole = train(lm, EXAMPLES, plain, tmp_path / "whole")
    for name, fit, same in (
        ("layers", CHAIN[1], True),
        ("one", Fit(1, 16, True, 128), False),
        ("chunk", Fit(256, 1, True, 128), False),
    ):
        found = train(lm, EXAMPLES, plain, tmp_path / name, conditions=Conditions(fit=fit))
        off = difference(tensors(found.adapter), tensors(whole.adapter))
        assert off == 0 if same else 0 < off < 1e-5  # float32, over all steps


def test_without_memory_for_a_checkpoint_the_round_goes_on(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = train(lm, EXAMPLES, SETTINGS, tmp_path / "whole")
    write, calls = Checkpoints.write, itertools.count()

    def failing(self: Any, state: Any) -> None:
        if next(calls) % 2:
            raise MemoryError("no room")
        write(self, state)

    monkeypatch.setattr(Checkpoints, "write", failing)
    events: list[dict[str, Any]] = []
    found = train(lm, EXAMPLES, SETTINGS, tmp_path / "a", conditions=Conditions(on_event=events.append))
    assert [event["note"] for event in events if "note" in event] == [
        f"no checkpoint after step {step}: no room" for step in (2, 4)
    ]
    assert (found.adapter / WEIGHTS).read_bytes() == (wanted.adapter / WEIGHTS).read_bytes()


# Budgets that are too small


def named(refused: BudgetExceeded) -> int:
    """The least that would do, in MiB."""
    found = re.search(r"the least that would do is ([\d,]+) MiB", str(refused))
    assert found is not None, refused
    return int(found[1].replace(",", ""))


@pytest.fixture
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_arguments: Any, **_named: Any) -> Any:
        pytest.fail("the model was loaded, or a process started that would")

    monkeypatch.setattr(LanguageModel, "load", load)
    monkeypatch.setattr(budgeted, "supervise", load)
    monkeypatch.setattr(supervisor, "_Child", load)


@pytest.mark.usefixtures("_nothing_is_loaded")
@pytest.mark.parametrize("weights", ["as loaded", "int8", "nf4"])
def test_a_budget_that_is_too_small_is_refused_before_anything_is_loaded(tiny: Path, weights: str) -> None:
    model = config.Model(name=str(tiny), device="cpu")
    settings = config.Tuning.model_validate(SETTINGS.model_dump() | {"weights": weights})
    with pytest.raises(BudgetExceeded, match="train within 64 MiB") as refused:
        budgeted.planned(model, settings, 64 * MIB)
    least = named(refused.value)
    with pytest.raises(BudgetExceeded) as again:
        budgeted.planned(model, settings, (least - 1) * MIB)
    assert named(again.value) == least
    fit = budgeted.planned(model, settings, least * MIB)
    assert fit is not None
    assert fit.tokens >= 128
    with pytest.raises(BudgetExceeded, match="in 64 MiB"):
        budgeted.train(model, EXAMPLES, settings, Path("nowhere"), budget_bytes=64 * MIB)


def test_the_least_that_is_named_does(tiny: Path, tmp_path: Path) -> None:
    model = config.Model(name=str(tiny), device="cpu")
    with pytest.raises(BudgetExceeded) as refused:
        budgeted.planned(model, SETTINGS, 64 * MIB)
    budget = named(refused.value) * MIB
    fit = budgeted.planned(model, SETTINGS, budget)
    assert fit is not None
    found = budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=budget, fit=fit)
    card = json.loads((found.adapter / "edge_sdss.json").read_text())
    assert card["stepped_down"] == []
    assert (card["budget_bytes"], card["fit"]) == (budget, asdict(fit.of_sequences(40, SETTINGS.batch_size)))
    if sys.platform == "linux":
        assert 0.5 * budget < card["peak_rss_bytes"] <= budget


def test_a_session_refuses_before_it_loads(tiny: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    quick = talk.settings(tiny)
    with Session(tmp_path / "home", quick) as session:
        for _ in session.observe_all(talk.dialogues(40)):
            pass
        session.annotate_from_stream()
        session.synthesise()
    request.getfixturevalue("_nothing_is_loaded")
    tight = talk.settings(tiny, tuning=quick.tuning.model_dump() | {"memory": 64 * MIB})
    with Session(tmp_path / "home", tight) as session, pytest.raises(BudgetExceeded, match="the least that would do"):
        session.adapt()


# A limit that shrinks while it runs


linux = pytest.mark.skipif(sys.platform != "linux", reason="lowers another process's limits")
ROOMY = [example("rain and the mat " * 12, f"{word} and walk every day and sleep more " * 6) for word in "abcdefgh"]
HEAVY = config.Tuning(
    rank=64, batch_size=4, epochs=2, learning_rate=3e-3, max_tokens=128, checkpoint_every=1, loss_chunk=4096, reserve=0
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> config.Model:
    """A step takes tens of MiB."""
    return config.Model(name=str(tiny_model(tmp_path_factory.mktemp("wide"), width=512)), device="cpu")


@pytest.fixture(scope="module")
def wanted(wide: config.Model, tmp_path_factory: pytest.TempPathFactory) -> trainer.Round:
    return train(LanguageModel.load(wide), ROOMY, HEAVY, tmp_path_factory.mktemp("wanted") / "whole")


def child() -> int:
    every = {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}
    [pid] = [pid for pid in every if b"edge_sdss.tuning.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(pid)


def run_while(
    shrink: Callable[[], None],
    model: config.Model,
    out: Path,
    wanted: trainer.Round,
    settings: config.Tuning = HEAVY,
    relax: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], str]:
    """Trains, with `shrink` called after the second step; where that ends the round, trains again with no limit.

    Returns the events and how it ended: "" or the complaint. The round comes to what the undisturbed one does.
    """
    events: list[dict[str, Any]] = []

    def hear(event: dict[str, Any]) -> None:
        events.append(event)
        if event.get("step", {}).get("step") == 2 and len([each for each in events if "step" in each]) == 2:
            shrink()

    complaint = ""
    try:
        found = budgeted.train(model, ROOMY, settings, out, budget_bytes=AMPLE, on_event=hear)
    except BudgetExceeded as error:
        complaint = str(error)
        assert not out.exists()
        steps_left = [path.name for path in sorted(out.with_name(f"{out.name}.checkpoint").glob("step-*"))]
        assert steps_left[-1] >= "step-000002"
        seen: list[int] = []
        relax()
        found = budgeted.train(
            model, ROOMY, settings, out, budget_bytes=None, progress=lambda stage, done, _total: seen.append(done)
            if stage == "tune" else None,
        )  # fmt: skip
        assert seen[0] >= 2, "it went on from the checkpoint"
    card = json.loads((found.adapter / "edge_sdss.json").read_text())
    assert card["fit"]["max_tokens"] == 117 or "changes the result" in str(card["stepped_down"])
    if card["fit"]["max_tokens"] == 117:  # the longest of ROOMY
        assert [step.loss for step in found.losses] == pytest.approx([s.loss for s in wanted.losses], rel=1e-5)
        assert difference(load_file(found.adapter / WEIGHTS), load_file(wanted.adapter / WEIGHTS)) < 1e-4
    return events, complaint


@linux
@pytest.mark.parametrize(("kind", "room"), [("AS", 0), ("DATA", 8 * MIB), ("DATA", -64 * MIB)])
def test_a_limit_of_the_process_that_is_lowered(
    wide: config.Model, tmp_path: Path, wanted: trainer.Round, kind: str, room: int
) -> None:
    import resource

    which = {"AS": resource.RLIMIT_AS, "DATA": resource.RLIMIT_DATA}[kind]

    def shrink() -> None:
        fields = Path(f"/proc/{child()}/statm").read_text().split()
        held = int(fields[0] if kind == "AS" else fields[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(child(), which, (held + room, held + room))

    events, complaint = run_while(shrink, wide, tmp_path / "a", wanted)
    told = [event["stepped_down"] for event in events if "stepped_down" in event]
    assert told
    if complaint:
        assert re.search(
            r"out of memory at step \d with one sequence at a time|the process was ended with one sequence at a time",
            complaint,
        )
        assert "run it again" in complaint


class Group:
    """A memory cgroup of this test's own, v1 or v2."""

    def __init__(self) -> None:
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self.before = v1 if v1.is_dir() else v2
        self.folder = self.before / f"edge-sdss-test-{os.getpid()}"
        self.limit = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
        self.usage = "memory.usage_in_bytes" if v1.is_dir() else "memory.current"
        self.home: Path | None = None

    def make(self) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        mine = [line.split(":", 2) for line in lines]
        path = next(p for _, c, p in mine if ("memory" in c.split(",") if self.limit.endswith("bytes") else not c))
        self.home = self.before / path.strip("/")
        self.folder.mkdir()
        (self.folder / self.limit).write_text(str(AMPLE))
        assert (self.folder / self.usage).read_text()

    def takes(self, plain: Callable[..., None]) -> Callable[..., None]:
        """Children are born in the group, with the limit counting all of theirs; this process is there no longer."""

        def born(*arguments: Any, **named: Any) -> None:
            assert self.home is not None
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))
            try:
                plain(*arguments, **named)
            finally:
                (self.home / "cgroup.procs").write_text(str(os.getpid()))

        return born

    def shrink(self) -> None:
        """As far as the kernel lets it, v1; far below what is in use, v2."""
        used = int((self.folder / self.usage).read_text())
        with contextlib.suppress(OSError):
            for less in range(0, 256 * MIB, 4 * MIB):
                (self.folder / self.limit).write_text(str(used - less))

    def relax(self) -> None:
        (self.folder / self.limit).write_text(str(AMPLE))


@pytest.fixture
def group() -> Iterator[Group]:
    found = Group()
    try:
        found.make()
    except (OSError, StopIteration, AssertionError) as error:
        with contextlib.suppress(OSError):
            found.folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield found
    found.folder.rmdir()


@linux
def test_a_cgroup_that_is_made_smaller(
    wide: config.Model, tmp_path: Path, wanted: trainer.Round, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends the child; this process survives, and says so."""
    monkeypatch.setattr(supervisor._Child, "__init__", group.takes(supervisor._Child.__init__))
    events, complaint = run_while(group.shrink, wide, tmp_path / "a", wanted, relax=group.relax)
    told = [event["stepped_down"] for event in events if "stepped_down" in event]
    assert told or complaint
    if complaint:
        assert re.search(r"the process was ended (with|while the model was loaded)|out of memory at step", complaint)
        assert "which goes on from the last checkpoint" in complaint or "run it again" in complaint
