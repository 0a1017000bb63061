"""Each planted fault is found, and by whom the table says."""

from __future__ import annotations

import build
import faults
import host
import pytest

INTERPRETER, THREADS, ADDRESSES = faults.EXECUTORS


def a_compiler() -> bool:
    for compiler in (build.nvcc, build.nvrtc):
        try:
            compiler()
        except build.BuildError:
            continue
        return True
    return False


@pytest.mark.skipif(not a_compiler(), reason="neither nvcc 13.0 nor NVRTC 12.6 is here")
@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.about)
def test_the_interpreter_finds_what_the_table_says(fault):
    assert faults.found(fault, [INTERPRETER])[INTERPRETER] == faults.table()[fault.about][INTERPRETER]


@pytest.mark.skipif(host.compiler() is None, reason="g++ with C++20 is not here")
@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.about)
def test_the_sanitizers_find_what_the_table_says(fault):
    expected = faults.table()[fault.about]
    executor = THREADS if expected[THREADS] == "race" else ADDRESSES
    assert faults.found(fault, [executor])[executor] == expected[executor]


def test_every_fault_is_found_by_at_least_one():
    table = faults.table()
    assert set(table) == {fault.about for fault in faults.FAULTS}
    assert all(set(words.values()) - {"-", "by chance"} for words in table.values())
    for kind in ("dropped barrier", "off by one", "swapped arguments", "wrong stride", "unguarded tail"):
        assert any(about.startswith(kind) for about in table)
