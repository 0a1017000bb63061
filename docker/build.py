"""Builds what a device boots with: a root file system overlay and a .deb of the same content, for any device, here.

    python docker/build.py --python 3.10 --architecture arm64 --board orin-nano-8gb --out dist

The content is docker/rootfs, the package and its dependencies as wheels of the device's own Python and architecture
(uv fetches them; torch is not among them: NVIDIA's serves a Jetson). Built twice, it is the same to the bit: files are
sorted and all of one time (SOURCE_DATE_EPOCH, else that of the commit), owners are root, nothing names this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "usr/lib/edge-sdss/python"
PLATFORMS = {"arm64": "aarch64-manylinux_2_31", "amd64": "x86_64-manylinux_2_31"}
RUNTIME, BESIDE = 600 << 20, 1 << 30
"""Of Python and libraries on a device; of the process that waits for the one that trains, and judges after it."""

ENABLED = {
    "multi-user.target.wants": ("edge-sdss.service", "edge-sdss-firstboot.service"),
    "timers.target.wants": ("edge-sdss-adapt.timer",),
}
UNITS = ("edge-sdss.service", "edge-sdss-adapt.service", "edge-sdss-adapt.timer", "edge-sdss-firstboot.service")
TEXTS = Path(__file__).resolve().parent / "debian"


def main(arguments: list[str] | None = None) -> None:
    """Writes both files into --out and prints their paths."""
    asked = _arguments(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        content = Path(scratch) / "content"
        stage(content, asked.python, asked.architecture, asked.board)
        size = sum(file.lstat().st_size for file in content.rglob("*"))
        asked.out.mkdir(parents=True, exist_ok=True)
        name = f"{asked.architecture}_py{asked.python}"
        control = _control(asked.python, asked.architecture, size)
        print(deb(content, control, asked.out / f"edge-sdss_{version()}_{name}.deb", epoch()))
        enable(content)
        print(overlay(content, asked.out / f"edge-sdss-overlay_{name}.tar", epoch()))


def stage(content: Path, python: str, architecture: str, board: str) -> None:
    """Puts together the files as they lie on the device."""
    shutil.copytree(ROOT / "docker" / "rootfs", content, symlinks=True)
    _fill(content, board)
    with tempfile.TemporaryDirectory() as wheels:
        common = ["--no-config", "--quiet", "--python", sys.executable]
        _uv("build", "--wheel", *common, "--out-dir", wheels, str(ROOT))
        (wheel,) = Path(wheels).glob("*.whl")
        target = ["--target", str(content / PACKAGES), "--python-version", python]
        target += ["--python-platform", PLATFORMS[architecture], "--link-mode", "copy"]
        only = ["--only-binary", ":all:", "--no-binary", "empath", "--constraints", str(ROOT / "constraints.txt")]
        _uv("pip", "install", *common, *target, *only, f"{wheel}[run]")
    for waste in ("bin", "share", "*.pth", "*.lock", ".lock", "*.dist-info/RECORD", "*.dist-info/INSTALLER",
                  "*.dist-info/REQUESTED", "*.dist-info/direct_url.json", "*.dist-info/uv_*"):  # fmt: skip
        for path in (content / PACKAGES).glob(waste):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in content.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def enable(content: Path) -> None:
    """Turns the units on, as an overlay must where no package manager runs."""
    for target, units in ENABLED.items():
        folder = content / "etc/systemd/system" / target
        folder.mkdir(parents=True)
        for unit in units:
            (folder / unit).symlink_to(f"/usr/lib/systemd/system/{unit}")


def overlay(content: Path, out: Path, time_s: int) -> Path:
    """Writes a tar whose bytes depend on nothing but the content and the time."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = time_s, 0, 0, "root", "root"
        return member

    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(content.rglob("*")):
            tar.add(path, str(path.relative_to(content)), recursive=False, filter=plain)
    return out


def deb(content: Path, control: str, out: Path, time_s: int) -> Path:
    """Writes a Debian package by dpkg-deb."""
    meta = content / "DEBIAN"
    meta.mkdir()
    (meta / "control").write_text(control, encoding="utf-8")
    configured = sorted(f"/{path.relative_to(content)}" for path in (content / "etc").rglob("*") if path.is_file())
    (meta / "conffiles").write_text("".join(f"{path}\n" for path in configured), encoding="utf-8")
    for script in ("postinst", "prerm", "postrm"):
        shutil.copyfile(TEXTS / script, meta / script)
        (meta / script).chmod(0o755)
    for path in [content, *content.rglob("*")]:
        os.utime(path, (time_s, time_s), follow_symlinks=False)
    # One thread: how the stream is cut may depend on their number.
    fixed = {**os.environ, "SOURCE_DATE_EPOCH": str(time_s), "DPKG_DEB_THREADS_MAX": "1"}
    command = ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z3", "--build", str(content), str(out)]
    subprocess.run(command, check=True, env=fixed, stdout=subprocess.DEVNULL)
    shutil.rmtree(meta)
    return out


def version() -> str:
    """The package's."""
    text = (ROOT / "edge_sdss" / "__init__.py").read_text(encoding="utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def epoch() -> int:
    """SOURCE_DATE_EPOCH, else the time of the commit, else that of the release of Python 3.10, in seconds."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    done = subprocess.run(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else 1_633_305_600


def planned_bytes(board: str) -> int:
    """What the process that trains takes by the plan for a board: its memory is the budget of the nightly round."""
    command = [sys.executable, "-m", "edge_sdss", "plan", "--json", "--board", board, "--runtime", str(RUNTIME)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"build: {done.stderr.strip()}")
    return int(json.loads(done.stdout)["chosen"]["process_bytes"])


def _fill(content: Path, board: str) -> None:
    budget = planned_bytes(board)
    values = {"@MEMORY@": str(budget), "@MEMORY_MAX@": str(budget + BESIDE), "@BOARD@": board}
    for path in (content / "etc/edge-sdss/edge-sdss.toml", content / "usr/lib/systemd/system/edge-sdss-adapt.service"):
        text = path.read_text(encoding="utf-8")
        for name, value in values.items():
            text = text.replace(name, value)
        path.write_text(text, encoding="utf-8")


def _control(python: str, architecture: str, size: int) -> str:
    major, minor = map(int, python.split("."))
    text = (TEXTS / "control").read_text(encoding="utf-8")
    depends = f"python3 (>= {python}), python3 (<< {major}.{minor + 1}), libgomp1"
    values = {"VERSION": version(), "ARCHITECTURE": architecture, "KIB": str(size // 1024), "DEPENDS": depends}
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _uv(*arguments: str) -> None:
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        raise SystemExit("build: uv is not here; pip install uv")
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch()), "UV_NATIVE_TLS": "1", "UV_NO_PROGRESS": "1"}
    subprocess.run([program, *arguments], check=True, env=env)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pythons = ["3.10", "3.11", "3.12", "3.13"]
    parser.add_argument("--python", choices=pythons, default="3.10", help="JetPack 6: 3.10, JetPack 7: 3.12")
    parser.add_argument("--architecture", choices=sorted(PLATFORMS), default="arm64")
    parser.add_argument("--board", default="orin-nano-8gb", help="the memory of the nightly round is planned for it")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
