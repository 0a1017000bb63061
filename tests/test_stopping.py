"""Stopping early on a held-out loss, and how much of earlier rounds is replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdss import config
from edge_sdss.rounds import replayed
from edge_sdss.tuning.stopping import Stopping, split
from edge_sdss.types import Example, Turn


def examples(count: int, variants: int = 0) -> list[Example]:
    return [Example((Turn("user", f"p{i} v{j}"),), f"a{i}", f"d{i}") for i in range(count) for j in range(variants + 1)]


@given(count=st.integers(2, 60), variants=st.integers(0, 3), share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_no_dialogue_is_on_both_sides(count: int, variants: int, share: float, seed: int) -> None:
    settings = config.Tuning(patience=1, validation=share, seed=seed)
    given_ = examples(count, variants)
    train, held = split(given_, settings)
    sides = [{each.dialogue_id for each in side} for side in (train, held)]
    assert not sides[0] & sides[1]
    assert sorted(map(repr, [*train, *held])) == sorted(map(repr, given_))
    assert len(sides[1]) == min(max(round(share * count), 1), count - 1)
    assert split(given_[::-1], settings)[1] == held[::-1]  # whatever the order


def test_a_dialogue_stays_on_its_side_while_others_come() -> None:
    settings = config.Tuning(patience=1, validation=0.3)
    few = {e.dialogue_id for e in split(examples(20), settings)[1]}
    many = {e.dialogue_id for e in split(examples(40), settings)[1]}
    assert len(few & many) >= len(few) - 3


def test_nothing_is_held_out_without_patience_or_of_one_dialogue() -> None:
    assert split(examples(9), config.Tuning())[1] == []
    assert split(examples(1, 3), config.Tuning(patience=1))[1] == []


@pytest.mark.parametrize(
    ("losses", "patience", "ends_after", "best"),
    [
        ([3, 2, 1], 1, None, 3),
        ([3, 2, 2.5], 1, 3, 2),
        ([3, 2, 2], 1, 3, 2),  # equal is no lower
        ([1, 2, 3], 2, 3, 1),
        ([2, 3, 1, 2, 3], 2, 5, 3),
    ],
)
def test_patience(losses: list[float], patience: int, ends_after: int | None, best: int) -> None:
    stopping, ended = Stopping(patience), None
    for epoch, loss in enumerate(losses, 1):
        assert stopping.due(epoch * 4, 4)
        assert not stopping.due(epoch * 4 - 1, 4)
        stopping.measured.append({"step": epoch * 4, "loss": loss})
        assert not stopping.due(epoch * 4, 4)
        ended = ended or (epoch if stopping.over else None)
    assert ended == ends_after
    assert stopping.best == best * 4
    assert Stopping(patience, stopping.measured).over == stopping.over
    assert not Stopping(None).due(4, 4)


@given(new=st.integers(0, 30), old=st.integers(0, 30), share=st.floats(0, 0.95))
def test_the_share_of_what_is_replayed(new: int, old: int, share: float) -> None:
    given_ = examples(new + old)
    learnt = {f"d{i}" for i in range(old)}
    found = replayed(given_, learnt, share, 0)
    again = [each for each in found if each.dialogue_id in learnt]
    assert [each for each in found if each.dialogue_id not in learnt] == given_[old:]
    if new:
        assert len(again) == min(old, round(new * share / (1 - share)))
    else:
        assert found == given_
    assert replayed(given_, learnt, None, 0) == given_


# Rounds that stop


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tiny import tiny_model

    from edge_sdss.lm import LanguageModel

    return LanguageModel.load(config.Model(name=str(tiny_model(tmp_path_factory.mktemp("m"))), device="cpu"))


def settings(**changes: Any) -> config.Tuning:
    """Far too fast, so that the held-out loss rises after a while."""
    quick = {"rank": 4, "batch_size": 4, "max_tokens": 64, "checkpoint_every": 1, "validation": 0.25}
    return config.Tuning(**(quick | {"epochs": 12, "patience": 1, "learning_rate": 0.1, "warmup": 0.0} | changes))


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "edge_sdss.json").read_text())
    return found


def test_it_stops_and_the_adapter_is_the_best_one(lm: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from edge_sdss.tuning import trainer

    given_ = examples(16)
    whole = trainer.train(lm, given_, settings(), tmp_path / "a")
    told = card(whole.adapter)
    losses = [each["loss"] for each in told["held_out"]]
    best = losses.index(min(losses))
    assert len(losses) < 12
    assert len(losses) == best + 2  # one epoch of patience
    assert told["best_step"] == told["held_out"][best]["step"]
    assert whole.steps == told["held_out"][-1]["step"]
    # What was measured is what the model says of the adapter that was written.
    held = split(given_, settings())[1]
    lm.attach(whole.adapter)
    nll = lm.nll(held, max_tokens=64, batch_size=4)
    lm.attach(None)
    tokens = [len(lm.encode(each, 64).ids) - lm.encode(each, 64).prompt_tokens for each in held]
    assert sum(n * t for n, t in zip(nll, tokens, strict=True)) / sum(tokens) == pytest.approx(min(losses), rel=1e-4)

    # And what training on the rest alone, for so many epochs of as many, comes to.
    class Enough(Exception):
        pass

    def stop(told: dict[str, Any]) -> None:
        if told.get("held_out", {}).get("step") == whole.steps:
            raise Enough

    with pytest.raises(Enough):
        trainer.train(lm, given_, settings(), tmp_path / "b", conditions=trainer.Conditions(on_event=stop))
    kept = load_file(next((tmp_path / "b.checkpoint").glob(f"best-{told['best_step']:06d}.*")))
    written = load_file(whole.adapter / "adapter_model.safetensors")
    assert sorted(kept) == sorted(written)
    assert all(torch.equal(kept[name], written[name]) for name in kept)
    again = trainer.train(lm, given_, settings(), tmp_path / "b")
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == (
        whole.adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert card(again.adapter)["held_out"] == told["held_out"]
    assert not (tmp_path / "b.checkpoint").exists()


def test_cut_short_anywhere_it_stops_at_the_same_place(lm: Any, tmp_path: Path) -> None:
    from edge_sdss.tuning import trainer

    given_ = examples(12)
    chosen = settings(checkpoint_every=2, dropout=0.1)
    whole = trainer.train(lm, given_, chosen, tmp_path / "a")
    told = card(whole.adapter)

    class Cut(Exception):
        pass

    for moment in range(1, whole.steps + 1):
        out = tmp_path / f"cut-{moment}"

        def cut(event: dict[str, Any], moment: int = moment) -> None:
            if event.get("step", {}).get("step") == moment:
                raise Cut

        with pytest.raises(Cut):
            trainer.train(lm, given_, chosen, out, conditions=trainer.Conditions(on_event=cut))
        again = trainer.train(lm, given_, chosen, out)
        assert card(again.adapter)["sha256"] == told["sha256"]
        assert card(again.adapter)["held_out"] == told["held_out"]


def test_memory_that_runs_out_while_measuring_is_no_end(lm: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from edge_sdss.tuning import steps, trainer

    whole = trainer.train(lm, examples(8), settings(epochs=2), tmp_path / "a")
    plain, calls = steps.Optimisation.measure, []

    def measure(self: Any, *given_: Any) -> float:
        calls.append(0)
        if len(calls) == 1:
            raise MemoryError
        return plain(self, *given_)

    monkeypatch.setattr(steps.Optimisation, "measure", measure)
    found = trainer.train(lm, examples(8), settings(epochs=2), tmp_path / "b")
    assert len(card(found.adapter)["stepped_down"]) == 1
    for one, other in zip(card(found.adapter)["held_out"], card(whole.adapter)["held_out"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
