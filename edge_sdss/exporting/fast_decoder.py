"""Writes one decoder, layer by layer, into a net of the fast graph. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_sdss.bundles.manifest import Precision
from edge_sdss.errors import ExportError, message
from edge_sdss.exporting import fast_weights
from edge_sdss.exporting.blocks import Floats
from edge_sdss.exporting.fast_config import Spec
from edge_sdss.exporting.fast_nodes import MICROSOFT, Net
from edge_sdss.exporting.fast_weights import Weights
from edge_sdss.types import Progress

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; `block_means` is explained at `fast_weights.pack_four`.

    `half`: activations, KV cache and adapters in float16, as a GPU wants them, also of weights in 4 or 8 bits.
    """

    precision: Precision
    block_size: int = 32
    adapters: bool = True
    hidden_states: bool = False
    last_logits_only: bool = True
    block_means: bool = True
    half: bool = False


class Decoder:
    """Writes one decoder into a net."""

    def __init__(self, spec: Spec, weights: Weights, options: Options, net: Net, progress: Progress):
        self.spec, self.weights, self.options, self.net, self.progress = spec, weights, options, net, progress

    def write(self) -> list[ir.Value]:
        """Returns the graph's outputs."""
        spec, net = self.spec, self.net
        ids = net.input("input_ids", np.int64, ("batch", "n"))
        mask = net.input("attention_mask", np.int64, ("batch", "total"))
        self.lengths, self.total = self._lengths(mask)
        rest = net.constant("rest", np.array([-1], np.int64))
        self.apart = net.op("Concat", net.op("Shape", ids, name="batch_n"), rest, name="batch_n_size", axis=0)
        embedded, head = self._embedding(ids)
        skip, x, presents = embedded, self._norm(embedded, "model.layers.0.input_layernorm"), []
        for index in range(spec.layers):
            self.progress("writing the graph", index, spec.layers)
            path = f"model.layers.{index}"
            attended, keys_values = self._attention(x, index)
            presents += keys_values
            before = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
            if spec.sandwich_norms:
                attended = self._norm(attended, f"{path}.post_attention_layernorm")
            x, skip = self._skip_norm(attended, skip, f"{path}.{before}")
            y = self._mlp(x, path)
            if spec.sandwich_norms:
                y = self._norm(y, f"{path}.post_feedforward_layernorm")
            last = index + 1 == spec.layers
            following = "model.norm" if last else f"model.layers.{index + 1}.input_layernorm"
            x, skip = self._skip_norm(y, skip, following)
        self.progress("writing the graph", spec.layers, spec.layers)
        outputs = [head(x), *presents]
        if self.options.hidden_states:
            outputs.append(self._output(self._apart(x, "hidden_rows"), "hidden_states", ("batch", "n", spec.width)))
        return outputs

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """How many tokens each row has less one, int32 [batch], and how long the longest may be, int32 scalar."""
        net = self.net
        one = net.constant("one", np.array([1], np.int64))
        filled = net.op("ReduceSum", mask, one, name="filled", keepdims=0)
        lengths = net.op("Cast", net.op("Sub", filled, one, name="filled_before"), name="lengths", to=6)
        size = net.op("Shape", mask, name="mask_size")
        scalar = net.op("Gather", size, net.constant("one_scalar", np.array(1, np.int64)), name="mask_length")
        return lengths, net.op("Cast", scalar, name="total_length", to=6)

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """Returns the embedded ids and the function that writes the head, which may share its weights."""
        spec, net, name = self.spec, self.net, "model.embed_tokens"
        table = self.weights[f"{name}.weight"]
        quantised = self.options.precision in ("int4", "int8") and spec.width % self.options.block_size == 0
        head_table = table if spec.tied else self.weights["lm_head.weight"]
        if not quantised:
            found = net.op("Gather", net.floats(f"{name}.weight", table), ids, name=f"{name}.rows")
            return self._scaled(self._flat(found, name, spec.width)), lambda x: self._head(
                x, lambda y: self._float_head(y, head_table), rows_only=spec.tied
            )
        packed = self._pack(table, "head")
        codes = net.constant(f"{name}.codes", packed.codes)
        scales = net.op(
            "Unsqueeze", net.narrow(f"{name}.scales", packed.scales),
            net.constant("last_axis", np.array([-1], np.int64)), name=f"{name}.column_scales",
        )  # fmt: skip
        blocked = net.op(
            "GatherBlockQuantized", codes, ids, scales, name=f"{name}.blocks", domain=MICROSOFT, bits=packed.bits,
            block_size=packed.block_size, gather_axis=0, quantize_axis=2,
        )  # fmt: skip
        embedded = self._scaled(self._flat(blocked, name, spec.width))
        if not spec.tied:
            packed, name = self._pack(head_table, "head"), "lm_head"
        return embedded, lambda x: self._head(x, lambda y: net.packed_product(y, packed, name, None), rows_only=False)

    def _scaled(self, embedded: ir.Value) -> ir.Value:
        if self.spec.embedding_scale == 1:
            return embedded
        factor = self.net.floats("embedding_scale", np.array(self.spec.embedding_scale))
        return self.net.op("Mul", embedded, factor, name="model.embed_tokens.scaled")

    def _float_head(self, x: ir.Value, table: Floats) -> ir.Value:
        """A tied float table is stored once: [vocabulary, width], turned at run time only by Gemm's flag."""
        net, spec = self.net, self.spec
        if not spec.tied:
            return net.product(x, table, "lm_head", None)
        return net.op("Gemm", x, net.constants["model.embed_tokens.weight"], name="lm_head.product", transB=1)

    def _head(self, x: ir.Value, product: Callable[[ir.Value], ir.Value], *, rows_only: bool) -> ir.Value:
        """The logits; unless the product takes `rows_only`, its third axis comes before it: no score is copied."""
        net, cap, only_last = self.net, self.spec.final_softcap, self.options.last_logits_only
        middle = net.constant("middle_axis", np.array([1], np.int64))
        x = self._last(x) if only_last else x
        early = only_last and not rows_only
        scores = product(net.op("Unsqueeze", x, middle, name="last.row") if early else x)
        if cap:
            limit = net.floats("final_softcap", np.array(cap))
            bounded = net.op("Tanh", net.op("Div", scores, limit, name="capped.in"), name="capped.tanh")
            scores = net.op("Mul", bounded, limit, name="capped")
        if not only_last:
            scores = self._apart(scores, "scores")
        elif not early:
            scores = net.op("Unsqueeze", scores, middle, name="last.scores")
        return self._output(scores, "logits", ("batch", 1 if only_last else "n", self.spec.vocabulary))

    def _last(self, x: ir.Value) -> ir.Value:
        """Each sequence's last token that the mask counts, [batch, width]: they are padded on the right."""
        net = self.net
        x = self._apart(x, "last.rows")
        n = net.op("Cast", net.op("Shape", x, name="last.n", start=1, end=2), name="last.n32", to=6)
        behind = net.op("Sub", self.total, self.lengths, name="last.behind")
        index = net.op("Sub", n, behind, name="last.index")
        index = net.op("Max", index, net.constant("zero", np.array([0], np.int32)), name="last.inside")
        index = net.op("Cast", index, name="last.inside64", to=7)
        index = net.op("Unsqueeze", index, net.constant("last_axis", np.array([-1], np.int64)), name="last.indices")
        return net.op("GatherND", x, index, name="last", batch_dims=1)

    def _flat(self, x: ir.Value, name: str, size: int) -> ir.Value:
        """[batch, n, ..] as [batch · n, size]: in two axes a product and what is added to it are one node, Gemm."""
        return self.net.op(
            "Reshape", x, self.net.constant(f"rows_of_{size}", np.array([-1, size], np.int64)), name=name
        )

    def _apart(self, x: ir.Value, name: str) -> ir.Value:
        """[batch · n, size] as [batch, n, size]."""
        return self.net.op("Reshape", x, self.apart, name=name)

    def _output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
        import onnx_ir as ir

        half = self.net.dtype is np.float16
        output = self.net.op("Cast", value, name=name, to=1) if half else self.net.op("Identity", value, name=name)
        output.shape, output.dtype = ir.Shape(shape), ir.DataType.FLOAT
        return output

    def _gamma(self, path: str) -> ir.Value:
        return self.net.floats(f"{path}.weight", self.weights[f"{path}.weight"] + self.spec.norm_offset)

    def _norm(self, x: ir.Value, path: str) -> ir.Value:
        epsilon = self.spec.epsilon
        return self.net.op(
            "SimplifiedLayerNormalization", x, self._gamma(path), name=path, axis=-1, epsilon=epsilon, stash_type=1
        )

    def _skip_norm(self, x: ir.Value, skip: ir.Value, path: str) -> tuple[ir.Value, ir.Value]:
        """Returns the norm of x + skip, and x + skip."""
        normed, _, _, total = self.net.ops(
            "SkipSimplifiedLayerNormalization", x, skip, self._gamma(path), names=(path, "", "", f"{path}.sum"),
            domain=MICROSOFT, epsilon=self.spec.epsilon,
        )  # fmt: skip
        return normed, total

    def _attention(self, x: ir.Value, index: int) -> tuple[ir.Value, list[ir.Value]]:
        spec, net, path = self.spec, self.net, f"model.layers.{index}.self_attn"
        cache = ("batch", spec.kv_heads, "past", spec.head_dim)
        past = [net.input(f"past_key_values.{index}.{kind}", net.dtype, cache) for kind in ("key", "value")]
        sizes = [spec.heads * spec.head_dim] + [spec.kv_heads * spec.head_dim] * 2
        modules = (
            [("qkv_proj", sum(sizes))] if spec.packed else list(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True))
        )
        qkv = self._linear(x, path, "qkv_proj", modules)
        heads = (
            self._normed_heads(qkv, path, sizes) if spec.qk_norm else [self._apart(qkv, f"{path}.qkv_rows"), None, None]
        )
        window = spec.windows[index]
        names = (f"{path}.attended", f"present.{index}.key", f"present.{index}.value")
        attended, *present = net.ops(
            "GroupQueryAttention", *heads, *past, self.lengths, self.total, *self._rotary(index), names=names,
            domain=MICROSOFT, num_heads=spec.heads, kv_num_heads=spec.kv_heads, do_rotary=1,
            scale=spec.attention_scale, softcap=spec.attention_softcap, local_window_size=window or -1,
        )  # fmt: skip
        self._declare(present)
        attended = self._flat(attended, f"{path}.attended_rows", sizes[0])
        return self._linear(attended, path, "o_proj", [("o_proj", spec.width)]), present

    def _normed_heads(self, qkv: ir.Value, path: str, sizes: Sequence[int]) -> list[ir.Value]:
        """q, k and v; each head of q and k normed (GroupQueryAttention's own norm has no CPU kernel)."""
        net, dim = self.net, self.spec.head_dim
        names = [f"{path}.{which}" for which in "qkv"]
        split = net.constant("qkv_sizes", np.array(sizes, np.int64))
        parts = net.ops("Split", qkv, split, names=names, axis=-1)
        for place, which in enumerate("qk"):
            shape = net.constant("heads", np.array([-1, dim], np.int64))
            heads = net.op("Reshape", parts[place], shape, name=f"{names[place]}.heads")
            parts[place] = self._norm(heads, f"{path}.{which}_norm")
        parts = [self._apart(part, f"{name}.rows") for part, name in zip(parts, names, strict=True)]
        return parts

    def _declare(self, present: Sequence[ir.Value]) -> None:
        import onnx_ir as ir

        for value in present:
            value.shape = ir.Shape(("batch", self.spec.kv_heads, "capacity", self.spec.head_dim))
            value.dtype = ir.DataType.from_numpy(np.dtype(self.net.dtype))

    def _rotary(self, index: int) -> tuple[ir.Value, ir.Value]:
        frequencies = self.spec.frequencies[index]
        kind = "global" if frequencies is self.spec.frequencies[-1] else "local"
        angles = np.arange(self.spec.context)[:, None] * frequencies
        cos, sin = (self.net.floats(f"{name}_{kind}", f(angles)) for name, f in (("cos", np.cos), ("sin", np.sin)))
        return cos, sin

    def _mlp(self, x: ir.Value, path: str) -> ir.Value:
        spec, net, path = self.spec, self.net, f"{path}.mlp"
        if spec.packed:
            both = self._linear(x, path, "gate_up_proj", [("gate_up_proj", 2 * spec.inner)])
            gate, up = net.ops("Split", both, names=(f"{path}.gate", f"{path}.up"), axis=-1, num_outputs=2)
        else:  # apart: splitting one product's output costs more than the second node
            gate, up = (
                self._linear(x, path, f"{each}_proj", [(f"{each}_proj", spec.inner)]) for each in ("gate", "up")
            )
        if spec.activation == "silu":
            gate = net.op("QuickGelu", gate, name=f"{path}.act", domain=MICROSOFT, alpha=1.0)
        else:
            kind = "tanh" if spec.activation == "gelu_tanh" else "none"
            gate = net.op("Gelu", gate, name=f"{path}.act", approximate=kind)
        y = net.op("Mul", gate, up, name=f"{path}.gated")
        return self._linear(y, path, "down_proj", [("down_proj", spec.width)])

    def _linear(self, x: ir.Value, path: str, name: str, modules: Sequence[tuple[str, int]]) -> ir.Value:
        """The modules path.module side by side as one product."""
        paths = [f"{path}.{module}" for module, _ in modules]
        weight = np.concatenate([self.weights[f"{each}.weight"] for each in paths])
        rows = sum(size for _, size in modules)
        if len(weight) != rows:
            found = f"{len(weight)} rows instead of {rows}"
            raise ExportError(message(f"read {path}.{name}", found, "check the model's config.json"))
        bias = None
        if f"{paths[0]}.bias" in self.weights:
            bias = np.concatenate([self.weights[f"{each}.bias"] for each in paths])
        full = f"{path}.{name}"
        if self.options.precision in ("int4", "int8"):
            y = self.net.packed_product(x, self._pack(weight, name), full, bias)
        else:
            y = self.net.product(x, weight, full, bias)
        if not self.options.adapters:
            return y
        placed = [(each, size) for each, (_, size) in zip(paths, modules, strict=True)]
        return self.net.adapter(x, y, full, weight.shape[1], placed)

    def _pack(self, weight: Floats, name: str) -> fast_weights.Packed:
        size, columns = self.options.block_size, weight.shape[1]
        if name == "head" or self.options.precision == "int8":
            return fast_weights.pack_eight(fast_weights.eight_bits(weight, size), columns)
        blocks = fast_weights.four_bits(weight, size)
        return fast_weights.pack_four(blocks, columns, block_means=self.options.block_means)
