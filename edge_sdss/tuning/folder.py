"""PEFT folders, read and written without PEFT. Knows nothing of how an adapter gets into a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss.errors import InputError, message
from edge_sdss.lm import CARD
from edge_sdss.tuning.layers import Lora

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX, _FIRST, _SECOND, _THIRD = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

# What PEFT can do and we do not: anything but these values is refused.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian"),
    **dict.fromkeys(("modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"), (None, [], {})),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "alora_invocation_tokens"), (None, [], {})),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_qalora"), (False, None)),
}


@dataclass(frozen=True)
class Saved:
    """The adapter in a folder: its settings, and its tensors by PEFT's names."""

    folder: Path
    lora: Lora
    tensors: Mapping[str, Tensor]

    @property
    def paths(self) -> frozenset[str]:
        """The adapted linears, by their path in the model."""
        names = [name for name in self.tensors if name.startswith(_PREFIX) and name.endswith(_FIRST)]
        return frozenset(name[len(_PREFIX) : -len(_FIRST)] for name in names)

    def copy_into(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sets parameters, named as `names` does it. Raises InputError unless they are these tensors' in shape."""
        import torch

        wrong = sorted(self.tensors.keys() ^ parameters.keys())
        wrong += [name for name, p in parameters.items() if name not in wrong and self.tensors[name].shape != p.shape]
        if wrong:
            found = f"{len(wrong)} of its tensors do not fit, {wrong[0]} for one"
            raise InputError(_asked(self.folder, found, "give an adapter that was trained on this model"))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.tensors[name])


def names(path: str) -> tuple[str, str, str]:
    """Returns PEFT's names for A, B and the magnitude of the linear at `path` in the model."""
    return f"{_PREFIX}{path}{_FIRST}", f"{_PREFIX}{path}{_SECOND}", f"{_PREFIX}{path}{_THIRD}"


def read(folder: Path, fingerprint: str) -> Saved:
    """Reads an adapter of the base model with this fingerprint; one that does not say of which it is, is taken.

    Raises InputError where there is none, it is another model's, or does what LoraLinear does not.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        card = json.loads((folder / CARD).read_text(encoding="utf-8")) if (folder / CARD).is_file() else {}
        tensors = load_file(folder / WEIGHTS)
        base = card.get("base_fingerprint", fingerprint)
        odd = [name for name, plain in _PLAIN.items() if name in settings and settings[name] not in plain]
        lora = Lora(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings.get("lora_dropout", 0.0),
            rslora=settings.get("use_rslora", False),
            dora=settings.get("use_dora", False),
        )
    except (OSError, ValueError, AttributeError, TypeError, KeyError, SafetensorError) as error:
        found = f"it cannot be read, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(_asked(folder, found, "give a PEFT folder with LoRA")) from error
    if base != fingerprint:
        found = f"it was trained on the model {str(base)[:12]}, this one is {fingerprint[:12]}"
        raise InputError(_asked(folder, found, "load the model it was trained on"))
    if odd:
        found = f"its {odd[0]} is {settings[odd[0]]!r}"
        raise InputError(_asked(folder, found, "give an adapter of plain LoRA on linear layers"))
    saved = Saved(folder, lora, tensors)
    if not saved.paths:
        raise InputError(_asked(folder, "it adapts no layer", "give a PEFT folder with LoRA"))
    return saved


def write(folder: Path, base_name: str, lora: Lora, tensors: Mapping[str, Tensor], where: Mapping[str, Any]) -> None:
    """Writes an adapter, as plain PEFT reads it. Equal weights, equal bytes. `where` is from `targets`."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "peft_type": "LORA",
        "r": lora.rank,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
        **where,
    }
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def targets(adapted: Sequence[str], linears: Sequence[str], layers: str) -> dict[str, Any]:
    """Says in PEFT's terms which of the model's `linears` are `adapted`, both given by their paths.

    By name, with the numbers of the layers (in the list at the path `layers`) where not all have them; and one
    by one where this would mean others too.
    """
    last = sorted({path.rpartition(".")[2] for path in adapted})
    pattern = layers.rpartition(".")[2]
    named = [path for path in linears if path.rpartition(".")[2] in last]
    if set(named) == set(adapted):
        return {"target_modules": last}
    numbers = {_number(path, pattern) for path in adapted}
    if {path for path in named if _number(path, pattern) in numbers} == set(adapted):
        chosen = sorted(number for number in numbers if number is not None)
        return {"target_modules": last, "layers_to_transform": chosen, "layers_pattern": pattern}
    return {"target_modules": sorted(adapted)}


def _number(path: str, pattern: str) -> int | None:
    found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
    return int(found[1]) if found else None


def _asked(folder: Path, found: str, do: str) -> str:
    return message(f"continue from adapter {folder}", found, do)
