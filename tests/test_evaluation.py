"""Scores against hand-made values, and splits against a brute-force reading of the same rule."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdss import config, evaluation
from edge_sdss.errors import InputError
from edge_sdss.types import Dialogue, Example, Turn

pytest.importorskip("rouge_score")


class FakeGeneration:
    def __init__(self, text: str):
        self.text = text


class FakeModel:
    """Answers with its prompt; its loss is the number of characters of the reference."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def nll(self, examples: Sequence[Example], **_: Any) -> Any:
        return np.array([float(len(example.answer)) for example in examples])

    def generate(self, conversations: Sequence[Sequence[Turn]], **_: Any) -> list[FakeGeneration]:
        self.asked += [turns[-1].text for turns in conversations]
        return [FakeGeneration(turns[-1].text) for turns in conversations]


def example(prompt: str, answer: str) -> Example:
    return Example((Turn("system", "be brief"), Turn("user", prompt)), answer)


EXAMPLES = [example(f"question {i}", "yes " * (i + 1)) for i in range(20)]


def run(examples: Sequence[Example] = EXAMPLES, **values: Any) -> tuple[FakeModel, evaluation.Evaluation]:
    lm = FakeModel()
    return lm, evaluation.evaluate(lm, examples, config.Evaluation(**values), max_tokens=64)  # type: ignore[arg-type]


def test_measures_every_item_and_answers_some() -> None:
    lm, found = run(max_items=12, rouge_items=5)
    assert len(found.items) == 12
    assert len(lm.asked) == 5
    assert sum(item.answer is not None for item in found.items) == 5
    assert found.nll == pytest.approx(np.mean([len(item.reference) for item in found.items]))
    for item in found.items:
        assert (item.answer is None) == (item.rouge1 is None) == (item.rougeL is None)


def test_the_sample_does_not_depend_on_the_order_but_on_the_seed() -> None:
    shuffled = random.Random(3).sample(EXAMPLES, len(EXAMPLES))
    assert run(max_items=6)[1] == run(shuffled, max_items=6)[1]
    assert run(max_items=6)[1] != run(max_items=6, seed=1)[1]


def test_scores_are_those_of_the_definition() -> None:
    # 2 of 4 words of the answer are among the 3 of the reference: P = 1/2, R = 2/3, F1 = 4/7.
    # The longest common subsequence has one word ("cat" after "the" in one, before it in the other).
    _, found = run([example("cat on the roof", "The cat sat")], rouge_items=1)
    assert found.rouge1 == pytest.approx(4 / 7)
    assert found.rougeL == pytest.approx(2 / 7)
    assert found.length_ratio == pytest.approx(4 / 3)


def test_without_answers_the_means_are_none() -> None:
    lm, found = run(rouge_items=0)
    assert lm.asked == []
    assert found.rouge1 is found.rougeL is found.length_ratio is None
    assert run([example("a", "!?")])[1].length_ratio is None


def test_no_example_is_refused() -> None:
    with pytest.raises(InputError):
        run([])


words = st.lists(st.sampled_from([f"w{i}" for i in range(14)]), min_size=1, max_size=22).map(" ".join)
dialogues = st.lists(
    st.builds(Dialogue, words, words, conversation=st.none() | st.sampled_from("abcdefg")), max_size=30
)


def jaccard(a: Dialogue, b: Dialogue) -> float:
    x, y = (set(re.findall(r"\w+", f"{d.prompt} {d.response}")) for d in (a, b))
    return len(x & y) / len(x | y)


@settings(max_examples=80, deadline=None)
@given(dialogues, st.floats(0.05, 0.6), st.randoms(use_true_random=False))
def test_split_against_brute_force(given: list[Dialogue], share: float, generator: random.Random) -> None:
    choice = config.Evaluation(holdout=share)
    stream, held, removed = evaluation.split(given, choice)
    assert len(stream) + len(held) + removed == len(given)
    assert stream == [d for d in given if d in stream], "the stream keeps its order"
    sides = [{d.conversation or d.id for d in side} for side in (stream, held)]
    assert not sides[0] & sides[1], "a conversation is on one side"
    assert all(jaccard(a, b) < 0.9 for a in held for b in stream)
    names = {d.conversation or d.id for d in given} - sides[0]
    outside = [d for d in given if (d.conversation or d.id) in names]
    assert held == [d for d in outside if all(jaccard(d, s) < 0.9 for s in stream)], "no more is removed"
    if len(sides[0] | names) > 1:
        assert min(len(stream), len(names)) > 0, "both sides have something"
    other = evaluation.split(generator.sample(given, len(given)), choice)
    assert {d.id for d in other[1]} == {d.id for d in held}, "the order does not matter"


def test_the_share_is_met_on_single_dialogues_and_on_uneven_conversations() -> None:
    single = [Dialogue(f"prompt {i}", f"response {i * 7919}") for i in range(200)]
    assert len(evaluation.split(single, config.Evaluation(holdout=0.2))[1]) == 40
    uneven = [Dialogue(f"p{i}", f"r{i}", conversation="large" if i else "small") for i in range(100)]
    for seed in range(8):
        _, held, _ = evaluation.split(uneven, config.Evaluation(holdout=0.2, seed=seed))
        assert [d.conversation for d in held] == ["small"]


def test_a_single_conversation_is_not_held_out() -> None:
    only = [Dialogue(f"p{i}", f"r{i}", conversation="one") for i in range(5)]
    assert evaluation.split(only, config.Evaluation())[1:] == ([], 0)
    assert evaluation.split([], config.Evaluation()) == ([], [], 0)


def test_repeats_are_found_after_normalisation() -> None:
    sides = {}
    for seed in range(40):  # until one of the two is on each side
        pair = [
            Dialogue("Hello, there!", "Hi."),
            Dialogue("hello there", "HI"),
            Dialogue("🙂", ""),
            Dialogue("🙂", " "),
        ]
        stream, held, removed = evaluation.split(pair[:2], config.Evaluation(holdout=0.5, seed=seed))
        sides[len(stream), len(held), removed] = True
        assert evaluation.split(pair[2:], config.Evaluation(holdout=0.5, seed=seed))[1:] == ([], 1)
    assert sides == {(1, 0, 1): True}


def test_five_thousand_dialogues_need_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    weights = [1 / (rank + 1) for rank in range(3000)]
    many = [
        Dialogue(
            " ".join(generator.choices(vocabulary, weights, k=15)),
            " ".join(generator.choices(vocabulary, weights, k=40)),
        )
        for _ in range(5000)
    ]
    calls = 0
    plain = evaluation._jaccard

    def counted(a: frozenset[str], b: frozenset[str]) -> float:
        nonlocal calls
        calls += 1
        return plain(a, b)

    monkeypatch.setattr(evaluation, "_jaccard", counted)
    evaluation.split(many, config.Evaluation(holdout=0.2))
    assert calls < 4_000_000 / 10
