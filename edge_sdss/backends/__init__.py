"""The numeric core of selection: the same three functions on every backend, one file each.

    entropy(tokens, offsets, variant)   EOE of each dialogue of a ragged batch
    pool(tokens, offsets, pooling)      e(T), the unit vector of each dialogue
    dissimilarity(vectors, means)       1 - cos, clipped to [0, 1]

`numpy` is the reference. A backend that was asked for by name and is not here raises;
`auto` takes the one that lies where the embeddings are: on a GPU `cuda`, and where that cannot be, `torch`.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_sdss.config import EoeVariant
from edge_sdss.errors import BackendUnavailable, message

NAMES = ("numpy", "torch", "cuda")
HISTOGRAM_BINS = 100


_PACKAGE = Path(__file__).parent.parent


def kernels() -> Path:
    """Where the CUDA sources and their images are: inside of an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "_kernels"
    return inside if inside.is_dir() else _PACKAGE.parent / "kernels"


class Backend(Protocol):
    """What each module in this package provides."""

    def entropy(self, tokens: Any, offsets: npt.NDArray[np.int64], variant: EoeVariant) -> npt.NDArray[np.float64]:
        """EOE of each dialogue, in [0, 1].

        tokens: [N, d] float, the token embeddings of all dialogues, one after the other.
        offsets: [B + 1] int64; dialogue b holds the rows offsets[b]:offsets[b + 1].
        Returns [B] float64; 0 for an empty or one-token dialogue and for all-zero embeddings.
        """

    def pool(self, tokens: Any, offsets: npt.NDArray[np.int64], pooling: str) -> npt.NDArray[np.float32]:
        """e(T) of each dialogue, [B, d] float32: the mean (or last) token, L2-normalised; 0 where empty."""

    def dissimilarity(self, vectors: Any, means: Any) -> npt.NDArray[np.float64]:
        """1 - v·m per row, clipped to [0, 1]. vectors, means: [B, d]. Returns [B] float64."""


def load(name: str, device: str = "cpu") -> Backend:
    """Returns the backend `name`; `auto` goes by the `device` of the model: numpy on a CPU, on a GPU cuda or torch.

    Raises BackendUnavailable for an unknown name, a missing library, or a missing device.
    """
    if name == "auto":
        return _auto(device)
    if name not in NAMES:
        raise BackendUnavailable(message(f"use backend {name!r}", "no such backend", f"choose {', '.join(NAMES)}"))
    try:
        module: Any = importlib.import_module(f"edge_sdss.backends.{name}")
    except ImportError as error:
        do = "pip install 'edge_sdss[train]' or choose --backend numpy"
        raise BackendUnavailable(message(f"use backend {name!r}", str(error), do)) from error
    if hasattr(module, "ready"):
        module.ready()
    return module  # type: ignore[no-any-return]


def _auto(device: str) -> Backend:
    if not device.startswith("cuda"):
        return load("numpy" if device == "cpu" else "torch")
    try:
        return load("cuda")
    except BackendUnavailable as error:
        logging.getLogger(__name__).warning("auto takes the torch backend: %s", error)
        return load("torch")
