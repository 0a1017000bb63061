"""The committed PTX of every kernel and type, interpreted over the grid of shapes, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_cases import ENTRIES, TOLERANCE, Buffer, Case
from ptx import Counts, Memory, entries, run

IMAGES = Path(__file__).resolve().parents[2] / "kernels" / "images"
JETPACKS = ("jetpack6", "jetpack7")
# What the hardware's own approximations may be off by, in units of the last place (CUDA's manual: 2 for exp2), and what
# the entropies may then be off by.
APPROXIMATE = 2
TOLERANCE_ON_HARDWARE = 2e-6


def ptx(jetpack: str, source: str) -> str:
    return (IMAGES / jetpack / f"{source}.ptx").read_text(encoding="ascii")


def launch(text: str, case: Case, ulps: float = 0) -> tuple[Counts, list[int]]:
    memory = Memory()
    args = [memory.bind(arg.array, arg.shift) if isinstance(arg, Buffer) else arg for arg in case.args]
    return run(text, case.entry, case.grid, (case.block,), args, memory, ulps=ulps), args


@pytest.mark.parametrize("jetpack", JETPACKS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_kernel_is_its_definition(jetpack, entry):
    source, cases = ENTRIES[entry]
    text = ptx(jetpack, source)
    for case in cases():
        counts, args = launch(text, case)
        assert case.error() <= TOLERANCE, f"{case.about}: error {case.error():.2g}"
        for place in case.streamed:
            traffic, size = counts.reads[args[place]], case.args[place].array.nbytes
            assert traffic.bytes == traffic.distinct == size, f"{case.about}: reads {traffic.bytes} of {size} bytes"
        for place, arg in enumerate(case.args):
            written = counts.writes[args[place]].distinct if isinstance(arg, Buffer) else 0
            assert written == (arg.array.nbytes if isinstance(arg, Buffer) and arg.output else 0), case.about


@pytest.mark.parametrize("jetpack", JETPACKS)
def test_the_grid_reaches_every_entry(jetpack):
    found = {entry for source in {source for source, _ in ENTRIES.values()} for entry in entries(ptx(jetpack, source))}
    assert found == set(ENTRIES)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if "entropy" in entry])
def test_the_error_holds_where_the_hardware_approximates(entry):
    source, cases = ENTRIES[entry]
    text = ptx("jetpack7", source)
    assert "lg2.approx" in text
    for case in cases():
        launch(text, case, APPROXIMATE)
        assert case.error() <= TOLERANCE_ON_HARDWARE, f"{case.about}: error {case.error():.2g}"
