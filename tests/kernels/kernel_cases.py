"""Launches of every kernel over a grid of weird shapes and values, with what they must give, in float64.

The references are written from the definitions, term by term, not after the kernels. Knows no executor: a `Case` is
handed to the PTX interpreter, to the host build, or to a driver.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
TYPES = ("f32", "f16", "bf16")
BYTES = {"f32": 4, "f16": 2, "bf16": 2}
TOLERANCE = 1e-6

# Rows and columns: one, odd, around a warp, around 16-byte vectors and their tiles, sizes of models, a vocabulary.
SHAPES = [(1, 1), (1, 2), (3, 5), (17, 7), (2, 31), (9, 33), (5, 127), (4, 128), (3, 129), (1, 513), (8, 576)]
SHAPES += [(3, 768), (2, 2048), (1, 4099), (1, 50257)]
# (tokens of each dialogue, columns, threads of a block): none, one, empty ones between, more tokens than a block has
# warps, more than 32 for each of its warps; odd, narrow and aligned rows.
DIALOGUES = [([0], 5, 64), ([1], 33, 256), ([2], 1, 64), ([2], 576, 256), ([0, 1, 2, 0], 8, 64)]
DIALOGUES += [([0, 1, 2, 0], 33, 128), ([33, 0, 7], 5, 64), ([33, 0, 7], 576, 256), ([9, 8, 70], 64, 64)]
DIALOGUES += [([9, 8, 70], 33, 256), ([150], 1, 64), ([150], 8, 64), ([300], 64, 256), ([5, 1], 2048, 64)]


@dataclass(frozen=True)
class Buffer:
    """An array in device memory, `shift` bytes after a 256-byte boundary."""

    array: Array
    shift: int = 0
    output: bool = False


@dataclass(frozen=True)
class Case:
    entry: str
    about: str
    grid: tuple[int, int]
    block: int
    args: tuple[Buffer | int, ...]
    expected: Array
    relative: bool = False  # error as a share of the expected value, not absolute
    streamed: tuple[int, ...] = field(default=(0,))  # arguments that are read exactly once

    @property
    def output(self) -> Array:
        return next(arg.array for arg in self.args if isinstance(arg, Buffer) and arg.output)

    def error(self) -> float:
        """Largest error of the output; infinite where NaN or infinity is in the wrong place."""
        got, wanted = self.output.astype(np.float64).reshape(-1), self.expected.reshape(-1)
        if not np.array_equal(np.isfinite(got), np.isfinite(wanted)):
            return math.inf
        odd = ~np.isfinite(wanted)
        if not np.array_equal(got[odd], wanted[odd], equal_nan=True):
            return math.inf
        difference = np.abs(got[~odd] - wanted[~odd])
        if self.relative:
            difference = difference / np.where(wanted[~odd] == 0, 1, np.abs(wanted[~odd]))
        return float(difference.max(initial=0.0))


def stored(values: Array, kind: str) -> tuple[Array, Array]:
    """The values rounded to the type as the device holds them, and in float64."""
    values = np.asarray(values, np.float32)
    if kind == "f32":
        return values, values.astype(np.float64)
    if kind == "f16":
        half = values.astype(np.float16)
        return half, half.astype(np.float64)
    bits = values.view(np.uint32)
    rounded = np.where(np.isnan(values), bits, bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype(np.uint16), (rounded << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def result(*shape: int) -> Buffer:
    """Memory for the result, full of what no kernel writes."""
    return Buffer(np.full(shape, -12345.0, np.float32), output=True)


def shannon(p: Array) -> float:
    return -math.fsum(x * math.log(x) for x in p[p > 0].tolist())


def eoe(weights: Array) -> float:
    """Entropy of weights / their sum over its maximum."""
    if len(weights) < 2:
        return 0.0
    if not np.isfinite(weights).all():
        return math.nan
    total = math.fsum(weights.tolist())
    return shannon(weights / total) / math.log(len(weights)) if total else 0.0


def softmax_entropy(x: Array) -> float:
    if np.isnan(x).any() or (x == np.inf).any():
        return math.nan
    x = x[x > -np.inf]
    if not len(x):
        return 0.0
    p = np.exp(x - x.max())
    return shannon(p / math.fsum(p.tolist()))


def warps(rows: int, block: int) -> tuple[int, int]:
    """A grid with a warp per row."""
    return -(-rows * 32 // block), 1


def rows_of(kind: str, scale: float, seed: int = 0) -> Iterator[tuple[str, int, int, int, int, Array]]:
    """(about, n, d, shift, block, values): the shapes, each at another misplacement and block size."""
    shifts = itertools.cycle([0, BYTES[kind], 0, 8, 3 * BYTES[kind]])
    blocks = itertools.cycle([256, 64, 32, 128])
    for number, (n, d) in enumerate(SHAPES):
        yield f"{n} x {d}", n, d, next(shifts), next(blocks), normal((n, d), seed + number, scale)
    for d in (576, 768, 2048):
        yield f"aligned 8 x {d}", 8, d, 0, 256, normal((8, d), d, scale)


def token_energy(kind: str) -> Iterator[Case]:
    for about, n, d, shift, block, values in rows_of(kind, 3.0):
        raw, x = stored(values, kind)
        args = (Buffer(raw, shift), result(n), n, d)
        yield Case(f"token_energy_{kind}", about, warps(n, block), block, args, (x**2).sum(1), relative=True)
    odd = np.ones((5, 40), np.float32)
    odd[1, 7], odd[2, 39], odd[3] = np.nan, -np.inf, 0
    raw, x = stored(odd, kind)
    expected = np.array([40, np.nan, np.inf, 0, 40])
    yield Case(
        f"token_energy_{kind}", "NaN, infinity, zero", warps(5, 64), 64, (Buffer(raw), result(5), 5, 40), expected
    )


def row_entropy(kind: str) -> Iterator[Case]:
    entry = f"row_entropy_{kind}"
    for about, n, d, shift, block, values in rows_of(kind, 4.0):
        raw, x = stored(values, kind)
        expected = np.array([softmax_entropy(row) for row in x])
        yield Case(entry, about, warps(n, block), block, (Buffer(raw, shift), result(n), n, d), expected)
    for d in (1, 2, 37, 600):
        raw, x = stored(peculiar(d), kind)
        expected = np.array([softmax_entropy(row) for row in x])
        yield Case(entry, f"peculiar, {d}", warps(len(x), 64), 64, (Buffer(raw), result(len(x)), len(x), d), expected)


def peculiar(d: int) -> Array:
    """Rows of logits that are all alike, far away, masked, infinite, not a number, or decided."""
    top = 60000.0  # what float16 holds as well
    rows = [np.full(d, value) for value in (0.0, top, -top, -np.inf, np.inf, np.nan)]
    first, last, far, ramp = (normal((d,), seed, 2.0) for seed in range(4))
    first[0], last[-1], far[d // 2], ramp[:] = np.inf, np.nan, top, np.linspace(-top, top, d)
    masked = normal((d,), 5, 2.0)
    masked[1:] = -np.inf
    half_masked = normal((d,), 6, 2.0)
    half_masked[: d // 2] = -np.inf
    shifted = normal((d,), 7, 2.0) + 1000
    return np.array([*rows, first, last, far, ramp, masked, half_masked, shifted], np.float32)


def dialogues(kind: str, seed: int, offset: float = 0.5) -> Iterator[tuple[str, Array, int, int, int, Array, Array]]:
    """(about, offsets, d, shift, block, raw, values in float64): ragged batches with a common part in every token."""
    shifts = itertools.cycle([0, BYTES[kind], 0, 16, 3 * BYTES[kind]])
    for number, (lengths, d, block) in enumerate(DIALOGUES):
        n = sum(lengths)
        loud = np.random.default_rng(number).exponential(size=(n, 1)).astype(np.float32)
        raw, x = stored(normal((n, d), seed + number) * loud + offset * normal((1, d), 1), kind)
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        yield f"tokens {lengths} x {d}", offsets, d, next(shifts), block, raw, x


def parts(offsets: Array) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(offsets.tolist())]


def means_of(x: Array, offsets: Array) -> Array:
    return np.array([x[part].mean(0) if part.stop > part.start else np.zeros(x.shape[1]) for part in parts(offsets)])


def centered(x: Array, offsets: Array) -> tuple[Array, Array]:
    """float32 means, and the energy about them."""
    means = means_of(x, offsets).astype(np.float32)
    about = [
        ((x[part] - mean) ** 2).sum(1) for part, mean in zip(parts(offsets), means.astype(np.float64), strict=True)
    ]
    return means, np.concatenate(about) if about else np.zeros(0)


def centered_energy(kind: str) -> Iterator[Case]:
    for about, offsets, d, shift, block, raw, x in dialogues(kind, 100):
        if not len(x):
            continue
        means, energy = centered(x, offsets)
        args = (Buffer(raw, shift), Buffer(means), Buffer(offsets), result(len(x)), d)
        yield Case(f"centered_energy_{kind}", about, (len(offsets) - 1, 3), block, args, energy, relative=True)


def ragged_entropy(_: str) -> Iterator[Case]:
    random = np.random.default_rng(3)
    for number, lengths in enumerate([[0], [1], [0, 1, 2, 0], [9, 8, 300], [5000]]):
        offsets, block = np.cumsum([0, *lengths], dtype=np.int64), (256, 64, 32)[number % 3]
        for about, scale in (("plain", 1.0), ("huge", 1e35), ("tiny", 1e-37)):
            weights = (random.exponential(size=sum(lengths)) ** 3 * scale).astype(np.float32)
            weights[::7] = 0
            yield energies(f"{about} {lengths}", weights, offsets, block)
    special = [np.zeros(9), np.eye(1, 9)[0], np.full(9, np.nan), np.r_[np.ones(8), np.nan], np.r_[np.inf, np.ones(8)]]
    special += [np.full(9, 3e38), np.full(9, 1e-45), np.r_[3e38, np.full(8, 1e-45)], 2.0 ** np.arange(-120, 124, 28)]
    weights = np.concatenate(special).astype(np.float32)
    yield energies("special weights", weights, np.arange(0, len(weights) + 1, 9, dtype=np.int64), 64)


def energies(about: str, weights: Array, offsets: Array, block: int) -> Case:
    b = len(offsets) - 1
    expected = np.array([eoe(weights[part].astype(np.float64)) for part in parts(offsets)])
    return Case("ragged_entropy_f32", about, (b, 1), block, (Buffer(weights), Buffer(offsets), result(b), b), expected)


def ragged_token_entropy(kind: str) -> Iterator[Case]:
    for about, offsets, d, shift, block, raw, x in dialogues(kind, 200):
        b = len(offsets) - 1
        expected = np.array([eoe((x[part] ** 2).sum(1)) for part in parts(offsets)])
        args = (Buffer(raw, shift), Buffer(offsets), result(b), b, d)
        yield Case(f"ragged_token_entropy_{kind}", about, (b, 1), block, args, expected)
    odd = normal((40, 24), 5)
    odd[3, 5], odd[11, 0], odd[20:30] = np.nan, np.inf, 0
    raw, x = stored(odd, kind)
    offsets = np.arange(0, 41, 10, dtype=np.int64)
    expected = np.array([eoe((x[part] ** 2).sum(1)) for part in parts(offsets)])
    args = (Buffer(raw), Buffer(offsets), result(4), 4, 24)
    yield Case(f"ragged_token_entropy_{kind}", "NaN, infinity, zero", (4, 1), 64, args, expected)


def ragged_centered_entropy(kind: str) -> Iterator[Case]:
    for about, offsets, d, shift, block, raw, x in dialogues(kind, 300, offset=20.0):
        b = len(offsets) - 1
        means, energy = centered(x, offsets)
        expected = np.array([eoe(energy[part]) for part in parts(offsets)])
        args = (Buffer(raw, shift), Buffer(means), Buffer(offsets), result(b), b, d)
        yield Case(f"ragged_centered_entropy_{kind}", about, (b, 1), block, args, expected)


def ragged_mean(kind: str) -> Iterator[Case]:
    for about, offsets, d, shift, block, raw, x in dialogues(kind, 400):
        b, columns = len(offsets) - 1, 128 // BYTES[kind]
        args = (Buffer(raw, shift), Buffer(offsets), result(b, d), d)
        yield Case(f"ragged_mean_{kind}", about, (b, -(-d // columns)), block, args, means_of(x, offsets))


def ragged_last(kind: str) -> Iterator[Case]:
    for about, offsets, d, shift, block, raw, x in dialogues(kind, 500):
        b = len(offsets) - 1
        expected = np.array([x[p.stop - 1] if p.stop > p.start else np.zeros(d) for p in parts(offsets)])
        args = (Buffer(raw, shift), Buffer(offsets), result(b, d), d)
        yield Case(f"ragged_last_{kind}", about, (b, 2), block, args, expected, streamed=())


def normalise(_: str) -> Iterator[Case]:
    for about, n, d, shift, block, values in rows_of("f32", 1e-3):
        values[-1] = 0 if n > 1 else values[-1]
        length = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
        args = (Buffer(values, shift), result(n, d), n, d)
        expected = values / np.where(length == 0, 1, length)
        yield Case("normalise_f32", about, warps(n, block), block, args, expected, streamed=())


def dissimilarity(kind: str) -> Iterator[Case]:
    for about, n, d, shift, block, values in rows_of(kind, 1.0, seed=50):
        raw, v = stored(unit(values), kind)
        means = (unit(normal((4, d), d)) * 0.7).astype(np.float32)
        domain = (np.arange(n) % 5 - 1).astype(np.int32) if n > 1 else np.array([2], np.int32)
        cosine = np.where(domain < 0, 0, (v * means.astype(np.float64)[domain]).sum(1))
        args = (Buffer(raw, shift), Buffer(means, shift=4 * (n % 2)), Buffer(domain), result(n), n, d)
        grid = warps(n, block)
        streamed = (0,) if (domain >= 0).all() else ()
        yield Case(f"dissimilarity_{kind}", about, grid, block, args, np.clip(1 - cosine, 0, 1), streamed=streamed)
    raw, v = stored(np.array([[1, 0], [0.6, 0.8], [-1, 0], [np.nan, 0]]), kind)
    means, domain = np.array([[1, 0], [0, 0]], np.float32), np.zeros(4, np.int32)
    args = (Buffer(raw), Buffer(means), Buffer(domain), result(4), 4, 2)
    expected = np.array([0, 1 - v[1, 0], 1, np.nan])
    yield Case(f"dissimilarity_{kind}", "clipped, NaN", warps(4, 32), 32, args, expected)


def pairwise(kind: str) -> Iterator[Case]:
    for n, m, d in [
        (1, 1, 1),
        (1, 33, 5),
        (3, 2, 31),
        (33, 1, 32),
        (31, 65, 33),
        (40, 40, 64),
        (2, 70, 576),
        (32, 32, 768),
    ]:
        shift = BYTES[kind] * (n % 2)
        (a_raw, a), (b_raw, b) = (stored(unit(normal((rows, d), rows + d)), kind) for rows in (n, m))
        expected = np.clip(1 - a @ b.T, 0, 1)
        args = (Buffer(a_raw, shift), Buffer(b_raw), result(n, m), n, m, d)
        once = (0, 1) if max(n, m) <= 32 else ()
        grid = (-(-m // 32), -(-n // 32))
        yield Case(f"pairwise_{kind}", f"{n} x {m} x {d}", grid, 128, args, expected, streamed=once)


KERNELS: dict[str, tuple[str, Callable[[str], Iterator[Case]]]] = {}  # entry without type -> (source, cases)
for _source, _kernels in {
    "energy": (token_energy, centered_energy),
    "ragged_entropy": (ragged_token_entropy, ragged_centered_entropy),
    "ragged_pool": (ragged_mean, ragged_last),
    "row_entropy": (row_entropy,),
    "dissimilarity": (dissimilarity,),
    "pairwise": (pairwise,),
}.items():
    KERNELS |= {kernel.__name__: (_source, kernel) for kernel in _kernels}

# Entry -> (source file without ending, its cases).
ENTRIES: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    f"{name}_{kind}": (source, lambda cases=cases, kind=kind: cases(kind))
    for name, (source, cases) in KERNELS.items()
    for kind in TYPES
}
ENTRIES["ragged_entropy_f32"] = ("ragged_entropy", lambda: ragged_entropy("f32"))
ENTRIES["normalise_f32"] = ("ragged_pool", lambda: normalise("f32"))
