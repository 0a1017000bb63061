"""A command as a process of ours: signals reach it, its exit code is a shell's. Knows nothing of limits."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from edge_sdss.errors import BackendUnavailable, message

TRIAL_S = 20.0


def run(command: Sequence[str], env: Mapping[str, str], stdout: int | None = None) -> int:
    """Runs a command to its end. Ctrl-C reaches it through the terminal, SIGTERM through us."""
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=stdout)

    with _signals(process):
        code = process.wait()
    return code if code >= 0 else 128 - code


def attempt(asked: str, command: Sequence[str], do: str) -> str:
    """Runs a short trial and returns what it printed. Raises BackendUnavailable where it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        found = f"no answer in {TRIAL_S:.0f} s" if isinstance(error, subprocess.TimeoutExpired) else "not installed"
        raise BackendUnavailable(message(asked, found, do)) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BackendUnavailable(message(asked, said[0].rstrip(".")[:200], do))
    return done.stdout


@contextmanager
def _signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside, SIGTERM goes on to the process, and Ctrl-C is left to it; only a main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    terminate, interrupt = signal.signal(signal.SIGTERM, forward), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)
