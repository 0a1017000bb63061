"""Frozen weights, LoRA, norms and checkpoints against dense computations, PEFT, transformers and the limit."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import configs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bare
from torch import nn
from torch.autograd import gradcheck
from transformers import AutoConfig, AutoModelForCausalLM

from edge_sdss.config import Tuning
from edge_sdss.tuning import adapter
from edge_sdss.tuning.layers import Lora, checkpointing, frozen, norm
from edge_sdss.tuning.layers.checkpointing import Checkpointed
from edge_sdss.tuning.layers.frozen import NF4_LEVELS, FrozenLinear, Int8, Nf4, freeze, quantise
from edge_sdss.tuning.layers.lora import LoraLinear
from edge_sdss.tuning.limit import WEIGHT_BITS, Setup, lower_limit
from edge_sdss.tuning.loss import cross_entropy
from edge_sdss.tuning.memory import PeakTensorBytes
from edge_sdss.tuning.shapes import architecture

small = partial(configs.small, hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=128)
KINDS = ("float32", "bfloat16", "int8", "nf4")


def model_of(config: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval().requires_grad_(False)


# Frozen weights


def test_levels_are_the_quantiles_of_the_papers_procedure() -> None:
    """Evenly spaced quantiles, 8 below zero and 9 above it, scaled so that the outermost are -1 and 1."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    upper = [NormalDist().inv_cdf(offset - i * (offset - 0.5) / 8) for i in range(8)]
    lower = [-NormalDist().inv_cdf(offset - i * (offset - 0.5) / 7) for i in range(7)]
    expected = sorted([*upper, 0.0, *lower])
    assert pytest.approx([level / expected[-1] for level in expected], abs=1e-6) == NF4_LEVELS


@given(rows=st.integers(1, 70), width=st.integers(1, 90), spread=st.floats(1e-4, 1e3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_what_is_held_in_few_bits_is_near(rows: int, width: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * spread
    before = weight.clone()
    int8 = freeze(weight, "int8").dense(torch.float32)
    assert bool(((int8 - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all())
    held = freeze(weight, "nf4")
    assert isinstance(held, Nf4)
    flat = torch.nn.functional.pad(weight.view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(1)
    scales = held.block_scales()[: len(flat)]
    assert bool(((scales - largest).abs() <= (largest - largest.mean()).abs().max() / 127 * 0.51 + 1e-6 * spread).all())
    # Half of the widest gap between two levels, and what the scale is off.
    bound = largest * (NF4_LEVELS[1] - NF4_LEVELS[0]) / 2 + (scales - largest).abs() + 1e-6 * spread
    off = torch.nn.functional.pad(held.dense(torch.float32).view(-1), (0, -weight.numel() % 64)).view(-1, 64) - flat
    assert bool((off.abs() <= bound[:, None]).all())
    assert torch.equal(weight, before), "the weight itself is left alone"


@pytest.mark.parametrize("shape", [(1, 64), (300, 576), (1000, 500), (7, 33)])
def test_a_weight_is_decoded_from_its_codes_one_by_one(shape: tuple[int, int]) -> None:
    """Codes, scales of blocks and scales of groups, read by a plain loop."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    held = Nf4(weight)
    assert held.dense(torch.float32).shape == shape
    dense = held.dense(torch.float32).view(-1).tolist()
    for index in {0, 1, 63, 64, 16_383, 16_384, 65_535, 65_536, weight.numel() - 1}:
        if index < weight.numel():
            byte = int(held.codes[index // 2])
            level = NF4_LEVELS[byte >> 4 if index % 2 == 0 else byte & 15]
            group, within = divmod(index // 64, 256)
            scale = float(held.scales[group, within]) * float(held.group_scales[group]) + float(held.mean)
            assert dense[index] == pytest.approx(level * scale, rel=1e-5)
    rounded = held.dense(torch.float32).bfloat16()
    assert torch.equal(held.dense(torch.bfloat16), rounded), "rounded once, at the end"


def test_weights_of_zero_stay_zero_and_large_ones_are_exact() -> None:
    for kind in KINDS:
        assert torch.equal(freeze(torch.zeros(5, 70), kind).dense(torch.float32), torch.zeros(5, 70))
    weight = torch.tensor([[127.0, -64.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.equal(freeze(weight, "int8").dense(torch.float32), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_takes_the_bits_that_the_limit_counts(kind: Any) -> None:
    held = freeze(torch.randn(512, 768), kind)
    assert held.bytes * 8 / (512 * 768) == pytest.approx(WEIGHT_BITS[kind], rel=0.006)  # int8: a scale for each row


def test_bitsandbytes_has_these_codes_and_decodes_them_to_the_same_numbers() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 200) * 0.02
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    held = Nf4(weight)
    assert torch.equal(codes.view(-1), held.codes[: codes.numel()])
    kernel = frozen._kernel(torch.device("cpu"))
    assert kernel is not None
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(kernel(held, dtype), held.dense(dtype))
    theirs = functional.dequantize_4bit(codes, state)
    assert (held.dense(torch.float32) - weight).norm() < 1.01 * (theirs - weight).norm()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantising_frees_the_weights_one_by_one(kind: Any) -> None:
    model = model_of(small("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=6))
    originals = [weakref.ref(module.weight) for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    before = sum(parameter.nbytes for parameter in model.parameters())
    with PeakTensorBytes([*model.parameters(), *model.buffers()]) as memory:
        quantise(model, model.model.layers, kind, torch.bfloat16)
    gc.collect()
    assert [ref for ref in originals if ref() is not None] == []
    # One matrix in NF4 takes copies of a chunk and of its codes beside it.
    assert memory.peak < before + 2_500_000
    after = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert after < before * (0.35 if kind == "int8" else 0.2)
    assert model.lm_head.weight is model.model.embed_tokens.weight or model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()


def test_a_quantised_model_is_near_the_model() -> None:
    model = model_of(small("llama", tie_word_embeddings=True))
    ids = torch.arange(40)[None]
    plain = model(input_ids=ids).logits
    errors = []
    for kind in ("float32", "bfloat16", "int8", "nf4"):
        held = copy.deepcopy(model)
        quantise(held, held.model.layers, kind, torch.float32)
        assert held.lm_head.weight is held.model.embed_tokens.weight
        errors.append(float((held(input_ids=ids).logits.float() - plain).norm() / plain.norm()))
    assert errors[0] == 0
    assert errors[1] < 0.02
    assert errors[2] < 0.02
    assert errors[3] < 0.2


# LoRA


def dense_lora(layer: LoraLinear, x: Any, mask: Any = 1.0) -> Any:
    lora = layer._lora
    y = x @ layer.weight.dense(x.dtype).T + lora.scaling * ((x * mask) @ layer.a.T) @ layer.b.T
    return y if layer.bias is None else y + layer.bias


def lora_layer(kind: Any = "float32", *, lora: Lora | None = None, bias: bool = True) -> LoraLinear:
    torch.manual_seed(3)
    layer = LoraLinear(
        freeze(torch.randn(9, 70), kind),
        torch.randn(9, dtype=torch.float64) if bias else None,
        lora or Lora(4, 8.0),
        torch.float64,
    )
    with torch.no_grad():
        layer.b.normal_()
        if layer.magnitude is not None:
            layer.magnitude.mul_(torch.rand(9, dtype=torch.float64) + 0.5)
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lora", [Lora(4, 8.0), Lora(4, 8.0, rslora=True), Lora(4, 8.0, dropout=0.4)], ids=["plain", "rslora", "dropout"]
)
def test_gradients_of_lora_are_those_of_the_dense_computation(kind: Any, lora: Lora) -> None:
    layer = lora_layer(kind, lora=lora)
    x = torch.randn(1, 2, 70, dtype=torch.float64, requires_grad=True)

    def run(*tensors: Any) -> Any:
        torch.manual_seed(1)  # the same mask each time
        return layer(tensors[0])

    assert gradcheck(run, (x, layer.a, layer.b))
    torch.manual_seed(1)
    y = layer(x)
    mask = 1.0
    if lora.dropout:
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        mask = torch.empty_like(x).bernoulli_(0.6, generator=generator) / 0.6
        assert 0.4 < float((mask > 0).double().mean()) < 0.8
    dense = dense_lora(layer, x, mask)
    torch.testing.assert_close(y, dense)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.a, layer.b), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(dense, (x, layer.a, layer.b), upstream))
    assert lora.scaling == 8 / (2 if lora.rslora else 4)


def test_dropout_is_new_at_each_call_and_none_in_evaluation() -> None:
    layer = lora_layer(lora=Lora(4, 8.0, dropout=0.4))
    x = torch.randn(3, 70, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), dense_lora(layer, x))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_is_that_of_peft(rslora: bool, dora: bool, bias: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 24, bias=bias)).requires_grad_(False)
    plain = base[0]
    chosen = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_rslora=rslora, use_dora=dora)
    torch.manual_seed(5)
    theirs = peft.get_peft_model(base, chosen).base_model.model[0]
    torch.manual_seed(5)
    ours = LoraLinear(frozen.Dense(plain.weight), plain.bias, Lora(4, 8.0, rslora=rslora, dora=dora))
    assert torch.equal(ours.a, theirs.lora_A["default"].weight), "equal seeds, equal first weights"
    if dora:
        torch.testing.assert_close(ours.magnitude, theirs.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        ours.b.normal_()
        theirs.lora_B["default"].weight.copy_(ours.b)
        if ours.magnitude is not None:
            ours.magnitude.mul_(torch.rand(24) + 0.5)
            theirs.lora_magnitude_vector["default"].weight.copy_(ours.magnitude)
    x = torch.randn(2, 7, 48, requires_grad=True)
    learnt = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    mine = [ours.a, ours.b]
    if ours.magnitude is not None:
        learnt.append(theirs.lora_magnitude_vector["default"].weight)
        mine.append(ours.magnitude)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, [x, *mine], upstream),
        torch.autograd.grad(expected, [x, *learnt], upstream),
        rtol=1e-4,
        atol=1e-5,
    )


def test_dora_with_dropout_drops_the_base_weights_part_of_the_difference_too() -> None:
    layer = lora_layer(lora=Lora(4, 8.0, dropout=0.4, dora=True))
    x = torch.randn(6, 70, dtype=torch.float64)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    dropped = x * torch.empty_like(x).bernoulli_(0.6, generator=generator) / 0.6
    weight = layer.weight.dense(torch.float64)
    whole = weight + 2 * layer.b @ layer.a
    scale = layer.magnitude / whole.norm(dim=1)
    torch.testing.assert_close(y, x @ weight.T + layer.bias + dropped @ (scale[:, None] * whole - weight).T)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_saves_its_input_and_no_dense_weight(kind: Any) -> None:
    layer = LoraLinear(freeze(torch.randn(64, 128), kind), None, Lora(4, 8.0, dropout=0.1))
    x = torch.randn(3, 50, 128, requires_grad=True)
    saved: list[Any] = []

    def pack(tensor: Any) -> Any:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), layer.a.data_ptr(), layer.b.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_follows_the_type_of_the_activations_and_its_gradients_the_weights(dtype: Any) -> None:
    layer = LoraLinear(freeze(torch.randn(64, 128), "nf4"), torch.randn(64).to(dtype), Lora(4, 8.0), torch.bfloat16)
    y = layer(torch.randn(5, 128, dtype=dtype, requires_grad=True))
    y.sum().backward()
    assert y.dtype == dtype
    assert layer.a.grad is not None
    assert layer.a.grad.dtype == layer.a.dtype == torch.bfloat16


def test_a_frozen_linear_has_a_gradient_for_its_input() -> None:
    layer = FrozenLinear(Int8(torch.randn(6, 10)), torch.randn(6, dtype=torch.float64))
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (x,))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


# Norms


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3_text", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_transformers(family: str, dtype: Any) -> None:
    model = model_of(small(family)).to(dtype)
    modules = [module for name, module in model.named_modules() if name.endswith("norm")]
    assert len(modules) > 4
    for module in modules:
        with torch.no_grad():
            module.weight.add_(torch.randn(module.weight.shape) * 0.2)
        ours = norm.like(module)
        assert ours is not None, type(module)
        assert ours.weight is module.weight
        x = (torch.randn(3, 5, len(module.weight)) * 2 + 0.3).to(dtype).requires_grad_()
        y, expected = ours(x), module(x)
        upstream = torch.randn(y.shape).to(dtype)
        (found,), (wanted,) = torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, x, upstream)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(y, expected, **tolerance)
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("centred", [False, True])
def test_gradient_of_the_norm(centred: bool) -> None:
    module = norm.RmsNorm(nn.Parameter(torch.randn(7, dtype=torch.float64), requires_grad=False), 1e-3, centred=centred)
    assert gradcheck(module, (torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True),))


def test_what_is_no_such_norm_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self, compute: Callable[[Any, Any], Any], **named: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(32) + 0.5)
            self.eps = 1e-6
            self.compute = compute
            for name, value in named.items():
                setattr(self, name, value)

        def forward(self, x: Any) -> Any:
            return self.compute(x, self.weight)

    def rms(x: Any, eps: float = 1e-6) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    assert norm.like(Odd(lambda x, w: rms(x) * w)) is not None
    assert norm.like(Odd(lambda x, w: rms(x) * (2 + w))) is None
    assert norm.like(Odd(lambda x, w: rms(x, 1e-5) * w)) is None, "another eps than it says"
    assert norm.like(Odd(lambda x, w: rms(x - x.mean(-1, keepdim=True)) * w)) is None
    assert norm.like(Odd(lambda x, w: rms(x) * w, bias=nn.Parameter(torch.zeros(32)))) is None
    assert norm.like(Odd(lambda x, w: (rms(x) * w, None))) is None
    assert norm.like(nn.LayerNorm(32)) is None
    assert norm.like(nn.Linear(32, 32)) is None


def test_the_norm_saves_its_input_and_a_number_per_row() -> None:
    module = norm.RmsNorm(nn.Parameter(torch.ones(64), requires_grad=False), 1e-6, centred=False)
    x, sizes = torch.randn(10, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
        module(x)
    assert sorted(sizes) == [10, 64, 640]


# Checkpoints


def gradients(model: Any, chosen: Tuning, seed: int = 0) -> tuple[float, list[Any], Any]:
    ids = torch.randint(0, 128, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with adapter.trainable(Bare(model), chosen, None) as adapted:
            for name, parameter in adapted.parameters.items():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
            for _ in range(2):  # the first backward finds out what is spare, the second makes use of it
                torch.manual_seed(9)
                hidden = adapted.backbone(input_ids=ids, use_cache=False).last_hidden_state
                loss = cross_entropy(hidden.flatten(0, 1), adapted.head, ids.flatten(), chunk=16)
                found = torch.autograd.grad(loss, list(adapted.parameters.values()))
            state = torch.get_rng_state()
    return loss.item(), list(found), state


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.3}, {"top_layers": 1}, {"targets": ("o_proj",)}, {"dora": True, "dropout": 0.2}],
    ids=str,
)
def test_checkpoints_change_no_bit(family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Any, *shape: int) -> Any:
        return torch.full(shape, float("nan"), dtype=self.dtype)

    model = model_of(small(family))
    if changes.get("targets"):
        quantise(model, model.model.layers, "int8", torch.float32)
    loss, plain, state = gradients(model, Tuning(rank=4, checkpointing="off", **changes))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)  # what is not computed must not be used
    again, found, after = gradients(model, Tuning(rank=4, checkpointing="on", **changes))
    assert loss == again
    assert torch.equal(state, after)
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one, other)
        assert bool(other.abs().max() > 0)


@pytest.mark.parametrize(
    ("family", "spare"), [("llama", True), ("qwen3", True), ("phi3", True), ("gemma3_text", False)]
)
def test_the_last_linear_is_spared_where_only_a_sum_follows(family: str, spare: bool) -> None:
    model = model_of(small(family))
    with adapter.trainable(Bare(model), Tuning(rank=4, checkpointing="on"), None) as adapted:
        layer = adapted.backbone.layers[1]
        calls = 0
        down = layer.mlp.down_proj.weight
        plain = down.matmul

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return plain(*arguments)

        down.matmul = counted
        for expected in (2, 3 if spare else 4):  # each step a forward; a recomputation unless it is spare
            adapted.backbone(input_ids=torch.arange(12)[None], use_cache=False).last_hidden_state.sum().backward()
            assert calls == expected
        assert isinstance(layer.forward, Checkpointed)
    assert "forward" not in vars(model.model.layers[1])


def test_a_checkpoint_keeps_nothing_but_the_input() -> None:
    model = model_of(small("llama", num_hidden_layers=4))
    ids = torch.arange(100)[None]
    sizes = []
    for mode in ("off", "on"):
        with adapter.trainable(Bare(model), Tuning(rank=4, checkpointing=mode), None) as adapted:
            with PeakTensorBytes([*adapted.frozen, *adapted.parameters.values()]) as memory:
                before = memory._live.live
                hidden = adapted.backbone(input_ids=ids, use_cache=False).last_hidden_state
                sizes.append(memory._live.live - before)
            del hidden
    state = torch.get_rng_state().nbytes
    inputs, cos, rest = 4 * 100 * 64 * 4, 2 * 100 * 16 * 4, 4 * state + 20_000
    result = 2 * 100 * 64 * 4  # the last layer's, which the norm keeps, and the norm's
    assert sizes[1] <= inputs + result + cos + rest
    assert sizes[0] > 5 * sizes[1]


def test_nothing_is_recomputed_without_gradients() -> None:
    layer = nn.Linear(4, 4)
    wrapped = Checkpointed(layer)
    with torch.no_grad():
        assert torch.equal(wrapped(torch.ones(2, 4)), layer(torch.ones(2, 4)))
    assert checkpointing.Checkpointed(layer)(torch.ones(2, 4)).requires_grad


# The whole step


def peak(kind: str, compute: str, config: dict[str, Any], sequence: int, **changes: Any) -> tuple[int, Any]:
    """The measured peak of a step with `kind` weights, and the limit."""
    model = model_of(config)
    types = {"adapter_dtype": compute, "compute_dtype": compute, "weights": kind}
    chosen = Tuning(rank=16, checkpointing="on", **types, **changes)
    adapter.quantise(Bare(model), chosen)
    sizes, width = architecture(config), getattr(torch, compute).itemsize
    setup = Setup(
        batch=1,
        sequence=sequence,
        weight_bits=WEIGHT_BITS[kind],
        embedding_bytes=width,
        activation_bytes=width,
        rank=16,
        adapter_bytes=width,
        optimizer_bytes=2 * width,
        loss_chunk=64,
        top_layers=chosen.top_layers,
        modules=None if chosen.targets == "all-linear" else chosen.targets,
        accumulates=False,
    )
    ids = torch.randint(0, sizes.vocabulary, (1, sequence))
    with adapter.trainable(Bare(model), chosen, None) as adapted:
        optimizer = torch.optim.AdamW(adapted.parameters.values(), fused=True)

        def step() -> None:
            ones = torch.ones_like(ids)
            cross_entropy(
                adapted.backbone(input_ids=ids, attention_mask=ones, use_cache=False).last_hidden_state.flatten(0, 1),
                adapted.head,
                ids.flatten(),
                chunk=64,
            ).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        with PeakTensorBytes([*adapted.frozen, *adapted.parameters.values(), *moments]) as memory:
            step()
    return memory.peak, lower_limit(sizes, setup)


@pytest.mark.parametrize(
    ("kind", "compute"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("nf4", "bfloat16"), ("nf4", "float32")]
)
def test_a_step_keeps_to_the_limit(kind: str, compute: str) -> None:
    """Four layers of SmolLM2-135M's shape at 512 tokens."""
    stated = configs.stated("SmolLM2-135M")
    found, limit = peak(kind, compute, {**stated, "num_hidden_layers": 4}, 512)
    assert 0.98 < found / limit.total_bytes < 1.01


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"top_layers": 1}),
        ("llama", {"targets": ("q_proj", "v_proj")}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("qwen2", {}),
    ],
)
def test_a_step_of_other_families_keeps_to_the_limit(family: str, changes: dict[str, Any]) -> None:
    config = small(family, hidden_size=128, intermediate_size=384, num_hidden_layers=3, head_dim=32, vocab_size=512)
    found, limit = peak("float32", "float32", config, 256, **changes)
    moving = (found - limit.resident_bytes) / limit.peak.total_bytes
    assert 0.98 < moving < 1.1, moving


def test_loss_holds_one_chunk_of_logits() -> None:
    tokens, width, vocabulary, chunk = 256, 16, 4000, 32
    for dtype, per_logit in ((torch.float32, 4), (torch.bfloat16, 6)):
        hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
        weight = torch.randn(vocabulary, width, dtype=dtype)
        targets = torch.randint(vocabulary, (tokens,))
        with PeakTensorBytes([hidden, weight, targets]) as memory:
            cross_entropy(hidden, weight, targets, chunk=chunk).backward()
        kept = dtype.itemsize * (2 * tokens * width + vocabulary * width) + 8 * tokens
        assert memory.peak - kept < 1.05 * per_logit * chunk * vocabulary
