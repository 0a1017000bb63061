"""The optimizers of an adapter: against torch's Adam, and their memory."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from edge_sdss.tuning.adam import adam, levels
from edge_sdss.tuning.limit import ADAM_8BIT_BYTES

KINDS: Any = ("adamw", "adamw-8bit")


def parameters(dtype: Any = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 96), "b": (300,), "c": (7, 3)}
    return {name: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def run(kind: Any, steps: int, held: dict[str, Any], optimizer: Any = None, first: int = 0, decades: float = 3) -> Any:
    """Goes down a bowl whose sides differ in steepness by so many decades."""
    optimizer = optimizer or adam(held, kind)
    for step in range(first, first + steps):
        for name, weight in held.items():
            steep = torch.logspace(-decades / 2, decades / 2, weight.numel()).view(weight.shape)
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step * 7 + len(name)))
            weight.grad = ((weight.detach() + 0.1 * noise) * steep).to(weight.dtype)
        optimizer.update(0.02)
    return optimizer


def test_in_full_it_is_torchs_own() -> None:
    ours, theirs = parameters(), parameters()
    run("adamw", 20, ours)
    plain = torch.optim.AdamW(theirs.values(), lr=0.02, weight_decay=0.0)

    class Plain:
        def update(self, rate: float) -> None:
            plain.step()

    run("adamw", 20, theirs, Plain())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("decades", "off"), [(0, 0.06), (3, 0.1), (6, 0.3)])
def test_in_8_bits_it_is_near_and_gets_as_far(decades: float, off: float) -> None:
    """Over six decades the paper's own second moment is zero for most weights of a block."""
    start, full, short = parameters(), parameters(), parameters()
    run("adamw", 60, full, decades=decades)
    run("adamw-8bit", 60, short, decades=decades)
    for name in full:
        way = (full[name] - start[name]).norm()
        assert (short[name] - full[name]).norm() < off * way
        assert not torch.equal(short[name], full[name])


def test_the_first_step_is_exact_but_for_rounding_to_codes() -> None:
    """After one step every weight has moved by the rate, against its gradient."""
    held = parameters()
    before = {name: weight.detach().clone() for name, weight in held.items()}
    run("adamw-8bit", 1, held)
    for name, weight in held.items():
        torch.testing.assert_close((weight - before[name]).abs(), torch.full_like(weight, 0.02), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_it_goes_on_bit_for_bit(kind: Any, dtype: Any) -> None:
    whole, parted = parameters(dtype), parameters(dtype)
    run(kind, 9, whole)
    state = {name: tensor.clone() for name, tensor in run(kind, 5, parted).tensors().items()}
    again = adam(parted, kind)
    again.restore(state, 5)
    run(kind, 4, parted, again, first=5)
    for name in whole:
        assert torch.equal(whole[name], parted[name])


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_what_the_plan_says(kind: Any) -> None:
    held = {"a": torch.nn.Parameter(torch.zeros(64, 1024))}
    bytes_ = sum(tensor.nbytes for tensor in adam(held, kind).tensors().values())
    assert bytes_ == 65536 * (8 if kind == "adamw" else ADAM_8BIT_BYTES)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_spaced_like_floating_numbers(signed: bool) -> None:
    """Over seven decades, and finer towards one."""
    table = levels(signed)
    assert len(set(table.tolist())) == 256
    assert (table[-1], 0.0 in table) == (1.0, True)
    above = table[table > 0]
    gaps = (above[1:] - above[:-1]) / above[1:]
    assert gaps[above[1:] > 1e-5].max() < 0.64
    assert gaps[above[1:] > 1e-2].max() < 0.2
    assert gaps[above[1:] > 0.5].max() < 0.03
    if signed:
        assert torch.equal(table[table < 0].abs().sort().values, above[:-1])


def test_bitsandbytes_has_the_same_codes() -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        torch.testing.assert_close(levels(signed), theirs.create_dynamic_map(signed=signed), rtol=1e-6, atol=1e-7)
