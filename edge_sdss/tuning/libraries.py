"""What Python and the libraries of training take before there is a model. Knows nothing of training."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from edge_sdss import files
from edge_sdss.default_model import cache
from edge_sdss.errors import InputError

RUNTIME_BYTES = 450 << 20
"""Python, torch and transformers on x86-64, rounded up: where they are not here to be measured."""

LEAST_BYTES = 200 << 20
"""No Python with torch and transformers takes less."""

_LIBRARIES = ("torch", "transformers", "safetensors", "numpy")


def runtime_bytes() -> int:
    """Returns the RSS of a fresh process that has done a step of training and has no model any more.

    Measured once for each version of Python and the libraries, and kept in the user's cache. RUNTIME_BYTES where
    they are not installed, or where that process fails.
    """
    file = _file()
    known = None if file is None else _stored(file)
    if file is None or known is not None:
        return known or RUNTIME_BYTES
    measured = _measured_runtime()
    if measured is None:
        return RUNTIME_BYTES
    with suppress(InputError):  # measured again the next time
        files.replace(file, json.dumps({"rss_bytes": measured}))
    return measured


def least_bytes() -> int:
    """Returns `runtime_bytes` where that was measured before, else less than it will be: at once in any case."""
    file = _file()
    return (None if file is None else _stored(file)) or LEAST_BYTES


def _file() -> Path | None:
    """Where the measurement for these versions is kept; None where they are not installed."""
    try:
        versions = [importlib.metadata.version(name) for name in _LIBRARIES]
    except importlib.metadata.PackageNotFoundError:
        return None
    key = hashlib.sha256(
        " ".join([_LOADS_ALL, sys.executable, platform.python_version(), *versions]).encode()
    ).hexdigest()[:12]
    return cache() / f"runtime-{key}.json"


def _stored(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["rss_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


_LOADS_ALL = """
import types
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from edge_sdss import config
from edge_sdss.lm import Encoded
from edge_sdss.processes import sizes, trim
from edge_sdss.tree import Tree
from edge_sdss.tuning import adapter, budgeted, steps, trainer

device = "cuda" if torch.cuda.is_available() else "cpu"
small = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
small |= {"num_attention_heads": 3, "num_key_value_heads": 1}
for weights, rest in (("float32", "float32"), ("nf4", "bfloat16")):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**small)).to(device)
    lm = types.SimpleNamespace(model=model, adapter=None, attach=lambda folder: None)
    settings = config.Tuning(weights=weights, compute_dtype=rest, batch_size=1, epochs=1, checkpointing="on")
    adapter.quantise(lm, settings)
    with adapter.trainable(lm, settings, None) as adapted:
        steps.Optimisation(adapted, [Encoded(list(range(256)), 1)], settings).advance()
del model, lm, adapted
trim()
print(sizes(Tree(), "proc/self/status").get("VmRSS", 0))
"""
"""Steps of a small model, so that what libraries load or set up at their first use is there."""


def _measured_runtime() -> int | None:
    command = [sys.executable, "-c", _LOADS_ALL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
