"""The graphs of fixed shapes in a bundle: written, compiled for the HTP, and opened again for checks.

Checks run in the emulation of an HTP and say so. Knows nothing of manifests' other parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdss import demo, experiment
from edge_sdss.bundles import Graph, Manifest, Static, adapters, peft
from edge_sdss.exporting import htp, npu, static_decoder, static_ways, ways
from edge_sdss.exporting.cpu import on_cpu
from edge_sdss.exporting.fast_config import read as read_spec
from edge_sdss.exporting.parity import Ids, Rows
from edge_sdss.exporting.qdq import Scheme
from edge_sdss.exporting.static_decoder import Shape
from edge_sdss.exporting.static_feeds import Feeds
from edge_sdss.exporting.static_ways import Graphs, Prefix, StaticModel
from edge_sdss.types import Example, Progress

if TYPE_CHECKING:
    from edge_sdss.bundles.probe import Asked
    from edge_sdss.bundles.recipes import Recipe
    from edge_sdss.lm.chat import Chat

EMULATED = "emulated HTP"
_TEXTS, _TOKENS, _LEAST = 128, 128, 16
Open = Callable[[Path], Any]
Arrays = Mapping[str, Any]


def calibration(chat: Chat, kept: Sequence[Example]) -> list[Ids]:
    """Returns texts, ids [n ≤ 128]: the user's kept dialogues, then packaged ones until there are 128."""
    spare = experiment.held_out_examples(demo.stream().offered)
    found: list[Ids] = []
    for example in (*kept, *spare):
        if len(found) == _TEXTS:
            break
        ids = np.array(chat.encode(example, _TOKENS).ids, np.int64)
        if len(ids) >= _LEAST:
            found.append(ids)
    return found


@dataclass
class Maker:
    """Writes the graphs of a recipe into `staged`; `aside` takes what is not kept."""

    folder: Path
    staged: Path
    recipe: Recipe
    progress: Progress

    def __post_init__(self) -> None:
        precision, head = self.recipe.precision, self.recipe.head_precision
        scheme = None
        if precision in ("int8", "int4"):
            scheme = Scheme(
                bits=8 if precision == "int8" else 4,
                head_bits=None if head == "float16" else 8,
                float_layers=self.recipe.float_layers,
                block=self.recipe.block_size,
            )
        limit = self.recipe.part_bytes or npu.LIMIT_BYTES
        self.model, self.aside = npu.Model(self.folder, scheme, limit), self.staged / ".aside"
        shapes = self.recipe.shapes
        rank = shapes.rank.max if shapes.rank else 0
        self.prefill = Shape(shapes.sequence.max, shapes.past.max, rank)
        self.decode = self.prefill.decode
        static_decoder.check(self.model.spec, self.prefill)

    def float_model(self) -> StaticModel:
        """The prefill graphs in float32 on the CPU, to compare with; they lie in `aside`."""
        plain = npu.Model(self.folder, None, self.model.limit_bytes)
        files = plain.write(self.aside, "float", self.prefill)
        return StaticModel(self.model.feeds, Graphs(self.prefill, tuple(on_cpu(file) for file in files)), None)

    def calibrate(self, texts: Sequence[Ids]) -> None:
        """Looks at what goes through the float model, where the recipe has integers."""
        if self.model.scheme is not None:
            self.model.calibrate(texts, Shape(_TOKENS, 0, self.prefill.rank), self.aside, progress=self.progress)

    def write(self, texts: Sequence[Ids], given: Mapping[str, Path]) -> Graph:
        """Calibrates, quantises, compiles; writes the embedding and the prefixes."""
        self.calibrate(texts)
        names = {}
        for number, (name, shape) in enumerate((("prefill", self.prefill), ("decode", self.decode))):
            self.progress("compiling for the HTP", number, 2)
            names[name] = tuple(self._compiled(file) for file in self.model.write(self.aside, name, shape))
        self.progress("compiling for the HTP", 2, 2)
        np.save(self.staged / "embedding.npy", self.model.feeds.embedding.astype(np.float16))
        prefix = {"": "prefix/base.npz", **{name: f"prefix/adapter-{name}.npz" for name in given}}
        graph, first = self._graph(names, prefix), self.first()
        (self.staged / "prefix").mkdir()
        for name, path in prefix.items():
            arrays = adapters.pack(peft.read(given[name]), graph) if name else {}
            self._write_prefix(first, self.staged / path, int(texts[0][0]), arrays)
        return graph

    def first(self) -> Graphs:
        """Float32 graphs of one token without a past, for prefixes."""
        shape = Shape(1, 0, self.prefill.rank)
        files = npu.Model(self.folder, None, self.model.limit_bytes).write(self.aside, "first", shape)
        return Graphs(shape, tuple(on_cpu(file) for file in files))

    def clean(self) -> None:
        """Removes what was not to be kept."""
        shutil.rmtree(self.aside, ignore_errors=True)

    def _compiled(self, file: Path) -> str:
        """Writes a graph's context binary into the bundle and returns the name of the .onnx that holds it."""
        options = dict(self.recipe.providers[0].options)
        htp.session(file, options, context=self.staged / file.name)
        return file.name

    def _write_prefix(self, first: Graphs, file: Path, token: int, arrays: Arrays) -> None:
        made = static_ways.prefix(first, self.model.feeds, [token], arrays)
        stored: dict[str, Any] = {"ids": np.array(made.ids, np.int64), "logits": made.logits, **made.cache}
        np.savez(file, **stored)

    def _graph(self, names: Mapping[str, tuple[str, ...]], prefix: dict[str, str]) -> Graph:
        spec, shape = self.model.spec, self.prefill
        static = Static(
            prefill=names["prefill"],
            decode=names["decode"],
            tokens=shape.tokens,
            past=shape.past,
            rank=shape.rank,
            embedding="embedding.npy",
            prefix=prefix,
        )
        return Graph(
            file=names["decode"][0],
            precision=self.recipe.precision,
            block_size=self.recipe.block_size,
            kv_cache="static",
            static=static,
            position_ids=False,
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            vocabulary=spec.vocabulary,
            width=spec.width,
            context=shape.past + shape.tokens,
            sites=static_decoder.sites(spec) if shape.rank else (),
        )


class StaticBundle:
    """A bundle's static graphs on what `open` opens, for checks. `first` makes prefixes that the bundle lacks."""

    def __init__(self, folder: Path, manifest: Manifest, open: Open, first: Graphs | None = None) -> None:
        static = manifest.graph.static
        assert static is not None
        self.first, self.static = first, static
        self.feeds = Feeds(read_spec(folder), np.load(folder / static.embedding))
        shape = Shape(static.tokens, static.past, static.rank)
        prefill, decode = (tuple(open(folder / file) for file in files) for files in (static.prefill, static.decode))
        self.model = StaticModel(self.feeds, Graphs(shape, prefill), Graphs(shape.decode, decode))
        self.adapters = {
            one.name: adapters.read(folder / one.file.path, manifest.base_fingerprint) for one in manifest.adapters
        }
        self.prefixes = {name: _read(folder / path) for name, path in static.prefix.items()}

    def logits(self, ids: Sequence[int], asked: Asked) -> Rows:
        """Returns logits [n, vocabulary] as `bundles.probe` asks for them."""
        name, factor, given = ways.asked_for(asked, self.adapters, static_decoder.sites(self.feeds.spec))
        start = self._prefix(ids, name or "", factor, given)
        return self.model.logits(np.asarray(ids, np.int64), given, start)

    def _prefix(self, ids: Sequence[int], name: str, factor: float, given: Arrays) -> Prefix:
        """That of the adapter as the bundle has it; for another first token, or a factor, made by `first`."""
        stored = self.prefixes.get(name, self.prefixes[""])
        fits = name in self.prefixes and factor == 1 and stored.ids == tuple(ids[: len(stored.ids)])
        if fits or self.first is None:
            return stored
        return static_ways.prefix(self.first, self.feeds, ids[:1], given)


def _read(file: Path) -> Prefix:
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    ids, logits = arrays.pop("ids"), arrays.pop("logits")
    return Prefix(tuple(ids.tolist()), arrays, logits)
