"""`profile` as a user runs it: a fake sysfs, a fake tegrastats, a recording, wrong input; its page in a browser."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path

import boards
import browser
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

import talk

from edge_sdss import cli
from edge_sdss.lm import LanguageModel
from edge_sdss.profiling import files

FIXTURES = Path(__file__).parent / "fixtures" / "boards"
QUICK = ("--runs", 2, "--repetitions", 2, "--seconds", 2.5, "--new", 8, "--prompt", 32)
NANO = boards.BOARDS["orin-nano-8gb-jp6"]


@pytest.fixture
def call(monkeypatch, capsys, tiny, tmp_path):
    """Runs the command line with the tiny model; returns (exit code, stdout, stderr)."""
    settings = talk.settings(tiny)
    lm = LanguageModel.load(settings.model)
    monkeypatch.setattr(LanguageModel, "load", classmethod(lambda *a, **k: lm))
    monkeypatch.chdir(tmp_path)
    sections = settings.model_dump(exclude_defaults=True, mode="json")
    lines = [f"[{name}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in s.items()) for name, s in sections.items()]
    Path("tiny.toml").write_text("\n".join([*lines, "[profile]", "idle_s = 1.5"]), encoding="utf-8")

    def run(*arguments):
        verb, *rest = map(str, arguments)
        given = [verb, *rest, *(["--config", "tiny.toml"] if verb == "profile" else [])]
        monkeypatch.setattr(sys, "argv", ["edge-sdss", *given])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def plant_tegrastats(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """A program of that name which prints the line ten times a second, first on PATH."""
    folder.mkdir()
    program = folder / "tegrastats"
    program.write_text(f"#!/bin/sh\nwhile :; do echo '{line}'; sleep 0.1; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_fake_board_is_measured_from_end_to_end(call, tmp_path, monkeypatch):
    root = boards.write(tmp_path / "root", NANO)
    plant_tegrastats(tmp_path / "bin", monkeypatch, NANO.line)
    code, _out, err = call("profile", "decode", "select", "--root", root, "--out", "a", *QUICK)
    assert code == 0, err
    report = files.load(Path("a"))
    assert report.total_scope == NANO.scope
    assert {s.name for s in report.sensors if s.usable} >= {"ina3221", "tegrastats", "thermal"}
    for case in report.cases:
        # The planted rails are constant: whatever the case took, it drew this power, counted once.
        assert case.energy.mean_w == pytest.approx(NANO.watts, rel=0.01)
        seconds = sum(run.end_s - run.start_s for run in case.runs)
        assert case.energy.total_j == pytest.approx(NANO.watts * seconds, rel=0.01)
        assert case.energy.per_item_j == pytest.approx(case.energy.total_j / sum(run.items for run in case.runs))
        assert case.energy.above_idle_j == pytest.approx(0, abs=0.01 * case.energy.total_j)
        assert case.metrics["rate"].median > 0
    assert report.device.profile == "orin-nano-super"
    assert (report.device.l4t or "").startswith("36")
    assert report.device.replayed == (platform.machine() == "x86_64")  # a board's sensors, another's processor
    kinds = {channel.kind for channel in report.trace}
    assert {"power", "temperature", "frequency", "load", "memory"} <= kinds
    assert "J/tok" in Path("a/report.md").read_text(encoding="utf-8")


def test_a_recording_replays_and_says_so(call):
    source = next(FIXTURES.glob("thor*"))
    code, out, err = call("profile", "select", "--replay", source, "--out", "a", *QUICK, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["device"]["replayed"]
    assert report["cases"][0]["energy"]["mean_w"] is not None
    call("profile", "select", "--out", "b", *QUICK)
    code, out, _err = call("compare", "a", "b", "--max-regress", "5%", "--json")
    assert code == 2
    rows = json.loads(out)["rows"]
    assert {row["verdict"] for row in rows} == {"incomparable"}
    assert any("replayed" in reason for row in rows for reason in row["reasons"])


def test_recording_a_board_and_replaying_it(call, tmp_path, monkeypatch):
    root = boards.write(tmp_path / "root", NANO)
    plant_tegrastats(tmp_path / "bin", monkeypatch, NANO.line)
    code, _out, err = call("profile", "--record", "mine", "--root", root, "--seconds", 1)
    assert code == 0, err
    code, _out, err = call("profile", "select", "--replay", "mine", "--out", "a", *QUICK)
    assert code == 0, err
    assert files.load(Path("a")).cases[0].energy.mean_w == pytest.approx(NANO.watts, rel=0.01)
    assert boards.SERIAL not in "".join(p.read_text(errors="replace") for p in Path("mine").rglob("*") if p.is_file())


def test_without_a_sensor_there_is_no_energy_and_it_is_said(call, tmp_path):
    (tmp_path / "root/proc").mkdir(parents=True)
    code, _out, err = call("profile", "embed", "--root", tmp_path / "root", "--out", "a", *QUICK)
    assert code == 0, err
    assert "No energy" in err
    report = files.load(Path("a"))
    assert report.total_scope == "none"
    assert report.idle is None
    assert report.cases[0].energy.total_j is None
    assert report.cases[0].energy.reason


def test_every_case_runs(call):
    code, out, err = call("profile", "--quick", "--new", 8, "--prompt", 32, "--seconds", 0, "--out", "a", "--json")
    assert code == 0, err
    found = [case["name"] for case in json.loads(out)["cases"]]
    assert found == ["load", "embed", "select", "offer", "prefill", "decode", "synth", "train-step", "round"]


def test_the_same_twice_is_not_called_different_and_a_report_is_not_lost(call):
    assert call("profile", "select", "--out", "a", *QUICK)[0] == 0
    code, _out, err = call("profile", "select", "--out", "a", *QUICK)
    assert code == 2
    assert "--overwrite" in err
    code, out, err = call("compare", "a", "a", "--max-regress", "5%", "--json")
    assert code == 0, err
    assert {row["verdict"] for row in json.loads(out)["rows"]} == {"inconclusive"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("profile", "sing"), "choose among load"),
        (("profile", "select", "--sensors", "ina3221"), "no INA3221"),
        (("profile", "select", "--sensors", "geiger"), "no such sensor"),
        (("profile", "--replay", "nowhere"), "no such folder"),
        (("profile", "prefill", "--prompt", 100_000), "context"),
        (("profile", "--replay", "x", "--root", "y"), "choose one"),
        (("profile", "--trace", "nowhere.csv"), "No such file"),
        (("profile", "select", "--clocks", "require"), "clocks"),
        (("compare", "nowhere", "nowhere"), "nowhere"),
        (("compare", "tiny.toml", "tiny.toml"), "no valid JSON"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(call, arguments, says):
    code, _out, err = call(*arguments, *(("--out", "x") if arguments[0] == "profile" else ()))
    assert code in (1, 2), err
    assert says in err
    assert "Traceback" not in err


def test_doctor_names_the_board_of_a_recording(call):
    code, out, _err = call("doctor", "--replay", next(FIXTURES.glob("orin-nano*")), "--json")
    assert code == 0
    checks = {(c["group"], c["name"]): c for c in json.loads(out)["checks"]}
    assert "orin-nano" in checks["board", "profile"]["found"]
    assert checks["sensors", "ina3221"]["status"] == "ok"
    assert "module from ina3221" in checks["sensors", "total"]["found"]


@browser.needed
def test_the_page_of_a_profiled_board_opens_without_errors(call, tmp_path, monkeypatch):
    root = boards.write(tmp_path / "root", NANO)
    plant_tegrastats(tmp_path / "bin", monkeypatch, NANO.line)
    assert call("profile", "decode", "select", "--root", root, "--out", "a", *QUICK)[0] == 0
    page, console = browser.opened(Path("a/report.html"), tmp_path)
    assert console == []
    drawn = " ".join(re.findall(r'<svg[^>]*role="img"[^>]*aria-label="([^"]*)"', page)).lower()
    for plot in ("power of", "temperature of", "frequency of", "memory of", "energy against time", "tg8", "select"):
        assert plot in drawn
