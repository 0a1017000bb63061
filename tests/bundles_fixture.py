"""A tiny Llama as a bundle, written with onnx alone, and the same computed with NumPy, for tests without torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny import TEMPLATE, byte_pairs

from edge_sdss import bundles
from edge_sdss.bundles import Graph, Manifest, Site, adapters
from edge_sdss.files import sha256

Array = np.ndarray[Any, Any]

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
EPSILON = 1e-6
BASE = "b" * 64


@dataclass(frozen=True)
class Tiny:
    """Weights by their names in transformers' Llama, float32, and the model's shape."""

    weights: dict[str, Array]
    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 400
    context: int = 512
    theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def linear(self, layer: int, name: str) -> Array:
        """[inputs, outputs]"""
        return self.weights[f"model.layers.{layer}.{name}.weight"].T

    def angles(self) -> tuple[Array, Array]:
        """cos and sin, [context, head_dim / 2]"""
        rates = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        at = np.arange(self.context)[:, None] * rates
        return np.cos(at).astype(np.float32), np.sin(at).astype(np.float32)


def random_tiny(seed: int = 0, *, vocabulary: int = 400, context: int = 512) -> Tiny:
    """Weights large enough that answers vary."""
    draws = np.random.default_rng(seed)
    shape = Tiny({}, vocabulary=vocabulary, context=context)
    d, kv = shape.width, shape.kv_heads * shape.head_dim
    sizes = dict(zip(PROJECTIONS, ((d, d), (kv, d), (kv, d), (d, d), (2 * d, d), (2 * d, d), (d, 2 * d)), strict=True))
    weights = {
        "model.embed_tokens.weight": draws.normal(0, 0.3, (vocabulary, d)),
        "model.norm.weight": draws.normal(1, 0.2, d),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        weights |= {at + "input_layernorm.weight": np.ones(d), at + "post_attention_layernorm.weight": np.ones(d)}
        weights |= {f"{at}{name}.weight": draws.normal(0, 0.15, size) for name, size in sizes.items()}
    return Tiny({k: v.astype(np.float32) for k, v in weights.items()}, vocabulary=vocabulary, context=context)


def hf_tiny(folder: Path) -> Tiny:
    """The weights of a Llama folder such as `tiny.tiny_model` writes."""
    from safetensors.numpy import load_file

    c = json.loads((folder / "config.json").read_text())
    return Tiny(
        load_file(folder / "model.safetensors"),
        c["num_hidden_layers"],
        c["hidden_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
        c["vocab_size"],
        c["max_position_embeddings"],
        c.get("rope_theta") or c["rope_parameters"]["rope_theta"],
    )


def sites(tiny: Tiny) -> tuple[Site, ...]:
    found = []
    for layer in range(tiny.layers):
        for name in PROJECTIONS:
            inputs, outputs = tiny.linear(layer, name).shape
            at = f"lora.{layer}.{name.rpartition('.')[2]}"
            found.append(
                Site(
                    module=f"model.layers.{layer}.{name}",
                    inputs=inputs,
                    outputs=outputs,
                    lora_a=f"{at}.A",
                    lora_b=f"{at}.B",
                )
            )
    return tuple(found)


def random_adapter(tiny: Tiny, rank: int = 4, seed: int = 0, size: float = 0.3, only: str = "") -> dict[str, Array]:
    """Tensors by the graph's input names; `only`: of the modules whose name holds it."""
    draws = np.random.default_rng(seed)
    tensors = {}
    for site in sites(tiny):
        if only in site.module:
            tensors[site.lora_a] = draws.normal(0, size, (site.inputs, rank)).astype(np.float32)
            tensors[site.lora_b] = draws.normal(0, size, (rank, site.outputs)).astype(np.float32)
    return tensors


def write_adapter(file: Path, tensors: dict[str, Array], fingerprint: str = BASE) -> Path:
    """Writes an .onnx_adapter file."""
    adapters.write(file, tensors, fingerprint)
    return file


def reference(tiny: Tiny, ids: list[int], adapter: dict[str, Array] | None = None) -> tuple[Array, Array]:
    """Logits [n, V] and hidden states [n, d] in float64, the whole sequence at once, written from the formulas."""
    w = {name: value.astype(np.float64) for name, value in tiny.weights.items()}
    adapter = adapter or {}
    n, hd = len(ids), tiny.head_dim
    cos, sin = (table[:n, None] for table in tiny.angles())

    def norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight

    def linear(x: Array, layer: int, name: str) -> Array:
        at = f"lora.{layer}.{name.rpartition('.')[2]}"
        y = x @ tiny.linear(layer, name).astype(np.float64)
        return y + x @ adapter[f"{at}.A"] @ adapter[f"{at}.B"] if f"{at}.A" in adapter else y

    def turned(x: Array) -> Array:
        a, b = x[..., : hd // 2], x[..., hd // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(tiny.layers):
        h = norm(x, w[f"model.layers.{i}.input_layernorm.weight"])
        q, k, v = (linear(h, i, f"self_attn.{p}_proj").reshape(n, -1, hd) for p in "qkv")
        q, k = turned(q), turned(k)
        out = np.empty_like(q)
        for head in range(tiny.heads):
            group = head * tiny.kv_heads // tiny.heads
            s = q[:, head] @ k[:, group].T / np.sqrt(hd) + np.triu(np.full((n, n), -np.inf), 1)
            p = np.exp(s - s.max(-1, keepdims=True))
            out[:, head] = p / p.sum(-1, keepdims=True) @ v[:, group]
        x = x + linear(out.reshape(n, -1), i, "self_attn.o_proj")
        h = norm(x, w[f"model.layers.{i}.post_attention_layernorm.weight"])
        gate = linear(h, i, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, i, "mlp.up_proj"), i, "mlp.down_proj")
    hidden = norm(x, w["model.norm.weight"])
    return hidden @ w["model.embed_tokens.weight"].T, hidden


class _Net:
    """Collects nodes and weights; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        outputs = outputs or [f"v{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs[0]

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))


def _norm(net: _Net, x: str, weight: Array) -> str:
    mean = net.op("ReduceMean", net.op("Mul", x, x), net.ints(-1), keepdims=1)
    root = net.op("Sqrt", net.op("Add", mean, net.constant(np.float32(EPSILON))))
    return net.op("Mul", net.op("Div", x, root), net.constant(weight))


def _linear(net: _Net, tiny: Tiny, x: str, layer: int, name: str) -> str:
    at = f"lora.{layer}.{name.rpartition('.')[2]}"
    weight = np.ascontiguousarray(tiny.linear(layer, name))
    net.constant(np.zeros((weight.shape[0], 0), np.float32), f"{at}.A")
    net.constant(np.zeros((0, weight.shape[1]), np.float32), f"{at}.B")
    change = net.op("MatMul", net.op("MatMul", x, f"{at}.A"), f"{at}.B")
    return net.op("Add", net.op("MatMul", x, net.constant(weight)), change)


def _turned(net: _Net, x: str, cos: str, sin: str, half: int) -> str:
    a = net.op("Slice", x, net.ints(0), net.ints(half), net.ints(-1))
    b = net.op("Slice", x, net.ints(half), net.ints(2 * half), net.ints(-1))
    left = net.op("Sub", net.op("Mul", a, cos), net.op("Mul", b, sin))
    right = net.op("Add", net.op("Mul", b, cos), net.op("Mul", a, sin))
    return net.op("Concat", left, right, axis=-1)


def _plain_attention(net: _Net, tiny: Tiny, qkv: list[str], layer: int, common: dict[str, str]) -> str:
    hd, kv, group = tiny.head_dim, tiny.kv_heads, tiny.heads // tiny.kv_heads
    split = [net.op("Transpose", net.op("Reshape", x, net.ints(0, 0, -1, hd)), perm=[0, 2, 1, 3]) for x in qkv]
    q, k = (_turned(net, x, common["cos"], common["sin"], hd // 2) for x in split[:2])
    past = f"past_key_values.{layer}."
    k = net.op("Concat", past + "key", k, axis=2, outputs=[f"present.{layer}.key"])
    v = net.op("Concat", past + "value", split[2], axis=2, outputs=[f"present.{layer}.value"])
    q = net.op("Reshape", q, net.op("Concat", common["rows"], net.ints(kv, group), common["new"], net.ints(hd), axis=0))
    k = net.op("Transpose", net.op("Unsqueeze", k, net.ints(2)), perm=[0, 1, 2, 4, 3])
    scores = net.op("Mul", net.op("MatMul", q, k), net.constant(np.float32(hd**-0.5)))
    weights = net.op("Softmax", net.op("Add", scores, common["bias"]), axis=-1)
    out = net.op("MatMul", weights, net.op("Unsqueeze", v, net.ints(2)))
    shape = net.op("Concat", common["rows"], net.ints(tiny.heads), common["new"], net.ints(hd), axis=0)
    out = net.op("Transpose", net.op("Reshape", out, shape), perm=[0, 2, 1, 3])
    return net.op("Reshape", out, net.ints(0, 0, -1))


def _grouped_attention(net: _Net, tiny: Tiny, qkv: list[str], layer: int, common: dict[str, str]) -> str:
    past, present = f"past_key_values.{layer}.", f"present.{layer}."
    given = [*qkv, past + "key", past + "value", common["filled"], common["total32"], common["cos"], common["sin"]]
    out = f"attention.{layer}"
    return net.op(
        "GroupQueryAttention", *given, outputs=[out, present + "key", present + "value"], domain="com.microsoft",
        num_heads=tiny.heads, kv_num_heads=tiny.kv_heads, do_rotary=1,
    )  # fmt: skip


def _common(net: _Net, tiny: Tiny, shared: bool) -> dict[str, str]:
    cos, sin = tiny.angles()
    total = net.op("Shape", "attention_mask", start=1, end=2)
    if shared:
        ones = net.op("ReduceSum", "attention_mask", net.ints(1), keepdims=0)
        filled = net.op("Cast", net.op("Sub", ones, net.ints(1)), to=TensorProto.INT32)
        total32 = net.op("Cast", net.op("Squeeze", total), to=TensorProto.INT32)
        return {"filled": filled, "total32": total32, "cos": net.constant(cos), "sin": net.constant(sin)}
    tables = [net.op("Gather", net.constant(table), "position_ids") for table in (cos, sin)]
    new = net.op("Shape", "input_ids", start=1, end=2)
    one, end = net.constant(np.int64(1)), net.op("Squeeze", total)
    keys = net.op("Range", net.constant(np.int64(0)), end, one)
    asks = net.op("Range", net.op("Sub", end, net.op("Squeeze", new)), end, one)
    causal = net.op("LessOrEqual", keys, net.op("Unsqueeze", asks, net.ints(1)))
    real = net.op("Unsqueeze", net.op("Cast", "attention_mask", to=TensorProto.BOOL), net.ints(1, 2, 3))
    bias = net.op("Where", net.op("And", causal, real), net.constant(np.float32(0)), net.constant(np.float32(-1e9)))
    return {
        "cos": net.op("Unsqueeze", tables[0], net.ints(1)),
        "sin": net.op("Unsqueeze", tables[1], net.ints(1)),
        "bias": bias,
        "new": new,
        "rows": net.op("Shape", "input_ids", start=0, end=1),
    }


def write_graph(file: Path, tiny: Tiny, *, shared: bool, hidden_states: bool, last_logits_only: bool) -> None:
    """Writes the model as ONNX, see `edge_sdss.bundles.Graph`."""
    net = _Net()
    common = _common(net, tiny, shared)
    w = tiny.weights
    x = net.op("Gather", net.constant(w["model.embed_tokens.weight"], "embedding"), "input_ids")
    attention = _grouped_attention if shared else _plain_attention
    for i in range(tiny.layers):
        h = _norm(net, x, w[f"model.layers.{i}.input_layernorm.weight"])
        qkv = [_linear(net, tiny, h, i, f"self_attn.{p}_proj") for p in "qkv"]
        x = net.op("Add", x, _linear(net, tiny, attention(net, tiny, qkv, i, common), i, "self_attn.o_proj"))
        h = _norm(net, x, w[f"model.layers.{i}.post_attention_layernorm.weight"])
        gate = _linear(net, tiny, h, i, "mlp.gate_proj")
        gate = net.op("Mul", gate, net.op("Sigmoid", gate))
        up = net.op("Mul", gate, _linear(net, tiny, h, i, "mlp.up_proj"))
        x = net.op("Add", x, _linear(net, tiny, up, i, "mlp.down_proj"))
    hidden = net.op("Identity", _norm(net, x, w["model.norm.weight"]), outputs=["hidden_states"])
    if last_logits_only:
        hidden = net.op("Slice", hidden, net.ints(-1), net.ints(1 << 40), net.ints(1))
    net.op("MatMul", hidden, net.op("Transpose", "embedding", perm=[1, 0]), outputs=["logits"])
    _save(net, file, tiny, shared, hidden_states)


def _save(net: _Net, file: Path, tiny: Tiny, shared: bool, hidden_states: bool) -> None:
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    value = helper.make_tensor_value_info
    kv = ["batch", tiny.kv_heads, "past", tiny.head_dim]
    ids = [("input_ids", "new"), ("attention_mask", "total"), *([] if shared else [("position_ids", "new")])]
    inputs = [value(name, i64, ["batch", length]) for name, length in ids]
    outputs = [value("logits", f32, ["batch", "given", tiny.vocabulary])]
    for i in range(tiny.layers):
        inputs += [value(f"past_key_values.{i}.{part}", f32, kv) for part in ("key", "value")]
        outputs += [value(f"present.{i}.{part}", f32, [*kv[:2], "full", kv[3]]) for part in ("key", "value")]
    if hidden_states:
        outputs.append(value("hidden_states", f32, ["batch", "new", tiny.width]))
    for site in sites(tiny):  # optional: graph input and initialiser of one name
        inputs.append(value(site.lora_a, f32, [site.inputs, f"rank.{site.lora_a[:-2]}"]))
        inputs.append(value(site.lora_b, f32, [f"rank.{site.lora_a[:-2]}", site.outputs]))
    graph = helper.make_graph(net.nodes, "tiny", inputs, outputs, net.weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(file))


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> int:
    """Writes a byte-level BPE with three special tokens; returns its size."""
    bpe = byte_pairs()
    bpe.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return int(bpe.get_vocab_size())


def write_bundle(
    folder: Path,
    *,
    tiny: Tiny | None = None,
    tokenizer: Path | None = None,
    kv_cache: str = "growing",
    hidden_states: bool = True,
    last_logits_only: bool = False,
    template: str | None = TEMPLATE,
    context: int = 512,
    **manifest: Any,
) -> Path:
    """Writes a whole bundle, with random weights where none are given, and returns its folder.

    `tokenizer`: a folder whose tokenizer is taken. `manifest`: fields of the manifest in place of the usual ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        size = write_tokenizer(folder, template=template)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, folder / name)
        size = 0
    tiny = tiny or random_tiny(vocabulary=size, context=context)
    shared = kv_cache == "shared"
    write_graph(
        folder / "model.onnx", tiny, shared=shared, hidden_states=hidden_states, last_logits_only=last_logits_only
    )
    graph = Graph(
        precision="float32",
        kv_cache="shared" if shared else "growing",
        position_ids=not shared,
        hidden_states=hidden_states,
        last_logits_only=last_logits_only,
        layers=tiny.layers,
        kv_heads=tiny.kv_heads,
        head_dim=tiny.head_dim,
        vocabulary=tiny.vocabulary,
        width=tiny.width,
        context=tiny.context,
        sites=sites(tiny),
    )
    files = sorted(file for file in folder.iterdir() if file.is_file())
    values: dict[str, Any] = {
        "base": "tiny",
        "base_fingerprint": BASE,
        "tokenizer_sha256": sha256(folder / "tokenizer.json"),
        "recipe": "onnxruntime-cpu",
        "graph": graph,
        "files": [bundles.entry(folder, file.name) for file in files],
    }
    bundles.write(folder, Manifest(**values | manifest))
    return folder
