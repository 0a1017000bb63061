"""A model put together tensor by tensor, so that loading takes no more than what is loaded and one tensor besides.

Knows nothing of the forms in which a tensor may be held; whoever loads says that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Hold = Callable[["nn.Module", str, "Tensor"], None]
"""Called as hold(model, path, tensor) with each tensor of the disk: puts it into its place in the model."""


def assemble(folder: Path, config: Any, hold: Hold) -> Any:
    """Returns the causal model of a transformers `config` with the weights in `folder`, as `hold` has placed them.

    None where the names on the disk are not simply the model's, so that transformers' own loader is needed.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places = dict(_places(folder))
    if not set(places) <= known:
        return None
    for path, file in places.items():
        hold(model, path, _read(file, path))
    model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def place(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Sets the parameter at `path`, frozen."""
    from torch import nn

    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Parameter(tensor, requires_grad=False))


def _places(folder: Path) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                yield name, file


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    # Opened anew for each: pages of the file that were read stay in memory for as long as it is mapped.
    with safe_open(file, "pt") as tensors:
        found: Tensor = tensors.get_tensor(name)
        return found
