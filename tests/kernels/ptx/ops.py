"""What each arithmetic instruction of PTX computes, by its full name: (result type, operand types, function).

The functions take and return NumPy arrays or scalars of those types. A name that is not here is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Op = tuple[str, tuple[str, ...], Callable[..., Any]]

DTYPES = {"pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16}
DTYPES |= {"b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64}
DTYPES |= {"f16": np.float16, "f32": np.float32, "f64": np.float64}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
TINY = np.float32(2.0**-126)


class DivisionByZero(Exception):
    """An integer divided by zero; PTX leaves the result open. Raised with the lanes."""


def flush(x: Any) -> Any:
    """`.ftz`: denormal float32 become zero."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def fma(a: Any, b: Any, c: Any) -> Any:
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def divide(a: Any, b: Any) -> Any:
    """Integers, towards zero; the quotient by zero is all ones, as on hardware."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~np.zeros((), a.dtype), quotient)


def shift(function: Callable[..., Any], bits: int) -> Callable[..., Any]:
    def by(x: Any, amount: Any) -> Any:
        amount = np.uint32(amount)
        last = x.dtype.type(bits - 1)
        if function is np.right_shift and x.dtype.kind == "i":
            return function(x, np.minimum(amount.astype(x.dtype), last))
        return np.where(amount < bits, function(x, np.minimum(amount.astype(x.dtype), last)), x.dtype.type(0))

    return by


def arithmetic() -> dict[str, Op]:
    ops: dict[str, Op] = {}
    for t in INTEGERS:
        bits = np.dtype(DTYPES[t]).itemsize * 8
        for name, function in {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "div": divide}.items():
            ops[f"{name}.{t}"] = (t, (t, t), function)
        ops[f"mad.lo.{t}"] = (t, (t, t, t), lambda a, b, c: a * b + c)
        ops[f"min.{t}"], ops[f"max.{t}"] = (t, (t, t), np.minimum), (t, (t, t), np.maximum)
        ops[f"neg.{t}"] = (t, (t,), np.negative)
        ops[f"shr.{t}"] = (t, (t, "u32"), shift(np.right_shift, bits))
        if t in WIDER:
            wide = WIDER[t]
            ops[f"mul.wide.{t}"] = (wide, (t, t), widening(wide, lambda a, b: a * b))
            ops[f"mad.wide.{t}"] = (wide, (t, t, wide), widening(wide, lambda a, b, c: a * b + c))
    for t in ("b16", "b32", "b64", "pred"):
        ops |= {f"{name}.{t}": (t, (t, t), getattr(np, f"bitwise_{name}")) for name in ("and", "or", "xor")}
        ops[f"not.{t}"] = (t, (t,), np.invert)
    for t in ("b16", "b32", "b64"):
        bits = np.dtype(DTYPES[t]).itemsize * 8
        ops[f"shl.{t}"] = (t, (t, "u32"), shift(np.left_shift, bits))
        ops[f"shr.{t}"] = (t, (t, "u32"), shift(np.right_shift, bits))
    return ops


def widening(to: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: function(*(v.astype(DTYPES[to]) for v in values))


def floating() -> dict[str, Op]:
    f = "f32"
    ops: dict[str, Op] = {
        "fma.rn.f32": (f, (f, f, f), fma),
        "neg.f32": (f, (f,), np.negative),
        "abs.f32": (f, (f,), np.abs),
        "min.f32": (f, (f, f), np.fmin),
        "max.f32": (f, (f, f), np.fmax),
        "max.NaN.f32": (f, (f, f), np.maximum),
        "sqrt.rn.f32": (f, (f,), np.sqrt),
        "rcp.rn.f32": (f, (f,), lambda x: np.float32(1) / x),
        "ex2.approx.ftz.f32": (f, (f,), lambda x: flush(np.exp2(flush(x)))),
        "lg2.approx.ftz.f32": (f, (f,), lambda x: np.log2(flush(x))),
    }
    for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}.items():
        ops[f"{name}.rn.f32"] = (f, (f, f), function)
        if name != "div":
            ops[f"{name}.f32"] = (f, (f, f), function)
    return ops


def comparisons() -> dict[str, Op]:
    plain = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    plain |= {"gt": np.greater, "ge": np.greater_equal}
    ops: dict[str, Op] = {}
    for name, function in plain.items():
        for t in (*INTEGERS, "b16", "b32", "b64") if name in ("eq", "ne") else INTEGERS:
            ops[f"setp.{name}.{t}"] = ("pred", (t, t), function)
        ops[f"setp.{name}.f32"] = ("pred", ("f32", "f32"), ordered(function))
        ops[f"setp.{name}u.f32"] = ("pred", ("f32", "f32"), unordered(function))
    return ops


def ordered(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(a, b) & ~(np.isnan(a) | np.isnan(b))


def unordered(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


def conversions() -> dict[str, Op]:
    ops: dict[str, Op] = {
        "cvt.f32.f16": ("f32", ("f16",), lambda x: x.astype(np.float32)),
        "cvta.to.global.u64": ("u64", ("u64",), lambda x: x),
    }
    for source in INTEGERS:
        ops |= {f"cvt.{to}.{source}": (to, (source,), cast(to)) for to in INTEGERS if to != source}
        ops[f"cvt.rn.f32.{source}"] = ("f32", (source,), cast("f32"))
    for t in ("pred", "f32", *INTEGERS, "b16", "b32", "b64"):
        ops[f"mov.{t}"] = (t, (t,), lambda x: x)
        if t != "pred":
            ops[f"selp.{t}"] = (t, (t, t, "pred"), lambda a, b, choose: np.where(choose, a, b))
    return ops


def cast(to: str) -> Callable[..., Any]:
    return lambda x: x.astype(DTYPES[to])


OPS = arithmetic() | floating() | comparisons() | conversions()
