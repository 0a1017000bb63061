"""Which node of a graph runs on which execution provider, and why one fell back.

ONNX Runtime records what it assigns (session.record_ep_graph_assignment_info); why a node was refused, providers say in
the log alone, so it is read while the session opens. Knows nothing of what nodes compute.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdss.errors import BackendUnavailable, ExportError, message
from edge_sdss.exporting.explain.graph import Topology

OpenVerbose = Callable[[Path, dict[str, str], int], Any]
"""(graph, session entries, log severity) -> session. It must allow the fallback, or there is nothing to report on."""

RECORD = "session.record_ep_graph_assignment_info"

_REASON = re.compile(
    r"Validation FAILED for \d+ nodes in OrtNodeUnit \((?P<unit>[^)]*)\)[^\n]*\n"
    r"(?P<nodes>(?:\s*Operator type: [^\n]*\n)+)\s*REASON : (?P<reason>[^\n]*)"
)
_NAMED = re.compile(r"Node name: (.*?) Node index:")
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Placed:
    """A node and where it runs. `reason`: why not on the provider that was wanted; empty where it is there, or where
    nothing was said."""

    node: str
    op: str
    provider: str
    reason: str = ""


@dataclass(frozen=True)
class Placement:
    """All nodes that were placed, in the graph's order. `gone`: those of the file that ONNX Runtime folded away, or
    into others, before anything was placed."""

    wanted: str
    nodes: tuple[Placed, ...]
    gone: tuple[str, ...] = ()

    @property
    def fell_back(self) -> tuple[Placed, ...]:
        """Nodes that run elsewhere than wanted."""
        return tuple(one for one in self.nodes if one.provider != self.wanted)


def placement(file: Path, wanted: str, open: OpenVerbose) -> Placement:
    """Opens a graph, fallback allowed, and says where its nodes went. `wanted`: the provider's name at ONNX Runtime.

    Raises BackendUnavailable where this ONNX Runtime does not tell.
    """
    with _log() as log:
        session = open(file, {RECORD: "1"}, 0)
        text = log()
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendUnavailable(message("report placement", "this onnxruntime does not tell it", "install the newest"))
    reasons = _reasons(text)
    found = {
        node.name: Placed(
            node.name, node.op_type, part.ep_name, "" if part.ep_name == wanted else reasons.get(node.name, "")
        )
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }
    order = {node.name: at for at, node in enumerate(Topology.of(file).nodes)}
    placed = sorted(found.values(), key=lambda one: order.get(one.node, len(order)))
    return Placement(wanted, tuple(placed), tuple(name for name in order if name not in found))


def check(found: Placement, allowed: Collection[str] = ()) -> None:
    """Raises ExportError where a node fell back; `allowed` are the names of nodes, or kinds of operation, that may."""
    bad = [one for one in found.fell_back if one.node not in allowed and one.op not in allowed]
    if bad:
        first = bad[0]
        others = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        why = f" ({first.reason})" if first.reason else ""
        raise ExportError(
            message(
                f"place the graph on {found.wanted}",
                f"{first.op} {first.node} runs on {first.provider}{why}{others}",
                "write it in operations that the provider takes, or allow it",
            )
        )


def _reasons(log: str) -> dict[str, str]:
    """What QNN's provider says of the nodes that it does not take, by name."""
    found: dict[str, str] = {}
    for match in _REASON.finditer(log):
        reason = match["reason"].strip().removesuffix(".")
        for name in _NAMED.findall(match["nodes"]):
            # it ends with the name of the node, which is known
            found.setdefault(name, re.sub(r"\.?\s*\w+ node `[^`]*` will not be assigned to QNN EP$", "", reason))
    return found


@contextlib.contextmanager
def _log() -> Iterator[Callable[[], str]]:
    """Inside, what is written to the process's standard error goes to a file, native code's too; that is how ONNX
    Runtime logs. Yields what returns it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def text() -> str:
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        try:
            yield text
        finally:
            os.dup2(kept, 2)
            os.close(kept)
