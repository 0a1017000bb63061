"""What the training benchmark concludes from its figures: order of speeds, verdicts, the drawing, the tables."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
for library in ("torch", "transformers", "accelerate"):
    pytest.importorskip(library)

import results
import tables
import training
import training_candidates
import training_memory
import training_prediction
import training_scale
import training_speed
import training_sweep
from training_sweep import Point

from edge_sdss.errors import BudgetExceeded
from edge_sdss.profiling.versus import versus_many
from edge_sdss.tuning.fit import Fit

FIT = Fit(tokens=1024, loss_chunk=64, checkpointing=True, max_tokens=256)
SCALE = training_scale.Scale(threads=1)
MIB = 1 << 20


def points(*speeds: float, steps: int = 12, noise: float = 0.02) -> list[Point]:
    """Budgets of 1, 2, ... GiB, whose steps of 1000 tokens scatter around these speeds."""
    draws = np.random.default_rng(0)
    made = []
    for i, speed in enumerate(speeds):
        seconds = list(1000 / speed * np.exp(draws.normal(0, noise, steps)))
        budget = (i + 1) << 30
        made.append(Point(i + 1.0, budget, FIT, seconds, [1000] * steps, int(0.9 * budget), int(0.5 * budget)))
    return made


def factors(found: list[tuple[Point, Point]]) -> list[tuple[float, float]]:
    return [(small.factor, large.factor) for small, large in found]


def test_a_larger_budget_that_is_slower_is_found_wherever_it_is() -> None:
    assert training_sweep.violations(points(100, 120, 150)) == []
    assert factors(training_sweep.violations(points(100, 150, 120))) == [(2, 3)]
    assert factors(training_sweep.violations(list(reversed(points(150, 150, 100))))) == [(1, 3), (2, 3)]


def test_noise_is_no_violation() -> None:
    assert training_sweep.violations(points(*[100] * 8)) == []
    assert training_sweep.violations(points(100, 50, steps=5)) == []  # too few to say


def test_the_lines_fit_the_results_and_say_what_was_chosen(tmp_path: Path) -> None:
    found = list(training_sweep.lines(points(100, 150, 120), SCALE, 1.04))
    results.append(found, tmp_path)
    rows = tables.newest(tables.read(tmp_path), "training-sweep")
    assert [row["value"] for row in rows if row["metric"] == training_sweep.SPEED] == pytest.approx(
        [100, 150, 120], rel=0.02
    )
    assert [row["ratio"] for row in rows if row["metric"] == training_sweep.RSS] == [0.9] * 3
    assert {row["settings"]["fit"] for row in rows[:-1]} == {FIT.words}
    assert rows[-1]["value"] == 1
    assert "MISSED" in training.judged(found[-1])
    text = tables.rewrite("<!-- table:training-sweep -->\n<!-- /table -->", tables.read(tmp_path))
    assert text.count("\n| ") == 2 + len({line["case"] for line in found})


def test_the_drawing_is_of_the_newest_run_alone_and_made_of_the_results_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no results"):
        training_sweep.draw(tmp_path, tmp_path / "plot.svg")
    stamps = [{"device": "board", "commit": "abc", "time": f"2026-01-0{day}T00:00:00+00:00"} for day in (1, 2)]
    old, new = points(100, 150), points(200, 300, 400)
    new = [replace(point, factor=point.factor + 0.5) for point in new]
    text = [
        json.dumps({**results.validated(line), **stamp}) + "\n"
        for run, stamp in zip((old, new), stamps, strict=True)
        for line in training_sweep.lines(run, SCALE)
    ]
    (tmp_path / "board.jsonl").write_text("".join(text), encoding="utf-8")
    training_sweep.draw(tmp_path, tmp_path / "plot.svg")
    drawing = ET.parse(tmp_path / "plot.svg").getroot()
    assert drawing.get("aria-label", "").startswith("Left: speed against the budget, from 20")
    assert "from 1024 to 3072 MiB" in drawing.get("aria-label", "")
    style = next(each.text or "" for each in drawing.iter("{http://www.w3.org/2000/svg}style"))
    svg = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    used = {name.partition(")")[0] for name in svg.split("var(")[1:]}
    assert used
    assert all(style.count(f"{name}:") == 2 for name in used)  # light and dark


def test_speed_is_tokens_over_time_and_its_ratio_the_peers_time_over_ours() -> None:
    def slept(seconds: float) -> Callable[[], None]:
        def work() -> None:
            now[0] += seconds

        return work

    now = [0.0]
    functions = {"peer": slept(4), "ours": slept(2)}
    found = versus_many(functions, blocks=7, min_block_s=1e-3, clock=lambda: now[0])["ours"]
    line = training_speed.line("case", found.peer, 600) | training_speed.ratio(found)
    assert (line["value"], line["ratio"]) == (300, 2)
    assert results.validated({**line, "settings": {}})["lo"] <= 300


def test_the_least_budget_that_does() -> None:
    tried = []

    def attempt(budget: int) -> str:
        tried.append(budget)
        if budget < 1040:
            raise BudgetExceeded("too little")
        return "done"

    assert training_scale.least_that_does(attempt, 1000) == (1.06, "done")
    assert tried == [1000, 1030, 1060]
    with pytest.raises(BudgetExceeded):
        training_scale.least_that_does(attempt, 100)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"bench": "training", "case": "edge_sdss, nf4", "metric": "peak of live tensors / M*", "value": 2}, "MISSED"),
        ({"bench": "training", "case": "edge_sdss, nf4", "metric": "peak of live tensors / M*", "value": 1.1}, "met"),
        ({"bench": "training", "case": "PEFT + Trainer, nf4", "metric": "peak of live tensors / M*", "value": 3}, ""),
        ({"bench": "training-speed", "case": "edge_sdss, tightest budget", "metric": "speed", "ratio": 0.71}, "met"),
        ({"bench": "training-speed", "case": "edge_sdss, without a budget", "metric": "speed", "ratio": 0.9}, "MISSED"),
    ],
)  # fmt: skip
def test_a_target_that_is_missed_is_said(line: dict[str, Any], words: str) -> None:
    assert training.judged(line).endswith(words)
    assert bool(training.judged(line)) == bool(words)


def test_enough_configurations_and_architectures_are_predicted() -> None:
    cases = training_prediction.cases(quick=False)
    assert len(set(cases)) == len(cases) >= 30
    assert len({case.model for case in cases}) >= 2
    assert {case.weights for case in cases} == set(training_prediction.KINDS)
    assert {case.checkpointing for case in cases} == {True, False}


@pytest.mark.parametrize("trainer", [training_candidates.OURS, training_candidates.PLAIN])
def test_a_candidate_does_its_steps_one_by_one_and_tells_its_peaks(trainer: str, tiny: Path) -> None:
    pytest.importorskip("peft")
    pairs = [("Who are you?", "I am here."), ("What is that?", "A cat on the mat, of course.")] * 2
    job = training_candidates.Job(trainer, str(tiny), "float32", pairs, 2, 64, gated=True, tensors=True)
    candidate = training_candidates.Candidate(job, 1)
    try:
        assert candidate.ready["tokens"] > candidate.ready["longest"] > candidate.ready["labels"] > 0
        assert all(candidate.step()["seconds"] > 0 for _ in range(2))
        ended = candidate.end()
    finally:
        candidate.close()
    assert ended["steps"] == 2
    weights = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert weights < ended["peak_tensor_bytes"] < ended["peak_rss_bytes"]


def test_a_candidate_that_fails_says_why(tiny: Path) -> None:
    job = training_candidates.Job(training_candidates.OURS, str(tiny / "nowhere"), "float32", [("a", "b")], 1, 64)
    with pytest.raises(training_candidates.Failed, match="nowhere"):
        training_candidates.measure(job, 1)


def test_a_peer_that_cannot_do_a_job_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(job: training_candidates.Job, threads: int) -> dict[str, Any]:
        if job.trainer == refused:
            raise training_candidates.Failed("not here")
        return {"peak_rss_bytes": MIB}

    monkeypatch.setattr(training_memory, "measure", measure)
    job = training_candidates.Job(training_candidates.OURS, None, "nf4", [], 1, 64)
    refused = training_candidates.TRL
    assert training_candidates.TRL not in training_memory.all_of(job, SCALE)
    refused = training_candidates.OURS
    with pytest.raises(training_candidates.Failed):
        training_memory.all_of(job, SCALE)
