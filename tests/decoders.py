"""A decoder of two layers as one static graph, with faults that can be planted, for the tests of exporting.explain."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
LAYERS, HEADS, SIZE, WIDTH, INNER, TOKENS, PAST, RANK = 2, 2, 8, 16, 32, 6, 4, 2
MASKED = -100.0
LORA = tuple(f"layers.{layer}.attn.q.lora_{side}" for layer in range(LAYERS) for side in "AB")


def weights(seed: int = 0) -> dict[str, Array]:
    """All weights, as MatMul takes them: [inputs, outputs]."""
    draw = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
    mlp = {"gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
    for layer in range(LAYERS):
        for part, group in (("attn", shapes), ("mlp", mlp)):
            for name, shape in group.items():
                found[f"layers.{layer}.{part}.{name}.weight"] = draw.normal(0, shape[0] ** -0.5, shape)
            found[f"layers.{layer}.{part}.norm.weight"] = draw.uniform(0.5, 1.5, WIDTH)
    return {name: array.astype(np.float32) for name, array in found.items()}


def rotary(positions: Array) -> tuple[Array, Array]:
    """cos and sin [1, 1, n, SIZE]; the first half of sin is negative, since the halves change places without a sign."""
    angles = np.outer(positions, 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE))
    cos, sin = np.cos(angles), np.sin(angles)
    both = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
    return both[0][None, None].astype(np.float32), both[1][None, None].astype(np.float32)


def feeds(
    seed: int, *, masked: float = MASKED, offset: int = 0, adapter: float = 1.0, scale: float = 1.0
) -> dict[str, Array]:
    """What the graph takes. `offset` is added to positions, `adapter` and `scale` multiply LoRA matrices and tokens."""
    draw = np.random.default_rng(seed)
    cos, sin = rotary(np.arange(PAST, PAST + TOKENS) + offset)
    before = np.arange(PAST + TOKENS)[None] <= np.arange(PAST, PAST + TOKENS)[:, None]
    found = {
        "x": draw.normal(0, scale, (1, TOKENS, WIDTH)),
        "cos": cos,
        "sin": sin,
        "mask": np.where(before, 0.0, masked)[None, None],
    }
    for layer in range(LAYERS):
        for what in ("key", "value"):
            found[f"past.{layer}.{what}"] = draw.normal(0, 1, (1, HEADS, PAST, SIZE))
    fixed = np.random.default_rng(99)  # one adapter for all texts
    for name in LORA:
        shape = (WIDTH, RANK) if name.endswith("A") else (RANK, WIDTH)
        found[name] = fixed.normal(0, 0.5, shape) * (adapter if name.endswith("B") else 1)
    return {name: array.astype(np.float32) for name, array in found.items()}


@dataclass
class Decoder:
    """Builds the graph. `norm`: "div", "reciprocal" or "fused"; `faults` are names of what is planted.

    `steps`: Softmax written out.
    """

    norm: str = "div"
    steps: bool = False
    faults: frozenset[str] = frozenset()
    constant_mask: float | None = None
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Writes the graph and returns where."""
        self.constants.update(weights())
        hidden = "x"
        outputs = []
        for layer in range(LAYERS):
            hidden = self.layer(hidden, f"layers.{layer}")
        outputs = [hidden, *(f"layers.{layer}.attn.k_rope" for layer in range(LAYERS))]
        given = feeds(0)
        if self.constant_mask is not None:
            self.constants["mask"] = feeds(0, masked=self.constant_mask)["mask"]
            del given["mask"]
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in given.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opset = 23 if self.norm == "fused" else 18
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def const(self, values: Any, kind: Any = np.float32) -> str:
        array = np.asarray(values, kind)
        name = f"const.{array.dtype}.{array.ravel().tolist()}.{array.ndim}"
        self.constants[name] = array
        return name

    def rms(self, x: str, at: str) -> str:
        weight = f"{at}.weight"
        if self.norm == "fused":
            return self.op("RMSNormalization", [x, weight], at, axis=-1, epsilon=1e-5)
        mean = self.op("ReduceMean", [self.op("Mul", [x, x], f"{at}.square"), self.const([-1], np.int64)], f"{at}.mean")
        root = self.op("Sqrt", [self.op("Add", [mean, self.const(1e-5)], f"{at}.eps")], f"{at}.root")
        if self.norm == "reciprocal":
            scaled = self.op("Mul", [x, self.op("Reciprocal", [root], f"{at}.reciprocal")], f"{at}.scaled")
        else:
            scaled = self.op("Div", [x, root], f"{at}.scaled")
        return self.op("Mul", [scaled, weight], at)

    def heads(self, y: str) -> str:
        split = self.op("Reshape", [y, self.const([1, TOKENS, HEADS, SIZE], np.int64)], f"{y}_split")
        return self.op("Transpose", [split], f"{y}_heads", perm=[0, 2, 1, 3])

    def rope(self, y: str) -> str:
        half = SIZE // 2
        ends = [self.const([n], np.int64) for n in (0, half, SIZE, 3)]
        low = self.op("Slice", [y, ends[0], ends[1], ends[3]], f"{y}_low")
        high = self.op("Slice", [y, ends[1], ends[2], ends[3]], f"{y}_high")
        turned = self.op("Mul", [self.op("Concat", [high, low], f"{y}_turned", axis=3), "sin"], f"{y}_sin")
        return self.op("Add", [self.op("Mul", [y, "cos"], f"{y}_cos"), turned], y.replace("_heads", "_rope"))

    def attention(self, x: str, at: str, layer: str) -> str:
        q, k, v = (
            self.op("MatMul", [x, f"{at}.{one}.weight"], f"{at}.{one}0" if one == "q" else f"{at}.{one}")
            for one in "qkv"
        )
        low = self.op("MatMul", [x, f"{at}.q.lora_A"], f"{at}.q.low")
        delta = self.op("MatMul", [low, f"{at}.q.lora_B"], f"{at}.q.delta")
        if "lora" in self.faults and layer == "0":
            q = self.op("Add", [q, self.const(0)], f"{at}.q")
        else:
            q = self.op("Add", [q, delta], f"{at}.q")
        q, k, v = self.rope(self.heads(q)), self.rope(self.heads(k)), self.heads(v)
        both = [f"past.{layer}.key", k]
        keys = self.op("Concat", both[::-1] if "slots" in self.faults else both, f"{at}.keys", axis=2)
        values = self.op("Concat", [f"past.{layer}.value", v], f"{at}.values", axis=2)
        turned = self.op("Transpose", [keys], f"{at}.keys_turned", perm=[0, 1, 3, 2])
        scores = self.op("Mul", [self.op("MatMul", [q, turned], f"{at}.dot"), self.const(SIZE**-0.5)], f"{at}.scores")
        masked = self.op("Add", [scores, "mask"], f"{at}.masked")
        context = self.op("MatMul", [self.softmax(masked, at), values], f"{at}.context")
        flat = self.op("Transpose", [context], f"{at}.flat", perm=[0, 2, 1, 3])
        joined = self.op("Reshape", [flat, self.const([1, TOKENS, WIDTH], np.int64)], f"{at}.joined")
        return self.op("MatMul", [joined, f"{at}.o.weight"], f"{at}.o")

    def softmax(self, x: str, at: str) -> str:
        if not self.steps:
            return self.op("Softmax", [x], f"{at}.weights", axis=-1)
        last = self.const([-1], np.int64)
        below = self.op("Sub", [x, self.op("ReduceMax", [x, last], f"{at}.greatest")], f"{at}.below")
        exp = self.op("Exp", [below], f"{at}.exp")
        return self.op("Div", [exp, self.op("ReduceSum", [exp, last], f"{at}.total")], f"{at}.weights")

    def layer(self, x: str, at: str) -> str:
        number = at.rpartition(".")[2]
        x = self.op("Add", [x, self.attention(self.rms(x, f"{at}.attn.norm"), f"{at}.attn", number)], f"{at}.attn.sum")
        inner = self.rms(x, f"{at}.mlp.norm")
        gate, up = (self.op("MatMul", [inner, f"{at}.mlp.{one}.weight"], f"{at}.mlp.{one}") for one in ("gate", "up"))
        acted = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{at}.mlp.sigmoid")], f"{at}.mlp.act")
        down = self.op(
            "MatMul", [self.op("Mul", [acted, up], f"{at}.mlp.inner"), f"{at}.mlp.down.weight"], f"{at}.mlp.down"
        )
        return self.op("Add", [x, down], f"{at}.out")


def quantise(source: Path, target: Path, texts: list[dict[str, Array]]) -> Path:
    """QDQ with symmetric int16 activations and int8 weights by channel, as onnxruntime's quantiser writes it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.left = iter(texts)

        def get_next(self) -> Any:
            return next(self.left, None)

        def rewind(self) -> None:
            self.left = iter(texts)

    model = onnx.load(source)
    held = {one.name for one in model.graph.initializer}
    axes = [{"axis": 1, "quant_type": QuantType.QInt8, "symmetric": True}]
    by_channel = {n.input[1]: axes for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in held}
    config = get_qnn_qdq_config(
        source,
        Reader(),
        activation_type=QuantType.QInt16,
        weight_type=QuantType.QInt8,
        activation_symmetric=True,
        init_overrides=by_channel,
    )
    quantize(source, target, config)
    return target


def edit(source: Path, target: Path, change: Any) -> Path:
    """Writes a graph after `change(model)`."""
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target


def scaled(name: str, factor: float) -> Any:
    """Returns a change that multiplies one stored constant."""

    def change(model: Any) -> None:
        (tensor,) = [one for one in model.graph.initializer if one.name == name]
        tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * factor).astype(np.float32), name))

    return change
