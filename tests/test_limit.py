"""The lower limit M* against the design's table, against transformers' shapes and against measured peaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from configs import NAMES, known, small, stated
from hypothesis import given
from hypothesis import strategies as st

from edge_sdss.errors import InputError
from edge_sdss.tuning.limit import WEIGHT_BITS, Limit, Setup, adapter_parameters, lower_limit
from edge_sdss.tuning.shapes import Architecture, architecture

MIB = 2**20

# As the model cards and weight indices state them; of multimodal models, the language model alone.
PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Small-3.1-24B": 23_572_403_200,
    "Phi-3-medium-4k": 13_960_238_080,
    "Phi-3-mini-4k": 3_821_079_552,
    "Phi-4-mini": 3_836_021_760,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b": 2_506_172_416,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "gemma-3-4b": 3_880_263_168,
    "phi-4": 14_659_507_200,
}

DESIGN = Setup(
    batch=1,
    sequence=512,
    weight_bits=WEIGHT_BITS["nf4"],
    embedding_bytes=2,
    activation_bytes=2,
    rank=16,
    adapter_bytes=2,
    optimizer_bytes=8,
    loss_chunk=64,
)
FLOAT32 = replace(DESIGN, weight_bits=32, embedding_bytes=4, activation_bytes=4, adapter_bytes=4)


def text(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def test_every_published_model_has_a_count() -> None:
    assert set(NAMES) == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    assert known(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(text(stated(name)), id=name) for name in PUBLISHED),
        small("llama", attention_bias=True, mlp_bias=True),
        {**small("llama"), "head_dim": None, "num_key_value_heads": None},
        small("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=64),
        small("qwen3", attention_bias=True, tie_word_embeddings=True),
        small("gemma2", attention_bias=True, tie_word_embeddings=False),
        small("gemma3_text", layer_types=["full_attention", "sliding_attention"]),
        small("phi3", tie_word_embeddings=True),
    ],
    ids=lambda config: config["model_type"],
)
def test_sizes_are_those_of_transformers(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = architecture(config)
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    model.tie_weights()
    assert ours.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = [
        (name.removeprefix("model.layers.0.").partition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.0.")
    ]
    assert sorted(linears) == sorted((each.name, each.inputs, each.outputs) for each in ours.linears)
    assert ours.linear_parameters == ours.layers * sum(inputs * outputs for _, inputs, outputs in linears)
    if getattr(theirs, "layer_types", None) is not None:
        assert [window is not None for window in ours.windows] == [
            kind == "sliding_attention" for kind in theirs.layer_types
        ]


def test_a_multimodal_model_may_state_its_tie_outside() -> None:
    config = stated("gemma-3-4b")
    assert known("gemma-3-4b").tied
    assert not architecture({**config, "tie_word_embeddings": False}).tied


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; the families known are Llama, Mistral, Qwen"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"intermediate_size": "1536"}, "intermediate_size is '1536'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"sliding_window": "64"}, "sliding_window is '64'"),
        ({"num_key_value_heads": 2}, "num_attention_heads 9 is no multiple of num_key_value_heads 2"),
        ({"hidden_size": 577}, "hidden_size 577 is no multiple of num_attention_heads 9"),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"]}, "not one for each of 30 layers"),
    ],
)
def test_a_config_that_states_no_sizes_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        architecture({**stated("SmolLM2-135M"), **change})


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("SmolLM2-135M", 199),
        ("gemma-3-270m", 522),
        ("Qwen2.5-0.5B", 616),
        ("Llama-3.2-1B", 1238),
        ("Llama-3.2-3B", 2622),
        ("Llama-3.1-8B", 6276),
    ],
)
def test_the_first_estimates_hold_within_two_percent(name: str, mib: int) -> None:
    """Their formula counted a few more hidden states and the product beside a dense weight."""
    assert lower_limit(known(name), DESIGN).total_bytes / MIB == pytest.approx(mib, rel=0.02)


def cut() -> Architecture:
    return architecture({**stated("SmolLM2-135M"), "num_hidden_layers": 4})


def test_the_limit_of_four_float32_layers_by_hand() -> None:
    """Every term written out for four layers of SmolLM2 at 512 tokens."""
    width, mlp, kv, vocabulary, tokens = 576, 1536, 192, 49_152, 512
    linear = 4 * (2 * width * width + 2 * width * kv + 3 * width * mlp)
    lora = 4 * 16 * (2 * (width + width) + 2 * (width + kv) + 3 * (width + mlp))
    dense = vocabulary * width + 4 * 2 * width + width
    fixed = 4 * (linear + dense) + lora * (4 + 4 + 8)
    boundaries = 5 * tokens * width * 4
    layer = tokens * 4 * (3 * width + 2 * width + 2 * kv + 6 * mlp) + 4 * tokens * 9
    found = lower_limit(cut(), FLOAT32)
    assert (found.peak.name, found.layer) == ("highest layer", layer)
    assert found.loss == 64 * vocabulary * 4 + 2 * tokens * width * 4
    assert found.total_bytes == fixed + boundaries + layer
    assert found.total_bytes / MIB == pytest.approx(204, rel=0.02)


def test_a_quantised_weight_is_dense_for_a_moment() -> None:
    few = replace(DESIGN, sequence=8, loss_chunk=1)
    phi, llama = known("phi-4"), known("Llama-3.1-8B")
    plain = [lower_limit(each, replace(few, weight_bits=16)).layer for each in (phi, llama)]
    nf4 = [lower_limit(each, few).layer for each in (phi, llama)]
    assert nf4[0] - plain[0] == pytest.approx(2 * 5120 * 2 * 17_920, rel=0.01)  # gate and up are one weight
    assert nf4[1] - plain[1] == pytest.approx(2 * 4096 * 14_336, rel=0.01)


def test_only_gradients_that_stay_meet_the_boundaries() -> None:
    once, many = (lower_limit(cut(), replace(FLOAT32, accumulates=flag)) for flag in (False, True))
    assert (once.peak.gradients, many.peak.gradients) == (0, many.adapter)
    wide = lower_limit(cut(), replace(FLOAT32, sequence=8, loss_chunk=1, rank=512, accumulates=False))
    assert wide.peak.name == "update"
    assert wide.total_bytes == wide.resident_bytes + wide.adapter


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"modules": ("q_proj", "qkv_proj")}, "qkv_proj to adapt in a llama; choose from q_proj, k_proj"),
        ({"modules": ()}, "no linear to adapt"),
        ({"top_layers": 5}, "top_layers is 5; give 1 to 4"),
        ({"top_layers": 0}, "top_layers is 0"),
        ({"labels": 513}, "labels is 513; give 1 to 512"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_a_setup_that_does_not_fit_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        lower_limit(cut(), replace(FLOAT32, **change))


def limits(first: Setup, second: Setup, name: str) -> tuple[Limit, Limit]:
    return lower_limit(known(name), first), lower_limit(known(name), second)


@given(
    name=st.sampled_from(sorted(PUBLISHED)),
    batch=st.integers(1, 8),
    sequence=st.integers(1, 2048),
    rank=st.integers(1, 64),
    chunk=st.integers(1, 512),
    bits=st.sampled_from(sorted(WEIGHT_BITS.values())),
    accumulates=st.booleans(),
    change=st.sampled_from(["batch", "sequence", "rank", "loss_chunk", "optimizer_bytes", "embedding_bytes"]),
)
def test_more_of_anything_never_needs_less(
    name: str, batch: int, sequence: int, rank: int, chunk: int, bits: float, accumulates: bool, change: str
) -> None:
    setup = Setup(batch, sequence, bits, 2, 2, rank, 2, 8, chunk, accumulates=accumulates)
    less, more = limits(setup, replace(setup, **{change: getattr(setup, change) + 1}), name)
    assert less.total_bytes <= more.total_bytes
    layers = known(name).layers
    few, every = limits(replace(setup, top_layers=1), replace(setup, top_layers=layers), name)
    assert few.total_bytes < less.total_bytes == every.total_bytes
    one, all_modules = limits(replace(setup, modules=("down_proj",)), setup, name)
    assert one.total_bytes < all_modules.total_bytes
    once, many = limits(replace(setup, accumulates=False), replace(setup, accumulates=True), name)
    assert once.total_bytes <= many.total_bytes
    labels = limits(replace(setup, labels=1), setup, name)
    assert labels[0].total_bytes <= labels[1].total_bytes


def peak_bytes(config: dict[str, Any], setup: Setup) -> int:
    """The measured peak of a step in float32: two micro-batches where gradients accumulate, else one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from edge_sdss.tuning.loss import cross_entropy
    from edge_sdss.tuning.memory import PeakTensorBytes

    sizes = architecture(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = range(sizes.layers - (setup.top_layers or sizes.layers), sizes.layers)
    modules = setup.modules or tuple(each.name for each in sizes.linears)
    lora = LoraConfig(r=setup.rank, target_modules=list(modules), layers_to_transform=list(trained))
    adapted = get_peft_model(model, lora).train()
    learnt = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learnt) == adapter_parameters(sizes, setup)
    optimizer = torch.optim.AdamW(learnt, fused=True)
    ids = torch.randint(0, sizes.vocabulary, (setup.batch, setup.sequence))

    def loss() -> torch.Tensor:
        ones = torch.ones_like(ids)
        hidden = model.get_decoder()(input_ids=ids, attention_mask=ones, use_cache=False).last_hidden_state
        weight = model.get_output_embeddings().weight
        return cross_entropy(hidden.flatten(0, 1), weight, ids.flatten(), chunk=setup.loss_chunk)

    def step() -> None:
        for _ in range(2 if setup.accumulates else 1):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    with PeakTensorBytes([*adapted.parameters(), *adapted.buffers(), *moments]) as memory:
        step()
    return memory.peak


@pytest.mark.parametrize(
    ("family", "changes", "most"),
    [
        ("llama", {"sequence": 512}, 1.07),
        ("llama", {"sequence": 128}, 1.07),
        ("llama", {"sequence": 128, "accumulates": False}, 1.07),
        ("llama", {"sequence": 64, "batch": 4, "top_layers": 1}, 1.07),
        ("llama", {"sequence": 256, "top_layers": 1, "modules": ("q_proj", "v_proj")}, 1.07),
        ("llama", {"sequence": 256, "modules": ("down_proj",)}, 1.07),
        ("qwen3", {"sequence": 256}, 1.07),
        ("gemma3_text", {"sequence": 256}, 1.07),
        ("phi3", {"sequence": 256}, 1.2),  # its values are a view that holds queries and keys too
        ("qwen2", {"sequence": 128, "rank": 64, "accumulates": False}, 1.2),  # a wide x @ A is kept
    ],
)
def test_no_step_needs_less_than_the_limit(family: str, changes: dict[str, Any], most: float) -> None:
    """Without what is always there too, or the weights would hide an error of the rest."""
    for library in ("torch", "transformers", "peft"):
        pytest.importorskip(library)
    config = small(family)
    setup = replace(FLOAT32, loss_chunk=32, **{"rank": 4, **changes})
    limit = lower_limit(architecture(config), setup)
    peak = peak_bytes(config, setup)
    assert 0.98 <= peak / limit.total_bytes <= 1.3
    assert 0.98 <= (peak - limit.resident_bytes) / limit.peak.total_bytes <= most
