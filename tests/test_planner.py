"""The prediction against measured peaks, and plans: the fastest that fits, never slower for more memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import configs
import pytest
from configs import NAMES, known
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import Bare

from edge_sdss import boards, config
from edge_sdss.errors import BudgetExceeded, ConfigError, InputError
from edge_sdss.tuning import libraries
from edge_sdss.tuning.fit import Fit
from edge_sdss.tuning.limit import WEIGHT_BITS, Setup, lower_limit
from edge_sdss.tuning.planner import Calibration, calibrate, plan
from edge_sdss.tuning.predict import Parts, predict
from edge_sdss.tuning.shapes import architecture

MIB, GIB = 1 << 20, 1 << 30
DEFAULTS = config.Tuning()
EVERY_TYPE = ("float32", "bfloat16", "int8", "nf4")


small = partial(configs.small, num_hidden_layers=3)
WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


def peak_bytes(stated: dict[str, Any], setup: Setup, settings: config.Tuning) -> int:
    """The measured peak of a step of two micro-batches where gradients accumulate, else of one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edge_sdss.tuning import adapter
    from edge_sdss.tuning.loss import cross_entropy
    from edge_sdss.tuning.memory import PeakTensorBytes

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stated)).eval()
    lm: Any = Bare(model)
    adapter.quantise(lm, settings)
    with adapter.trainable(lm, settings, None) as adapted:
        learnt = list(adapted.parameters.values())
        optimizer = torch.optim.AdamW(learnt, fused=True)
        ids = torch.randint(0, stated["vocab_size"], (setup.batch, setup.sequence))

        def loss() -> torch.Tensor:
            ones, all_tokens = torch.ones_like(ids), torch.arange(ids.numel())
            found = adapted.backbone(input_ids=ids.clone(), attention_mask=ones, use_cache=False)
            answers = found.last_hidden_state.flatten(0, 1).index_select(0, all_tokens)
            del found
            return cross_entropy(answers, adapted.head, ids.flatten(), chunk=setup.loss_chunk)

        def step() -> None:
            for _ in range(2 if setup.accumulates else 1):
                loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        with PeakTensorBytes([*adapted.frozen, *learnt, *moments]) as memory:
            step()
    return memory.peak


@pytest.mark.parametrize(
    ("family", "model", "changes", "checkpointing"),
    [
        ("llama", {}, {"sequence": 128}, True),
        ("llama", {}, {"sequence": 128}, False),
        ("llama", {}, {"sequence": 64, "batch": 4, "accumulates": False}, True),
        ("llama", {}, {"sequence": 256, "weights": "bfloat16", "top_layers": 2}, True),
        ("llama", {}, {"sequence": 64, "weights": "nf4", "rank": 32}, True),
        ("llama", {}, {"sequence": 128, "batch": 2, "weights": "int8"}, False),
        ("llama", {"vocab_size": 8192}, {"sequence": 64, "loss_chunk": 64}, True),
        ("llama", {}, {"sequence": 256, "top_layers": 1, "modules": ("q_proj", "v_proj")}, False),
        ("llama", {}, {"sequence": 128, "top_layers": 1, "modules": ("down_proj",)}, True),
        ("llama", {}, {"sequence": 128, "dropout": 0.1}, True),
        ("qwen2", {}, {"sequence": 128, "rank": 32}, True),
        ("qwen3", {}, {"sequence": 128, "weights": "nf4"}, False),
        ("gemma3_text", {}, {"sequence": 128}, True),
        ("gemma3_text", WINDOWS, {"sequence": 128, "batch": 2}, True),
        ("gemma3_text", WINDOWS, {"sequence": 128, "weights": "bfloat16"}, False),
        ("phi3", {}, {"sequence": 128}, True),
        ("phi3", {}, {"sequence": 128, "weights": "bfloat16"}, False),
    ],
)
def test_the_peak_is_as_predicted(
    family: str, model: dict[str, Any], changes: dict[str, Any], checkpointing: bool
) -> None:
    """Without what is always there too, which would hide an error of the rest."""
    for library in ("torch", "transformers"):
        pytest.importorskip(library)
    step = {
        "batch": 1,
        "rank": 8,
        "loss_chunk": 32,
        "accumulates": True,
        "modules": None,
        "top_layers": None,
        **changes,
    }
    kind, dropout = step.pop("weights", "float32"), step.pop("dropout", 0.0)
    wide = 4 if kind == "float32" else 2
    setup = Setup(
        weight_bits=WEIGHT_BITS[kind], embedding_bytes=wide, activation_bytes=wide, adapter_bytes=4, optimizer_bytes=8,
        **step,
    )  # fmt: skip
    settings = config.Tuning(
        rank=setup.rank,
        targets=setup.modules or "all-linear",
        top_layers=setup.top_layers,
        weights=kind,
        dropout=dropout,
        checkpointing="on" if checkpointing else "off",
    )
    stated = small(family, **model)
    found = predict(architecture(stated), setup, checkpointing=checkpointing, dropout=dropout > 0)
    measured = peak_bytes(stated, setup, settings)
    assert -0.02 <= 1 - measured / found.peak_bytes <= 0.05
    beside = (measured - found.resident_bytes) / (found.peak_bytes - found.resident_bytes)
    assert 0.94 <= beside <= 1.04


@given(
    name=st.sampled_from([name for name in NAMES if not name.startswith("Phi")]),
    batch=st.integers(1, 8),
    sequence=st.integers(16, 2048),
    kind=st.sampled_from(EVERY_TYPE),
    chunk=st.integers(1, 512),
    rank=st.integers(1, 64),
    accumulates=st.booleans(),
)
def test_no_prediction_is_below_the_limit(
    name: str, batch: int, sequence: int, kind: str, chunk: int, rank: int, accumulates: bool
) -> None:
    wide = 4 if kind == "float32" else 2
    setup = Setup(batch, sequence, WEIGHT_BITS[kind], wide, wide, rank, 4, 8, chunk, accumulates=accumulates)
    sizes = known(name)
    for checkpointing in (True, False):
        found = predict(sizes, setup, checkpointing=checkpointing).peak_bytes
        assert found >= 0.98 * lower_limit(sizes, setup).total_bytes


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["SmolLM2-135M", "Qwen2.5-0.5B", "gemma-3-270m"]),
    budgets=st.lists(st.integers(300, 20_000), min_size=2, max_size=8),
    kinds=st.sampled_from([("float32",), ("nf4",), EVERY_TYPE]),
    batch=st.integers(1, 12),
    tokens=st.integers(16, 1024),
    ratio=st.floats(0.8, 1.3),
)
def test_more_memory_is_never_slower(
    name: str, budgets: list[int], kinds: tuple[Any, ...], batch: int, tokens: int, ratio: float
) -> None:
    settings = config.Tuning(batch_size=batch, max_tokens=tokens)
    costs, refused = [], []
    for budget in sorted(budgets):
        try:
            found = plan(
                known(name), budget * MIB, settings, runtime_bytes=300 * MIB, weights=kinds,
                calibration=Calibration(ratio, 1e-3),
            )  # fmt: skip
        except BudgetExceeded:
            refused.append(budget)
            continue
        assert found.process_bytes <= budget * MIB
        if found.faster is not None:  # else it would have been chosen
            assert found.faster.cost < found.chosen.cost
            assert found.faster.needed_bytes + found.runtime_bytes > budget * MIB
        costs.append(found.chosen.cost)
    assert costs == sorted(costs, reverse=True)
    assert all(budget <= other for budget in refused for other in sorted(budgets)[len(refused) :])


def test_plenty_of_memory_gives_what_the_settings_ask_for() -> None:
    found = plan(known("SmolLM2-135M"), 64 * GIB, DEFAULTS, runtime_bytes=0)
    assert found.fit == replace(Fit.of(DEFAULTS), checkpointing=False)
    assert (found.faster, found.speed_up, found.chosen.weights) == (None, None, "as loaded")


def test_the_least_that_is_named_is_enough_and_a_byte_less_is_not() -> None:
    sizes = known("SmolLM2-135M")
    least = plan(sizes, 64 * GIB, DEFAULTS, runtime_bytes=MIB).least.needed_bytes + MIB
    found = plan(sizes, least, DEFAULTS, runtime_bytes=MIB)
    assert found.chosen == found.least
    assert (found.fit.checkpointing, found.fit.tokens) == (True, 512)
    with pytest.raises(
        BudgetExceeded, match=rf"the least that would do is {-(-least // MIB)} MiB, .* to nf4, which does"
    ):
        plan(sizes, least - 1, DEFAULTS, runtime_bytes=MIB)


def test_weights_change_only_where_they_may() -> None:
    sizes = known("SmolLM2-135M")
    with pytest.raises(BudgetExceeded):
        plan(sizes, 300 * MIB, DEFAULTS, runtime_bytes=0)
    found = plan(sizes, 300 * MIB, DEFAULTS, runtime_bytes=0, weights=EVERY_TYPE)
    assert found.chosen.weights in ("int8", "nf4")
    bfloat16 = plan(sizes, GIB, DEFAULTS, runtime_bytes=0, loaded="bfloat16").least.parts
    assert bfloat16.weights == sizes.linear_parameters * 2
    assert bfloat16.adapter == plan(sizes, GIB, DEFAULTS, runtime_bytes=0).least.parts.adapter


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_what_the_settings_fix_stays(checkpointing: Any) -> None:
    settings = config.Tuning(checkpointing=checkpointing, loss_chunk=8, batch_size=3)
    found = plan(known("SmolLM2-135M"), 64 * GIB, settings, runtime_bytes=0)
    for candidate in (found.chosen, found.least):
        assert candidate.fit.checkpointing == (checkpointing == "on")
        assert (candidate.fit.loss_chunk, candidate.fit.max_tokens) == (8, 512)
    assert (found.fit.tokens, found.least.fit.tokens) == (3 * 512, 512)


def test_short_examples_take_less() -> None:
    sizes = known("SmolLM2-135M")
    long, short = (plan(sizes, 64 * GIB, DEFAULTS, runtime_bytes=0, longest=longest) for longest in (9999, 40))
    assert (long.chosen.setup.sequence, short.chosen.setup.sequence) == (512, 40)
    assert (long.fit.tokens, short.fit) == (8 * 512, replace(long.fit, tokens=8 * 40))
    assert short.chosen.tensor_bytes < long.chosen.tensor_bytes


def test_a_calibration_scales_what_comes_and_goes() -> None:
    sizes = known("SmolLM2-135M")
    plain = plan(sizes, 64 * GIB, DEFAULTS, runtime_bytes=0).chosen
    found = plan(sizes, 64 * GIB, DEFAULTS, runtime_bytes=0, calibration=Calibration(1.25, 1e-3)).chosen
    there = plain.parts.resident_bytes
    assert found.tensor_bytes - there == pytest.approx(1.25 * (plain.tensor_bytes - there), abs=1)


def test_a_step_is_calibrated() -> None:
    torch = pytest.importorskip("torch")
    predicted = Parts("loss", 4000, 0, 0, 0, gradients=0, kept=600, working=400, other=0)
    weights = torch.zeros(1000)
    found = calibrate(lambda: weights[:500] * 2, [weights], predicted, tokens=10)
    assert found.ratio == 2
    assert found.seconds_per_token > 0


def test_what_is_not_predicted_is_refused() -> None:
    with pytest.raises(InputError, match="caps its logits"):
        plan(known("gemma-2-2b"), 64 * GIB, DEFAULTS, runtime_bytes=0)
    with pytest.raises(ConfigError, match="DoRA"):
        plan(known("SmolLM2-135M"), 64 * GIB, config.Tuning(dora=True), runtime_bytes=0)
    with pytest.raises(InputError, match="q_proj to adapt in a phi3"):
        plan(known("phi-4"), 64 * GIB, config.Tuning(targets=("q_proj",)), runtime_bytes=0)


@pytest.mark.parametrize("board", boards.names())
def test_every_model_on_every_board_has_a_plan_or_a_refusal(board: str) -> None:
    known_board = boards.load(board)
    budget = known_board.usable_bytes or known_board.memory_bytes or 4 * GIB
    plans = 0
    for name in NAMES:
        try:
            found = plan(known(name), budget, DEFAULTS, runtime_bytes=400 * MIB, weights=EVERY_TYPE)
        except (BudgetExceeded, InputError):
            continue
        plans += 1
        assert found.limit_bytes <= 1.02 * found.chosen.tensor_bytes
        assert found.process_bytes <= budget
    assert plans >= 5  # the smallest fit everywhere


def test_the_runtime_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SDSS_CACHE", str(tmp_path))
    monkeypatch.setattr(libraries.importlib.metadata, "version", lambda name: "1")
    answers = iter([None, 123 * MIB])
    monkeypatch.setattr(libraries, "_measured_runtime", lambda: next(answers))
    assert libraries.runtime_bytes() == libraries.RUNTIME_BYTES  # a failure is not kept
    assert [libraries.runtime_bytes(), libraries.runtime_bytes()] == [123 * MIB] * 2
    next(tmp_path.iterdir()).write_text("[]", encoding="utf-8")
    with pytest.raises(StopIteration):
        libraries.runtime_bytes()


def test_the_runtime_is_a_constant_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise libraries.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libraries.importlib.metadata, "version", missing)
    monkeypatch.setattr(libraries, "_measured_runtime", lambda: pytest.fail("measured"))
    assert libraries.runtime_bytes() == libraries.RUNTIME_BYTES
