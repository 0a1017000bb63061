"""Clocks are locked and come back: after the block, an exception, a signal, a kill, and a failure half-way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdss.errors import ConfigError
from edge_sdss.profiling import clocks
from edge_sdss.tree import Tree

POLICY = "sys/devices/system/cpu/cpufreq/policy"
GPU = "sys/class/devfreq/17000000.gpu"
FILES = {
    f"{POLICY}0/scaling_governor": "schedutil",
    f"{POLICY}0/scaling_available_governors": "powersave performance schedutil",
    f"{POLICY}0/scaling_min_freq": "115200",
    f"{POLICY}0/scaling_max_freq": "1510400",
    f"{POLICY}4/scaling_governor": "userspace",
    f"{POLICY}4/scaling_min_freq": "115200",
    f"{POLICY}4/scaling_max_freq": "729600",
    f"{GPU}/cur_freq": "306000000",
    f"{GPU}/min_freq": "306000000",
    f"{GPU}/max_freq": "624750000",
    f"{GPU}/governor": "nvhost_podgov",
    "sys/class/devfreq/bwmgr/cur_freq": "1",
    "sys/class/devfreq/bwmgr/min_freq": "1",
    "sys/class/devfreq/bwmgr/max_freq": "2",
    "proc/sys/kernel/random/boot_id": "a-boot",
}
LOCKED = FILES | {
    f"{POLICY}0/scaling_governor": "performance",
    f"{POLICY}0/scaling_min_freq": "1510400",
    f"{POLICY}4/scaling_min_freq": "729600",
    f"{GPU}/min_freq": "624750000",
}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    for path, held in FILES.items():
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / path).write_text(f"{held}\n", encoding="utf-8")
    return Tree(tmp_path / "root")


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "state" / "clocks.json"


def held(tree: Tree) -> dict[str, str]:
    return {path: tree.text(path).strip() for path in FILES}


def test_observe_touches_nothing(tree: Tree, note: Path) -> None:
    with clocks.held("observe", tree, note) as words:
        assert held(tree) == FILES
    assert words == []
    assert not note.exists()


def test_set_locks_and_puts_back(tree: Tree, note: Path) -> None:
    with clocks.held("set", tree, note) as words:
        assert held(tree) == LOCKED
        assert words == [
            "policy0 scaling_governor: schedutil -> performance",
            "policy0 scaling_min_freq: 115200 -> 1510400",
            "policy4 scaling_min_freq: 115200 -> 729600",
            "17000000.gpu min_freq: 306000000 -> 624750000",
        ]
        assert note.exists()
    assert held(tree) == FILES
    assert not note.exists()
    assert words[4:] == [
        "17000000.gpu min_freq: 624750000 -> 306000000",
        "policy4 scaling_min_freq: 729600 -> 115200",
        "policy0 scaling_min_freq: 1510400 -> 115200",
        "policy0 scaling_governor: performance -> schedutil",
    ]


def test_an_exception_puts_back(tree: Tree, note: Path) -> None:
    with pytest.raises(KeyboardInterrupt), clocks.held("set", tree, note):
        raise KeyboardInterrupt
    assert held(tree) == FILES


def test_signal_handlers_are_as_before(tree: Tree, note: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with clocks.held("set", tree, note):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_require_names_what_is_loose_and_the_command(tree: Tree, note: Path) -> None:
    with pytest.raises(ConfigError) as caught, clocks.held("require", tree, note):
        pass
    text = str(caught.value)
    assert "policy0 (schedutil, 115200 to 1510400 kHz), policy4" in text
    assert "17000000.gpu (306000000 to 624750000 Hz)" in text
    assert "cpupower frequency-set -g performance" in text
    (tree.root / "etc").mkdir()
    (tree.root / "etc/nv_tegra_release").write_text("# R36", encoding="utf-8")
    with pytest.raises(ConfigError, match="sudo jetson_clocks"):
        clocks.require(tree)


def test_require_is_content_with_locked_clocks(tree: Tree, note: Path) -> None:
    for path, value in (LOCKED | {"sys/class/devfreq/bwmgr/min_freq": "2"}).items():
        (tree.root / path).write_text(value, encoding="utf-8")
    with clocks.held("require", tree, note) as words:
        assert words == []


def test_require_does_not_take_silence_for_consent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be known"):
        clocks.require(Tree(tmp_path))


def test_a_failure_half_way_puts_back_what_was_set(tree: Tree, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, writes = clocks._write, []

    def write(tree: Tree, path: str, value: str) -> None:
        writes.append(path)
        if len(writes) == 3:
            raise OSError(22, "Invalid argument")
        real(tree, path, value)

    monkeypatch.setattr(clocks, "_write", write)
    with (
        pytest.raises(ConfigError, match=r"Invalid argument on /.*policy4.*what was set is back"),
        clocks.held("set", tree, note),
    ):
        raise AssertionError("the block must not run")
    assert held(tree) == FILES
    assert not note.exists()
    assert len(writes) == 5


def test_files_that_may_not_be_written_are_refused_before_any_is(
    tree: Tree, note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "devfreq" not in str(path) and real(path, mode))
    with (
        pytest.raises(ConfigError, match=r"may not write /sys/class/devfreq.*as root.*cpupower"),
        clocks.held("set", tree, note),
    ):
        pass
    assert held(tree) == FILES
    assert not note.exists()


def test_a_recording_and_a_machine_without_clocks_are_refused(tree: Tree, note: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recording"), clocks.held("set", Tree(tree.root, faults={}), note):
        pass
    with pytest.raises(ConfigError, match="no cpufreq policy"), clocks.held("set", Tree(tmp_path / "none"), note):
        pass


def test_a_clock_that_cannot_be_put_back_is_told_and_kept_in_the_note(
    tree: Tree, note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = clocks._write

    def write(tree: Tree, path: str, value: str) -> None:
        if value == "schedutil":
            raise OSError(1, "Operation not permitted")
        real(tree, path, value)

    monkeypatch.setattr(clocks, "_write", write)
    with (
        pytest.raises(ConfigError, match=r"could not be put back to schedutil.*write them as root"),
        clocks.held("set", tree, note),
    ):
        pass
    assert held(tree) == FILES | {f"{POLICY}0/scaling_governor": "performance"}
    monkeypatch.undo()
    note.write_text(
        note.read_text(encoding="utf-8").replace(f'"pid": {os.getpid()}', '"pid": 999999999'), encoding="utf-8"
    )
    assert clocks.restore(tree, note) == ["policy0 scaling_governor: performance -> schedutil"]
    assert held(tree) == FILES


def test_what_someone_else_changed_meanwhile_stays(tree: Tree, note: Path) -> None:
    with clocks.held("set", tree, note) as words:
        (tree.root / f"{POLICY}0/scaling_governor").write_text("powersave", encoding="utf-8")
    assert held(tree) == FILES | {f"{POLICY}0/scaling_governor": "powersave"}
    assert any("left at powersave" in word for word in words)


CHILD = """
import signal, sys, time
from pathlib import Path
from edge_sdss.profiling import clocks
from edge_sdss.tree import Tree
for name in ("SIGTERM", "SIGHUP"):  # as at a terminal: what runs in the background or under nohup inherits others
    signal.signal(getattr(signal, name), signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[3] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
if sys.argv[3] == "torn":  # killed between two writes
    real, writes = clocks._write, []
    def write(tree, path, value):
        if len(writes) == 2:
            print("set", flush=True)
            time.sleep(300)
        writes.append(path)
        real(tree, path, value)
    clocks._write = write
with clocks.held("set", Tree(Path(sys.argv[1])), Path(sys.argv[2])):
    if sys.argv[3] == "nohup":
        signal.raise_signal(signal.SIGHUP)
    print("set", flush=True)
    time.sleep(300)
"""


def child(tree: Tree, note: Path, how: str = "whole") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(tree.root), str(note), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "set\n"
    process.stdout.close()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_puts_back_and_ends_as_if_unhandled(tree: Tree, note: Path, number: signal.Signals) -> None:
    process = child(tree, note)
    assert held(tree) == LOCKED
    process.send_signal(number)
    assert process.wait(120) == -number
    assert held(tree) == FILES
    assert not note.exists()


def test_a_signal_that_was_ignored_stays_so(tree: Tree, note: Path) -> None:
    process = child(tree, note, "nohup")
    assert held(tree) == LOCKED
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == -signal.SIGTERM
    assert held(tree) == FILES


@pytest.mark.parametrize("how", ["whole", "torn"])
def test_the_next_start_mends_what_a_kill_left(tree: Tree, note: Path, how: str) -> None:
    process = child(tree, note, how)
    if os.path.isdir("/proc/self"):
        with (
            pytest.raises(ConfigError, match=f"process {process.pid} is using them"),
            clocks.held("observe", tree, note),
        ):
            pass
    process.kill()
    process.wait(120)
    assert held(tree) != FILES
    with clocks.held("observe", tree, note) as words:
        assert held(tree) == FILES
    assert "policy0 scaling_governor: performance -> schedutil" in words
    assert not note.exists()


def test_a_note_from_before_a_restart_changes_nothing(tree: Tree, note: Path) -> None:
    process = child(tree, note)
    process.kill()
    process.wait(120)
    (tree.root / "proc/sys/kernel/random/boot_id").write_text("another", encoding="utf-8")
    assert "before a restart" in clocks.restore(tree, note)[0]
    assert held(tree) == LOCKED | {"proc/sys/kernel/random/boot_id": "another"}
    assert not note.exists()


@pytest.mark.parametrize("path", ["etc/shadow", "sys/devices/system/cpu/cpufreq/policy0/../../x", "/etc/passwd"])
def test_a_note_cannot_make_it_write_elsewhere(tree: Tree, note: Path, path: str) -> None:
    note.parent.mkdir()
    setting = {"path": path, "before": "x", "after": None}
    note.write_text(json.dumps({"pid": 1, "started": None, "boot": "a-boot", "settings": [setting]}), encoding="utf-8")
    assert "cannot be understood" in clocks.restore(tree, note)[0]
    assert not (tree.root / path).exists() or path.startswith("/")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"settings": 3}', '{"settings": [{"path": 1}]}', "\udcff"])
def test_a_note_that_is_no_note_is_removed_with_a_word(tree: Tree, note: Path, text: str) -> None:
    note.parent.mkdir()
    note.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "cannot be understood" in clocks.restore(tree, note)[0]
    assert not note.exists()
    assert held(tree) == FILES


def test_nothing_noted_is_nothing_done(tree: Tree, note: Path) -> None:
    assert clocks.restore(tree, note) == []
    assert held(tree) == FILES
