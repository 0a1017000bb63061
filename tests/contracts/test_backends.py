"""What every backend promises, against formulas written another way."""

from __future__ import annotations

import importlib.util
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdss import backends

VARIANTS = ("token", "centered", "spectral", "histogram")


@pytest.fixture(params=backends.NAMES)
def backend(request):
    if request.param == "torch" and not importlib.util.find_spec("torch"):
        pytest.skip("no torch here")
    try:
        return backends.load(request.param)
    except backends.BackendUnavailable as error:
        if request.param != "cuda":
            raise
        pytest.skip(f"{error} tests/kernels runs this over the real PyCUDA and an interpreted device")


def offsets(*lengths):
    return np.cumsum([0, *lengths], dtype=np.int64)


def tokens(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def shannon(p):
    return -math.fsum(x * math.log(x) for x in p if x > 0)


def by_hand(rows, variant):
    """The definitions of method.md, term by term in float64."""
    rows = rows.astype(np.float64)
    n, d = rows.shape
    if n == 1:
        return 0.0
    if variant == "spectral":
        singular = np.linalg.svd(rows, compute_uv=False)
        p = singular**2 / (singular**2).sum()
        return shannon(p) / math.log(min(n, d))
    if variant == "histogram":
        counts, _ = np.histogram(rows.mean(axis=0), bins=100)
        return shannon(counts / counts.sum()) / math.log(100)
    if variant == "centered":
        rows = rows - rows.mean(axis=0)
    squares = [math.fsum(x * x for x in row) for row in rows]
    return shannon([s / math.fsum(squares) for s in squares]) / math.log(n)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "d"), [(2, 2), (3, 7), (5, 3), (17, 64), (64, 576), (700, 33)])
def test_entropy_is_the_definition(backend, variant, n, d):
    rows = tokens(n, d, seed=n) * np.linspace(0.1, 3, n)[:, None].astype(np.float32)
    # A value at a bin's edge may fall to either side of it in another rounding of the mean.
    tolerance = 0.02 if variant == "histogram" else 2e-6
    assert backend.entropy(rows, offsets(n), variant)[0] == pytest.approx(by_hand(rows, variant), abs=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ragged_batch_is_its_rows_one_by_one(backend, variant):
    lengths = [3, 0, 1, 40, 2, 0]
    rows = tokens(sum(lengths), 19)
    bounds = offsets(*lengths)
    batch = backend.entropy(rows, bounds, variant)
    alone = [backend.entropy(rows[a:b], offsets(b - a), variant)[0] for a, b in itertools.pairwise(bounds)]
    np.testing.assert_allclose(batch, alone, atol=1e-12)
    assert batch[1] == batch[2] == batch[5] == 0


@pytest.mark.parametrize("variant", ["token", "centered", "spectral"])
@given(seed=st.integers(0, 1000), n=st.integers(1, 40), d=st.integers(1, 24), scale=st.floats(0.01, 100))
def test_entropy_stays_in_range_and_ignores_scale_and_order(variant, seed, n, d, scale):
    numpy_backend = backends.load("numpy")
    rows = tokens(n, d, seed)
    value = numpy_backend.entropy(rows, offsets(n), variant)[0]
    shuffled = rows[np.random.default_rng(seed).permutation(n)] * np.float32(scale)
    assert 0 <= value <= 1
    assert numpy_backend.entropy(shuffled, offsets(n), variant)[0] == pytest.approx(value, abs=2e-4)


def test_entropy_of_the_extremes(backend):
    one_loud = np.zeros((8, 4), dtype=np.float32)
    one_loud[3] = 5
    assert backend.entropy(one_loud, offsets(8), "token")[0] == pytest.approx(0, abs=1e-6)  # exact by luck alone
    assert backend.entropy(np.ones((8, 4), np.float32), offsets(8), "token")[0] == pytest.approx(1)
    assert backend.entropy(np.eye(8, dtype=np.float32), offsets(8), "spectral")[0] == pytest.approx(1)
    assert backend.entropy(np.ones((8, 4), np.float32), offsets(8), "spectral")[0] == pytest.approx(0, abs=1e-6)
    assert backend.entropy(np.zeros((8, 4), np.float32), offsets(8), "token")[0] == 0
    assert np.isnan(backend.entropy(np.full((8, 4), np.nan, np.float32), offsets(8), "token")[0])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_vectors_are_unit(backend, pooling):
    rows = tokens(12, 31) * 1e-3
    pooled = backend.pool(rows, offsets(5, 0, 7), pooling)
    assert pooled.dtype == np.float32
    wanted = rows[4] if pooling == "last" else rows[:5].mean(axis=0)
    np.testing.assert_allclose(pooled[0], wanted / np.linalg.norm(wanted), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), [1, 0, 1], atol=1e-6)


def test_dissimilarity_is_one_minus_cosine_in_range(backend):
    v = np.array([[1, 0], [0.6, 0.8], [-1, 0], [1, 0]], dtype=np.float32)
    m = np.array([[1, 0], [1, 0], [1, 0], [0, 0]])
    np.testing.assert_allclose(backend.dissimilarity(v, m), [0, 0.4, 1, 1], atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree(variant):
    pytest.importorskip("torch")
    numpy_backend, torch_backend = map(backends.load, ("numpy", "torch"))
    rows, bounds = tokens(300, 576, 3), offsets(1, 99, 200)
    tolerance = 0.02 if variant == "histogram" else 1e-6
    ours, theirs = (b.entropy(rows, bounds, variant) for b in (numpy_backend, torch_backend))
    np.testing.assert_allclose(ours, theirs, atol=tolerance)
    for pooling in ("mean", "last"):
        pooled = [b.pool(rows, bounds, pooling) for b in (numpy_backend, torch_backend)]
        np.testing.assert_allclose(*pooled, atol=1e-6)


def test_an_unknown_backend_raises():
    with pytest.raises(backends.BackendUnavailable, match="tpu"):
        backends.load("tpu")


def test_auto_stays_where_the_embeddings_are():
    assert backends.load("auto", "cpu").__name__.endswith("numpy")
