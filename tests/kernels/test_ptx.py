"""The interpreter itself: it computes what PTX says, and stops on everything else."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import Memory, OutOfBounds, PtxError, run

HEAD = ".version 9.0\n.target sm_110\n.address_size 64\n"


def module(body: str, parameters: str = ".param .u64 out, .param .u32 n", shared: str = "") -> str:
    registers = ".reg .pred %p<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<20>; .reg .b16 %rs<9>;"
    return f"{HEAD}.visible .entry k({parameters})\n.maxntid 64, 1, 1\n{{\n{registers}\n{shared}\n{body}\n}}\n"


START = """
    ld.param.u64 %rd1, [out]; ld.param.u32 %r1, [n]; cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r2, %tid.x; mul.wide.u32 %rd3, %r2, 4; add.s64 %rd4, %rd2, %rd3;
"""


def launch(body: str, n: int = 0, threads: int = 32, shared: str = "", size: int | None = None) -> np.ndarray:
    out, memory = np.zeros(threads if size is None else size, np.uint32), Memory()
    run(module(START + body, shared=shared), "k", (1,), (threads,), [memory.bind(out), n], memory)
    return out


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shl.b32 %r3, %r2, 33;", 0),
        ("mov.u32 %r4, -7; shr.s32 %r3, %r4, 40;", 2**32 - 1),
        ("mov.u32 %r4, -7; shr.u32 %r3, %r4, 1;", (2**32 - 7) >> 1),
        ("mov.u32 %r4, -7; mov.u32 %r5, 2; div.s32 %r3, %r4, %r5;", 2**32 - 3),
        ("mov.u32 %r4, -1; mul.wide.s32 %rd5, %r4, 2; cvt.u32.u64 %r3, %rd5;", 2**32 - 2),
        ("mov.u32 %r4, -1; mul.wide.u32 %rd5, %r4, 2; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r3, %rd5;", 1),
        ("mov.b32 %r4, 0f7FC00000; mov.b32 %f1, %r4; setp.lt.f32 %p1, %f1, 0f3F800000; selp.u32 %r3, 1, 2, %p1;", 2),
        ("mov.b32 %f1, 0f7FC00000; setp.ltu.f32 %p1, %f1, 0f3F800000; selp.u32 %r3, 1, 2, %p1;", 1),
        ("mov.f32 %f1, 0f7FC00000; max.f32 %f2, %f1, 0f3F800000; mov.b32 %r3, %f2;", 0x3F800000),
        ("{ .reg .b16 l, h; mov.u32 %r4, 0x12345678; mov.b32 {l, h}, %r4; mov.b32 %r3, {h, l}; }", 0x56781234),
        ("mov.u64 %rd5, 0x1FFFFFFFE; cvt.s64.s32 %rd5, %rd5; neg.s64 %rd5, %rd5; cvt.u32.u64 %r3, %rd5;", 2),
        ("mov.b32 {%rs1, %rs2}, 0x3C00; cvt.f32.f16 %f1, %rs1; mov.b32 %r3, %f1;", 0x3F800000),
    ],
)
def test_arithmetic(body, expected):
    assert (launch(body + "st.global.u32 [%rd4], %r3; ret;") == expected).all()


def test_fma_rounds_once():
    body = "mov.f32 %f1, 0f3F800001; fma.rn.f32 %f2, %f1, %f1, 0fBF800002; st.global.f32 [%rd4], %f2; ret;"
    assert (launch(body).view(np.float32) == np.float32(2.0**-46)).all()  # 0 if the product were rounded


def test_branches_part_the_threads_and_join_them():
    body = """
        mov.u32 %r3, 0;
        $L1: setp.ge.u32 %p1, %r3, %r2; @%p1 bra $L2; add.s32 %r3, %r3, 1; bra.uni $L1;
        $L2: shfl.sync.bfly.b32 %r4|%p2, %r3, 1, 31, -1; st.global.u32 [%rd4], %r4; ret;
    """
    assert (launch(body) == np.arange(32) ^ 1).all()


def test_predicated_instructions_leave_the_other_lanes_alone():
    body = "mov.u32 %r3, 5; setp.lt.u32 %p1, %r2, 3; @!%p1 mov.u32 %r3, 9; @%p1 st.global.u32 [%rd4], %r3; ret;"
    assert launch(body).tolist() == [5, 5, 5] + [0] * 29


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("cos.approx.f32 %f1, %f1; ret;", "unknown instruction cos.approx.f32"),
        ("add.sat.s32 %r3, %r2, %r2; ret;", "unknown instruction add.sat.s32"),
        ("ld.global.v8.u32 %r3, [%rd4]; ret;", "unknown instruction"),
        ("add.s32 %r3, %r9, 1; ret;", "%r9 is read before it is written"),
        ("add.s64 %rd5, %r2, 1; ret;", "%r2 is no register for s64"),
        ("bra $NOWHERE; ret;", "unknown label"),
        (".local .b8 x[4]; ret;", "unknown directive"),
        ("mov.u32 %r3, %clock; ret;", "unknown operand"),
        ("st.global.u32 [%rd4], %r2;", "runs past its end"),
        ("setp.lt.u32 %p1, %r2, 5; @%p1 bra $L; bar.sync 0; $L: ret;", "never reach"),
        ("setp.lt.u32 %p1, %r2, 5; @%p1 ret; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; ret;", "not all lanes"),
        ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, 3; ret;", "fewer lanes"),
    ],
)
def test_what_it_does_not_know_stops_it(body, complaint):
    with pytest.raises(PtxError, match=complaint):
        launch(body)


def test_bounds_and_alignment():
    with pytest.raises(OutOfBounds, match="outside of all memory"):
        launch("st.global.u32 [%rd4+4], %r2; ret;")
    with pytest.raises(OutOfBounds, match="misaligned"):
        launch("st.global.u32 [%rd4+2], %r2; ret;", size=64)
    with pytest.raises(OutOfBounds, match="misaligned"):
        launch("ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%rd4]; ret;", size=64)
    out, memory = np.zeros(32, np.uint32), Memory()
    out.flags.writeable = False
    with pytest.raises(OutOfBounds, match="read-only"):
        run(module(START + "st.global.u32 [%rd4], %r2; ret;"), "k", (1,), (32,), [memory.bind(out), 0], memory)


SHARED = ".shared .align 4 .b8 tile[256];"
EXCHANGE = """
    shl.b32 %r3, %r2, 2; mov.u32 %r4, tile; add.s32 %r5, %r4, %r3; st.shared.u32 [%r5], %r2; {barrier}
    xor.b32 %r6, %r2, 1; shl.b32 %r6, %r6, 2; add.s32 %r6, %r4, %r6; ld.shared.u32 %r7, [%r6];
    st.global.u32 [%rd4], %r7; ret;
"""


def test_shared_memory_and_its_races():
    exchanged = launch(EXCHANGE.format(barrier="bar.sync 0;"), threads=64, shared=SHARED)
    assert (exchanged == np.arange(64) ^ 1).all()
    with pytest.raises(PtxError, match="another thread has written"):
        launch(EXCHANGE.format(barrier=""), threads=64, shared=SHARED)
    with pytest.raises(PtxError, match="at once"):
        launch("mov.u32 %r4, tile; st.shared.u32 [%r4], %r2; ret;", shared=SHARED)
    with pytest.raises(OutOfBounds, match="outside of its 256"):
        launch("mov.u32 %r4, tile; ld.shared.u32 %r3, [%r4+256]; ret;", shared=SHARED)


def test_launches_that_do_not_fit_are_refused():
    text, memory = module(START + "ret;"), Memory()
    address = memory.bind(np.zeros(4, np.uint32))
    for grid, block, args in [
        ((1,), (128,), [address, 1]),  # more than .maxntid
        ((1,), (33,), [address, 1]),
        ((0,), (32,), [address, 1]),
        ((1,), (32,), [address]),
        ((1,), (32,), [address, 2**40]),
        ((1,), (32,), [address, 1.0]),
    ]:
        with pytest.raises(PtxError):
            run(text, "k", grid, block, args, memory)
    with pytest.raises(PtxError, match="no entry"):
        run(text, "other", (1,), (32,), [address, 1], memory)


def test_counts():
    out, memory = np.zeros(64, np.uint32), Memory()
    address = memory.bind(out)
    body = "setp.ge.u32 %p1, %r2, 5; @%p1 bra $L; ld.global.u32 %r3, [%rd2]; st.global.u32 [%rd4], %r3; $L: ret;"
    counts = run(module(START + body), "k", (1,), (64,), [address, 0], memory)
    assert counts.instructions["ld.global.u32"] == 5
    assert counts.issues == 8 * 2 + 2 + 2  # of two warps the second leaves the loads out
    assert (counts.reads[address].bytes, counts.reads[address].distinct) == (20, 4)
    assert (counts.writes[address].bytes, counts.writes[address].distinct) == (20, 20)
