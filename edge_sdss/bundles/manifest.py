"""A bundle's manifest.json: its records, and whether a folder holds what it says.

Knows nothing of where bundles are kept or how one is switched for another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge_sdss.errors import InputError, message
from edge_sdss.files import read_record, replace, sha256

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

Precision = Literal["float32", "float16", "int8", "int4"]
KvCache = Literal["growing", "shared", "static"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """A file of the bundle, `path` relative to it, with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


class Site(_Record):
    """A linear that adapters may change: y = x W + (x A) B, with A [inputs, r] and B [r, outputs].

    `module` is its path in the transformers model, such as model.layers.0.self_attn.q_proj. `lora_a` and `lora_b`
    are the graph's inputs, float32 or float16 as `Graph.lora_dtype` says; their defaults have rank 0. The scale
    alpha / r is folded into B. Where several modules share a site (a packed q, k, v), each has an entry with the
    columns of B that are its own: `start` is the first.
    """

    module: str
    inputs: int
    outputs: int
    lora_a: str
    lora_b: str
    start: int = 0


class Static(_Record):
    """Graphs of fixed shapes, by files of the bundle: `prefill` and `decode`, in parts that run one after another.

    `tokens` are prefilled at once, `past` are the slots of the KV cache before them, in decoding there are
    `past` + `tokens` − 1; `rank` is that of the LoRA inputs. `embedding` is an .npy [vocabulary, width]. `prefix`: .npz
    files by adapter, "" is the base: `ids`, with which every prompt begins, their `logits`, and their keys and values
    by the inputs' names.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    tokens: int
    past: int
    rank: int
    embedding: str
    prefix: dict[str, str]


class Graph(_Record):
    """What a runtime must know to call the graph.

    Inputs: input_ids [batch, n] int64; attention_mask [batch, past + n] int64; position_ids [batch, n] int64 if
    `position_ids`; past_key_values.{i}.key and .value [batch, kv_heads, past, head_dim] in `kv_dtype`.
    Outputs: logits [batch, n, vocabulary], or [batch, 1, vocabulary] where `last_logits_only`; present.{i}.key and
    .value; hidden_states [batch, n, width] float32, after the final norm, if `hidden_states`.
    kv_cache "growing": present is past with the new tokens behind it. "shared": past and present are one buffer
    [batch, kv_heads, capacity, head_dim], bound as both; how much of it is filled, the mask's length says.
    "static": there are the graphs of `static` instead, as `exporting.static_decoder.build` describes them.
    """

    file: str = "model.onnx"
    precision: Precision
    block_size: int | None = Field(None, description="weights that share a scale, for int4 and int8")
    kv_cache: KvCache
    static: Static | None = Field(None, description="the graphs, where kv_cache is static; `file` is one of them")
    kv_dtype: Literal["float32", "float16"] = "float32"
    lora_dtype: Literal["float32", "float16"] = "float32"
    position_ids: bool = True
    hidden_states: bool = False
    last_logits_only: bool = False
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    width: int
    context: int
    sites: tuple[Site, ...] = ()
    plain: str | None = Field(None, description="file of the same graph, over the same weights, without `sites`")


class AdapterEntry(_Record):
    """An adapter. `source_sha256` is of its adapter_model.safetensors; `scale` is alpha / r, folded into B.

    Where PEFT's patterns give modules their own: `rank` is the largest, `scale` that of modules without a pattern.
    `probe` is a file of `bundles.checks.Probe`: what PEFT computes with this adapter.
    """

    name: str
    file: FileEntry
    rank: int
    scale: float
    base_fingerprint: str
    source_sha256: str
    probe: FileEntry | None = None


class Check(_Record):
    """One measured comparison, such as stage "quantised", metric "max |Δlogit|" against "fp32 graph"."""

    stage: str
    against: str
    metric: str
    value: float
    limit: float | None = None
    n: int


class Manifest(_Record):
    """What is in a bundle. `base_fingerprint` is `LanguageModel.fingerprint` of the model it was made from.

    `files` are all but manifest.json and what `adapters` name. `tokenizer_sha256` is of the folder's tokenizer.json.
    """

    schema_version: Literal["1"] = "1"
    base: str
    base_fingerprint: str
    tokenizer_sha256: str
    recipe: str
    graph: Graph
    files: tuple[FileEntry, ...]
    adapters: tuple[AdapterEntry, ...] = ()
    active: str | None = Field(None, description="the adapter that serves where no other is asked for")
    checks: tuple[Check, ...] = ()
    stop_ids: tuple[int, ...] = ()
    made_with: dict[str, str] = Field({}, description="package: version")
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = Field({}, description="what the export was asked for")

    @property
    def entries(self) -> Iterator[FileEntry]:
        """Every file of the bundle but manifest.json itself."""
        yield from self.files
        for adapter in self.adapters:
            yield adapter.file
            if adapter.probe:
                yield adapter.probe

    def adapter(self, name: str) -> AdapterEntry:
        """Returns an adapter by name. Raises InputError where there is none of that name."""
        for entry in self.adapters:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.adapters) or "no adapter at all"
        raise InputError(message(f"use adapter {name}", f"the bundle has {known}", "name one of these or deploy it"))


def entry(folder: Path, path: str) -> FileEntry:
    """Returns size and hash of the file at `path`, relative to `folder`."""
    file = folder / path
    return FileEntry(path=PurePosixPath(path).as_posix(), sha256=sha256(file), size_bytes=file.stat().st_size)


def load(folder: Path) -> Manifest:
    """Returns the manifest of the bundle in `folder`; says nothing of its files, see `verify`.

    Raises InputError where there is none, or one that is wrong or of another version.
    """
    if not (folder / MANIFEST).is_file():
        found = f"there is no {MANIFEST} in it" if folder.is_dir() else "there is no such folder"
        raise InputError(message(f"open the bundle {folder}", found, "give a folder that `edge-sdss export` wrote"))
    return read_record(folder / MANIFEST, Manifest, "a bundle's manifest.json")


def write(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, at once or not at all. Raises InputError where it cannot be written."""
    replace(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def verify(folder: Path) -> Manifest:
    """Returns the manifest after every file's size and SHA-256 were found to be as it says.

    Raises InputError, which names the file and its fault: missing, of another size, of other bytes, outside of the
    folder or named twice; or an adapter of another base.
    """
    manifest = load(folder)
    _check_bindings(folder, manifest)
    for one in manifest.entries:
        fault = _fault(folder, one)
        if fault:
            raise InputError(_asked(folder, f"{one.path} {fault}"))
    return manifest


def _check_bindings(folder: Path, manifest: Manifest) -> None:
    paths = [one.path for one in manifest.entries]
    names = [adapter.name for adapter in manifest.adapters]
    for what, values in (("file", paths), ("adapter", names)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise InputError(_asked(folder, f"it names the {what} {twice[0]} twice"))
    for needed in (manifest.graph.file, TOKENIZER, manifest.graph.plain):
        if needed is not None and needed not in paths:
            raise InputError(_asked(folder, f"it does not name the file {needed}"))
    if manifest.active is not None and manifest.active not in names:
        raise InputError(_asked(folder, f"its active adapter {manifest.active} is not among its adapters"))
    tokenizer = next(one.sha256 for one in manifest.files if one.path == TOKENIZER)
    if tokenizer != manifest.tokenizer_sha256:
        raise InputError(_asked(folder, f"{TOKENIZER} is another one than the model's, by its SHA-256"))
    for adapter in manifest.adapters:
        if adapter.base_fingerprint != manifest.base_fingerprint:
            of, here = adapter.base_fingerprint[:12], manifest.base_fingerprint[:12]
            raise InputError(_asked(folder, f"adapter {adapter.name} is of base {of}, the bundle's is {here}"))


def _fault(folder: Path, one: FileEntry) -> str | None:
    pure = PurePosixPath(one.path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in one.path or one.path in ("", ".", MANIFEST):
        return "is no path inside of a bundle"
    file = folder / one.path
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            return "leads out of the bundle"
        size = os.stat(file).st_size
        if not file.is_file():
            return "is no file"
        if size != one.size_bytes:
            return f"has {size} bytes, not {one.size_bytes}"
        return None if sha256(file) == one.sha256 else "has other bytes than when the bundle was made, by its SHA-256"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read, {error.strerror}"


def _asked(folder: Path, found: str) -> str:
    return message(f"verify the bundle {folder}", found, "export it anew, or roll back")
