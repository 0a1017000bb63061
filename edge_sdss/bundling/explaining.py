"""Why a graph for the NPU answers otherwise than the model: every stage compared, on everyday texts.

torch, the float graph, its quantised form on the CPU, and the same on the emulated HTP; and a folder with which a real
phone is compared. Makes no bundle, and knows nothing of those on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edge_sdss import config
from edge_sdss.bundles import peft
from edge_sdss.bundles.recipes import Recipe
from edge_sdss.bundling import static
from edge_sdss.bundling.agreement import texts
from edge_sdss.errors import ConfigError, message
from edge_sdss.exporting import explain, htp, phone, static_decoder
from edge_sdss.exporting.blocks import Floats
from edge_sdss.exporting.explain.placement import Placement, placement
from edge_sdss.exporting.explain.stages import Feeds as StageFeeds
from edge_sdss.exporting.parity import Ids
from edge_sdss.exporting.static_decoder import Shape
from edge_sdss.exporting.static_feeds import Feeds
from edge_sdss.lm import loading
from edge_sdss.lm.chat import Chat
from edge_sdss.types import Example, Progress, no_progress

if TYPE_CHECKING:
    from edge_sdss.exporting.fast_config import Spec

Which = Literal["prefill", "decode"]

AT_ONCE = 96
"""Tensors that are looked at in one run on the HTP: each is an output, and an output can change what is fused."""

_SEED, _EFFECT = 5, 0.1
_IDS, _BEFORE = "ids", "ids before"  # for torch, which embeds and rotates by itself

_POINTS = {
    "attn.norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.joined": "self_attn.o_proj:input", "attn.o": "self_attn.o_proj",
    "attn.sum": "post_attention_layernorm:input", "mlp.norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj", "mlp.inner": "mlp.down_proj:input", "mlp.down": "mlp.down_proj", "out": "",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Explained:
    """What was found, where the nodes of the last graph run, and what has to be said of both."""

    found: explain.Explanation
    placed: Placement
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Built:
    """A graph in its stages; `last` is what goes to the NPU."""

    spec: Spec
    shape: Shape
    texts: _Texts
    float_graph: Path
    quantised: Path | None

    @property
    def last(self) -> Path:
        return self.quantised or self.float_graph


def explain_export(
    settings: config.Model,
    recipe: Recipe,
    *,
    graph: Which = "prefill",
    adapter: Path | None = None,
    kept: Sequence[Example] = (),
    progress: Progress = no_progress,
) -> Explained:
    """Builds one of the recipe's graphs and compares its stages, with an adapter: the PEFT folder, or a drawn one.

    `kept` are dialogues of the user to calibrate with.

    Raises ConfigError for a recipe that has no static graph on the HTP, BackendUnavailable where onnxruntime-qnn or
    torch is not installed, and what exporting raises.
    """
    with _built(settings, recipe, graph, adapter, kept, progress) as built:
        stages = [_of_torch(built), explain.of_model("ONNX float32", built.float_graph)]
        if built.quantised is not None:
            stages.append(explain.of_model("QDQ on the CPU", built.quantised))
        how: Any = {"arithmetic": "float16", "at_once": AT_ONCE, "emulated": True}
        stages.append(explain.of_model("emulated HTP", built.last, open=_opener(recipe), **how))
        done = iter(range(1_000_000))
        found = explain.explain(
            stages, explain.Topology.of(built.float_graph), list(built.texts.compared()),
            adapters=tuple(built.texts.lora), tick=lambda text: progress(f"comparing {text}", next(done), 0),
        )  # fmt: skip
        placed = placement(built.last, htp.PROVIDER, _opener(recipe, fallback=True))
    which = f"the adapter {adapter.name}" if adapter else "a drawn adapter, so that the LoRA path is looked at too"
    shape = built.shape
    size = f"{built.spec.layers} layers, {shape.tokens} tokens behind {shape.past} slots"
    note = f"The {graph} graph of {size}, with {which}."
    return Explained(found, placed, (note,))


def phone_folder(
    settings: config.Model,
    recipe: Recipe,
    out: Path,
    *,
    graph: Which = "prefill",
    adapter: Path | None = None,
    kept: Sequence[Example] = (),
    progress: Progress = no_progress,
) -> Path:
    """Writes what a real Snapdragon needs to run one of the recipe's graphs and to say whether it is right.

    Raises as `explain_export`, and what `exporting.phone.write` raises.
    """
    phone.check_new(out)  # before minutes of work
    with _built(settings, recipe, graph, adapter, kept, progress) as built:
        feeds = list(built.texts.compared())
        progress("compiling for the phone", 0, 1)
        right = explain.of_model("ONNX float32", built.float_graph)
        names = explain.Topology.of(built.float_graph).outputs
        expected = [right.run(feed, names) for feed in feeds]
        made = phone.write(out, built.last, feeds, expected, options=recipe.providers[0].options)
        progress("compiling for the phone", 1, 1)
    return made


@contextlib.contextmanager
def _built(
    settings: config.Model,
    recipe: Recipe,
    graph: Which,
    adapter: Path | None,
    kept: Sequence[Example],
    progress: Progress,
) -> Iterator[_Built]:
    """The graphs, in a folder that is gone afterwards."""
    if not recipe.shapes.static or recipe.providers[0].name != "qnn":
        do = "choose qnn-htp, or a recipe of your own with shapes.static and the provider qnn"
        raise ConfigError(message(f"explain an export for {recipe.name}", "it is not for an NPU with fixed shapes", do))
    htp.check_installed()
    torch = loading.torch_module()
    folder = loading.find(settings.name, progress)
    model, tokenizer = loading.load(folder, torch.float32)
    chat = Chat(tokenizer, [tokenizer.eos_token_id])
    with tempfile.TemporaryDirectory(prefix="edge_sdss-explain-") as aside:
        maker = static.Maker(folder, Path(aside), recipe, progress)
        maker.model.limit_bytes = sys.maxsize  # in one part, so that all of it is one graph to look into
        shape, spec = maker.prefill if graph == "prefill" else maker.decode, maker.model.spec
        (float_graph,) = maker.model.write(maker.aside, "float", shape, quantised=False)
        quantised = None
        if maker.model.scheme is not None:
            maker.calibrate(static.calibration(chat, kept))
            (quantised,) = maker.model.write(maker.aside, "qdq", shape)
        lora = _lora(spec, adapter, shape.rank)
        feeds = _Texts(maker.model.feeds, shape, lora, model.eval(), texts(chat))
        yield _Built(spec, shape, feeds, float_graph, quantised)


def _opener(recipe: Recipe, *, fallback: bool = False) -> Callable[..., Any]:
    # the boundary's Q and DQ belong to the NPU, as they do where nothing may fall back
    options = {**recipe.providers[0].options, "offload_graph_io_quantization": "0"}

    def open(file: Path, entries: Mapping[str, str] | None = None, severity: int = 3) -> Any:
        return htp.session(file, options, fallback=fallback, entries=entries, log_severity=severity)

    return open


class _Texts:
    """Feeds of everyday texts: the beginning, and what follows it behind a cache, which torch filled.

    The first token is in the cache in either case, as a bundle has it as a prefix.
    """

    def __init__(self, feeds: Feeds, shape: Shape, lora: dict[str, Floats], model: Any, ids: Sequence[Ids]) -> None:
        self.feeds, self.shape, self.lora, self.model = feeds, shape, lora, model
        self.ids = np.concatenate(ids)

    def compared(self) -> Iterator[dict[str, Any]]:
        """A prompt's beginning and, where there is a cache, what follows it."""
        tokens, ids = self.shape.tokens, self.ids
        yield self._feed(ids[:1], ids[1 : 1 + tokens])
        before = min(self.shape.past, max(tokens, 8) + 1)  # no multiple of anything, so that a shifted slot is seen
        if before > 1 and len(ids) >= before + tokens:
            yield self._feed(ids[:before], ids[before : before + tokens])

    def _feed(self, before: Any, ids: Any) -> dict[str, Any]:
        cache = self.feeds.cache(self.shape.past)
        filled = _present(_call(self.model, before, None, self.feeds.spec, self.lora), self.feeds.spec)
        self.feeds.keep(filled, cache, 0, len(before))
        feed = self.feeds.step(ids, len(before), cache, self.shape)
        return {**feed, **self.lora, _IDS: np.asarray(ids), _BEFORE: np.asarray(before)}


def _of_torch(built: _Built) -> explain.Stage:
    """transformers, by token ids and its own cache: it shares nothing with the graph but weights and the adapter."""
    spec, model, lora = built.spec, built.texts.model, built.texts.lora
    points = {
        f"layers.{layer}.{tensor}": f"model.layers.{layer}{'.' if module else ''}{module}"
        for layer in range(spec.layers)
        for tensor, module in _POINTS.items()
    }

    def call(feeds: StageFeeds) -> Mapping[str, Any]:
        adapter = {name: feeds[name] for name in lora}
        before, ids = feeds[_BEFORE], feeds[_IDS]
        past = _call(model, before, None, spec, adapter).past_key_values
        made = _call(model, ids, past, spec, adapter)
        cache = {name: array[:, :, -len(ids) :] for name, array in _present(made, spec, numpy=False).items()}
        return {"logits": made.logits, **cache}

    return explain.of_torch("torch", points | {"norm": "model.norm"}, call, model)


def _call(model: Any, ids: Any, past: Any, spec: Spec, lora: Mapping[str, Floats]) -> Any:
    """Runs the model with y + (x A) B at each adapted linear."""
    import torch

    modules = dict(model.named_modules())
    hooks = []
    for site in static_decoder.sites(spec) if lora else ():
        a, b = (torch.from_numpy(np.ascontiguousarray(lora[name])) for name in (site.lora_a, site.lora_b))

        def add(module: Any, given: Any, out: Any, a: Any = a, b: Any = b) -> Any:
            return out + given[0] @ a @ b

        hooks.append(modules[site.module].register_forward_hook(add, prepend=True))
    try:
        with torch.no_grad():
            return model(torch.from_numpy(np.asarray(ids, np.int64))[None], past_key_values=past, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()


def _present(made: Any, spec: Spec, *, numpy: bool = True) -> dict[str, Any]:
    """The keys and values that transformers keeps, by the graph's names of its outputs."""
    found = {}
    for layer, cached in enumerate(made.past_key_values.layers):
        found[f"layers.{layer}.attn.k_rope"] = cached.keys
        found[f"layers.{layer}.attn.v_heads"] = cached.values
    return {name: value.numpy() for name, value in found.items()} if numpy else found


def _lora(spec: Spec, adapter: Path | None, rank: int) -> dict[str, Floats]:
    """All LoRA inputs: of the PEFT folder, or drawn so that each linear changes by about a tenth."""
    found: dict[str, Floats] = {}
    if not rank:
        return found
    if adapter is None:
        return static_decoder.drawn(spec, rank, _SEED, _EFFECT)
    known = peft.read(adapter).modules
    for site in static_decoder.sites(spec):
        arrays: dict[str, Floats] = {}
        if site.module in known:
            arrays = {site.lora_a: known[site.module].a, site.lora_b: known[site.module].b}
        found |= static_decoder.padded(site, arrays, rank)
    return found
