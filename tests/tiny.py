"""A tiny Llama with random weights and a real byte-level BPE tokenizer, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = (
    "The cat sat on the mat and looked at the rain. What should I cook for dinner tonight? "
    "My doctor says that I should sleep more and walk every day. I feel happy today, thank you! "
    "User: please answer in one sentence. Assistant: of course, here it is. How are you? I'm fine. "
)

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Bare:
    """As much of a language model as `adapter` asks for."""

    adapter = None
    fingerprint = "f"

    def __init__(self, model: Any) -> None:
        self.model = model

    def attach(self, _adapter: Path | None) -> None:
        pass


def byte_pairs() -> Any:
    """A byte-level BPE with three special tokens, trained on TEXT."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return bpe


def tiny_model(folder: Path, *, seed: int = 0, width: int = 64, template: str | None = TEMPLATE) -> Path:
    """Writes the model into `folder` (about 0.5 MB) and returns it. Equal arguments, equal bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = byte_pairs()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=ids[0],
        eos_token_id=ids[1],
        pad_token_id=ids[2],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder
