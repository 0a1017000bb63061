"""The committed images are what the sources give, and what the drivers accept."""

from __future__ import annotations

import hashlib
import json

import build
import pytest

MANIFEST = json.loads((build.IMAGES / "manifest.json").read_text())


def test_the_manifest_names_the_committed_sources_and_images():
    assert MANIFEST["sources"] == {kernel: build.source_hash(kernel) for kernel in build.KERNELS}
    committed = {str(path.relative_to(build.IMAGES)): path.read_bytes() for path in build.IMAGES.glob("*/*")}
    assert {name: facts["sha256"] for name, facts in MANIFEST["images"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in committed.items()
    }


def test_jetpack6_gets_what_a_driver_of_cuda_12_6_accepts():
    for kernel in build.KERNELS:
        assert build.elf_abi((build.IMAGES / "jetpack6" / f"{kernel}.cubin").read_bytes()) == 7
        assert build.ptx_version((build.IMAGES / "jetpack6" / f"{kernel}.ptx").read_text()) == "8.5"
        assert build.ptx_version((build.IMAGES / "jetpack7" / f"{kernel}.ptx").read_text()) == "9.0"


def test_images_are_no_larger_than_they_were_meant_to_be():
    images = [path for path in build.IMAGES.glob("*/*") if path.suffix != ".ptx"]
    assert sum(path.stat().st_size for path in images) < 1_000_000


def test_a_build_is_the_same_again_and_is_what_is_committed(tmp_path):
    try:
        build.nvcc(), build.nvrtc()
    except build.BuildError as error:
        pytest.skip(str(error))
    build.build(tmp_path / "built")
    assert build.differences(tmp_path / "built", build.IMAGES) == []


@pytest.mark.parametrize("broken", [b"", b"\x7fELF", b"no image at all"])
def test_a_file_that_is_no_image_is_refused(broken):
    with pytest.raises(build.BuildError):
        build.elf_abi(broken)
    with pytest.raises(build.BuildError):
        build.ptx_version(broken.decode())
