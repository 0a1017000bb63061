"""The study of selection: streams, splits, claims, cells, and what is concluded from results."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quality import analysis, protocol, sets, streams
from quality.ledger import Ledger
from quality.protocol import Cell, Protocol

from edge_sdss.errors import InputError
from edge_sdss.types import Dialogue

TOPICS = ("food", "work", "travel", "home")
DIALOGUES = [Dialogue(f"question {i}", f"answer {i}") for i in range(400)]
LABELS = [TOPICS[i % 4] for i in range(400)]
TOPIC_OF = {d.id: topic for d, topic in zip(DIALOGUES, LABELS, strict=True)}


def stays(stream: list[Dialogue]) -> float:
    """The share of neighbours that have one topic."""
    topics = [TOPIC_OF[d.id] for d in stream if d.id in TOPIC_OF]
    return sum(a == b for a, b in pairwise(topics)) / (len(topics) - 1)


# streams


@pytest.mark.parametrize("order", protocol.ORDERS)
def test_every_order_offers_the_same_dialogues_and_depends_on_the_seed_alone(order: str) -> None:
    stream = streams.arrange(order, DIALOGUES, LABELS, 3)
    assert stream == streams.arrange(order, DIALOGUES, LABELS, 3)
    own = [d for d in stream if d.id in TOPIC_OF]
    assert Counter(d.id for d in own) == Counter(d.id for d in DIALOGUES)
    if order != "natural":
        assert stream != streams.arrange(order, DIALOGUES, LABELS, 4)


def test_topics_stay_as_long_as_the_order_says() -> None:
    assert streams.arrange("natural", DIALOGUES, LABELS, 0) == DIALOGUES
    expected = {"shuffled": 0.25, "sticky-0.5": 0.625, "sticky-0.9": 0.925, "sticky-0.99": 0.9925}
    for order, share in expected.items():
        found = np.mean([stays(streams.arrange(order, DIALOGUES, LABELS, seed)) for seed in range(8)])
        assert abs(found - share) < 0.04, order
    blocked = streams.arrange("blocked", DIALOGUES, LABELS, 0)
    assert stays(blocked) == (400 - 4) / 399


def test_noise_is_a_third_of_the_offers_and_nearly_all_alike() -> None:
    stream = streams.arrange("noisy", DIALOGUES, LABELS, 0)
    noise = [d for d in stream if d.id not in TOPIC_OF]
    assert abs(len(noise) / len(stream) - streams.CHATTER_SHARE) < 0.01
    assert len({d.prompt.split()[0].strip(",!") for d in noise}) < len(noise) / 5


@pytest.mark.parametrize("order", ["sorted", "sticky", "sticky-2", "sticky-x"])
def test_an_unknown_order_is_refused(order: str) -> None:
    with pytest.raises(InputError, match="no such order"):
        streams.arrange(order, DIALOGUES, LABELS, 0)


# sets


def written(folder: Path, name: str, records: list[dict[str, str]]) -> Path:
    file = folder / sets.FILES[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records), encoding="utf-8")
    return folder


def record(i: int, answer_words: int = 6) -> dict[str, str]:
    answer = " ".join(f"w{i}x{j}" for j in range(answer_words))
    return {"instruction": f"Please tell me about subject number{i} today", "input": "", "output": answer}


def test_a_set_is_short_split_and_free_of_near_duplicates(tmp_path: Path) -> None:
    twins = [{**record(0), "output": record(0)["output"] + " " + "same " * 3} for _ in range(1)]
    records = [record(i, 2 + i % 70) for i in range(300)] + twins
    small = replace(Protocol(), offers=100, held_out=30)
    found = sets.load("alpaca", written(tmp_path, "alpaca", records), small)
    assert len(found.stream) == 100
    assert 20 <= len(found.held_out) <= 30
    assert all(3 <= len(d.response.split()) <= 60 for d in found.stream)
    assert not {d.id for d in found.stream} & {e.dialogue_id for e in found.held_out}
    again = sets.load("alpaca", written(tmp_path, "alpaca", records[::-1]), small)
    assert {d.id for d in again.stream} == {d.id for d in found.stream}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for name, data, words in (
        ("moon", tmp_path, "no such set"),
        ("alpaca", None, "--data"),
        ("alpaca", tmp_path, "is not there"),
    ):
        with pytest.raises(InputError, match=words):
            sets.load(name, data, Protocol())


# grids


def test_the_grid_is_what_was_promised_and_keeps_its_hands_off_the_confirmation_sets() -> None:
    grids = protocol.grids()
    main = grids["main"]
    assert len({c.set for c in main}) >= 4
    for name in {c.set for c in main}:
        own = [c for c in main if c.set == name]
        for policy in ("sdss", "random", "reservoir", "fifo", "kcenter", "first"):
            assert len({(c.order, c.seed) for c in own if c.policy == policy}) == 6
        assert any(c.policy == "none" for c in own)
    every = [cell for cells in grids.values() for cell in cells]
    assert not {c.set for c in every} & set(protocol.CONFIRMATION)
    assert {c.bins for c in every} >= {8, 32, 128}
    assert not set(protocol.CONFIRMATION) & set(protocol.DEVELOPMENT)
    assert {c.set for c in protocol.confirmation(["sdss"])} == set(protocol.CONFIRMATION)


def test_a_part_of_the_grid_is_asked_for_by_set_policy_and_order() -> None:
    import study

    given = study._parser().parse_args(["run", "--grid", "orders", "--order", "noisy", "--policy", "sdss"])
    assert {(c.order, c.policy) for c in study.chosen(given)} == {("noisy", "sdss")}
    assert len(study.chosen(given)) == 3
    given = study._parser().parse_args(["run", "--grid", "orders", "--set", "moon"])
    with pytest.raises(
        InputError, match=r"no cell is of all that was asked for.*--set alpaca, memorybank; --policy sdss"
    ):
        study.chosen(given)


def test_what_is_held_fixed_is_in_the_digest() -> None:
    assert Protocol().digest == Protocol().digest
    slower = Protocol().settings.override({"tuning": {"learning_rate": 1e-4}})
    chatty = Protocol().settings.override({"chat": {"max_new_tokens": 7}, "selection": {"policy": "fifo"}})
    changed = [replace(Protocol(), epochs=9), replace(Protocol(), settings=slower), protocol.QUICK]
    assert len({p.digest for p in [Protocol(), *changed]}) == 4
    assert replace(Protocol(), settings=chatty).digest == Protocol().digest


# the ledger


def line_of(cell: Cell, **more: Any) -> dict[str, Any]:
    return {"cell": asdict(cell), "protocol": "p", "time": "2026-01-01T00:00:00+00:00", **more}


def test_a_torn_line_is_no_line_and_does_no_harm(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "r.jsonl", tmp_path / "claims")
    first, second = Cell("a", "fifo"), Cell("a", "random")
    ledger.append(line_of(first))
    with ledger.path.open("a") as file:
        file.write('{"cell": {"set": "a", "pol')
    assert ledger.done("p") == {first}
    assert ledger.done("q") == set()
    ledger.append(line_of(second))
    assert [line["cell"]["policy"] for line in ledger.lines()] == ["fifo", "random"]
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.append(line_of(second, nll=math.nan))
    assert len(ledger.lines()) == 2


def test_append_waits_for_another_writer(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "r.jsonl", tmp_path / "claims")
    ledger.append(line_of(Cell("a", "fifo")))
    with ledger.path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("half a li")  # another process is in the middle of a line
        other.flush()
        writer = threading.Thread(target=ledger.append, args=(line_of(Cell("a", "random")),))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        other.truncate(other.tell() - len("half a li"))
        other.seek(0, 2)
        other.write(json.dumps(line_of(Cell("a", "sdss"))) + "\n")
    writer.join(30)
    assert [line["cell"]["policy"] for line in ledger.lines()] == ["fifo", "sdss", "random"]


def _work(path: Path, claims: Path, cells: list[Cell]) -> None:
    ledger = Ledger(path, claims)
    for cell in cells:
        with ledger.claim(cell, "p") as mine:
            if mine:
                ledger.append(line_of(cell, by=os.getpid(), filler="x" * 20_000))


def test_processes_share_a_file_without_harm_and_do_each_cell_once(tmp_path: Path) -> None:
    cells = [Cell("a", "fifo", seed=seed) for seed in range(60)]
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(tmp_path / "r.jsonl", tmp_path / "claims", cells[i:] + cells[:i]))
        for i in (0, 20, 40)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    lines = Ledger(tmp_path / "r.jsonl", tmp_path / "claims").lines()
    assert sorted(line["cell"]["seed"] for line in lines) == list(range(60))


def _hold(path: Path, claims: Path, cell: Cell, told: Any) -> None:
    with Ledger(path, claims).claim(cell, "p") as mine:
        told.send(mine)
        signal.pause()


def test_the_claim_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    cell = Cell("a", "fifo")
    holder = context.Process(target=_hold, args=(tmp_path / "r.jsonl", tmp_path / "claims", cell, there))
    holder.start()
    assert here.recv() is True
    ledger = Ledger(tmp_path / "r.jsonl", tmp_path / "claims")
    with ledger.claim(cell, "p") as mine:
        assert not mine
    holder.kill()
    holder.join(30)
    with ledger.claim(cell, "p") as mine:
        assert mine
        ledger.append(line_of(cell))
    with ledger.claim(cell, "p") as mine:
        assert not mine


# what is concluded


def test_holm_is_the_step_down_procedure() -> None:
    assert analysis.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert analysis.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_nor_changes_an_order(ps: list[float]) -> None:
    adjusted = analysis.holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted, strict=True))
    assert [adjusted[i] for i in np.argsort(ps, kind="stable")] == sorted(adjusted)


def table(draws: np.random.Generator, effect: float, run: float, item: float, rest: float) -> np.ndarray:
    """Differences as the study has them: a run shifts all its items, an item differs from policy to policy."""
    of_runs, of_items = draws.normal(0, run, (6, 1)), draws.normal(0, item, (1, 200))
    return effect + of_runs + of_items + draws.normal(0, rest, (6, 200))


@pytest.mark.parametrize("spread", [(0.01, 0.06, 0.15), (0.03, 0.02, 0.05)])
def test_luck_is_seldom_called_a_difference_and_an_effect_is_found(spread: tuple[float, float, float]) -> None:
    pytest.importorskip("scipy")
    draws = np.random.default_rng(0)
    false = sum(analysis.contrast([table(draws, 0.0, *spread)]).p < 0.05 for _ in range(60))
    assert false <= 7  # of 60; 3 are to be expected
    found = sum(analysis.contrast([table(draws, -0.06, *spread)]).hi < 0 for _ in range(10))
    assert found >= 8


def test_an_interval_is_about_what_theory_gives_and_sets_count_the_same() -> None:
    pytest.importorskip("scipy")
    draws = np.random.default_rng(1)
    items = draws.normal(0.02, 0.1, (1, 400))
    found = analysis.contrast([items])
    assert found.mean == pytest.approx(items.mean())
    assert (found.hi - found.lo) / 2 == pytest.approx(1.96 * items.std() / 20, rel=0.1)
    runs = draws.normal(0.02, 0.1, (6, 1))
    by_run = analysis.contrast([np.repeat(runs, 50, axis=1)])
    assert (by_run.hi - by_run.lo) / 2 == pytest.approx(2.571 * runs.std(ddof=1) / math.sqrt(6), rel=0.1)
    both = analysis.contrast([np.full((2, 10), 1.0), np.full((6, 500), 0.0)])
    assert both.mean == pytest.approx(0.5)
    same = analysis.contrast([np.zeros((6, 50))])
    assert (same.lo, same.hi, same.p) == (0, 0, 1)
    assert analysis.verdict(same, 1.0, "nll") == "tie"
    higher = analysis.Contrast(0.1, 0.05, 0.15, 0.01, runs=6, items=9)
    assert analysis.verdict(higher, 0.01, "nll") == "worse"
    assert analysis.verdict(higher, 0.01, "rouge1") == "better"
    assert analysis.verdict(found, 0.01, "nll") == "one run"


def result(policy: str, seed: int = 0, shift: float = 0.0, **more: Any) -> dict[str, Any]:
    draws = np.random.default_rng(seed)
    nll = draws.normal(2, 0.3, 80) + shift
    cell = Cell(more.pop("set", "alpaca"), policy, seed=seed, **more)
    facts = {"model": "m", "commit": "c", "device": "board", "items": "i", "requests": 32, "curve": [[800, 2.0]]}
    seconds = {"select": 1.0, "synthesise": 0.0, "train": 20.0, "evaluate": 9.0}
    rouge = draws.uniform(0.2, 0.4, 20) - shift
    return line_of(cell, nll=nll.tolist(), rouge1=rouge.tolist(), seconds=seconds, **facts)


def test_differences_pair_equal_runs_and_the_base_model_with_each() -> None:
    base = [result("reservoir", seed) for seed in range(3)]
    ours = [result("sdss", seed, shift=0.1 * (seed + 1)) for seed in (2, 1)]
    found = analysis.differences(ours, base, "nll")
    assert found is not None
    assert found.mean(axis=1) == pytest.approx([0.2, 0.3])
    none = analysis.differences([result("none", 7)], base, "nll")
    assert none is not None
    assert none.shape == (3, 80)
    assert analysis.differences([result("sdss", 9)], base, "nll") is None
    with pytest.raises(ValueError, match="other items"):
        analysis.differences([{**result("sdss", 0), "items": "j"}], base, "nll")


def test_the_report_says_what_the_results_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    from quality import report

    lines = [result("reservoir", seed, set=name) for name in ("alpaca", "esconv") for seed in range(6)]
    lines += [result("sdss", seed, shift=-0.1, set=name) for name in ("alpaca", "esconv") for seed in range(6)]
    lines += [result("random", seed, set=name) for name in ("alpaca", "esconv") for seed in range(6)]
    lines += [result("none", set="alpaca", shift=0.5)]
    lines += [result(p, seed, bins=8) for p in ("sdss", "reservoir") for seed in range(2)]
    lines += [result(p, 0, shift=9.0 if p == "sdss" else 0.0, order="blocked") for p in ("sdss", "reservoir")]
    lines[0]["device"] = "another board"
    lines += [{**result("fifo"), "protocol": "older", "time": "2025-01-01T00:00:00+00:00"}]
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = report.write(file, tmp_path / "docs").read_text(encoding="utf-8")
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("| ")}
    summary = report.summary(lines)
    by_policy = {row.split(" | ")[0].strip("| "): row for row in summary.splitlines()}
    assert "-0.100 (-0.100 to -0.100) | better | 2 | 12" in by_policy["sdss"]
    assert "+0.000 (+0.000 to +0.000) | tie" in by_policy["random"]
    assert "better" not in by_policy["none"]
    assert "tie" not in by_policy["none"]
    assert "fifo" not in text
    assert " cells on another board, board, commits c. " in text
    assert "standing for Prosocial-Dialog" in text
    assert "## 8 bins\n" in text
    assert "What synthesis adds" not in text
    assert "## 32 bins, blocked\n" in text
    assert "%" in rows["alpaca"]
    assert (tmp_path / "docs" / "study-differences.svg").read_text(encoding="utf-8").startswith("<svg")
    assert (tmp_path / "docs" / "study-sizes.svg").is_file()
    assert report.write(file, tmp_path / "docs").read_text(encoding="utf-8") == text


def test_what_synthesis_adds_is_against_the_same_runs_without() -> None:
    pytest.importorskip("scipy")
    from quality import report

    lines = [result(p, seed, shift=s) for p, s in (("sdss", 0.0), ("fifo", 5.0)) for seed in range(4)]
    lines += [result("sdss", seed, shift=9.0, order="sticky-0.9") for seed in range(4)]
    lines += [{**result("sdss", seed, shift=-0.2, variants=3), "examples": 50 + seed} for seed in (0, 1, 2)]
    lines += [{**result("random", 0, variants=3), "examples": 40}]
    assert list(report.synthesis_rows(lines)) == [
        ("alpaca", "sdss", "+0.200 (+0.200 to +0.200)", "-0.200 (-0.200 to -0.200)", "51", "3"),
        ("alpaca", "random", "", "", "40", "1"),
    ]


def test_sets_that_confirm_are_told_apart_from_those_for_design(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    import tables
    from quality import report

    shifts = {"reservoir": 0.0, "sdss": 0.2, "random": -0.3}
    lines = [result(p, seed, shift=s, set="alpaca") for p, s in shifts.items() for seed in range(3)]
    before = report.summary(lines)
    assert report.confirmation(lines) == ""
    shifts = {"reservoir": 0.0, "sdss": 0.2, "facility-location": -0.1}
    lines += [
        result(p, seed, shift=s, set=name)
        for name in ("dolly", "mts_dialog")
        for p, s in shifts.items()
        for seed in range(3)
    ]
    assert report.summary(lines) == before
    rows = {row.split(" | ")[0].strip("| "): row for row in report.confirmation(lines).splitlines()}
    own = rows["facility-location"]
    assert "-0.100 (-0.100 to -0.100) | better | 2 | 6" in own
    assert "-0.300 (-0.300 to -0.300)" in own  # against the paper's policy
    assert "random" not in rows
    block = "<!-- table:confirmation -->\nold\n<!-- /table -->"
    assert own in tables.rewrite(block, [], lines)
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = report.write(file, tmp_path / "docs").read_text(encoding="utf-8")
    design, confirmed = text.split("## Confirmation")
    assert "dolly" not in design
    assert own in confirmed
    assert "### mts_dialog" in confirmed


# a cell, by the product's own path


@pytest.fixture(scope="module")
def bench(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    for library in ("torch", "peft", "rouge_score"):
        pytest.importorskip(library)
    from quality.cell import Bench

    folder = tmp_path_factory.mktemp("study")
    records = [record(i) for i in range(60)]
    changes: Any = {
        "model": {"name": str(tiny), "dtype": "float32", "max_tokens": 64},
        "tuning": {"max_tokens": 64},
        "evaluation": {"max_items": 10, "rouge_items": 4, "max_new_tokens": 4, "batch_size": 8},
    }
    small = Protocol(offers=40, held_out=10, epochs=1, settings=Protocol().settings.override(changes))
    return Bench(small, written(folder, "alpaca", records), folder / "cache")


def test_a_cell_measures_every_item_and_keeps_to_its_budget(bench: Any) -> None:
    line = bench.run(Cell("alpaca", "reservoir", bins=8, seed=1))
    held_out = bench.material("alpaca").held_out
    assert len(line["nll"]) == len(held_out) > 5
    assert len(line["rouge1"]) == 4
    assert len(line["kept"]) == line["requests"] == line["examples"] == 8
    assert line["offers"] == 40
    assert 8 <= line["admitted"] <= 40
    assert line["steps"] == 1
    assert not line["reused"]
    assert set(line["kept"]) <= {d.id for d in bench.material("alpaca").stream}
    base = bench.run(Cell("alpaca", "none"))
    assert base["requests"] == base["steps"] == base["examples"] == 0
    assert base["items"] == line["items"]
    assert base["nll"] != line["nll"]
    again = bench.run(Cell("alpaca", "reservoir", bins=8, seed=1))
    assert again["reused"]
    assert again["nll"] == line["nll"]
    assert again["seconds"]["train"] == line["seconds"]["train"]
    json.dumps(line, allow_nan=False)


def test_policies_that_keep_the_same_share_a_training_and_no_other_do(bench: Any) -> None:
    def first(**changes: Any) -> dict[str, Any]:
        line: dict[str, Any] = bench.run(Cell("alpaca", "first", **{"order": "natural", "bins": 8} | changes))
        return line

    assert not first()["reused"]
    assert bench.run(Cell("alpaca", "reservoir", bins=40, order="blocked"))["reused"] is False
    assert bench.run(Cell("alpaca", "fifo", bins=40))["reused"]  # there was room for all
    unlike = [first(seed=1), first(order="shuffled"), first(bins=7), first(interval=20)]
    assert [line["reused"] for line in unlike] == [False] * 4
    assert unlike[0]["kept"] == unlike[3]["kept"] == first()["kept"]


def test_bytes_rounds_variants_and_the_whole_stream(bench: Any) -> None:
    by_bytes = bench.run(Cell("alpaca", "fifo", max_bytes=4000))
    assert by_bytes["buffer_bytes"] <= 4000
    assert 2 < by_bytes["examples"] < 40
    passes = by_bytes["steps"] * bench.settings.tuning.batch_size
    assert passes >= bench.protocol.passes - by_bytes["examples"]
    rounds = bench.run(Cell("alpaca", "fifo", bins=8, interval=20))
    assert [offers for offers, _ in rounds["curve"]] == [20, 40]
    assert rounds["requests"] == 16
    assert rounds["curve"][-1][1] == pytest.approx(np.mean(rounds["nll"]), abs=1e-3)
    varied = bench.run(Cell("alpaca", "fifo", bins=4, variants=2))
    assert varied["variants"]["made"] == 8
    assert varied["examples"] == 4 + varied["variants"]["kept"]
    whole = bench.run(Cell("alpaca", "full"))
    assert whole["examples"] == whole["offers"] == 40


def test_the_program_goes_on_where_it_was_and_refuses_politely(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    import study

    monkeypatch.setattr(study, "Bench", lambda *_: bench)
    monkeypatch.setattr(protocol, "QUICK", bench.protocol)
    places = ["--quick", "--results", str(tmp_path / "r.jsonl"), "--cache", str(tmp_path), "--out", str(tmp_path)]
    asked = ["run", *places, "--set", "alpaca"]
    assert study.main([*asked, "--limit", "1"]) == 0
    assert study.main(asked) == 0
    assert len((tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert study.main(asked) == 1
    assert study.main(["status", *places]) == 0
    assert "sdss" in (tmp_path / "study.md").read_text(encoding="utf-8")
    capsys.readouterr()
    monkeypatch.undo()
    assert study.main(["run", "--grid", "main", "--results", str(tmp_path / "s.jsonl"), "--cache", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().err
    assert study.main(["run", "--set", "dolly", "--results", str(tmp_path / "s.jsonl"), "--cache", str(tmp_path)]) == 2
    assert "--confirm POLICY" in capsys.readouterr().err
