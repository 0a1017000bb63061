"""Variants: what is asked, what is dropped and why, and that nothing depends on the company it is made in."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("rouge_score")

from edge_sdss import config, synthesis
from edge_sdss.types import Example, Turn


class Generation:
    def __init__(self, text, finished=True, tokens=5):
        self.text, self.finished, self.tokens = text, finished, tokens


class Scripted:
    """Answers each request with the next of its texts, and remembers what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = iter(answers), []

    def generate(self, conversations, *, seed, **options):
        self.asked += list(zip(conversations, seed, strict=True))
        self.options = options
        return [next(self.answers) for _ in conversations]


EXAMPLE = Example((Turn("user", "my old dog eats rice and turkey"),), "two hundred grams a meal", "ab")


def made(answers, example=EXAMPLE, **settings):
    given = config.Synthesis(**{"variants": 1, **settings})
    groups = list(synthesis.synthesise(Scripted(answers), [example], given))
    assert [list(group) for group in groups] == [["ab"]]
    return groups[0]["ab"]


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("rice and turkey is what my old dog eats", {}, None),
        ("my old dog eats rice and turkey", {}, "copy"),
        ("What a lovely animal!", {}, "unlike the original"),
        ("  ", {}, "empty"),
        ("rice and turkey is what my old dog", {"finished": False}, "cut off"),
        ("rice and turkey is what my old dog eats", {"tokens": 60}, "too long"),
    ],
)
def test_each_reason_for_which_a_variant_is_dropped(text, options, reason):
    (variant,) = made([Generation(text, **options)])
    assert variant.dropped == reason
    assert variant.response == EXAMPLE.answer


def test_the_threshold_is_an_option_and_the_score_is_kept():
    loose = Generation("my dog sleeps all day long now")
    (strict,) = made([loose])
    (kept,) = made([loose], min_rouge1=0.1)
    assert strict.dropped == "unlike the original"
    assert kept.dropped is None
    # unigrams: my, dog shared; 7 words each
    assert kept.rouge1 == pytest.approx(2 / 7)


def test_with_both_parts_the_worse_one_decides():
    good = Generation("rice and turkey is what my old dog eats")
    (kept,) = made([good, Generation("a meal of two hundred grams")], vary="both")
    assert kept.response == "a meal of two hundred grams"
    (dropped,) = made([good, Generation("no idea")], vary="both")
    assert dropped.dropped == "unlike the original"


def test_the_request_holds_the_text_and_asks_for_brackets():
    lm = Scripted([Generation("x")])
    list(synthesis.synthesise(lm, [EXAMPLE], config.Synthesis(variants=1)))
    (turns, _), *_ = lm.asked
    assert turns[-1].text.endswith(EXAMPLE.messages[-1].text)
    assert "[ and ]" in turns[-1].text
    assert lm.options["prefix"] == "["
    assert lm.options["stop"] == ("]",)


def test_draws_depend_on_seed_and_text_alone():
    examples = [replace(EXAMPLE, messages=(Turn("user", f"text {i}"),), dialogue_id=f"{i:x}") for i in range(20)]

    def seeds(chosen, **settings):
        lm = Scripted([Generation("x")] * 100)
        list(synthesis.synthesise(lm, chosen, config.Synthesis(variants=2, **settings)))
        return {(turns[-1].text, n // 1): seed for n, (turns, seed) in enumerate(lm.asked)}

    everything, some = seeds(examples), seeds(examples[10:])
    assert set(some.values()) < set(everything.values())
    assert len(set(everything.values())) == 40
    assert not set(seeds(examples, seed=1).values()) & set(everything.values())


def test_a_tally_counts_by_reason():
    variants = [
        *made([Generation("  ")]),
        *made([Generation("What?")]),
        *made([Generation("rice and turkey my dog eats")]),
    ]
    found = synthesis.tally(variants)
    assert (found.made, found.kept, found.dropped) == (3, 1, 2)
    assert found.dropped_by_reason == {"empty": 1, "unlike the original": 1}


def test_no_variants_are_asked_for_where_none_are_wanted():
    assert made([], variants=0) == []
