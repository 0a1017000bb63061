"""A folder to be carried to a phone or another Snapdragon without adb: the compiled graph, inputs, what must come out.

Two programs run it there, one with ONNX Runtime, one with QNN's own qnn-net-run; a third compares. None has run on a
device yet. Knows nothing of what the graph computes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss import files
from edge_sdss.errors import ExportError, InputError, message
from edge_sdss.exporting import htp
from edge_sdss.exporting.explain import measure

Array = npt.NDArray[Any]

_PROGRAMS = Path(__file__).parent / "_phone"
_LEAST_LIMIT, _ROOM = 0.02, 2.0
"""A device may differ from the float graph by twice what the emulation does, and by 2 % in any case."""


def write(
    out: Path,
    graph: Path,
    feeds: Sequence[Mapping[str, Array]],
    expected: Sequence[Mapping[str, Array]],
    *,
    options: Mapping[str, str],
    logits: str = "logits",
) -> Path:
    """Compiles `graph` into `out`, with an input set and what the float graph gives for it, by output name, per feed.

    All in float32. Every output's limit comes from what the emulation here makes of it. `out` must be new or empty.
    Raises InputError where it is not, or cannot be written; ExportError where the graph cannot be compiled, or what the
    emulation gives is no number; BackendUnavailable without onnxruntime-qnn.
    """
    check_new(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        session = htp.session(graph, options, context=out / "model.onnx")
        wanted = {one.name for one in session.get_inputs()}
        cases = [
            _case(out, number, session, {name: feed[name] for name in feed if name in wanted}, right, logits)
            for number, (feed, right) in enumerate(zip(feeds, expected, strict=True))
        ]
        binary = _binary(out)
        _programs(out, binary)
        lists = [" ".join(f"{name}:={file['path']}" for name, file in case["inputs"].items()) for case in cases]
        (out / "input_list.txt").write_text("\n".join(lists) + "\n", encoding="utf-8")
        device = {name: value for name, value in options.items() if name != "backend_path"}
        told = {"options": device, "binary": binary, "cases": cases, "expected": "the float32 graph on a processor"}
        told["sha256"] = {
            str(file.relative_to(out)): files.sha256(file) for file in sorted(out.rglob("*")) if file.is_file()
        }
        (out / "cases.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(message(f"write {out}", error.strerror or "failed", "free space")) from error
    return out


def check_new(out: Path) -> None:
    """Raises InputError where `out` is neither new nor an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(message(f"write {out}", "something is there", "name a new folder"))


def _case(
    out: Path, number: int, session: Any, feed: Mapping[str, Array], right: Mapping[str, Array], logits: str
) -> dict[str, Any]:
    names = [one.name for one in session.get_outputs()]
    emulated = dict(zip(names, session.run(names, feed), strict=True))
    outputs = {}
    for name in names:
        difference = measure.relative(right[name].astype(np.float64), emulated[name].astype(np.float64))
        if not np.isfinite(difference):
            do = "see `edge-sdss export --explain`"
            raise ExportError(message(f"write {out}", f"in emulation {name} holds values that are no numbers", do))
        outputs[name] = _file(out, f"case-{number}/expected/{name}.raw", right[name])
        outputs[name] |= {"limit": max(_LEAST_LIMIT, _ROOM * difference), "emulated": difference}
        if name == logits:
            same = float((right[name].argmax(-1) == emulated[name].argmax(-1)).mean())
            outputs[name]["agreement"] = max(0.0, same - 2 / right[name][..., 0].size)  # two rows more may differ
    inputs = {name: _file(out, f"case-{number}/inputs/{name}.raw", array) for name, array in feed.items()}
    return {"inputs": inputs, "outputs": outputs}


def _file(out: Path, path: str, array: Array) -> dict[str, Any]:
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    (out / path).write_bytes(np.ascontiguousarray(array, "<f4").tobytes())
    return {"path": path, "shape": list(array.shape)}


def _binary(out: Path) -> str:
    found = sorted(file.name for file in out.glob("*.bin"))
    if len(found) != 1:
        say = f"the compiler wrote {len(found)} binaries"
        raise ExportError(message(f"write {out}", say, "split the graph, or place all of it on the NPU"))
    return found[0]


def _programs(out: Path, binary: str) -> None:
    for name in ("run.py", "compare.py"):
        shutil.copyfile(_PROGRAMS / f"{name}.in", out / name)
    text = (_PROGRAMS / "run.sh.in").read_text(encoding="utf-8").replace("@binary@", binary)
    (out / "run.sh").write_text(text, encoding="utf-8")
    (out / "run.sh").chmod(0o755)
