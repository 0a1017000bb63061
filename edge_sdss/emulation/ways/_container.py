"""What docker and podman have in common: the same words for the same limits.

The working folder and the state's home are the same inside, with the user's own rights; all else is the image's.
Sources: docker-run(1), podman-run(1).
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_sdss.emulation.limits import Limits, Outcome
from edge_sdss.emulation.ways import _process
from edge_sdss.errors import BackendUnavailable


class Container:
    """A container that is taken away when it has ended."""

    here = False
    lacks = ""

    def __init__(self, engine: str, limits: Limits, image: str) -> None:
        self.name, self._image = engine, image
        self._held = [
            f"--memory={limits.memory_bytes}b",
            f"--memory-swap={limits.memory_bytes}b",
            f"--cpuset-cpus=0-{limits.usable_cores - 1}",
        ]

    @classmethod
    def tried(cls, engine: str, limits: Limits, image: str) -> Container:
        """Raises BackendUnavailable where the engine, the image or the limits are not to be had."""
        asked = f"limit by {engine}"
        build = f"build the image: {engine} build -f docker/x86.Dockerfile -t {image} ."
        way = cls(engine, limits, image)
        _process.attempt(asked, [engine, "info"], f"start {engine}, or leave it to another way")
        _process.attempt(asked, [engine, "image", "inspect", image], build)
        trial = [engine, "run", "--rm", *way._held, "--entrypoint=true", image]
        _process.attempt(asked, trial, "let the engine limit memory and cores")
        return way

    def run(self, command: Sequence[str], env: Mapping[str, str], stdout: int | None) -> Outcome:
        """See `Way`."""
        name = f"edge-sdss-{uuid.uuid4().hex[:12]}"
        folders = {str(Path.cwd()), *([os.environ["EDGE_SDSS_HOME"]] if os.environ.get("EDGE_SDSS_HOME") else [])}
        kept = [f"--volume={folder}:{folder}" for folder in sorted(folders)]
        told = {name: os.environ[name] for name in ("EDGE_SDSS_HOME",) if os.environ.get(name)} | dict(env)
        given = [f"--env={key}={value}" for key, value in told.items()]
        face = ["--interactive", *(["--tty"] if sys.stdin.isatty() and stdout is None else [])]
        options = [f"--name={name}", *self._held, *kept, *given, *face]
        who = [f"--user={os.getuid()}:{os.getgid()}", f"--workdir={Path.cwd()}", "--entrypoint="]
        try:
            code = _process.run([self.name, "run", *options, *who, self._image, *command], {}, stdout)
            return Outcome(code, at_limit=self._at_limit(name))
        finally:
            subprocess.run([self.name, "rm", "--force", name], capture_output=True)

    def _at_limit(self, name: str) -> bool | None:
        try:
            said = _process.attempt("ask", [self.name, "inspect", "--format={{.State.OOMKilled}}", name], "")
        except BackendUnavailable:
            return None
        return {"true": True, "false": False}.get(said.strip())
