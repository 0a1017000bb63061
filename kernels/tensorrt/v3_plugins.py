"""The four plugins for TensorRT 10.3 (JetPack 6), which has none from PTX: IPluginV3 in Python, launched by libcuda.

Importing this registers them in the namespace `edge_sdss`; it must be imported where an engine is built *and* where
it runs. `plugins.cubin` or `plugins.ptx` lies beside it. The signatures are those of `aot_plugins.py`. Run on no
device yet.

The launch goes through libcuda itself: PyCUDA takes no stream that it did not make, and TensorRT's must be used. Knows
nothing of edge_sdss: it is copied to the device.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from pathlib import Path

import tensorrt as trt

BLOCK, WARPS, SECTION_BYTES = 256, 8, 128  # as in kernels/README.md
NAMESPACE, VERSION = "edge_sdss", "1"
X_TYPES = (trt.float32, trt.float16, trt.bfloat16)
SUFFIX = {trt.float32: "f32", trt.float16: "f16", trt.bfloat16: "bf16"}
FLOAT, INT32, INT64 = (trt.float32,), (trt.int32,), (trt.int64,)


class Cuda:
    """The three calls of libcuda that a launch takes. The context is the current one, TensorRT's."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self._library = ctypes.CDLL(library)
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._lock = threading.Lock()

    def launch(self, name: str, grid: tuple[int, int], pointers: list[int], integers: list[int], stream: int) -> None:
        """Queues a kernel: `pointers` are the inputs and, last, the output; the integers stand between."""
        *inputs, output = pointers
        block = struct.pack(f"@{len(inputs)}P{len(integers)}iP", *inputs, *integers, output)
        arguments, size = ctypes.create_string_buffer(block, len(block)), ctypes.c_size_t(len(block))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(arguments), 2, ctypes.addressof(size), None)
        function = self._function(name)
        self._check(
            self._library.cuLaunchKernel(
                function, *grid, 1, BLOCK, 1, 1, 0, ctypes.c_void_p(stream), None, ctypes.byref(extra)
            ),
            f"launch {name}",
        )

    def _function(self, name: str) -> ctypes.c_void_p:
        with self._lock:
            if name not in self._functions:
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                self._check(self._library.cuModuleLoadData(ctypes.byref(module), image()), "load the kernels")
                code = self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
                self._check(code, f"find {name}")
                self._functions[name] = function
            return self._functions[name]

    @staticmethod
    def _check(code: int, what: str) -> None:
        if code:
            raise RuntimeError(f"edge_sdss plugin: {what}: CUDA error {code}")


def image() -> bytes:
    """The kernels, compiled: machine code where it lies here, else PTX."""
    here = Path(__file__)
    cubin = here.with_name("plugins.cubin")
    return cubin.read_bytes() if cubin.exists() else here.with_name("plugins.ptx").read_bytes() + b"\0"


class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    """What the four have in common: one output in float32, linear layouts, no attributes, no workspace."""

    name = ""
    inputs: tuple[tuple[trt.DataType, ...], ...] = ()  # of each input, the types it may have
    cuda: Cuda | None = None

    def __init__(self) -> None:
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name, self.plugin_version, self.plugin_namespace = self.name, VERSION, NAMESPACE
        self.num_outputs = 1

    def get_capability_interface(self, type):
        return self

    def get_output_data_types(self, input_types):
        return [trt.float32]

    def supports_format_combination(self, pos, in_out, num_inputs):
        allowed = (*self.inputs, FLOAT)[pos]
        return in_out[pos].desc.format == trt.TensorFormat.LINEAR and in_out[pos].desc.type in allowed

    def get_output_shapes(self, inputs, shape_inputs, expr_builder):
        sizes = self.shape(inputs, expr_builder)
        out = trt.DimsExprs(len(sizes))
        for index, size in enumerate(sizes):
            out[index] = size
        return [out]

    def configure_plugin(self, inp, out):
        pass

    def on_shape_change(self, inp, out):
        pass

    def attach_to_context(self, context):
        return self.clone()

    def get_fields_to_serialize(self):
        return trt.PluginFieldCollection([])

    def set_tactic(self, tactic):
        pass

    def clone(self):
        return type(self)()

    def enqueue(self, input_desc, output_desc, inputs, outputs, workspace, stream):
        grid, integers = self.call([tuple(desc.dims) for desc in input_desc], input_desc[0].type)
        if 0 in grid:
            return
        if Plugin.cuda is None:
            Plugin.cuda = Cuda()
        entry = f"plugin_{self.entry}_{SUFFIX[input_desc[0].type]}"
        Plugin.cuda.launch(entry, grid, [*inputs, outputs[0]], integers, stream)


def _dialogues(offsets, builder):
    return builder.operation(trt.DimensionOperation.SUB, offsets[0], builder.constant(1))


class RaggedMean(Plugin):
    """x [N, d], offsets [B + 1] -> [B, d]."""

    name, entry, inputs = "ragged_mean", "mean", (X_TYPES, INT64)

    def shape(self, inputs, builder):
        return _dialogues(inputs[1], builder), inputs[0][1]

    def call(self, shapes, dtype):
        (_, width), (bounds,) = shapes
        row_bytes = width * (4 if dtype == trt.float32 else 2)
        return (bounds - 1, -(-row_bytes // SECTION_BYTES)), [width]


class TokenEntropy(Plugin):
    """x, offsets -> [B]."""

    name, entry, inputs = "token_entropy", "token_entropy", (X_TYPES, INT64)

    def shape(self, inputs, builder):
        return (_dialogues(inputs[1], builder),)

    def call(self, shapes, dtype):
        (_, width), (bounds,) = shapes
        return (bounds - 1, 1), [bounds - 1, width]


class CenteredEntropy(Plugin):
    """x, means [B, d], offsets -> [B]."""

    name, entry, inputs = "centered_entropy", "centered_entropy", (X_TYPES, FLOAT, INT64)

    def shape(self, inputs, builder):
        return (_dialogues(inputs[2], builder),)

    def call(self, shapes, dtype):
        (_, width), _, (bounds,) = shapes
        return (bounds - 1, 1), [bounds - 1, width]


class Dissimilarity(Plugin):
    """v [B, d], means [m, d], domain [B] -> [B]."""

    name, entry, inputs = "dissimilarity", "dissimilarity", (FLOAT, FLOAT, INT32)

    def shape(self, inputs, builder):
        return (inputs[0][0],)

    def call(self, shapes, dtype):
        (rows, width), _, _ = shapes
        return (-(-rows // WARPS), 1), [rows, width]


PLUGINS = (RaggedMean, TokenEntropy, CenteredEntropy, Dissimilarity)


class Creator(trt.IPluginCreatorV3One):
    """Makes one kind of plugin for TensorRT's ONNX parser and for the runtime."""

    def __init__(self, plugin: type[Plugin]) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = plugin.name, VERSION, NAMESPACE
        self.field_names = trt.PluginFieldCollection([])
        self._plugin = plugin

    def create_plugin(self, name, fields, phase):
        return self._plugin()


CREATORS = [Creator(plugin) for plugin in PLUGINS]


def register() -> None:
    """Enters the plugins into TensorRT's registry; what is there already stays."""
    registry = trt.get_plugin_registry()
    for creator in CREATORS:
        if registry.get_creator(creator.name, VERSION, NAMESPACE) is None:
            registry.register_creator(creator, NAMESPACE)


register()
