"""A command gets a board's memory and cores, is ended where it wants more, and what it reports says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_sdss import boards, device, emulation, profile
from edge_sdss.emulation import Limits, ways
from edge_sdss.errors import BackendUnavailable, InputError
from edge_sdss.tree import Tree

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = Path(__file__).parent / "fixtures" / "configs"
SMALL = Limits("orin-nano-8gb", 96 * MIB, 1)
HOG = "x = []\nwhile True: x.append(bytearray(b'1') * (8 << 20))"
LOOK = """
import json, os
from edge_sdss import device
from edge_sdss.tuning.ceiling import ceiling
bound = ceiling()
print(json.dumps([device.emulated(), device.cores(), bound.limit_bytes, bound.source]))
"""


def edge_sdss(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_sdss", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    file = tmp_path / "little.toml"
    file.write_text('about = "a little one"\nmemory_bytes = 134_217_728\n[cpu]\nname = "A53"\ncores = 1\n')
    return file


@pytest.fixture
def group() -> ways.Way:
    try:
        return ways.load("cgroup").open(SMALL)
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_the_limits_are_what_the_boards_linux_has_to_give() -> None:
    nano = boards.load("orin-nano-8gb")
    assert emulation.limits("orin-nano-8gb") == Limits("orin-nano-8gb", nano.usable_bytes or 0, 6)
    assert emulation.limits("thor").cores == 14
    with pytest.raises(InputError, match="no such board"):
        emulation.limits("orin-pico")
    with pytest.raises(InputError, match=r"memory or cores are not known; give a board"):
        emulation.limits("x86")


def test_a_board_of_the_users_own_is_named_by_its_path(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(board.parent)
    found = emulation.limits("little.toml")
    assert (found.board, found.memory_bytes) == (str(board), 128 * MIB)
    monkeypatch.setenv(device.EMULATED, found.board)
    assert device.emulated() == "little"
    assert boards.load(device.emulated_board() or "").cpu is not None


def test_ways_that_run_this_machines_command_come_first_and_rlimits_last(monkeypatch: pytest.MonkeyPatch) -> None:
    works: set[str] = set()

    class Module:
        def __init__(self, name: str) -> None:
            self.name = name

        def open(self, limits: Limits, image: str) -> str:
            if self.name not in works:
                raise BackendUnavailable(f"{self.name}: no; do")
            return f"{self.name} {image}"

    monkeypatch.setattr(ways, "load", Module)
    works |= {"rlimits"}
    trial = emulation.find(SMALL)
    assert (trial.way, list(trial.refused)) == ("rlimits edge-sdss:x86", ["systemd", "cgroup", "docker", "podman"])
    with pytest.raises(BackendUnavailable, match=r"podman: no; do; leave --image out"):
        emulation.find(SMALL, image="mine")
    works |= {"podman", "docker"}
    assert emulation.find(SMALL).way == "docker edge-sdss:x86"
    assert emulation.find(SMALL, image="mine").way == "docker mine"
    works |= {"cgroup"}
    assert emulation.find(SMALL).way == "cgroup edge-sdss:x86"
    works |= {"systemd"}
    assert emulation.find(SMALL).way == "systemd edge-sdss:x86"
    works.remove("cgroup")
    with pytest.raises(BackendUnavailable, match="no; do"):
        emulation.find(SMALL, "cgroup")


def test_every_way_is_there_by_its_file() -> None:
    assert set(ways.names()) == {*ways.HERE, *ways.CONTAINERS, ways.LAST}
    with pytest.raises(InputError, match="no such way; choose cgroup, docker"):
        ways.load("magic")


def seen(way: ways.Way, tmp_path: Path) -> list[Any]:
    """What a process under a way sees of its limits."""
    with (tmp_path / "seen").open("w+") as out:
        outcome = emulation.run(SMALL, way, [sys.executable, "-c", LOOK], stdout=out.fileno())
        out.seek(0)
        assert outcome.code == 0
        return list(json.loads(out.read()))


def test_a_group_holds_what_runs_in_it_and_goes_with_it(group: ways.Way, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    name, cores, limit, source = seen(group, tmp_path)
    assert (name, cores, limit) == ("orin-nano-8gb", 1, 96 * MIB)
    assert "cgroup" in source
    assert os.sched_getaffinity(0) == before
    assert not list(Path("/sys/fs/cgroup").rglob(f"edge-sdss-{os.getpid()}"))


def test_a_hog_is_ended_at_the_limit_of_a_group(group: ways.Way) -> None:
    outcome = emulation.run(SMALL, group, [sys.executable, "-c", HOG])
    assert outcome.code == 137
    assert emulation.stopped(outcome)
    assert 90 * MIB < (outcome.peak_bytes or 0) <= 96 * MIB
    modest = emulation.run(SMALL, group, [sys.executable, "-c", "x = bytearray(b'1') * (20 << 20)"])
    assert (modest.code, modest.at_limit) == (0, False)
    assert (modest.peak_bytes or 0) > 20 * MIB


def test_what_one_alone_may_have_two_together_may_not(group: ways.Way) -> None:
    """The limit is of all that the command starts: two of 60 MiB do not fit into 96."""
    one = "import sys\nx = bytearray(b'1') * (60 << 20)\nprint(flush=True)\nsys.stdin.read(1)"
    both = f"import subprocess, sys\na = [sys.executable, '-c', {one!r}]\n" + (
        "p = subprocess.PIPE\nd = [subprocess.Popen(a, stdin=p, stdout=p) for _ in 'ab']\n"
        "[each.stdout.readline() for each in d]\n[each.stdin.close() for each in d]\n"
        "sys.exit(max(each.wait() != 0 for each in d))"
    )
    assert emulation.run(SMALL, group, [sys.executable, "-c", both]).at_limit


def test_sigterm_reaches_the_command(board: Path, group: ways.Way) -> None:
    program = ["sh", "-c", "trap 'exit 9' TERM; echo running >&2; while :; do sleep 0.05; done"]
    command = [sys.executable, "-m", "edge_sdss", "emulate", str(board), "--", *program]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        while "running" not in process.stderr.readline():
            pass
        process.terminate()
        process.stderr.read()
        assert process.wait() == 9


def test_what_a_command_leaves_behind_is_ended_too(group: ways.Way, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    emulation.run(SMALL, group, ["sh", "-c", f"sleep 100 & echo $! > {note}"])
    left = Path("/proc", note.read_text().strip())
    assert not left.exists() or "Z" in (left / "stat").read_text()


def test_where_no_group_can_be_made_that_is_said(tmp_path: Path) -> None:
    cgroup = ways.load("cgroup")
    with pytest.raises(BackendUnavailable, match=r"no memory cgroup .*; run it as root"):
        cgroup.open(SMALL, tree=Tree(tmp_path))


@pytest.mark.parametrize(("controllers", "parent"), [("memory", "a.slice"), ("", None)])
def test_version_2_puts_the_group_beside_its_own_where_the_controller_is_given(
    tmp_path: Path, controllers: str, parent: str | None
) -> None:
    """Files stand for the kernel's: below its own group, which has a process, no limit can be set."""
    top = tmp_path / "sys/fs/cgroup"
    own = top / "a.slice/b.scope"
    own.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a.slice/b.scope\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (own / "cgroup.subtree_control").mkdir()  # a write fails, as with EBUSY
    (top / "cgroup.subtree_control").mkdir()
    (top / "a.slice/cgroup.subtree_control").mkdir() if not parent else (
        top / "a.slice/cgroup.subtree_control"
    ).write_text(controllers)
    way = ways.load("cgroup").Cgroup(SMALL, Tree(tmp_path))
    if parent is None:
        with pytest.raises(BackendUnavailable, match="directory"), way.group():
            pass
        return
    with way.group() as folder:
        assert folder.parent == top / parent
        assert (folder / "memory.max").read_text() == str(96 * MIB)
        for file in folder.iterdir():  # the kernel's go with the folder
            file.unlink()


def test_rlimits_refuse_memory_to_a_hog(tmp_path: Path) -> None:
    way = ways.load("rlimits").open(SMALL)
    name, _, limit, source = seen(way, tmp_path)
    assert name == "orin-nano-8gb"
    assert "data size" in source
    assert limit <= 96 * MIB + 60 * MIB  # what is shared does not count
    catch = f"try:\n    exec({HOG!r})\nexcept MemoryError: raise SystemExit(7)"
    assert emulation.run(SMALL, way, [sys.executable, "-c", catch]).code == 7
    assert way.lacks


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker that notes how it was called, runs what it is told here, and says that memory ran out."""
    log, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    for name in ("docker", "podman"):
        script = folder / name
        script.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$0 $*" >> {log}\n'
            'case "$1" in inspect) echo true;; '
            'image) [ "$3" = here ] || { echo "No such image: $3" >&2; exit 1; };; '
            'run) case "$*" in *entrypoint=true*) ;; *) exit 137;; esac;; esac\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return log


@pytest.mark.parametrize("name", ways.CONTAINERS)
def test_a_container_gets_the_limits_the_stamp_and_the_folders(
    engine: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendUnavailable, match=r"No such image: gone; build the image: .* docker/x86.Dockerfile"):
        ways.load(name).open(SMALL, "gone")
    way = ways.load(name).open(SMALL, "here")
    outcome = emulation.run(SMALL, way, ["edge-sdss", "plan"])
    assert (outcome.code, outcome.at_limit) == (137, True)
    ran = next(line for line in engine.read_text().splitlines() if "plan" in line)
    for wanted in (
        f"/{name} run ",
        f"--memory={96 * MIB}b --memory-swap={96 * MIB}b --cpuset-cpus=0-0",
        f"--volume={tmp_path}:{tmp_path}",
        f"--volume={os.environ['EDGE_SDSS_HOME']}:",
        "--env=EDGE_SDSS_EMULATED=orin-nano-8gb",
        f"--user={os.getuid()}:",
    ):
        assert wanted in ran
    assert ran.endswith("--entrypoint= here edge-sdss plan")
    assert " rm --force edge-sdss-" in engine.read_text()


@pytest.mark.parametrize(("said", "works"), [(96 * MIB, True), (97 * MIB, False), ("max", False), ("", False)])
def test_a_scope_whose_limit_is_not_ours_is_refused(
    said: object, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "systemd-run"
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\necho {said}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if not works:
        with pytest.raises(BackendUnavailable, match=f"limit of memory is {said or 'unknown'}; run it under"):
            ways.load("systemd").open(SMALL)
        return
    way = ways.load("systemd").open(SMALL)
    assert emulation.run(SMALL, way, ["true"]).at_limit is None
    called = (tmp_path / "calls").read_text()
    assert f"--property=MemoryMax={96 * MIB} --property=MemorySwapMax=0 -- " in called


def test_the_verb_says_what_it_would_do_and_names_a_missing_program(board: Path) -> None:
    told = json.loads(edge_sdss("emulate", board, "--json").stdout)
    assert (told["board"], told["memory_bytes"], told["cores"]) == (str(board), 128 * MIB, 1)
    assert told["way"] in ways.names()
    done = edge_sdss("emulate", board, "--", "no-such-program-here")
    assert done.returncode == 2
    assert "run no-such-program-here: no such program; check its name" in done.stderr


def test_the_verb_gives_the_commands_exit_code_and_stops_a_hog(board: Path, group: ways.Way) -> None:
    assert edge_sdss("emulate", board, "--", "sh", "-c", "exit 7").returncode == 7
    done = edge_sdss("emulate", board, "--json", "--", sys.executable, "-c", HOG)
    assert done.returncode == 137
    assert "Stopped at the limit of 128 MiB." in done.stderr
    told = json.loads(done.stdout)
    assert (told["stopped"], told["code"]) == (True, 137)


def test_on_an_emulated_board_the_plan_fits_and_what_would_not_is_refused() -> None:
    """The budget is the board's without asking, more is not to be had, and a model of 3B in fp32 is too large."""
    fits = edge_sdss("emulate", "orin-nano-8gb", "--", "edge-sdss", "plan", "--model", CONFIGS / "SmolLM2-135M.json",
                     "--runtime", "400MiB", "--json")  # fmt: skip
    plan = json.loads(fits.stdout)
    usable = boards.load("orin-nano-8gb").usable_bytes or 0
    assert plan["budget_bytes"] == usable - (1 << 30)
    assert plan["chosen"]["process_bytes"] <= plan["budget_bytes"]
    large = next(file for file in sorted(CONFIGS.glob("*.json")) if "3B" in file.name or "7B" in file.name)
    refused = edge_sdss("emulate", "orin-nano-8gb", "--", "edge-sdss", "plan", "--model", large, "--weights", "float32",
                        "--runtime", "400MiB", "--memory", "64GiB")  # fmt: skip
    assert refused.returncode == 2
    assert f"{plan['budget_bytes'] / MIB:.0f}" in refused.stderr.replace(",", "")


def test_a_round_on_an_emulated_board_has_its_budget(monkeypatch: pytest.MonkeyPatch, board: Path) -> None:
    from edge_sdss import cli_plan

    assert cli_plan.budget_here(None, None) is None
    assert cli_plan.budget_here("64GiB", None) == 64 << 30
    monkeypatch.setenv(device.EMULATED, "orin-nano-8gb")
    most = (boards.load("orin-nano-8gb").usable_bytes or 0) - (1 << 30)
    assert [cli_plan.budget_here(given, None) for given in (None, "64GiB", "2GiB")] == [most, most, 2 << 30]
    monkeypatch.setenv(device.EMULATED, str(board))
    with pytest.raises(InputError, match="leaves nothing"):
        cli_plan.budget_here(None, None)


def test_every_report_is_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.environment()["emulated"] is None
    monkeypatch.setenv(device.EMULATED, "orin-nano-8gb")
    assert device.environment()["emulated"] == "orin-nano-8gb"
    described = profile.describe(Tree())
    assert (described.emulated, described.profile) == (True, "orin-nano-8gb")
