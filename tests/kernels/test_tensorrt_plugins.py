"""The TensorRT plugins through NVIDIA's own Python layer, and their launches in the interpreter of PTX.

The layer takes the registration and calls the plugin as TensorRT does: types, shapes, formats, launch. No TensorRT is
here, so no engine is built, and nothing of this has run on a device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")  # PyCUDA is built for one Python only, that of the whole suite

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
sys.path[:0] = [str(HERE / "nvidia"), str(HERE / "fake_driver")]
import bindings
import driver_build

SHAPES = {"ragged_mean": [4, 52], "token_entropy": [4], "centered_entropy": [4], "dissimilarity": [4]}
# Four dialogues of width 52: 208 bytes of a row are two blocks of 128; four rows are one block of eight warps.
LAUNCHES = {
    "ragged_mean": ("plugin_mean_f32", [4, 2, 1], [52]),
    "token_entropy": ("plugin_token_entropy_f32", [4, 1, 1], [4, 52]),
    "centered_entropy": ("plugin_centered_entropy_f32", [4, 1, 1], [4, 52]),
    "dissimilarity": ("plugin_dissimilarity_f32", [1, 1, 1], [4, 52]),
}
KEPT = ["OBEY_PRECISION_CONSTRAINTS", "edge_sdss/squares"]
X = ("FLOAT", "HALF", "BF16")
FORMATS = {
    "ragged_mean": [(x, "INT64", "FLOAT") for x in X],
    "token_entropy": [(x, "INT64", "FLOAT") for x in X],
    "centered_entropy": [(x, "FLOAT", "INT64", "FLOAT") for x in X],
    "dissimilarity": [("FLOAT", "FLOAT", "INT32", "FLOAT")],
}


def check(version, folder, old="", new=""):
    """Runs the plugins, one text in them replaced, in a process of its own."""
    try:
        bindings.folder(version)
        driver_build.driver()
    except driver_build.Unbuildable as error:
        pytest.skip(f"no bindings of TensorRT {version}, or no fake driver: {error}")
    folder.mkdir(exist_ok=True)
    for source in (KERNELS / "tensorrt").glob("*.py"):
        text = source.read_text(encoding="utf-8")
        if old and source.stem.startswith("v3" if version == "10.3" else "aot"):
            assert old in text
            text = text.replace(old, new)
        (folder / source.name).write_text(text, encoding="utf-8")
    for suffix in ("ptx", "cubin"):
        shutil.copy(KERNELS / f"images/jetpack6/plugins.{suffix}", folder)
    path = os.pathsep.join([str(HERE), str(HERE / "fake_driver")])
    command = [sys.executable, str(HERE / "nvidia/check.py"), version, str(folder)]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


@pytest.mark.parametrize("version", ["10.9", "10.13"])
def test_plugins_from_ptx(version, tmp_path):
    done = check(version, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith(version)
    assert found["plugins"].keys() == SHAPES.keys()
    assert found["engine"]["flags"] > 0
    assert found["engine"]["kept"] == KEPT
    for name, facts in found["plugins"].items():
        assert facts["shape"] == SHAPES[name]
        assert facts["types"] == ["FLOAT"]
        assert (facts["entry"], facts["grid"], facts["integers"]) == LAUNCHES[name]
        assert facts["block"] == [256, 1, 1]
        assert facts["formats"] == [kind for combination in FORMATS[name] for kind in combination]
        assert facts["error"] < 1e-6


def test_plugins_of_jetpack_6(tmp_path):
    done = check("10.3", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("10.3")
    assert found["plugins"].keys() == SHAPES.keys()
    assert found["engine"] == {"flags": 0, "kept": KEPT}
    for name, facts in found["plugins"].items():
        assert facts["shape"] == SHAPES[name]
        assert facts["types"] == ["FLOAT"]
        assert facts["serialised"] == 0
        assert facts["accepted"] == facts["refused"] == [True] * (len(FORMATS[name][0]))
        assert facts["error"] < 1e-6


# fmt: off
FAULTS = {
    "aot: another signature than registered": ("10.9", "def dissimilarity_kernel(v:", "def dissimilarity_kernel(w:"),
    "aot: integers swapped": ("10.9", "[dialogues, x.shape_expr[1]]", "[x.shape_expr[1], dialogues]"),
    "aot: one dialogue too many": ("10.9", "offsets.shape_expr[0] - 1", "offsets.shape_expr[0] - 0"),
    "aot: no block for the last columns": ("10.9", "trtp.cdiv(row_bytes, SECTION_BYTES)", "1"),
    "v3: integers swapped": ("10.3", "[bounds - 1, width]", "[width, bounds - 1]"),
    "v3: output first": ("10.3", "*inputs, *integers, output)", "output, *inputs[1:], *integers, inputs[0])"),
    "v3: no block for the last columns": ("10.3", "-(-row_bytes // SECTION_BYTES)", "1"),
    "v3: wide integers": ("10.3", "{len(integers)}iP", "{len(integers)}qP"),
}
# fmt: on


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    version, old, new = FAULTS[fault]
    done = check(version, tmp_path, old, new)
    if done.returncode:
        refused = re.findall(
            r"^\w*\.*\w*\.*(ValueError|OutOfBounds|PtxError|LogicError|LaunchError)\b", done.stderr, re.M
        )
        assert refused, done.stderr[-2000:]
        return
    plugins = json.loads(done.stdout.splitlines()[-1])["plugins"].items()
    assert [n for n, facts in plugins if not facts["error"] < 1e-6 or facts["shape"] != SHAPES[n]]
