"""What a device needs to build an engine. No TensorRT is here: a stand-in for trtexec records how it is called."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bundles import GRAPH, Tiny, bundle

from edge_sdss import boards
from edge_sdss.bundles.recipes import Extent, Shapes
from edge_sdss.errors import BudgetExceeded, ExportError, InputError
from edge_sdss.exporting import tensorrt

SHAPES = Shapes(
    batch=Extent(min=1, opt=1, max=2),
    sequence=Extent(min=1, opt=1, max=16),
    past=Extent(min=0, opt=8, max=32),
    rank=Extent(min=1, opt=8, max=16),
)
MERGED = GRAPH.model_copy(update={"sites": ()})


@pytest.fixture
def written(tmp_path: Path) -> tensorrt.Build:
    files = {"model.onnx_data": b"weights"}
    return tensorrt.write(bundle(tmp_path / "b", graph=MERGED, files=files), tmp_path / "out", SHAPES)


def run(
    build: tensorrt.Build, tmp_path: Path, *arguments: str, free_mib: int = 90_000
) -> subprocess.CompletedProcess[str]:
    """Runs the script with a trtexec that writes its arguments down and an engine out."""
    fake = tmp_path / "trtexec"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\necho engine > model.engine.partial\n')
    fake.chmod(0o755)
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free_mib * 1024} kB\n")
    variables = {**os.environ, "TRTEXEC": str(fake), "MEMINFO": str(tmp_path / "meminfo")}
    command = [str(build.folder / "build_engine.sh"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_profiles_agree_with_each_other(written: tensorrt.Build) -> None:
    decode, prefill = written.profiles
    assert decode["input_ids"] == ((1, 1), (1, 1), (2, 1))
    assert prefill["input_ids"] == ((1, 1), (1, 8), (2, 16))
    for profile in (decode, prefill):
        assert profile.keys() == {"input_ids", "attention_mask", "position_ids", *_past("key"), *_past("value")}
        for ids, mask, past in zip(
            *(profile[n] for n in ("input_ids", "attention_mask", "past_key_values.0.key")), strict=True
        ):
            assert mask[1] == ids[1] + past[2]
            assert past == (ids[0], GRAPH.kv_heads, past[2], GRAPH.head_dim)
        assert all(a <= b <= c for shapes in profile.values() for a, b, c in zip(*shapes, strict=True))
    saved = json.loads((written.folder / "profiles.json").read_text())
    assert [{k: [list(s) for s in v] for k, v in one.items()} for one in written.profiles] == saved["profiles"]


def _past(what: str) -> set[str]:
    return {f"past_key_values.{layer}.{what}" for layer in range(GRAPH.layers)}


def test_the_script_builds_once(written: tensorrt.Build, tmp_path: Path) -> None:
    assert run(written, tmp_path).returncode == 0
    assert (written.folder / "model.engine").read_text() == "engine\n"
    assert "already" in run(written, tmp_path).stdout
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == 1
    options = dict(word.split("=", 1) for word in called[0].split() if "=" in word)
    assert options["--onnx"] == "model.onnx"
    assert options["--memPoolSize"] == "workspace:512"
    assert "input_ids:2x16," in options["--maxShapes"]
    assert "past_key_values.0.key:1x1x0x4" in options["--minShapes"]
    (written.folder / "model.onnx").write_bytes(b"another graph")
    assert run(written, tmp_path).returncode == 0
    assert len((tmp_path / "called").read_text().splitlines()) == 2


def test_the_script_refuses_too_little_memory(written: tensorrt.Build, tmp_path: Path) -> None:
    need = -(-written.peak.total_bytes // 2**20)
    done = run(written, tmp_path, free_mib=need - 1)
    assert done.returncode == 3
    assert "too little memory" in done.stderr
    assert not (tmp_path / "called").exists()
    done = run(written, tmp_path, "--dry-run", free_mib=need)
    assert (done.returncode, (tmp_path / "called").exists()) == (0, False)
    assert "--saveEngine" in done.stdout
    assert run(written, tmp_path, "--force", free_mib=1).returncode == 0
    assert run(written, tmp_path, "--what").returncode == 2


def test_the_programs_are_sound(written: tensorrt.Build) -> None:
    ast.parse((written.folder / "build_engine.py").read_text(), feature_version=(3, 10))
    assert os.access(written.folder / "build_engine.sh", os.X_OK)
    assert (written.folder / "model.onnx_data").read_bytes() == b"weights"
    if shutil.which("shellcheck") is None:
        pytest.skip("ShellCheck is not installed")
    done = subprocess.run(["shellcheck", str(written.folder / "build_engine.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_lora_inputs_lose_their_defaults_and_get_ranks(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    source = bundle(tmp_path / "b", files={"model.onnx": Tiny().onnx()})
    built = tensorrt.write(source, tmp_path / "out", SHAPES)
    graph = onnx.load(built.folder / "model.onnx").graph
    assert {tensor.name for tensor in graph.initializer} == {"E", "qkv.W", "o.W"}
    assert {"qkv.A", "qkv.B", "o.A", "o.B"} <= {value.name for value in graph.input}
    for profile in built.profiles:
        assert profile["qkv.A"] == ((8, 1), (8, 24), (8, 48))  # three modules side by side
        assert profile["qkv.B"] == ((1, 12), (24, 12), (48, 12))
        assert profile["o.A"] == ((12, 1), (12, 8), (12, 16))


def test_a_board_with_less_memory_is_refused(tmp_path: Path) -> None:
    source, small = bundle(tmp_path / "b", graph=MERGED), boards.load("orin-nano-4gb")
    tensorrt.write(source, tmp_path / "fits", SHAPES, board=small)
    with pytest.raises(BudgetExceeded, match=r"estimated to take .* MB, orin-nano-4gb has"):
        tensorrt.write(source, tmp_path / "not", SHAPES, board=small, workspace_bytes=8 << 30)
    assert not (tmp_path / "not").exists()


def test_the_estimate_grows_with_each_of_its_causes() -> None:
    least = tensorrt.estimate(GRAPH, SHAPES, 10**8, 0)
    assert least.parsed == 2 * least.converted == 2 * least.engine == 10**8
    # Keys and values of one layer, batch 2, 1 head of 4, past 32 in and 32 + 16 out, float32.
    assert least.cache == 2 * 2 * 4 * (32 + 48) * 4
    wider = SHAPES.model_copy(update={"past": Extent(min=0, opt=8, max=64)})
    assert tensorrt.estimate(GRAPH, wider, 10**8, 0).total_bytes > least.total_bytes
    assert tensorrt.estimate(GRAPH, SHAPES, 10**8, 5).total_bytes == least.total_bytes + 5
    half = GRAPH.model_copy(update={"precision": "float16"})
    assert tensorrt.estimate(half, SHAPES, 10**8, 0).converted == 10**8


@pytest.mark.parametrize(
    ("graph", "shapes", "complaint"),
    [
        (GRAPH.model_copy(update={"kv_cache": "shared"}), SHAPES, "shared KV cache"),
        (GRAPH.model_copy(update={"precision": "int4"}), SHAPES, "int4 weights"),
        (GRAPH, SHAPES.model_copy(update={"rank": None}), "no rank is given"),
        (GRAPH, SHAPES.model_copy(update={"rank": Extent(min=0, opt=8, max=8)}), "rank.min is 0"),
        (GRAPH.model_copy(update={"context": 40}), SHAPES, "48 together, the model has 40"),
    ],
)
def test_what_tensorrt_cannot_take_is_refused(tmp_path: Path, graph: object, shapes: Shapes, complaint: str) -> None:
    with pytest.raises(ExportError, match=complaint):
        tensorrt.write(bundle(tmp_path / "b", graph=graph), tmp_path / "out", shapes)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, written: tensorrt.Build) -> None:
    with pytest.raises(InputError, match="something is there"):
        tensorrt.write(bundle(tmp_path / "again", graph=MERGED), written.folder, SHAPES)
