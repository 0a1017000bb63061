"""From settings to a torch module and a tokenizer: offline, no pickle, no code of the model's folder.

Knows nothing of what is done with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from edge_sdss import default_model
from edge_sdss.errors import BackendUnavailable, InputError, message
from edge_sdss.files import sha256
from edge_sdss.lm.piecewise import Hold, assemble
from edge_sdss.types import Progress

PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For the environment, before torch is loaded: threads that wait leave the processor to others.

A user's device does other things too. With two busy cores, a step whose two threads spin took ten times as long.
"""

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def torch_module() -> ModuleType:
    """Returns torch. Raises BackendUnavailable where it or transformers is not installed."""
    for name, value in PATIENT.items():
        os.environ.setdefault(name, value)
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        found = f"the package {error.name} is not installed"
        raise BackendUnavailable(message("load a model", found, "run `pip install 'edge_sdss[train]'`")) from error
    return torch


def device_of(asked: str) -> str:
    """Returns "cpu" or "cuda" for "auto", "cpu" or "cuda". Raises BackendUnavailable for an absent GPU."""
    torch = torch_module()
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        found = "torch sees no CUDA device"
        raise BackendUnavailable(message("use device cuda", found, "ask for cpu or install torch with CUDA"))
    return asked


def find(name: str | None, progress: Progress) -> Path:
    """Returns the Hugging Face folder of a model: None is the default model, else a folder or a hub id.

    Raises BackendUnavailable where a hub id is not in the local cache, InputError for a folder that is
    not there or holds no model in safetensors.
    """
    if name is None:
        return default_model.path(progress)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _cached(name)
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights in safetensors")):
        if not any(folder.glob(pattern)):
            do = "give the folder of a Hugging Face model"
            raise InputError(message(f"load model {name}", f"there is no {what} in {folder}", do))
    return folder


def fingerprint(folder: Path) -> str:
    """Returns the SHA-256 over a model's configuration and weights on the disk, 64 hexadecimal digits."""
    digests = "".join(sha256(file) for file in (folder / "config.json", *sorted(folder.glob("*.safetensors"))))
    return hashlib.sha256(digests.encode()).hexdigest()


def load(folder: Path, dtype: Any, hold: Hold | None = None) -> tuple[Any, Any]:
    """Returns the causal model, in `dtype`, and its tokenizer. Raises InputError where it is none.

    With `hold`, which says how each tensor is held, the weights are there one by one and never all in `dtype`; not
    so for a model whose names on the disk are others than its own: it comes in `dtype`.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    asked = f"load model {folder}"
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder, **local)
            names = config.architectures or []
            if names and not any(name.endswith(_CAUSAL) for name in names):
                raise InputError(message(asked, f"it is a {names[0]}", "give a causal language model"))
            model = None if hold is None else assemble(folder, config, hold)
            if model is None:
                options: Any = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **local}
                loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
                model, told = loaded
                if missing := sorted(told["missing_keys"]):  # they would be random numbers
                    raise InputError(message(asked, f"{missing[0]} is not in it", "give the model's whole folder"))
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise InputError(message(asked, _line(error), "give a causal language model")) from error
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(message(asked, "there is no tokenizer in it", "put the model's tokenizer.json there"))
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(message(asked, f"its tokenizer fails, {_line(error)}", "mend its files")) from error
    return model, tokenizer


def _cached(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        found = "there is no such folder, and no library to look for one of that name"
        do = "check the path, or pip install 'edge_sdss[train]'"
        raise BackendUnavailable(message(f"load model {name}", found, do)) from error
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        found = "there is no such folder, and no model of that name in the local Hugging Face cache"
        do = f"run `hf download {name}` where there is a network, or give a folder"
        raise BackendUnavailable(message(f"load model {name}", found, do)) from error
    except HFValidationError as error:
        raise InputError(message(f"load model {name}", "there is no such folder", "check the path")) from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings and progress bars off the terminal for a while."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
