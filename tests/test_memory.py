"""The process's memory over a window, on this machine and on written trees."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import hosts
import numpy as np
import pytest
from trees import MIB, plant, v1, v2

from edge_sdss import processes
from edge_sdss.profiling import memory
from edge_sdss.profiling.memory import Watch
from edge_sdss.tree import Tree

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")


def touched(mib: int) -> np.ndarray:
    """A mapping of its own: what malloc gives may lie in pages that an earlier test has left in the heap."""
    array = np.frombuffer(mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    array[:] = 1
    return array


def touched_kib(kib: int) -> np.ndarray:
    return np.ones(kib * 128)


UNIFIED = hosts.V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
PROCESS = {
    "proc/self/status": "VmHWM:\t  300 kB\nVmRSS:\t  200 kB\n",
    "proc/self/smaps_rollup": (
        "5643-7ffe ---p 00000000 00:00 0 [rollup]\nRss:  200 kB\nPss:  150 kB\n"
        "Private_Clean:  20 kB\nPrivate_Dirty:  70 kB\nSwap:  8 kB\n"
    ),
    "proc/meminfo": "MemAvailable:  1000 kB\n",
}


@linux
def test_the_peak_rises_by_what_was_held_for_a_while() -> None:
    with Watch() as still:
        pass
    with Watch() as busy:
        array = touched(64)
        del array
    assert still.result.peak_rss_bytes is not None
    assert busy.result.peak_rss_bytes is not None
    assert busy.result.rss_bytes is not None
    assert busy.result.peak_rss_bytes - still.result.peak_rss_bytes == pytest.approx(64 * MIB, abs=2 * MIB)
    assert busy.result.rss_bytes == pytest.approx(still.result.rss_bytes, abs=2 * MIB)


@linux
def test_memory_freed_in_an_earlier_window_is_not_of_a_later_one() -> None:
    memory.release()  # else what earlier tests have left counts in the first window alone
    with Watch() as first:
        array = touched(96)
        del array
    memory.release()
    with Watch() as second:
        array = touched(16)
        del array
    assert first.result.peak_rss_bytes is not None
    assert second.result.peak_rss_bytes is not None
    assert first.result.peak_rss_bytes - second.result.peak_rss_bytes == pytest.approx(80 * MIB, abs=2 * MIB)
    assert "RSS" not in second.result.note


@linux
def test_memory_that_is_kept_is_private_to_the_process() -> None:
    with Watch() as before:
        pass
    with Watch() as after:
        array = touched(32)
    for name in ("rss_bytes", "uss_bytes", "pss_bytes"):
        rise = getattr(after.result, name) - getattr(before.result, name)
        assert rise == pytest.approx(32 * MIB, abs=2 * MIB), name
    assert array[-1] == 1


@linux
def test_an_inner_window_takes_no_peak_from_an_outer_one() -> None:
    with Watch() as outer:
        array = touched(64)
        del array
        with Watch() as inner:
            pass
    assert outer.result.peak_rss_bytes is not None
    assert inner.result.peak_rss_bytes is not None
    assert outer.result.peak_rss_bytes - inner.result.peak_rss_bytes == pytest.approx(64 * MIB, abs=2 * MIB)


@linux
def test_a_recording_does_not_hide_this_process(tmp_path: Path) -> None:
    with Watch(Tree(tmp_path, faults={})) as watch:
        pass
    assert watch.result.rss_bytes is not None
    assert watch.result.rss_bytes > MIB


def test_a_window_that_fails_has_figures_too() -> None:
    watch = Watch()
    with pytest.raises(ZeroDivisionError), watch:
        _ = 1 / 0
    assert watch.result.peak_rss_bytes is not None
    assert memory._watching == []


def test_figures_come_from_the_files_in_bytes(tmp_path: Path) -> None:
    with Watch(plant(tmp_path, PROCESS)) as watch:
        pass
    found = watch.result
    assert (found.rss_bytes, found.peak_rss_bytes) == (200 * 1024, 300 * 1024)
    assert (found.uss_bytes, found.pss_bytes, found.swap_bytes) == (90 * 1024, 150 * 1024, 8 * 1024)
    assert "the peak of RSS is that of the process's life" in found.note  # there is no clear_refs in this tree


def test_a_peak_that_rose_is_the_windows_own_without_a_reset(tmp_path: Path) -> None:
    tree = plant(tmp_path, PROCESS)
    with Watch(tree) as watch:
        plant(tmp_path, {"proc/self/status": "VmHWM:\t  400 kB\nVmRSS:\t  200 kB\n"})
    assert watch.result.peak_rss_bytes == 400 * 1024
    assert "RSS" not in watch.result.note


def test_the_reset_is_a_5(tmp_path: Path) -> None:
    tree = plant(tmp_path, PROCESS | {"proc/self/clear_refs": ""})
    with Watch(tree) as watch:
        pass
    assert tree.text("proc/self/clear_refs") == "5"
    assert "RSS" not in watch.result.note


def test_nothing_to_read_is_none(tmp_path: Path) -> None:
    with Watch(Tree(tmp_path)) as watch:
        pass
    assert set(watch.result.model_dump(exclude={"note"}).values()) == {None}


def test_the_least_available_memory_may_lie_between_the_edges(tmp_path: Path) -> None:
    tree = plant(tmp_path, PROCESS)
    samples: list[float | None] = []
    with Watch(tree, available=samples) as watch:
        samples += [900.0 * 1024, None, 640.0 * 1024, float("nan"), 2000.0 * 1024]
        plant(tmp_path, {"proc/meminfo": "MemAvailable:  950 kB\n"})
    assert watch.result.available_drop_bytes == 360 * 1024
    assert "MemAvailable" not in watch.result.note
    with Watch(tree, available=lambda: []) as watch:
        plant(tmp_path, {"proc/meminfo": "MemAvailable:  700 kB\n"})
    assert watch.result.available_drop_bytes == 250 * 1024
    assert "before and after only" in watch.result.note
    with Watch(tree) as watch:
        plant(tmp_path, {"proc/meminfo": "MemAvailable:  800 kB\n"})
    assert watch.result.available_drop_bytes == 0


@pytest.mark.parametrize(
    ("group", "file"),
    [
        (v2("/user.slice/job"), "sys/fs/cgroup/user.slice/job/memory.peak"),
        (v2("/"), "sys/fs/cgroup/memory.peak"),
        (v2("/job\n1:cpu:/", UNIFIED), "sys/fs/cgroup/unified/job/memory.peak"),
        (v1("/job"), "sys/fs/cgroup/memory/job/memory.max_usage_in_bytes"),
        (v1("/docker/1a2b", "/docker/1a2b"), "sys/fs/cgroup/memory/memory.max_usage_in_bytes"),
    ],
)
def test_the_cgroup_is_the_processes_own(tmp_path: Path, group: dict[str, object], file: str) -> None:
    tree = plant(tmp_path, {**group, file: "123456789\n"})
    assert memory._cgroup_file(tree) == file
    with Watch(tree) as watch:
        (tmp_path / file).write_text("223456789\n", encoding="utf-8")
    assert watch.result.cgroup_peak_bytes == 223456789


@pytest.mark.parametrize("lines", ["", "0::/job\n", "0::/../other", "7:pids:/\n", ":::\n", "0\n"])
def test_no_cgroup_is_none(tmp_path: Path, lines: str) -> None:
    """That of another process, the mount's root, is not taken for it."""
    files = {**v2("/"), "proc/self/cgroup": lines, "sys/fs/cgroup/memory.peak": 1}
    with Watch(plant(tmp_path, files)) as watch:
        pass
    assert watch.result.cgroup_peak_bytes is None


def test_a_cgroups_peak_that_cannot_be_reset_is_said_to_be_old(tmp_path: Path) -> None:
    file = "sys/fs/cgroup/memory/memory.max_usage_in_bytes"
    tree = plant(tmp_path, {**v1("/"), file: "1000\n"})
    with Watch(tree) as watch:
        pass
    assert watch.result.cgroup_peak_bytes == 1000
    assert "cgroup" in watch.result.note
    with Watch(tree) as watch:
        (tmp_path / file).write_text("2000\n", encoding="utf-8")
    assert "cgroup" not in watch.result.note
    assert (tmp_path / file).read_text(encoding="utf-8") == "2000\n"  # v1's, which all readers share, is never reset


def fake_torch(monkeypatch: pytest.MonkeyPatch, used: bool) -> SimpleNamespace:
    peaks = {0: 100, 1: 10}
    cuda = SimpleNamespace(
        is_initialized=lambda: used,
        device_count=lambda: 2,
        reset_peak_memory_stats=lambda device: peaks.update({device: 1}),
        max_memory_allocated=lambda device: peaks[device],
        max_memory_reserved=lambda device: 2 * peaks[device],
        peaks=peaks,
    )
    module = ModuleType("torch")
    module.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", module)
    return cuda


def test_torchs_peaks_are_those_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_torch(monkeypatch, used=True)
    with Watch() as watch:
        cuda.peaks[0] = 40
    assert (watch.result.torch_allocated_bytes, watch.result.torch_reserved_bytes) == (41, 82)


def test_torch_without_cuda_in_use_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_torch(monkeypatch, used=False)
    with Watch() as watch:
        pass
    assert watch.result.torch_allocated_bytes is None
    assert cuda.peaks == {0: 100, 1: 10}


def test_torch_is_never_loaded() -> None:
    program = (
        "import sys\nfrom edge_sdss.profiling.memory import Watch\nwith Watch(): pass\n"
        "assert not {'torch', 'scipy', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_proc_the_figures_are_those_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    resource, psutil = pytest.importorskip("resource"), pytest.importorskip("psutil")
    monkeypatch.setattr(processes, "sizes", lambda tree, path: {})
    usage = SimpleNamespace(ru_maxrss=5000)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    for platform, unit in (("darwin", 1), ("linux", 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert memory._peak_rss(Tree()) == 5000 * unit
    with Watch() as watch:
        pass
    rss, uss = watch.result.rss_bytes, watch.result.uss_bytes
    assert rss == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert uss is None or uss <= rss


@linux
def test_what_was_freed_is_given_back() -> None:
    """Small blocks stay with the allocator while a later one is alive, and would count as the next window's."""
    blocks = [touched_kib(64) for _ in range(1_600)]
    with Watch() as before:
        pass
    del blocks[:-1]
    memory.release()
    with Watch() as after:
        pass
    assert before.result.rss_bytes - after.result.rss_bytes > 80 * MIB
