"""A round in a process of its own: what it must not change, its deaths, and budgets that are too small."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and signals")

import talk
from test_child import held
from test_fit import NEEDED, SETTINGS, difference, tensors
from test_tuning import EXAMPLES, WEIGHTS

from edge_sdss import config
from edge_sdss.errors import BudgetExceeded, ConfigError, InputError
from edge_sdss.files import sha256
from edge_sdss.lm import LanguageModel
from edge_sdss.session import Session
from edge_sdss.tuning import budgeted, trainer
from edge_sdss.tuning.fit import Fit
from edge_sdss.tuning.supervisor import Died

AMPLE = 4 << 30

PLANTED = """
import os, random, signal, threading, time
from pathlib import Path

import torch

from edge_sdss.tuning import budgeted, course, steps
from edge_sdss.tuning.watchdog import rlimit

ROOT = Path(os.environ["PLANTED_ROOT"])

def lives():
    "How many children there were before this one."
    (ROOT / f"life-{len(list(ROOT.glob('life-*')))}").touch()
    return len(list(ROOT.glob("life-*"))) - 1

def in_child(payload, channel):
    globals()[os.environ["PLANTED"]](payload, channel, lives())
    return budgeted.in_child(payload, channel)

def kill_at_random(payload, channel, life):
    if life >= 3:
        return
    draws = random.Random(life)
    left = draws.randrange(1, 90)  # calls to the hooks: two steps
    plain = channel.check
    def check():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        plain()
    channel.check = check

def kill_while_loading(payload, channel, life):
    os.kill(os.getpid(), signal.SIGKILL)

def hog(payload, channel, life):
    "From the third step on the system has no new memory for a step, until two things were given up."
    plain = course.Course._insist
    limits, downs = [], []
    def step(self, run, work):
        if len(run.done) == 2 and not limits and not life:
            held = rlimit(0)
            held.__enter__()
            limits.append(held)
        def hungry():
            torch.empty(64 << 20, dtype=torch.uint8)  # more than malloc ever keeps: it comes from the system
            work()
        plain(self, run, hungry)
    def event(told):
        if "stepped_down" in told:
            downs.append(told)
            if len(downs) == 2:
                limits[0].__exit__(None, None, None)
        send(told)
    send, channel.event = channel.event, event
    course.Course._insist = step

def crash(payload, channel, life):
    os.abort()
"""


@pytest.fixture(scope="module")
def model(tiny: Path) -> config.Model:
    return config.Model(name=str(tiny), device="cpu")


@pytest.fixture(scope="module")
def undisturbed(model: config.Model, tmp_path_factory: pytest.TempPathFactory) -> trainer.Round:
    return trainer.train(LanguageModel.load(model), EXAMPLES, SETTINGS, tmp_path_factory.mktemp("round") / "whole")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    before = held()
    yield
    after = held()
    assert after[0] <= before[0], "a process is left"
    assert after[1] <= before[1], "a file is open"


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], int]]:
    """Has the children do something first. Returns the number of children that there were."""

    def planted(name: str) -> Callable[[], int]:
        root = tmp_path / "planted"
        root.mkdir()
        (root / "planted.py").write_text(PLANTED, encoding="utf-8")
        plain = budgeted.supervise

        def supervise(target: str, payload: Any, **options: Any) -> Any:
            assert target == "edge_sdss.tuning.budgeted:in_child"
            env = {"PYTHONPATH": str(root), "PLANTED": name, "PLANTED_ROOT": str(root)}
            return plain("planted:in_child", payload, **{**options, "env": env})

        monkeypatch.setattr(budgeted, "supervise", supervise)
        return lambda: len(list(root.glob("life-*")))

    return planted


def card(found: trainer.Round) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((found.adapter / "edge_sdss.json").read_text())
    return read


def test_the_round_is_that_of_this_process_bit_for_bit(
    model: config.Model, tmp_path: Path, undisturbed: trainer.Round
) -> None:
    events: list[dict[str, Any]] = []
    seen: list[Any] = []
    found = budgeted.train(
        model,
        EXAMPLES,
        SETTINGS,
        tmp_path / "a",
        budget_bytes=AMPLE,
        card={"round": 7},
        progress=lambda *step: seen.append(step),
        on_event=events.append,
    )
    assert sha256(found.adapter / WEIGHTS) == sha256(undisturbed.adapter / WEIGHTS)
    assert [step.loss for step in found.losses] == [step.loss for step in undisturbed.losses]
    assert [*seen][-1] == ("tune", 6, 6)
    assert [event["step"]["step"] for event in events if "step" in event] == list(range(1, 7))
    told = card(found)
    assert (told["round"], told["fit"], told["stepped_down"]) == (7, asdict(NEEDED), [])
    assert told["budget_bytes"] == AMPLE
    if sys.platform == "linux":
        assert 50 << 20 < told["peak_rss_bytes"] < 2 << 30
        assert 50 << 20 < told["load_peak_rss_bytes"] < 2 << 30
    assert trainer.train(LanguageModel.load(model), EXAMPLES, SETTINGS, found.adapter) == found


def test_killed_at_random_moments_the_round_comes_to_its_end(
    model: config.Model, tmp_path: Path, undisturbed: trainer.Round, plant: Any
) -> None:
    lives = plant("kill_at_random")
    events: list[dict[str, Any]] = []
    settings = SETTINGS.model_copy(update={"checkpoint_every": 1})
    out = tmp_path / "a"
    found = budgeted.train(model, EXAMPLES, settings, out, budget_bytes=AMPLE, on_event=events.append)
    assert lives() == 4
    assert difference(tensors(found.adapter), tensors(undisturbed.adapter)) < 1e-5
    assert len(found.losses) == 6
    told = card(found)["stepped_down"]
    assert told == [event["stepped_down"] for event in events if "stepped_down" in event]
    assert [each["words"].split(" ")[0] for each in told] == ["logits", "logits", "layers"]
    assert all("SIGKILL" in each["why"] for each in told)
    assert card(found)["fit"] == told[-1]["fit"] == asdict(Fit(4 * 40, 16, True, 40))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "planted") == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
def test_memory_that_is_taken_away_while_it_runs(
    model: config.Model, tmp_path: Path, undisturbed: trainer.Round, plant: Any
) -> None:
    plant("hog")
    events: list[dict[str, Any]] = []
    found = budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=AMPLE, on_event=events.append)
    told = [event["stepped_down"] for event in events if "stepped_down" in event]
    assert len(told) == 2
    assert {each["step"] for each in told} == {3}
    assert "memory" in told[0]["why"]
    assert difference(tensors(found.adapter), tensors(undisturbed.adapter)) < 1e-5


def test_a_process_that_is_killed_while_it_loads_is_not_started_for_ever(
    model: config.Model, tmp_path: Path, plant: Any
) -> None:
    lives = plant("kill_while_loading")
    with pytest.raises(BudgetExceeded, match=r"in 4096 MiB: the process was ended while the model was loaded"):
        budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=AMPLE)
    assert lives() == budgeted.LOADS


def test_a_crash_is_told_as_one(model: config.Model, tmp_path: Path, plant: Any) -> None:
    lives = plant("crash")
    with pytest.raises(Died, match="SIGABRT"):
        budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=AMPLE)
    assert lives() == 1


def test_interrupted_here_it_leaves_a_checkpoint_there(
    model: config.Model, tmp_path: Path, undisturbed: trainer.Round
) -> None:
    def stop(_stage: str, done: int, total: int) -> None:
        if done == 3 and total == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=None, progress=stop)
    assert (tmp_path / "a").exists() or any((tmp_path / "a.checkpoint").glob("step-00000[345]"))
    found = budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=None)
    assert sha256(found.adapter / WEIGHTS) == sha256(undisturbed.adapter / WEIGHTS)


# Refused


def test_a_budget_that_nothing_fits_is_refused_before_anything_starts(
    model: config.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgeted, "supervise", lambda *_a, **_k: pytest.fail("a process was started"))
    large = SETTINGS.model_copy(update={"rank": 2048})
    for settings, budget in ((SETTINGS, 64 << 20), (large, 120 << 20)):
        with pytest.raises(BudgetExceeded, match=rf"in {budget >> 20} MiB: .* allow at least \d+ MiB") as refused:
            budgeted.train(model, EXAMPLES, settings, tmp_path / "a", budget_bytes=budget)
        assert int(str(refused.value).split("at least ")[1].split()[0]) > budget >> 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_knows_what_python_and_torch_take(model: config.Model, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded, match=r"in 130 MiB: .*Python and torch \d{3} MiB; allow at least \d{3} MiB"):
        budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=130 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_budget_just_below_what_it_takes_at_rest(model: config.Model, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=AMPLE, on_event=events.append)
    resident = next(event["ready"]["resident_bytes"] for event in events if "ready" in event)
    with pytest.raises(BudgetExceeded, match=r"MiB (in use|allowed)|allow at least|the least that would do"):
        budgeted.train(model, EXAMPLES, SETTINGS, tmp_path / "b", budget_bytes=resident - (4 << 20))


def test_errors_come_through(model: config.Model, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"targets": ("qkv",)})
    with pytest.raises(ConfigError, match="no linear qkv"):
        budgeted.train(model, EXAMPLES, settings, tmp_path / "a", budget_bytes=AMPLE)
    absent = config.Model(name=str(tmp_path), device="cpu")
    with pytest.raises(InputError, match="no config"):
        budgeted.train(absent, EXAMPLES, SETTINGS, tmp_path / "a", budget_bytes=AMPLE)


# In a session


def test_a_session_tunes_within_its_budget(tiny: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    chosen = talk.settings(tiny).tuning.model_dump() | {"memory": AMPLE, "weights": "nf4", "compute_dtype": "float32"}
    with Session(tmp_path / "home", talk.settings(tiny, tuning=chosen), on_event=events.append) as session:
        for _ in session.observe_all(talk.dialogues(40)):
            pass
        before = session.lm
        session.annotate_from_stream()
        done = session.adapt()
        assert session.lm is not before
        assert session.lm.adapter is None
    assert any("step" in event for event in events)
    told = card(done.tuned)
    assert (told["round"], told["budget_bytes"], told["settings"]["weights"]) == (1, AMPLE, "nf4")
