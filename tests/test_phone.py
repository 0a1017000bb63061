"""The folder for a phone: it runs in the emulation as it stands, and its comparison tells right from wrong."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import decoders
from decoders import Decoder

from edge_sdss.errors import InputError
from edge_sdss.exporting import htp, phone
from edge_sdss.exporting.explain import of_model

TEXTS = [decoders.feeds(seed) for seed in (0, 1)]
OUTPUTS = ["layers.1.out", "layers.0.attn.k_rope", "layers.1.attn.k_rope"]


def python(folder: Path, program: str) -> tuple[int, str]:
    """Runs one of the folder's programs as a user would; returns its exit code and all that it said."""
    done = subprocess.run([sys.executable, program], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


class Emulation:
    """Stands for the compiler where it is not installed: gives the float graph's values, changed a little."""

    def __init__(self, file: Path, context: Path) -> None:
        self.stage, self.file = of_model("float", file), file
        context.write_bytes(b"graph")
        context.with_name("model_qnn.bin").write_bytes(b"binary")

    def get_inputs(self) -> list[Any]:
        return [type("Value", (), {"name": name})() for name in TEXTS[0]]

    def get_outputs(self) -> list[Any]:
        return [type("Value", (), {"name": name})() for name in OUTPUTS]

    def run(self, names: list[str], feed: Any) -> list[Any]:
        values = self.stage.run(feed, names)
        return [values[name] * np.float32(1.001) for name in names]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(htp, "session", lambda file, options, context: Emulation(file, context))
    return made(tmp_path)


def made(tmp_path: Path) -> Path:
    graph = Decoder().save(tmp_path / "f.onnx")
    right = [of_model("float", graph).run(text, OUTPUTS) for text in TEXTS]
    return phone.write(tmp_path / "phone", graph, TEXTS, right, options=htp.OPTIONS, logits="layers.1.out")


def came_back(
    folder: Path, change: Callable[[str, Any], Any] = lambda name, array: array, c_names: bool = False
) -> None:
    """Writes outputs/ as the device would."""
    told = json.loads((folder / "cases.json").read_text())
    for number, case in enumerate(told["cases"]):
        out = folder / "outputs" / f"Result_{number}"
        out.mkdir(parents=True)
        for name, file in case["outputs"].items():
            array = change(name, np.fromfile(folder / file["path"], "<f4").reshape(file["shape"]))
            array.astype("<f4").tofile(out / f"{re.sub('[^A-Za-z0-9_]', '_', name) if c_names else name}.raw")


@pytest.mark.parametrize("c_names", [False, True])
def test_what_is_right_passes(folder: Path, c_names: bool) -> None:
    came_back(folder, lambda name, array: array * 1.001, c_names)
    code, said = python(folder, "compare.py")
    assert (code, said.splitlines()[-1]) == (0, "PASS")
    assert said.count("error 0.001") == len(TEXTS) * len(OUTPUTS)


@pytest.mark.parametrize("wrong", OUTPUTS)
def test_what_is_wrong_fails_by_name(folder: Path, wrong: str) -> None:
    came_back(folder, lambda name, array: array * (1.05 if name == wrong else 1))
    code, said = python(folder, "compare.py")
    assert code == 1
    assert [line.split()[2][:-1] for line in said.splitlines() if "beyond" in line and "case" in line] == [wrong] * 2


def test_another_most_likely_token_fails_though_the_error_is_small(folder: Path) -> None:
    def swap(name: str, array: Any) -> Any:
        if name == "layers.1.out":
            array = array + 0
            top = array.argmax(-1)[..., None]
            other = np.argsort(array, -1)[..., -2][..., None]
            middle = (np.take_along_axis(array, top, -1) + np.take_along_axis(array, other, -1)) / 2
            np.put_along_axis(array, top, middle - 1e-3, -1)
            np.put_along_axis(array, other, middle + 1e-3, -1)
        return array

    text = (folder / "cases.json").read_text()
    told = json.loads(text)
    for case in told["cases"]:
        case["outputs"]["layers.1.out"]["limit"] = 10.0
    (folder / "cases.json").write_text(json.dumps(told))
    came_back(folder, swap)
    code, said = python(folder, "compare.py")
    assert code == 1
    assert "argmax agreement 0.0000, least 0.6667" in said


def test_values_that_are_no_numbers_fail(folder: Path) -> None:
    came_back(folder, lambda name, array: array * np.nan)
    code, said = python(folder, "compare.py")
    assert code == 1
    assert "error inf" in said


def test_what_lacks_is_said(folder: Path) -> None:
    assert python(folder, "compare.py")[0] == 2
    came_back(folder)
    file = folder / "outputs" / "Result_1" / f"{OUTPUTS[0]}.raw"
    file.write_bytes(file.read_bytes()[:-4])
    code, said = python(folder, "compare.py")
    assert (code, "bytes, not" in said) == (2, True)
    (folder / "case-0" / "inputs" / "x.raw").write_bytes(b"damaged")
    code, said = python(folder, "compare.py")
    assert (code, "case-0/inputs/x.raw is missing or damaged" in said) == (2, True)


def test_the_net_runner_is_told_every_input_and_the_binary(folder: Path) -> None:
    lines = (folder / "input_list.txt").read_text().splitlines()
    assert len(lines) == len(TEXTS)
    for number, line in enumerate(lines):
        pairs = dict(one.split(":=") for one in line.split(" "))
        assert set(pairs) == set(TEXTS[0])
        for name, path in pairs.items():
            assert np.array_equal(np.fromfile(folder / path, "<f4"), TEXTS[number][name].ravel())
    assert "--retrieve_context model_qnn.bin " in (folder / "run.sh").read_text()
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run([shell, "run.sh"], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, "qnn-net-run is not there" in done.stderr) == (2, True)
    subprocess.run([shell, "-n", "run.sh"], cwd=folder, check=True)


def test_the_folder_runs_in_the_emulation(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed, which has the HTP emulation")
    folder = made(tmp_path)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    (tmp_path / "f.onnx").unlink()
    code, said = python(moved, "run.py")
    assert code == 0, said
    code, said = python(moved, "compare.py")
    assert (code, said.splitlines()[-1]) == (0, "PASS in emulation, on no device")
    assert json.loads((moved / "outputs" / "device.json").read_text())["emulated"] is True


@pytest.mark.parametrize("program", ["run.py", "compare.py"])
def test_the_programs_are_ones_that_a_phones_python_reads(folder: Path, program: str) -> None:
    ast.parse((folder / program).read_text(), feature_version=(3, 8))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "mine").write_text("mine")
    with pytest.raises(InputError, match="something is there"):
        phone.write(tmp_path / "phone", tmp_path / "g.onnx", [], [], options={})
    assert (tmp_path / "phone" / "mine").read_text() == "mine"
