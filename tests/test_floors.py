"""Imports go down only, and what a device without torch needs imports without torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "edge_sdss"

FLOORS = (
    {"errors", "types", "config"},
    {
        "store", "readers", "lexicon", "lm", "default_model", "backends", "device", "statistics", "metrics",
        "general", "sensors", "files", "tree", "boards", "jetpack", "page", "bundles", "cgroups",
        "processes", "qnn",
    },
    {
        "selection", "synthesis", "tuning", "gate", "evaluation", "report", "exporting", "runtime",
        "profiling", "moment",
    },
    {
        "rounds", "bundling", "embedding", "surprise", "session", "speakers", "conversation", "experiment", "demo",
        "cases", "doctor", "profile", "emulation", "nightly", "serving", "flashing",
    },
    {"cli", "options", "review", "console", "__main__"},
)  # fmt: skip
STAGES = 2
HEAVY = {"torch", "transformers", "peft", "matplotlib", "scipy", "onnxruntime"}


def parts(package: Path) -> dict[str, Path]:
    """Module name -> file, of the whole package."""
    files = {}
    for file in sorted(package.rglob("*.py")):
        names = file.relative_to(package.parent).with_suffix("").parts
        files[".".join(names[:-1] if names[-1] == "__init__" else names)] = file
    return files


def head(module: str) -> str:
    """The first name below the package: `edge_sdss.tuning.loss` -> `tuning`; empty for the package itself."""
    return f"{module}.".split(".")[1]


def floor(part: str) -> int | None:
    if part.startswith("cli_"):
        part = "cli"
    return next((level for level, names in enumerate(FLOORS) if part in names), None)


def imported(module: str, file: Path) -> Iterator[tuple[int, str]]:
    """(line, part of the package) of every import statement, those inside functions too.

    The part is no module where a name such as `Session` is taken from the package itself.
    """
    here = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "edge_sdss" else [base]
        else:
            continue
        for name in names:
            if name.startswith("edge_sdss."):
                yield node.lineno, head(name)


def violations(package: Path) -> list[str]:
    found = []
    for module, file in parts(package).items():
        part = head(module)
        if not part:
            continue  # the package itself hands out names of every floor, lazily
        level = floor(part)
        if level is None:
            found.append(f"{module}: stands on no floor; add it to FLOORS")
            continue
        for line, other in imported(module, file):
            below = floor(other)
            if other in (part, "__version__"):
                continue
            if below is None:
                found.append(f"{module}:{line} imports {other}, which stands on no floor")
            elif below > level:
                found.append(f"{module}:{line} imports {other}, from floor {level} up to {below}")
            elif below == level == STAGES:
                found.append(f"{module}:{line} imports {other}: stages do not know each other")
    return found


def test_imports_go_down_only() -> None:
    assert violations(PACKAGE) == []


def test_every_module_is_seen() -> None:
    modules = parts(PACKAGE)
    assert {"edge_sdss", "edge_sdss.config", "edge_sdss.selection.policies.sdss"} <= modules.keys()


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("store.py", "from edge_sdss.selection.buffer import Buffer", "from floor 1 up to 2"),
        ("lm.py", "def f():\n    from edge_sdss import session", "edge_sdss.lm:2 imports session"),
        ("gate.py", "import edge_sdss.tuning.loss", "stages do not know each other"),
        ("tuning/loss.py", "from ..synthesis import vary", "stages do not know each other"),
        ("tuning/__init__.py", "from ..session import Session", "from floor 2 up to 3"),
        ("tuning/loss.py", "from edge_sdss import Session", "imports Session, which stands on no floor"),
        ("novelty.py", "", "edge_sdss.novelty: stands on no floor"),
        ("tuning/loss.py", "from edge_sdss.tuning import x\nfrom . import y\nfrom edge_sdss import lm", None),
        ("cli_eval.py", "from edge_sdss import __version__, cli, session", None),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, complaint: str | None) -> None:
    path = tmp_path / "edge_sdss" / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    found = violations(tmp_path / "edge_sdss")
    assert [complaint in line for line in found] == [True] if complaint else found == []


def test_the_two_lowest_floors_load_no_heavy_library() -> None:
    """A file of `backends` or `sensors` may import the library it is named for: it is loaded on demand."""
    modules = [name for name in parts(PACKAGE) if head(name) and floor(head(name)) in (0, 1)]
    light = [name for name in modules if name.count(".") == 1 or head(name) not in ("backends", "sensors")]
    program = (
        "import importlib, json, sys\n"
        "found = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    new = sys.modules.keys() & set(json.loads(sys.argv[2])) - set().union(*found.values())\n"
        "    if new: found[name] = sorted(new)\n"
        "print(json.dumps(found))\n"
    )
    arguments = [json.dumps(["edge_sdss", *light]), json.dumps(sorted(HEAVY))]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
