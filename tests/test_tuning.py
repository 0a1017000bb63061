"""The trainer against dense computations, plain loops, and processes killed at every write point."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file
from tiny import tiny_model
from torch.nn.functional import cross_entropy as dense_cross_entropy

from edge_sdss import config
from edge_sdss.errors import ConfigError, InputError
from edge_sdss.files import sha256
from edge_sdss.lm import LanguageModel
from edge_sdss.tuning import adapter as injection
from edge_sdss.tuning.checkpoint import Checkpoints, State
from edge_sdss.tuning.loss import cross_entropy
from edge_sdss.tuning.memory import PeakTensorBytes
from edge_sdss.tuning.steps import batches, learning_rate
from edge_sdss.tuning.trainer import Round, train
from edge_sdss.types import Example, Turn

WEIGHTS = "adapter_model.safetensors"
SETTINGS = config.Tuning(
    rank=4, batch_size=4, epochs=2, learning_rate=3e-3, max_tokens=128, checkpoint_every=2, loss_chunk=8
)


def example(prompt: str, answer: str) -> Example:
    return Example((Turn("user", prompt),), answer)


EXAMPLES = [
    example("How are you?", "I am fine."),
    example("What should I cook?", "Soup with rain, and bread on the mat."),
    example("Thanks", "!"),
    example("Should I sleep more and walk every day?", "Yes, every day."),
    example("The cat", "sat on the mat and looked at the rain, and at me."),
    example("one", "two"),
    example("How is the rain today, doctor?", "Happy"),
    example("And dinner?", "Tonight."),
    example("mat?", "mat."),
]


class Interrupted(Exception):
    pass


def stop_at(step: int, error: type[BaseException] = Interrupted) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if done == step:
            raise error

    return progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lm(folder: Path) -> LanguageModel:
    return LanguageModel.load(config.Model(name=str(folder), device="cpu"))


# The loss


@pytest.mark.parametrize(("tokens", "width", "vocabulary", "chunk"), [(1, 1, 2, 1), (7, 5, 11, 3), (33, 16, 97, 200)])
def test_loss_and_gradient_are_those_of_the_dense_computation(
    tokens: int, width: int, vocabulary: int, chunk: int
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight, targets = torch.randn(vocabulary, width) * 3, torch.randint(vocabulary, (tokens,))
    dense = dense_cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(dense * 0.37, hidden)
    found = cross_entropy(hidden, weight, targets, chunk=chunk)
    (gradient,) = torch.autograd.grad(found * 0.37, hidden)
    torch.testing.assert_close(found, dense)
    torch.testing.assert_close(gradient, expected)


def test_loss_of_a_half_precision_head_is_near_and_of_large_logits_finite() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(20, 8), torch.randn(50, 8)
    targets = torch.randint(50, (20,))
    dense = dense_cross_entropy(hidden @ weight.T, targets, reduction="sum")
    low = cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, chunk=6)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, dense, rtol=0.02, atol=0.1)
    assert math.isfinite(cross_entropy(hidden * 1e4, weight, targets, chunk=6))


def test_loss_never_holds_the_logits_of_all_tokens() -> None:
    tokens, width, vocabulary, chunk = 512, 16, 4000, 32
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (tokens,))
    with PeakTensorBytes([hidden, weight, targets]) as memory:
        cross_entropy(hidden, weight, targets, chunk=chunk).backward()
    kept = 4 * (2 * tokens * width + vocabulary * width) + 8 * tokens
    assert memory.peak - kept < 4 * chunk * vocabulary * 2.1
    assert memory.peak < 4 * tokens * vocabulary / 3


# The count of bytes


def test_peak_of_a_chain_without_gradient_is_two_links() -> None:
    n, size = 200, 4 * 200 * 200
    weights = [torch.randn(n, n) for _ in range(6)]
    with torch.no_grad(), PeakTensorBytes(weights) as memory:
        x = weights[0]
        for weight in weights:
            x = x @ weight
    assert memory.peak == pytest.approx((len(weights) + 2) * size, rel=0.01)


def test_peak_of_a_chain_with_gradient_keeps_every_link() -> None:
    n, depth, size = 100, 5, 4 * 100 * 100
    weights = [torch.randn(n, n, requires_grad=True) for _ in range(depth)]
    with PeakTensorBytes(weights) as memory:
        x = torch.eye(n)
        for weight in weights:
            x = x @ weight
        forward = memory._live.live
        x.sum().backward()
    assert forward == pytest.approx((depth + 1 + depth) * size, rel=0.01)
    # At the end of the backward: the weights, their gradients, the identity, and one link's gradient.
    assert 2 * depth * size < memory.peak < (3 * depth + 3) * size


def test_aliases_count_once_and_the_dead_no_more() -> None:
    a = torch.zeros(1000)
    with PeakTensorBytes([a, a.view(10, 100), a[5:]]) as memory:
        for _ in range(10):
            _ = (a.view(100, 10).T + 1).reshape(-1)
    assert memory.peak == pytest.approx(3 * 4000, rel=0.01)
    with PeakTensorBytes([]) as memory:
        grown = torch.zeros(10)
        grown.resize_(5000)
    assert memory.peak == pytest.approx(4 * 5000, rel=0.01)


# The order of examples and the learning rate


def test_batches_are_a_partition_and_a_function_of_seed_and_epoch() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(101)]
    first = batches(lengths, 8, 0, 0)
    assert sorted(index for rows in first for index in rows) == list(range(101))
    assert sorted(map(len, first))[:2] == [5, 8]
    assert first == batches(lengths, 8, 0, 0)
    assert first != batches(lengths, 8, 0, 1) != batches(lengths, 8, 1, 0)


def test_batches_are_of_similar_length() -> None:
    lengths = [(37 * i) % 200 + 1 for i in range(200)]
    cut = batches(lengths, 8, 0, 0)
    padded = sum(len(rows) * max(lengths[i] for i in rows) for rows in cut)
    assert padded < 1.2 * sum(lengths)
    plain = sum(8 * max(lengths[i : i + 8]) for i in range(0, 200, 8))
    assert plain > 1.5 * sum(lengths)


def test_learning_rate_warms_up_and_falls() -> None:
    settings = config.Tuning(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(0, 1, settings) == 1.0
    assert learning_rate(0, 3, config.Tuning(warmup=1.0)) > 0


# A round


def snapshot(lm: LanguageModel) -> dict[str, Any]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def assert_as_before(lm: LanguageModel, before: dict[str, Any], adapter: Path | None) -> None:
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert lm.adapter == adapter
    assert not any(module.training for module in lm.model.modules())
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_round_learns_and_plain_peft_reads_it(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before = snapshot(lm)
    losses = lm.nll(EXAMPLES, max_tokens=128, batch_size=4)
    settings = SETTINGS.model_copy(update={"epochs": 6})
    found = train(lm, EXAMPLES, settings, tmp_path / "a", card={"note": "mine"})
    assert_as_before(lm, before, None)
    assert isinstance(found, Round)
    assert found.steps == len(found.losses) == 18
    assert found.tokens == 6 * sum(len(lm.encode(e, 128).ids) for e in EXAMPLES)
    assert found.losses[-1].loss < found.losses[0].loss - 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "edge_sdss.json",
    ]
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert found.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.adapter_bytes == (tmp_path / "a" / WEIGHTS).stat().st_size
    card = json.loads((tmp_path / "a" / "edge_sdss.json").read_text())
    assert card["base_fingerprint"] == lm.fingerprint
    assert card["note"] == "mine"

    lm.attach(tmp_path / "a")
    tuned = lm.nll(EXAMPLES, max_tokens=128, batch_size=4)
    assert tuned.mean() < losses.mean() - 0.1
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a")
    encoded = lm.encode(EXAMPLES[4], 128)
    logits = plain(input_ids=torch.tensor([encoded.ids])).logits[0, encoded.prompt_tokens - 1 : -1]
    dense = dense_cross_entropy(logits, torch.tensor(encoded.ids[encoded.prompt_tokens :]))
    assert tuned[4] == pytest.approx(dense.item(), abs=1e-4)


def test_losses_are_those_of_a_plain_loop(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    """The same round written the long way: masks, labels, dense logits, transformers' own loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    encoded = [lm.encode(each, 128) for each in EXAMPLES]
    torch.manual_seed(SETTINGS.seed)
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(SETTINGS.seed)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, weight_decay=0.0, foreach=False)
    plan = [rows for epoch in range(2) for rows in batches([len(e.ids) for e in encoded], 4, 0, epoch)]
    for number, rows in enumerate(plan):
        chosen = [encoded[row] for row in rows]
        width = max(len(e.ids) for e in chosen)
        ids = torch.tensor([e.ids + [2] * (width - len(e.ids)) for e in chosen])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in chosen])
        labels = torch.tensor(
            [[-100] * e.prompt_tokens + e.ids[e.prompt_tokens :] + [-100] * (width - len(e.ids)) for e in chosen]
        )
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, SETTINGS.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(number, len(plan), SETTINGS)
        optimizer.step()
        optimizer.zero_grad()
        assert found.losses[number].loss == pytest.approx(loss.item(), abs=2e-4)
    saved = load_file(tmp_path / "a" / WEIGHTS)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(saved[name.replace(".default", "")], parameter.data, rtol=0, atol=2e-4)


def test_same_inputs_same_bytes(lm: LanguageModel, tmp_path: Path) -> None:
    with_dropout = SETTINGS.model_copy(update={"dropout": 0.1})
    for name in "ab":
        torch.manual_seed(hash(name) % 1000)
        state = torch.random.get_rng_state()
        train(lm, EXAMPLES, with_dropout, tmp_path / name)
        assert torch.equal(torch.random.get_rng_state(), state), "torch's generator is left alone"
    assert sha256(tmp_path / "a" / WEIGHTS) == sha256(tmp_path / "b" / WEIGHTS)
    train(lm, EXAMPLES, with_dropout.model_copy(update={"seed": 1}), tmp_path / "c")
    assert sha256(tmp_path / "a" / WEIGHTS) != sha256(tmp_path / "c" / WEIGHTS)


def test_continues_from_an_adapter(lm: LanguageModel, tmp_path: Path) -> None:
    first = train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    lm.attach(first.adapter)
    before = snapshot(lm)
    bytes_before = sha256(first.adapter / WEIGHTS)
    second = train(lm, EXAMPLES, SETTINGS, tmp_path / "b", start=first.adapter)
    assert_as_before(lm, before, first.adapter)
    assert sha256(first.adapter / WEIGHTS) == bytes_before
    assert second.losses[0].loss < first.losses[0].loss - 0.05
    with pytest.raises(InputError):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "c", start=tmp_path / "absent")
    assert_as_before(lm, before, first.adapter)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_model_is_left_as_found_when_interrupted(lm: LanguageModel, tmp_path: Path, error: type[BaseException]) -> None:
    attached = train(lm, EXAMPLES, SETTINGS, tmp_path / "a").adapter
    for adapter in (None, attached):
        lm.attach(adapter)
        before = snapshot(lm)
        norm = lm.base.model.norm.weight.requires_grad_(adapter is None)
        with pytest.raises(error):
            train(lm, EXAMPLES, SETTINGS, tmp_path / "b", progress=stop_at(1, error))
        assert norm.requires_grad == (adapter is None)
        norm.requires_grad_(False)
        assert_as_before(lm, before, adapter)
        assert not (tmp_path / "b").exists()


def test_model_is_left_as_found_when_interrupted_while_layers_go_in(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain, calls = snapshot(lm), injection._replace, 0

    def half(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        plain(*arguments)

    monkeypatch.setattr(injection, "_replace", half)
    with pytest.raises(KeyboardInterrupt):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    assert_as_before(lm, before, None)


def test_refuses_no_examples_a_foreign_folder_and_a_loss_that_is_not_finite(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no example"):
        train(lm, [], SETTINGS, tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="something else"):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"
    before = snapshot(lm)
    with pytest.raises(ConfigError, match=r"step \d+ is nan|step \d+ is inf"):
        train(lm, EXAMPLES, SETTINGS.model_copy(update={"learning_rate": 1e38}), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert_as_before(lm, before, None)


def test_peak_is_counted_between_its_bounds(lm: LanguageModel, tmp_path: Path) -> None:
    found = train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    weights = sum(parameter.nbytes for parameter in lm.model.parameters())
    least = weights + 4 * 4 * found.trainable_parameters  # weight, gradient and two moments
    assert least < found.peak_tensor_bytes < least + 40_000_000


# Power cuts


def test_a_finished_round_is_returned_and_not_repeated(lm: LanguageModel, tmp_path: Path) -> None:
    first = train(lm, EXAMPLES, SETTINGS, tmp_path / "a")
    assert train(lm, EXAMPLES, SETTINGS, tmp_path / "a", progress=stop_at(1)) == first


def test_resumes_from_the_newest_valid_checkpoint(lm: LanguageModel, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"dropout": 0.1, "epochs": 3})
    whole = train(lm, EXAMPLES, settings, tmp_path / "whole")
    kept = tmp_path / "a.checkpoint"

    def interrupted_at(step: int) -> list[str]:
        with pytest.raises(Interrupted):
            train(lm, EXAMPLES, settings, tmp_path / "a", progress=stop_at(step))
        return sorted(path.name for path in kept.iterdir())

    assert interrupted_at(8) == ["step-000004", "step-000006"]
    tensors = kept / "step-000006" / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-3] ^= 1
    tensors.write_bytes(data)
    seen: list[int] = []
    found = train(lm, EXAMPLES, settings, tmp_path / "a", progress=lambda _stage, done, _total: seen.append(done))
    assert seen[0] == 4
    assert not kept.exists()
    assert sha256(found.adapter / WEIGHTS) == sha256(whole.adapter / WEIGHTS)
    plain = [(step.step, step.loss, step.learning_rate, step.tokens) for step in whole.losses]
    assert [(step.step, step.loss, step.learning_rate, step.tokens) for step in found.losses] == plain


def test_a_checkpoint_of_another_round_is_not_taken(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(lm, EXAMPLES, SETTINGS, tmp_path / "a", progress=stop_at(5))
    seen: list[int] = []
    train(lm, EXAMPLES[1:], SETTINGS, tmp_path / "a", progress=lambda _stage, done, _total: seen.append(done))
    assert seen[0] == 0


@pytest.mark.parametrize("damage", ["truncate", "no manifest", "bad json", "empty"])
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path / "c", "key")
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        checkpoints.write(State(step, {"x": torch.full((4,), float(step))}, {"note": step}))
    newest = tmp_path / "c" / "step-000003"
    if damage == "truncate":
        (newest / "tensors.safetensors").write_bytes(b"")
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "bad json":
        (newest / "manifest.json").write_text('{"record.json": ')
    else:
        for path in newest.iterdir():
            path.unlink()
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.record["note"]) == (2, 2)
    assert torch.equal(found.tensors["x"], torch.full((4,), 2.0))
    checkpoints.write(State(3, found.tensors, {"note": "again"}))
    again = checkpoints.newest()
    assert again is not None
    assert again.record["note"] == "again"
    assert Checkpoints(tmp_path / "c", "other").newest() is None


DRIVER = """
import os, signal, sys
import peft, safetensors.torch  # once, not in every child
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[3:]
from edge_sdss import config
from edge_sdss.lm import LanguageModel
from edge_sdss.files import sha256
from edge_sdss.tuning import steps
from edge_sdss.tuning.trainer import train
from test_tuning import EXAMPLES, SETTINGS, WEIGHTS

lm = LanguageModel.load(config.Model(name=sys.argv[1], device="cpu"))
lm.fingerprint
root = Path(sys.argv[2])
settings = SETTINGS.model_copy(update={"batch_size": 2, "epochs": 1})

def run(out, events):
    "Trains in a child that is killed before its events-th call to the file system or after that many steps."
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = events
    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def killing(plain):
        def call(*arguments, **named):
            count()
            return plain(*arguments, **named)
        return call
    for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
        setattr(os, name, killing(getattr(os, name)))
    try:
        train(lm, EXAMPLES, settings, out, progress=count)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

assert run(root / "whole", 0) == 0
expected = sha256(root / "whole" / WEIGHTS)
moment = 1
while True:
    out = root / f"killed-{moment}"
    code = run(out, moment)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    assert not out.exists() or sha256(out / WEIGHTS) == expected, "half an adapter"
    assert run(out, 0) == 0, moment
    assert sha256(out / WEIGHTS) == expected, moment
    assert not list(root.glob(out.name + ".*")) and not list(root.glob("." + out.name + "*")), "litter"
    moment += 1
rounds = 0
while run(root / "often", 14) != 0:  # power fails again and again, just after each checkpoint
    rounds += 1
assert rounds > 2 and sha256(root / "often" / WEIGHTS) == expected
print("moments", moment - 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_killed_at_any_write_a_rerun_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), str(tmp_path), str(here), str(here.parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[-1]) > 25, found.stdout
