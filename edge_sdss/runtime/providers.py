"""ONNX Runtime's execution providers: which one a bundle runs on. Knows nothing of what the graph computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edge_sdss import qnn
from edge_sdss.bundles import Manifest
from edge_sdss.errors import BackendUnavailable, ConfigError, InputError, message


@dataclass(frozen=True)
class Provider:
    """`name` is ONNX Runtime's, `device` where tensors are bound, `install` what brings it."""

    name: str
    device: str
    install: str


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "cpu", "pip install onnxruntime"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        "cuda",
        "pip install onnxruntime-gpu with its CUDA and cuDNN libraries, on JetPack 6 NVIDIA's own wheel",
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider", "cuda", "pip install onnxruntime-gpu and the TensorRT libraries it was built for"
    ),
    "coreml": Provider("CoreMLExecutionProvider", "cpu", "pip install onnxruntime on macOS"),
    "qnn": Provider("QNNExecutionProvider", "cpu", "pip install onnxruntime-qnn"),
}


@dataclass(frozen=True)
class Opened:
    """A session, the key of the provider it runs on, and why it is that one."""

    session: Any
    provider: str
    reason: str

    @property
    def device(self) -> str:
        """Where its tensors are bound: "cpu" or "cuda"."""
        return PROVIDERS[self.provider].device


def library() -> ModuleType:
    """Returns onnxruntime. Raises BackendUnavailable where it is not installed or too old for adapters."""
    try:
        import onnxruntime
    except ImportError as error:
        found = f"the package {error.name} is not installed"
        raise BackendUnavailable(message("run a bundle", found, "run `pip install onnxruntime tokenizers`")) from error
    if not hasattr(onnxruntime, "AdapterFormat"):
        found = f"onnxruntime {onnxruntime.__version__} knows no adapters"
        raise BackendUnavailable(message("run a bundle", found, "install onnxruntime 1.20 or newer"))
    module: ModuleType = onnxruntime
    return module


def open_session(file: Path, manifest: Manifest, asked: str, threads: int | None) -> Opened:
    """Opens the graph on the provider that is asked for; "auto" takes the recipe's, else the CPU, and says so.

    The manifest's settings may hold `provider` and `provider_options`. Raises BackendUnavailable where the
    explicit choice is not there or ONNX Runtime falls back from it, InputError where the graph cannot be read.
    """
    if asked not in (*PROVIDERS, "auto"):
        found = f"there are {', '.join(PROVIDERS)} and auto"
        raise ConfigError(message(f"run on provider {asked}", found, "choose one of them"))
    if not file.is_file():
        raise InputError(message(f"open graph {file}", "there is no such file", "export the bundle anew"))
    if asked != "auto":
        return Opened(_session(file, manifest, asked, threads), asked, "asked for")
    wanted = manifest.settings.get("provider") or of_recipe(manifest.recipe)
    if wanted != "cpu":
        try:
            return Opened(_session(file, manifest, wanted, threads), wanted, f"recipe {manifest.recipe}")
        except BackendUnavailable as error:
            return Opened(_session(file, manifest, "cpu", threads), "cpu", str(error))
    return Opened(_session(file, manifest, "cpu", threads), "cpu", f"recipe {manifest.recipe}")


def of_recipe(recipe: str) -> str:
    """Returns the key of the provider that a recipe is for, by its name, such as onnxruntime-cpu or qnn-htp."""
    words = recipe.split("-")
    return next((key for key in PROVIDERS if key in words), "cuda" if "jetson" in words else "cpu")


def _session(file: Path, manifest: Manifest, key: str, threads: int | None) -> Any:
    ort, provider = library(), PROVIDERS[key]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    chosen = {str(k): str(v) for k, v in manifest.settings.get("provider_options", {}).items()}
    asked = f"run on provider {key}"
    if key == "qnn":
        _register_qnn(ort, options, chosen)
        providers = None
    else:
        if provider.name not in ort.get_available_providers():
            found = f"onnxruntime {ort.__version__} has {', '.join(ort.get_available_providers())}"
            raise BackendUnavailable(message(asked, found, provider.install))
        below = ["CUDAExecutionProvider"] if key == "tensorrt" else []
        providers = [(provider.name, chosen), *(name for name in (*below, PROVIDERS["cpu"].name) if key != "cpu")]
    try:
        session = ort.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # its exceptions have no common class
        found = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if key == "cpu":
            raise InputError(message(f"open graph {file}", found, "export the bundle anew")) from error
        raise BackendUnavailable(message(asked, found, provider.install)) from error
    if provider.name not in session.get_providers():
        found = f"onnxruntime fell back to {', '.join(session.get_providers())}"
        raise BackendUnavailable(message(asked, found, provider.install))
    return session


def _register_qnn(ort: ModuleType, options: Any, chosen: dict[str, str]) -> None:
    """QNN is a plugin: a library that is registered by name, then a device of it."""
    asked = "run on provider qnn"
    try:
        import onnxruntime_qnn
    except ImportError as error:
        found = f"the package {error.name} is not installed"
        raise BackendUnavailable(message(asked, found, PROVIDERS["qnn"].install)) from error
    options.add_provider_for_devices([qnn.device(ort, onnxruntime_qnn, asked)], chosen)
