"""Runs PTX on the CPU: every thread of the grid is one lane of NumPy arrays. A test tool, never a device.

    memory = Memory()
    x = memory.bind(np.ones((4, 768), np.float32))     # a device address; `shift=2` misplaces it by 2 bytes
    out = np.zeros(4, np.float32)
    address = memory.bind(out)                         # stores go to `out` itself
    counts = run(ptx_text, "token_energy_f32", (1, 1, 1), (256, 1, 1), [x, address, 4, 768], memory)
    counts.instructions, counts.reads[x].bytes, counts.reads[x].distinct

A driver that keeps its own addresses binds with `memory.bind_at(address, array)`; `array` may be any C-contiguous
array over that memory, and `memory.free(address)` ends it. `parameters(ptx_text, entry)` gives the PTX types of the
arguments in order ("u64", "u32", ...), by which a launch's argument block can be cut into values. An image that ends
in a zero byte is cut there.

It stops, with a subclass of `PtxError`, on an instruction, modifier or directive it does not know; on a load or store
outside every bound array or off its alignment; on a register read before it is written; on a barrier or shuffle that
not all named lanes reach; on shared memory that two threads use between barriers, one of them writing; on arguments
that do not fit the entry. Registers, and shared memory at the start, hold ones in every bit, so what was never written
shows. It does not see races in global memory.

Arithmetic is IEEE: `fma` through float64 (one rounding more, at most 2^-29 ulp off), the `approx` functions correctly
rounded, or off by up to `ulps` at random, to stand for what hardware may return.
"""

from ptx.machine import Counts, run
from ptx.memory import Memory, OutOfBounds, Traffic
from ptx.parser import PtxError, entries, parameters

__all__ = ["Counts", "Memory", "OutOfBounds", "PtxError", "Traffic", "entries", "parameters", "run"]
