"""Writes nodes, constants and linears of the fast graph with onnx-ir. Knows no model and no family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdss.bundles.manifest import Site
from edge_sdss.exporting import fast_weights as weights
from edge_sdss.exporting.blocks import Floats

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level with the fast kernels


class Net:
    """A graph that grows node by node. `dtype` is that of activations: float32 or float16."""

    def __init__(self, dtype: type[np.floating[Any]]):
        self.dtype = dtype
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.sites: list[Site] = []
        self._values: dict[str, ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        """Adds a node with one output, called as the node is, and returns that output."""
        return self.ops(kind, *inputs, names=(name,), domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, names: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """Adds a node with an output for each name; an empty name is an output left out."""
        import onnx_ir as ir

        outputs = [ir.val(name) for name in names]
        self.nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=outputs, name=f"/{names[0]}"))
        return outputs

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """Returns the constant of this name, which is stored once."""
        import onnx_ir as ir

        if name not in self.constants:
            tensor = ir.tensor(np.asarray(array, order="C"), name=name)
            value = ir.val(name, const_value=tensor)
            self.constants[name] = value
        return self.constants[name]

    def floats(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """Returns a constant in the dtype of activations."""
        return self.constant(name, array.astype(self.dtype))

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> ir.Value:
        """Adds an input and returns it."""
        import onnx_ir as ir

        value = ir.val(name, ir.DataType.from_numpy(np.dtype(dtype)), shape)
        self.inputs.append(value)
        return value

    def narrow(self, name: str, array: Floats) -> ir.Value:
        """Returns a constant stored in float16 where that is exact; ONNX Runtime widens it once, when it loads."""
        half = array.astype(np.float16)
        if self.dtype is np.float16 or not np.array_equal(half.astype(np.float32), array):
            return self.floats(name, array)
        if name not in self._values:
            self._values[name] = self.op("Cast", self.constant(name, half), name=f"{name}.wide", to=1)
        return self._values[name]

    def product(self, x: ir.Value, weight: Floats, name: str, bias: Floats | None) -> ir.Value:
        """x [.., columns] times weight [rows, columns] in floats."""
        y = self.op("MatMul", x, self.floats(f"{name}.weight", weight.T), name=f"{name}.product")
        return y if bias is None else self.op("Add", y, self.floats(f"{name}.bias", bias), name=f"{name}.biased")

    def packed_product(self, x: ir.Value, packed: weights.Packed, name: str, bias: Floats | None) -> ir.Value:
        """x [.., columns] times a weight of 4 or 8 bits."""
        columns = packed.columns
        if packed.block_means:
            x, columns = self._with_block_means(x, packed)
        points = packed.zero_points
        inputs: list[ir.Value | None] = [
            x,
            self.constant(f"{name}.codes", packed.codes),
            self.narrow(f"{name}.scales", packed.scales),
            None if points is None else self.constant(f"{name}.zero_points", points),
        ]
        if bias is not None:
            inputs += [None, self.floats(f"{name}.bias", bias)]
        return self.op(
            "MatMulNBits", *inputs, name=f"{name}.product", domain=MICROSOFT, K=columns,
            N=len(packed.codes), bits=packed.bits, block_size=packed.block_size, accuracy_level=_INT8_ACTIVATIONS,
        )  # fmt: skip

    def _with_block_means(self, x: ir.Value, packed: weights.Packed) -> tuple[ir.Value, int]:
        """x [rows, columns], behind it the mean of each block of columns, and how many columns that makes.

        In float16, which is for GPUs, zeros fill the last block: CUDA's kernel for single tokens wants columns by
        eights.
        """
        size, name, columns = packed.block_size, f"{x.name}.extended", packed.columns
        inputs = columns * size // (size + 1)
        if self.dtype is np.float16:
            columns = packed.codes.shape[1] * size
        if name not in self._values:
            means = self._means(x, inputs, size, columns - inputs)
            self._values[name] = self.op("Concat", x, means, name=name, axis=-1)
        return self._values[name], columns

    def _means(self, x: ir.Value, inputs: int, size: int, means: int) -> ir.Value:
        """The means of x's blocks, by nodes that read no matrix; where zeros have to follow, by a product."""
        if means * size != inputs:
            pool = np.zeros((inputs, means))
            pool[np.arange(inputs), np.arange(inputs) // size] = 1 / size
            return self.op("MatMul", x, self.floats(f"pool_{inputs}", pool), name=f"{x.name}.means")
        shape = self.constant(f"blocks_{means}_{size}", np.array([-1, means, size], np.int64))
        blocks = self.op("Reshape", x, shape, name=f"{x.name}.blocks")
        axis = self.constant("block_axis", np.array([2], np.int64))
        return self.op("ReduceMean", blocks, axis, name=f"{x.name}.means", keepdims=0)

    def adapter(self, x: ir.Value, y: ir.Value, name: str, inputs: int, modules: Sequence[tuple[str, int]]) -> ir.Value:
        """Returns y + (x A) B. A and B are inputs whose defaults have rank 0; `modules` share them, side by side.

        A node of decoding costs microseconds whatever it computes, so product and sum are one, except in float16: of
        a rank of 0, CUDA's Gemm makes a product whose leading dimension cuBLAS refuses.
        """
        outputs = sum(size for _, size in modules)
        a, b = (
            self._optional(f"{name}.lora_{which}", shape, rank_axis)
            for which, shape, rank_axis in (("A", (inputs, 0), 1), ("B", (0, outputs), 0))
        )
        start = 0
        for module, size in modules:
            site = Site(
                module=module, inputs=inputs, outputs=size, lora_a=a.name or "", lora_b=b.name or "", start=start
            )
            self.sites.append(site)
            start += size
        inner = self.op("MatMul", x, a, name=f"{name}.lora_inner")
        if self.dtype is np.float16:
            return self.op("Add", y, self.op("MatMul", inner, b, name=f"{name}.lora_outer"), name=f"{name}.adapted")
        return self.op("Gemm", inner, b, y, name=f"{name}.adapted")

    def _optional(self, name: str, shape: tuple[int, int], rank_axis: int) -> ir.Value:
        dims: list[int | str] = list(shape)
        dims[rank_axis] = f"{name[: -len('.lora_A')]}.rank"
        value = self.input(name, self.dtype, dims)
        import onnx_ir as ir

        value.const_value = ir.tensor(np.zeros(shape, self.dtype), name=name)
        self.constants[name] = value
        return value
