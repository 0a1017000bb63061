"""From a model's folder to prefill and decode graphs for an NPU: calibrated, quantised, split, written.

Both graphs share the rounded weights. Knows no provider, no bundle and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdss.exporting import fast_config, qdq, static_decoder
from edge_sdss.exporting.blocks import Floats
from edge_sdss.exporting.cpu import on_cpu
from edge_sdss.exporting.fast_weights import Weights
from edge_sdss.exporting.qdq import Scheme, Statistics
from edge_sdss.exporting.rounding import Rounded
from edge_sdss.exporting.static_decoder import Part, Shape
from edge_sdss.exporting.static_feeds import Feeds
from edge_sdss.exporting.static_ways import Graphs
from edge_sdss.types import Progress, no_progress

if TYPE_CHECKING:
    import onnx_ir as ir

Ids = npt.NDArray[np.int64]
Open = Callable[[Path], Any]

LIMIT_BYTES = 1_500_000_000
"""Of one part's weights. An HTP context has 32-bit addresses, of which the binary, its activations and the KV cache
have to share less than 4 GB; measured is only that 270 MB fit."""
DRAWN_EFFECT = 1 / 3
"""Of the adapters in calibration, on each linear: more than training makes of one."""


@dataclass
class Model:
    """A model to be written, and what calibration found of it. `scheme` None: all in float, float16 on an HTP."""

    folder: Path
    scheme: Scheme | None = None
    limit_bytes: int = LIMIT_BYTES
    statistics: Statistics = field(default_factory=lambda: Statistics({}, {}))
    codes: dict[str, Rounded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec, self.weights = fast_config.read(self.folder), Weights(self.folder)
        self.feeds = Feeds(self.spec, self.weights["model.embed_tokens.weight"])

    @property
    def parts(self) -> tuple[Part, ...]:
        """How the graphs are split. Raises ExportError where a layer is too large."""
        return self._parts(self.scheme)

    def _parts(self, scheme: Scheme | None) -> tuple[Part, ...]:
        scheme = scheme or Scheme(head_bits=None, float_layers=self.spec.layers)
        layers = [scheme.taken(scheme.of_layer(number)) for number in range(self.spec.layers)]
        return static_decoder.parts(self.spec, layers, scheme.taken(scheme.head_bits), self.limit_bytes)

    def write(self, out: Path, name: str, shape: Shape, *, quantised: bool = True) -> tuple[Path, ...]:
        """Writes out/<name>.onnx with its weights beside it, or <name>.0.onnx and so on where it is split."""
        written, parts = [], self.parts
        for number, part in enumerate(parts):
            made = static_decoder.build(self.spec, self.weights, shape, part)
            if quantised and self.scheme is not None:
                qdq.quantise(made, self.statistics, self.scheme, self.codes)
            written.append(save(made, out, name if len(parts) == 1 else f"{name}.{number}"))
        return tuple(written)

    def calibrate(self, texts: Sequence[Ids], shape: Shape, work: Path, *, progress: Progress = no_progress) -> None:
        """Runs the float graphs over `texts`, ids [n] each, and keeps what was seen in `statistics`.

        Every second text goes through the model with another random adapter: its own would be known too late. The first
        token of a text is left out: its activations are beyond all others', and it enters as a `Prefix`.
        `shape` has the rank of the graphs to be quantised, as a tensor's name tells whether an adapter follows. `work`
        gets the float graphs, which are gone afterwards. Raises BackendUnavailable without onnxruntime.
        """
        graphs, wanted = self._exposed(work, shape)
        for done, text in enumerate(texts):
            progress("calibrating", done, len(texts))
            odd = shape.rank and done % 2
            given = static_decoder.drawn(self.spec, shape.rank, seed=done, effect=DRAWN_EFFECT) if odd else {}
            for values, real in _steps(graphs, self.feeds, text, given):
                for tensor, gram in wanted.items():
                    self.statistics.add(tensor, values[tensor][..., real, :], gram=gram)
        progress("calibrating", len(texts), len(texts))
        for file in work.glob("calibrating*"):
            file.unlink()

    def _exposed(self, work: Path, shape: Shape) -> tuple[Graphs, dict[str, bool]]:
        """Float graphs that also give what calibration looks at."""
        sessions = []
        wanted: dict[str, bool] = {}
        for number, part in enumerate(self._parts(None)):
            made = static_decoder.build(self.spec, self.weights, shape, part)
            own = qdq.wanted(made)
            qdq.expose(made, own)
            wanted |= own
            sessions.append(on_cpu(save(made, work, f"calibrating.{number}")))
        return Graphs(shape, tuple(sessions)), wanted


def save(made: ir.Model, out: Path, name: str) -> Path:
    """Writes out/<name>.onnx, and its weights to out/<name>.data."""
    import onnx_ir as ir

    out.mkdir(parents=True, exist_ok=True)
    ir.save(made, out / f"{name}.onnx", external_data=f"{name}.data", size_threshold_bytes=1024)
    return out / f"{name}.onnx"


def _steps(
    graphs: Graphs, feeds: Feeds, text: Ids, given: Mapping[str, Floats]
) -> Iterator[tuple[dict[str, npt.NDArray[Any]], slice]]:
    """Prefills a text and yields all values of each step, with which of its tokens are real and not the first."""
    shape = graphs.shape
    cache, lora = feeds.cache(shape.past + shape.tokens), feeds.adapter(given, shape.rank)
    for at in range(0, min(len(text), shape.past + shape.tokens), shape.tokens):
        ids = text[at : at + shape.tokens]
        values = graphs.run({**feeds.step(ids, at, cache, shape), **lora})
        feeds.keep(values, cache, at, len(ids))
        yield values, slice(0 if at else 1, len(ids))
