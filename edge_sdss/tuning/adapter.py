"""Puts LoRA layers into a model for the time of a round, and writes them as a PEFT folder.

Knows nothing of data, losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss import config
from edge_sdss.errors import ConfigError, InputError, message
from edge_sdss.tuning import folder as files
from edge_sdss.tuning.folder import CONFIG, WEIGHTS
from edge_sdss.tuning.layers import Lora
from edge_sdss.types import Progress, no_progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edge_sdss.lm import LanguageModel
    from edge_sdss.tuning.folder import Saved
    from edge_sdss.tuning.layers.checkpointing import Checkpointed
    from edge_sdss.tuning.layers.lora import LoraLinear

__all__ = ["CONFIG", "WEIGHTS", "Trainable", "head", "load", "quantise", "trainable", "write"]


@dataclass(frozen=True)
class Trainable:
    """A model while its adapter is trained.

    `backbone` returns the last hidden states [B, S, H], `head` is the output layer's weight [V, H]. `layers`
    are the adapted linears by their path in `model`; `lowest` is the first decoder layer that has one. `switches`
    are the decoder layers from there on, each with the forward of its own that it may have had and a checkpoint.
    """

    model: nn.Module
    backbone: nn.Module
    head: Tensor
    layers: Mapping[str, LoraLinear]
    lora: Lora
    lowest: int
    switches: Sequence[tuple[nn.Module, Callable[..., Any] | None, Checkpointed]]

    def checkpointing(self, on: bool) -> None:
        """Has layers recomputed in the backward from the next forward on, or not. Changes no bit of a gradient."""
        for layer, plain, checkpointed in self.switches:
            _set_forward(layer, checkpointed if on else plain)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is learnt, by PEFT's names."""
        found: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            learnt = (layer.a, layer.b, layer.magnitude)
            found.update({n: p for n, p in zip(files.names(path), learnt, strict=True) if p is not None})
        return found

    @property
    def frozen(self) -> list[Tensor]:
        """All other tensors of the model, each once."""
        learnt = {id(parameter) for parameter in self.parameters.values()}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [tensor for tensor in tensors if id(tensor) not in learnt]


@contextmanager
def trainable(lm: LanguageModel, settings: config.Tuning, start: Path | None) -> Iterator[Trainable]:
    """Yields `lm`'s model with a trainable adapter in it: new, or a copy of the one at `start`.

    A new one has the settings' rank, targets and so on; a copy has its own. The base weights are taken as
    they are, dense or frozen (see `quantise`). On leaving, however that comes about, `lm` is as it was: its
    own adapter attached, modules, modes and `requires_grad` untouched. The first weights come from torch's
    generator, which the caller seeds; equal seeds give PEFT's.
    Raises InputError where `start` is no adapter of this model, or the model is of no family that can be
    tuned; ConfigError where the settings name a target or a layer that it lacks.
    """
    given = None if start is None else files.read(start, lm.fingerprint)
    attached = lm.adapter
    try:
        lm.attach(None)
        with ExitStack() as undo:
            yield _inject(lm.model, settings, given, undo)
    finally:
        lm.attach(attached)


def load(model: config.Model, settings: config.Tuning, progress: Progress = no_progress) -> LanguageModel:
    """Loads a model with its weights held as `settings.weights` says, tensor by tensor.

    Raises what `LanguageModel.load` raises. No adapter can be attached to linears in int8 or nf4 other than by
    `trainable`.
    """
    import torch

    from edge_sdss.lm import LanguageModel
    from edge_sdss.tuning.layers import frozen

    kind: frozen.Kind = model.dtype if settings.weights == "as loaded" else settings.weights
    rest = settings.compute_dtype if kind in ("int8", "nf4") else kind

    def hold(module: Any, path: str, tensor: Tensor) -> None:
        inside = path.startswith(f"{_path(module, _layers(module))}.")
        frozen.hold(module, path, tensor, kind if inside else rest, getattr(torch, rest))

    lm = LanguageModel.load(model.model_copy(update={"dtype": rest}), hold=hold, progress=progress)
    quantise(lm, settings)  # does nothing to what is held so
    return lm


def quantise(lm: LanguageModel, settings: config.Tuning) -> None:
    """Holds `lm`'s weights from now on as `settings.weights` says; there is no way back but to load it again.

    Goes matrix by matrix, so no more than one is there twice. An adapter that was attached is not any more.
    """
    import torch

    from edge_sdss.tuning.layers import frozen

    if settings.weights != "as loaded":
        lm.attach(None)
        frozen.quantise(lm.model, _layers(lm.model), settings.weights, getattr(torch, settings.compute_dtype))


def write(adapter: Trainable, folder: Path, base_name: str) -> None:
    """Writes the adapter into `folder`, as plain PEFT reads it. Equal weights, equal bytes."""
    where = files.targets(list(adapter.layers), _linears(adapter.model), _path(adapter.model, _layers(adapter.model)))
    files.write(folder, base_name, adapter.lora, adapter.parameters, where)


def head(base: Any) -> Tensor:
    """Returns the output head's weight [V, H] of a causal language model.

    Raises InputError where the logits are not simply hidden @ weight.T.
    """
    layer = base.get_output_embeddings()
    odd = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if _set(base.config, name)]
    if layer is None or getattr(layer, "bias", None) is not None:
        odd.append("a head with a bias" if layer is not None else "no head")
    if odd:
        raise InputError(message(f"tune {type(base).__name__}", f"it has {odd[0]}", "choose a Llama-like model"))
    weight: Tensor = layer.weight
    return weight


def _inject(model: Any, settings: config.Tuning, start: Saved | None, undo: ExitStack) -> Trainable:
    import torch

    from edge_sdss.tuning.layers.lora import LoraLinear

    layers, weight = _layers(model), head(model)
    lora = Lora(settings.rank, settings.alpha, settings.dropout, settings.rslora, settings.dora)
    if start is not None:
        lora = start.lora
    paths = _chosen(model, layers, settings) if start is None else _given(model, layers, start)
    _remember(model, undo)
    model.requires_grad_(False)
    _replace_norms(model, undo)
    adapted: dict[str, LoraLinear] = {}
    for path in paths:
        frozen, bias = _frozen(model.get_submodule(path))
        adapted[path] = LoraLinear(frozen, bias, lora, getattr(torch, settings.adapter_dtype))
        _replace(model, path, adapted[path], undo)
    lowest = min(_number(path, _path(model, layers)) for path in paths)
    switches = [_switch(layer, undo) for layer in layers[lowest:]]
    found = Trainable(model, model.get_decoder(), weight, adapted, lora, lowest, switches)
    if start is not None:
        start.copy_into(found.parameters)
    found.checkpointing(settings.checkpointing == "on")
    model.train()
    return found


def _remember(model: nn.Module, undo: ExitStack) -> None:
    """Has every module's mode and every parameter's flag set back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode

    undo.callback(restore)


def _replace(model: nn.Module, path: str, new: nn.Module, undo: ExitStack) -> None:
    parent, _, child = path.rpartition(".")
    owner = model.get_submodule(parent)
    undo.callback(setattr, owner, child, getattr(owner, child))  # first, for an interrupt may come between
    setattr(owner, child, new)


def _replace_norms(model: Any, undo: ExitStack) -> None:
    from edge_sdss.tuning.layers import norm

    decoder = model.get_decoder()
    for path, module in list(decoder.named_modules()):
        found = norm.like(module) if not list(module.children()) else None
        if found is not None:
            _replace(decoder, path, found, undo)


def _switch(layer: nn.Module, undo: ExitStack) -> tuple[nn.Module, Callable[..., Any] | None, Checkpointed]:
    from edge_sdss.tuning.layers.checkpointing import Checkpointed

    plain = vars(layer).get("forward")
    undo.callback(_set_forward, layer, plain)
    return layer, plain, Checkpointed(layer)


def _set_forward(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    vars(layer).pop("forward", None)
    if forward is not None:
        vars(layer)["forward"] = forward


def _frozen(linear: Any) -> tuple[Any, Any]:
    """A linear's frozen weight, shared with it, and its bias."""
    from edge_sdss.tuning.layers.frozen import Dense, FrozenLinear

    return linear.weight if isinstance(linear, FrozenLinear) else Dense(linear.weight), linear.bias


def _layers(model: Any) -> Any:
    """The decoder's layers, an nn.ModuleList."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise InputError(message(f"tune {type(model).__name__}", "its decoder has no layers", "choose another model"))
    return layers


def _path(model: Any, wanted: nn.Module) -> str:
    paths: Iterator[str] = (path for path, module in model.named_modules() if module is wanted)
    return next(paths)


def _number(path: str, layers: str) -> int:
    """The number of the layer that the module at `path` is in."""
    return int(path[len(layers) + 1 :].partition(".")[0])


def _chosen(model: Any, layers: Any, settings: config.Tuning) -> list[str]:
    """The paths of the linears that are to be adapted, in the model's order."""
    count = len(layers) if settings.top_layers is None else settings.top_layers
    if count > len(layers):
        found = f"the model has {len(layers)}"
        raise ConfigError(message(f"set tuning.top_layers to {count}", found, "give at most as many"))
    prefix = _path(model, layers)
    every = [f"{prefix}.{path}" for path in _linears(layers)]
    names = sorted({path.rpartition(".")[2] for path in every})
    wanted = names if settings.targets == "all-linear" else list(settings.targets)
    unknown = sorted(set(wanted) - set(names))
    if unknown or not wanted:
        found = f"the model has no linear {unknown[0]}" if unknown else "they are none"
        raise ConfigError(message("set tuning.targets", found, f"choose from {', '.join(names)}"))
    first = len(layers) - count
    return [path for path in every if path.rpartition(".")[2] in wanted and _number(path, prefix) >= first]


def _given(model: Any, layers: Any, start: Saved) -> list[str]:
    """The paths of the linears that an adapter is for, in the model's order."""
    prefix = _path(model, layers)
    every = [f"{prefix}.{path}" for path in _linears(layers)]
    strange = sorted(start.paths - set(every))
    if strange:
        found = f"the model has no layer {strange[0]}"
        do = "give an adapter that was trained on this model"
        raise InputError(message(f"continue from adapter {start.folder}", found, do))
    return [path for path in every if path in start.paths]


def _linears(module: nn.Module) -> list[str]:
    from torch import nn

    from edge_sdss.tuning.layers.frozen import FrozenLinear
    from edge_sdss.tuning.layers.lora import LoraLinear

    kinds = (nn.Linear, FrozenLinear, LoraLinear)
    return [path for path, each in module.named_modules() if isinstance(each, kinds)]


def _set(settings: Any, name: str) -> bool:
    return getattr(settings, name, None) not in (None, 1, 1.0)
