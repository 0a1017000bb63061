"""The records of a bundle's manifest.json. Knows nothing of where a bundle lies or how it is switched."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MANIFEST = "manifest.json"

Precision = Literal["float32", "float16", "int8", "int4"]
KvCache = Literal["growing", "shared"]


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


class Graph(_Record):
    """What a runtime must know to call the graph.

    Inputs: input_ids [batch, n] int64; attention_mask [batch, past + n] int64; position_ids [batch, n] int64 if
    `position_ids`; past_key_values.{i}.key and .value [batch, kv_heads, past, head_dim] in `kv_dtype`.
    Outputs: logits [batch, n, vocabulary], or [batch, 1, vocabulary] where `last_logits_only`; present.{i}.key and
    .value; hidden_states [batch, n, width] float32, after the final norm, if `hidden_states`.
    kv_cache "growing": present is past with the new tokens behind it. "shared": past and present are one buffer
    [batch, kv_heads, capacity, head_dim], bound as both; how much of it is filled, the mask's length says.
    """

    file: str = "model.onnx"
    precision: Precision
    block_size: int | None = Field(None, description="weights that share a scale, for int4 and int8")
    kv_cache: KvCache
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


class AdapterEntry(_Record):
    """An adapter. `source_sha256` is of its adapter_model.safetensors; `scale` is alpha / r, folded into B."""

    name: str
    file: FileEntry
    rank: int
    scale: float
    base_fingerprint: str
    source_sha256: str


class Check(_Record):
    """One measured comparison, such as stage "quantised", metric "max |Δlogit|" against "fp32 graph"."""

    stage: str
    against: str
    metric: str
    value: float
    limit: float | None = None
    n: int


class Manifest(_Record):
    """What is in a bundle. `base_fingerprint` is `LanguageModel.fingerprint` of the model it was made from."""

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
