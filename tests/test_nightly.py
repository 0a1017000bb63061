"""A device that decides by itself: when it tunes, what ends it, how it goes on, and that only the gate decides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_sdss import nightly
from edge_sdss.config import Adapt
from edge_sdss.errors import InputError, SensorUnavailable
from edge_sdss.moment import State
from edge_sdss.nightly import Halt, Ledger

NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
SETTINGS = Adapt(least_new=3, poll_s=10, max_s=1000)


class World:
    """A clock that only sleeping and working move, conditions that follow it, and a session of five steps of 100 s."""

    def __init__(self, home: Path, *, steps: int = 5, watts: float | None = 10.0, accepted: bool = True) -> None:
        self.home, self.steps, self.watts, self.accepted = home, steps, watts, accepted
        self.t, self._asked, self.begun = 0.0, 0.0, NOON
        self.done = 0  # as a checkpoint has it
        self.bad: list[tuple[float, float]] = []
        self.said: list[str] = []
        self.rounds: list[Any] = []
        self.open = 0
        self.new, self.active = 4, None
        home.mkdir(parents=True, exist_ok=True)

    def clock(self) -> float:
        return self.t

    def sleep(self, seconds: float) -> None:
        assert not self.open, "the home is free while it waits"
        self.t += seconds

    def look(self) -> State:
        bad = any(start <= self.t < end for start, end in self.bad)
        return State(not bad, "busy" if bad else "idle")

    def joules(self) -> float | None:
        spent, self._asked = self.t - self._asked, self.t
        return None if self.watts is None else self.watts * spent

    @contextmanager
    def session(self, progress: Any, on_event: Any) -> Iterator[Any]:
        self.open += 1
        material = [SimpleNamespace(dialogue_id=str(n)) for n in range(self.new)]
        store = SimpleNamespace(rounds=lambda: self.rounds, active_round=lambda: self.active, tried=lambda: self.tried)
        try:
            yield SimpleNamespace(store=store, material=lambda: material, adapt=lambda: self.work(progress, on_event))
        finally:
            self.open -= 1

    tried: frozenset[str] = frozenset()

    def work(self, progress: Any, on_event: Any) -> Any:
        if not (self.rounds and self.rounds[-1].state == "running"):
            self.rounds.append(SimpleNamespace(number=len(self.rounds) + 1, state="running"))
        progress("synthesise", 1, 1)
        while self.done < self.steps:
            self.t += 100
            self.done += 1
            on_event({"step": {"step": self.done}})
        self.rounds[-1].state = "accepted" if self.accepted else "rejected"
        return SimpleNamespace(number=1, verdict=SimpleNamespace(accepted=self.accepted, reason="because"))

    def adapt(self, within_s: float = 3600, settings: Adapt = SETTINGS, **other: Any) -> nightly.Result:
        conditions = {"idle": SimpleNamespace(look=self.look)}
        now = lambda: self.begun + timedelta(seconds=self.t)  # noqa: E731
        given = {"joules": self.joules, "say": self.said.append, "clock": self.clock, "sleep": self.sleep, "now": now}
        return nightly.adapt(self.session, self.home, conditions, settings, within_s=within_s, **{**given, **other})


def test_in_a_good_moment_a_round_goes_through(tmp_path: Path) -> None:
    found = World(tmp_path).adapt()
    assert (found.kind, found.why, found.round, found.seconds, found.joules) == ("accepted", "because", 1, 500, 5000)


def test_a_gate_that_rejects_is_told_apart(tmp_path: Path) -> None:
    assert World(tmp_path, accepted=False).adapt().kind == "rejected"


def test_nothing_begins_before_all_hold_and_the_home_is_free_meanwhile(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.bad = [(0, 205)]
    found = world.adapt()
    assert found.kind == "accepted"
    assert world.t == 210 + 500
    assert found.seconds == 500, "waiting is not work"


def test_a_moment_that_never_comes_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.bad = [(0, 1e9)]
    found = world.adapt(within_s=300)
    assert (found.kind, found.why, world.done, world.t) == ("no moment", "busy", 0, 300)


def test_what_lasts_one_look_does_not_end_a_round_what_lasts_two_does_and_it_goes_on_later(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.bad = [(90, 110)]
    assert world.adapt().kind == "accepted"
    assert world.said == ["A round begins: 4 dialogues to learn from are new."]
    world = World(tmp_path / "b")
    world.bad = [(90, 600)]
    found = world.adapt()
    assert found.kind == "accepted"
    assert world.done == 5
    assert "Stopped after a checkpoint: busy." in world.said
    assert world.said[-1] == "A round begins: round 1 was cut short."
    assert found.seconds == 500, "each step was done once"


def test_work_in_24_hours_is_limited_across_calls_and_goes_on_the_next_day(tmp_path: Path) -> None:
    world = World(tmp_path, steps=8)
    settings = Adapt(least_new=3, poll_s=10, max_s=300)
    found = world.adapt(settings=settings)
    assert (found.kind, found.seconds, world.done) == ("spent", 300, 3)
    assert "300 s of 300 s" in found.why
    again = World(tmp_path, steps=8)  # the same home after a reboot, an hour later
    again.begun, again.done, again.rounds = NOON + timedelta(hours=1), world.done, world.rounds
    assert again.adapt(settings=settings).kind == "spent"
    assert again.done == 3
    again.begun = NOON + timedelta(hours=25)
    assert again.adapt(settings=settings).kind == "spent"
    assert again.done == 6, "it went on from the checkpoint"


def test_energy_is_limited_and_unknown_energy_is_held_against_the_limit(tmp_path: Path) -> None:
    settings = Adapt(least_new=3, poll_s=10, max_s=None, max_j=2500)
    world = World(tmp_path)
    found = world.adapt(settings=settings)
    assert (found.kind, found.joules, world.done) == ("spent", 3000, 3)
    blind = World(tmp_path / "b", watts=None)
    found = blind.adapt(settings=settings)
    assert (found.kind, found.joules, blind.done) == ("spent", None, 1)
    assert "not known" in found.why
    free = World(tmp_path / "c", watts=None).adapt()
    assert (free.kind, free.joules) == ("accepted", None), "None, never 0"


def test_what_was_spent_is_kept_where_the_round_fails(tmp_path: Path) -> None:
    world = World(tmp_path)

    def fail(progress: Any, on_event: Any) -> None:
        world.t += 70
        raise ZeroDivisionError

    world.work = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        world.adapt()
    assert Ledger(tmp_path / "nightly.json", lambda: NOON + timedelta(seconds=100)).spent() == (70, 700)


def test_the_ledger_forgets_after_a_day_and_refuses_nonsense(tmp_path: Path) -> None:
    file, at = tmp_path / "nightly.json", [NOON]
    ledger = Ledger(file, lambda: at[0])
    ledger.add(5, 50)
    at[0] += timedelta(hours=23)
    ledger.add(7, None)
    assert ledger.spent() == (12, None)
    assert Ledger(file, lambda: at[0]).spent() == (12, None)
    at[0] += timedelta(hours=2)
    assert ledger.spent() == (7, None)
    at[0] = NOON - timedelta(days=9)
    assert ledger.spent()[0] == 12, "a clock that was wrong frees nothing"
    file.write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(InputError, match=r"no ledger, .*; move the file away"):
        Ledger(file, lambda: NOON)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"new": 2}, (False, "2 dialogues to learn from are new, 3 are needed")),
        ({"new": 3}, (True, "3 dialogues to learn from are new")),
        ({"new": 5, "tried": frozenset("012")}, (False, "2 dialogues to learn from are new, 3 are needed")),
        ({"new": 0, "rounds": [SimpleNamespace(number=4, state="running")]}, (True, "round 4 was cut short")),
    ],
)
def test_a_round_is_due_where_there_is_enough_that_is_new(
    tmp_path: Path, state: dict[str, Any], expected: tuple[bool, str]
) -> None:
    world = World(tmp_path)
    vars(world).update(state)
    with world.session(None, None) as session:
        assert nightly.due(session, SETTINGS) == expected


def test_an_adapter_that_holds_what_was_forgotten_is_replaced_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.new, world.active = 1, SimpleNamespace(number=1, stale=True)
    world.rounds = [SimpleNamespace(number=1, state="accepted")]
    with world.session(None, None) as session:
        assert nightly.due(session, SETTINGS)[0]
        world.rounds.append(SimpleNamespace(number=2, state="rejected"))
        assert not nightly.due(session, SETTINGS)[0], "a round that failed is not tried each night"


def test_a_limit_of_energy_without_a_sensor_is_refused() -> None:
    with ExitStack() as stack:
        assert nightly.meter(stack, Adapt(), sensors=["null"])() is None
        with pytest.raises(SensorUnavailable, match=r"keep to 40000 J: no power sensor .*limit the time instead"):
            nightly.meter(stack, Adapt(max_j=40_000), sensors=["null"])


def test_halt_is_an_interrupt_that_no_handler_of_errors_swallows() -> None:
    assert issubclass(Halt, KeyboardInterrupt)
    assert not issubclass(Halt, Exception)


# the real session


@pytest.fixture
def learner(tiny: Path, tmp_path: Path) -> Any:
    """A home with annotated dialogues, and a function that adapts it with the tiny model."""
    pytest.importorskip("peft")
    import talk

    from edge_sdss.lm import LanguageModel
    from edge_sdss.session import Session

    settings = talk.settings(tiny, adapt={"least_new": 2, "poll_s": 1e-6})
    lm = LanguageModel.load(settings.model)
    home = tmp_path / "learner"
    with Session(home, settings, lm=lm) as session:
        list(session.observe_all(talk.dialogues(30)))
        session.annotate_from_stream()

    def adapt(look: Any, on_event: Any = lambda event: None) -> nightly.Result:
        def opened(progress: Any, hear: Any) -> Session:
            def both(event: dict[str, Any]) -> None:
                on_event(event)
                hear(event)

            return Session(home, settings, lm=lm, progress=progress, on_event=both)

        conditions = {"idle": SimpleNamespace(look=look)}
        return nightly.adapt(opened, home, conditions, settings.adapt, within_s=0, joules=lambda: 1.0)

    return SimpleNamespace(home=home, adapt=adapt, settings=settings, lm=lm, session=Session)


def test_a_real_round_that_lost_its_moment_goes_on_from_its_checkpoint_and_passes_the_gate(learner: Any) -> None:
    steps: list[int] = []

    def hear(event: dict[str, Any]) -> None:
        if "step" in event:
            steps.append(event["step"]["step"])

    found = learner.adapt(lambda: State(len(steps) < 3, "busy"), hear)
    assert (found.kind, found.why) == ("no moment", "busy")
    with learner.session(learner.home, learner.settings, lm=learner.lm) as session:
        assert session.store.rounds()[-1].state == "running"
        assert session.active_adapter is None, "what is half done never serves"
    stopped_at = steps[-1]
    found = learner.adapt(lambda: State(True, ""), hear)
    assert found.kind == "accepted"
    assert steps == list(range(1, steps[-1] + 1)), "each step was done once"
    assert steps[-1] > stopped_at
    with learner.session(learner.home, learner.settings, lm=learner.lm) as session:
        assert session.active_adapter is not None
    assert learner.adapt(lambda: State(True, "")).kind == "not due"
    assert len(json.loads((learner.home / "nightly.json").read_text())) > 1


def test_the_verb_reads_its_limits_and_says_why_nothing_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    import sys

    from edge_sdss import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge-sdss", "adapt", "--when", "charging", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    code, out, _ = call("--json", "--max-time", "30min")
    assert (code, json.loads(out)["outcome"]) == (0, "not due")
    code, _, err = call("--within", "soon")
    assert code == 2
    assert "write 6h; units: s, min, h" in err


def test_after_a_kill_the_next_call_goes_on_and_nothing_half_done_served(tiny: Path, tmp_path: Path) -> None:
    """The process is killed as by a loss of power, once a checkpoint is on the disk."""
    pytest.importorskip("peft")
    import os
    import signal
    import subprocess
    import sys
    import time

    import talk

    from edge_sdss.lm import LanguageModel
    from edge_sdss.session import Session

    tuning = {"epochs": 6, "batch_size": 1, "checkpoint_every": 1}
    settings = talk.settings(tiny, adapt={"least_new": 2, "poll_s": 0.1}, synthesis={"variants": 0}, tuning=tuning)
    home = tmp_path / "learner"
    with Session(home, settings, lm=LanguageModel.load(settings.model)) as session:
        list(session.observe_all(talk.dialogues(30)))
        session.annotate_from_stream()
    lines = []
    for section, values in settings.model_dump(exclude_defaults=True, mode="json").items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (tmp_path / "tiny.toml").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "edge_sdss", "adapt", "--when", "charging", "--home", str(home), "--json"]
    command += ["--config", str(tmp_path / "tiny.toml")]
    env = {**os.environ, "PYTHONPATH": str(Path(nightly.__file__).resolve().parent.parent)}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not list(home.glob("adapters/**/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    with Session(home, settings) as session:
        assert [each.state for each in session.store.rounds()] == ["running"]
        assert session.active_adapter is None
    spent = Ledger(home / "nightly.json", lambda: datetime.now(timezone.utc)).spent()[0]
    assert spent > 0, "a kill buys no time"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "A round begins: round 1 was cut short." in done.stderr
    assert json.loads(done.stdout)["outcome"] in ("accepted", "rejected"), done.stderr
