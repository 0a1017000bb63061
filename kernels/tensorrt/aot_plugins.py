"""The four plugins for TensorRT 10.9 and newer (JetPack 7): declared in Python, run from PTX inside the engine.

Importing this registers them in the namespace `edge_sdss`; TensorRT then finds them by the nodes of an ONNX graph. An
engine that was built needs neither this file nor Python. `plugins.ptx` lies beside it. Run on no device yet.

    ragged_mean       x [N, d], offsets [B + 1] int64                 -> [B, d] float32
    token_entropy     x, offsets                                      -> [B] float32
    centered_entropy  x, means [B, d] float32, offsets                -> [B] float32
    dissimilarity     v [B, d], means [m, d] float32, domain [B] int32 -> [B] float32

x may be float32, float16 or bfloat16. Knows nothing of edge_sdss: it is copied to the device.
"""
# No `from __future__ import annotations`: TensorRT reads the annotations as they are.

from pathlib import Path

import tensorrt as trt
import tensorrt.plugin as trtp

BLOCK, WARPS, SECTION_BYTES = 256, 8, 128  # as in kernels/README.md
LINEAR = "LINEAR"
X_TYPES = "FP32|FP16|BF16"
SUFFIX = {trt.float32: "f32", trt.float16: "f16", trt.bfloat16: "bf16"}

Desc = trtp.TensorDesc
Kernel = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]


def ptx() -> str:
    """The kernels, compiled."""
    return Path(__file__).with_name("plugins.ptx").read_text(encoding="utf-8").rstrip("\0")


def _kernel(name, dtype, grid, integers) -> Kernel:
    """What TensorRT asks for: entry, PTX, launch, and the integers between inputs and outputs."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y = grid
    launch.block_x = BLOCK
    extra = trtp.SymIntExprs(len(integers))
    for index, value in enumerate(integers):
        extra[index] = trtp.SymInt32(value)
    return f"plugin_{name}_{SUFFIX[dtype]}", ptx(), launch, extra


def _float32(like, *shape) -> Desc:
    out = like.like()
    out.dtype = trt.float32
    out.shape_expr = trtp.ShapeExprs.from_tuple(shape)
    return out


def _dialogues(offsets):
    return offsets.shape_expr[0] - 1


@trtp.register("edge_sdss::ragged_mean")
def ragged_mean(x: Desc, offsets: Desc) -> Desc:
    return _float32(x, _dialogues(offsets), x.shape_expr[1])


@trtp.autotune("edge_sdss::ragged_mean")
def ragged_mean_types(x: Desc, offsets: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination(f"{X_TYPES}, INT64, FP32", LINEAR)]


@trtp.aot_impl("edge_sdss::ragged_mean")
def ragged_mean_kernel(x: Desc, offsets: Desc, outputs: tuple[Desc], tactic: int) -> Kernel:
    width = x.shape_expr[1]
    row_bytes = width * (4 if x.dtype == trt.float32 else 2)
    grid = _dialogues(offsets), trtp.cdiv(row_bytes, SECTION_BYTES)
    return _kernel("mean", x.dtype, grid, [width])


@trtp.register("edge_sdss::token_entropy")
def token_entropy(x: Desc, offsets: Desc) -> Desc:
    return _float32(x, _dialogues(offsets))


@trtp.autotune("edge_sdss::token_entropy")
def token_entropy_types(x: Desc, offsets: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination(f"{X_TYPES}, INT64, FP32", LINEAR)]


@trtp.aot_impl("edge_sdss::token_entropy")
def token_entropy_kernel(x: Desc, offsets: Desc, outputs: tuple[Desc], tactic: int) -> Kernel:
    dialogues = _dialogues(offsets)
    return _kernel("token_entropy", x.dtype, (dialogues, 1), [dialogues, x.shape_expr[1]])


@trtp.register("edge_sdss::centered_entropy")
def centered_entropy(x: Desc, means: Desc, offsets: Desc) -> Desc:
    return _float32(x, _dialogues(offsets))


@trtp.autotune("edge_sdss::centered_entropy")
def centered_entropy_types(x: Desc, means: Desc, offsets: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination(f"{X_TYPES}, FP32, INT64, FP32", LINEAR)]


@trtp.aot_impl("edge_sdss::centered_entropy")
def centered_entropy_kernel(x: Desc, means: Desc, offsets: Desc, outputs: tuple[Desc], tactic: int) -> Kernel:
    dialogues = _dialogues(offsets)
    return _kernel("centered_entropy", x.dtype, (dialogues, 1), [dialogues, x.shape_expr[1]])


@trtp.register("edge_sdss::dissimilarity")
def dissimilarity(v: Desc, means: Desc, domain: Desc) -> Desc:
    return _float32(v, v.shape_expr[0])


@trtp.autotune("edge_sdss::dissimilarity")
def dissimilarity_types(v: Desc, means: Desc, domain: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination("FP32, FP32, INT32, FP32", LINEAR)]


@trtp.aot_impl("edge_sdss::dissimilarity")
def dissimilarity_kernel(v: Desc, means: Desc, domain: Desc, outputs: tuple[Desc], tactic: int) -> Kernel:
    rows = v.shape_expr[0]
    return _kernel("dissimilarity", v.dtype, (trtp.cdiv(rows, WARPS), 1), [rows, v.shape_expr[1]])
