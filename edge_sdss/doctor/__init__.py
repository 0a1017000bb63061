"""What this machine is and what works on it: each part usable, or why not and how to mend it.

Meant to be pasted into an issue: no serial numbers, names of users or hosts. Never raises: a probe that fails
becomes a check that says how. The examination measures nothing and changes
nothing; the self-test measures.

    machine.py   board, memory, power mode, disks, sensors, tools
    software.py  Python, packages, the Jetson's image, backends, model, targets
    selftest.py  the CUDA kernels on this device: parity, and a small benchmark
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from edge_sdss import jetpack
from edge_sdss.config import Config
from edge_sdss.doctor import machine, software
from edge_sdss.doctor._finding import Finding, Status, line
from edge_sdss.tree import Tree

NEEDED = frozenset({("backends", "numpy"), ("model", "libraries"), ("model", "weights")})
"""Where one of these is missing, the main loop cannot run."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Record):
    """One finding."""

    group: str
    name: str
    status: Status
    found: str
    do: str = Field(default="", description="how to mend it; empty where nothing can or need be")


class Diagnosis(_Record):
    """All findings; `usable` is whether the main loop can run here."""

    usable: bool
    checks: tuple[Check, ...]


def examine(tree: Tree, settings: Config) -> Diagnosis:
    """Looks at the machine of a tree and at the software of this one. Imports torch where it is installed."""

    def image() -> jetpack.Jetson | None:
        return jetpack.detect(tree)

    probes: tuple[tuple[str, str, Callable[[], Iterable[Finding]]], ...] = (
        ("board", "board", lambda: machine.board(tree)),
        ("board", "memory", lambda: machine.memory(tree)),
        ("board", "power mode", lambda: machine.power_mode(tree)),
        ("board", "disk", machine.disk),
        ("software", "python", software.python),
        ("software", "packages", software.packages),
        ("software", "L4T", lambda: software.image(image())),
        ("sensors", "sensors", lambda: machine.sensing(tree)),
        ("backends", "numpy", software.numpy),
        ("backends", "torch", software.torch),
        ("backends", "cuda", software.cuda),
        ("backends", "cuda kernels", software.kernels),
        ("model", "libraries", software.libraries),
        ("model", "weights", lambda: software.weights(settings.model.name)),
        ("targets", "targets", lambda: software.targets(image())),
        ("tools", "tools", lambda: machine.tools(tree, image() is not None)),
    )
    checks = tuple(check for probe in probes for check in _guarded(*probe))
    missing = {(check.group, check.name) for check in checks if check.status == "missing"}
    return Diagnosis(usable=not missing & NEEDED, checks=checks)


def rows(diagnosis: Diagnosis) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the columns and the rows of a table."""
    cells: list[tuple[str, ...]] = []
    for c in diagnosis.checks:
        cells.append((c.group, c.name, c.status, f"{c.found} → {c.do}" if c.do else c.found))
    return ("group", "what", "status", "found → what to do"), cells


def _guarded(group: str, name: str, probe: Callable[[], Iterable[Finding]]) -> Iterator[Check]:
    try:
        for part, status, found, do in probe():
            yield Check(group=group, name=part, status=status, found=_private(found), do=_private(do))
    except Exception as error:
        yield Check(group=group, name=name, status="missing", found=_private(line(error)), do="report this as an issue")


def _private(text: str) -> str:
    """A text on one line, without the names of users that paths of home folders hold."""
    text = re.sub(rf"(?<![\w.~-]){re.escape(str(Path.home()))}(?=/|$|[\s:;,])", "~", " ".join(text.split()))
    return re.sub(r"/(home|Users|media|run/media)/[^/\s:;,]+", r"/\1/…", text)
