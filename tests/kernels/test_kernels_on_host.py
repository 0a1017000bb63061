"""The kernels' sources built for the host, over the same grid: no race, nothing out of bounds, the same results."""

from __future__ import annotations

import host
import pytest
from kernel_cases import ENTRIES, TOLERANCE

needs_compiler = pytest.mark.skipif(host.compiler() is None, reason="g++ with C++20 is not here")


@pytest.fixture(scope="module", params=host.SANITIZERS)
def program(request, tmp_path_factory):
    sources = {entry: source for entry, (source, _) in ENTRIES.items()}
    return host.build(sources, request.param, tmp_path_factory.mktemp(request.param))


@needs_compiler
@pytest.mark.parametrize("entry", ENTRIES)
def test_sanitizers_find_nothing(program, entry):
    host.check(program, ENTRIES[entry][1](), TOLERANCE)
