"""Writes genai_config.json, so that onnxruntime-genai opens the folder of a fast graph. Knows no graph's inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_sdss.bundles.manifest import Graph

NAME = "genai_config.json"


def write(folder: Path, out: Path, graph: Graph) -> Path:
    """Writes out/genai_config.json for the Hugging Face model in `folder` and its graph in `out`; returns its path.

    Decoding is greedy unless the caller asks otherwise. onnxruntime-genai also needs tokenizer.json and
    tokenizer_config.json in `out`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = folder / "generation_config.json"
    chosen = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    path = out / NAME
    record = {"model": _model(config, chosen, graph), "search": _search(graph)}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _model(config: dict[str, Any], chosen: dict[str, Any], graph: Graph) -> dict[str, Any]:
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = chosen.get(name)
        ids[name] = config.get(name) if value is None else value
    eos = ids["eos_token_id"]
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    if graph.position_ids:
        inputs["position_ids"] = "position_ids"
    decoder = {
        "session_options": {"provider_options": []},
        "filename": graph.file,
        "head_size": graph.head_dim,
        "hidden_size": graph.width,
        "inputs": inputs,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": graph.layers,
        "num_key_value_heads": graph.kv_heads,
    }
    return {
        "type": config["model_type"],
        "context_length": graph.context,
        "vocab_size": graph.vocabulary,
        **{name: value for name, value in ids.items() if value is not None},
        "decoder": decoder,
    }


def _search(graph: Graph) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_length": graph.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": graph.kv_cache == "shared",
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
