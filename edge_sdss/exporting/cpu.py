"""A graph on ONNX Runtime's CPU provider, for checks and calibration. Knows nothing of what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_sdss.errors import BackendUnavailable, message


def on_cpu(file: Path, threads: int = 0, *, as_written: bool = False) -> Any:
    """Opens a graph; `as_written`: no node is fused or folded. Raises BackendUnavailable without onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        found, do = "the package onnxruntime is not installed", "run `pip install 'edge_sdss[export]'`"
        raise BackendUnavailable(message("run a graph", found, do)) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of each adapter input
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
