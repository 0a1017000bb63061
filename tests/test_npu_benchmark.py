"""What benchmarks/npu.py reckons from logits, by formulas of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

npu = pytest.importorskip("npu", reason="the benchmark's libraries are not installed")


def test_sums_over_positions() -> None:
    reference = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], np.float32)) + 5
    rows = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.3, 0.6]], np.float32))
    found = npu.compared(reference, rows, np.array([1, 2]))
    assert (found["n"], found["same"]) == (2, 1)
    assert found["nll_reference"] == pytest.approx(-np.log(0.2) - np.log(0.3), rel=1e-5)
    assert found["nll"] == pytest.approx(-np.log(0.25) - np.log(0.6), rel=1e-5)
    divergence = 0.7 * np.log(1.4) + 0.2 * np.log(0.8) + 0.1 * np.log(0.4) + 0.6 * np.log(2) + 0.3 * np.log(0.5)
    assert found["kl"] == pytest.approx(divergence, rel=1e-4)


def test_a_part_is_measured_once(tmp_path: Path) -> None:
    work, calls = npu.Work(tmp_path, tmp_path, 1, 1, 1, tmp_path), []
    for _ in range(2):
        assert work.part("one", lambda: calls.append(1) or {"n": 3}) == {"n": 3}
    assert calls == [1]


def test_lines_say_that_they_are_emulated() -> None:
    line = npu.line("fp16", "metric", 1.0, "%", 3)
    assert line["emulated"] is True
    assert "emulated" in line["settings"]["on"]
