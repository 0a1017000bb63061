"""The CUDA backend's host code over the fake driver. `test_cuda_backend.py` runs this in a process of its own.

Real PyCUDA, real argument blocks, real addresses and streams; the launches are interpreted. No device runs here.
"""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from device import FAKE as DRIVER

from edge_sdss.backends import cuda
from edge_sdss.backends import numpy as reference
from edge_sdss.backends._cuda import gpu, images, launches, rows
from edge_sdss.backends._cuda.images import Target
from edge_sdss.doctor import selftest
from edge_sdss.errors import BackendUnavailable, BudgetExceeded, InputError

LENGTHS = (3, 0, 1, 37, 2, 64, 9)
OFFSETS = np.cumsum([0, *LENGTHS], dtype=np.int64)


def tokens(d=52, seed=0):
    scale = np.linspace(0.1, 3, OFFSETS[-1])[:, None]
    return (np.random.default_rng(seed).normal(size=(OFFSETS[-1], d)) * scale).astype(np.float32)


def errors(x, offsets=OFFSETS, given=None):
    """The largest difference from the reference, of all that the backend computes of a batch."""
    given = x if given is None else given
    found = [
        cuda.entropy(given, offsets, "token") - reference.entropy(x, offsets, "token"),
        cuda.entropy(given, offsets, "centered") - reference.entropy(x, offsets, "centered"),
        cuda.pool(given, offsets, "mean") - reference.pool(x, offsets, "mean"),
        cuda.pool(given, offsets, "last") - reference.pool(x, offsets, "last"),
    ]
    return float(np.max([np.abs(f).max(initial=0.0) for f in found]))  # NaN if any is


def since(function):
    before = DRIVER.counts()
    result = function()
    return result, {key: value - before[key] for key, value in DRIVER.counts().items()}


class OnGpu:
    """Stands for a torch tensor on the GPU: memory of the device, with what the backend asks of a tensor."""

    is_cuda = True
    device = SimpleNamespace(index=0)

    def __init__(self, array, dtype):
        from pycuda import driver

        self.shape, self.dtype = array.shape, f"torch.{dtype}"
        with gpu.open_gpu().active():
            self.memory = driver.to_device(np.ascontiguousarray(array))

    def detach(self):
        return self

    contiguous = detach

    def data_ptr(self):
        return int(self.memory)


@pytest.fixture(autouse=True)
def no_torch_streams(monkeypatch):
    monkeypatch.setattr(gpu.Gpu, "after", lambda self, tensor: None)


@pytest.mark.parametrize("d", [1, 3, 8, 33, 576])
def test_odd_widths(d):
    assert errors(tokens(d)) < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_types_of_the_host(dtype):
    x = (tokens() * 10).astype(dtype)
    assert errors(x) < 1e-6


def test_a_bfloat16_tensor_of_the_host():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(tokens()).bfloat16()
    assert errors(x.float().numpy(), given=x) < 1e-6


def test_views_of_the_host():
    wide = tokens(104)
    assert errors(wide[:, ::2]) < 1e-6
    assert errors(np.asfortranarray(tokens())) < 1e-6


def test_offsets_may_leave_rows_out():
    assert errors(tokens(), OFFSETS[1:-1]) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_lies_on_the_device_is_used_there(dtype):
    x = tokens().astype(dtype)
    tensor = OnGpu(x, dtype)
    assert errors(x, given=tensor) < 1e-6
    _, moved = since(lambda: cuda.entropy(tensor, OFFSETS, "token"))
    assert moved["to_device"] == OFFSETS.nbytes
    assert moved["to_host"] == 4 * len(LENGTHS)


def test_only_the_result_is_copied_back():
    x = tokens()
    assert since(lambda: cuda.entropy(x, OFFSETS, "centered"))[1]["to_host"] == 4 * len(LENGTHS)
    assert since(lambda: cuda.pool(x, OFFSETS, "mean"))[1]["to_host"] == 4 * len(LENGTHS) * x.shape[1]
    _, moved = since(lambda: cuda.entropy(x, OFFSETS, "centered"))
    assert moved["to_device"] == x.nbytes + OFFSETS.nbytes


def test_a_large_batch_goes_in_chunks(monkeypatch):
    x, launched = tokens(), len(DRIVER.launched)
    whole = cuda.entropy(x, OFFSETS, "centered")
    per_batch = len(DRIVER.launched) - launched
    monkeypatch.setattr(rows, "CHUNK_BYTES", 40 * 52 * 4)  # the dialogue of 64 tokens is longer
    np.testing.assert_array_equal(cuda.entropy(x, OFFSETS, "centered"), whole)
    assert len(DRIVER.launched) - launched == per_batch * 5  # once whole, then [3 0 1], [37 2], [64], [9]
    assert errors(x) < 1e-6
    assert errors(x, given=OnGpu(x, "float32")) < 1e-6


def test_dissimilarity():
    unit = reference.pool(tokens(33), OFFSETS, "mean")
    means = np.random.default_rng(1).normal(size=unit.shape) / 6
    np.testing.assert_allclose(cuda.dissimilarity(unit, means), reference.dissimilarity(unit, means), atol=1e-6)
    placed = OnGpu(unit, "float32"), OnGpu(means.astype(np.float32), "float32")
    np.testing.assert_allclose(cuda.dissimilarity(*placed), reference.dissimilarity(unit, means), atol=1e-6)
    with pytest.raises(InputError, match="means"):
        cuda.dissimilarity(unit, means[:2])


def test_softmax_entropy_of_rows():
    x = tokens(301).astype(np.float64)
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(cuda.row_entropy(x), -(p * np.log(p)).sum(axis=1), atol=4e-6)


def test_pairs():
    unit = reference.pool(tokens(33), OFFSETS, "mean")
    others = np.random.default_rng(2).normal(size=(45, 33)).astype(np.float32) / 6
    wanted = np.clip(1 - unit.astype(np.float64) @ others.T.astype(np.float64), 0, 1)
    np.testing.assert_allclose(cuda.pairwise(unit, others), wanted, atol=1e-6)
    with pytest.raises(InputError, match="one size"):
        cuda.pairwise(unit, others[:, 1:])


def test_the_selftests_benchmark_measures_each_kernel(monkeypatch):
    for name, value in {"_TOKENS": 24, "_WIDTH": 40, "_SAMPLES": 3, "_SAMPLE_S": 0.0}.items():
        monkeypatch.setattr(selftest, name, value)
    found = list(selftest._benchmark(cuda, lambda *told: None))
    assert [(t.kernel, t.dtype) for t in found] == [
        (kernel, dtype) for dtype in selftest.DTYPES for kernel in ("token_energy", "row_entropy", "dissimilarity")
    ]
    assert [t.bytes for t in found] == [24 * 40 * size + 4 * 24 for size in (4, 4, 4, 2, 2, 2, 2, 2, 2)]
    assert all(t.lo_s <= t.median_s <= t.hi_s and t.samples == 3 for t in found)


def test_a_kernel_that_is_wrong_fails_the_selftest(monkeypatch):
    from edge_sdss.tree import Tree

    assert selftest.run(Tree()).passed
    right = cuda.dissimilarity
    monkeypatch.setattr(cuda, "dissimilarity", lambda *given: right(*given) + 3e-6)
    result = selftest.run(Tree())
    assert {row.kernel for row in result.parity if not row.passed} == {"dissimilarity"}
    assert not result.passed
    assert result.benchmark == ()
    assert result.device.interpreted


def test_nothing_to_do():
    x = tokens()
    assert cuda.entropy(x, np.array([0]), "token").shape == (0,)
    assert cuda.entropy(x, np.array([5, 5, 5]), "centered").tolist() == [0, 0]
    assert cuda.pool(x, np.array([5, 5]), "mean").tolist() == [[0] * 52]
    assert cuda.pool(x[:0], np.array([0]), "last").shape == (0, 52)
    assert cuda.dissimilarity(x[:0], x[:0]).shape == (0,)


@pytest.mark.parametrize("offsets", [[0, 5, 4], [-1, 3], [0, 999], [[0, 3]], []])
def test_offsets_that_would_read_beyond_the_rows_are_refused(offsets):
    before = DRIVER.counts()
    with pytest.raises(InputError, match="score a batch of 116 rows"):
        cuda.entropy(tokens(), np.array(offsets), "token")
    assert DRIVER.counts()["launches"] == before["launches"]
    assert errors(tokens()) < 1e-6


def test_a_full_device_is_a_budget_exceeded():
    DRIVER.be(DRIVER.version, DRIVER.capability, 1000)
    try:
        with pytest.raises(BudgetExceeded, match="memory is full"):
            cuda.entropy(np.ones((500, 5000), np.float32), np.array([0, 500]), "token")
    finally:
        DRIVER.be(DRIVER.version, DRIVER.capability)
    assert errors(tokens()) < 1e-6


def test_threads_take_turns():
    x, found = tokens(), []
    threads = [threading.Thread(target=lambda: found.append(errors(x))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert max(found) < 1e-6


def test_what_has_no_kernel_is_the_references_and_said_once(caplog):
    cuda._say_once.cache_clear()
    x = tokens()
    for _ in range(2):
        wanted = reference.entropy(x, OFFSETS, "spectral")
        np.testing.assert_array_equal(cuda.entropy(x, OFFSETS, "spectral"), wanted)
    said = "entropy spectral has no CUDA kernel: the NumPy reference computes it"
    assert [record.message for record in caplog.records] == [said]


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "capability", "wanted"),
    [
        (12060, (8, 7), "images/jetpack6/energy.cubin"),
        (13000, (8, 7), "images/jetpack7/energy.fatbin"),
        (13000, (11, 0), "images/jetpack7/energy.fatbin"),
        (12080, (8, 9), "images/jetpack6/energy.ptx"),
        (13000, (12, 1), "images/jetpack"),
        (12020, (8, 7), None),
        (13000, (7, 2), None),
    ],
)
def test_the_image_fits_device_and_driver(driver, capability, wanted):
    image = images.ahead_of_time("energy.cu", Target(capability, driver))
    if wanted is None:
        assert image is None
        return
    assert image.origin.startswith(wanted)
    before = DRIVER.version, DRIVER.capability
    DRIVER.be(driver, capability)
    try:
        from pycuda import driver as pycuda

        with gpu.open_gpu().active():
            pycuda.module_from_buffer(image.data).get_function("token_energy_f32")
    finally:
        DRIVER.be(*before)


def test_an_image_of_other_sources_or_with_other_bytes_is_left_alone(monkeypatch, tmp_path):
    import shutil

    target = Target((8, 7), 12060)
    copy = tmp_path / "kernels"
    shutil.copytree(images.folder(), copy)
    monkeypatch.setattr(images, "folder", lambda: copy)
    (copy / "images/jetpack6/energy.cubin").write_bytes(b"\x7fELF something else")
    assert images.ahead_of_time("energy.cu", target).origin == "images/jetpack6/energy.ptx"
    (copy / "warp.cuh").write_text((copy / "warp.cuh").read_text() + "\n// changed\n")
    assert images.ahead_of_time("energy.cu", target) is None


def test_a_file_is_compiled_once_for_a_device_and_a_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_SDSS_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(images, "_compile", lambda file, arch: calls.append((file, arch)) or b".version 8.5\0")
    for target in (Target((8, 7), 11040), Target((8, 7), 11040), Target((8, 7), 12020), Target((7, 2), 12020)):
        assert images.compiled("energy.cu", target).data == b".version 8.5\0"
    assert calls == [("energy.cu", "compute_87"), ("energy.cu", "compute_87"), ("energy.cu", "compute_72")]
    monkeypatch.setattr(images, "source_hash", lambda file: "another" * 9)
    images.compiled("energy.cu", Target((8, 7), 11040))
    assert len(calls) == 4


def test_without_image_and_compiler_the_way_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("EDGE_SDSS_CACHE", str(tmp_path))
    monkeypatch.setattr(images.shutil, "which", lambda *a, **k: None)
    monkeypatch.setattr(images, "_loads", lambda name: False)
    monkeypatch.setattr(images.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"energy.cu for compute_72: .*install the CUDA toolkit"):
        images.image.__wrapped__("energy.cu", Target((7, 2), 12020))


def test_nvcc_makes_what_runs(monkeypatch, tmp_path):
    import shutil

    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here: what was compiled ahead of time is interpreted")
    monkeypatch.setenv("EDGE_SDSS_CACHE", str(tmp_path))
    monkeypatch.setattr(images, "_nvrtc", lambda *a: (_ for _ in ()).throw(RuntimeError("left out")))
    images._nvrtc.__name__ = "_nvrtc"
    image = images.compiled("energy.cu", Target((8, 7), 13000))
    assert b"token_energy_bf16" in image.data
    assert image == images.compiled("energy.cu", Target((8, 7), 13000))


# --- planted faults: each is a mistake that host code is prone to ---------------------------------------------------


def swapped_arguments(monkeypatch):
    launch = gpu.Gpu.launch

    def swapped(self, entry, type_, grid, *arguments):
        if entry == "token_energy":
            x, out, n, d = arguments
            arguments = out, x, n, d
        launch(self, entry, type_, grid, *arguments)

    monkeypatch.setattr(gpu.Gpu, "launch", swapped)


def wrong_stride(monkeypatch):
    launch = gpu.Gpu.launch

    def narrow(self, entry, type_, grid, *arguments):
        if entry == "token_energy":
            arguments = *arguments[:-1], arguments[-1] - 1
        launch(self, entry, type_, grid, *arguments)

    monkeypatch.setattr(gpu.Gpu, "launch", narrow)


def short_grid(monkeypatch):
    monkeypatch.setattr(launches, "warp_per_row", lambda n: (max(n // launches.WARPS, 1), 1))


def missing_columns(monkeypatch):
    monkeypatch.setattr(launches, "columns", lambda b, d, size: (b, max(d * size // 128, 1)))


def missing_tail(monkeypatch):
    ranges = rows._ranges
    monkeypatch.setattr(rows, "CHUNK_BYTES", 40 * 52 * 4)
    monkeypatch.setattr(rows, "_ranges", lambda *a: list(ranges(*a))[:-1])


def narrow_integer(monkeypatch):
    changed = {**launches.ENTRIES, "token_energy": launches.Entry("energy.cu", "PPii")}
    monkeypatch.setattr(launches, "ENTRIES", changed)
    gpu.open_gpu()._functions.clear()


def no_wait(monkeypatch):
    monkeypatch.setattr(gpu.Gpu, "wait", lambda self: None)


def slot_filled_too_early(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 10 * 52 * 4)
    never = SimpleNamespace(synchronize=lambda: None, record=lambda stream: None)
    work = rows.workspace(0)
    monkeypatch.setattr(work, "slots", tuple(slot._replace(done=never) for slot in work.slots))


def offsets_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 40 * 52 * 4)
    upload = gpu.Memory.upload

    def shifted(self, array, dtype):
        return upload(self, array + 4 if dtype is np.int64 else array, dtype)

    monkeypatch.setattr(gpu.Memory, "upload", shifted)


def half_read_as_float(monkeypatch):
    monkeypatch.setitem(rows._TYPES, "float16", "f32")
    monkeypatch.setattr(rows, "_STORED", {**rows._STORED, "f32": np.dtype(np.float16)})


FAULTS = (
    swapped_arguments, wrong_stride, short_grid, missing_columns, missing_tail, narrow_integer, no_wait,
    slot_filled_too_early, offsets_of_the_whole_batch, half_read_as_float,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    from pycuda import driver

    x = tokens().astype(np.float16) if fault is half_read_as_float else tokens()
    assert errors(x) < 1e-6
    fresh = cuda.workspace(0)
    for memories in (fresh.memories, *(slot.memories for slot in fresh.slots)):
        memories.clear()  # new memory holds NaN, so that what is not written shows
    fault(monkeypatch)
    try:
        caught = not errors(x) < 1e-6  # NaN is caught as well
    except driver.Error as error:
        caught = str(error)
    finally:
        monkeypatch.undo()
        gpu.open_gpu()._functions.clear()
        with gpu.open_gpu().active() as device, contextlib.suppress(driver.Error):
            device.wait()
        DRIVER.recover()
    print(f"{fault.__name__}: {caught}")
    assert caught
    assert errors(x) < 1e-6
