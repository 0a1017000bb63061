"""The promises of the packaged data, counted: the demo's stream, its held-out questions, the general set."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parent.parent / "edge_sdss" / "_data"
FILES = ("demo/stream.jsonl", "demo/heldout.jsonl", "general.jsonl")

KINDS = {"fact", "task", "preference"}
IMPERIAL = re.compile(
    r"\b(inch(es)?|foot|feet|ft|yards?|miles?|pounds?|lbs?|ounces?|oz|gallons?|pints?|quarts?|cups?"
    r"|teaspoons?|tablespoons?|fahrenheit)\b|°\s*F\b",
    re.IGNORECASE,
)
SELF_TALK = re.compile(r"\bas an ai\b|language model|great question|happy to help", re.IGNORECASE)

# What the user said: a name for each fact, and the words by which its answers are known.
FACTS = {
    "trade": r"dry-stone",
    "region": r"in the Burren",
    "pace": r"3 metres a day",
    "rate": r"95 euros a metre",
    "quote": r"quote the next day",
    "deposit": r"one third",
    "invoices": r"\bFridays?\b",
    "payment": r"\b14 days",
    "tax": r"30 percent",
    "abbey": r"31 May",
    "batter": r"1 in 8",
    "throughstones": r"60 centimetres",
    "hearting": r"placed by hand|place the hearting by hand",
    "height": r"1\.4 metres",
    "base": r"80 centimetres wide",
    "frost": r"2 °C",
    "hammer": r"ash handle",
    "quarry": r"Tuesdays?\b",
    "load": r"8 tonnes",
    "van": r"900 kilograms",
    "lifting": r"25 kilograms",
    "stretching": r"Stretch your back for ten minutes",
    "course": r"first Saturday",
    "learners": r"six learners",
    "pancreatitis": r"pancreatitis",
    "diet": r"low-fat",
    "meals": r"240 grams",
    "treats": r"carrot",
    "blood test": r"every six weeks",
    "thunder": r"under the stairs",
    "night shifts": r"night shifts?",
    "quiet": r"two in the afternoon",
    "twins": r"14:40",
    "allergy": r"hazelnuts",
    "vegetarian": r"vegetarian",
    "loaf": r"230 °C",
    "starter": r"50 grams of rye flour",
    "concertina": r"Anglo concertina",
    "session": r"Wednesday",
    "metronome": r"80 beats",
    "worry": r"one slow tune on the concertina",
    "swimming": r"12 °C",
    "not alone": r"never swim alone",
    "living room": r"19 °C",
    "signal": r"top gate",
    "holiday": r"Brittany",
    "ferry": r"ferry",
    "units": r"Celsius only|Metric and Celsius",
    "length": r"two or three short sentences",
    "tone": r"plain tone",
    "next step": r"starts with Next",
}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def sentences(text: str) -> list[str]:
    return re.split(r'(?<=[.?!])"?\s+', text)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def answers_with(pattern: str, rows: list[dict[str, Any]]) -> int:
    return sum(re.search(pattern, row["preferred"], re.IGNORECASE) is not None for row in rows)


STREAM, HELD_OUT, GENERAL = (read(name) for name in FILES)
INFORMATIVE = [row for row in STREAM if row["kind"] != "chat"]
CHAT = [row for row in STREAM if row["kind"] == "chat"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (FILES[0], ["prompt", "response", "preferred", "time", "kind"]),
        (FILES[1], ["prompt", "response", "preferred", "kind"]),
        (FILES[2], ["prompt", "preferred"]),
    ],
)
def test_every_line_has_its_fields(name: str, fields: list[str]) -> None:
    raw = (DATA / name).read_bytes()
    assert b"\r" not in raw
    assert raw.endswith(b"}\n")
    for row in read(name):
        assert list(row) == fields
        for value in row.values():
            assert isinstance(value, str)
            assert value == value.strip() != ""
            assert not re.search(r"[\x00-\x1f\x7f]", value)


def test_sizes() -> None:
    assert len(STREAM) >= 260
    assert 85 <= len(INFORMATIVE) <= 110
    assert len(CHAT) >= 170
    assert 0.6 <= len(CHAT) / len(STREAM) <= 0.75
    assert len(HELD_OUT) == len(GENERAL) == 48
    assert {row["kind"] for row in INFORMATIVE} == KINDS == {row["kind"] for row in HELD_OUT}


def test_times_rise_over_six_weeks() -> None:
    times = [datetime.fromisoformat(row["time"]) for row in STREAM]
    assert all(time.tzinfo is not None for time in times)
    assert times == sorted(times)
    assert timedelta(days=40) <= times[-1] - times[0] <= timedelta(days=43)
    assert len({time.date() for time in times}) >= 40


def test_small_talk_is_mixed_in() -> None:
    for _, block in groupby(row["kind"] == "chat" for row in STREAM):
        assert len(list(block)) <= 8
    quarter = len(STREAM) // 4
    for start in range(0, 4 * quarter, quarter):
        share = sum(row["kind"] == "chat" for row in STREAM[start : start + quarter]) / quarter
        assert 0.5 <= share <= 0.85


def test_small_talk_is_short_plain_and_repetitive() -> None:
    for row in CHAT:
        assert len(words(row["prompt"])) <= 8
        assert len(words(row["preferred"])) <= 10
        assert len(sentences(row["preferred"])) <= 2
        assert "!" not in row["preferred"]
    replies = Counter(row["preferred"] for row in CHAT)
    assert len(replies) >= 40
    assert len(CHAT) / len(replies) >= 3
    assert not any(answers_with(pattern, CHAT) for pattern in FACTS.values())


def test_no_exchange_is_there_twice() -> None:
    assert len({(row["prompt"], row["response"]) for row in STREAM}) == len(STREAM)
    informative = [row["prompt"] for row in INFORMATIVE + HELD_OUT]
    assert len(set(informative)) == len(informative)
    assert len({row["preferred"] for row in INFORMATIVE + HELD_OUT}) == len(informative)


@pytest.mark.parametrize("row", INFORMATIVE + HELD_OUT, ids=lambda row: row["prompt"][:40])
def test_preferred_answers_keep_the_preferences(row: dict[str, str]) -> None:
    answer = row["preferred"]
    parts = sentences(answer)
    assert 2 <= len(parts) <= 3
    assert all(len(words(part)) <= 24 for part in parts)
    assert re.match(r"Next: [a-z]\w* .*\.$", parts[-1])
    assert not any(part.startswith("Next:") for part in parts[:-1])
    assert 20 <= len(answer.split()) <= 50
    assert "!" not in answer
    assert not IMPERIAL.search(answer)
    assert not SELF_TALK.search(answer)


def test_the_untuned_assistant_breaks_them() -> None:
    responses = [row["response"] for row in INFORMATIVE]
    assert all("Next:" not in response for response in responses)
    assert sum("!" in response for response in responses) >= 0.9 * len(responses)
    assert sum(IMPERIAL.search(response) is not None for response in responses) >= 15


def test_informative_prompts_say_something() -> None:
    assert all(15 <= len(row["prompt"].split()) <= 55 for row in INFORMATIVE)
    assert not any(IMPERIAL.search(row["prompt"]) for row in HELD_OUT)


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_that_is_asked_can_be_learned(fact: str) -> None:
    assert answers_with(FACTS[fact], HELD_OUT) >= 1
    assert answers_with(FACTS[fact], INFORMATIVE) >= 2


def test_every_held_out_answer_rests_on_a_fact() -> None:
    for row in HELD_OUT:
        assert any(answers_with(pattern, [row]) for pattern in FACTS.values()), row["prompt"]


def test_numbers_of_held_out_answers_are_known_or_worked_out() -> None:
    known = Counter(n for row in INFORMATIVE for n in re.findall(r"\d[\d.:]*\d|\d", row["preferred"]))
    asked = [re.findall(r"\d[\d.:]*\d|\d", row["preferred"]) for row in HELD_OUT]
    unknown = {n for numbers in asked for n in numbers if n not in known}
    worked_out = {
        str(10 * 95),  # euros for 10 metres
        "24",
        str(24 // 3),  # days for 24 metres
        str(24 // 8),  # loads for 24 tonnes
        str(1600 // 2),  # kilograms in each of two trips
        str(40 // 8),  # centimetres of batter in 40
        "40",
        str(2400 // 3),  # euros of deposit
        str(1000 * 30 // 100),  # euros for the tax
    }
    assert unknown <= worked_out


def unigram_f1(one: str, other: str) -> float:
    a, b = Counter(words(one)), Counter(words(other))
    return 2 * (a & b).total() / (a.total() + b.total())


@pytest.mark.parametrize(("field", "limit"), [("prompt", 0.7), ("preferred", 0.9)])
def test_held_out_texts_are_new(field: str, limit: float) -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"])
    for row in HELD_OUT:
        nearest = max((other[field] for other in STREAM), key=lambda text: unigram_f1(text, row[field]))
        similarity = rouge.score(nearest, row[field])["rouge1"].fmeasure
        assert similarity == pytest.approx(unigram_f1(nearest, row[field]))
        assert similarity < limit


def test_held_out_answers_share_words_with_the_stream() -> None:
    for row in HELD_OUT:
        assert max(unigram_f1(other["preferred"], row["preferred"]) for other in INFORMATIVE) > 0.4


def test_general_answers_are_neutral() -> None:
    for row in GENERAL:
        assert 13 <= len(row["preferred"].split()) <= 48
        assert "!" not in row["preferred"]
        assert "Next:" not in row["preferred"]
        assert not SELF_TALK.search(row["preferred"])
    assert len({row["prompt"] for row in GENERAL}) == len(GENERAL)
    assert len({row["preferred"] for row in GENERAL}) == len(GENERAL)


def test_general_set_is_not_about_the_user() -> None:
    about_user = re.compile(
        r"\b(walls?|wallers?|limestone|quarry|hammer|dogs?|greyhound|Cobble|pancrea\w*|concertina|tunes?|reels?"
        r"|swim\w*|swam|swum|rye|sourdough|starter|loaf|bread|hazelnuts?|ferry|Brittany|Burren|twins|invoices?)\b",
        re.IGNORECASE,
    )
    for row in GENERAL:
        assert not about_user.search(row["prompt"] + " " + row["preferred"])
