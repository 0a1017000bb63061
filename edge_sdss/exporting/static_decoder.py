"""A decoder as graphs of fixed shapes, for compilers that take no others, such as that of Snapdragon's NPU.

Prefill and decode are two shapes of one builder. Written in standard ONNX operators that the HTP takes whole: the norm
is RMSNormalization, never a Reciprocal; the mask is an input with finite values. Softmax and SiLU are written out: the
HTP's own Softmax is off by 0.15 %, these steps by float16's rounding alone. Knows no provider and no quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_sdss.bundles.manifest import Site
from edge_sdss.errors import ExportError, message
from edge_sdss.exporting.blocks import Floats
from edge_sdss.exporting.fast_config import Spec
from edge_sdss.exporting.fast_nodes import Net
from edge_sdss.exporting.fast_weights import Weights

if TYPE_CHECKING:
    import onnx_ir as ir

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MASKED = -100.0
"""What is added to a score that must not count: of −3.4e38 or −inf the HTP makes nonsense."""

_LEAST = -30.0  # e^-30 of a row's greatest has no weight; of e^-90 the HTP makes nonsense
_OPSET, _IR_VERSION = 23, 11
_MODULES = {
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """`tokens` computed at once behind `past` slots of the KV cache; `rank` of adapters, 0: the graph takes none."""

    tokens: int
    past: int
    rank: int = 0

    @property
    def decode(self) -> Shape:
        """That of one token with as many slots in all."""
        return Shape(1, self.past + self.tokens - 1, self.rank)


@dataclass(frozen=True, slots=True)
class Part:
    """The layers `first` to `last`, the latter not included; `head`: the final norm and the logits behind them."""

    first: int
    last: int
    head: bool


def check(spec: Spec, shape: Shape) -> None:
    """Raises ExportError for a family, a context or a window that these graphs cannot have."""
    asked, total = "export graphs of fixed shapes", shape.tokens + shape.past
    if spec.family not in FAMILIES:
        raise ExportError(message(asked, f"its family is {spec.family!r}", f"take a model of {', '.join(FAMILIES)}"))
    least = min([spec.context, *(window for window in spec.windows if window is not None)])
    if total > least:
        found = f"past and tokens are {total} together, and the model sees {least}"
        raise ExportError(message(asked, found, "give smaller shapes"))


def whole(spec: Spec) -> Part:
    """Returns the part that is all of the model."""
    return Part(0, spec.layers, True)


def parts(spec: Spec, layer_bits: Sequence[float], head_bits: float, limit_bytes: int) -> tuple[Part, ...]:
    """Splits the model between layers so that no part's weights exceed `limit_bytes`; the head may be a part alone.

    `layer_bits` of each layer's weights, what scales take of them included. Raises ExportError where a single layer, or
    the head, is larger than that.
    """
    attention = spec.width * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    layers = [(attention + 3 * spec.width * spec.inner) * bits / 8 for bits in layer_bits]
    head = spec.width * spec.vocabulary * head_bits / 8
    if max(*layers, head) > limit_bytes:
        found = (
            f"one layer has {max(layers) / 1e6:.0f} MB, the head {head / 1e6:.0f} MB, {limit_bytes / 1e6:.0f} MB fit"
        )
        raise ExportError(message("split the model into parts", found, "take fewer bits or a smaller model"))
    starts, held = [0], 0.0
    for number, size in enumerate([*layers, head]):
        if held + size > limit_bytes:
            starts.append(number)
            held = 0.0
        held += size
    ends = [*starts[1:], spec.layers]
    return tuple(
        Part(first, last, number == len(starts))
        for number, (first, last) in enumerate(zip(starts, ends, strict=True), 1)
    )


def build(spec: Spec, weights: Weights, shape: Shape, part: Part | None = None) -> ir.Model:
    """Returns the graph of `part`, float32, by default of the whole model.

    With T = tokens, P = past, r = rank, G = heads / kv_heads, all float32:

    inputs of every part: cos, sin [1, 1, T, head_dim], the first half of sin negative; mask [1, 1, G · T, P + T], 0 or
    `MASKED`, row g · T + t for token t; of each layer i: layers.i.attn.past_keys and .past_values
    [1, kv_heads, P, head_dim]; and with r > 0 of each linear, such as layers.i.attn.q: .lora_A [inputs, r] and .lora_B
    [r, outputs], the scale folded into B and lower ranks filled with zeros.
    inputs of the first part: embeddings [1, T, width]; of another: layers.j.out of the one before.
    outputs: of each layer i layers.i.attn.k_rope and layers.i.attn.v_heads [1, kv_heads, T, head_dim], to be put into
    the cache; and layers.j.out [1, T, width] of the last layer, or, with the head, logits [1, T, vocabulary] and norm
    [1, T, width], which enters the head.

    Between them every layer has, to be asked for at any stage: attn.norm, attn.q, .k, .v, attn.q_rope, attn.keys,
    attn.values, attn.scores, attn.masked, attn.exp, attn.weights, attn.context, attn.joined, attn.o, attn.sum,
    mlp.norm, mlp.gate, mlp.up, mlp.act, mlp.inner, mlp.down and out, each behind `layers.i.`.
    Raises ExportError as `check` does, and where a weight is missing.
    """
    import onnx_ir as ir

    check(spec, shape)
    net = Net(np.float32)
    outputs = _Writer(spec, weights, shape, net).write(part or whole(spec))
    for output in outputs:
        output.dtype = ir.DataType.FLOAT
    graph = ir.Graph(
        net.inputs, outputs, nodes=net.nodes, initializers=list(net.constants.values()), name="decoder",
        opset_imports={"": _OPSET},
    )  # fmt: skip
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="edge_sdss")


def sites(spec: Spec, part: Part | None = None) -> tuple[Site, ...]:
    """Returns the linears that adapters may change, with the names of their inputs."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    sizes = {
        "attn.q": (spec.width, q), "attn.k": (spec.width, kv), "attn.v": (spec.width, kv), "attn.o": (q, spec.width),
        "mlp.gate": (spec.width, spec.inner), "mlp.up": (spec.width, spec.inner), "mlp.down": (spec.inner, spec.width),
    }  # fmt: skip
    part = part or whole(spec)
    return tuple(
        Site(module=f"model.layers.{i}.{module}", inputs=sizes[name][0], outputs=sizes[name][1],
             lora_a=f"layers.{i}.{name}.lora_A", lora_b=f"layers.{i}.{name}.lora_B")
        for i in range(part.first, part.last) for name, module in _MODULES.items()
    )  # fmt: skip


def padded(site: Site, arrays: Mapping[str, Floats], rank: int) -> dict[str, Floats]:
    """Returns an adapter's A and B for a site, filled with zeros up to `rank`; zeros where it does not change it.

    `arrays` are by the site's input names. Raises ExportError for an adapter of a higher rank.
    """
    a = np.zeros((site.inputs, rank), np.float32)
    b = np.zeros((rank, site.outputs), np.float32)
    if site.lora_a in arrays:
        own = arrays[site.lora_a].shape[1]
        if own > rank:
            found = f"its rank at {site.module} is {own}, the graph takes {rank}"
            raise ExportError(message("use the adapter", found, "export with shapes.rank of that size"))
        a[:, :own], b[:own] = arrays[site.lora_a], arrays[site.lora_b]
    return {site.lora_a: a, site.lora_b: b}


def drawn(spec: Spec, rank: int, seed: int, effect: float) -> dict[str, Floats]:
    """Returns a random adapter, by the names of the inputs: entries ~ N(0, 1) become changes ~ N(0, effect²)."""
    draws, found = np.random.default_rng(seed), {}
    for site in sites(spec):
        found[site.lora_a] = draws.normal(0, site.inputs**-0.5, (site.inputs, rank)).astype(np.float32)
        found[site.lora_b] = draws.normal(0, effect * rank**-0.5, (rank, site.outputs)).astype(np.float32)
    return found


class _Writer:
    """Writes one part into a net."""

    def __init__(self, spec: Spec, weights: Weights, shape: Shape, net: Net):
        self.spec, self.weights, self.shape, self.net = spec, weights, shape, net
        self.adapted = {site.lora_a: site for site in sites(spec)} if shape.rank else {}

    def write(self, part: Part) -> list[ir.Value]:
        """Returns the outputs."""
        spec, net, tokens = self.spec, self.net, self.shape.tokens
        total = tokens + self.shape.past
        enters = "embeddings" if part.first == 0 else f"layers.{part.first - 1}.out"
        x, cache = net.input(enters, np.float32, (1, tokens, spec.width)), []
        if part.last > part.first:
            rotary = (1, 1, tokens, spec.head_dim)
            self.cos, self.sin = net.input("cos", np.float32, rotary), net.input("sin", np.float32, rotary)
            self.mask = net.input("mask", np.float32, (1, 1, spec.heads // spec.kv_heads * tokens, total))
        for index in range(part.first, part.last):
            x, keys_values = self._layer(x, index)
            cache += keys_values
        entering = (1, tokens, spec.width)
        if not part.head:
            self._declare(x, entering)
            return [x, *cache]
        x = self._norm(x, "norm", "model.norm")
        name = "model.embed_tokens" if spec.tied else "lm_head"
        logits = net.op("MatMul", x, net.floats("head.weight", self.weights[f"{name}.weight"].T), name="logits")
        self._declare(x, entering)
        self._declare(logits, (1, tokens, spec.vocabulary))
        return [logits, *cache, x]

    def _layer(self, x: ir.Value, index: int) -> tuple[ir.Value, list[ir.Value]]:
        net, at, path = self.net, f"layers.{index}", f"model.layers.{index}"
        attended, cache = self._attention(self._norm(x, f"{at}.attn.norm", f"{path}.input_layernorm"), index)
        x = net.op("Add", x, attended, name=f"{at}.attn.sum")
        inner = self._norm(x, f"{at}.mlp.norm", f"{path}.post_attention_layernorm")
        gate, up = (self._linear(inner, f"{at}.mlp.{each}") for each in ("gate", "up"))
        if self.spec.activation == "silu":
            gate = self._silu(gate, f"{at}.mlp")
        else:
            kind = "tanh" if self.spec.activation == "gelu_tanh" else "none"
            gate = net.op("Gelu", gate, name=f"{at}.mlp.act", approximate=kind)
        down = self._linear(net.op("Mul", gate, up, name=f"{at}.mlp.inner"), f"{at}.mlp.down")
        return net.op("Add", x, down, name=f"{at}.out"), cache

    def _attention(self, x: ir.Value, index: int) -> tuple[ir.Value, list[ir.Value]]:
        """Query heads of one key head lie one below the other, so that keys and values are not repeated."""
        spec, net, at = self.spec, self.net, f"layers.{index}.attn"
        tokens, rows = self.shape.tokens, self.spec.heads // self.spec.kv_heads * self.shape.tokens
        q, k, v = (self._linear(x, f"{at}.{which}") for which in "qkv")
        q, k, v = (
            self._heads(q, spec.heads),
            self._heads(k, spec.kv_heads),
            self._heads(v, spec.kv_heads, f"{at}.v_heads"),
        )
        if spec.qk_norm:
            path = f"model.layers.{index}.self_attn"
            q, k = self._norm(q, f"{at}.q_norm", f"{path}.q_norm"), self._norm(k, f"{at}.k_norm", f"{path}.k_norm")
        q, k = self._rotated(q, f"{at}.q"), self._rotated(k, f"{at}.k")
        keys = values = None
        if self.shape.past:
            cache = (1, spec.kv_heads, self.shape.past, spec.head_dim)
            keys = net.op("Concat", net.input(f"{at}.past_keys", np.float32, cache), k, name=f"{at}.keys", axis=2)
            values = net.op("Concat", net.input(f"{at}.past_values", np.float32, cache), v, name=f"{at}.values", axis=2)
        q = net.op("Mul", q, self._number("attention_scale", spec.attention_scale), name=f"{at}.q_scaled")
        q = net.op("Reshape", q, self._sizes(1, spec.kv_heads, rows, spec.head_dim), name=f"{at}.q_groups")
        turned = net.op("Transpose", keys or k, name=f"{at}.keys_turned", perm=[0, 1, 3, 2])
        scores = net.op("MatMul", q, turned, name=f"{at}.scores")
        masked = net.op("Add", scores, self.mask, name=f"{at}.masked")
        context = net.op("MatMul", self._softmax(masked, at), values or v, name=f"{at}.context")
        context = net.op("Reshape", context, self._sizes(1, spec.heads, tokens, spec.head_dim), name=f"{at}.apart")
        flat = net.op("Transpose", context, name=f"{at}.flat", perm=[0, 2, 1, 3])
        joined = net.op("Reshape", flat, self._sizes(1, tokens, spec.heads * spec.head_dim), name=f"{at}.joined")
        for value in (k, v):
            self._declare(value, (1, spec.kv_heads, tokens, spec.head_dim))
        return self._linear(joined, f"{at}.o"), [k, v]

    def _softmax(self, x: ir.Value, at: str) -> ir.Value:
        """e^(x - max) / Σ e^(x - max) over the last axis, as a product with Σ to the power of -1."""
        net, last = self.net, self._sizes(-1)
        greatest = net.op("ReduceMax", x, last, name=f"{at}.greatest", keepdims=1)
        below = net.op("Sub", x, greatest, name=f"{at}.below")
        exp = net.op("Exp", net.op("Max", below, self._number("least", _LEAST), name=f"{at}.seen"), name=f"{at}.exp")
        total = net.op("ReduceSum", exp, last, name=f"{at}.total", keepdims=1)
        share = net.op("Pow", total, self._number("minus_one", -1.0), name=f"{at}.share")
        return net.op("Mul", exp, share, name=f"{at}.weights")

    def _silu(self, x: ir.Value, at: str) -> ir.Value:
        """x σ(x) = h + h tanh h, with h = x / 2."""
        net = self.net
        half = net.op("Mul", x, self._number("half", 0.5), name=f"{at}.half")
        bent = net.op("Mul", half, net.op("Tanh", half, name=f"{at}.tanh"), name=f"{at}.bent")
        return net.op("Add", bent, half, name=f"{at}.act")

    def _number(self, name: str, value: float) -> ir.Value:
        return self.net.floats(name, np.array(value))

    def _heads(self, y: ir.Value, heads: int, name: str | None = None) -> ir.Value:
        sizes = self._sizes(1, self.shape.tokens, heads, self.spec.head_dim)
        split = self.net.op("Reshape", y, sizes, name=f"{y.name}_split")
        return self.net.op("Transpose", split, name=name or f"{y.name}_heads", perm=[0, 2, 1, 3])

    def _rotated(self, y: ir.Value, name: str) -> ir.Value:
        """The halves change places; the sign of the second is in sin."""
        net, half = self.net, self.spec.head_dim // 2
        last = self._sizes(3)
        low = net.op("Slice", y, self._sizes(0), self._sizes(half), last, name=f"{name}_low")
        high = net.op("Slice", y, self._sizes(half), self._sizes(2 * half), last, name=f"{name}_high")
        turned = net.op("Concat", high, low, name=f"{name}_turned", axis=3)
        sine = net.op("Mul", turned, self.sin, name=f"{name}_sin")
        return net.op("Add", net.op("Mul", y, self.cos, name=f"{name}_cos"), sine, name=f"{name}_rope")

    def _norm(self, x: ir.Value, name: str, path: str) -> ir.Value:
        weight = self.net.floats(f"{name}.weight", self.weights[f"{path}.weight"] + self.spec.norm_offset)
        return self.net.op("RMSNormalization", x, weight, name=name, axis=-1, epsilon=self.spec.epsilon)

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        """x W, + b, + (x A) B; the last has the linear's name, the product is `name`.product where more follows."""
        net, (_, index, short) = self.net, name.split(".", 2)
        path = f"model.layers.{index}.{_MODULES[short]}"
        biased, adapted = f"{path}.bias" in self.weights, self.adapted.get(f"{name}.lora_A")
        weight = net.floats(f"{name}.weight", self.weights[f"{path}.weight"].T)
        y = net.op("MatMul", x, weight, name=f"{name}.product" if biased or adapted else name)
        if biased:
            bias = net.floats(f"{name}.bias", self.weights[f"{path}.bias"])
            y = net.op("Add", y, bias, name=f"{name}.biased" if adapted else name)
        if adapted is None:
            return y
        a = net.input(adapted.lora_a, np.float32, (adapted.inputs, self.shape.rank))
        b = net.input(adapted.lora_b, np.float32, (self.shape.rank, adapted.outputs))
        inner = net.op("MatMul", x, a, name=f"{name}.lora_inner")
        return net.op("Add", y, net.op("MatMul", inner, b, name=f"{name}.lora_outer"), name=name)

    def _sizes(self, *sizes: int) -> ir.Value:
        return self.net.constant(f"sizes.{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def _declare(self, value: ir.Value, shape: tuple[int, ...]) -> None:
        import onnx_ir as ir

        value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
