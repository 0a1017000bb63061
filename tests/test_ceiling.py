"""Limits of memory on planted trees, written after the kernel's documentation of cgroups, and on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import GIB, MIB, gpu, plant, process, v1, v2

from edge_sdss import cgroups
from edge_sdss.tree import Tree
from edge_sdss.tuning.ceiling import ceiling

V1_NONE = 9223372036854771712


def test_without_a_limit_the_machine_is_the_limit(tmp_path: Path) -> None:
    found = ceiling(plant(tmp_path, process()))
    assert (found.limit_bytes, found.available_bytes, found.used_bytes) == (16 * GIB, 9 * GIB, 200 * MIB)
    assert found.source == found.available_source == "the machine's memory"
    assert found.reachable_bytes == 9 * GIB + 200 * MIB
    assert found.device is None


def test_where_nothing_can_be_read_nothing_is_claimed(tmp_path: Path) -> None:
    found = ceiling(Tree(tmp_path))
    assert (found.limit_bytes, found.available_bytes, found.reachable_bytes) == (None, None, None)
    assert found.source == "unknown"


def test_a_group_above_binds_more_than_the_own(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    files = {
        f"{base}/a.slice/memory.max": 600 * MIB,
        f"{base}/a.slice/memory.current": 450 * MIB,
        f"{base}/a.slice/b.service/memory.max": 4 * GIB,
        f"{base}/a.slice/b.service/memory.current": 250 * MIB,
        f"{base}/a.slice/b.service/inner/memory.max": "max",
        f"{base}/a.slice/b.service/inner/memory.current": 250 * MIB,
    }
    tree = plant(tmp_path, {**process(), **v2("/a.slice/b.service/inner"), **files})
    found = ceiling(tree)
    assert found.limit_bytes == 600 * MIB
    assert found.available_bytes == 150 * MIB
    assert found.source == found.available_source == "the cgroup's limit /sys/fs/cgroup/a.slice/memory.max"
    assert cgroups.folders(tree) == [
        f"{base}/a.slice/b.service/inner", f"{base}/a.slice/b.service", f"{base}/a.slice", base,
    ]  # fmt: skip


def test_a_leaf_without_the_controller_still_has_its_parents_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/user.slice/memory.max": 700 * MIB, "sys/fs/cgroup/user.slice/memory.current": 100 * MIB}
    found = ceiling(plant(tmp_path, {**process(), **v2("/user.slice/app.scope"), **files}))
    assert (found.limit_bytes, found.available_bytes) == (700 * MIB, 600 * MIB)


def test_memory_high_counts_as_a_limit(tmp_path: Path) -> None:
    files = {"memory.max": GIB, "memory.high": 800 * MIB, "memory.current": 300 * MIB}
    planted = {f"sys/fs/cgroup/a/{name}": held for name, held in files.items()}
    found = ceiling(plant(tmp_path, {**process(), **v2("/a"), **planted}))
    assert (found.limit_bytes, found.available_bytes) == (800 * MIB, 500 * MIB)
    assert found.source.endswith("/a/memory.high")


@pytest.mark.filterwarnings("ignore:.*couldn't be determined:RuntimeWarning")
def test_in_a_container_psutil_shows_the_host_and_this_does_not(tmp_path: Path, monkeypatch) -> None:
    """A container's cgroup namespace: its own group is the root of the mount."""
    files = {"memory.max": 512 * MIB, "memory.current": 220 * MIB, "memory.stat": f"anon 5\ninactive_file {20 * MIB}"}
    planted = {f"sys/fs/cgroup/{name}": held for name, held in files.items()}
    tree = plant(tmp_path, {**process(), **v2("/"), **planted})
    found = ceiling(tree)
    assert (found.limit_bytes, found.available_bytes) == (512 * MIB, 312 * MIB)
    psutil = pytest.importorskip("psutil")
    if sys.platform == "linux":
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
        assert psutil.virtual_memory().total == 16 * GIB
        assert psutil.virtual_memory().available == 9 * GIB


def test_v1_in_a_container_with_the_hosts_path(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        f"{base}/memory.limit_in_bytes": 2 * GIB,
        f"{base}/memory.usage_in_bytes": GIB,
        f"{base}/memory.stat": f"cache 1\nhierarchical_memory_limit {GIB + GIB // 2}\ntotal_inactive_file {256 * MIB}",
    }
    found = ceiling(plant(tmp_path, {**process(), **v1("/docker/abc", "/docker/abc"), **files}))
    assert found.limit_bytes == GIB + GIB // 2
    assert found.available_bytes == GIB // 2 + 256 * MIB
    assert found.source.endswith("memory/memory.stat")
    inner = {f"{base}/inner/memory.limit_in_bytes": GIB, f"{base}/inner/memory.usage_in_bytes": 1}
    tree = plant(tmp_path, {**v1("/docker/abc/inner", "/docker/abc"), **inner})
    assert ceiling(tree).limit_bytes == GIB
    assert cgroups.folders(tree) == [f"{base}/inner", base]


def test_v1_nested_and_huge(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        f"{base}/memory.limit_in_bytes": V1_NONE,
        f"{base}/a/memory.limit_in_bytes": 900 * MIB,
        f"{base}/a/memory.usage_in_bytes": 100 * MIB,
        f"{base}/a/b/memory.limit_in_bytes": V1_NONE,
        f"{base}/a/b/memory.stat": f"hierarchical_memory_limit {V1_NONE}",
    }
    found = ceiling(plant(tmp_path, {**process(), **v1("/a/b"), **files}))
    assert (found.limit_bytes, found.available_bytes) == (900 * MIB, 800 * MIB)


def test_a_group_outside_of_the_mount_or_the_namespace_is_left_alone(tmp_path: Path) -> None:
    planted = {"sys/fs/cgroup/memory.max": 5 * MIB, "sys/fs/cgroup/memory.current": MIB}
    outside = plant(tmp_path / "a", {**process(), **v2("/../other"), **planted})
    elsewhere = plant(tmp_path / "b", {**process(), **v2("/y", hosts.V2_MOUNT.replace(" / /", " /x /")), **planted})
    assert [ceiling(tree).limit_bytes for tree in (outside, elsewhere)] == [16 * GIB] * 2


@given(st.lists(st.tuples(st.none() | st.integers(1, 40 * GIB), st.integers(0, 40 * GIB)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_lowest_of_any_nesting_counts(tmp_path_factory, groups) -> None:
    folder, names = "sys/fs/cgroup", ""
    files: dict[str, object] = {}
    for depth, (limit, current) in enumerate(groups):
        names += f"/g{depth}"
        files[f"{folder}{names}/memory.max"] = "max" if limit is None else limit
        files[f"{folder}{names}/memory.current"] = current
    found = ceiling(plant(tmp_path_factory.mktemp("tree"), {**process(), **v2(names), **files}))
    limits = [limit for limit, _ in groups if limit is not None]
    left = [max(limit - current, 0) for limit, current in groups if limit is not None]
    assert found.limit_bytes == min([16 * GIB, *limits])
    assert found.available_bytes == min([9 * GIB, *left])


def test_limits_of_the_process(tmp_path: Path) -> None:
    head = "Limit                     Soft Limit           Hard Limit           Units"
    line = f"Max address space         {GIB:<20} unlimited            bytes"
    data = "Max data size             unlimited            unlimited            bytes"
    tree = plant(tmp_path, {**process(), "proc/self/limits": f"{head}\n{data}\n{line}"})
    found = ceiling(tree)
    assert found.available_bytes == 124 * MIB
    assert found.limit_bytes == 324 * MIB
    assert found.source == "the process's limit of address space"


@pytest.mark.parametrize(("integrated", "tegra", "expected"), [(0, 0, 4 * GIB), (1, 0, None), (0, 1, None)])
def test_the_memory_of_a_gpu_counts_once(tmp_path: Path, monkeypatch, integrated, tegra, expected) -> None:
    monkeypatch.setitem(sys.modules, "torch", gpu(bool(integrated)))
    files = process()
    if tegra:
        files["proc/device-tree/compatible"] = "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0"
    found = ceiling(plant(tmp_path, files))
    assert (found.device and found.device.limit_bytes) == expected
    assert found.limit_bytes == 16 * GIB


def test_without_proc_psutil_answers(monkeypatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr(Tree, "maybe", lambda tree, path: None)
    found = ceiling()
    assert found.used_bytes > MIB
    assert found.limit_bytes > found.available_bytes > 0
    assert [bound.source for bound in found.bounds] == ["the machine's memory"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_a_real_process_with_a_real_limit() -> None:
    program = (
        "import json, resource\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (700 << 20, 700 << 20))\n"
        "from edge_sdss.tuning.ceiling import ceiling\n"
        "found = ceiling()\n"
        "held = bytearray(found.available_bytes - (40 << 20))\n"
        "try:\n"
        "    more, failed = bytearray(80 << 20), False\n"
        "except MemoryError:\n"
        "    failed = True\n"
        "print(json.dumps([found.reachable_bytes, found.limit_bytes, found.source, failed]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reachable, limit, source, failed = json.loads(done.stdout)
    assert reachable == limit < 800 * MIB  # the program's own files come on top
    assert source == "the process's limit of data size"
    assert failed
