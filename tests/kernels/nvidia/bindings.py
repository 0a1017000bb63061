"""NVIDIA's Python layer of TensorRT without TensorRT: its bindings over stub libraries, dimensions with values.

What a plugin declares is taken, checked and called by NVIDIA's own classes; what would need the C++ library (the
registry, the arithmetic of symbolic dimensions) stands in here. Engines cannot be built. One version in a process.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_driver"))
import driver_build

WHEELS = {  # JetPack 6 has 10.3, and 7.0 has 10.13; 10.9 is the first with plugins from PTX
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.9": "tensorrt-cu12-bindings==10.9.0.34",
    "10.13": "tensorrt-cu13-bindings==10.13.3.9",
}
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
STUBS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getBuilderPluginRegistry
getPluginRegistry initLibNvInferPlugins createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL
getNvOnnxParserVersion
""".split()


def folder(version: str) -> Path:
    """Returns a folder with the package `tensorrt`, from the cache; raises driver_build.Unbuildable."""
    out = driver_build._cache() / f"tensorrt-{version}-{sys.version_info.major}{sys.version_info.minor}"
    with driver_build._locked(out):
        if not out.exists():
            work = out.with_suffix(".partial")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            pip = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet")
            driver_build._run(*pip, "--no-deps", "--only-binary=:all:", "-d", str(work), WHEELS[version])
            with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
                archive.extractall(work)
            (work / "tensorrt_bindings").rename(work / "tensorrt")
            source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in STUBS)
            (work / "stubs.c").write_text(source, encoding="utf-8")
            for name in LIBRARIES:
                soname, out_file = f"lib{name}.so.10", str(work / f"lib{name}.so.10")
                driver_build._run(
                    "gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", out_file, str(work / "stubs.c")
                )
            os.replace(work, out)
    return out


class Registry:
    """In place of TensorRT's plugin registry."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))


def load(version: str) -> tuple[Any, Registry]:
    """Imports `tensorrt` of a version with a registry that works."""
    where = folder(version)
    for name in LIBRARIES:
        ctypes.CDLL(str(where / f"lib{name}.so.10"), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(where))
    trt = importlib.import_module("tensorrt")
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    return trt, registry


def expressions(trt: Any) -> SimpleNamespace:
    """Dimensions that have values: `of(3)`, a `builder` for TensorRT's operations, and DimsExprs that can be read."""

    class Dimension(trt.IDimensionExpr):
        def is_constant(self) -> bool:
            return True

        def get_constant_value(self) -> int:
            return self.value

    def of(value: int) -> Any:
        dimension = Dimension.__new__(Dimension)  # NVIDIA's class has no constructor for Python
        dimension.value = value
        return dimension

    operation = trt.DimensionOperation
    rules = {
        operation.SUM: lambda a, b: a + b,
        operation.SUB: lambda a, b: a - b,
        operation.PROD: lambda a, b: a * b,
        operation.MAX: max,
        operation.MIN: min,
        operation.FLOOR_DIV: lambda a, b: a // b,
        operation.CEIL_DIV: lambda a, b: -(-a // b),
        operation.EQUAL: lambda a, b: int(a == b),
        operation.LESS: lambda a, b: int(a < b),
    }

    class Builder(trt.IExprBuilder):
        def __init__(self) -> None:
            trt.IExprBuilder.__init__(self)

        def constant(self, value: int) -> Any:
            return of(value)

        def operation(self, op: Any, a: Any, b: Any) -> Any:
            return of(rules[op](a.value, b.value))

    class DimsExprs(trt.DimsExprs):
        """NVIDIA's, which also remembers what was put in: it gives back C++ objects."""

        def __init__(self, size: int) -> None:
            trt_dims.__init__(self, size)
            self.values = [None] * size

        def __setitem__(self, index: int, expression: Any) -> None:
            trt_dims.__setitem__(self, index, expression)
            self.values[index] = expression.value

    trt_dims = trt.DimsExprs
    trt.DimsExprs = DimsExprs
    return SimpleNamespace(of=of, builder=Builder())


def remember_symbols() -> None:
    """From now on a symbolic integer, which only TensorRT's library can read, has its `value` for Python too."""
    from tensorrt.plugin import _tensor

    class Remembered(_tensor.SymExprImpl):  # type: ignore[misc, name-defined]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "expr":
                super().__setattr__("value", value.get_constant_value())

    _tensor.SymExprImpl = Remembered


def descriptor(trt: Any, shape: tuple[int, ...], dtype: Any, *, dynamic: bool, layout: Any = None) -> Any:
    """A tensor as TensorRT describes it to a plugin, linear unless `layout` says another."""
    plain = trt.PluginTensorDesc()
    plain.dims, plain.type, plain.format = trt.Dims(shape), dtype, layout or trt.TensorFormat.LINEAR
    if not dynamic:
        return plain
    desc = trt.DynamicPluginTensorDesc()
    desc.desc = plain
    desc.min = desc.max = plain.dims
    if hasattr(desc, "opt"):
        desc.opt = plain.dims
    return desc
