"""Adapters put into a model and taken out again, and written as PEFT folders, against PEFT itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file
from tiny import Bare as _Bare
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from edge_sdss import config
from edge_sdss.errors import ConfigError, InputError
from edge_sdss.lm import LanguageModel
from edge_sdss.tuning import adapter
from edge_sdss.tuning.folder import targets
from edge_sdss.tuning.loss import cross_entropy

OPTIONS: list[dict[str, Any]] = [
    {},
    {"rslora": True},
    {"dora": True},
    {"top_layers": 1},
    {"targets": ("q_proj", "v_proj")},
    {"targets": ("down_proj",), "top_layers": 1, "rslora": True, "dora": True, "alpha": 3.5},
    {"adapter_dtype": "bfloat16"},
]
IDS = torch.arange(3, 40)[None]


def tuning(**changes: Any) -> config.Tuning:
    return config.Tuning(rank=4, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lm(folder: Path) -> LanguageModel:
    return LanguageModel.load(config.Model(name=str(folder), device="cpu"))


def stirred(adapted: adapter.Trainable) -> adapter.Trainable:
    """Weights as a round might leave them."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def logits(adapted: adapter.Trainable) -> Any:
    with torch.no_grad():
        return adapted.backbone(input_ids=IDS, use_cache=False).last_hidden_state @ adapted.head.T


def written(lm: LanguageModel, chosen: config.Tuning, out: Path, start: Path | None = None) -> Any:
    out.mkdir()
    with adapter.trainable(lm, chosen, start) as adapted:
        if start is None:
            stirred(adapted)
        adapted.model.eval()
        adapter.write(adapted, out, "base")
        return logits(adapted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_peft_reads_the_folder_and_computes_the_same(
    lm: LanguageModel, folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    chosen = tuning(dropout=0.3, **options)
    found = written(lm, chosen, tmp_path / "a")
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = base(input_ids=IDS).logits.detach()
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert float((plain(input_ids=IDS).logits - found).abs().max()) < (0.05 if options.get("adapter_dtype") else 1e-5)
    assert float((before - found).abs().max()) > 0.01
    stated = plain.peft_config["default"]
    assert (stated.r, stated.lora_alpha, stated.lora_dropout) == (4, chosen.alpha, 0.3)
    assert (stated.use_rslora, stated.use_dora) == (chosen.rslora, chosen.dora)
    # Nothing is adapted but what is in the file, under PEFT's own names.
    theirs = peft.get_peft_model_state_dict(plain)
    ours = load_file(tmp_path / "a" / adapter.WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, chosen.adapter_dtype)}
    lm.attach(tmp_path / "a")
    assert lm.adapter == tmp_path / "a"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_copy_of_an_adapter_is_that_adapter(lm: LanguageModel, tmp_path: Path, options: dict[str, Any]) -> None:
    first = written(lm, tuning(**options), tmp_path / "a")
    again = written(
        lm, config.Tuning(adapter_dtype=options.get("adapter_dtype", "float32")), tmp_path / "b", tmp_path / "a"
    )
    assert torch.equal(first, again)
    for name in (adapter.WEIGHTS, adapter.CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_peft_is_taken_up(lm: LanguageModel, folder: Path, tmp_path: Path, dora: bool) -> None:
    chosen = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "up_proj"], layers_to_transform=[1])
    chosen.use_dora, chosen.init_lora_weights = dora, False
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), chosen).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    found = written(lm, tuning(), tmp_path / "ours", tmp_path / "theirs")
    torch.testing.assert_close(found, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "ours").eval()
    torch.testing.assert_close(found, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_loss_and_gradients_are_those_of_peft(family: str, checkpointing: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more)).eval()
    ids = torch.randint(0, 128, (2, 24))
    torch.manual_seed(4)
    with adapter.trainable(_Bare(model), tuning(checkpointing=checkpointing), None) as adapted:
        first = {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}
        stirred(adapted)
        hidden = adapted.backbone(input_ids=ids, use_cache=False).last_hidden_state
        loss = cross_entropy(hidden[:, :-1].flatten(0, 1), adapted.head, ids[:, 1:].flatten(), chunk=7) / 46
        found = dict(zip(adapted.parameters, torch.autograd.grad(loss, list(adapted.parameters.values())), strict=True))
        learnt = {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}
    torch.manual_seed(4)
    chosen = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, chosen)
    initial = peft.get_peft_model_state_dict(theirs)
    assert first.keys() == initial.keys()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in first.items()), "equal seeds, equal weights"
    peft.set_peft_model_state_dict(theirs, learnt)
    dense = theirs(input_ids=ids, labels=ids).loss
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(), abs=1e-5)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine = found[name.replace(".default", "")]
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5)


def test_layers_below_the_lowest_adapted_one_have_no_graph(lm: LanguageModel) -> None:
    with adapter.trainable(lm, tuning(top_layers=1, checkpointing="on"), None) as adapted:
        seen = []
        for layer in adapted.backbone.layers:
            layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
        assert adapted.lowest == 1
        adapted.backbone(input_ids=IDS, use_cache=False)
        assert [output.requires_grad for output in seen] == [False, True]
        for layer in adapted.backbone.layers:
            layer._forward_hooks.clear()


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "nf4"])
def test_a_quantised_model_learns_and_its_adapter_helps_the_model_it_was(
    lm: LanguageModel, folder: Path, tmp_path: Path, weights: Any
) -> None:
    chosen = tuning(weights=weights, compute_dtype="float32", checkpointing="on")
    adapter.quantise(lm, chosen)
    torch.manual_seed(0)
    losses = []
    with adapter.trainable(lm, chosen, None) as adapted:
        held = sum(tensor.nbytes for tensor in adapted.frozen)
        assert len({id(tensor) for tensor in adapted.frozen}) == len(adapted.frozen)
        optimizer = torch.optim.AdamW(adapted.parameters.values(), lr=1e-2)
        for _ in range(12):
            hidden = adapted.backbone(input_ids=IDS, use_cache=False).last_hidden_state
            loss = cross_entropy(hidden[0, :-1], adapted.head, IDS[0, 1:], chunk=16) / (IDS.numel() - 1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        adapter.write(adapted, tmp_path, "base")
    assert losses[-1] < losses[0] - 0.5
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert held < sum(parameter.nbytes for parameter in base.parameters())
    before = base(input_ids=IDS, labels=IDS).loss.item()
    after = peft.PeftModel.from_pretrained(base, tmp_path)(input_ids=IDS, labels=IDS).loss.item()
    assert after < before - 0.5


# What is left behind


def signature(lm: LanguageModel) -> tuple[Any, ...]:
    modules = [
        (name, id(module), module.training, "forward" in vars(module)) for name, module in lm.model.named_modules()
    ]
    parameters = [
        (name, id(p), p.requires_grad, p.grad is None, p.sum().item()) for name, p in lm.model.named_parameters()
    ]
    return modules, parameters, lm.adapter


@pytest.mark.parametrize("at", [None, *range(1, 20, 3)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_as_it_was_wherever_it_is_interrupted(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int | None, error: type[BaseException]
) -> None:
    lm.model.model.norm.weight.requires_grad_(True)
    lm.model.model.layers[0].train()
    before, calls, plain = signature(lm), 0, setattr

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        plain(*arguments)
        if calls == at:
            raise error

    monkeypatch.setattr(adapter, "setattr", interrupted, raising=False)

    def use() -> None:
        with adapter.trainable(lm, tuning(checkpointing="on"), None) as adapted:
            assert at is None
            assert signature(lm) != before
            adapted.backbone(input_ids=IDS, use_cache=False).last_hidden_state.sum().backward()
            raise error

    with pytest.raises(error):
        use()
    assert signature(lm) == before


# What is refused


def test_targets_and_layers_that_the_model_lacks_are_refused(lm: LanguageModel) -> None:
    before = signature(lm)
    for changes, complaint in (
        ({"targets": ("q_proj", "qkv")}, "no linear qkv; choose from down_proj, gate_proj"),
        ({"targets": ()}, "they are none"),
        ({"targets": ("lm_head",)}, "no linear lm_head"),
        ({"top_layers": 3}, "the model has 2"),
    ):
        with pytest.raises(ConfigError, match=complaint), adapter.trainable(lm, tuning(**changes), None):
            pass
    assert signature(lm) == before


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / adapter.WEIGHTS).unlink(), "cannot be read"),
        (lambda f: (f / adapter.WEIGHTS).write_bytes(b"x" * 100), "cannot be read"),
        (lambda f: (f / adapter.CONFIG).write_text("["), "cannot be read"),
        (lambda f: (f / adapter.CONFIG).write_text("[]"), "cannot be read"),
        (lambda f: edit(f / adapter.CONFIG, bias="all"), "its bias is 'all'"),
        (lambda f: edit(f / adapter.CONFIG, peft_type="LOHA"), "its peft_type is 'LOHA'"),
        (lambda f: edit(f / adapter.CONFIG, rank_pattern={"q_proj": 2}), "its rank_pattern"),
        (lambda f: edit(f / adapter.CONFIG, init_lora_weights="pissa"), "its init_lora_weights"),
        (lambda f: edit(f / adapter.CONFIG, r=8), "28 of its tensors do not fit"),
        (lambda f: edit(f / adapter.CONFIG, use_dora=True), "14 of its tensors do not fit"),
        (lambda f: (f / "edge_sdss.json").write_text('{"base_fingerprint": "f00"}'), "trained on the model f00"),
    ],
)
def test_a_start_that_is_no_adapter_of_the_model_is_refused(
    lm: LanguageModel, tmp_path: Path, damage: Any, complaint: str
) -> None:
    written(lm, tuning(), tmp_path / "a")
    damage(tmp_path / "a")
    before = signature(lm)
    with pytest.raises(InputError, match=complaint), adapter.trainable(lm, tuning(), tmp_path / "a"):
        pass
    assert signature(lm) == before


def test_an_adapter_of_a_larger_model_is_refused(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    sizes = json.loads((folder / "config.json").read_text())
    large = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, "num_hidden_layers": 3}))
    with adapter.trainable(_Bare(large), tuning(), None) as adapted:
        adapter.write(adapted, tmp_path, "base")
    with pytest.raises(InputError, match=r"no layer model\.layers\.2"), adapter.trainable(lm, tuning(), tmp_path):
        pass
    shutil.rmtree(tmp_path)


# Where, in PEFT's terms


def test_targets_are_named_so_that_no_other_layer_is_meant() -> None:
    decoder = [f"model.layers.{n}.{name}" for n in range(3) for name in ("attn.q_proj", "mlp.up_proj")]
    vision = [f"vision.layers.{n}.attn.q_proj" for n in range(3)]
    every = [*decoder, "lm_head"]
    assert targets(decoder, every, "model.layers") == {"target_modules": ["q_proj", "up_proj"]}
    assert targets(decoder[2:], every, "model.layers") == {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    }
    assert targets(decoder[1:], every, "model.layers") == {"target_modules": sorted(decoder[1:])}
    assert targets(decoder, [*every, *vision], "model.layers") == {"target_modules": sorted(decoder)}
    assert targets(decoder[4:], [*every, *vision], "model.layers") == {"target_modules": sorted(decoder[4:])}
