"""What a device boots with: the same to the bit each time, units that systemd takes, a package that serves and goes.

The package is installed into a minimal Debian by chroot: the service runs there as its own user, with the command of
its unit. That systemd itself starts it with its hardening is not shown here, only verified and scored.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import roots

UNITS = ("edge-sdss.service", "edge-sdss-adapt.service", "edge-sdss-adapt.timer", "edge-sdss-firstboot.service")
EXPOSURE = {"edge-sdss.service": 1.0, "edge-sdss-adapt.service": 2.0, "edge-sdss-firstboot.service": 5.0}
HOST_UNITS = Path("/usr/lib/systemd/system")


def load_build() -> Any:
    spec = importlib.util.spec_from_file_location("device_build", roots.REPOSITORY / "docker" / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_build()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files without the packages, the plan's budget being 3 GB."""
    folder = tmp_path_factory.mktemp("files") / "content"
    shutil.copytree(roots.REPOSITORY / "docker" / "rootfs", folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "planned_bytes", lambda board: 3_000_000_000)
        builder._fill(folder, "orin-nano-8gb")
    return folder


def test_the_overlay_depends_on_nothing_but_content_and_time(content: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        copy = tmp_path / name / "deeper"
        files = sorted(content.rglob("*"), reverse=name == "b")
        for path in files:  # in another order, at another time, with another owner where we may
            target = copy / path.relative_to(content)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.mkdir(exist_ok=True) if path.is_dir() else shutil.copy(path, target)
        for path in copy.rglob("*"):
            path.chmod(path.stat().st_mode & 0o755)
        builder.enable(copy)
        made.append(builder.overlay(copy, tmp_path / f"{name}.tar", 1_700_000_000).read_bytes())
    assert made[0] == made[1]
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names)
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(1_700_000_000, 0, 0, "root")}
    links = {m.name: m.linkname for m in members if m.issym()}
    assert links["etc/systemd/system/multi-user.target.wants/edge-sdss.service"].endswith("/edge-sdss.service")
    assert not any(name.startswith("/") or ".." in name for name in names)


def test_the_nights_memory_is_the_plans(content: Path) -> None:
    text = (content / "usr/lib/systemd/system/edge-sdss-adapt.service").read_text(encoding="utf-8")
    assert f"MemoryMax={3_000_000_000 + (1 << 30)}\n" in text
    settings = content / "etc/edge-sdss/edge-sdss.toml"
    from edge_sdss import config

    assert config.load(settings).tuning.memory == 3_000_000_000
    assert not re.findall(r"@[A-Z_]+@", text + settings.read_text(encoding="utf-8"))


def test_the_plan_for_a_board_is_asked_of_the_planner() -> None:
    pytest.importorskip("torch")
    from edge_sdss import boards

    for board in ("orin-nano-4gb", "orin-nano-8gb"):
        found = boards.load(board)
        assert builder.RUNTIME < builder.planned_bytes(board) <= (found.usable_bytes or found.memory_bytes or 0)


@pytest.fixture(scope="module")
def verified(content: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our units beside those of this machine's systemd."""
    if shutil.which("systemd-analyze") is None or not HOST_UNITS.is_dir():
        pytest.skip("systemd-analyze is not installed")
    root = tmp_path_factory.mktemp("units") / "root"
    shutil.copytree(content, root, symlinks=True)
    units = root / "usr/lib/systemd/system"
    for unit in HOST_UNITS.iterdir():
        if not (units / unit.name).exists():
            (shutil.copytree if unit.is_dir() and not unit.is_symlink() else shutil.copyfile)(unit, units / unit.name)
    return root


def test_systemd_finds_no_fault_in_the_units(verified: Path) -> None:
    def verify() -> tuple[int, str]:
        command = ["systemd-analyze", "verify", f"--root={verified}", *UNITS]
        done = subprocess.run(command, capture_output=True, text=True)
        ours = [line for line in done.stderr.splitlines() if "edge-sdss" in line]
        return done.returncode, "\n".join(ours)

    assert verify() == (0, "")
    unit = verified / "usr/lib/systemd/system/edge-sdss.service"
    text = unit.read_text(encoding="utf-8")
    unit.write_text(text.replace("ProtectSystem=strict", "ProtectSystm=strict"), encoding="utf-8")
    assert "ProtectSystm" in verify()[1], "the check can fail"
    unit.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("unit", "most"), EXPOSURE.items())
def test_a_unit_is_hardened(verified: Path, unit: str, most: float, record_property: Any) -> None:
    path = verified / "usr/lib/systemd/system" / unit
    done = subprocess.run(["systemd-analyze", "security", "--offline=yes", str(path)], capture_output=True, text=True)
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd cannot score a unit offline: {done.stderr.strip()[:200]}")
    record_property("exposure", float(found[1]))
    print(f"systemd-analyze security {unit}: {found[1]}")
    assert float(found[1]) <= most


def unit_of(name: str) -> SimpleNamespace:
    text = (roots.REPOSITORY / "docker/rootfs/usr/lib/systemd/system" / name).read_text(encoding="utf-8")
    return SimpleNamespace(
        command=re.search(r"^ExecStart=(.+)$", text, re.M)[1].split(),  # type: ignore[index]
        env=re.search(r"^Environment=(.+)$", text, re.M)[1].split(),  # type: ignore[index]
        user=re.search(r"^User=(.+)$", text, re.M)[1],  # type: ignore[index]
    )


def listing(root: Path) -> set[str]:
    """Paths below a root, without what dpkg and the account tools keep for themselves."""
    own = ("var/lib/dpkg", "var/log", "var/cache", "proc", "tmp")
    found = set()
    for folder, folders, files in os.walk(root):
        here = os.path.relpath(folder, root).removeprefix(".").lstrip("/")
        folders[:] = [name for name in folders if os.path.join(here, name) not in own]
        found |= {os.path.join(here, name) for name in (*folders, *files)}
    return {path for path in found if not re.fullmatch(r"etc/(passwd|group|shadow|gshadow|subuid|subgid)-", path)}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .deb for the Python of the minimal Debian, built twice."""
    pytest.importorskip("torch")
    roots.needs("dpkg-deb", "debootstrap", "chroot")
    if shutil.which("uv") is None and not Path(sys.executable).with_name("uv").exists():
        pytest.skip("uv is not installed: pip install uv")
    digests = []
    for name in ("first", "second"):
        out = tmp_path_factory.mktemp(name)
        builder.main(["--python", roots.PYTHON, "--architecture", "amd64", "--out", str(out)])
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()})
    assert digests[0] == digests[1], "bit for bit the same"
    assert len(digests[0]) == 2
    return next(out.glob("*.deb"))


@pytest.fixture
def root(package: Path, tmp_path: Path) -> Iterator[Path]:
    with roots.copied("amd64", tmp_path / "root") as folder:
        shutil.copy(package, folder / "tmp/edge-sdss.deb")
        yield folder


@pytest.mark.timeout(900)
def test_a_package_is_installed_serves_answers_and_leaves_only_the_users_data(root: Path, package: Path) -> None:
    fields = roots.run("dpkg-deb", "-f", package)
    assert "Depends: python3 (>= 3.11), python3 (<< 3.12), libgomp1" in fields
    before, names = listing(root), (root / "etc/passwd").read_text()
    roots.run("chroot", root, "dpkg", "-i", "/tmp/edge-sdss.deb")
    state = root / "var/lib/edge-sdss"
    assert (oct(state.stat().st_mode & 0o777), state.stat().st_uid) == ("0o750", _uid(root))

    service = unit_of("edge-sdss.service")
    runtime = root / "run/edge-sdss"
    runtime.mkdir()
    shutil.chown(runtime, _uid(root), _uid(root))
    command = ["chroot", f"--userspec={service.user}", str(root), "/usr/bin/env", "-i", *service.env, *service.command]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "Listening at /run/edge-sdss/health.sock" in process.stderr.readline()
            said = roots.run("chroot", root, "edge-sdss", "health", "--json", "--socket", "/run/edge-sdss/health.sock")
            assert json.loads(said)["status"] == "ok"
        finally:
            process.terminate()
            assert process.wait(20) == 0

    roots.run("chroot", root, "/usr/lib/edge-sdss/first-boot")
    checks = json.loads((state / "first-boot.json").read_text(encoding="utf-8"))["checks"]
    assert ("backends", "numpy", "ok") in {(check["group"], check["name"], check["status"]) for check in checks}
    (state / "mine").write_text("a user's")

    roots.run("chroot", root, "dpkg", "--purge", "edge-sdss")
    left = listing(root) - before
    assert {path for path in left if not path.startswith("var/lib/edge-sdss")} == set()
    assert "var/lib/edge-sdss/mine" in left
    assert (root / "etc/passwd").read_text() == names
    assert before <= listing(root)


@pytest.mark.timeout(900)
def test_a_newer_package_keeps_the_users_settings_and_data(root: Path) -> None:
    roots.run("chroot", root, "dpkg", "-i", "/tmp/edge-sdss.deb")
    settings = root / "etc/edge-sdss/edge-sdss.toml"
    settings.write_text("[adapt]\nleast_new = 20\n", encoding="utf-8")
    (root / "var/lib/edge-sdss/mine").write_text("a user's")
    roots.run("chroot", root, "dpkg", "--force-confold", "-i", "/tmp/edge-sdss.deb")
    assert settings.read_text() == "[adapt]\nleast_new = 20\n"
    assert (root / "var/lib/edge-sdss/mine").read_text() == "a user's"
    roots.run("chroot", root, "dpkg", "--purge", "edge-sdss")


def _uid(root: Path) -> int:
    for _ in range(50):
        if found := re.search(r"^edge-sdss:[^:]*:(\d+):", (root / "etc/passwd").read_text(), re.M):
            return int(found[1])
        time.sleep(0.1)
    raise AssertionError("no account")
