"""Blocks of weights and the measures of parity, without torch."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdss.bundles.manifest import Precision
from edge_sdss.errors import ParityError
from edge_sdss.exporting import parity
from edge_sdss.exporting.quantize import Scheme, ZeroPoints, from_blocks, to_blocks

WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(-4, 4, width=16, allow_subnormal=False),
)
SCHEMES = st.builds(
    Scheme,
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32]),
    zero_points=st.sampled_from(get_args(ZeroPoints)),
)


@given(weight=WEIGHTS, scheme=SCHEMES)
def test_rounding_costs_half_a_step(weight: np.ndarray, scheme: Scheme) -> None:
    """A step is the span over the codes. Symmetric, one end is out of reach and may cost a whole step."""
    outputs, inputs = weight.shape
    size = scheme.block_size
    blocks = to_blocks(weight, scheme)
    back = from_blocks(blocks, scheme, inputs)
    assert back.shape == weight.shape
    assert blocks.data.shape == (outputs, -(-inputs // size), size * scheme.bits // 8)
    symmetric = scheme.zero_points == "none"
    for row, other in zip(weight.astype(float), back, strict=True):
        for start in range(0, inputs, size):
            block = row[start : start + size]
            low, high = min(block.min(), 0), max(block.max(), 0)
            step = 2 * max(high, -low) / (1 << scheme.bits) if symmetric else (high - low) / ((1 << scheme.bits) - 1)
            error = np.sqrt(((block - other[start : start + size]) ** 2).mean())
            assert error <= step * (1.0 if symmetric else 0.5) + 1e-5


@given(weight=WEIGHTS, scheme=SCHEMES, factor=st.sampled_from([0.25, 2.0, 64.0]))
def test_codes_do_not_depend_on_the_unit(weight: np.ndarray, scheme: Scheme, factor: float) -> None:
    one, two = to_blocks(weight, scheme), to_blocks(weight * np.float32(factor), scheme)
    np.testing.assert_array_equal(one.data, two.data)


@given(
    codes=hnp.arrays(np.uint8, (3, 64), elements=st.integers(0, 15)),
    scale=hnp.arrays(np.float32, (3, 2), elements=st.floats(0.125, 2, width=16)),
    low=hnp.arrays(np.float32, (3, 2), elements=st.floats(-4, 4, width=16)),
)
def test_float_zero_points_carry_four_bit_weights_over_as_they_are(
    codes: np.ndarray, scale: np.ndarray, low: np.ndarray
) -> None:
    """w = d q + m as in a GGUF of type Q4_1, where the lowest code and the highest occur in each block."""
    codes = codes.reshape(3, 2, 32).copy()
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * scale[..., None] + low[..., None]).astype(np.float32).reshape(3, 64)
    scheme = Scheme(4, 32, "float")
    blocks = to_blocks(weight, scheme)
    np.testing.assert_array_equal(blocks.data, codes[..., 0::2] | (codes[..., 1::2] << 4))
    np.testing.assert_allclose(from_blocks(blocks, scheme, 64), weight, atol=1e-5)


def test_four_bits_are_packed_low_half_first_and_an_odd_zero_point_is_padded() -> None:
    weight = np.zeros((1, 48), np.float32)
    weight[0, :3] = [-8, 7, 1]
    blocks = to_blocks(weight, Scheme(4, 16, "integer"))
    assert blocks.scales[0, 0] == pytest.approx(1)
    assert blocks.data[0, 0, :2].tolist() == [0 | 15 << 4, 9 | 8 << 4]
    assert blocks.zero_points is not None
    assert blocks.zero_points.shape == (1, 2)
    assert blocks.zero_points[0, 0] & 15 == 8


def test_more_rows_than_are_quantised_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    for zero_points in get_args(ZeroPoints):
        scheme = Scheme(4, 32, zero_points)
        whole = from_blocks(to_blocks(weight, scheme), scheme, 64)
        monkeypatch.setattr("edge_sdss.exporting.quantize._ROWS", 3)
        np.testing.assert_array_equal(from_blocks(to_blocks(weight, scheme), scheme, 64), whole)
        monkeypatch.undo()


# --- the measures of parity ---

IDS = np.array([0, 2, 1, 2])


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)


def measured(one: np.ndarray, two: np.ndarray, limits: parity.Limits = parity.Limits()) -> dict[str, float]:  # noqa: B008
    checks = parity.compare("int4", "float32", lambda _: one, lambda _: two, [IDS], limits)
    return {check.metric: check.value for check in checks}


def test_measures_by_their_formulas() -> None:
    one, two = table(1), table(2)
    p, r = (np.exp(rows.astype(float)) for rows in (one, two))
    p, r = p / p.sum(1, keepdims=True), r / r.sum(1, keepdims=True)
    found = measured(one, two)
    assert found["max |Δlogit|"] == pytest.approx(np.abs(one - two).max())
    assert found["mean KL"] == pytest.approx((p * np.log(p / r)).sum(1).mean())
    assert found["argmax agreement"] == (p.argmax(1) == r.argmax(1)).mean()
    before, after = (-np.log(rows[[0, 1, 2], IDS[1:]]).mean() for rows in (p, r))
    assert found["NLL of float32"] == pytest.approx(before)
    assert found["NLL"] == pytest.approx(after)
    assert found["NLL change"] == pytest.approx(after / before - 1)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (parity.Limits(difference=0.1), "max |Δlogit| "),
        (parity.Limits(agreement=1.0), "argmax agreement "),
        (parity.Limits(kl=0.01), "mean KL "),
        (parity.Limits(nll=1e-3), "NLL change "),
    ],
)
def test_each_limit_names_its_metric(limits: parity.Limits, text: str) -> None:
    measured(table(1), table(1), limits)
    with pytest.raises(ParityError) as caught:
        measured(table(1), table(2), limits)
    assert f"check int4 against float32: {text}" in str(caught.value)
    assert "limit " in str(caught.value)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(broken: float) -> None:
    rows = table(1)
    rows[2, 1] = broken
    with pytest.raises(ParityError), np.errstate(invalid="ignore"):
        measured(table(1), rows, parity.Limits(difference=1e3, kl=1e3))


def test_logits_of_the_last_token_only_are_refused() -> None:
    with pytest.raises(ParityError, match="without last_logits_only"):
        measured(table(1), table(2)[-1:])


def test_limits_are_known_for_every_precision() -> None:
    assert parity.LIMITS.keys() == set(get_args(Precision))
