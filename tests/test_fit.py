"""Steps cut into pieces, and memory that runs out at any moment of them, against the undisturbed round."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdss import config
from edge_sdss.tuning.fit import Fit


def chain(fit: Fit | None) -> list[Fit]:
    found = []
    while fit is not None:
        found.append(fit)
        fit = fit.smaller()
    return found


fits = st.builds(Fit, st.integers(1, 64), st.integers(1, 2048), st.booleans(), st.integers(16, 8192))


@given(fits)
def test_each_fit_is_smaller_than_the_one_before_down_to_the_least(fit: Fit) -> None:
    found = chain(fit)
    for before, after in itertools.pairwise(found):
        assert after != before
        assert after.within(before) == after
        assert after.instead_of(before)
        # What changes the result comes last.
        if after.max_tokens < before.max_tokens:
            assert (before.tokens, before.checkpointing) == (1, True)
            assert before.loss_chunk <= 16
            assert "changes the result" in after.instead_of(before)
        else:
            assert "changes the result" not in after.instead_of(before)
    last = found[-1]
    assert (last.tokens, last.checkpointing) == (1, True)
    assert (last.loss_chunk, last.max_tokens) == (min(fit.loss_chunk, 16), min(fit.max_tokens, 64))
    assert Fit(**json.loads(json.dumps(asdict(fit)))) == fit


@given(fits, fits)
def test_within_is_the_largest_that_both_allow(one: Fit, other: Fit) -> None:
    both = one.within(other)
    assert both == other.within(one)
    assert both.within(one) == both.within(other) == both
    assert one.within(one) == one


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 700))
def test_parts_hold_as_many_sequences_as_their_tokens_allow(lengths: list[int], tokens: int) -> None:
    lengths.sort()
    parts = Fit(tokens, 64, True, 512).parts(lengths)
    assert [index for part in parts for index in part] == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * lengths[part[-1]] <= tokens
    for part, after in itertools.pairwise(parts):  # one more would have been too many
        assert (len(part) + 1) * lengths[after[0]] > tokens


def test_what_the_sequences_really_need_is_what_is_given_up() -> None:
    plain = Fit.of(config.Tuning(batch_size=8, max_tokens=512))
    known = plain.of_sequences(longest=80, batch_size=8)
    assert (known.tokens, known.max_tokens) == (640, 80)
    assert known.of_sequences(200, 8) == known
    cut = [[len(part) for part in fit.parts([80] * 8)] for fit in chain(known) if fit.checkpointing]
    assert [cut[0], *(after for before, after in itertools.pairwise(cut) if after != before)] == [
        [8], [4, 4], [2, 2, 2, 2], [1] * 8
    ]  # fmt: skip


def test_order_and_words() -> None:
    found = chain(Fit.of(config.Tuning(batch_size=4, loss_chunk=40, max_tokens=200)))
    assert [each.instead_of(before) for before, each in itertools.pairwise(found)] == [
        "logits of 20 tokens at a time instead of 40",
        "logits of 16 tokens at a time instead of 20",
        "layers recomputed",
        "400 tokens at a time instead of 800 tokens",
        "200 tokens at a time instead of 400 tokens",
        "one sequence at a time instead of 200 tokens",
        "sequences cut at 100 tokens instead of 200, which changes the result",
        "sequences cut at 64 tokens instead of 100, which changes the result",
    ]
    assert found[0].words == "800 tokens at a time, logits of 40 tokens, layers kept, sequences of at most 200 tokens"
    assert Fit.of(config.Tuning(checkpointing="on")).checkpointing


torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file
from test_tuning import EXAMPLES, WEIGHTS, example

from edge_sdss.errors import BudgetExceeded
from edge_sdss.files import sha256
from edge_sdss.lm import LanguageModel
from edge_sdss.tuning import adapter, course, steps
from edge_sdss.tuning.child import Stopped
from edge_sdss.tuning.layers import lora
from edge_sdss.tuning.steps import Optimisation
from edge_sdss.tuning.trainer import Conditions, train
from edge_sdss.tuning.watchdog import OverBudget, Usage

SETTINGS = config.Tuning(
    rank=4, batch_size=4, epochs=2, learning_rate=3e-3, max_tokens=128, checkpoint_every=2, loss_chunk=64
)
WHOLE = Fit.of(SETTINGS)
LONGEST = 40  # of EXAMPLES, in tokens of the tiny model
NEEDED = WHOLE.of_sequences(LONGEST, SETTINGS.batch_size)


@pytest.fixture(scope="module")
def lm(tiny: Path) -> LanguageModel:
    return LanguageModel.load(config.Model(name=str(tiny), device="cpu"))


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest over tensors of |found - wanted| / |wanted|, in Euclidean norms."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)) for name in wanted)


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / WEIGHTS)


# Cut into pieces


def optimisation(lm: LanguageModel, adapted: adapter.Trainable) -> Optimisation:
    return Optimisation(adapted, [lm.encode(each, 128) for each in EXAMPLES], SETTINGS)


def gradients(lm: LanguageModel, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the second step, before they are clipped; the first one gives B a value."""
    found: dict[str, Any] = {}
    with torch.random.fork_rng(), adapter.trainable(lm, SETTINGS, None) as adapted:
        generator = torch.Generator().manual_seed(5)
        for name, parameter in adapted.parameters.items():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            assert "lora" in name
        run = optimisation(lm, adapted)

        def clip(parameters: Any, limit: float) -> Any:
            found.update({name: p.grad.clone() for name, p in adapted.parameters.items()})
            return torch.tensor(1.0)

        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            run.advance(fit)
        assert all(parameter.grad is None for parameter in adapted.parameters.values())
        assert len(run.done) == 1
    return found


@pytest.mark.parametrize(
    "fit",
    [
        Fit(80, 64, False, 128),
        Fit(100, 16, True, 128),
        Fit(1, 1, True, 128),
        Fit(1, 7, False, 128),
        Fit(999, 64, True, 128),
    ],
    ids=lambda fit: fit.words,
)
def test_gradients_do_not_depend_on_how_a_step_is_cut(lm: LanguageModel, fit: Fit, monkeypatch: Any) -> None:
    wanted = gradients(lm, WHOLE, monkeypatch)
    found = gradients(lm, fit, monkeypatch)
    assert difference(found, wanted) < 1e-5
    assert min(float(each.norm()) for each in wanted.values()) > 0


def test_a_whole_batch_is_the_plain_step_bit_for_bit(lm: LanguageModel, tmp_path: Path) -> None:
    dropped = SETTINGS.model_copy(update={"dropout": 0.1})
    found = train(lm, EXAMPLES, dropped, tmp_path / "a")
    encoded = [lm.encode(each, 128) for each in EXAMPLES]
    torch.manual_seed(0)
    with adapter.trainable(lm, dropped, None) as adapted:
        learnt = list(adapted.parameters.values())
        optimizer = torch.optim.AdamW(learnt, weight_decay=0.0, fused=True)
        plan = [rows for epoch in range(2) for rows in steps.batches([len(e.ids) for e in encoded], 4, 0, epoch)]
        for number, rows in enumerate(plan):
            torch.manual_seed(number)
            chosen = [encoded[row] for row in rows]
            width = max(len(e.ids) for e in chosen)
            ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in chosen])
            answers = torch.zeros(ids.shape, dtype=torch.bool)
            for row, e in enumerate(chosen):
                answers[row, e.prompt_tokens - 1 : len(e.ids) - 1] = True
            hidden = adapted.backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            targets = ids.roll(-1, 1)[answers]
            loss = steps.cross_entropy(hidden[answers], adapted.head, targets, chunk=64) / len(targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.param_groups[0]["lr"] = steps.learning_rate(number, len(plan), dropped)
            optimizer.step()
            optimizer.zero_grad()
            assert found.losses[number].loss == loss.item()
        for name, saved in tensors(tmp_path / "a").items():
            assert torch.equal(saved, adapted.parameters[name]), name


def test_a_round_does_not_depend_on_how_its_steps_are_cut(lm: LanguageModel, tmp_path: Path) -> None:
    whole = train(lm, EXAMPLES, SETTINGS, tmp_path / "whole")
    for name, fit in {"one": Fit(1, 16, True, 128), "odd": Fit(90, 5, False, 128)}.items():
        found = train(lm, EXAMPLES, SETTINGS, tmp_path / name, conditions=Conditions(fit=fit))
        assert difference(tensors(found.adapter), tensors(whole.adapter)) < 1e-5
        assert [step.loss for step in found.losses] == pytest.approx([step.loss for step in whole.losses], rel=1e-5)
        assert [step.tokens for step in found.losses] == [step.tokens for step in whole.losses]
    assert found.peak_tensor_bytes < whole.peak_tensor_bytes
    again = train(lm, EXAMPLES, SETTINGS, tmp_path / "again", conditions=Conditions(fit=Fit(90, 5, False, 128)))
    assert sha256(again.adapter / WEIGHTS) == sha256(found.adapter / WEIGHTS)


# Memory runs out


FACES: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    "cpu": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    "tegra": lambda: RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1131'),
    "driver": lambda: RuntimeError("CUDA driver error: out of memory"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": lambda: MemoryError(),
    "watchdog": lambda: OverBudget("812 MiB in use, 700 MiB allowed"),
}
MOMENTS: dict[str, tuple[Any, str]] = {
    "forward": (lora._LoraMatmul, "forward"),
    "loss": (steps, "cross_entropy"),
    "backward": (lora._LoraMatmul, "backward"),
    "clipping": (torch.nn.utils, "clip_grad_norm_"),
    "update": (torch.optim.AdamW, "step"),
    "after the update": (torch.optim.AdamW, "step"),
    "next step": (steps.Optimisation, "_clear"),
}


def plant(
    monkeypatch: pytest.MonkeyPatch, moment: str, at: set[int], face: Callable[[], Exception]
) -> Callable[[], int]:
    """Raises at these calls, counted from 1. Returns the number of calls so far."""
    owner, name = MOMENTS[moment]
    plain, calls = getattr(owner, name), 0

    def planted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in at and moment == "after the update":
            plain(*arguments, **named)
        if calls in at:
            raise face()
        return plain(*arguments, **named)

    static = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    monkeypatch.setattr(owner, name, staticmethod(planted) if static else planted)
    return lambda: calls


@pytest.fixture(scope="module")
def undisturbed(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(lm, EXAMPLES, SETTINGS, tmp_path_factory.mktemp("round") / "whole")


def assert_same(found: Any, wanted: Any) -> dict[str, Any]:
    """Returns the card."""
    assert [step.step for step in found.losses] == [step.step for step in wanted.losses]
    assert [step.loss for step in found.losses] == pytest.approx([step.loss for step in wanted.losses], rel=1e-5)
    assert difference(tensors(found.adapter), tensors(wanted.adapter)) < 1e-5
    card: dict[str, Any] = json.loads((found.adapter / "edge_sdss.json").read_text())
    return card


@pytest.mark.parametrize(
    ("moment", "face"),
    sorted({("backward", face) for face in FACES} | {(moment, "cpu") for moment in MOMENTS}),
)
def test_a_step_without_memory_is_done_again_with_less(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, moment: str, face: str
) -> None:
    calls = {"forward": {3, 40, 47, 100}, "backward": {9, 40, 77}}.get(moment, {1, 4, 6})
    count = plant(monkeypatch, moment, calls, FACES[face])
    events: list[dict[str, Any]] = []
    found = train(lm, EXAMPLES, SETTINGS, tmp_path / "a", conditions=Conditions(on_event=events.append))
    assert count() >= max(calls)
    assert next(event["began"] for event in events if "began" in event) == {"step": 0, "fit": asdict(NEEDED)}
    card = assert_same(found, undisturbed)
    told = [event["stepped_down"] for event in events if "stepped_down" in event]
    assert card["stepped_down"] == told
    assert len(told) == len(calls)
    assert card["fit"] == told[-1]["fit"] == asdict(chain(NEEDED)[len(told)])
    assert told[0]["words"] == "logits of 32 tokens at a time instead of 64"
    assert all(1 <= each["step"] <= len(found.losses) for each in told)
    assert not (tmp_path / "a.checkpoint").exists()
    assert not any("forward" in vars(layer) for layer in lm.model.model.layers)


def test_an_error_that_is_none_of_memory_is_not_swallowed(lm: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    plant(monkeypatch, "backward", {30}, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "a")


def test_nothing_of_a_failed_step_is_kept_alive(lm: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    """What was computed before memory ran out is gone before the step is done again."""
    import weakref

    seen: list[Any] = []
    alive: list[int] = []
    plain = lora._LoraMatmul.forward

    def noted(*arguments: Any) -> Any:
        y = plain(*arguments)
        seen.append(weakref.ref(y.untyped_storage()))
        return y

    monkeypatch.setattr(lora._LoraMatmul, "forward", staticmethod(noted))
    monkeypatch.setattr(course, "free", lambda error: (_free(error), alive.append(sum(r() is not None for r in seen))))
    plant(monkeypatch, "backward", {5, 25}, FACES["cpu"])
    train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    assert alive == [0, 0]


_free = course.free


def test_where_nothing_smaller_fits_a_checkpoint_is_left_and_a_later_run_ends_the_round(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    with monkeypatch.context() as patched:
        plant(patched, "loss", set(range(6, 10_000)), FACES["tegra"])
        with pytest.raises(
            BudgetExceeded, match=r"out of memory at step 6 with one sequence at a time, logits of 16 .*NVML"
        ):
            train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert sorted(path.name for path in (tmp_path / "a.checkpoint").iterdir()) == ["step-000004", "step-000005"]
    seen: list[int] = []
    # It goes on with less, and what was cut before is cut still.
    found = train(lm, EXAMPLES, SETTINGS, tmp_path / "a", progress=lambda _stage, done, _total: seen.append(done))
    assert seen[0] == 5
    card = assert_same(found, undisturbed)
    assert card["fit"] == asdict(Fit(1, 16, True, LONGEST))
    assert [each["step"] for each in card["stepped_down"]] == [6] * 6


def test_shorter_sequences_are_the_last_resort_and_said_plainly(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [*EXAMPLES, example("rain and the mat " * 12, "walk every day and sleep more " * 8)]
    assert len(lm.encode(long[-1], 128).ids) > 100
    plain = Optimisation._loss

    def narrow(self: Any, rows: Any, chunk: int) -> Any:
        if max(len(row.ids) for row in rows) > 64:
            raise MemoryError
        return plain(self, rows, chunk)

    monkeypatch.setattr(Optimisation, "_loss", narrow)
    found = train(lm, long, SETTINGS, tmp_path / "a")
    card = json.loads((found.adapter / "edge_sdss.json").read_text())
    assert card["fit"] == asdict(Fit(1, 16, True, 64))
    words = [each["words"] for each in card["stepped_down"]]
    assert words[-1] == "sequences cut at 64 tokens instead of 113, which changes the result"
    assert found.steps == len(found.losses) == 6
    # The plan can cut them from the start; equal examples make the same steps.
    fit = Conditions(fit=Fit(256, 64, False, 64))
    short = train(lm, long, SETTINGS, tmp_path / "b", conditions=fit)
    assert sum(step.tokens for step in short.losses) == 2 * sum(len(lm.encode(each, 64).ids) for each in long)


# Stopped, and watched


@pytest.mark.parametrize(("error", "call", "step"), [(Stopped, 140, 3), (KeyboardInterrupt, 140, 3), (Stopped, 120, 2)])
def test_who_is_stopped_within_a_step_leaves_the_step_before(
    lm: LanguageModel, tmp_path: Path, undisturbed: Any, error: type[BaseException], call: int, step: int
) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error

    with pytest.raises(error):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "a", conditions=Conditions(check=check))
    names = sorted(path.name for path in (tmp_path / "a.checkpoint").iterdir())
    assert names[-1] == f"step-{step:06d}"
    found = train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    assert sha256(found.adapter / WEIGHTS) == sha256(undisturbed.adapter / WEIGHTS)


def test_a_setting_that_changes_rounding_only_takes_up_the_round(lm: LanguageModel, tmp_path: Path) -> None:
    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "a", progress=stop)
    seen: list[int] = []
    smaller = SETTINGS.model_copy(update={"loss_chunk": 8, "checkpointing": "on", "memory": 1 << 40})
    found = train(lm, EXAMPLES, smaller, tmp_path / "a", progress=lambda _stage, done, _total: seen.append(done))
    assert seen[0] == 3
    card = json.loads((found.adapter / "edge_sdss.json").read_text())
    assert card["fit"] == asdict(Fit(4 * LONGEST, 8, True, LONGEST))


class Watch:
    """A watchdog that barks when told."""

    budget_bytes, peak_bytes = 700 << 20, 650 << 20

    def __init__(self, barks: set[int], recovers: bool = True):
        self.barks, self.recovers, self.calls, self.cleared = barks, recovers, 0, 0

    def check(self) -> None:
        self.calls += 1
        if self.calls in self.barks:
            raise OverBudget("812 MiB in use, 700 MiB allowed")

    def clear(self) -> bool:
        self.cleared += 1
        return self.recovers

    def look(self) -> Usage:
        return Usage(800 << 20, None, None)


def test_the_watchdog_is_heard_within_a_step(lm: LanguageModel, tmp_path: Path, undisturbed: Any) -> None:
    watch: Any = Watch({1, 17, 60, 61, 200})
    events: list[dict[str, Any]] = []
    conditions = Conditions(watch=watch, on_event=events.append)
    found = train(lm, EXAMPLES, SETTINGS, tmp_path / "a", conditions=conditions)
    assert watch.cleared == 5
    card = assert_same(found, undisturbed)
    assert {each["why"] for each in card["stepped_down"]} == {"812 MiB in use, 700 MiB allowed"}
    told = [event["step"] for event in events if "step" in event]
    assert [each["step"] for each in told] == list(range(1, 7))
    assert told[2]["loss"] == found.losses[2].loss
    assert told[-1]["eta_s"] == 0
    assert told[0]["eta_s"] > 0 < told[0]["tokens_per_s"]
    assert (told[0]["peak_bytes"], told[0]["budget_bytes"]) == (650 << 20, 700 << 20)


def test_a_budget_that_is_passed_at_rest_is_no_matter_of_fit(lm: LanguageModel, tmp_path: Path) -> None:
    watch: Any = Watch({200}, recovers=False)
    with pytest.raises(BudgetExceeded, match="in 700 MiB: out of memory at step"):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "a", conditions=Conditions(watch=watch))
    assert watch.cleared == 1
    assert (tmp_path / "a.checkpoint").is_dir()
