"""From a Hugging Face folder to a plain ONNX graph with a KV cache, through Optimum.

Knows nothing of adapters, quantisation or bundles: what it writes has the model's own inputs and outputs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_sdss.errors import BackendUnavailable, ExportError, message
from edge_sdss.types import Progress, no_progress

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
"""`model_type` in config.json of what is exported; others are refused, as nothing tests them."""

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The files that a runtime wants beside the graph, where the model has them."""


@dataclass(frozen=True)
class Shape:
    """What config.json says of a model. `kv_heads` and `head_dim` are those of the KV cache."""

    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    width: int
    context: int
    tied: bool


def shape(folder: Path) -> Shape:
    """Reads config.json of a model's folder. Raises ExportError where it is missing or of another family."""
    asked = f"export {folder}"
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = "there is no readable config.json in it"
        raise ExportError(message(asked, found, "give the folder of a Hugging Face model")) from error
    family = config.get("model_type")
    if family not in FAMILIES:
        do = f"give a text model of the families {', '.join(FAMILIES)}"
        raise ExportError(message(asked, f"its model_type is {family!r}", do))
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        vocabulary=config["vocab_size"],
        width=width,
        context=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", family.startswith("gemma")),
    )


def check_installed() -> None:
    """Raises BackendUnavailable, which names what to install, where Optimum's exporter cannot be used."""
    asked = "export a model to ONNX through Optimum"
    for package in ("torch", "transformers", "optimum-onnx", "onnx", "onnxruntime", "onnx-ir"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            found = f"the package {package} is not installed"
            do = "run `pip install 'edge_sdss[train,export]'`"
            raise BackendUnavailable(message(asked, found, do)) from error
    has, wants = importlib.metadata.version("transformers"), _wanted()
    if not wants.contains(has, prereleases=True):
        found = f"transformers {has} is installed, and optimum-onnx wants {wants}"
        do = f"run `pip install 'edge_sdss[train,export]' 'transformers{wants}'` in an environment of its own"
        raise BackendUnavailable(message(asked, found, do))


def export(
    folder: Path,
    out: Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    progress: Progress = no_progress,
) -> Path:
    """Writes `out`/model.onnx, its data where it is large, and the tokenizer's files; returns the graph's path.

    Inputs and outputs are those of `bundles.Graph` with a growing KV cache. float16 is computed in float16
    throughout and meant for GPUs. Peak memory is five to six times the float32 weights. Nothing is fetched from
    a network and no code of the folder runs. Raises ExportError for a model that cannot be exported,
    BackendUnavailable where Optimum, or a transformers it can work with, is not installed.
    """
    shape(folder)
    check_installed()
    asked = f"export {folder}"
    progress("export", 0, 1)
    try:
        with _quiet():
            from optimum.exporters.onnx import main_export

            main_export(
                str(folder),
                output=out,
                task="text-generation-with-past",
                library_name="transformers",
                framework="pt",
                device="cpu",
                dtype={"float32": "fp32", "float16": "fp16"}[dtype],
                do_validation=False,  # parity.py does it, on real prompts
                local_files_only=True,
                trust_remote_code=False,
            )
    except ImportError as error:
        found = f"Optimum's exporter does not import, {_line(error)}"
        do = "run `pip install 'edge_sdss[train,export]'` in a fresh environment"
        raise BackendUnavailable(message(asked, found, do)) from error
    except Exception as error:  # Optimum, transformers and torch raise whatever they like
        found = f"Optimum fails with {type(error).__name__}, {_line(error)}"
        raise ExportError(
            message(asked, found, "check that the folder loads with transformers, and the disk")
        ) from error
    progress("export", 1, 1)
    return out / "model.onnx"


def copy_companions(source: Path, out: Path) -> None:
    """Copies the tokenizer's and the configuration's files, those that are there."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _wanted() -> SpecifierSet:
    """The versions of transformers that optimum-onnx says it works with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted = SpecifierSet()
    for line in importlib.metadata.requires("optimum-onnx") or ():
        requirement = Requirement(line)
        if requirement.name == "transformers" and requirement.marker is None:
            wanted &= requirement.specifier
    return wanted


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no text"]
    return lines[0].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the tracer's warnings and the libraries' log off the terminal for a while."""
    from transformers.utils import logging as transformers_logging

    verbosity, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(verbosity)
