"""A graph on Snapdragon's NPU, the HTP: on x86-64 Linux in the emulation that onnxruntime-qnn brings.

The compiler is the real one, the arithmetic the emulation's: what it answers is never a device's answer. Knows nothing
of what a graph computes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_sdss import qnn
from edge_sdss.errors import BackendUnavailable, ExportError, message

PROVIDER = qnn.PROVIDER
OPTIONS: Mapping[str, str] = {"soc_model": "57", "htp_arch": "75", "enable_htp_fp16_precision": "1"}
"""Snapdragon 8 Gen 3."""


def check_installed() -> None:
    """Raises BackendUnavailable, with the way out, where graphs cannot be compiled for the HTP."""
    _package()


def session(
    file: Path,
    options: Mapping[str, str] | None = None,
    *,
    fallback: bool = False,
    context: Path | None = None,
    entries: Mapping[str, str] | None = None,
    log_severity: int = 3,
) -> Any:
    """Returns an InferenceSession of a graph, or of a context binary's file, compiled for the HTP.

    `options` are the provider's, on top of `OPTIONS`; `entries` are of the session. Without `fallback` a node that the
    HTP does not take is an error. With `log_severity` 0 the
    provider says why, on standard error. `context` writes the compiled graph to this .onnx, its binary beside it.
    Raises BackendUnavailable where onnxruntime-qnn is not installed, ExportError where the graph cannot be compiled.
    """
    package, ort = _package()
    asked = f"compile {file} for the HTP"
    device = qnn.device(ort, package, asked)
    backend = os.path.join(os.path.dirname(package.__file__), "libQnnHtp.so")
    chosen = {"backend_path": backend, **OPTIONS, **(options or {})}
    if not os.path.isabs(chosen["backend_path"]):
        chosen["backend_path"] = backend
    set_ = ort.SessionOptions()
    set_.log_severity_level = log_severity
    given = dict(entries or {})
    if not fallback:
        given["session.disable_cpu_ep_fallback"] = "1"
    if context is not None:
        given |= {"ep.context_enable": "1", "ep.context_file_path": str(context), "ep.context_embed_mode": "0"}
    for key, value in given.items():
        set_.add_session_config_entry(key, value)
    set_.add_provider_for_devices([device], chosen)
    try:
        return ort.InferenceSession(str(file), set_)
    except Exception as error:  # its exceptions have no common class
        found = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        do = "see `edge-sdss export --explain`, or another soc_model or htp_arch in the recipe"
        raise ExportError(message(asked, found, do)) from error


def _package() -> tuple[Any, Any]:
    asked = "compile for the HTP"
    try:
        return importlib.import_module("onnxruntime_qnn"), importlib.import_module("onnxruntime")
    except ImportError as error:
        found = f"the package {error.name} is not installed"
        do = "run `pip install 'edge_sdss[qnn]'` on x86-64 Linux with glibc 2.35 or newer, Python 3.11 or newer"
        raise BackendUnavailable(message(asked, found, do)) from error
