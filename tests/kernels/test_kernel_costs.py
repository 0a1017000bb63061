"""The static gate: no spills, 16-byte loads, instructions and bytes within their limits, and a report that says so."""

from __future__ import annotations

import math

import pytest
import report


@pytest.fixture(scope="module")
def costs():
    return report.costs()


@pytest.fixture(scope="module", params=report.BUILDS, ids=" ".join)
def compiled(request):
    try:
        return report.compiled(*request.param)
    except report.ToolMissing as error:
        pytest.skip(str(error))


def test_instructions_per_element(costs):
    limited = [entry for entry in costs if report.limit(entry)]
    assert len(limited) == 6  # every float32 kernel of entropy, energy and dissimilarity
    for entry in limited:
        for (jetpack, d), cost in costs[entry].items():
            assert cost.instructions <= cost.issues <= report.limit(entry), f"{entry}, {jetpack}, d = {d}"


def test_bytes_read_are_the_compulsory_ones(costs):
    for entry, measured in costs.items():
        for (jetpack, d), cost in measured.items():
            assert cost.read == pytest.approx(1, abs=0.01), f"{entry}, {jetpack}, d = {d}"
            assert math.isnan(cost.reused) or cost.reused == pytest.approx(1, abs=0.01)


def test_no_register_is_spilled(compiled):
    assert set(compiled) == set(report.cases.ENTRIES)
    assert {(facts.stack, facts.local) for facts in compiled.values()} == {(0, 0)}


def test_aligned_rows_are_loaded_16_bytes_at_a_time(compiled):
    narrow = {entry for entry, facts in compiled.items() if not facts.wide}
    few_bytes = {"ragged_entropy_f32", "normalise_f32", "ragged_last_f32", "ragged_last_f16", "ragged_last_bf16"}
    assert narrow == few_bytes  # one value a token, or one row a dialogue


def test_the_report_is_what_the_images_give(costs, compiled):
    """Without cuobjdump this is skipped, as `compiled` is."""
    assert report.text() == report.REPORT.read_text()
