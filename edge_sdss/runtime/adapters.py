"""LoRA adapters as inputs of the graph: read, checked, scaled, mixed. Knows nothing of training or of the KV cache.

Their tensors are bound as inputs: ONNX Runtime ignores adapters in RunOptions when a run has an IO binding, and
takes only the first of several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdss.bundles import AdapterEntry, Graph, Manifest, Site
from edge_sdss.bundles import adapters as files
from edge_sdss.errors import InputError, message
from edge_sdss.files import sha256
from edge_sdss.runtime.providers import library

Tensors = Mapping[str, npt.NDArray[Any]]
Key = tuple[tuple[int, float], ...]


class _Active(Enum):
    ACTIVE = "the adapter that is active"


ACTIVE = _Active.ACTIVE
"""Asks for `Engine.active`."""

Asked: TypeAlias = str | Mapping[str, float] | _Active | None
"""An adapter's name, names with scales, None for the base model, or ACTIVE."""

_serials = itertools.count()


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory. `tensors`: A [inputs, r] and B [r, outputs] by the graph's input names, scale folded in."""

    name: str
    tensors: Tensors
    serial: int  # tells an adapter from an earlier one of its name

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        return sum(int(tensor.nbytes) for tensor in self.tensors.values())

    @property
    def rank(self) -> int:
        """The highest of its sites."""
        return max(int(min(tensor.shape)) for tensor in self.tensors.values())


class Mix:
    """What a request runs with: adapters, each with a scale. Of none: the base model."""

    def __init__(self, parts: Mapping[str, tuple[Adapter, float]], graph: Graph, device: str) -> None:
        self.scales = {name: scale for name, (_, scale) in parts.items()}
        self.key: Key = tuple(sorted((adapter.serial, scale) for adapter, scale in parts.values()))
        self._parts, self._graph, self._device = tuple(parts.values()), graph, device

    @property
    def borrowed(self) -> bool:
        """Whether it takes no memory of its own: no adapter, or one as it is."""
        return len(self.key) == 0 or (len(self.key) == 1 and self.key[0][1] == 1)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The OrtValues to bind, by input name; a site that no adapter has is left to its default of rank 0."""
        make = library().OrtValue.ortvalue_from_numpy
        return {name: make(tensor, self._device) for name, tensor in mixed(self._parts, self._graph).items()}


def mixed(parts: Sequence[tuple[Adapter, float]], graph: Graph) -> dict[str, npt.NDArray[Any]]:
    """Returns one set of tensors for Σ scale · adapter: ranks side by side, A on axis 1, scaled B on axis 0."""
    found: dict[str, npt.NDArray[Any]] = {}
    for site in graph.sites:
        have = [(adapter.tensors, scale) for adapter, scale in parts if site.lora_a in adapter.tensors]
        if not have or site.lora_a in found:
            continue
        a, b = ([tensors[name] for tensors, _ in have] for name in (site.lora_a, site.lora_b))
        b = [one if scale == 1 else one * one.dtype.type(scale) for one, (_, scale) in zip(b, have, strict=True)]
        found[site.lora_a] = a[0] if len(a) == 1 else np.concatenate(a, axis=1)
        found[site.lora_b] = b[0] if len(b) == 1 else np.concatenate(b, axis=0)
    return found


def check_scale(name: str, scale: float) -> float:
    """Returns the scale as a float. Raises InputError where it is no finite number."""
    if not math.isfinite(scale):
        raise InputError(message(f"scale adapter {name}", f"the scale is {scale}", "give a number"))
    return float(scale)


def read(name: str, file: Path, manifest: Manifest) -> Adapter:
    """Reads an .onnx_adapter file into memory.

    Raises InputError where it cannot be read, is of another base, or would be inactive in this graph, wholly or in
    part: an input that the graph does not have, half a pair, a shape that does not fit, B zero everywhere.
    """
    arrays = files.read(file, manifest.base_fingerprint)
    tensors = {key: np.ascontiguousarray(array, manifest.graph.lora_dtype) for key, array in arrays.items()}
    if fault := _fault(tensors, manifest.graph):
        do = "convert the PEFT folder for this bundle"
        raise InputError(message(f"load adapter {file}", f"adapter inactive: {fault}", do))
    return Adapter(name, tensors, next(_serials))


def read_entry(folder: Path, entry: AdapterEntry, manifest: Manifest) -> Adapter:
    """Reads an adapter of a bundle's own; raises what `read` does, and InputError for another base or file."""
    asked, file = f"load adapter {entry.name} of bundle {folder}", folder / entry.file.path
    if entry.base_fingerprint != manifest.base_fingerprint:
        of, here = entry.base_fingerprint[:12], manifest.base_fingerprint[:12]
        found = f"it was trained on the model {of}, this one is {here}"
        raise InputError(message(asked, found, "give one that was trained on this model"))
    if file.is_file() and sha256(file) != entry.file.sha256:
        raise InputError(message(asked, f"{entry.file.path} is not the file that was exported", "deploy it anew"))
    return read(entry.name, file, manifest)


def _fault(tensors: Tensors, graph: Graph) -> str | None:
    sites: dict[str, list[Site]] = {}
    for site in graph.sites:
        sites.setdefault(site.lora_a, []).append(site)
    names = {name for site in graph.sites for name in (site.lora_a, site.lora_b)}
    if strange := sorted(tensors.keys() - names):
        return f"the graph has no input {strange[0]}" + (f" and {len(strange) - 1} others" if strange[1:] else "")
    if not tensors:
        return "the file holds no tensor"
    for first, shared in sites.items():
        second = shared[0].lora_b
        pair = [name for name in (first, second) if name in tensors]
        if len(pair) == 1:
            return f"of {first} and {second} the file holds only {pair[0]}"
        if pair:
            rank = tensors[first].shape[-1]
            wanted = (shared[0].inputs, rank), (rank, max(site.start + site.outputs for site in shared))
            for name, shape in zip(pair, wanted, strict=True):
                if tensors[name].shape != shape:
                    return f"{name} has the shape {list(tensors[name].shape)}, not {list(shape)}"
            if not np.isfinite(tensors[first]).all() or not np.isfinite(tensors[second]).all():
                return f"{first} or {second} is not finite"
    if not any(tensors[site.lora_b].any() for site in graph.sites if site.lora_b in tensors):
        return "every B is zero"
    return None
