"""Answers from a bundle by ONNX Runtime, without torch and transformers.

    engine.py     Engine, the one class that others use
    stream.py     an answer in the making: pieces of text, then token embeddings
    talk.py       a conversation in a lane, prefixes reused
    batch.py      answers of many conversations
    measures.py   logits and losses
    lane.py       rows that are computed together: IO binding, prefill, decode
    kv.py         their keys and values, growing or in one shared buffer
    adapters.py   LoRA adapters as inputs of the graph: read, scaled, mixed
    sampling.py   from logits to the next token
    writer.py     from tokens to text that may be shown
    chat.py       tokenizer and chat template
    providers.py  execution providers

Does not know how a bundle is made or where it is deployed.
"""

from edge_sdss.runtime.adapters import ACTIVE
from edge_sdss.runtime.engine import Engine
from edge_sdss.runtime.sampling import Sampling
from edge_sdss.runtime.stream import Embeddings, Stream

__all__ = ["ACTIVE", "Embeddings", "Engine", "Sampling", "Stream"]
