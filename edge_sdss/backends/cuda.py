"""The CUDA backend: the kernels in kernels/, launched through PyCUDA, on NVIDIA devices from compute capability 8.7.

A torch tensor on the GPU is read where it lies; arrays of the host are uploaded through page-locked memory. Only the
result is copied back. The entropies `spectral` and `histogram` have no kernel and are the reference's, which is said
once. Knows nothing of dialogues, domains or the buffer. See `backends.Backend` for shapes and dtypes; types besides
float32, float16 and bfloat16 are cast to float32, in which everything is summed.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.backends import numpy as reference
from edge_sdss.backends._cuda import launches
from edge_sdss.backends._cuda.gpu import Memory, open_gpu
from edge_sdss.backends._cuda.rows import Chunk, Rows, chunks, workspace
from edge_sdss.config import EoeVariant
from edge_sdss.errors import InputError, message

KERNELS = ("token", "centered")


def ready() -> None:
    """Raises BackendUnavailable where there is no PyCUDA, driver or device."""
    open_gpu()


def entropy(tokens: Any, offsets: npt.NDArray[np.int64], variant: EoeVariant) -> npt.NDArray[np.float64]:
    """EOE(T) = -sum_i p_i ln p_i / ln n (paper, eq. 1), p by `variant`."""
    if variant not in KERNELS:
        _say_once(variant)
        return reference.entropy(_on_host(tokens), offsets, variant)
    rows = Rows.of(tokens)
    with open_gpu(rows.device).active():
        out = workspace(rows.device).memories["entropy"]
        address = out.reserve(4 * (len(offsets) - 1))
        for chunk, _ in chunks(rows, offsets):
            energy = _token_energy(chunk) if variant == "token" else _centered_energy(chunk)
            grid = launches.block_per_dialogue(chunk.n)
            at = address + 4 * chunk.first
            chunk.gpu.launch("ragged_entropy", "f32", grid, energy, chunk.offsets_at, at, chunk.n)
        return out.download((len(offsets) - 1,)).astype(np.float64)


def pool(tokens: Any, offsets: npt.NDArray[np.int64], pooling: str) -> npt.NDArray[np.float32]:
    """The mean or last token of each dialogue, L2-normalised."""
    rows = Rows.of(tokens)
    shape = len(offsets) - 1, rows.shape[1]
    with open_gpu(rows.device).active() as gpu:
        memories = workspace(rows.device).memories
        pooled, unit = (memories[name].reserve(4 * shape[0] * shape[1]) for name in ("pooled", "unit"))
        for chunk, _ in chunks(rows, offsets):
            at = pooled + 4 * chunk.first * chunk.width
            (_last if pooling == "last" else _mean)(chunk, at)
        gpu.launch("normalise", "f32", launches.warp_per_row(shape[0]), pooled, unit, *shape)
        return memories["unit"].download(shape)


def dissimilarity(vectors: Any, means: Any) -> npt.NDArray[np.float64]:
    """1 - v·m per row, clipped to [0, 1]."""
    rows, others = Rows.of(vectors), Rows.of(means, only="f32")
    n, width = rows.shape
    if others.shape != rows.shape:
        found = f"vectors of {rows.shape} and means of {others.shape}"
        raise InputError(message("compute the dissimilarity", found, "give a mean for each vector"))
    with open_gpu(rows.device).active() as gpu:
        out = workspace(rows.device).memories["dissimilarity"]
        address = out.reserve(4 * n)
        domain = workspace(rows.device).memories["domain"].upload(np.arange(n), np.int32)
        for chunk, mean in chunks(rows, np.arange(n + 1), others):
            grid, at = launches.warp_per_row(chunk.n), address + 4 * chunk.first
            gpu.launch("dissimilarity", rows.type, grid, chunk.rows, mean, domain, at, chunk.n, width)
        return out.download((n,)).astype(np.float64)


def row_entropy(logits: Any) -> npt.NDArray[np.float64]:
    """Entropy of softmax(logits) of each row, in nats. logits: [n, d]. Returns [n] float64."""
    rows = Rows.of(logits)
    n, width = rows.shape
    with open_gpu(rows.device).active() as gpu:
        out = workspace(rows.device).memories["row_entropy"]
        address = out.reserve(4 * n)
        for chunk, _ in chunks(rows, np.arange(n + 1)):
            grid, at = launches.warp_per_row(chunk.n), address + 4 * chunk.first
            gpu.launch("row_entropy", rows.type, grid, chunk.rows, at, chunk.n, width)
        return out.download((n,)).astype(np.float64)


def pairwise(a: Any, b: Any) -> npt.NDArray[np.float64]:
    """1 - a·b of every pair of rows, clipped to [0, 1]. a: [n, d], b: [m, d], unit rows. Returns [n, m] float64."""
    left, right = Rows.of(a, only="f32"), Rows.of(b, only="f32")
    (n, width), m = left.shape, right.shape[0]
    if right.shape[1] != width:
        found = f"rows of {width} and of {right.shape[1]} values"
        raise InputError(message("compare all pairs", found, "give vectors of one size"))
    with open_gpu(left.device).active() as gpu:
        memories = workspace(left.device).memories
        placed = [_whole(rows, memories[name]) for rows, name in ((left, "left"), (right, "right"))]
        address = memories["pairs"].reserve(4 * n * m)
        gpu.launch(
            "pairwise", "f32", launches.tiles(n, m), *placed, address, n, m, width, block=launches.PAIRWISE_BLOCK
        )
        return memories["pairs"].download((n, m)).astype(np.float64)


def _whole(rows: Rows, memory: Memory) -> int:
    return rows.address if rows.host is None else memory.upload(rows.host, np.float32)


def _token_energy(chunk: Chunk) -> int:
    energy = chunk.work.memories["energy"].reserve(4 * chunk.tokens)
    grid = launches.warp_per_row(chunk.tokens)
    chunk.gpu.launch("token_energy", chunk.type, grid, chunk.rows, energy, chunk.tokens, chunk.width)
    return energy


def _centered_energy(chunk: Chunk) -> int:
    means = chunk.work.memories["means"].reserve(4 * chunk.n * chunk.width)
    energy = chunk.work.memories["energy"].reserve(4 * chunk.tokens)
    _mean(chunk, means)
    grid = launches.shared_rows(chunk.n, chunk.longest)
    at = chunk.rows, means, chunk.offsets_at, energy
    chunk.gpu.launch("centered_energy", chunk.type, grid, *at, chunk.width)
    return energy


def _mean(chunk: Chunk, out: int) -> None:
    grid = launches.columns(chunk.n, chunk.width, launches.ITEM_BYTES[chunk.type])
    chunk.gpu.launch("ragged_mean", chunk.type, grid, chunk.rows, chunk.offsets_at, out, chunk.width)


def _last(chunk: Chunk, out: int) -> None:
    grid = launches.block_per_dialogue(chunk.n)
    chunk.gpu.launch("ragged_last", chunk.type, grid, chunk.rows, chunk.offsets_at, out, chunk.width)


def _on_host(tokens: Any) -> Any:
    return tokens.detach().float().cpu().numpy() if hasattr(tokens, "detach") else tokens


@cache
def _say_once(variant: str) -> None:
    logging.getLogger(__name__).warning("entropy %s has no CUDA kernel: the NumPy reference computes it", variant)
