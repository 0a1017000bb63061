"""Comparisons of reports: what is called, what is refused, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from profiles import example

from edge_sdss.errors import InputError
from edge_sdss.profiling import compare as comparing
from edge_sdss.profiling import schema, statistics
from edge_sdss.profiling.compare import Comparison, Row, compare, exit_code

pytest.importorskip("scipy")

EXAMPLE = example()


def report(
    rng: np.random.Generator, slower: float = 1.0, runs: int = 5, energy: float = 1.0, **changes: Any
) -> schema.Report:
    """The example with decode alone, at the ordinary noise: 2 % between runs, 5 % within, 20 samples a run."""
    case = next(case for case in EXAMPLE.cases if case.name == "decode")
    times = slower * 0.04 * np.exp(0.02 * rng.standard_normal((runs, 1))) * (1 + 0.05 * rng.standard_normal((runs, 20)))
    rates = (1 / times).tolist()
    made = tuple(
        schema.Run(
            order=i,
            start_s=i,
            end_s=i + 1,
            items=20,
            samples={"inter_token": times[i].tolist(), "rate": rates[i]},
            peak_rss_bytes=1_000_000_000 + 1_000 * i,
        )
        for i in range(runs)
    )
    case = case.model_copy(
        update={
            "runs": made,
            "metrics": {
                "inter_token": statistics.summary(times.tolist(), "s", "lower"),
                "rate": statistics.summary(rates, "token/s", "higher"),
            },
            "energy": case.energy.model_copy(
                update={"per_item_j": energy, "per_item_lo": 0.97 * energy, "per_item_hi": 1.03 * energy}
            ),
        }
    )
    return EXAMPLE.model_copy(update={"cases": (case,), **changes})


def rows(found: Comparison) -> dict[str, Row]:
    return {row.metric: row for row in found.rows}


def device(**changes: Any) -> dict[str, Any]:
    return {"device": EXAMPLE.device.model_copy(update=changes)}


def model(**changes: Any) -> dict[str, Any]:
    assert EXAMPLE.model is not None
    return {"model": EXAMPLE.model.model_copy(update=changes)}


def mode(before: str | None, after: str | None) -> dict[str, Any]:
    return {
        "before": EXAMPLE.before.model_copy(update={"power_mode": before}),
        "after": EXAMPLE.after.model_copy(update={"power_mode": after}),
    }


A, B = (report(np.random.default_rng(seed)) for seed in (1, 2))
SLOW = report(np.random.default_rng(3), slower=1.5, energy=1.5)


def test_100_comparisons_of_equals_call_at_most_5_and_100_planted_ones_at_least_95() -> None:
    rng, equal, planted = np.random.default_rng(20), [], []
    for _ in range(100):
        first = report(rng)
        equal.append(compare(first, report(rng)))
        planted.append(compare(first, report(rng, slower=1.1)))
    primary = [next(row for row in found.rows if row.primary).verdict for found in equal]
    assert 100 - primary.count("inconclusive") <= 5
    anything = [any(row.verdict in ("better", "worse") for row in found.rows) for found in equal]
    assert sum(anything) <= 5
    assert [next(row for row in found.rows if row.primary).verdict for found in planted].count("worse") >= 95


def test_rows_hold_every_figure_in_order_and_the_geometric_ratio() -> None:
    found = compare(A, SLOW)
    assert [row.metric for row in found.rows] == ["inter_token", "rate", "energy per item", "peak memory"]
    assert [row.primary for row in found.rows] == [False, True, False, False]
    assert [row.verdict for row in found.rows] == ["worse", "worse", "worse", "inconclusive"]
    centre = [
        np.mean([math.log(np.median(run.samples["inter_token"])) for run in side.cases[0].runs]) for side in (A, SLOW)
    ]
    time, rate, energy, memory = found.rows
    assert time.ratio == pytest.approx(math.exp(centre[1] - centre[0]))
    assert (time.a, time.b) == (A.cases[0].metrics["inter_token"].median, SLOW.cases[0].metrics["inter_token"].median)
    assert rate.ratio == pytest.approx(1 / time.ratio, rel=1e-3)
    assert (energy.unit, energy.ratio) == ("J/token", pytest.approx(1.5))
    assert energy.lo == pytest.approx(1.5 * 0.9605, rel=0.01)  # two intervals of 3 % make about 4 %
    assert (memory.ratio, memory.verdict) == (1.0, "inconclusive")


def test_swapping_the_reports_inverts_ratios_and_verdicts() -> None:
    opposite = {"better": "worse", "worse": "better", "inconclusive": "inconclusive"}
    for one, two in ((A, B), (A, SLOW)):
        for row, swapped in zip(compare(one, two).rows, compare(two, one).rows, strict=True):
            assert swapped.verdict == opposite[row.verdict]
            assert swapped.ratio == pytest.approx(1 / row.ratio)
            assert swapped.p == pytest.approx(row.p)
            if row.lo is not None:
                assert (swapped.lo, swapped.hi) == pytest.approx((1 / row.hi, 1 / row.lo))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "device": ({}, device(name="other-board")),
    "emulated": ({}, device(emulated=True)),
    "emulated device": (device(emulated=True), device(emulated=True, profile="agx-orin-64gb")),
    "replayed": ({}, device(replayed=True)),
    "power mode": ({}, mode("25W", "25W")),
    "power mode of b changed from 15W to 25W": ({}, mode("15W", "25W")),
    "power mode: 15W and None": ({}, mode(None, None)),
    "model sha256": ({}, model(sha256="0" * 64)),
    "dtype": ({}, model(dtype="bfloat16")),
    "backend": ({}, model(backend="torch cuda")),
    "model sha256: 5af571cb5af5 and None": ({}, {"model": None}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_what_was_measured_under_other_conditions(reason: str) -> None:
    first, second = REFUSED[reason]
    found = compare(A.model_copy(update=first), SLOW.model_copy(update=second), max_regress=0.05)
    assert {row.verdict for row in found.rows} == {"incomparable"}
    assert all(row.ratio is None and row.lo is None and not row.beyond for row in found.rows)
    assert all(any(text.startswith(reason) for text in row.reasons) for row in found.rows)
    assert exit_code(found) == 2


@pytest.mark.parametrize(
    "changes", [{}, device(replayed=True), device(emulated=True), {"model": None}, mode(None, None)]
)
def test_compares_what_was_measured_under_the_same(changes: dict[str, Any]) -> None:
    found = compare(A.model_copy(update=changes), SLOW.model_copy(update=changes))
    assert rows(found)["rate"].verdict == "worse"


@pytest.mark.parametrize("change", [{"test": "tg64"}, {"settings": {"batch": 2}}, {"item": "word"}])
def test_refuses_a_case_that_does_something_else(change: dict[str, Any]) -> None:
    other = B.model_copy(update={"cases": (B.cases[0].model_copy(update=change),)})
    found = compare(A, other)
    assert {row.verdict for row in found.rows} == {"incomparable"}
    assert next(iter(change)).removesuffix("s") in found.rows[0].reasons[0]


def test_another_scope_forbids_the_energy_alone() -> None:
    found = compare(A, B.model_copy(update={"total_scope": "board"}))
    assert [row.metric for row in found.rows if row.verdict == "incomparable"] == ["energy per item"]
    assert exit_code(found) == 2


def test_clocks_throttling_and_missing_cases_warn_only() -> None:
    after = B.after.model_copy(update={"throttled": ("hot",)})
    changed = {"before": B.before.model_copy(update={"clocks_locked": True, "load_1min": 4.0}), "after": after}
    changed |= {"failed": {"synth": "no memory"}}
    synth = next(case for case in EXAMPLE.cases if case.name == "synth")
    found = compare(A.model_copy(update={"cases": (*A.cases, synth)}), B.model_copy(update=changed))
    assert not any(row.verdict == "incomparable" for row in found.rows)
    for text in (
        "clocks: locked: False and True",
        "case synth is in a alone; it failed in the other",
        "b was throttled: hot",
        "b was measured on a busy machine: load 4.0 on 6 cores at the start",
    ):
        assert text in found.warnings


def test_cases_of_one_name_are_matched_by_their_test() -> None:
    short = A.cases[0].model_copy(update={"test": "tg32"})
    two = A.model_copy(update={"cases": (short, A.cases[0])})
    assert {row.verdict for row in compare(two, two.model_copy(update={"cases": two.cases[::-1]})).rows} == {
        "inconclusive"
    }


def test_one_run_has_a_ratio_and_no_verdict() -> None:
    rng = np.random.default_rng(5)
    found = rows(compare(report(rng, runs=1), report(rng, runs=1, slower=3)))["inter_token"]
    assert found.ratio == pytest.approx(3, rel=0.2)
    assert (found.lo, found.p, found.verdict) == (None, None, "inconclusive")


def test_figures_of_zero_have_no_ratio() -> None:
    runs = tuple(run.model_copy(update={"samples": {"rate": [0.0] * 20}}) for run in A.cases[0].runs)
    zero = {"runs": runs, "metrics": {"rate": A.cases[0].metrics["rate"].model_copy(update={"median": 0.0})}}
    none = A.cases[0].model_copy(update=zero)
    found = rows(compare(A.model_copy(update={"cases": (none,)}), B))["rate"]
    assert (found.ratio, found.verdict, found.reasons) == (None, "inconclusive", ("a figure is not above 0",))


def test_secondary_figures_share_their_level() -> None:
    found = rows(compare(A, SLOW))
    runs = [side.cases[0].runs for side in (A, SLOW)]
    rate, time = (
        statistics.ratio(*([run.samples[metric] for run in side] for side in runs)).p
        for metric in ("rate", "inter_token")
    )
    energy = statistics.ratio_of_intervals((1, 0.97, 1.03), (1.5, 1.455, 1.545), 5, 5).p
    assert found["rate"].p == pytest.approx(rate)  # the primary metric stands alone
    small, large = sorted((time, energy))
    # Holm over three: the peak memory, which is the same in both, is the third.
    assert sorted((found["inter_token"].p, found["energy per item"].p)) == pytest.approx(
        [3 * small, max(3 * small, 2 * large)]
    )


LIMITS: list[tuple[float, float, int]] = [
    (1.5, 0.05, 1),
    (1.5, 0.48, 0),
    (1.0, 0.05, 0),
    (1.07, 0.05, 0),
    (1.5, 0.0, 1),
]


@pytest.mark.parametrize(("slower", "limit", "code"), LIMITS)
def test_exit_code_is_1_only_for_a_sure_regression_beyond_the_limit(slower: float, limit: float, code: int) -> None:
    found = compare(A, report(np.random.default_rng(6), slower=slower), max_regress=limit)
    assert exit_code(found) == code
    assert exit_code(compare(A, SLOW)) == 0  # without a limit nothing is beyond it


def test_the_limit_looks_at_the_near_end_of_the_interval_of_times_and_rates_alike() -> None:
    found = rows(compare(A, SLOW))
    near = {"inter_token": found["inter_token"].lo - 1, "rate": 1 / found["rate"].hi - 1}
    for metric, edge in near.items():
        for limit, beyond in ((edge - 1e-6, True), (edge + 1e-6, False)):
            assert rows(compare(A, SLOW, max_regress=limit))[metric].beyond is beyond


def test_a_sure_regression_outranks_an_incomparable_figure_and_nothing_to_compare_is_2() -> None:
    assert exit_code(compare(A, SLOW.model_copy(update={"total_scope": "board"}), max_regress=0.05)) == 1
    assert exit_code(compare(A, B.model_copy(update={"cases": ()}), max_regress=0.05)) == 2
    better: Callable[[Row], bool] = lambda row: row.verdict == "better"  # noqa: E731
    improved = compare(SLOW, A, max_regress=0.0)
    assert any(map(better, improved.rows))
    assert exit_code(improved) == 0


@pytest.mark.parametrize("limit", [-0.01, math.nan, math.inf])
def test_refuses_a_limit_that_is_none(limit: float) -> None:
    with pytest.raises(InputError):
        compare(A, B, max_regress=limit)


def test_whole_reports_compare_with_themselves_and_survive_json() -> None:
    found = compare(EXAMPLE, EXAMPLE, max_regress=0.05)
    assert exit_code(found) == 0
    assert all(row.ratio == pytest.approx(1) and row.verdict == "inconclusive" for row in found.rows)
    assert {row.case for row in found.rows} == {case.name for case in EXAMPLE.cases}
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["kind"] == "comparison"
    without = example(power=False)
    assert not any(row.metric == "energy per item" for row in compare(EXAMPLE, without).rows)


def test_a_time_and_its_rate_are_one_figure() -> None:
    for case in compare(EXAMPLE, EXAMPLE).rows:
        assert case.metric != ("rate" if case.case == "select" else "time") or case.primary
    each = {(row.case, row.metric) for row in compare(EXAMPLE, EXAMPLE).rows}
    assert not {(case.name, "time") for case in EXAMPLE.cases if case.primary == "rate"} & each
    assert {(case.name, case.primary) for case in EXAMPLE.cases} <= each


def test_more_memory_in_every_run_is_worse() -> None:
    runs = tuple(run.model_copy(update={"peak_rss_bytes": 2 * run.peak_rss_bytes}) for run in A.cases[0].runs)
    found = rows(compare(A, A.model_copy(update={"cases": (A.cases[0].model_copy(update={"runs": runs}),)})))
    assert found["peak memory"].verdict == "worse"
    assert found["rate"].verdict == "inconclusive"


def test_table_has_a_row_for_each_figure() -> None:
    columns, cells = comparing.table(compare(A, SLOW, max_regress=0.05))
    assert all(len(row) == len(columns) for row in cells)
    assert [row[columns.index("metric")] for row in cells] == ["inter_token", "rate", "energy per item", "peak memory"]
    assert cells[1][columns.index("verdict")] == "worse, beyond 0.05"
    assert cells[3][columns.index("95 % interval")] == "1.000 to 1.000"
