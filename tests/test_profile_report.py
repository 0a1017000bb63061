"""The report of a profile: its files, its table and its page, and the number formats of both reports."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import browser
import profiles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Outline, changed
from pydantic import ValidationError

from edge_sdss import files as atomic
from edge_sdss.errors import BackendUnavailable, InputError
from edge_sdss.page import formats
from edge_sdss.profiling import files, html, markdown, plots, schema

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7*7 }} | `a` $x_1$ \u202e\x07"
TIME_PLOTS = ("power", "temperature", "frequency", "memory")


@pytest.fixture(scope="module")
def report() -> schema.Report:
    return profiles.example()


@pytest.fixture(scope="module")
def unpowered() -> schema.Report:
    return profiles.example(power=False)


@pytest.fixture(scope="module")
def rendered(report: schema.Report) -> str:
    pytest.importorskip("matplotlib")
    return html.render(report)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the drawings out, for tests of what is around them."""
    monkeypatch.setattr(plots, "svg", lambda name, inches, draw, alt: f'<svg role="img" aria-label="{name}"></svg>')


# the records and their documentation


def test_the_documented_schema_is_current_and_names_every_key() -> None:
    text = (ROOT / "docs" / "profile.schema.json").read_text(encoding="utf-8")
    assert text == schema.json_schema(), "see docs/profile.md for how to write it anew"
    assert set(json.loads(text)["properties"]) == set(schema.Report.model_fields)
    document = (ROOT / "docs" / "profile.md").read_text(encoding="utf-8")
    for name in (*schema.Report.model_fields, *files.SAMPLES, *files.TRACE):
        assert f"`{name}`" in document


def test_unknown_keys_other_versions_and_numbers_that_are_none_are_refused(report: schema.Report) -> None:
    wrong = {
        "mood": 1,
        "schema_version": "2",
        "kind": "run",
        "cases/0/mood": 1,
        "cases/0/metrics/time/median": math.nan,
    }
    for key, value in wrong.items():
        with pytest.raises(ValidationError):
            changed(report, **{key: value})


# the files


@pytest.mark.parametrize("power", [True, False])
def test_a_profile_comes_back_as_it_was_from_its_file_and_its_folder(undrawn, tmp_path: Path, power: bool) -> None:
    written = profiles.example(power)
    folder = tmp_path / "new" / "folder"
    files.write(written, folder)
    assert files.load(folder) == files.load(folder / "report.json") == written
    assert {p.name for p in folder.iterdir()} == {"report.html", "report.json", "report.md", "samples.csv", "trace.csv"}


def test_equal_records_give_equal_bytes(report: schema.Report, rendered: str, tmp_path: Path, monkeypatch) -> None:
    again = schema.Report.model_validate_json(report.model_dump_json())
    assert html.render(again) == rendered
    monkeypatch.setattr(html, "render", lambda _: rendered)
    files.write(report, tmp_path / "a")
    files.write(again, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_lists_of_numbers_stand_on_one_line_and_texts_are_left_alone(undrawn, report, tmp_path: Path) -> None:
    text = "[\n  1,\n  2\n] [ 1, 2 ] é"
    files.write(changed(report, command=text, settings={"a": [1, 2], "b": [], "c": ["[ 1 ]"]}), tmp_path)
    lines = (tmp_path / "report.json").read_text(encoding="utf-8").splitlines()
    back = files.load(tmp_path)
    assert back.command == text
    assert back.settings == {"a": [1, 2], "b": [], "c": ["[ 1 ]"]}
    numbers = sum(len(run.samples) for case in report.cases for run in case.runs) + 2 * len(report.trace)
    assert sum(len(line) > 5 and bool(re.search(r"\[[-\d.][^\[]*\],?$", line)) for line in lines) >= numbers


def test_the_samples_are_all_there_and_parse_back(undrawn, report: schema.Report, tmp_path: Path) -> None:
    files.write(report, tmp_path)
    with (tmp_path / "samples.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == files.SAMPLES
    back: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        one = back.setdefault((row["case"], int(row["run"]), row["metric"]), [])
        assert int(row["index"]) == len(one)
        one.append(float(row["value"]))
    expected = {(c.name, r.order, m): v for c in report.cases for r in c.runs for m, v in r.samples.items()}
    assert back == expected
    units = {(row["case"], row["metric"]): row["unit"] for row in rows}
    assert units[("offer", "rate")] == "offer/s"
    assert units[("decode", "ttft")] == "s"


def test_the_trace_is_all_there_and_what_was_not_read_is_empty(undrawn, report: schema.Report, tmp_path: Path) -> None:
    files.write(report, tmp_path)
    with (tmp_path / "trace.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == files.TRACE
    back: dict[tuple[str, str], tuple[list[float], list[float | None]]] = {}
    for row in rows:
        times, values = back.setdefault((row["sensor"], row["channel"]), ([], []))
        times.append(float(row["time_s"]))
        values.append(float(row["value"]) if row["value"] else None)
    assert back == {(c.sensor, c.name): (c.times_s, c.values) for c in report.trace}
    assert None in back[("ina3221", "VDD_IN")][1]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_whole(report, tmp_path: Path, monkeypatch, broken: str) -> None:
    (tmp_path / "report.json").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, broken, fail)
    with pytest.raises(InputError, match="No space left"):
        files.write(report, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_every_file_is_on_the_disk_before_it_has_its_name(undrawn, report, tmp_path: Path, monkeypatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda f: (calls.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(atomic.os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b))[1])
    files.write(report, tmp_path)
    assert calls[::2] == ["fsync"] * 5
    assert calls[1::2] == ["report.json", "samples.csv", "trace.csv", "report.md", "report.html"]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_without_the_page_s_libraries_the_other_files_are_there(report, tmp_path: Path, monkeypatch, library) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendUnavailable, match=rf"{library}.*edge_sdss\[train\]"):
        files.write(report, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert files.load(tmp_path) == report


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("schema_version", "2", "schema_version '2', not '1'"),
        ("schema_version", None, "no schema_version"),
        ("kind", "run", "kind: Input should be 'profile'"),
        ("cases/1/energy/mean_w", "much", "cases.1.energy.mean_w: Input should be a valid number"),
        ("cases/0/runs/1/samples/time/0", math.nan, "NaN"),
        ("cases/0/runs/1/samples/time/0", math.inf, "Infinity"),
        ("cases/0/primary", "speed", "cases.0.primary: no metric 'speed'"),
        ("cases/0/metrics", {"time": None}, "cases.0.metrics.time"),
        ("cases/2/runs/0/samples/mood", [1.0], "cases.2.runs.0.samples: no metric 'mood'"),
        ("trace/3/times_s", [0.1], "trace.3.values"),
        ("mood", 1, "mood: Extra inputs"),
    ],
)
def test_a_wrong_key_is_named(report: schema.Report, tmp_path: Path, key: str, value: Any, found: str) -> None:
    content = report.model_dump(mode="json")
    *outer, last = [int(part) if part.isdigit() else part for part in key.split("/")]
    inside: Any = content
    for part in outer:
        inside = inside[part]
    inside[last] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError) as error:
        files.load(tmp_path)
    assert str(path) in str(error.value)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_number_too_large_for_a_float_is_refused(report: schema.Report, tmp_path: Path) -> None:
    text = report.model_dump_json().replace(f'"duration_s":{report.duration_s}', '"duration_s":1e999')
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="duration_s"):
        files.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", '"1"'])
def test_what_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "report.json"))):
        files.load(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        files.load(tmp_path / "none")


# the table


def test_the_table_has_llama_bench_s_columns_and_the_record_s_figures(report: schema.Report) -> None:
    columns, rows = markdown.table(report)
    assert columns[:6] == ["model", "size", "params", "backend", "test", "t/s"]
    by_test = {row[4]: dict(zip(columns, row, strict=True)) for row in rows}
    assert list(by_test) == [case.test for case in report.cases]
    decode = report.cases[5]
    rates = [value for run in decode.runs for value in run.samples["rate"]]
    middle, deviation = statistics.median(rates), statistics.stdev(rates)
    row = by_test["tg128"]
    assert row["t/s"] == f"{middle:.1f} ± {deviation:.1f}"
    assert row["size"] == "513.1 MiB"
    assert row["params"] == "134.52 M"
    assert float(row["J/tok"]) == pytest.approx(decode.energy.per_item_j, rel=5e-3)
    assert row["W"] == "9.6"
    assert row["peak MiB"] == f"{decode.memory.peak_rss_bytes / 2**20:,.0f}"
    assert row["95 % interval"] == f"{decode.metrics['rate'].lo:.1f} to {decode.metrics['rate'].hi:.1f}"
    assert by_test["offer"]["t/s"].endswith(" offers/s")
    assert by_test["offer"]["J/tok"].endswith(" J/offer")


def test_what_is_unknown_is_a_dash_and_never_zero(unpowered: schema.Report) -> None:
    none = {"peak_rss_bytes": None, "rss_bytes": None}
    bare = changed(unpowered, model=None, **{"cases/0/memory": none, "cases/0/metrics/rate/lo": None})
    columns, rows = markdown.table(bare)
    row = dict(zip(columns, rows[0], strict=True))
    for name in ("model", "size", "params", "backend", "95 % interval", "J/tok", "W", "peak MiB"):
        assert row[name] == "–", name
    assert "No energy: no power sensor can be read here." in markdown.render(bare)


def test_one_sample_has_no_deviation(report: schema.Report) -> None:
    single = report.cases[8].model_dump(mode="json")
    single["runs"] = [single["runs"][0] | {"samples": {"time": [30.0], "rate": [1 / 30]}}]
    _, rows = markdown.table(changed(report, cases=[single]))
    assert "±" not in rows[0][5]


def test_the_lines_below_the_table_say_what_the_figures_are(report: schema.Report) -> None:
    text = markdown.render(report)
    for expected in ("Example board, 8 GB", "power mode 15W", "clocks not locked", "VDD_IN alone", "the module"):
        assert expected in text
    assert markdown.EMULATED not in text
    assert markdown.REPLAYED not in text
    text = markdown.render(
        changed(report, **{"device/emulated": True, "device/replayed": True, "failed": {"x": "E: y"}})
    )
    for expected in (
        markdown.EMULATED,
        markdown.REPLAYED,
        "x failed: E: y",
        "policy4 changed",
        "train-step: time drifted",
    ):
        assert expected in text


def test_hostile_names_cannot_leave_their_cell(report: schema.Report) -> None:
    text = markdown.render(changed(report, **{"cases/0/test": HOSTILE + "\n| x", "model/name": "a|b\r\n# c"}))
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(report.cases)
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == len(markdown.COLUMNS) + 1
    assert not re.search(r"^# c", text, flags=re.MULTILINE)


# number formats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.figures(0.0131), "0.0131"),
        (formats.figures(1234.5), "1,234"),
        (formats.figures(-9.996), "−10.0"),
        (formats.figures(0), "0"),
        (formats.figures(None), "–"),
        (formats.quantity(0.000131, "s"), "131 µs"),
        (formats.quantity(0.9999, "s"), "1.00 s"),
        (formats.quantity(7200.0, "s"), "7,200 s"),
        (formats.quantity(3e-13, "s"), "0.000300 ns"),
        (formats.quantity(1.51e9, "Hz"), "1.51 GHz"),
        (formats.quantity(0.0299, "J"), "29.9 mJ"),
        (formats.quantity(0.0, "W"), "0 W"),
        (formats.quantity(3 << 30, "bytes"), "3.0 GiB"),
        (formats.quantity(41.25, "°C"), "41.2 °C"),
        (formats.quantity(None, "W"), "–"),
        (formats.plural("offer"), "offers"),
        (formats.plural("batch"), "batches"),
        (formats.plural("entry"), "entries"),
    ],
)
def test_numbers_are_formatted_for_people(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(1e-12, 1e12), st.sampled_from(["s", "J", "W", "Hz", "tokens/s"]))
def test_a_quantity_is_the_value_to_three_digits(value: float, unit: str) -> None:
    number, label = formats.quantity(value, unit).split(" ")
    power = {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "": 1.0}[label.removesuffix(unit)]
    assert float(number.replace(",", "")) * power == pytest.approx(value, rel=5.1e-3)


# the drawings


def test_an_energy_counter_is_drawn_as_power_and_its_wrap_is_a_gap() -> None:
    times, joules = [0.0, 1.0, 3.0, 4.0, 5.0], [10.0, 15.0, 35.0, 2.0, 6.0]
    counter = {"sensor": "rapl", "name": "package", "kind": "energy", "unit": "J", "times_s": times, "values": joules}
    [line] = plots.lines(profiles.example(False, trace=[counter]), "power")
    assert list(line.times_s) == times[1:]
    assert list(line.values) == [5.0, 10.0, None, 4.0]


def test_at_most_eight_channels_are_drawn_the_largest_and_never_one_that_was_not_read() -> None:
    def channel(name: str, values: list[float | None]) -> dict[str, Any]:
        common = {"sensor": "thermal", "kind": "temperature", "unit": "°C", "times_s": [0.0, 1.0, 2.0]}
        return {**common, "name": name, "values": values}

    trace = [channel(f"zone{i}", [float(i), None, float(i)]) for i in range(12)]
    trace += [channel("off", [None] * 3), channel("once", [99.0, None, None])]
    shown = plots.lines(profiles.example(trace=trace), "temperature")
    assert [line.name for line in shown] == [f"zone{i}" for i in range(11, 3, -1)]
    assert len({line.variable for line in shown}) == 8


@given(st.integers(0, 4000), st.integers(0, 2**32), st.sampled_from([0.0, 0.02, 1.0]))
def test_thinning_for_a_drawing_keeps_peaks_order_and_gaps(n: int, seed: int, gaps: float) -> None:
    rng = random.Random(seed)
    values = [math.nan if rng.random() < gaps else rng.gauss(0, 1) for _ in range(n)]
    kept = plots._thinned(range(n), values)
    finite = [value for value in values if math.isfinite(value)]
    left = [value for _, value in kept if math.isfinite(value)]
    assert [time for time, _ in kept] == sorted({time for time, _ in kept})
    assert len(left) <= plots.MAX_POINTS + 2
    assert [min(left), max(left)] == [min(finite), max(finite)] if finite else not left
    assert len(kept) - len(left) == len(values) - len(finite)


def test_the_distribution_is_of_a_time_even_where_a_rate_is_compared(report: schema.Report) -> None:
    by_name = {case.name: case for case in report.cases}
    assert by_name["decode"].primary == "rate"
    assert plots.latency(by_name["decode"])[0] == "time"
    assert plots.latency(by_name["offer"])[0] == "time"


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=2000))
def test_the_steps_end_at_one_and_are_those_of_the_samples(values: list[float]) -> None:
    ordered = sorted(values)
    across, up = plots._steps(ordered, 1.0)
    assert (up[0], up[-1]) == (0, 1)
    assert up == sorted(up)
    for x, share in list(zip(across, up, strict=True))[1:]:
        assert x == ordered[round(share * len(ordered)) - 1]


# the page


def test_the_page_is_well_formed_and_says_what_was_measured(report: schema.Report, rendered: str) -> None:
    outline = Outline(rendered)
    assert outline.open == []
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
    ids = [a["id"] for _, a in outline.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:href=\"|url\(|labelledby=\")#?([^\")]*)", rendered))
    assert used <= set(ids)
    drawn = [a["aria-label"] for tag, a in outline.tags if tag == "svg" and a.get("role") == "img"]
    assert len(drawn) == len(set(drawn)) == 6 + 2 * len(report.cases)
    assert all(a.get("aria-hidden") == "true" or a.get("aria-label") for tag, a in outline.tags if tag == "svg")
    assert html.headline(report) in outline.words
    figures = ("1 throttle alarm at", "0.4 % of one core", "nvidia-ml-py", "in7 is not used: the sum of the shunts")
    for expected in (
        *figures,
        "23.7 tokens/s",
        "Throttling events soc0 3 4",
        *report.notes,
        "it drifted by more than 5 %",
        "profile.seconds 10.0",
        report.command,
    ):
        assert expected in outline.words
    for case in report.cases:
        assert case.about in outline.words
        assert all(warning in outline.words for warning in case.warnings)
        assert formats.figures(case.energy.per_item_j) in outline.words


def test_the_page_needs_nothing_from_outside(rendered: str) -> None:
    outline = Outline(rendered)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in outline.tags}
    for _, attributes in outline.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert value
                assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", rendered)
    for svg in re.findall(r"<svg.*?</svg>", rendered, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b|mathdefault", svg)


def test_every_text_is_escaped(report: schema.Report) -> None:
    pytest.importorskip("matplotlib")
    fixed = {"schema_version", "kind", "created", "clocks", "total_scope", "scope", "unit", "better", "primary"}

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one if key in fixed else poison(one) for key, one in value.items()}
        if isinstance(value, list):
            return [poison(one) for one in value]
        return HOSTILE + value if isinstance(value, str) else value

    value = poison(report.model_dump(mode="json"))
    value |= {"failed": {HOSTILE: HOSTILE}, "settings": {HOSTILE: {"a": HOSTILE}}}
    value["before"]["fan"] = {HOSTILE: 0.5}
    value["cases"][0]["energy"]["rails"] = {HOSTILE: {"joules": 1.0, "mean_w": 1.0, "peak_w": 1.0}}
    text = html.render(schema.Report.model_validate(value))
    outline = Outline(text)
    assert not {"script", "img"} & {tag for tag, _ in outline.tags}
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert text.count("&lt;script&gt;alert(1)") > 60
    assert "{{ 7*7 }}" in text


@pytest.mark.parametrize("power", [True, False])
def test_a_plot_without_data_is_replaced_by_its_reason(undrawn, power: bool) -> None:
    report = profiles.example(power)
    words = Outline(html.render(report)).words
    assert ("No power over time: no power sensor can be read here." in words) is not power
    assert ("No energy against time: no power sensor can be read here." in words) is not power
    assert ("J per item" in words) is power
    reason = "no thermal zone in /sys"
    sensors = [{"name": "thermal", "usable": False, "reason": reason}]
    words = Outline(html.render(changed(report, trace=[], sensors=sensors))).words
    assert f"No temperature over time: {reason}." in words
    assert f"No clock over time: {reason}." in words
    assert "No memory over time: no sensor gave it more than once." in words
    assert "No power over time:" in words


def test_emulated_and_replayed_profiles_say_so_on_top(undrawn, report: schema.Report) -> None:
    words = Outline(html.render(changed(report, **{"device/emulated": True, "device/replayed": True}))).words
    assert words.index(markdown.EMULATED) < words.index(html.headline(report))
    assert markdown.REPLAYED in words
    assert "Replayed" not in Outline(html.render(report)).words


def test_a_profile_of_nothing_and_of_one_sample_have_a_page(report: schema.Report) -> None:
    pytest.importorskip("matplotlib")
    words = Outline(html.render(changed(report, cases=[], trace=[], sensors=[], model=None, idle=None))).words
    assert words.count("No case was measured.") == 2
    assert "No drift over time" in words
    single = report.cases[8].model_dump(mode="json")
    single["runs"] = [single["runs"][0] | {"samples": {"time": [30.0], "rate": [1 / 30]}}]
    for name in ("time", "rate"):
        single["metrics"][name] |= {"n": 1, "runs": 1, "lo": None, "hi": None, "cv": None}
    words = Outline(html.render(changed(report, cases=[single], duration_s=0.0))).words
    assert "No distribution: there is only one sample." in words


def test_a_sample_of_zero_seconds_and_equal_samples_can_be_drawn(report: schema.Report) -> None:
    pytest.importorskip("matplotlib")
    case = report.cases[1].model_dump(mode="json")
    case["runs"] = [run | {"samples": {"time": [0.0, 0.0]}} for run in case["runs"]]
    case["metrics"] = {"time": case["metrics"]["time"] | {"median": 0.0, "lo": 0.0, "hi": 0.0, "p95": 0.0, "cv": None}}
    drawn = html.render(changed(report, cases=[case]))
    assert "No drift over time" in drawn
    assert plots.ecdf(changed(report, cases=[case]).cases[0], 1)


@browser.needed
@pytest.mark.parametrize("power", [True, False])
def test_a_browser_opens_the_page_without_a_word_and_shows_every_plot(
    report, rendered, unpowered, tmp_path, power
) -> None:
    report = report if power else unpowered
    (tmp_path / "report.html").write_text(rendered if power else html.render(report), encoding="utf-8")
    page, console = browser.opened(tmp_path / "report.html", tmp_path)
    assert console == []
    shown = Outline(page)
    labels = {a.get("aria-label") or "" for tag, a in shown.tags if tag == "svg" and a.get("role") == "img"}
    assert len(labels) == 4 + 2 * power + 2 * len(report.cases)
    for kind in TIME_PLOTS[not power :]:
        assert any(f": {kind} of" in text for text in labels), kind
    assert any("energy against time" in text for text in labels) is power
    assert sum(tag == "path" for tag, _ in shown.tags) > 300


def test_reading_profiles_loads_no_plotting_library() -> None:
    code = "import sys, edge_sdss.profiling.files; print({'matplotlib', 'jinja2', 'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
