"""One step of the trainer, and the folder of a whole round, against PEFT, transformers and autograd, by family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file
from test_adapter import _Bare
from test_tuning import EXAMPLES, SETTINGS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from edge_sdss import config
from edge_sdss.errors import InputError
from edge_sdss.lm import LanguageModel
from edge_sdss.lm.chat import Encoded
from edge_sdss.tuning import adapter
from edge_sdss.tuning.fit import Fit
from edge_sdss.tuning.steps import Optimisation
from edge_sdss.tuning.trainer import train

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
MORE = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": None, "sliding_window": 8, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {},
}
ROWS = [Encoded([(7 * i + 3 * row) % 120 + 3 for i in range(n)], prompt) for row, n, prompt in
        ((0, 24, 9), (1, 5, 4), (2, 31, 1), (3, 17, 16), (4, 12, 5))]  # fmt: skip
FITS = [Fit(tokens, chunk, on, 64) for tokens in (1, 40, 999) for chunk, on in ((5, True), (5, False), (128, True))]


def model_of(family: str, **changes: Any) -> Any:
    """A model of random weights, also those that start as zeros or ones."""
    stated = {**SIZES, **MORE, "vocab_size": 128, "pad_token_id": 0, **FAMILIES[family], **changes}
    implementation = stated.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **stated), attn_implementation=implementation
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@dataclass
class Found:
    """What a step came to."""

    loss: float
    gradients: dict[str, Any]


def largest_difference(one: Found, other: Found) -> float:
    """Of a gradient, in shares of the largest gradient of all."""
    assert one.gradients.keys() == other.gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in other.gradients.values())
    return max(float((one.gradients[n] - g).abs().max()) for n, g in other.gradients.items()) / scale


def stir(parameters: dict[str, Any]) -> None:
    """B starts as zeros, and with it A's gradient; here both are as a round may leave them."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].add_(torch.randn(parameters[name].shape, generator=generator) * 0.05)


def ours(model: Any, settings: config.Tuning, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> tuple[Found, dict]:
    """The gradients are caught where they are clipped."""
    caught: dict[str, Any] = {}
    torch.manual_seed(1)  # A's first weights, the same each time
    with adapter.trainable(_Bare(model), settings, None) as adapted:
        stir(adapted.parameters)
        before = {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}

        def clip(_parameters: Any, _limit: float) -> Any:
            caught.update({name: parameter.grad.clone() for name, parameter in adapted.parameters.items()})
            return torch.tensor(1.0)

        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            run = Optimisation(adapted, ROWS, settings)
            run.advance(fit)
    return Found(run.done[0].loss, caught), before


def theirs(model: Any, settings: config.Tuning, weights: dict[str, Any]) -> Found:
    """Plain PEFT: labels, a mask, whole logits, transformers' own loss; the padding is in other tokens than ours."""
    chosen = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules="all-linear" if settings.targets == "all-linear" else list(settings.targets),
        task_type="CAUSAL_LM",
    )
    plain = peft.get_peft_model(model, chosen)
    peft.set_peft_model_state_dict(plain, weights)
    width = max(len(row.ids) for row in ROWS)
    ids = torch.tensor([row.ids + [1] * (width - len(row.ids)) for row in ROWS])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in ROWS])
    labels = torch.tensor(
        [[-100] * row.prompt_tokens + row.ids[row.prompt_tokens :] + [-100] * (width - len(row.ids)) for row in ROWS]
    )
    loss = plain(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    learnt = {n.replace(".default", ""): p.grad for n, p in plain.named_parameters() if p.requires_grad}
    found = Found(loss.item(), {name.removesuffix(".weight") if "magnitude" in name else name: gradient
                                for name, gradient in learnt.items()})  # fmt: skip
    plain.unload()
    return found


def settings_of(**changes: Any) -> config.Tuning:
    return config.Tuning(rank=4, batch_size=len(ROWS), epochs=1, max_tokens=64, **changes)


def compare(model: Any, settings: config.Tuning, fits: list[Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [ours(model, settings, fit, monkeypatch) for fit in fits]
    wanted = theirs(model, settings, found[0][1])
    assert min(float(gradient.abs().max()) for gradient in wanted.gradients.values()) > 0
    for fit, (step, _) in zip(fits, found, strict=True):
        assert step.loss == pytest.approx(wanted.loss, rel=1e-5), fit.words
        assert largest_difference(step, wanted) < 1e-5, fit.words


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_peft_however_it_is_cut(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(model_of(family), settings_of(), FITS, monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [{"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}, {"targets": ("q_proj", "down_proj")}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_is_that_of_peft_with_every_option(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(model_of(family), settings_of(**changes), [FITS[0], FITS[4], FITS[-1]], monkeypatch)


def test_a_head_of_its_own_and_one_that_is_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    for tied in (False, True):
        compare(model_of("llama", tie_word_embeddings=tied), settings_of(), FITS[:2], monkeypatch)


def test_a_model_that_caps_its_logits_is_refused() -> None:
    model = model_of("gemma2", final_logit_softcapping=30.0)
    with (
        pytest.raises(InputError, match="final_logit_softcapping"),
        adapter.trainable(_Bare(model), settings_of(), None),
    ):
        pass


# The folder of a round


@pytest.fixture(scope="module")
def folder_of(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's model as a folder, with the tiny model's tokenizer."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tokenizer = AutoTokenizer.from_pretrained(tiny)
            special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            model_of(family, vocab_size=len(tokenizer), **special).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def base(folder: Path, family: str) -> Any:
    implementation = FAMILIES[family].get("attn_implementation", "sdpa")
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()


def merged(model: Any, out: Path) -> dict[str, Any]:
    """The weights of the linears with the adapter of the folder in them, by the formulas of the papers."""
    stated = json.loads((out / adapter.CONFIG).read_text(encoding="utf-8"))
    learnt = load_file(out / adapter.WEIGHTS)
    scale = stated["lora_alpha"] / (stated["r"] ** 0.5 if stated["use_rslora"] else stated["r"])
    found = {}
    for name, a in learnt.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = model.get_submodule(path).weight + scale * learnt[name.replace("lora_A", "lora_B")] @ a
        magnitude = learnt.get(name.replace("lora_A.weight", "lora_magnitude_vector"))
        found[path] = weight if magnitude is None else magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return found


def assert_loads_in_peft(folder: Path, family: str, out: Path) -> None:
    """Plain PEFT computes what the weights say, by the formulas of the papers, and no other layer is adapted."""
    ids = torch.tensor([row.ids[:24] for row in ROWS if len(row.ids) >= 24])
    with torch.no_grad():
        plain = peft.PeftModel.from_pretrained(base(folder, family), out).eval()(input_ids=ids).logits
        model = base(folder, family)
        before = model(input_ids=ids).logits
        for path, weight in merged(model, out).items():
            model.get_submodule(path).weight.copy_(weight)
        wanted = model(input_ids=ids).logits
    assert float((plain - wanted).abs().max()) < 1e-5
    assert float((before - wanted).abs().max()) > 1e-3, "the round has learnt something"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"rslora": True},
    {"dora": True},
    {"top_layers": 2},
    {"top_layers": 1, "dora": True, "rslora": True, "dropout": 0.1},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2", each) for each in OPTIONS]
    + [(family, {}) for family in FAMILIES if family != "qwen2"]
    + [("llama", {"targets": ("k_proj", "up_proj"), "top_layers": 2})],
    ids=str,
)
def test_plain_peft_loads_a_round_and_the_one_that_continues_it(
    folder_of: Callable[[str], Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    folder = folder_of(family)
    lm = LanguageModel.load(config.Model(name=str(folder), device="cpu"))
    chosen = config.Tuning.model_validate(SETTINGS.model_dump() | {"epochs": 1, **options})
    first = train(lm, EXAMPLES, chosen, tmp_path / "a")
    assert_loads_in_peft(folder, family, tmp_path / "a")
    # Other options are not asked of one that goes on: it has the earlier one's own.
    other = config.Tuning.model_validate(SETTINGS.model_dump() | {"epochs": 2, "rank": 7, "alpha": 3})
    second = train(lm, EXAMPLES, other, tmp_path / "b", start=tmp_path / "a")
    assert_loads_in_peft(folder, family, tmp_path / "b")
    assert second.trainable_parameters == first.trainable_parameters
    assert second.losses[-1].loss < first.losses[0].loss
    stated = [json.loads((tmp_path / name / adapter.CONFIG).read_text(encoding="utf-8")) for name in "ab"]
    assert stated[0] == stated[1]
    assert (stated[0]["use_dora"], stated[0]["use_rslora"]) == (chosen.dora, chosen.rslora)
    # What our model answers with it is what plain PEFT makes of it.
    lm.attach(tmp_path / "b")
    nll = lm.nll(EXAMPLES, max_tokens=128, batch_size=4)
    plain = peft.PeftModel.from_pretrained(base(folder, family), tmp_path / "b").eval()
    for example, found in zip(EXAMPLES[:4], nll, strict=False):
        encoded = lm.encode(example, 128)
        logits = plain(input_ids=torch.tensor([encoded.ids])).logits[0, encoded.prompt_tokens - 1 : -1]
        dense = torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.ids[encoded.prompt_tokens :]))
        assert found == pytest.approx(dense.item(), abs=1e-5)
