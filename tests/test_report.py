"""The report: its records, its two files and its page."""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Outline, changed
from pydantic import BaseModel, ValidationError

from edge_sdss import files
from edge_sdss import report as package
from edge_sdss.config import Config
from edge_sdss.errors import BackendUnavailable, InputError
from edge_sdss.page import formats
from edge_sdss.report import RunReport, headline, json_schema, load, plots, thin, write
from edge_sdss.report import html as page
from edge_sdss.report.schema import Offer

ROOT = Path(__file__).resolve().parent.parent

# (domain, prompt, what the untuned model said, what the user wanted)
EXCHANGES = [
    (
        "work",
        "The stoneware batch cracked in the kiln again, this time at the handles. What should I check first?",
        "Cracks in pottery can have many causes! You may want to check the clay, the glaze, the temperature"
        " and the drying time. It is always a good idea to consult a professional potter for advice!",
        "Check the drying: handles dry faster than the body and pull away from it. Wrap the joints for 24 "
        "hours before the bisque firing. Next: wrap one test mug tonight.",
    ),
    (
        "animals",
        "Juno got into the cheese on the counter. She is on the low-fat diet for her pancreas, should I worry?",
        "Dogs love cheese! A little bit of cheese is usually fine as a treat, so you do not need to worry.",
        "Yes, watch her closely: fat can set off her pancreatitis. Give water only for 12 hours and call "
        "the vet if she vomits. Next: write down how many grams are missing.",
    ),
    (
        "food",
        "Find me a supper for the two of us that is ready in half an hour and has no aubergine in it.",
        "Sure! How about a delicious aubergine parmigiana? Preheat your oven to 375 degrees Fahrenheit!",
        "Make chickpeas with spinach and lemon: 25 minutes in one pan. Serve it with the barley from "
        "Sunday. Next: soak 150 g of chickpeas now.",
    ),
    (
        "leisure",
        "The wind is turning north-west on Saturday. Is the long crossing to the skerries wise in the sea kayak?",
        "Kayaking is a wonderful hobby! Always wear a life jacket and have fun out there!",
        "No, north-west wind stands against the ebb off the skerries after noon. Take the inner sound "
        "instead, it is 9 km and sheltered. Next: check the forecast on Friday at 18:00.",
    ),
    (
        "home",
        "The cellar shows 78 percent humidity this morning. The glaze sacks are down there.",
        "Humidity is the amount of water vapor in the air. High humidity can cause mold in your basement.",
        "Move the glaze sacks up: above 70 percent they draw water and clump. Then air the cellar in the "
        "evening, when it is below 15 degrees outside. Next: lift the opened sacks first.",
    ),
    (
        "health",
        "My wrist hurts after throwing bowls all day, on the thumb side. What do I change?",
        "I am sorry to hear that! As an AI, I cannot give medical advice. Please see a doctor!",
        "Throw at most two hours at a stretch and raise the wheel by 5 cm, so the wrist stays straight. See"
        " a doctor if it hurts at rest. Next: put a brick under each leg of the wheel.",
    ),
    (
        "money",
        "The gallery wants forty percent and pays after ninety days. Should I sign?",
        "Signing a contract is an important decision. There are many factors to consider, such as your goals!",
        "Ask for 30 days before you sign: clay and gas are paid at once. Forty percent is usual for a "
        "gallery. Next: send them one sentence that asks for 30 days.",
    ),
    (
        "technology",
        "The kiln controller shows error 4 at 600 degrees and then goes on. Can I ignore it?",
        "Error codes can mean many things. Try turning it off and on again!",
        "No, error 4 is a thermocouple that drops out, and the firing may overshoot. Stop and clean its "
        "contacts. Next: switch the kiln off and let it cool.",
    ),
]
CHAT = [
    ("Good morning.", "Good morning! How can I help you today?"),
    ("Thanks, that is all.", "You are welcome! Have a great day!"),
    ("Still raining here.", "Rainy days can be cozy! Enjoy a warm cup of tea."),
    ("ok", "Great! Let me know if you need anything else."),
    ("Are you there?", "Yes, I am here! How can I assist you?"),
]


def example_report(offers: int = 400, bins: int = 32, seed: int = 0, **changes: Any) -> RunReport:
    """A realistic report of a run that was accepted. Needs no model; `changes` replace whole sections."""
    rng = random.Random(seed)
    report = {
        "title": "One assistant, learning from its own user",
        "command": "edge-sdss run stream.jsonl --policy sdss --out out",
        "created": "2026-03-14T09:26:53Z",
        "stages": {
            "read": 0.08,
            "select": 31.4,
            "annotate": 0.02,
            "synthesise": 48.9,
            "tune": 94.2,
            "evaluate": 71.6,
        },
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "fingerprint": "5af571cbf074e6d2",
            "parameters": 134_515_008,
            "dtype": "float32",
            "device": "cpu",
        },
        "stream": {
            "source": "stream.jsonl",
            "format": "input/response",
            "dialogues": offers + 53,
            "rejected": 2,
            "skipped": 0,
            "heldout": 48,
            "near_duplicates_removed": 5,
        },
        "buffer": _buffer(rng, offers, bins),
        "annotation": {"requested": 24, "accepted": 5, "edited": 17, "skipped": 2, "forgotten": 0},
        "synthesis": _synthesis(rng),
        "tuning": _tuning(rng),
        **_evaluation(rng, 48),
        "environment": {
            "edge_sdss": "0.1.0",
            "python": "3.11.7",
            "platform": "Linux x86_64",
            "processor": "Example processor, 2.1 GHz",
            "cores": 4,
            "memory_bytes": 16 << 30,
            "packages": {"torch": "2.13.0", "transformers": "4.57.6", "peft": "0.21.2", "numpy": "2.4.6"},
            "commit": "3f2c1ab",
        },
        "settings": Config().model_dump(),
    }
    return RunReport.model_validate({**report, **changes})


def _buffer(rng: random.Random, offers: int, bins: int) -> dict[str, Any]:
    """Plays the strictly-better-in-all-three rule on made-up scores."""
    inside: list[dict[str, Any]] = []
    decisions = []
    for seq in range(1, offers + 1):
        informative = rng.random() < 0.35
        domain, prompt, response, preferred = rng.choice(EXCHANGES)
        if not informative:
            domain, preferred = ("general" if rng.random() < 0.8 else "emotion"), None
            prompt, response = rng.choice(CHAT)
        scores = {
            "eoe": round(min(rng.gauss(0.93 if informative else 0.88, 0.02), 0.995), 4),
            "dss": round(max(rng.gauss(0.021 if informative else 0.003, 0.007), 0), 4),
            "idd": round(min(max(rng.gauss(0.42 if informative else 0.16, 0.11), 0.01), 1), 4),
        }
        worse = [e for e in inside if all(e[name] < value for name, value in scores.items())]
        new = {"seq": seq, "id": f"{rng.getrandbits(64):016x}", "domain": domain, **scores}
        evicted, slot, reason = [], len(inside), "a bin was free"
        if slot == bins and worse:
            out = rng.choice(worse)
            slot, evicted = out["slot"], [out["id"]]
            inside.remove(out)
            reason = f"higher in all three scores than {len(worse)} of {bins}; bin {slot} was drawn"
        elif slot == bins:
            decisions.append(
                {**new, "action": "dropped", "reason": f"beats none of {bins} entries in all three scores"}
            )
            continue
        decisions.append({**new, "action": "kept", "evicted": evicted, "reason": reason})
        text = {
            "prompt": prompt,
            "response": response,
            "preferred": preferred,
            "reason": reason,
            "slot": slot,
        }
        inside.append({**new, **text, "annotation": rng.choice(["edit", "accept", None]) if preferred else None})
    kept = sum(d["action"] == "kept" for d in decisions)
    return {
        "policy": "sdss",
        "offers": offers,
        "kept": kept,
        "evicted": kept - len(inside),
        "dropped": offers - kept,
        "entries_used": len(inside),
        "bins": bins,
        "bytes": 36_412,
        "max_bytes": 720_896,
        "vectors": "int8",
        "entries": inside,
        "decisions": decisions,
    }


def _synthesis(rng: random.Random) -> dict[str, Any]:
    examples = []
    for _, prompt, _, preferred in EXCHANGES:
        for dropped, opening in (
            (None, "Tell me: "),
            (None, "A question. "),
            ("too far from the original", "Hello. "),
        ):
            far = dropped is not None
            examples.append(
                {
                    "prompt": prompt,
                    "response": preferred,
                    "variant_prompt": opening + ("How are you today?" if far else prompt[0].lower() + prompt[1:]),
                    "variant_response": preferred,
                    "rouge1": round(rng.uniform(0.1, 0.4) if far else rng.uniform(0.6, 0.95), 3),
                    "dropped": dropped,
                }
            )
    reasons = {"too far from the original": 14, "copy": 5, "cut off": 3, "empty": 1}
    return {
        "made": 66,
        "kept": 43,
        "dropped": 23,
        "dropped_by_reason": reasons,
        "seconds": 48.9,
        "examples": examples,
    }


def _tuning(rng: random.Random) -> dict[str, Any]:
    def at(step: int) -> dict[str, float]:
        rate = 3e-4 * min(step / 3, 1) * 0.5 * (1 + math.cos(math.pi * step / 36))
        return {
            "step": step,
            "loss": 1.35 + 1.9 * math.exp(-step / 9) + rng.gauss(0, 0.08),
            "learning_rate": rate,
        }

    return {
        "steps": 36,
        "seconds": 94.2,
        "tokens": 21_840,
        "examples": 65,
        "trainable_parameters": 2_442_240,
        "adapter_bytes": 9_786_112,
        "peak_tensor_bytes": 1_093_664_768,
        "losses": [at(step) for step in range(1, 37)],
    }


def _evaluation(rng: random.Random, n: int) -> dict[str, Any]:
    items = []
    for i in range(n):
        _, prompt, response, preferred = EXCHANGES[i % len(EXCHANGES)]
        before, shift, rouge = rng.gauss(3.4, 0.4), rng.gauss(-0.42, 0.3), rng.uniform(0.08, 0.3)
        item = {"prompt": prompt, "reference": preferred, "nll_before": before, "nll_after": before + shift}
        if i < 32:
            words = preferred.split()
            answer = " ".join(words[: rng.randint(8, len(words))])
            item |= {"answer_before": response, "answer_after": answer}
            item |= {"rouge1_before": rouge, "rouge1_after": max(rouge + rng.gauss(0.11, 0.09), 0)}
        items.append(item)
    nll = _paired([i["nll_after"] - i["nll_before"] for i in items])
    rouge1 = _paired([i["rouge1_after"] - i["rouge1_before"] for i in items[:32]])
    before = {
        "nll": _mean([i["nll_before"] for i in items]),
        "rouge1": _mean([i["rouge1_before"] for i in items[:32]]),
    }
    after = {"nll": before["nll"] + nll["mean"], "rouge1": before["rouge1"] + rouge1["mean"]}
    checks = [
        {"name": "personal loss", "passed": True, "value": nll["mean"], "limit": 0.0, "unit": "nats/token"},
        {"name": "general loss", "passed": True, "value": 0.021, "limit": 0.05, "unit": "nats/token"},
    ]
    return {
        "eval": {
            "n": n,
            "before": {**before, "rougeL": 0.148, "length_ratio": 1.31},
            "after": {**after, "rougeL": 0.231, "length_ratio": 0.94},
            "delta_nll": nll,
            "delta_rouge1": rouge1,
            "items": items,
        },
        "forgetting": {
            "n": 48,
            "before": 2.417,
            "after": 2.438,
            "delta_nll": 0.021,
            "lo": 0.009,
            "hi": 0.033,
        },
        "gate": {
            "accepted": True,
            "reason": "Held-out NLL fell and forgetting is within its limit.",
            "checks": checks,
        },
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _paired(values: list[float]) -> dict[str, float]:
    mean = _mean(values)
    half = 1.96 * math.sqrt(_mean([(v - mean) ** 2 for v in values]) / (len(values) - 1))
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": len(values)}


SECTIONS = ["annotation", "synthesis", "tuning", "eval", "forgetting", "gate"]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7*7 }} $x_1$ \u202e\x07"


@pytest.fixture(scope="module")
def report() -> RunReport:
    return example_report()


@pytest.fixture(scope="module")
def rendered(report: RunReport) -> str:
    pytest.importorskip("matplotlib")
    return page.render(report)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the drawings out, for tests of what is around them."""
    monkeypatch.setattr(plots, "svg", lambda name, inches, draw, alt: f'<svg role="img" aria-label="{name}"></svg>')


def models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from models(inner, seen)


# the records


def test_every_key_is_described_and_the_records_are_closed():
    found = list(models(RunReport, set()))
    assert len(found) >= 15
    for model in found:
        assert model.model_config["frozen"]
        assert model.model_config["extra"] == "forbid"
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_the_documented_schema_is_current():
    path = ROOT / "docs" / "report.schema.json"
    assert path.read_text(encoding="utf-8") == json_schema(), "see docs/report.md for how to write it anew"


def test_every_key_is_in_the_documentation():
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    for name in RunReport.model_fields:
        assert f"`{name}`" in text


def test_unknown_keys_and_other_versions_are_refused(report):
    for change in ({"mood": 1}, {"buffer/mood": 1}, {"schema_version": "2"}, {"created": "yesterday"}):
        with pytest.raises(ValidationError):
            changed(report, **change)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_round_is_reported_and_no_other_number_may_be_infinite(report, value, tmp_path):
    pytest.importorskip("matplotlib")
    evaluation = report.eval.model_dump()
    evaluation["after"]["nll"] = value
    evaluation["delta_nll"] = {"mean": value, "lo": value, "hi": value, "n": 48}
    for item in evaluation["items"]:
        item["nll_after"] = value
    tuning = report.tuning.model_dump()
    tuning["losses"][5]["loss"] = value
    diverged = changed(report, eval=evaluation, tuning=tuning)
    assert diverged.eval.after.nll is None
    assert diverged.tuning.losses[5].loss is None
    assert "not finite" in headline(diverged)
    write(diverged, tmp_path)
    assert load(tmp_path / "report.json") == diverged
    with pytest.raises(ValidationError):
        changed(report, **{"tuning/seconds": value})


offers_of = st.lists(st.sampled_from([True, True, True, False]), min_size=10, max_size=60).map(
    lambda kept: [
        Offer(
            seq=i + 1,
            id=str(i),
            action="kept" if k else "dropped",
            domain="d",
            eoe=0,
            dss=0,
            idd=0,
            evicted=(),
            reason="",
        )
        for i, k in enumerate(kept)
    ]
)


@given(offers_of, st.integers(0, 20))
def test_thinning_keeps_order_bound_and_what_changed_the_buffer(offers, limit):
    left = thin(offers, limit)
    assert len(left) == min(limit, len(offers))
    assert [o.seq for o in left] == sorted({o.seq for o in left})
    kept, left_kept = ([o for o in some if o.action == "kept"] for some in (offers, left))
    assert left_kept == kept[max(len(kept) - limit, 0) :]


# the files


def test_a_report_comes_back_as_it_was(undrawn, report, tmp_path):
    write(report, tmp_path / "new" / "folder")
    assert load(tmp_path / "new" / "folder" / "report.json") == report
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "report.json"]


def test_a_setting_that_json_cannot_hold_becomes_null(undrawn, report, tmp_path):
    written = RunReport.model_validate(report.model_dump() | {"settings": {"tuning": {"clip": math.inf, "rank": 8}}})
    write(written, tmp_path)
    assert load(tmp_path / "report.json").settings == {"tuning": {"clip": None, "rank": 8}}


def test_settings_may_hold_paths(report):
    value = report.model_dump() | {"settings": {"selection": {"lexicons": Path("words")}}}
    assert RunReport.model_validate(value).settings == {"selection": {"lexicons": "words"}}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_report_whole(report, tmp_path, monkeypatch, broken):
    (tmp_path / "report.json").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(InputError, match="No space left"):
        write(report, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_the_content_is_on_the_disk_before_it_has_the_name(undrawn, report, tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda f: (calls.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b))[1])
    write(report, tmp_path)
    assert calls == ["fsync", "report.json", "fsync", "report.html"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": "2"}', "schema_version '2'"),
        ('{"schema_version": "1"}', "title: Field required"),
        ('{"schema_version": "1", "settings": {"x": NaN}}', "NaN"),
    ],
)
def test_what_is_no_report_is_named(tmp_path, text, found):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_undecodable_report_is_named(tmp_path):
    (tmp_path / "utf16.json").write_bytes('{"schema_version": "1"}'.encode("utf-16"))
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "utf16.json"):
        with pytest.raises(InputError, match=re.escape(str(path))):
            load(path)


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_and_the_json_is_there(report, tmp_path, monkeypatch, library):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendUnavailable, match=rf"{library}.*edge_sdss\[train\]"):
        write(report, tmp_path)
    assert load(tmp_path / "report.json") == report


# the verdict


def delta(lo: float, hi: float) -> dict[str, float]:
    return {"mean": (lo + hi) / 2, "lo": lo, "hi": hi, "n": 48}


@pytest.mark.parametrize(
    ("lo", "hi", "words"),
    [
        (-0.5, -0.3, "fell from"),
        (-0.1, 0.1, "did not clearly change"),
        (0.1, 0.2, "rose from"),
        (-0.2, 0.0, "did not"),
    ],
)
def test_the_headline_says_what_the_interval_says(report, lo, hi, words):
    text = headline(changed(report, **{"eval/delta_nll": delta(lo, hi)}))
    assert words in text
    assert f"{lo:.2f} to {hi:.2f}, n = 48".replace("-", "\N{MINUS SIGN}") in text
    assert text.endswith("Accepted: the new adapter is active.")


def test_the_headline_never_calls_a_rejected_or_missing_round_active(report):
    rejected = changed(report, **{"gate/accepted": False, "gate/reason": "general loss rose by 0.2."})
    assert headline(rejected).endswith("Rejected: the new adapter is not active, since general loss rose by 0.2.")
    assert headline(changed(report, gate=None)).endswith("its adapter is not active.")
    assert headline(changed(report, **dict.fromkeys(SECTIONS))) == (
        "No held-out dialogue was measured. No round was run: the model is unchanged."
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: formats.num(-0.426), "−0.43"),
        (lambda: formats.num(None), "–"),
        (lambda: formats.signed(0.021, 3), "+0.021"),
        (lambda: formats.count(1234567), "1,234,567"),
        (lambda: formats.size(1023), "1023 bytes"),
        (lambda: formats.size(1024), "1.0 KiB"),
        (lambda: formats.size(3 << 30), "3.0 GiB"),
        (lambda: formats.duration(0.84), "0.8 s"),
        (lambda: formats.duration(59.7), "1 min 00 s"),
        (lambda: formats.duration(134), "2 min 14 s"),
        (lambda: formats.share(1, 3), "33 %"),
        (lambda: formats.share(1, 54), "1.9 %"),
        (lambda: formats.share(1, 0), "–"),
    ],
)
def test_numbers_are_formatted_for_people(call, text):
    assert call() == text


def test_best_and_worst_answers_are_both_shown_and_never_mixed(report):
    answered = [i for i in report.eval.items if i.answer_after is not None]
    change = {id(i): i.nll_after - i.nll_before for i in answered}
    shown = page.Answers.of(report.eval)
    assert shown.n == len(answered) == 32
    by_change = sorted(answered, key=lambda i: change[id(i)])
    assert list(shown.improved) == by_change[:4]
    assert list(shown.worsened) == [i for i in by_change[::-1] if change[id(i)] > 0][:4]
    assert shown.worsened, "the example must hold one that got worse"


# the plots


def test_the_buffer_over_time_is_rebuilt_from_the_decisions(report):
    steps, counts = plots.occupancy(report.buffer)
    by_id = {o.id: o for o in report.buffer.decisions}
    inside: set[str] = set()
    for offer in report.buffer.decisions:
        if offer.action == "dropped":
            continue
        inside = (inside - set(offer.evicted)) | {offer.id}
        at = steps.index(offer.seq, 1)
        expected = Counter(by_id[one].domain for one in inside)
        assert {name: row[at] for name, row in counts.items() if row[at]} == dict(expected)
    assert inside == {e.id for e in report.buffer.entries}
    assert steps[-1] == 400


def test_equal_texts_and_earlier_entries_are_counted_in_the_buffer_over_time():
    def offer(seq: int, name: str, *evicted: str) -> dict[str, Any]:
        scores = {"eoe": 0, "dss": 0, "idd": 0, "reason": ""}
        return {"seq": seq, "id": name, "action": "kept", "domain": name[0], "evicted": evicted, **scores}

    text = {"prompt": "", "response": "", "eoe": 0, "dss": 0, "idd": 0, "reason": ""}
    last = [("a", 6), ("z", 2), ("b", 9), ("d", 12), ("e", 14)]
    entries = [{"slot": i, "id": n, "seq": s, "domain": n[0], **text} for i, (n, s) in enumerate(last)]
    # At first the bins hold old (three times), z and c. The text "a" comes in twice and leaves
    # once; "c" comes in once and leaves twice.
    came = [(5, "a", "old"), (6, "a", "old"), (9, "b", "a"), (10, "c", "old"), (12, "d", "c"), (14, "e", "c")]
    decisions = [offer(*one) for one in came]
    buffer = example_report(40).buffer.model_dump() | {"entries": entries, "decisions": decisions}
    steps, counts = plots.occupancy(type(example_report(40).buffer).model_validate(buffer))
    assert steps == [5, 5, 6, 9, 10, 12, 14, 14]
    assert counts == {
        "a": [0, 1, 2, 1, 1, 1, 1, 1],
        "b": [0, 0, 0, 1, 1, 1, 1, 1],
        "c": [1, 1, 1, 1, 2, 1, 0, 0],
        "d": [0, 0, 0, 0, 0, 1, 1, 1],
        "e": [0, 0, 0, 0, 0, 0, 1, 1],
        "z": [1, 1, 1, 1, 1, 1, 1, 1],
        plots.EARLIER: [3, 2, 1, 1, 0, 0, 0, 0],
    }


def test_equal_reports_give_equal_pages(report, rendered):
    assert page.render(RunReport.model_validate_json(report.model_dump_json())) == rendered


def test_no_colour_or_id_of_the_plotting_library_is_left(rendered):
    for svg in re.findall(r"<svg.*?</svg>", rendered, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
    ids = re.findall(r'\bid="([^"]*)"', rendered)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]*)", rendered))
    assert used <= set(ids)


def test_a_large_run_stays_small(tmp_path):
    pytest.importorskip("matplotlib")
    big = example_report(offers=6000, bins=400, seed=3)
    value = big.buffer.model_dump() | {"decisions": thin(big.buffer.decisions)}
    big = changed(big, buffer=json.loads(json.dumps(value, default=lambda o: o.model_dump())))
    assert len(page.render(big).encode()) < 1_500_000
    assert len(page.render(example_report()).encode()) < 600_000


# the page


def test_the_page_is_well_formed_and_has_an_outline(rendered):
    outline = Outline(rendered)
    assert outline.open == []
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
    assert tags.count("h2") == 9
    links = {a["href"] for tag, a in outline.tags if tag == "a"}
    ids = {a.get("id") for _, a in outline.tags}
    assert {link.removeprefix("#") for link in links} <= ids
    for tag, attributes in outline.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
    assert sum(a.get("role") == "img" and t == "svg" for t, a in outline.tags) == 7


def test_the_page_needs_nothing_from_outside(rendered):
    outline = Outline(rendered)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in outline.tags}
    for _, attributes in outline.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#")
    assert "default-src 'none'" in rendered
    assert not re.search(r"@import|url\((?!#)", rendered)


def test_every_text_is_escaped(report):
    pytest.importorskip("matplotlib")

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k in FIXED else poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return HOSTILE + value if isinstance(value, str) else value

    FIXED = {"schema_version", "created", "action", "annotation"}  # noqa: N806
    value = report.model_dump(mode="json")
    poisoned = poison(value | {"annotation": None, "stages": {HOSTILE: 1.0}, "settings": {HOSTILE: {"a": HOSTILE}}})
    text = page.render(RunReport.model_validate(poisoned))
    outline = Outline(text)
    assert not {"script", "img"} & {tag for tag, _ in outline.tags}
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert text.count("&lt;script&gt;alert(1)") > 100
    assert "{{ 7*7 }}" in text


def test_the_figures_of_the_report_are_on_the_page(report, rendered):
    words = Outline(rendered).words
    assert headline(report) in words
    for expected in (
        "32 of 400",
        "1,043.0 MiB",
        "9.3 MiB",
        "1 min 34 s",
        "35.6 KiB of 704.0 KiB",
        "5af571cbf074e6d2",
    ):
        assert expected in words
    for reason, n in report.synthesis.dropped_by_reason.items():
        assert re.search(rf"{reason} {n}\b", words)
    for entry in report.buffer.entries:
        assert entry.preferred is None or entry.preferred in words
    assert f"tuning.learning_rate {report.settings['tuning']['learning_rate']}" in words
    assert report.command in words


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_was_not_run_says_so(undrawn, report, section):
    words = Outline(page.render(changed(report, **{section: None}))).words.lower()
    assert "not run" in words


def test_a_run_that_only_selected_and_an_empty_one_have_a_page(report):
    pytest.importorskip("matplotlib")
    bare = changed(report, **dict.fromkeys(SECTIONS))
    assert Outline(page.render(bare)).words.lower().count("not run") == 7
    nothing = report.buffer.model_dump() | {
        "offers": 0,
        "kept": 0,
        "evicted": 0,
        "dropped": 0,
        "entries_used": 0,
    }
    empty = changed(bare, buffer=nothing | {"bytes": 0, "entries": [], "decisions": []}, stages={})
    assert "The buffer is empty." in Outline(page.render(empty)).words


def test_one_of_each_kind_is_enough(report):
    pytest.importorskip("matplotlib")
    buffer = report.buffer.model_dump()
    one = changed(
        report,
        buffer=buffer | {"entries": buffer["entries"][:1], "decisions": buffer["decisions"][:1]},
        **{
            "tuning/losses": report.model_dump()["tuning"]["losses"][:1],
            "eval/items": report.model_dump()["eval"]["items"][:1],
        },
    )
    assert page.render(one).count('role="img" aria-label="') == 8


def test_held_out_dialogues_without_answers_are_said_to_have_none(undrawn, report):
    value = report.model_dump()["eval"]
    none = {"answer_before": None, "answer_after": None, "rouge1_before": None, "rouge1_after": None}
    for side in ("before", "after"):
        value[side] |= {"rouge1": None, "rougeL": None, "length_ratio": None}
    value |= {"delta_rouge1": None, "items": [item | none for item in value["items"]]}
    words = Outline(page.render(changed(report, eval=value))).words
    assert "Not run: only likelihoods were measured." in words


def test_reading_reports_loads_no_plotting_library():
    import subprocess

    code = "import sys, edge_sdss.report; print({'matplotlib', 'jinja2', 'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
    assert package.__all__ == sorted(package.__all__)
