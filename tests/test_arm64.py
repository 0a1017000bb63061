"""The device's files under qemu-user: the real aarch64 wheels say and compute what x86-64's do. Nothing of their speed.

Both overlays are unpacked into a minimal Debian, as over a board's root file system, and run there by chroot. It takes
minutes, most of them once, for the root: asked for by EDGE_SDSS_ARM64=1.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import roots

pytest.importorskip("torch")  # once, in the whole environment, and not in each core one
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import talk
from bundles_fixture import write_bundle

ARCHITECTURES = ("amd64", "arm64")
QUESTION = "What should I cook for dinner tonight?"

pytestmark = [
    pytest.mark.skipif(os.environ.get("EDGE_SDSS_ARM64") != "1", reason="takes minutes: set EDGE_SDSS_ARM64=1"),
    pytest.mark.timeout(1800),
]


class Device:
    """A root with the overlay; `call` is its edge-sdss."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def call(self, *arguments: str, check_code: bool = True) -> Any:
        env = ["EDGE_SDSS_HOME=/data/home", "EDGE_SDSS_CACHE=/data/cache", "HOME=/data", "PATH=/usr/bin:/bin"]
        run = ["chroot", self.root, "/usr/bin/env", "-i", *env, "OMP_NUM_THREADS=1", "/usr/bin/edge-sdss"]
        return json.loads(roots.run(*run, *arguments, "--json", check_code=check_code))


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Device]]:
    roots.emulator()
    spec = importlib.util.spec_from_file_location("device_build", roots.REPOSITORY / "docker" / "build.py")
    assert spec
    assert spec.loader
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    builder.planned_bytes = lambda board: 3_000_000_000  # type: ignore[attr-defined]
    work = tmp_path_factory.mktemp("arm64")
    bundle = write_bundle(work / "bundle")
    stream = talk.write(work / "talk.jsonl", 50)
    with ExitStack() as stack:
        found = {}
        for architecture in ARCHITECTURES:
            out = work / f"dist-{architecture}"
            builder.main(["--python", roots.PYTHON, "--architecture", architecture, "--out", str(out)])
            root = stack.enter_context(roots.copied(architecture, work / architecture))
            (overlay,) = out.glob("*.tar")
            roots.run("tar", "xpf", overlay, "-C", root, "--keep-directory-symlink", "--numeric-owner")
            (root / "data").mkdir()
            shutil.copytree(bundle, root / "data/bundle")
            shutil.copy(stream, root / "data/talk.jsonl")
            found[architecture] = Device(root)
        yield found


def test_doctor_finds_the_same_usable(devices: dict[str, Device]) -> None:
    """Apart from what the board is; and exit 1 in both, for want of torch."""
    told = {name: device.call("doctor", check_code=False) for name, device in devices.items()}
    statuses = {
        name: {(c["group"], c["name"]): c["status"] for c in each["checks"] if c["group"] not in ("board", "sensors")}
        for name, each in told.items()
    }
    assert statuses["arm64"] == statuses["amd64"]
    assert statuses["arm64"]["targets", "onnxruntime-cpu"] == "ok"


def test_observe_decides_the_same_of_fifty_dialogues(devices: dict[str, Device]) -> None:
    told = {
        name: device.call("observe", "/data/talk.jsonl", "--bundle", "/data/bundle", "--bins", "8")
        for name, device in devices.items()
    }
    arm, x86 = told["arm64"], told["amd64"]
    assert (arm["read"], arm["offers"]) == (50, 50)
    assert same(arm, x86) < 1e-4
    assert arm["kept"] > 8


def test_chat_answers_the_same(devices: dict[str, Device]) -> None:
    arguments = ("chat", "--bundle", "/data/bundle", "--prompt", QUESTION, "--max-tokens", "24", "--no-observe")
    told = {name: device.call(*arguments) for name, device in devices.items()}
    texts = {name: {key: value for key, value in each.items() if isinstance(value, str)} for name, each in told.items()}
    assert texts["arm64"] == texts["amd64"]
    assert any(len(text) > 10 for text in texts["arm64"].values())


def test_the_smoke_image_is_built(devices: dict[str, Device], tmp_path: Path) -> None:
    """From the very wheels of the overlay, fetched here for aarch64; what they compute, the tests above say."""
    roots.needs("buildah")
    wheels = tmp_path / "wheels"
    packages = devices["arm64"].root / "usr/lib/edge-sdss/python"
    wanted = ["==".join(each.name.removesuffix(".dist-info").split("-")[-2:]) for each in packages.glob("*.dist-info")]
    own = {"edge_sdss", "empath"}
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 32)]
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels]
    binary = ["--only-binary=:all:", f"--python-version={roots.PYTHON}", "--platform=manylinux2014_aarch64", *platforms]
    roots.run(*fetch, *binary, *(each for each in wanted if each.partition("==")[0] not in own))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "-w", wheels, "-c", "constraints.txt"]
    roots.run(*pip, "--no-deps", "empath", cwd=roots.REPOSITORY)
    roots.run(*pip, "hatchling", cwd=roots.REPOSITORY)

    def buildah(*arguments: object, **options: Any) -> str:
        return roots.run("buildah", *arguments, env={**os.environ, "BUILDAH_ISOLATION": "chroot"}, **options).strip()

    base, name = "localhost/edge-sdss-tests-arm64-base", "localhost/edge-sdss-tests-arm64"
    container = buildah("from", "--arch=arm64", "scratch")
    buildah("add", "-q", container, roots.root("arm64"), "/")
    buildah("config", "--arch=arm64", container)
    buildah("commit", "-q", container, base)
    buildah("rm", container)
    file = roots.REPOSITORY / "docker" / "arm64-smoke.Dockerfile"
    given = [f"--build-arg=BASE_IMAGE={base}", "--build-arg=PIP_ARGS=--no-index --find-links /wheels"]
    options = ["--arch=arm64", "--layers=false", f"--volume={wheels}:/wheels:ro", "--format=docker"]
    buildah("bud", *options, *given, "-f", file, "-t", name, roots.REPOSITORY)
    try:
        assert json.loads(buildah("inspect", name))["Docker"]["architecture"] == "arm64"
    finally:
        buildah("rmi", name, base)


def same(a: Any, b: Any) -> float:
    """Asserts that two documents are equal but for rounding; returns the largest difference of two numbers."""
    if isinstance(a, float) and isinstance(b, float):
        return 0.0 if math.isnan(a) and math.isnan(b) else abs(a - b)
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((same(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max((same(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    assert a == b
    return 0.0
