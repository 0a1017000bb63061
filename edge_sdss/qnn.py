"""Snapdragon's NPU at ONNX Runtime: a plugin, registered by name. Knows nothing of graphs and of options."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from edge_sdss.errors import BackendUnavailable, message

PROVIDER = "QNNExecutionProvider"


def device(ort: ModuleType, package: ModuleType, asked: str) -> Any:
    """Returns the plugin's device, for SessionOptions.add_provider_for_devices; `package` is onnxruntime_qnn.

    Raises BackendUnavailable where it finds none.
    """
    if not any(device.ep_name == PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(PROVIDER, package.get_library_path())
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise BackendUnavailable(message(asked, "it finds no device", "see `edge-sdss doctor`"))
    return found[0]
