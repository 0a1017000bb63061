"""A stage: a way to compute the same tensors. torch, and a graph on any provider of ONNX Runtime.

Knows nothing of what the tensors mean and of what is compared with what.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edge_sdss.errors import InputError, message
from edge_sdss.exporting import cpu
from edge_sdss.exporting.explain.graph import Array, library
from edge_sdss.exporting.explain.quantised import Quantisation, Quantised, with_outputs

Feeds = Mapping[str, Array]
Values = dict[str, Array]
Open = Callable[[Path], Any]
"""Opens a graph: an onnxruntime.InferenceSession."""

Arithmetic = Literal["float32", "float16"]


@dataclass(frozen=True)
class Stage:
    """A way to compute tensors. `run(feeds, names)` returns those of `names` that it has.

    `arithmetic` is that of what is not quantised. `at_once`: how many tensors may be asked for in one run without
    changing what is run; None for all. `quantisation` and `weight` are those of `graph.Quantised`.
    """

    name: str
    run: Callable[[Feeds, Sequence[str]], Values]
    arithmetic: Arithmetic = "float32"
    at_once: int | None = None
    quantisation: Callable[[str], Quantisation | None] = field(default=lambda tensor: None)
    weight: Callable[[str], Array | None] = field(default=lambda tensor: None)
    emulated: bool = False


def of_model(
    name: str,
    file: Path,
    *,
    open: Open | None = None,
    arithmetic: Arithmetic = "float32",
    at_once: int | None = None,
    emulated: bool = False,
) -> Stage:
    """A graph, float or QDQ, on what `open` opens; by default the CPU provider, without optimisations.

    Feeds that the graph does not have are left out. Its weights may lie in files beside it.
    Raises InputError where it cannot be read or run.
    """
    graph = Quantised(file)
    inputs = {one.name for one in graph.model.graph.input}
    sessions: dict[tuple[str, ...], Any] = {}

    def run(feeds: Feeds, names: Sequence[str]) -> Values:
        there = {tensor: found for tensor in names if (found := graph.find(tensor)) is not None}
        key = tuple(there)
        if key not in sessions:
            sessions.clear()  # one compiled graph at a time
            sessions[key] = _opened(file, graph, there, open or on_cpu)
        given = {one: array for one, array in feeds.items() if one in inputs}
        asked = [_called(tensor, graph) for tensor in there]
        try:
            values = sessions[key].run(asked, given)
        except Exception as error:  # its exceptions have no common class
            found = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(message(f"run the stage {name}", found, "give feeds that fit the graph")) from error
        return dict(zip(there, values, strict=True))

    return Stage(name, run, arithmetic, at_once, graph.quantisation, graph.weight, emulated)


def of_torch(
    name: str, points: Mapping[str, str], call: Callable[[Feeds], Mapping[str, Any] | None], model: Any
) -> Stage:
    """A torch model. `points`: tensor of the graph -> module whose output it is, or `<module>:input`, its first input.

    `call` runs the model once for the graph's feeds; tensors that no module gives, it returns by name.
    """

    def run(feeds: Feeds, names: Sequence[str]) -> Values:
        import torch

        values: dict[str, Any] = {}

        def keep(tensor: str, of_input: bool) -> Callable[..., None]:
            def hook(module: Any, given: Any, out: Any) -> None:
                value = given if of_input else out
                values[tensor] = value[0] if isinstance(value, tuple) else value

            return hook

        modules = dict(model.named_modules())
        hooks = []
        for tensor in names:
            path, _, side = points.get(tensor, "").partition(":")
            if path:
                hooks.append(modules[path].register_forward_hook(keep(tensor, side == "input")))
        try:
            with torch.no_grad():
                more = call(feeds) or {}
        finally:
            for hook in hooks:
                hook.remove()
        values |= {tensor: more[tensor] for tensor in names if tensor in more}
        return {tensor: value.detach().float().cpu().numpy() for tensor, value in values.items()}

    return Stage(name, run)


def on_cpu(file: Path) -> Any:
    """Opens a graph on the CPU provider as it stands, no node fused or folded."""
    return cpu.on_cpu(file, as_written=True)


def _called(tensor: str, graph: Quantised) -> str:
    """What the instrumented graph calls a tensor: its own name where it is an output already."""
    return tensor if tensor in graph.topology.outputs else f"explain:{tensor}"


def _opened(file: Path, graph: Quantised, names: Mapping[str, str], open: Open) -> Any:
    more = {_called(tensor, graph): found for tensor, found in names.items() if tensor not in graph.topology.outputs}
    if not more:
        return open(file)
    # beside the graph, where its weights are found
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".onnx", prefix=".explain-") as handle:
        library().save(with_outputs(graph.model, more, graph.topology), handle.name)
        return open(Path(handle.name))
