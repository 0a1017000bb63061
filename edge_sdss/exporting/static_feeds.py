"""What the graphs of fixed shapes are fed: embedded tokens, angles, a mask, the KV cache, an adapter filled with zeros.

Knows no session. Arrays are float32; a cache has one row, of as many slots as it was made with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.exporting.blocks import Floats
from edge_sdss.exporting.fast_config import Spec
from edge_sdss.exporting.static_decoder import MASKED, Shape, padded, sites

Cache = dict[str, Floats]
"""By the names of the graph's inputs, layers.i.attn.past_keys and .past_values, [1, kv_heads, slots, head_dim]."""


class Feeds:
    """Feeds for one model. `embedding` [vocabulary, width], not scaled."""

    def __init__(self, spec: Spec, embedding: Floats) -> None:
        self.spec, self.embedding = spec, embedding

    @property
    def head(self) -> Floats | None:
        """Weights of the logits [vocabulary, width], where they are the embedding's; None: the NPU alone has them."""
        return self.embedding if self.spec.tied else None

    def cache(self, slots: int) -> Cache:
        """Returns an empty cache."""
        shape = (1, self.spec.kv_heads, slots, self.spec.head_dim)
        return {
            f"layers.{layer}.attn.past_{what}": np.zeros(shape, np.float32)
            for layer in range(self.spec.layers)
            for what in ("keys", "values")
        }

    def step(self, ids: npt.NDArray[Any] | Sequence[int], position: int, cache: Cache, shape: Shape) -> Cache:
        """Returns the feed for `ids` [n ≤ shape.tokens], the first of which is the token number `position`.

        The cache's first `position` slots are seen, of which no more than shape.past may be filled; tokens beyond `ids`
        are zeros that none of them sees. Adapters come from `adapter`.
        """
        ids, spec = np.asarray(ids), self.spec
        if len(ids) > shape.tokens or position > shape.past:
            raise ValueError(f"{len(ids)} tokens behind {position} do not fit {shape}")
        embedded = np.zeros((1, shape.tokens, spec.width), np.float32)
        embedded[0, : len(ids)] = self.embedding[ids] * np.float32(spec.embedding_scale)
        angles = np.arange(position, position + shape.tokens)[:, None] * spec.frequencies[0]
        cos, sin = np.cos(angles), np.sin(angles)
        feed = {
            "embeddings": embedded,
            "cos": np.concatenate([cos, cos], -1, dtype=np.float32)[None, None],
            "sin": np.concatenate([-sin, sin], -1, dtype=np.float32)[None, None],
            "mask": np.tile(self._mask(len(ids), position, shape), (spec.heads // spec.kv_heads, 1))[None, None],
        }
        if not shape.past:
            return feed
        return feed | {name: np.ascontiguousarray(array[:, :, : shape.past]) for name, array in cache.items()}

    def keep(self, outputs: Mapping[str, npt.NDArray[Any]], cache: Cache, position: int, count: int) -> None:
        """Puts the first `count` of the new keys and values into the cache, behind `position` others."""
        for layer in range(self.spec.layers):
            for what, name in (("keys", "k_rope"), ("values", "v_heads")):
                new = outputs[f"layers.{layer}.attn.{name}"][:, :, :count]
                cache[f"layers.{layer}.attn.past_{what}"][:, :, position : position + count] = new

    def adapter(self, arrays: Mapping[str, Floats], rank: int) -> dict[str, Floats]:
        """Returns all LoRA inputs for an adapter of at most this rank; without arrays, those of the base model.

        A graph of rank 0 has none.
        """
        found: dict[str, Floats] = {}
        for site in sites(self.spec) if rank else ():
            found |= padded(site, arrays, rank)
        return found

    def _mask(self, count: int, position: int, shape: Shape) -> Floats:
        """[tokens, past + tokens]; a row beyond `count` sees itself, so that its softmax is not of nothing."""
        slot, row = np.arange(shape.past + shape.tokens)[None], np.arange(shape.tokens)[:, None]
        new = slot - shape.past
        seen = np.where(new < 0, slot < position, (new <= row) & (new < max(count, 1)) | (new == row))
        return np.where(seen, 0.0, MASKED).astype(np.float32)
