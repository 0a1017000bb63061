"""PEFT folders without PEFT and torch: LoRA as plain arrays, its scale folded in.

Knows nothing of graphs. What is more than LoRA on linear layers is refused, by the name of the setting.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdss.errors import ExportError, InputError, message
from edge_sdss.files import replace

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# What PEFT can do and a pair of MatMuls cannot: anything but these values is refused. `fan_in_fan_out` says how the
# base weight lies, and changes neither A nor B. How the weights were initialised matters where the base itself was
# changed with them, as PiSSA, OLoRA, CorDA and LoftQ do.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("modules_to_save", "target_parameters", "trainable_token_indices"), (None, [], {})),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens"), (None, [], {})),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), (False, None)),
}
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class Pair:
    """y += (x a) b: `a` [inputs, r] and `b` [r, outputs] float32, the scale folded into b."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]

    @property
    def rank(self) -> int:
        """The inner dimension, r."""
        return int(self.a.shape[1])


@dataclass(frozen=True)
class Lora:
    """The adapter of a PEFT folder, by the modules' paths in the model; `scale` is that of modules without pattern."""

    modules: Mapping[str, Pair]
    scale: float


def read(folder: Path) -> Lora:
    """Reads a PEFT folder.

    The scale is alpha / r, or alpha / √r with `use_rslora`; `rank_pattern` and `alpha_pattern` count.
    Raises InputError where it cannot be read or its tensors contradict its settings; ExportError where it does what
    a graph with LoRA inputs cannot.
    """
    asked = f"convert adapter {folder}"
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = _tensors(folder / WEIGHTS)
        rank, alpha, rslora = settings["r"], settings["lora_alpha"], settings.get("use_rslora") or False
        ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
        scale = _scale(rank, alpha, rslora)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        found = f"it cannot be read, {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(message(asked, found, "give a PEFT folder with LoRA in safetensors")) from error
    _refuse_odd(asked, settings, tensors)
    modules = {}
    for path in sorted(name[len(_PREFIX) : -len(_A)] for name in tensors if name.endswith(_A)):
        a, b = tensors[f"{_PREFIX}{path}{_A}"], tensors.get(f"{_PREFIX}{path}{_B}")
        r = _pattern(ranks, path, rank)
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != r or b.shape[1] != r:
            found = f"{path} has A {list(a.shape)} and B {None if b is None else list(b.shape)}, its rank is {r}"
            raise InputError(message(asked, found, "save the adapter anew"))
        folded = b.T * np.float32(_scale(r, _pattern(alphas, path, alpha), rslora))
        modules[path] = Pair(np.ascontiguousarray(a.T), np.ascontiguousarray(folded, np.float32))
    if not modules:
        raise InputError(message(asked, "it adapts no layer", "give a PEFT folder with LoRA"))
    wrong = next(
        (path for path, pair in modules.items() if not np.isfinite(pair.a).all() & np.isfinite(pair.b).all()), ""
    )
    if wrong:
        raise InputError(message(asked, f"weights of {wrong} are not finite", "train it anew"))
    return Lora(modules, scale)


def write(folder: Path, lora: Mapping[str, Pair], base: str) -> None:
    """Writes a PEFT folder with alpha = r, so that PEFT's B is `b` as it stands: float32 is kept bit by bit.

    Raises InputError where files cannot be written.
    """
    ranks = {path: pair.rank for path, pair in lora.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {re.escape(path): r for path, r in sorted(ranks.items()) if r != rank}
    settings = {
        "alpha_pattern": patterns,
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": patterns,
        "target_modules": sorted(lora),
        "task_type": "CAUSAL_LM",
    }
    tensors = {
        f"{_PREFIX}{path}{end}": np.ascontiguousarray(array.T, "<f4")
        for path, pair in sorted(lora.items())
        for end, array in ((_A, pair.a), (_B, pair.b))
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(_safetensors(tensors))
    except OSError as error:
        raise InputError(message(f"write {folder / WEIGHTS}", error.strerror or "failed", "free space")) from error
    replace(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    """Reads safetensors: a length, a header of JSON, the values. NumPy has no bfloat16, so no library is asked."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, part in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = part["data_offsets"]
        values = memoryview(raw)[start + begin : start + end]
        if part["dtype"] == "BF16":
            array = (np.frombuffer(values, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif part["dtype"] in _TYPES:
            array = np.frombuffer(values, _TYPES[part["dtype"]]).astype(np.float32)
        else:
            raise ValueError(f"{name} is of type {part['dtype']}, not of a float's")
        found[name] = array.reshape(part["shape"])
    return found


def _safetensors(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The bytes of a file that `_tensors` reads; the header is filled up with blanks, so that values lie at eights."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in tensors.values())])


def _refuse_odd(asked: str, settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    do = "give an adapter of plain LoRA, or export it with the merged route"
    for name, plain in _PLAIN.items():
        if name in settings and settings[name] not in plain:
            raise ExportError(message(asked, f"its {name} is {json.dumps(settings[name])}", do))
    odd = [name for name in tensors if not (name.startswith(_PREFIX) and name.endswith((_A, _B)))]
    if odd:
        raise ExportError(message(asked, f"it has {odd[0]}, which is no matrix of LoRA on a linear", do))


def _scale(rank: int, alpha: float, rslora: bool) -> float:
    return float(alpha / (math.sqrt(rank) if rslora else rank))


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The first pattern that PEFT would find for a module: a regular expression for the end of its path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
