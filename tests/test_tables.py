from __future__ import annotations

import fcntl
import json
import math
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import results
import tables
from hypothesis import given
from hypothesis import strategies as st

from edge_sdss import device

LINE = {"bench": "import", "case": "package", "metric": "median time", "value": 41.0, "unit": "ms"}
README = """before
<!-- table:import -->
old
<!-- /table -->
between
<!-- table:eoe -->
<!-- /table -->
after
"""


def stored(**changes: Any) -> dict[str, Any]:
    stamp = {"commit": "abc1234", "device": "board", "time": "2026-01-01T00:00:00+00:00"}
    return {**results.validated(LINE), **stamp, **changes}


def folder_with(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for line in lines:
        with (folder / f"{line['device']}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    return folder


def test_append_stamps_each_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    file = results.append([{**LINE, "lo": 40, "hi": 42, "n": 15}], tmp_path)
    first = file.read_text()
    assert results.append([{**LINE, "peer": "other", "ratio": 0.5}, LINE], tmp_path) == file
    assert file.read_text().startswith(first)
    lines = tables.read(tmp_path)
    assert [line["peer"] for line in lines] == [None, "other", None]
    expected = "bench case metric value unit lo hi n peer ratio settings commit device emulated time"
    assert all(line.keys() == set(expected.split()) for line in lines)
    assert {f"{line['device']}.jsonl" for line in lines} == {file.name}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"unit": None}, "unit missing"),
        ({"value": None}, "value missing"),
        ({"value": math.nan}, "no finite number"),
        ({"value": "41"}, "no finite number"),
        ({"hi": math.inf}, "no finite number"),
        ({"lo": 42}, "lo > value"),
        ({"lo": 1, "hi": 40}, "value > hi"),
        ({"peer": "other"}, "peer and ratio"),
        ({"ratio": 2.0}, "peer and ratio"),
        ({"unti": "ms"}, "unknown unti"),
        ({"commit": "chosen by hand"}, "unknown commit"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        results.append([LINE, {**LINE, **changes}], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_append_waits_for_another_writer(tmp_path: Path) -> None:
    file = tmp_path / f"{device.slug()}.jsonl"
    writer = threading.Thread(target=results.append, args=([LINE, LINE], tmp_path))
    with file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
        other.write(json.dumps(stored(case="other")) + "\n")
    writer.join()
    assert [line["case"] for line in tables.read(tmp_path)] == ["other", "package", "package"]


def test_the_device_is_a_slug_that_names_the_cores() -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-\d+-cores", device.slug())


def test_commit_tells_a_changed_tree_but_not_new_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "benchmarks", stored()) / "results"
    monkeypatch.setattr(results, "FOLDER", folder)
    assert results.commit() == "unknown"
    code, figures = tmp_path / "code.py", folder / "board.jsonl"
    folder.mkdir()
    code.write_text("1")
    figures.write_text("")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.hooksPath=/dev/null"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{7,}", results.commit())
    figures.write_text("{}\n")
    assert not results.commit().endswith("-dirty")
    code.write_text("2")
    assert results.commit().endswith("-dirty")


def test_newest_line_of_each_case_metric_and_device_wins() -> None:
    lines = [
        stored(value=1.0, time="2026-01-02T00:00:00+00:00"),
        stored(value=2.0, time="2026-01-01T00:00:00+00:00"),
        stored(value=3.0, device="other"),
        stored(value=4.0, case="command line"),
        stored(value=5.0, bench="eoe"),
        stored(value=6.0, metric="worst time"),
    ]
    assert [line["value"] for line in tables.newest(lines, "import")] == [1.0, 3.0, 4.0, 6.0]
    later_of_equals = tables.newest([*lines, lines[0] | {"value": 7.0}], "import")[0]
    assert later_of_equals["value"] == 7.0


def test_a_row_says_interval_peer_device_and_emulation() -> None:
    row = stored(lo=40.5, hi=1234.5, n=15, peer="a|b", ratio=0.123456, emulated=True, value=41.23456)
    *_, line = tables.table([row]).splitlines()
    assert line == (
        "| package | median time | 41.23 ms | 40.5 to 1,234 | 15 | a\\|b (× 0.1235) | board (emulated) | abc1234 |"
    )


@given(st.floats(min_value=1e-4, max_value=1e15) | st.floats(min_value=-1e15, max_value=-1e-4))
def test_a_printed_number_is_within_half_a_unit_of_its_fourth_digit(value: float) -> None:
    shown = tables.number(value)
    assert "e" not in shown
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=5.001e-4)


def test_rewrite_fills_the_blocks_and_leaves_the_rest() -> None:
    lines = [stored(), stored(bench="eoe", case="token")]
    text = tables.rewrite(README, lines)
    assert "old" not in text
    assert [text.count(case) for case in ("| package |", "| token |")] == [1, 1]
    assert re.sub(r"^\|.*\n", "", text, flags=re.M) == README.replace("old\n", "")
    assert tables.rewrite(text, lines) == text


def test_check_fails_until_the_tables_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README, encoding="utf-8")
    folder_with(folder, stored(), stored(bench="eoe"))
    assert tables.main(["--check"], [readme], folder) == 1
    assert "benchmarks/tables.py" in capsys.readouterr().out
    assert readme.read_text(encoding="utf-8") == README
    assert tables.main([], [readme], folder) == 0
    assert tables.main(["--check"], [readme], folder) == 0
    folder_with(folder, stored(value=9.0, time="2027-01-01T00:00:00+00:00"))
    assert tables.main(["--check"], [readme], folder) == 1


def test_a_block_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table:import has no results; there are eoe"):
        tables.rewrite(README, [stored(bench="eoe")])


def test_the_study_has_a_table_of_its_own() -> None:
    pytest.importorskip("scipy")
    cell = {"set": "a", "policy": "reservoir", "order": "shuffled", "seed": 0, "bins": 32}
    cell |= {"max_bytes": None, "variants": 0, "interval": None}
    base = {"cell": cell, "protocol": "p", "time": "t", "items": "i", "nll": [2.0, 3.0], "rouge1": [0.5, 0.5]}
    lines = [base, {**base, "cell": {**cell, "policy": "sdss"}, "nll": [1.5, 2.5], "rouge1": [0.5, 0.5]}]
    block = "<!-- table:study -->\nold\n<!-- /table -->\n"
    made = tables.rewrite(block, [], lines)
    assert "| sdss | +0.000 (+0.000 to +0.000) | -0.500 (-0.500 to -0.500) |" in made
    assert tables.rewrite(made, [], lines) == made
    with pytest.raises(ValueError, match="table:study has no results"):
        tables.rewrite(block, [])
