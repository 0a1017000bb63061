"""The kernels on this very device: parity with NumPy, and a small benchmark. The result is a file to send in.

It holds what the device, its driver and the images are, and figures: no path, no name of a host or user, no serial
number. Over the tests' interpreter the result is stamped as interpreted and has no times. Knows nothing of models.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

import edge_sdss
from edge_sdss import backends, jetpack
from edge_sdss.backends import numpy as reference
from edge_sdss.tree import Tree
from edge_sdss.types import Progress, no_progress

Array = npt.NDArray[Any]
Dtype = Literal["float32", "float16", "bfloat16"]

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
WIDTHS = (33, 576, 768)
LENGTHS = (3, 0, 1, 37, 2, 64, 9)
TOLERANCE = 1e-6  # of values in [0, 1]; entropies in nats are measured by their maximum, ln d
_TOKENS, _WIDTH = 16_384, 768  # 50 MB in float32: more than any Jetson's cache
_SAMPLES, _SAMPLE_S = 15, 5e-3


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Record):
    """What computed. `interpreted`: the tests' interpreter on a CPU, no device."""

    name: str
    interpreted: bool
    compute_capability: str
    driver_cuda: int
    multiprocessors: int
    memory_bytes: int
    l4t: str | None
    images: dict[str, str]


class Parity(_Record):
    """The largest difference from the reference in float64, over all shapes."""

    kernel: str
    dtype: Dtype
    values: int
    max_error: float | None  # None: NaN or infinite
    tolerance: float
    passed: bool


class Timing(_Record):
    """Seconds of one launch, of `samples` samples; bytes are those that must be read and written.

    `ratio_to_copy`: bytes a second over those of a copy within the device's memory, measured in turns with it.
    """

    kernel: str
    dtype: Dtype
    shape: tuple[int, int]
    bytes: int
    samples: int
    median_s: float
    lo_s: float
    hi_s: float
    bytes_per_s: float
    ratio_to_copy: float


class Result(_Record):
    """What is written to the file."""

    schema_version: Literal[1] = 1
    edge_sdss: str
    made: str
    python: str
    numpy: str
    pycuda: str
    device: Device
    parity: tuple[Parity, ...]
    benchmark: tuple[Timing, ...]

    @property
    def passed(self) -> bool:
        """Whether every kernel agrees with the reference."""
        return all(row.passed for row in self.parity)


def run(tree: Tree, progress: Progress = no_progress) -> Result:
    """Runs all kernels; raises BackendUnavailable where there is no PyCUDA, driver or device."""
    cuda: Any = backends.load("cuda")
    gpu = cuda.open_gpu()
    parity = tuple(_parity(cuda, progress))
    benchmark = () if gpu.interpreted else tuple(_benchmark(cuda, progress))
    image = jetpack.detect(tree)
    device = Device(
        name=gpu.name,
        interpreted=gpu.interpreted,
        compute_capability=".".join(map(str, gpu.target.capability)),
        driver_cuda=gpu.target.driver,
        multiprocessors=gpu.multiprocessors,
        memory_bytes=gpu.memory_bytes,
        l4t=image.l4t if image else None,
        images=gpu.images,
    )
    return Result(
        edge_sdss=edge_sdss.__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        python=platform.python_version(),
        numpy=np.__version__,
        pycuda=metadata.version("pycuda"),
        device=device,
        parity=parity,
        benchmark=benchmark,
    )


def rows(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the columns and rows of a table."""
    checked = {
        (p.kernel, p.dtype): (
            "ok" if p.passed else "WRONG",
            "not finite" if p.max_error is None else f"{p.max_error:.1e}",
        )
        for p in result.parity
    }
    timed = {
        (t.kernel, t.dtype): (
            f"{t.median_s * 1e6:,.0f} µs",
            f"{t.bytes_per_s / 1e9:,.0f} GB/s, {t.ratio_to_copy:.2f} × copy",
        )
        for t in result.benchmark
    }
    nothing = ("", "")
    cells: list[tuple[str, ...]] = [
        (*key, *checked.get(key, nothing), *timed.get(key, nothing)) for key in {**checked, **timed}
    ]
    return ("kernel", "type", "parity", "max error", "launch", "memory"), cells


def stored(x: Array, dtype: Dtype) -> tuple[Any, Array]:
    """What the backend is given, and its values as float32. NumPy has no bfloat16: its upper half stands for it."""
    if dtype != "bfloat16":
        return x.astype(dtype), x.astype(dtype).astype(np.float32)
    from edge_sdss.backends._cuda.rows import Rows

    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Rows("bf16", x.shape, bits), (bits.astype(np.uint32) << 16).view(np.float32)


def _parity(cuda: Any, progress: Progress) -> Iterator[Parity]:
    for dtype in DTYPES:
        differences: dict[str, list[Array]] = {}
        for width in WIDTHS:
            for kernel, found, wanted in _compared(cuda, dtype, width):
                differences.setdefault(kernel, []).append(np.ravel(found - wanted))
        for kernel, parts in differences.items():
            error = float(np.abs(np.concatenate(parts)).max())
            finite = bool(np.isfinite(error))
            yield Parity(
                kernel=kernel,
                dtype=dtype,
                values=sum(map(len, parts)),
                max_error=error if finite else None,
                tolerance=TOLERANCE,
                passed=finite and error <= TOLERANCE,
            )
        progress("check the kernels", DTYPES.index(dtype) + 1, len(DTYPES))


def _compared(cuda: Any, dtype: Dtype, width: int) -> Iterator[tuple[str, Array, Array]]:
    """(kernel, its values, the reference's) for one batch."""
    rng = np.random.default_rng(width)
    offsets = np.cumsum([0, *LENGTHS], dtype=np.int64)
    given, x = stored(rng.normal(size=(offsets[-1], width)) * np.linspace(0.1, 3, offsets[-1])[:, None], dtype)
    for variant in cuda.KERNELS:
        yield f"entropy {variant}", cuda.entropy(given, offsets, variant), reference.entropy(x, offsets, variant)
    for pooling in ("mean", "last"):
        yield f"pool {pooling}", cuda.pool(given, offsets, pooling), reference.pool(x, offsets, pooling)
    softmax = _softmax_entropy(x)
    yield "row_entropy", cuda.row_entropy(given) / np.log(width), softmax / np.log(width)
    unit = reference.pool(x, offsets, "mean")
    vectors, v = stored(unit, dtype)
    means = rng.normal(size=unit.shape).astype(np.float32) / np.sqrt(np.float32(width))
    yield "dissimilarity", cuda.dissimilarity(vectors, means), reference.dissimilarity(v, means)
    if dtype == "float32":
        yield "pairwise", cuda.pairwise(v, means[:3]), np.clip(1 - v.astype(float) @ means[:3].astype(float).T, 0, 1)


def _softmax_entropy(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    z = weights.sum(axis=1)
    entropy: Array = np.log(z) - (weights * shifted).sum(axis=1) / z
    return entropy


def _benchmark(cuda: Any, progress: Progress) -> Iterator[Timing]:
    """Each kernel in turns with a copy of the same bytes; all data is on the device, and most of it zero."""
    from edge_sdss.backends._cuda import launches

    gpu = cuda.open_gpu()
    with gpu.active():
        memories = [gpu.memory() for _ in range(3)]
        source, other, out = (memory.upload(np.zeros((_TOKENS, _WIDTH)), np.float32) for memory in memories)
        domain = gpu.memory()
        to = domain.upload(np.zeros(_TOKENS), np.int32)
        grid, shape = launches.warp_per_row(_TOKENS), (_TOKENS, _WIDTH)
        for done, (dtype, type_) in enumerate(zip(DTYPES, launches.ITEM_BYTES, strict=True)):
            size = _TOKENS * _WIDTH * launches.ITEM_BYTES[type_]
            copy = partial(gpu.copy, other, source, size)
            known = {
                "token_energy": (source, out),
                "row_entropy": (source, out),
                "dissimilarity": (source, other, to, out),
            }
            for kernel, addresses in known.items():
                launch = partial(gpu.launch, kernel, type_, grid, *addresses, *shape)
                copied, seconds = _in_turns(gpu, copy, launch)
                yield _timing(kernel, dtype, size + 4 * _TOKENS, seconds, 2 * size / statistics.median(copied))
            progress("measure the kernels", done + 1, len(DTYPES))


def _timing(kernel: str, dtype: Dtype, moved: int, seconds: list[float], copy_rate: float) -> Timing:
    lo, median, hi = statistics.quantiles(seconds, n=4)
    rate = moved / median
    return Timing(
        kernel=kernel,
        dtype=dtype,
        shape=(_TOKENS, _WIDTH),
        bytes=moved,
        samples=len(seconds),
        median_s=median,
        lo_s=lo,
        hi_s=hi,
        bytes_per_s=rate,
        ratio_to_copy=rate / copy_rate,
    )


def _in_turns(gpu: Any, *queue: Callable[[], object]) -> tuple[list[float], ...]:
    """Seconds a call of each function, in samples that take turns; each sample is many calls and one wait."""
    found: tuple[list[float], ...] = tuple([] for _ in queue)
    calls = [_calls(gpu, function) for function in queue]
    for _ in range(_SAMPLES):
        for function, count, seconds in zip(queue, calls, found, strict=True):
            seconds.append(_sample(gpu, function, count) / count)
    return found


def _calls(gpu: Any, function: Callable[[], object]) -> int:
    """How many calls a sample takes, after a warm-up."""
    count = 1
    while _sample(gpu, function, count) < _SAMPLE_S and count < 1 << 16:
        count *= 2
    return count


def _sample(gpu: Any, function: Callable[[], object], count: int) -> float:
    gpu.wait()
    begin = time.perf_counter()
    for _ in range(count):
        function()
    gpu.wait()
    return time.perf_counter() - begin
