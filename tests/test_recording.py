"""A recording replays as the board was, holds nothing private, and is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import boards
import pytest
from boards import BOARDS

from edge_sdss.errors import InputError
from edge_sdss.profiling import recording
from edge_sdss.sensors import ina3221, tegrastats
from edge_sdss.tree import Tree

OTHERS = """
proc/meminfo etc/nv_tegra_release etc/nvpmodel.conf var/lib/nvpmodel/status proc/device-tree/compatible
sys/class/thermal/thermal_zone0/temp sys/devices/system/cpu/cpufreq/policy0/scaling_governor
sys/class/devfreq/17000000.gpu/cur_freq
""".split()


def clock() -> float:
    return 0.0


def recorded(tmp_path: Path, tree: Tree, seconds: float = 0.0) -> tuple[Path, dict]:
    folder = tmp_path / "made" / "recording"
    return folder, recording.record(folder, tree, seconds)


def seen(tree: Tree) -> tuple:
    """Everything that the power sensor says of a tree."""
    sensor = ina3221.open(tree, clock)
    return sensor.channels, sensor.total, sensor.absent, sensor.read()


@pytest.mark.parametrize("name", BOARDS)
def test_replay_reads_as_the_board(tmp_path, name):
    root = boards.write(tmp_path / "board", BOARDS[name])
    folder, made = recorded(tmp_path, Tree(root))
    replay = Tree.of(folder)
    assert seen(replay) == seen(Tree(root))
    assert made == json.loads((folder / "manifest.json").read_text())
    assert made["model"] == BOARDS[name].model
    assert made["files"] == sum(file.is_file() for file in (folder / "root").rglob("*")) > 20
    assert not any(file.is_symlink() for file in folder.rglob("*"))
    for path in OTHERS:
        assert replay.text(path) == Tree(root).text(path)
    assert len(replay.glob("sys/class/hwmon/hwmon*/oc1_event_cnt")) == 1
    assert len(replay.glob("sys/class/hwmon/hwmon*/pwm1")) == 1


def test_replay_fails_as_the_board_did(tmp_path):
    root = boards.write(tmp_path / "board", BOARDS["agx-orin-64gb-jp5"])
    chip = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    tree = Tree(root, faults={f"{chip}/curr2_input": "EACCES", f"{chip}/in1_input": "EIO", "proc/loadavg": "EPERM"})
    folder, made = recorded(tmp_path, tree)
    assert json.loads((folder / "faults.json").read_text()) == tree.faults
    assert made["unreadable"] == 3
    assert seen(Tree.of(folder)) == seen(tree)
    assert ina3221.open(Tree.of(folder)).read().values["VDD_GPU_SOC"] is None


def test_faults_of_the_machine_itself_are_recorded(tmp_path, monkeypatch):
    root = boards.write(tmp_path / "board", BOARDS["orin-nano-8gb-jp6"])
    text = Tree.text

    def failing(self: Tree, path: str) -> str:
        if path.endswith("thermal_zone1/temp"):
            raise OSError(errno.EAGAIN, "try again", path)
        return text(self, path)

    monkeypatch.setattr(Tree, "text", failing)
    folder, _ = recorded(tmp_path, Tree(root))
    monkeypatch.undo()
    replay = Tree.of(folder)
    assert replay.faults == {"sys/class/thermal/thermal_zone1/temp": errno.errorcode[errno.EAGAIN]}
    with pytest.raises(BlockingIOError):
        replay.text("sys/class/thermal/thermal_zone1/temp")


def test_file_with_several_paths_is_read_once(tmp_path, monkeypatch):
    root = boards.write(tmp_path / "board", BOARDS["orin-nano-8gb-jp6"])
    reads: dict[str, int] = {}
    text = Tree.text

    def changing(self: Tree, path: str) -> str:
        if not path.endswith("curr1_input"):
            return text(self, path)
        real = os.path.realpath(self.root / path)
        reads[real] = reads.get(real, 1000) + 1
        return str(reads[real])

    monkeypatch.setattr(Tree, "text", changing)
    folder, _ = recorded(tmp_path, Tree(root))
    held = {file.read_text() for file in (folder / "root").rglob("curr1_input")}
    assert len(list((folder / "root").rglob("curr1_input"))) == 2
    assert held == {"1001"}


def test_nothing_private_is_recorded(tmp_path):
    root = boards.write(tmp_path / "board", BOARDS["orin-nano-8gb-jp6"])
    folder, made = recorded(tmp_path, Tree(root))
    everything = "".join(file.read_text() for file in folder.rglob("*") if file.is_file())
    private = [boards.SERIAL, "48:b0:2d", "someones-jetson", str(tmp_path)]
    assert not [text for text in private if text in everything]
    assert "CPU part" in everything
    assert "serial numbers" in made["left_out"]


def test_folder_that_exists_is_not_touched(tmp_path):
    root = boards.write(tmp_path / "board", BOARDS["orin-nano-8gb-jp6"])
    mine = tmp_path / "made" / "recording" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(InputError, match="it exists"):
        recorded(tmp_path, Tree(root))
    assert list(mine.parent.iterdir()) == [mine]


@pytest.mark.parametrize("breaks_at", ["_copy", "_lines", "_write"])
def test_recording_that_breaks_off_leaves_nothing(tmp_path, monkeypatch, breaks_at):
    root = boards.write(tmp_path / "board", BOARDS["orin-nano-8gb-jp6"])
    whole, calls = getattr(recording, breaks_at), []

    def breaking(*args, **kwargs):
        calls.append(args)
        if breaks_at != "_write" or len(calls) == 10:
            raise KeyboardInterrupt if breaks_at == "_lines" else OSError(errno.ENOSPC, "no space left")
        return whole(*args, **kwargs)

    monkeypatch.setattr(recording, breaks_at, breaking)
    with pytest.raises((OSError, KeyboardInterrupt)):
        recorded(tmp_path, Tree(root))
    assert calls
    assert list((tmp_path / "made").iterdir()) == []


def test_machine_without_any_of_the_files_is_refused(tmp_path):
    with pytest.raises(InputError, match="none of the files"):
        recorded(tmp_path, Tree(tmp_path / "empty"))
    assert list((tmp_path / "made").iterdir()) == []


def test_progress_and_a_folder_that_is_no_file(tmp_path):
    root = boards.write(tmp_path / "board", BOARDS["orin-nano-8gb-jp6"])
    (root / "sys/class/thermal/thermal_zone0/mode").mkdir()
    told: list[tuple[str, int, int]] = []
    recording.record(tmp_path / "made", Tree(root), 0, progress=lambda *what: told.append(what))
    assert told[0][1] == 0
    assert all(done < total for _, done, total in told)
    assert Tree.of(tmp_path / "made").faults == {}


@pytest.mark.skipif(os.name != "posix", reason="starts a script")
def test_lines_of_tegrastats_are_recorded_with_their_times(tmp_path, monkeypatch):
    board = BOARDS["orin-nano-8gb-jp6"]
    root = boards.write(tmp_path / "board", board)
    program = tmp_path / "bin" / "tegrastats"
    program.parent.mkdir()
    text = f"import time\nwhile True:\n    print({board.line!r}, flush=True)\n    time.sleep(0.02)\n"
    program.write_text(f"#!{sys.executable} -IS\n{text}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    folder, made = recorded(tmp_path, Tree(root), seconds=1.5)
    replay = Tree.of(folder)
    lines = replay.lines["tegrastats"]
    assert made["tegrastats_lines"] == len(lines) > 1
    assert made["tegrastats"] == ""
    assert {line for _, line in lines} == {board.line}
    times = [time_s for time_s, _ in lines]
    assert times[0] == 0 < times[-1] < 1.5
    assert times == sorted(times)
    assert tegrastats.open(replay, clock).read().values["VDD_IN"] == 5.901
    again = tmp_path / "again"
    recording.record(again, replay, 0.1)
    assert Tree.of(again).lines["tegrastats"][0] == lines[0]
    assert seen(Tree.of(again)) == seen(replay)


def test_lack_of_tegrastats_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    root = boards.write(tmp_path / "board", BOARDS["orin-nano-8gb-jp6"])
    folder, made = recorded(tmp_path, Tree(root), seconds=0.1)
    assert made["tegrastats_lines"] == 0
    assert "no such program" in made["tegrastats"]
    assert Tree.of(folder).lines == {}
