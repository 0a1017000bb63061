"""Frozen weights [out, in] in float32, bfloat16, int8 or NF4, and the linear layer over them.

Knows nothing of adapters. A weight that is held in few bits becomes dense for one product at a time, and
autograd keeps no dense copy of it.

NF4 (Dettmers et al., arXiv 2305.14314) has 16 levels, blocks of 64 weights that share a scale, and scales
in 8 bits, which share one of their own in groups of 256: 4.127 bits a weight. The codes are those of
bitsandbytes, bit for bit, and its kernel decodes them where it is installed and says the same. The 8-bit
code of the scales is linear here and a floating one there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear as product
from torch.nn.functional import pad

from edge_sdss.lm.piecewise import place

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["float32", "bfloat16", "float16", "int8", "nf4"]

_BLOCK, _GROUP = 64, 256
_CHUNK = 1 << 16  # weights that are encoded or decoded at a time: what they take besides fits a cache

# Quantiles of the normal distribution, scaled to [-1, 1] (arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class FrozenWeight(nn.Module):
    """A weight [out, in] that is never trained. Its buffers and parameters are all that it holds."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns the whole weight, [out, in], in `dtype`: a new tensor unless it is held so."""
        raise NotImplementedError

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x @ weight.T + bias, [..., out] for `x` [..., in], in the type of `x`. For no autograd."""
        return product(x, self.dense(x.dtype), bias)

    def transposed_matmul(self, gradient: Tensor) -> Tensor:
        """Returns gradient @ weight, [..., in] for `gradient` [..., out], in its type. For no autograd."""
        return gradient @ self.dense(gradient.dtype)

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))


class Dense(FrozenWeight):
    """Held as it is: the parameter itself where it is one, no copy."""

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape)
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See FrozenWeight."""
        return self.weight.to(dtype)


class Int8(FrozenWeight):
    """A row in 8 bits and a scale of 32: weight = codes * scales, codes from -127 to 127."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape)
        scales = torch.cat([weight[rows].abs().amax(1) for rows in _rows(weight.shape)]).float().div_(127)
        self.register_buffer("codes", torch.empty(weight.shape, dtype=torch.int8, device=weight.device))
        self.register_buffer("scales", scales)
        for rows in _rows(self.shape):
            # A row of zeros has the scale 0: 0 / 0 is no code, so it is divided by 1.
            divisor = torch.where(scales[rows] > 0, scales[rows], 1)[:, None]
            self.codes[rows] = (weight[rows].float() / divisor).round_().to(torch.int8)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See FrozenWeight."""
        found = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in _rows(self.shape):
            found[rows] = self.codes[rows].float().mul_(self.scales[rows, None])
        return found


class Nf4(FrozenWeight):
    """Two codes a byte, the first in the high bits; scales [groups, 256] int8 around their mean."""

    codes: Tensor
    scales: Tensor
    group_scales: Tensor
    mean: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape)
        flat = weight.reshape(-1)
        largest = torch.cat([_blocks(part).abs().amax(1) for part in flat.split(_CHUNK)])
        self.register_buffer("codes", torch.cat([_encode(part) for part in flat.split(_CHUNK)]))
        mean = largest.mean()
        groups = pad(largest - mean, (0, -len(largest) % _GROUP)).view(-1, _GROUP)
        group_scales = groups.abs().amax(1).div_(127)
        divisor = torch.where(group_scales > 0, group_scales, 1)[:, None]
        self.register_buffer("scales", (groups / divisor).round_().to(torch.int8))
        self.register_buffer("group_scales", group_scales)
        self.register_buffer("mean", mean)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See FrozenWeight."""
        usable = self.codes.is_cuda and dtype != torch.float64
        kernel = _kernel(self.codes.device) if usable else None
        return kernel(self, dtype) if kernel is not None else self.decoded(dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Returns `dense(dtype)` as this module computes it, in float32 before it is rounded to `dtype`."""
        found = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        groups_each = _CHUNK // (_BLOCK * _GROUP)
        for at, part in enumerate(found.view(-1).split(_CHUNK)):
            codes = self.codes[at * _CHUNK // 2 : (at + 1) * _CHUNK // 2]
            values = _pairs(codes.device).index_select(0, codes.int()).view(torch.float32).view(-1, _BLOCK)
            groups = slice(at * groups_each, (at + 1) * groups_each)
            values.mul_(self.block_scales(groups)[: len(values), None])
            part.copy_(values.view(-1)[: len(part)])
        return found

    def block_scales(self, groups: slice = slice(None)) -> Tensor:
        """Returns the scales of the blocks of some groups, float32; those that fill up the last group too."""
        scaled = self.scales[groups].float().mul_(self.group_scales[groups, None])
        return scaled.add_(self.mean).clamp_(min=0).view(-1)


class FrozenLinear(nn.Module):
    """A linear layer over a frozen weight, as `nn.Linear` computes it; `bias` [out] or None.

    While `idle`, nothing is computed and the result is any numbers: for who needs its place in a graph only.
    """

    idle = False

    def __init__(self, weight: FrozenWeight, bias: Tensor | None):
        super().__init__()
        self.weight = weight
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] for `x` [..., in]."""
        return frozen_matmul(x, self.weight, self.bias, idle=self.idle)


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, idle: bool) -> Tensor:
        ctx.weight = weight
        return x.new_empty(*x.shape[:-1], weight.shape[0]) if idle else weight.matmul(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.transposed_matmul(gradient), None, None, None


def frozen_matmul(x: Tensor, weight: FrozenWeight, bias: Tensor | None, *, idle: bool = False) -> Tensor:
    """Returns x @ weight.T + bias, differentiable in `x` alone, for which nothing is saved."""
    y: Tensor = _FrozenMatmul.apply(x, weight, bias, idle)  # type: ignore[no-untyped-call]
    return y


def freeze(weight: Tensor, kind: Kind) -> FrozenWeight:
    """Returns `weight` [out, in], held as `kind`; the argument itself where it is held so already."""
    weight = weight.detach()
    if kind == "int8":
        return Int8(weight)
    if kind == "nf4":
        return Nf4(weight)
    return Dense(weight.to(getattr(torch, kind)))


def quantise(model: nn.Module, layers: nn.Module, kind: Kind, compute: torch.dtype) -> None:
    """Holds the weights of `model` as `kind` from now on, one matrix after the other, so that none is there twice.

    int8 and NF4 are for the linears within `layers`; embeddings, head, norms and biases, and with them the
    activations, are in `compute`. float32 and bfloat16 are for all of it. Buffers stay as they are.
    """
    dense = kind not in ("int8", "nf4")
    # Paths and not modules: a list of these would keep every weight to the end.
    paths = [path for path, module in layers.named_modules() if isinstance(module, nn.Linear) and not dense]
    for path in paths:
        hold(layers, f"{path}.weight", layers.get_parameter(f"{path}.weight"), kind, compute)
    rest = getattr(torch, kind) if dense else compute
    for parameter in model.parameters():  # each once, and what is tied stays so
        parameter.data = parameter.data.to(rest)


def hold(model: nn.Module, path: str, tensor: Tensor, kind: Kind, compute: torch.dtype) -> None:
    """Puts a parameter into its place at `path` in the model: frozen, the weight of a linear as `kind`.

    Where `kind` is int8 or NF4, all else is in `compute`.
    """
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if kind in ("int8", "nf4") and isinstance(owner, nn.Linear) and name == "weight":
        above, _, child = parent.rpartition(".")
        frozen = FrozenLinear(freeze(tensor, kind), owner.bias)
        setattr(model.get_submodule(above), child, frozen.train(owner.training))
    else:
        place(model, path, tensor.to(compute if kind in ("int8", "nf4") else getattr(torch, kind)))


def _rows(shape: torch.Size) -> list[slice]:
    step = max(_CHUNK // shape[1], 1)
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _blocks(flat: Tensor) -> Tensor:
    """[blocks, 64] float32, the last filled up with zeros."""
    return pad(flat.float(), (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)


def _encode(flat: Tensor) -> Tensor:
    """The nearest level of each weight, two of them in a byte."""
    blocks = _blocks(flat)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=flat.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(largest > 0, largest, 1), between, out_int32=True)
    codes = codes.to(torch.uint8).view(-1, 2)
    return codes[:, 0].bitwise_left_shift(4).bitwise_or_(codes[:, 1])


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """[256] int64: what a byte of codes stands for, two float32 in one number, so one look-up finds both."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.cartesian_prod(levels, levels).view(torch.int64).view(-1)


@functools.cache
def _kernel(device: torch.device) -> Callable[[Nf4, torch.dtype], Tensor] | None:
    """bitsandbytes' decoder, where it is installed and decodes as we do. On a CPU it is no faster than ours."""
    try:
        theirs = importlib.import_module("bitsandbytes.functional")

        def decode(weight: Nf4, dtype: torch.dtype) -> Tensor:
            scales = weight.block_scales()[: -(-weight.shape.numel() // _BLOCK)]
            state = theirs.QuantState(scales, weight.shape, blocksize=_BLOCK, quant_type="nf4", dtype=dtype)
            found: Tensor = theirs.dequantize_4bit(weight.codes.view(-1, 1), state)
            return found

        sample = Nf4(torch.linspace(-1, 1, 2 * _BLOCK, device=device).view(2, _BLOCK))
        return decode if torch.equal(decode(sample, torch.float32), sample.decoded(torch.float32)) else None
    except Exception:  # not installed, built for another CUDA, a library of the system missing, ...
        return None
