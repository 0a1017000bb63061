"""The watchdog on planted trees with a clock of their own, and on real processes that take memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from trees import GIB, MIB, gpu, plant, process, v1, v2

from edge_sdss.tuning.outofmemory import is_out_of_memory
from edge_sdss.tuning.watchdog import OverBudget, Watchdog, limit_cuda, rlimit

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PAGE = os.sysconf("SC_PAGE_SIZE")


def use(root: Path, rss: int, who: str = "self") -> None:
    plant(root, {f"proc/{who}/statm": f"99999999 {rss // PAGE} 77 1 0 5 0"})


def available(root: Path, left: int) -> None:
    plant(root, {"proc/meminfo": f"MemTotal:  16777216 kB\nMemFree:  1 kB\nMemAvailable:  {left // 1024} kB"})


def test_the_budget(tmp_path: Path) -> None:
    tree = plant(tmp_path, process())
    use(tmp_path, 300 * MIB)
    watch = Watchdog(400 * MIB, tree=tree)
    assert watch.look() == (300 * MIB, 9 * GIB, None)
    watch.check()
    use(tmp_path, 400 * MIB)
    watch.look()
    watch.check()  # all of the budget may be used
    use(tmp_path, 401 * MIB)
    watch.look()
    with pytest.raises(OverBudget, match="401 MiB in use, 400 MiB allowed") as caught:
        watch.check()
    assert is_out_of_memory(caught.value)
    use(tmp_path, 100 * MIB)
    watch.look()
    with pytest.raises(OverBudget):
        watch.check()  # until it was heard
    assert watch.clear()
    watch.check()
    assert watch.peak_bytes == 401 * MIB


def test_clear_does_not_hide_what_is_still_so(tmp_path: Path) -> None:
    tree = plant(tmp_path, process())
    use(tmp_path, 500 * MIB)
    watch = Watchdog(400 * MIB, tree=tree)
    assert not watch.clear()
    with pytest.raises(OverBudget):
        watch.check()


def test_the_reserve_of_the_machine(tmp_path: Path) -> None:
    tree = plant(tmp_path, process())
    use(tmp_path, MIB)
    watch = Watchdog(GIB, reserve_bytes=200 * MIB, tree=tree)
    for left in (200, 199, 300):
        available(tmp_path, left * MIB)
        watch.look()
        assert (watch.over is None) == (left == 200)
    assert watch.over == "only 199 MiB left on this machine, 200 MiB are to stay free"
    assert watch.least_available_bytes == 199 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_reserve_of_the_cgroup_does_not_count_page_cache(tmp_path: Path, version: int) -> None:
    folder = "sys/fs/cgroup/a" if version == 2 else "sys/fs/cgroup/memory/a"
    limit, current, key = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    groups = v2("/a") if version == 2 else v1("/a")
    planted = {f"{folder}/{limit}": GIB, f"{folder}/{current}": 500 * MIB, f"{folder}/memory.stat": f"{key} 0"}
    tree = plant(tmp_path, {**process(), **groups, **planted})
    use(tmp_path, MIB)
    watch = Watchdog(GIB, reserve_bytes=100 * MIB, tree=tree)
    assert watch.look().left == 524 * MIB
    plant(tmp_path, {f"{folder}/{current}": 1000 * MIB, f"{folder}/memory.stat": f"{key} {300 * MIB}"})
    assert watch.look().left == 324 * MIB
    assert watch.over is None
    plant(tmp_path, {f"{folder}/memory.stat": f"{key} {70 * MIB}"})
    assert watch.look().left == 94 * MIB
    assert watch.over == "only 94 MiB left in this cgroup, 100 MiB are to stay free"


def test_the_last_resort_comes_once_and_only_after_a_second_without_a_break(tmp_path: Path) -> None:
    tree, now, calls = plant(tmp_path, process()), [0.0], []
    use(tmp_path, 0)
    watch = Watchdog(100 * MIB, tree=tree, clock=lambda: now[0], last_resort=calls.append)
    for time_s, used in ((0, 109), (2, 109), (3, 115), (3.9, 115), (4.0, 105), (4.1, 115), (5.0, 115)):
        now[0] = time_s
        use(tmp_path, used * MIB)
        watch.look()
        assert calls == []
    for time_s in (5.2, 7.0):
        now[0] = time_s
        watch.look()
    assert calls == ["115 MiB in use for 1 s, 100 MiB allowed"]


def test_children_count_where_asked_for(tmp_path: Path) -> None:
    files = {"proc/self/task/1/children": "", "proc/self/task/2/children": "7", "proc/7/task/7/children": "8 9 "}
    tree = plant(tmp_path, {**process(), **files})
    for who, mib in (("self", 100), ("7", 30), ("8", 5)):  # 9 has ended
        use(tmp_path, mib * MIB, who)
    assert Watchdog(GIB, tree=tree).look().used == 100 * MIB
    assert Watchdog(GIB, tree=tree, children=True).look().used == 135 * MIB
    assert Watchdog(GIB, tree=tree, pid=7).look().used == 30 * MIB


@pytest.mark.parametrize(("integrated", "expected"), [(True, 150), (False, 100)])
def test_what_torch_holds_of_main_memory_counts(tmp_path: Path, monkeypatch, integrated, expected) -> None:
    torch = gpu(integrated)
    torch.cuda.memory_reserved = lambda: 50 * MIB
    monkeypatch.setitem(sys.modules, "torch", torch)
    tree = plant(tmp_path, process())
    use(tmp_path, 100 * MIB)
    assert Watchdog(GIB, tree=tree).look().used == expected * MIB


def test_a_tree_without_proc_is_never_over(tmp_path: Path) -> None:
    with Watchdog(1, reserve_bytes=GIB, tree=plant(tmp_path, {"etc/x": ""})) as watch:
        assert watch.look() == (None, None, None)
        watch.check()


@linux
def test_it_flags_a_hog_and_recovers() -> None:
    start = Watchdog(1).look().used
    with Watchdog(start + 100 * MIB) as watch:
        watch.check()
        hog = bytearray(b"x") * (200 * MIB)
        deadline = time.monotonic() + 10
        while watch.over is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(OverBudget):
            watch.check()
        del hog
        assert watch.clear()
        assert watch.peak_bytes >= start + 200 * MIB
    assert "memory-watch" not in [thread.name for thread in threading.enumerate()]


@linux
def test_it_ends_a_child_that_does_not_react() -> None:
    program = "held = bytearray(b'x') * (150 << 20)\nimport time\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", program])
    try:
        with Watchdog(100 * MIB, pid=child.pid, last_resort=lambda why: child.kill()) as watch:
            assert child.wait(timeout=30) == -9
            assert watch.peak_bytes > 150 * MIB
            assert watch.look().used in (None, 0)  # it is gone, and nobody minds
    finally:
        child.kill()


@linux
@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_a_planted_limit_is_felt_and_lifted(kind) -> None:
    with rlimit(50 * MIB, kind), pytest.raises(OSError, match="allocate") as caught:
        mapping(100)
    assert is_out_of_memory(caught.value)
    with rlimit(200 * MIB, kind):
        mapping(100)
    mapping(300)


def mapping(mib: int) -> mmap.mmap:
    """Memory that cannot come from what an earlier test has left in the heap."""
    return mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize(("budget", "share"), [(GIB, 0.25), (9 * GIB, 1.0)])
def test_share_of_the_gpu(monkeypatch, budget, share) -> None:
    torch, set_to = gpu(False), []
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=4 * GIB)
    torch.cuda.set_per_process_memory_fraction = set_to.append
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert limit_cuda(budget) == share
    assert set_to == [share]
    torch.cuda.is_available = lambda: False
    assert limit_cuda(budget) is None
