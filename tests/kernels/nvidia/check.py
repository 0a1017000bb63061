"""Runs the plugins through NVIDIA's layer of one TensorRT version, and their launches in the interpreter of PTX.

    python check.py VERSION FOLDER      FOLDER: aot_plugins.py or v3_plugins.py, with plugins.ptx
Prints one JSON object: of each plugin its output's shape, launch, formats and the error against float64.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import bindings
from ptx import Memory, run

LENGTHS, WIDTH, DOMAINS = (3, 1, 0, 40), 52, 3


def case() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The inputs by name, and of each plugin the output in float64 by the definitions."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(sum(LENGTHS), WIDTH)).astype(np.float32)
    offsets = np.cumsum([0, *LENGTHS], dtype=np.int64)
    parts = [x[a:b].astype(np.float64) for a, b in itertools.pairwise(offsets)]
    means = np.array([p.mean(axis=0) if len(p) else np.zeros(WIDTH) for p in parts])
    v = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-30)
    centres = rng.normal(size=(DOMAINS, WIDTH)) / np.sqrt(WIDTH)
    domain = np.array([0, 2, 1, -1], dtype=np.int32)
    cosine = np.array([0.0 if k < 0 else u @ centres[k] for u, k in zip(v, domain, strict=True)])
    wanted = {
        "ragged_mean": means,
        "token_entropy": np.array([entropy(p) for p in parts]),
        "centered_entropy": np.array([entropy(p - m) for p, m in zip(parts, means, strict=True)]),
        "dissimilarity": np.clip(1 - cosine, 0, 1),
    }
    float32 = {"means": means, "v": v, "centres": centres}
    return {
        "x": x,
        "offsets": offsets,
        "domain": domain,
        **{k: a.astype(np.float32) for k, a in float32.items()},
    }, wanted


def entropy(rows: np.ndarray) -> float:
    if len(rows) < 2:
        return 0.0
    p = (rows**2).sum(axis=1) / (rows**2).sum()
    return float(-(p * np.log(p)).sum() / np.log(len(rows)))


INPUTS = {
    "ragged_mean": ("x", "offsets"),
    "token_entropy": ("x", "offsets"),
    "centered_entropy": ("x", "means", "offsets"),
    "dissimilarity": ("v", "centres", "domain"),
}


def dtype(trt: Any, array: np.ndarray) -> Any:
    return {"float32": trt.float32, "int64": trt.int64, "int32": trt.int32}[array.dtype.name]


ALIVE: list[Any] = []
"""Plugins of the 10.3 layer: TensorRT owns and destroys them, and Python's collector crashes at it."""


def descriptors(trt: Any, name: str, arrays: dict[str, np.ndarray], out: tuple[int, ...], dynamic: bool) -> list[Any]:
    given = [(arrays[key].shape, dtype(trt, arrays[key])) for key in INPUTS[name]]
    return [bindings.descriptor(trt, s, t, dynamic=dynamic) for s, t in [*given, (out, trt.float32)]]


def aot(trt: Any, plugin: Any, name: str, arrays: dict[str, np.ndarray], dims: Any) -> tuple[dict[str, Any], Any]:
    """As TensorRT asks: types, shapes, formats, launch, kernel. Returns the facts and a launch in the interpreter."""
    given = [arrays[key] for key in INPUTS[name]]
    expressions = [[dims.of(size) for size in array.shape] for array in given]
    plugin.set_tactic(0)
    types = plugin.get_output_data_types([dtype(trt, a) for a in given], [a.ndim for a in given])
    (shape,) = plugin.get_output_shapes(expressions, [], dims.builder)
    both = descriptors(trt, name, arrays, tuple(shape.values), dynamic=True)
    formats = plugin.get_supported_format_combinations(both, len(given))
    plugin.configure_plugin(both[:-1], both[-1:])
    launch, extra = SimpleNamespace(), Setter()
    plugin.get_launch_params(expressions, both, len(given), launch, extra, dims.builder)
    plain = descriptors(trt, name, arrays, tuple(shape.values), dynamic=False)
    entry, ptx = plugin.get_kernel(plain[:-1], plain[-1:])
    grid, block = (tuple(getattr(launch, f"{what}_{axis}").value for axis in "xyz") for what in ("grid", "block"))
    integers = [extra.values[i].value for i in range(extra.nbSymExprs)]
    facts = {
        "shape": shape.values,
        "types": [str(t).removeprefix("DataType.") for t in types],
        "formats": [str(f.type).removeprefix("DataType.") for f in formats],
    }
    facts |= {"grid": grid, "block": block, "integers": integers, "entry": entry}

    def execute(out: np.ndarray) -> None:
        memory = Memory()
        pointers = [memory.bind(array) for array in given]
        run(ptx.decode(), entry, grid, block, [*pointers, *integers, memory.bind(out)], memory)

    return facts, execute


class Setter:
    """Takes the integers between a kernel's inputs and outputs."""

    nbSymExprs = 0  # noqa: N815

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value


def v3(trt: Any, plugin: Any, name: str, arrays: dict[str, np.ndarray], dims: Any) -> tuple[dict[str, Any], Any]:
    """As TensorRT asks an IPluginV3; enqueue goes through ctypes to the fake libcuda, then to the interpreter."""
    given = [arrays[key] for key in INPUTS[name]]
    core, made, runs = (
        plugin.get_capability_interface(getattr(trt.PluginCapabilityType, kind))
        for kind in ("CORE", "BUILD", "RUNTIME")
    )
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace, made.num_outputs) == (
        name,
        "1",
        "edge_sdss",
        1,
    )
    types = [str(t) for t in made.get_output_data_types([dtype(trt, a) for a in given])]
    expressions = [[dims.of(size) for size in array.shape] for array in given]
    (shape,) = made.get_output_shapes(expressions, [], dims.builder)
    both = descriptors(trt, name, arrays, tuple(shape.values), dynamic=True)
    accepted = [made.supports_format_combination(i, both, len(given)) for i in range(len(both))]
    wrong = [refuses(trt, made, both, i, len(given)) for i in range(len(both))]
    made.configure_plugin(both[:-1], both[-1:])
    plain = descriptors(trt, name, arrays, tuple(shape.values), dynamic=False)
    attached = runs.attach_to_context(None)
    plugin = attached.clone()
    ALIVE.extend((attached, plugin))
    facts = {
        "shape": shape.values,
        "types": [t.removeprefix("DataType.") for t in types],
        "accepted": accepted,
        "refused": wrong,
    }
    facts["serialised"] = len(plugin.get_fields_to_serialize())

    def execute(out: np.ndarray) -> None:
        from pycuda import driver

        driver.init()
        context = driver.Device(0).make_context()  # TensorRT's
        stream = driver.Stream()
        places = [driver.to_device(array) if array.size else 0 for array in [*given, out]]
        plugin.enqueue(plain[:-1], plain[-1:], list(map(int, places[:-1])), [int(places[-1])], 0, stream.handle)
        stream.synchronize()
        driver.memcpy_dtoh(out, places[-1])
        context.pop()

    return facts, execute


def refuses(trt: Any, plugin: Any, both: list[Any], position: int, inputs: int) -> bool:
    """Whether int8, and another layout, are refused at a position."""
    answers = []
    for type_, layout in ((trt.int8, trt.TensorFormat.LINEAR), (None, trt.TensorFormat.HWC)):
        changed = list(both)
        shape = tuple(both[position].min)
        changed[position] = bindings.descriptor(
            trt, shape, type_ or both[position].desc.type, dynamic=True, layout=layout
        )
        answers.append(plugin.supports_format_combination(position, changed, inputs))
    return not any(answers)


def engine_program(trt: Any, folder: str) -> dict[str, Any]:
    """What build_engine.py does with the plugins, by NVIDIA's names: the network's flags, layers kept in float32."""
    template = Path(__file__).parents[3] / "edge_sdss/exporting/_tensorrt/build_engine.py.in"
    text = Template(template.read_text(encoding="utf-8")).substitute(need_mib=1, workspace_mib=1)
    program: dict[str, Any] = {"__file__": str(Path(folder) / "build_engine.py"), "__name__": "engine"}
    exec(compile(text, "build_engine.py", "exec"), program)
    flags = program["load_plugins"](trt)
    kinds = trt.LayerType
    named = {
        "edge_sdss/mean": (kinds.PLUGIN_V3, trt.float32),
        "edge_sdss/squares": (kinds.ELEMENTWISE, trt.float32),
        "edge_sdss/columns": (kinds.CONSTANT, trt.int64),
        "layers.0": (kinds.ELEMENTWISE, trt.float32),
    }
    kept: list[str] = []

    def layer(name: str) -> SimpleNamespace:
        kind, type_ = named[name]
        output = SimpleNamespace(dtype=type_)
        return SimpleNamespace(
            name=name, type=kind, get_output=lambda i: output, set_output_type=lambda i, to: kept.append(name)
        )

    layers = [layer(name) for name in named]
    network = SimpleNamespace(num_layers=len(layers), get_layer=lambda i: layers[i])
    config = SimpleNamespace(set_flag=lambda flag: kept.append(str(flag).removeprefix("BuilderFlag.")))
    program["keep_float32"](trt, network, config)
    return {"flags": flags, "kept": kept}


def main(version: str, folder: str) -> None:
    is_v3 = version == "10.3"
    if is_v3:
        import device

        fake = device.install()
    trt, registry = bindings.load(version)
    sys.path.insert(0, folder)
    module = importlib.import_module("v3_plugins" if is_v3 else "aot_plugins")
    dims = bindings.expressions(trt)
    if is_v3:
        module.Plugin.cuda = module.Cuda(fake.library._name)
    else:
        bindings.remember_symbols()
    arrays, wanted = case()
    found = {}
    for name in INPUTS:
        creator = registry.get_creator(name, "1", "edge_sdss")
        fields = trt.PluginFieldCollection([])
        if is_v3:
            plugin = creator.create_plugin(name, fields, None)
            ALIVE.append(plugin)
        else:
            plugin = creator.create_plugin(name, "edge_sdss", fields, None, trt.QuickPluginCreationRequest.STRICT_AOT)
        facts, execute = (v3 if is_v3 else aot)(trt, plugin, name, arrays, dims)
        out = np.full(facts["shape"], np.nan, dtype=np.float32)
        execute(out)
        facts["error"] = float(np.abs(out - wanted[name]).max())
        found[name] = facts
    engine = engine_program(trt, folder)
    print(json.dumps({"version": trt.__version__, "plugins": found, "engine": engine}), flush=True)
    os._exit(0)  # the layer's own end needs the library


if __name__ == "__main__":
    main(*sys.argv[1:])
