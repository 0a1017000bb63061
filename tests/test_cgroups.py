"""One answer to which cgroup is the process's own, for its limits, for what it uses and for its peak."""

from __future__ import annotations

from pathlib import Path

import hosts
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import MIB, plant, process, v1, v2

from edge_sdss import cgroups
from edge_sdss.profiling.memory import Watch
from edge_sdss.sensors.process import cgroup_file
from edge_sdss.tree import Tree
from edge_sdss.tuning.ceiling import ceiling

HYBRID = {
    "proc/self/cgroup": "9:memory:/old\n0::/new",
    "proc/self/mountinfo": f"{hosts.V2_MOUNT}\n{hosts.V1_MOUNT}",
}


@pytest.mark.parametrize(
    ("group", "folder", "version"),
    [
        (v2("/a.slice/b c.scope"), "sys/fs/cgroup/a.slice/b c.scope", 2),
        (v2("/"), "sys/fs/cgroup", 2),
        (v1("/jobs/7"), "sys/fs/cgroup/memory/jobs/7", 1),
        (v1("/docker/abc/x", "/docker/abc"), "sys/fs/cgroup/memory/x", 1),
        (v2("/g", hosts.V2_MOUNT.replace("/sys/fs/cgroup", "/mnt/my\\040groups")), "mnt/my groups/g", 2),
        (HYBRID, "sys/fs/cgroup/memory/old", 1),
    ],
)
def test_all_look_at_the_same_group(tmp_path: Path, group: dict[str, object], folder: str, version: int) -> None:
    limit = {1: "memory.limit_in_bytes", 2: "memory.max"}[version]
    figures = {cgroups.USAGE[version]: 30 * MIB, cgroups.PEAK[version]: 50 * MIB, limit: 70 * MIB}
    tree = plant(tmp_path, {**process(), **group, **{f"{folder}/{name}": held for name, held in figures.items()}})
    own = cgroups.own(tree)
    assert own is not None
    assert (own.version, own.folder) == (version, folder)
    assert folder in cgroups.folders(tree)
    assert cgroup_file(tree) == (f"{folder}/{cgroups.USAGE[version]}", "")
    assert ceiling(tree).limit_bytes == 70 * MIB
    assert ceiling(tree).available_bytes == 40 * MIB
    with Watch(tree) as watch:  # which resets the peak of version 2
        plant(tmp_path, {f"{folder}/{cgroups.PEAK[version]}": 50 * MIB})
    assert watch.result.cgroup_peak_bytes == 50 * MIB


@pytest.mark.parametrize(
    ("group", "path"),
    [
        ({}, None),
        ({"proc/self/cgroup": "7:pids:/\nnonsense\n:::\n0::"}, None),
        ({"proc/self/cgroup": "0::/a"}, "/a"),
        (v2("/../other"), "/../other"),
        (v1("/other", "/docker/abc"), "/other"),
        (v1("/docker/abcd", "/docker/abc"), "/docker/abcd"),
    ],
)
def test_a_group_that_no_mount_shows_has_no_folder(tmp_path: Path, group: dict[str, object], path: str | None) -> None:
    tree = plant(tmp_path, group)
    own = cgroups.own(tree)
    assert (own and own.path) == path
    assert own is None or own.folder is None
    assert cgroups.folders(tree) == []


@given(names=st.lists(st.from_regex(r"[a-z0-9]{1,4}", fullmatch=True), max_size=4), cut=st.integers(0, 4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_folders_lead_from_the_own_group_up_to_the_mount(tmp_path: Path, names: list[str], cut: int) -> None:
    """Whatever part of the path lies above the mount is cut off."""
    root, path = f"/{'/'.join(names[:cut])}", f"/{'/'.join(names)}"
    found = cgroups.folders(plant(tmp_path, v1(path, root)))
    below = names[cut:]
    assert found[0] == "/".join(["sys/fs/cgroup/memory", *below])
    assert found[-1] == "sys/fs/cgroup/memory"
    assert [Path(folder).parent for folder in found[:-1]] == [Path(folder) for folder in found[1:]]
    assert len(found) == len(below) + 1


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("4096", 4096), ("max", None), ("-1", None), (None, None)])
def test_a_file_holds_a_number_or_none(text: str | None, expected: int | None) -> None:
    assert cgroups.number(text) == expected


def test_where_there_is_no_proc_there_is_no_group(tmp_path: Path) -> None:
    assert cgroups.own(Tree(tmp_path)) is None
    assert cgroups.folders(Tree(tmp_path)) == []
