"""What a device needs to build a TensorRT engine from a bundle: the graph, its shapes, two programs that build it.

An engine fits the GPU and the TensorRT that built it, so it is built there, and once: adapters are inputs. Written
for TensorRT 10; neither program has run on a device yet. Knows nothing of how an engine is run.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from edge_sdss.bundles import Graph, Manifest, verify
from edge_sdss.bundles.recipes import Extent, Shapes
from edge_sdss.errors import BackendUnavailable, BudgetExceeded, ExportError, InputError, message
from edge_sdss.exporting import scoring

if TYPE_CHECKING:
    from edge_sdss.boards import Board

Ranges = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""An input's least, best and greatest shape, by name."""

_TEMPLATES = Path(__file__).parent / "_tensorrt"
_FIXED_BYTES = 1_000_000_000
_MIB = 1 << 20


@dataclass(frozen=True)
class Peak:
    """An estimate of the memory that a build takes at most, by its parts. Not measured on a device.

    Jetsons share one memory between processor and GPU, so both sides count:
    `parsed`: the ONNX weights as the parser keeps them. `converted`: the builder's copy in the engine's precision.
    `engine`: the plan, which is in memory as a whole before it is written. `cache`: the KV cache in and out at its
    greatest, in float32. `activations`: the widest layer's and the logits' at the greatest shape. `workspace`: what
    tactics are allowed. `fixed`: CUDA's context, TensorRT's libraries and kernels, the rest of the system not counted.
    """

    parsed: int
    converted: int
    engine: int
    cache: int
    activations: int
    workspace: int
    fixed: int = _FIXED_BYTES

    @property
    def total_bytes(self) -> int:
        """All parts, at once."""
        parts = (self.parsed, self.converted, self.engine, self.cache, self.activations, self.workspace, self.fixed)
        return sum(parts)


@dataclass(frozen=True)
class Build:
    """What was written: the files by name, the engine's optimisation profiles and the estimate of the peak."""

    folder: Path
    files: tuple[str, ...]
    profiles: tuple[Ranges, ...]
    peak: Peak


def write(
    bundle: Path,
    out: Path,
    shapes: Shapes,
    *,
    board: Board | None = None,
    workspace_bytes: int = 512 * _MIB,
    scores: scoring.Variant | None = None,
) -> Build:
    """Writes a folder to be copied to the device: graph, profiles.json, build_engine.sh and build_engine.py.

    With `scores`, for a graph with hidden states: scored.onnx besides, the graph with selection's scores behind it, of
    that EOE, and the plugins that `build_engine.py --scores` loads.

    The graph's LoRA inputs lose their defaults: an engine has no optional inputs, and is fed zeros of rank 1 where
    no adapter is wanted. `out` must be new or empty.
    Raises ExportError for a graph that TensorRT cannot parse; BudgetExceeded where `board` has less memory than the
    build is estimated to take; InputError where `bundle` is not whole or `out` cannot be written.
    """
    manifest = verify(bundle)
    _check_graph(bundle, manifest.graph, shapes)
    weights = sum(entry.size_bytes for entry in manifest.files if entry.path.startswith(manifest.graph.file))
    peak = estimate(manifest.graph, shapes, weights, workspace_bytes)
    if board is not None:
        check_board(board, peak)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(message(f"write {out}", "something is there", "name a new folder"))
    ranges = profiles(manifest.graph, shapes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _copy_graph(bundle, manifest, out)
        document: dict[str, object] = {"names": ("decode", "prefill"), "profiles": ranges}
        document["estimated_peak_bytes"] = peak.total_bytes
        if scores is not None:
            scoring.write(out, manifest.graph.width, scores)
            document["scores"] = scoring.ranges(manifest.graph.width, shapes.batch.max)
        (out / "profiles.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _write_programs(out, manifest.graph, shapes, peak, workspace_bytes)
    except OSError as error:
        raise InputError(message(f"write {out}", error.strerror or "failed", "free space")) from error
    files = tuple(sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()))
    return Build(out, files, ranges, peak)


def profiles(graph: Graph, shapes: Shapes) -> tuple[Ranges, Ranges]:
    """Returns two optimisation profiles: decode, one token with a past; prefill, many, with or without one."""
    one = Extent(min=1, opt=1, max=1)
    past = shapes.past
    decode = _ranges(graph, shapes, one, past)
    start = Extent(min=past.min, opt=past.min, max=past.max)
    longest = Extent(
        min=shapes.sequence.min, opt=max(shapes.sequence.opt, shapes.sequence.max // 2), max=shapes.sequence.max
    )
    return decode, _ranges(graph, shapes, longest, start)


def estimate(graph: Graph, shapes: Shapes, weights_bytes: int, workspace_bytes: int) -> Peak:
    """Returns the estimate of a build's peak in float16 for ONNX weights of `weights_bytes`; see `Peak`."""
    half = weights_bytes // 2 if graph.precision == "float32" else weights_bytes
    batch, tokens, past = shapes.batch.max, shapes.sequence.max, shapes.past.max
    row = graph.kv_heads * graph.head_dim
    cache = 2 * graph.layers * batch * row * (past + past + tokens) * 4
    # The logits in float32, and of a layer its attention weights and the MLP's two inner tensors of 4 · width.
    heads = max(graph.width // graph.head_dim, 1)
    layer = heads * tokens * (past + tokens) + 2 * 4 * graph.width * tokens
    rows = 1 if graph.last_logits_only else tokens
    activations = 4 * batch * (rows * graph.vocabulary + layer)
    return Peak(weights_bytes, half, half, cache, activations, workspace_bytes)


def check_board(board: Board, peak: Peak) -> None:
    """Raises BudgetExceeded where the board has less memory than the estimate; one of unknown memory passes."""
    memory = board.usable_bytes or board.memory_bytes
    if memory is not None and peak.total_bytes > memory:
        found = f"the build is estimated to take {_mb(peak.total_bytes)} MB, {board.name} has {_mb(memory)} MB"
        do = "give smaller shapes, a smaller model, or a board with more memory; the engine fits no other GPU"
        raise BudgetExceeded(message("build a TensorRT engine", found, do))


def _check_graph(bundle: Path, graph: Graph, shapes: Shapes) -> None:
    asked = f"export {bundle} for TensorRT"
    if graph.kv_cache == "shared" or graph.precision in ("int4", "int8"):
        found = f"its graph has {graph.precision} weights and a {graph.kv_cache} KV cache, in operators of ONNX Runtime"
        raise ExportError(message(asked, found, "export it with --target tensorrt"))
    if graph.sites and shapes.rank is None:
        raise ExportError(message(asked, "no rank is given, and it takes adapters", "give shapes.rank"))
    if graph.sites and shapes.rank is not None and shapes.rank.min < 1:
        raise ExportError(
            message(asked, "shapes.rank.min is 0, an empty tensor", "give 1, and feed zeros for the base")
        )
    if shapes.past.max + shapes.sequence.max > graph.context:
        found = f"past and sequence are {shapes.past.max + shapes.sequence.max} together, the model has {graph.context}"
        raise ExportError(message(asked, found, "give smaller shapes"))


def _ranges(graph: Graph, shapes: Shapes, tokens: Extent, past: Extent) -> Ranges:
    ranges = {}
    for key in ("min", "opt", "max"):
        b, n, p = (getattr(extent, key) for extent in (shapes.batch, tokens, past))
        found: dict[str, tuple[int, ...]] = {"input_ids": (b, n), "attention_mask": (b, p + n)}
        if graph.position_ids:
            found["position_ids"] = (b, n)
        for layer in range(graph.layers):
            for what in ("key", "value"):
                found[f"past_key_values.{layer}.{what}"] = (b, graph.kv_heads, p, graph.head_dim)
        for site in graph.sites:
            assert shapes.rank is not None
            shared = [other for other in graph.sites if other.lora_a == site.lora_a]
            r = getattr(shapes.rank, key) * (1 if key == "min" else len(shared))  # one module alone may be adapted
            width = max(other.start + other.outputs for other in shared)
            found.update({site.lora_a: (site.inputs, r), site.lora_b: (r, width)})
        ranges[key] = found
    return {name: (shape, ranges["opt"][name], ranges["max"][name]) for name, shape in ranges["min"].items()}


def _copy_graph(bundle: Path, manifest: Manifest, out: Path) -> None:
    """Copies the graph and its weights beside it, without the defaults of its LoRA inputs."""
    name = manifest.graph.file
    for entry in manifest.files:
        if entry.path != name and entry.path.startswith(name):
            shutil.copyfile(bundle / entry.path, out / Path(entry.path).name)
    if not manifest.graph.sites:
        shutil.copyfile(bundle / name, out / "model.onnx")
        return
    try:
        import onnx
    except ImportError as error:
        do = "pip install 'edge_sdss[export]'"
        raise BackendUnavailable(message("export for TensorRT", "onnx is not installed", do)) from error
    model = onnx.load(str(bundle / name), load_external_data=False)
    lora = {input for site in manifest.graph.sites for input in (site.lora_a, site.lora_b)}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in lora]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    missing = sorted(lora - {value.name for value in model.graph.input})
    if missing:
        found = f"its graph has no input {missing[0]}, which its manifest names"
        raise ExportError(message(f"export {bundle} for TensorRT", found, "export the bundle anew"))
    onnx.save(model, str(out / "model.onnx"))


def _write_programs(out: Path, graph: Graph, shapes: Shapes, peak: Peak, workspace_bytes: int) -> None:
    # trtexec takes one profile; this one holds both of profiles.json, and is made fast for decoding.
    both = _ranges(graph, shapes, Extent(min=1, opt=1, max=shapes.sequence.max), shapes.past)
    specs = [",".join(f"{n}:{'x'.join(map(str, s[i]))}" for n, s in both.items()) for i in range(3)]
    values = {
        "min_shapes": shlex.quote(specs[0]),
        "opt_shapes": shlex.quote(specs[1]),
        "max_shapes": shlex.quote(specs[2]),
        "need_mib": str(-(-peak.total_bytes // _MIB)),
        "workspace_mib": str(workspace_bytes // _MIB),
    }
    for name in ("build_engine.sh", "build_engine.py"):
        text = Template((_TEMPLATES / f"{name}.in").read_text(encoding="utf-8")).substitute(values)
        (out / name).write_text(text, encoding="utf-8")
        (out / name).chmod(0o755)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}"
