"""The shelf: whatever interrupts a deploy, the old version serves or the new one, and both are whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bundles import QKVO, bundle, pairs, peft_folder

from edge_sdss import bundles
from edge_sdss.bundles import _disk as disk
from edge_sdss.bundles.manifest import Check
from edge_sdss.bundles.shelf import Shelf
from edge_sdss.errors import InputError, ParityError

# Whatever changes a disk; a deploy is cut off before and after each single call of these.
CALLS = ("open", "fsync", "replace", "rename", "link", "symlink", "mkdir", "unlink", "rmdir")
# Those which a full disk refuses, and what is watched besides.
GROW = ("create", "write", "fsync", "link", "symlink", "mkdir", "rename", "replace")


@contextmanager
def watched(act: Callable[[int, str], None]) -> Iterator[list[str]]:
    """Calls `act(index, name)` before each call that changes the disk, those of pathlib and shutil too."""
    seen: list[str] = []
    originals: dict[tuple[Any, str], Any] = {}

    def wrap(owner: Any, name: str) -> None:
        original = originals[owner, name] = getattr(owner, name)

        def wrapper(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            act(len(seen) - 1, name)
            return original(*arguments, **named)

        setattr(owner, name, staticmethod(wrapper) if isinstance(owner, type) else wrapper)

    class Full:
        """A file whose writes are watched."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: Any) -> Any:
            seen.append("write")
            act(len(seen) - 1, "write")
            return self._file.write(data)

    path_open = Path.open

    def opened(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set(mode) & set("wxa"):
            return path_open(self, mode, *arguments, **named)
        seen.append("create")
        act(len(seen) - 1, "create")
        return Full(path_open(self, mode, *arguments, **named))

    for name in CALLS:
        wrap(os, name)
    Path.open = opened  # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        Path.open = path_open  # type: ignore[method-assign]
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def serves(shelf: Shelf) -> str | None:
    """The version that is active, after it was verified; nothing but whole versions may be listed."""
    active = shelf.active()
    if active is not None:
        bundles.verify(active)
    for version in shelf.list():
        bundles.verify(shelf.folder / version.version)
    return active.name if active else None


def leftovers(shelf: Shelf) -> list[str]:
    return sorted(name for name in os.listdir(shelf.folder) if name.endswith(".partial"))


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return bundle(tmp_path / "first", seed=1)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Another bundle, with one file that the first has too."""
    return bundle(tmp_path / "second", seed=2)


def test_deploy_list_rollback(tmp_path: Path, first: Path, second: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    assert shelf.active() is None
    assert shelf.list() == ()
    with pytest.raises(InputError, match="no bundle is active"):
        shelf.rollback()
    one, two = shelf.deploy(first), shelf.deploy(second)
    assert [version.version for version in shelf.list()] == [one.version, two.version]
    assert [version.is_active for version in shelf.list()] == [False, True]
    assert (one.previous, two.previous) == (None, one.version)
    assert serves(shelf) == two.version
    assert shelf.rollback().version == one.version == serves(shelf)
    with pytest.raises(InputError, match="nothing came before"):
        shelf.rollback()
    assert shelf.activate(two.version).version == serves(shelf)
    three = shelf.deploy(first)
    assert three.version.startswith("0003-")
    assert three.previous == two.version
    with pytest.raises(InputError, match="name one of these"):
        shelf.activate("0009-00000000")


def test_a_reader_keeps_its_version_while_another_is_deployed(tmp_path: Path, first: Path, second: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    shelf.deploy(first)
    reading = shelf.active()
    shelf.deploy(second)
    assert reading is not None
    assert bundles.verify(reading) == bundles.load(first)


def test_unchanged_files_are_shared_with_the_shelf_and_never_with_the_source(tmp_path: Path, first: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    one, two = shelf.deploy(first), shelf.deploy(first)
    inodes = [os.stat(shelf.folder / v.version / "model.onnx").st_ino for v in (one, two)]
    assert inodes[0] == inodes[1] != os.stat(first / "model.onnx").st_ino
    assert two.own_bytes < 2_000 < 40_000 < two.size_bytes
    (first / "model.onnx").write_bytes(b"changed in place")
    assert serves(shelf) == two.version


def test_a_bundle_that_is_not_whole_is_not_deployed(tmp_path: Path, first: Path, second: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    one = shelf.deploy(first)
    (second / "model.onnx").write_bytes(b"half")
    with pytest.raises(InputError, match=r"model\.onnx has 4 bytes"):
        shelf.deploy(second)
    assert serves(shelf) == one.version
    assert (len(shelf.list()), leftovers(shelf)) == (1, [])


def test_no_rollback_to_a_version_that_is_not_whole(tmp_path: Path, first: Path, second: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    one, two = shelf.deploy(first), shelf.deploy(second)
    (shelf.folder / one.version / "model.onnx").write_bytes(b"rot")
    for change in (shelf.rollback, lambda: shelf.activate(one.version)):
        with pytest.raises(InputError, match=r"model\.onnx has 3 bytes"):
            change()
    active = shelf.active()
    assert active is not None
    assert active.name == two.version


def test_what_the_check_refuses_is_not_deployed(tmp_path: Path, first: Path, second: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    one = shelf.deploy(first)

    def refuse(staged: Path) -> tuple[Check, ...]:
        assert bundles.verify(staged) == bundles.load(second)
        raise ParityError("wrong scale")

    with pytest.raises(ParityError, match="wrong scale"):
        shelf.deploy(second, check=refuse)
    assert serves(shelf) == one.version
    assert (len(shelf.list()), leftovers(shelf)) == (1, [])


def test_what_the_check_measured_is_in_the_manifest(tmp_path: Path, first: Path) -> None:
    measured = Check(stage="adapter a", against="PEFT", metric="m", value=1.0, n=3)
    shelf = Shelf(tmp_path / "home")
    shelf.deploy(first, check=lambda _: (measured,))
    active = shelf.active()
    assert active is not None
    assert bundles.load(active).checks == (measured,)


def test_prune_keeps_the_active_and_the_previous_version(tmp_path: Path, first: Path, second: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    names = [shelf.deploy(source).version for source in (first, second, first, second, first)]
    assert shelf.prune(keep=3) == tuple(names[:2])
    assert [version.version for version in shelf.list()] == names[2:]
    shelf.rollback()
    assert shelf.prune(keep=0) == (names[4],)
    assert [version.version for version in shelf.list()] == names[2:4]
    assert serves(shelf) == names[3]
    assert shelf.rollback().version == names[2] == serves(shelf)


def test_two_deploys_at_once_are_refused(tmp_path: Path, first: Path) -> None:
    shelf = Shelf(tmp_path / "home")
    shelf.deploy(first)
    with disk.locked(shelf.folder / "lock", "test"), pytest.raises(InputError, match="another process is changing"):
        shelf.deploy(first)
    shelf.deploy(first)


def test_without_links_files_are_copied_and_active_is_a_file(
    tmp_path: Path, first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr(os, "symlink", none)
    shelf = Shelf(tmp_path / "home")
    one, two = shelf.deploy(first), shelf.deploy(second)
    assert (shelf.folder / "active").is_file()
    assert not (shelf.folder / "active").is_symlink()
    assert serves(shelf) == two.version
    assert shelf.rollback().version == one.version == serves(shelf)


def test_a_lost_pointer_costs_no_version(tmp_path: Path, first: Path, second: Path) -> None:
    """A home that was copied without its links: what served is not taken for what a killed deploy left."""
    shelf = Shelf(tmp_path / "home")
    one, two = shelf.deploy(first), shelf.deploy(second)
    (shelf.folder / "active").unlink()
    assert shelf.activate(two.version).version == serves(shelf)
    (shelf.folder / "active").unlink()
    os.symlink("../../elsewhere", shelf.folder / "active")
    with pytest.raises(InputError, match="no version there"):
        shelf.active()
    assert shelf.activate(one.version).version == serves(shelf)


# --- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_costs_its_own_bytes(tmp_path: Path, first: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("safetensors")
    shelf = Shelf(tmp_path / "home")
    folders = [peft_folder(tmp_path / f"a{seed}", pairs({QKVO[0]: 4}, seed=seed)) for seed in range(3)]
    with pytest.raises(InputError, match="no bundle is active"):
        shelf.deploy_adapter(folders[0], "mine")
    shelf.deploy(first)
    version = shelf.deploy_adapter(folders[0], "mine")
    assert (version.adapter, version.adapters) == ("mine", ("mine",))
    assert version.own_bytes < 5_000 < 40_000 < version.size_bytes
    version = shelf.deploy_adapter(folders[1], "other", activate=False)
    assert (version.adapter, version.adapters) == ("mine", ("mine", "other"))
    before = bundles.load(shelf.folder / version.version).adapter("mine")
    version = shelf.deploy_adapter(folders[2], "mine")
    manifest = bundles.verify(shelf.folder / version.version)
    assert [entry.name for entry in manifest.adapters] == ["other", "mine"]
    assert manifest.adapter("mine").source_sha256 != before.source_sha256
    assert bundles.load(shelf.folder / shelf.rollback().version).adapter("mine") == before
    with pytest.raises(InputError, match="the bundle has other, mine"):
        manifest.adapter("nobody")


# --- killed -------------------------------------------------------------------------------------------------------


def in_a_child(change: Callable[[], Any], index: int) -> bool:
    """Runs `change` in a child that is killed before its call number `index`; returns whether it was."""
    child = os.fork()
    if child == 0:

        def kill(now: int, _: str) -> None:
            if now == index:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 3
        try:
            with watched(kill):
                change()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def count(change: Callable[[], Any]) -> int:
    with watched(lambda *_: None) as seen:
        change()
    return len(seen)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("what", ["deploy", "first", "rollback", "prune"])
def test_a_kill_at_any_call_leaves_a_version_that_works(tmp_path: Path, first: Path, second: Path, what: str) -> None:
    ready = Shelf(tmp_path / "ready")
    for source in {"first": (), "rollback": (first, second)}.get(what, (first, first, first)):
        ready.deploy(source)
    known = {version.version for version in ready.list()}
    before = {serves(ready)} if known else {None}
    allowed = known if what == "rollback" else before

    def change(home: Path) -> Callable[[], Any]:
        shelf = Shelf(home)
        return {"rollback": shelf.rollback, "prune": shelf.prune}.get(what, lambda: shelf.deploy(second))

    def copied(name: str) -> Path:
        return shutil.copytree(tmp_path / "ready", tmp_path / name, symlinks=True) if known else tmp_path / name

    calls = count(change(copied("counted")))
    assert calls >= {"deploy": 25, "first": 25, "rollback": 5, "prune": 5}[what]
    ends = set()
    for index in range(calls):
        home = copied(f"home{index}")
        assert in_a_child(change(home), index)
        shelf = Shelf(home)
        served = serves(shelf)
        assert served in allowed or (what in ("deploy", "first") and served not in known)
        ends.add(served in before)
        after = shelf.deploy(second)  # the next one takes away what was left, and works
        assert serves(shelf) == after.version
        assert leftovers(shelf) == []
        shelf.prune(keep=99)
        found = {version.version for version in shelf.list()}
        assert {served, after.version} - {None} <= found <= known | {served, after.version}
        shutil.rmtree(home)
    assert ends == ({True} if what == "prune" else {True, False})


# --- full ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["deploy", "first", "rollback"])
def test_a_full_disk_at_any_call_leaves_a_version_that_works(
    tmp_path: Path, first: Path, second: Path, what: str
) -> None:
    ready = Shelf(tmp_path / "ready")
    for source in {"deploy": (first,), "first": (), "rollback": (first, second)}[what]:
        ready.deploy(source)
    before = serves(ready)

    def change(home: Path) -> Callable[[], Any]:
        shelf = Shelf(home)
        return shelf.rollback if what == "rollback" else lambda: shelf.deploy(second)

    def copied(name: str) -> Path:
        return shutil.copytree(tmp_path / "ready", tmp_path / name, symlinks=True) if before else tmp_path / name

    refused = 0
    for index in range(count(change(copied("counted")))):

        def full(now: int, name: str, index: int = index) -> None:
            if now >= index and name in GROW:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        home, told = copied(f"home{index}"), ""
        try:
            with watched(full) as seen:
                change(home)()
        except InputError as error:
            told = str(error)
        refused += bool(told)
        shelf = Shelf(home)
        assert "No space left" in told if told else "replace" in seen
        assert (serves(shelf) == before) is bool(told)
        after = shelf.deploy(second)
        assert serves(shelf) == after.version
        assert leftovers(shelf) == []
        shutil.rmtree(home)
    assert refused >= {"deploy": 15, "first": 15, "rollback": 2}[what]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        shelf = Shelf(small / "home")
        one = shelf.deploy(bundle(tmp_path / "fits", seed=1))
        large = bundle(tmp_path / "large", seed=2, files={"model.onnx": os.urandom(400_000)})
        with pytest.raises(InputError, match="No space left"):
            shelf.deploy(large)
        assert serves(shelf) == one.version
        assert leftovers(shelf) == []
        two = shelf.deploy(bundle(tmp_path / "again", seed=3))
        assert serves(shelf) == two.version
    finally:
        subprocess.run(["umount", str(small)], check=True)
