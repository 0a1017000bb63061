"""Out of memory and what is not; each text is written after the report that `outofmemory` names."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from trees import MIB, plant, process, v1, v2

from edge_sdss.tree import Tree
from edge_sdss.tuning import outofmemory
from edge_sdss.tuning.outofmemory import (
    Probe,
    allocator_environment,
    expandable_segments,
    free,
    is_out_of_memory,
    killed_by_kernel,
    oom_kills,
    says_so,
)  # fmt: skip
from edge_sdss.tuning.watchdog import OverBudget, rlimit

ASSERT = 'INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830, please report a bug to PyTorch. '
FACES = [
    f"NVML_SUCCESS == r {ASSERT}",
    f"NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() {ASSERT}",
    "NvMapMemAllocInternalTagged: 1075072515 error 12",
    "CUDA driver error: out of memory",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA out of memory. Tried to allocate 74.00 MiB (GPU 0; 1.96 GiB total capacity)",
    "cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCTensorRandom.cu:25",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "67108864 bytes. Error code 12 (Cannot allocate memory)",
    "[enforce fail at ..\\c10\\core\\impl\\alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you tried",
    "unable to mmap 29764 bytes from file </torch_10182_3020184674_63991>: Cannot allocate memory (12)",
    "unable to allocate CUDA0 buffer",
]
ORDINARY = [
    "CUDA driver error: operation not supported",
    "CUDA driver error: invalid argument",
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    '!block->expandable_segment_ INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":2814',
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
    "NvMapMemHandleAlloc: error 0",
    "Trying to backward through the graph a second time",
    "one of the variables needed for gradient computation has been modified by an inplace operation",
    "unable to allocate a port",
]


@pytest.mark.parametrize("text", FACES)
def test_faces(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert says_so(f"before\n{text}\nafter")
    assert not is_out_of_memory(ValueError(text))


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_errors(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_kinds() -> None:
    yes = [MemoryError(), OverBudget("x"), OSError(errno.ENOMEM, "Cannot allocate memory")]
    no = [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), KeyError("memory"), RuntimeError()]
    assert [is_out_of_memory(error) for error in (*yes, *no)] == [True] * 3 + [False] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="plants a limit")
def test_torch_under_a_planted_limit() -> None:
    torch = pytest.importorskip("torch")
    assert is_out_of_memory(torch.OutOfMemoryError("anything"))
    weight = torch.ones(16384, 64)
    with rlimit(64 * MIB), pytest.raises(RuntimeError) as caught:
        torch.nn.functional.linear(torch.ones(65536, 64), weight)  # 4 GiB: more than any heap has left over
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)


def test_free_lets_go_of_what_a_traceback_holds() -> None:
    class Big:
        pass

    seen = []

    def hold() -> None:
        big = Big()
        seen.append(weakref.ref(big))
        raise KeyError

    def step() -> None:
        big = Big()
        seen.append(weakref.ref(big))
        try:
            hold()
        except KeyError:
            raise MemoryError  # noqa: B904 - the context is what is tested

    try:
        step()
    except MemoryError as caught:
        error = caught
    assert None not in [reference() for reference in seen]
    free(error)
    assert [reference() for reference in seen] == [None, None]


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (v2("/a"), {"sys/fs/cgroup/a/memory.events": "low 0\nhigh 9\nmax 7\noom 4\noom_kill 3\noom_group_kill 0"}, 3),
        (v2("/a/b"), {"sys/fs/cgroup/a/memory.events": "oom 4\noom_kill 2"}, 2),
        (v1("/a"), {"sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5"}, 5),
        (v2("/"), {"proc/vmstat": "nr_free_pages 1\noom_kill 6\nnuma_hit 2"}, 6),
        ({}, {}, None),
    ],
)
def test_kills_are_counted(tmp_path: Path, groups, files, expected) -> None:
    assert oom_kills(plant(tmp_path, {**process(), **groups, **files})) == expected


def test_whose_kill_it_was() -> None:
    kill, crash = -signal.SIGKILL, -signal.SIGSEGV
    cases = [(kill, 1, 2, True), (kill, 2, 2, False), (kill, None, 2, False), (crash, 1, 2, False), (0, 1, 2, False)]
    assert [killed_by_kernel(*case[:3]) for case in cases] == [case[3] for case in cases]


class Trial:
    """Stands for subprocess.run."""

    def __init__(self, code: int = 0, out: str = "expandable True\n", err: str = "") -> None:
        self.calls: list[dict] = []
        self.answer = (code, out, err)

    def __call__(self, command, **options):
        self.calls.append(options["env"])
        if self.answer[0] is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, *self.answer)


def with_cuda(root: Path, release: str = "# R36 (release), REVISION: 4.3") -> Tree:
    return plant(root, {"dev/nvmap": "", "etc/nv_tegra_release": release})


def test_without_cuda_nothing_is_tried(tmp_path: Path) -> None:
    trial = Trial()
    assert expandable_segments(tmp_path / "state", Tree(tmp_path), trial) == (False, "there is no CUDA device")
    assert trial.calls == []
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        (Trial(), Probe(True, "")),
        (Trial(1, "", "Traceback\nRuntimeError: CUDA driver error: out of memory\n"),
         Probe(False, "RuntimeError: CUDA driver error: out of memory")),
        (Trial(-6, "", ""), Probe(False, "the trial ended with -6")),
        (Trial(0, "expandable False\n"), Probe(False, "torch ignores the setting here")),
        (Trial(None), Probe(False, "the trial failed: TimeoutExpired")),
    ],
)  # fmt: skip
def test_the_trial_is_made_once(tmp_path: Path, monkeypatch, trial, expected) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:32")
    tree = with_cuda(tmp_path)
    assert [expandable_segments(tmp_path / "state", tree, trial) for _ in range(2)] == [expected] * 2
    assert len(trial.calls) == 1
    assert trial.calls[0]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in trial.calls[0]


def test_a_new_driver_or_a_broken_answer_is_a_new_trial(tmp_path: Path) -> None:
    first, second, third = Trial(), Trial(1, "", "boom"), Trial()
    state = tmp_path / "state"
    assert expandable_segments(state, with_cuda(tmp_path), first).works
    assert not expandable_segments(state, with_cuda(tmp_path, "# R38"), second).works
    (state / "expandable-segments.json").write_text("{", encoding="utf-8")
    assert expandable_segments(state, with_cuda(tmp_path), third).works
    assert [len(trial.calls) for trial in (first, second, third)] == [1, 1, 1]


def test_the_trial_itself_runs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    probe = expandable_segments(tmp_path / "state", with_cuda(tmp_path))
    assert probe.works or probe.why
    assert torch.cuda.is_available() or not probe.works


def test_the_users_own_choice_stands() -> None:
    wanted = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_environment(Probe(True, ""), {"PATH": "/bin"}) == wanted
    assert allocator_environment(Probe(False, "no"), {}) == {}
    assert allocator_environment(Probe(True, ""), {"PYTORCH_ALLOC_CONF": ""}) == {}


def test_every_source_that_is_named_has_a_text_here() -> None:
    for word in ("NVML_SUCCESS", "NvMapMem", "CUDA driver error", "ALLOC_FAILED", "DefaultCPUAllocator", "mmap"):
        assert word in (outofmemory.__doc__ or "")
        assert any(word in text for text in FACES)
