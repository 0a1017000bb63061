"""The ways to compute a model that parity compares: the torch module, and a graph by plain calls.

Made for checks: every call is whole and slow. Knows nothing of bundles on the disk and of speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.bundles import Graph, Site, probe
from edge_sdss.errors import BackendUnavailable, InputError, message
from edge_sdss.exporting.cpu import on_cpu
from edge_sdss.exporting.parity import Ids, Logits, Rows

Adapter = Mapping[str, npt.NDArray[Any]]


def of_torch(model: Any) -> Logits:
    """Returns ids [n] -> logits [n, vocabulary] float32 of a transformers or PEFT model, as it is at each call."""
    import torch

    def logits(ids: Ids) -> Rows:
        with torch.no_grad():
            rows = model(torch.from_numpy(ids[None]).to(model.device), use_cache=False).logits[0]
        result: Rows = rows.float().cpu().numpy()
        return result

    return logits


def of_peft(model: Any) -> probe.Logits:
    """Returns (ids, what is asked for) -> logits, as `bundles.probe` wants them, of a PEFT model and its base."""
    way = of_torch(model)

    def logits(ids: Sequence[int], asked: probe.Asked) -> Rows:
        with model.disable_adapter() if asked is None else _scaled(model, _factor(asked)):
            return way(np.asarray(ids, np.int64))

    return logits


def asked_for(
    asked: probe.Asked, adapters: Mapping[str, Adapter], sites: Sequence[Site]
) -> tuple[str | None, float, Adapter]:
    """Returns the name and the factor of the adapter that is asked for, and its arrays with the factor in them."""
    if asked is None:
        return None, 1.0, {}
    (name,), factor = [asked] if isinstance(asked, str) else asked, _factor(asked)
    second = {site.lora_b for site in sites}
    return name, factor, {key: a * factor if key in second else a for key, a in adapters[name].items()}


def _factor(asked: probe.Asked) -> float:
    return 1.0 if asked is None or isinstance(asked, str) else next(iter(asked.values()))


@contextlib.contextmanager
def _scaled(model: Any, factor: float) -> Iterator[None]:
    """Inside, the effect of PEFT's adapters is multiplied."""
    layers = [part for part in model.modules() if isinstance(getattr(part, "scaling", None), dict)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers if factor != 1 else ():
        layer.scaling.update({name: scale * factor for name, scale in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


class GraphModel:
    """A graph in `folder` on ONNX Runtime's CPU provider, with `threads` threads.

    An adapter is a mapping from the graph's inputs, those of `Graph.sites`, to arrays; None is the base.
    """

    def __init__(self, folder: Path, graph: Graph, *, threads: int = 1) -> None:
        try:
            self.session = on_cpu(folder / graph.file, threads)
        except BackendUnavailable:
            raise
        except Exception as error:  # its exceptions have no common base but Exception
            found = str(error).splitlines()[0]
            raise InputError(message(f"load {folder / graph.file}", found, "export the model again")) from error
        self.graph = graph

    def base(self, ids: Ids) -> Rows:
        """Returns logits [n, vocabulary] without an adapter."""
        return self.logits(ids)

    def with_adapters(self, adapters: Mapping[str, Adapter]) -> probe.Logits:
        """Returns (ids, what is asked for) -> logits, as `bundles.checks` wants them, adapters given as inputs."""

        def logits(ids: Sequence[int], asked: probe.Asked) -> Rows:
            _, _, given = asked_for(asked, adapters, self.graph.sites)
            return self.logits(np.asarray(ids, np.int64), None if asked is None else given)

        return logits

    def logits(self, ids: Ids, adapter: Adapter | None = None) -> Rows:
        """Returns logits [n, vocabulary] float32 for ids [n], of one call where the graph gives all rows."""
        if not self.graph.last_logits_only:
            return self._run(ids, self._empty(), adapter)[0]
        past, rows = self._empty(), []
        for at in range(len(ids)):
            row, past = self._run(ids[: at + 1], past, adapter, new=1)
            rows.append(row)
        return np.concatenate(rows)

    def greedy(self, ids: Ids, count: int, adapter: Adapter | None = None) -> list[int]:
        """Returns the `count` most likely ids after the prompt, one decode step each, over the KV cache."""
        rows, past = self._run(ids, self._empty(), adapter)
        sequence = ids
        for _ in range(count):
            sequence = np.append(sequence, rows[-1].argmax())
            rows, past = self._run(sequence, past, adapter, new=1)
        return [int(id_) for id_ in sequence[len(ids) :]]

    def hidden_states(self, ids: Ids, adapter: Adapter | None = None) -> Rows:
        """Returns the state after the final norm [n, width] float32, of a graph that has this output."""
        states: Rows = self.session.run(["hidden_states"], self._feed(ids, self._empty(), adapter, len(ids)))[0][0]
        return states

    def _run(
        self, ids: Ids, past: dict[str, npt.NDArray[Any]], adapter: Adapter | None, new: int | None = None
    ) -> tuple[Rows, dict[str, npt.NDArray[Any]]]:
        """Computes the last `new` of `ids`, the others being in `past`; returns their logits and the new past."""
        names = ["logits", *(name.replace("past_key_values", "present") for name in past)]
        logits, *present = self.session.run(names, self._feed(ids, past, adapter, new or len(ids)))
        return logits[0].astype(np.float32), dict(zip(past, present, strict=True))

    def _feed(
        self, ids: Ids, past: dict[str, npt.NDArray[Any]], adapter: Adapter | None, new: int
    ) -> dict[str, npt.NDArray[Any]]:
        feed: dict[str, npt.NDArray[Any]] = {
            "input_ids": ids[None, -new:],
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        if self.graph.position_ids:
            feed["position_ids"] = np.arange(len(ids) - new, len(ids), dtype=np.int64)[None]
        given = {name: np.asarray(array, self.graph.lora_dtype) for name, array in (adapter or {}).items()}
        return feed | past | given

    def _empty(self) -> dict[str, npt.NDArray[Any]]:
        size = (1, self.graph.kv_heads, 0, self.graph.head_dim)
        names = (f"past_key_values.{layer}.{part}" for layer in range(self.graph.layers) for part in ("key", "value"))
        return {name: np.zeros(size, self.graph.kv_dtype) for name in names}
