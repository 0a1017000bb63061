"""Runs a function in a process of its own, and survives what becomes of it. Knows nothing of what the function does.

    parent  ── payload, one line of JSON ──▶  stdin     which then stays open: at its end the parent is gone
            ◀── messages, JSON lines ───────  a pipe    progress, events, and at last a result or an error
            ◀── last words ─────────────────  stdout and stderr, of which the last 50 lines are kept
            ─── SIGTERM, then SIGKILL ─────▶

The function is called as `function(payload, channel)`, with the channel of `child`, and calls `channel.check()`
wherever it can stop in order. The child has a session of its own, so that Ctrl-C comes to it once, through the
parent. Nothing is pickled and nothing is written to a disk. POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import edge_sdss
from edge_sdss import errors
from edge_sdss.errors import EdgeSdssError, message
from edge_sdss.tuning import outofmemory
from edge_sdss.tuning.child import GRACE_S
from edge_sdss.tuning.watchdog import Watchdog
from edge_sdss.types import Progress, no_progress

_LAST_WORDS = 50
_ROOT = Path(edge_sdss.__file__).resolve().parent.parent


class Died(EdgeSdssError):
    """The child ended without a result: by `signal`, or None where it only gave up.

    `oom` says that it was for memory; after a SIGKILL that is likely even where it is False. `stderr` holds its
    last lines.
    """

    def __init__(self, asked: str, found: str, *, signal: int | None, oom: bool, stderr: str = "") -> None:
        do = "free memory or lower the budget" if oom else "run it again: it goes on from its last checkpoint"
        super().__init__(message(asked, found, do))
        self.signal, self.oom, self.stderr = signal, oom, stderr


class Failed(RuntimeError):
    """The function raised what this package does not raise on purpose; the text is the child's traceback."""


def supervise(
    target: str,
    payload: Any,
    *,
    progress: Progress = no_progress,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    env: Mapping[str, str] | None = None,
    memory: int | None = None,
    grace_s: float = GRACE_S,
) -> Any:
    """Runs `target`, "module:function", in a fresh interpreter and returns its result, as JSON gives it back.

    `env` is added to this process's environment. Beyond 1.1 × `memory` bytes for a second the child is killed.
    The last event is {"peak_rss_bytes": n}. Ctrl-C and SIGTERM let the child end in order, within `grace_s`, and
    then take effect here; a second one ends it at once. If this process dies, the child ends in order as well.
    Raises Died where the child ended without a result or for want of memory, Failed where the function raised
    an error by mistake, and its own EdgeSdssError, KeyboardInterrupt or what a callback raised else.
    """
    deaths = outofmemory.oom_kills()
    last: dict[str, Any] = {}
    with _sigterm_as_exception():
        child = _Child(target, env)
        with child.ended(grace_s), child.watched(memory) as watch:
            child.give(payload)
            for kind, value in child.messages():
                if kind == "progress":
                    progress(*value)
                elif kind == "event":
                    on_event(value)
                else:
                    last[kind] = value
            returncode = child.wait(grace_s)
            on_event({"peak_rss_bytes": max(last.get("peak", 0), watch.peak_bytes if watch else 0)})
    if "result" in last:
        return last["result"]
    if "error" in last:
        _raise(target, last["error"], child.last_words())
    child.mourn(returncode, outofmemory.killed_by_kernel(returncode, deaths, outofmemory.oom_kills()))


class _Child:
    """The process as its parent sees it."""

    def __init__(self, target: str, env: Mapping[str, str] | None) -> None:
        self.target = target
        self.killed: str | None = None
        reading, writing = os.pipe()
        with open(writing, "wb", closefd=True):
            # Its folder becomes sys.path[0], so this very package is found, and nothing in the user's folder.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_sdss.tuning.child", target, str(writing)],
                cwd=_ROOT,
                env={**os.environ, **_threads(), **(env or {}), "PYTHONSAFEPATH": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                start_new_session=True,
            )
        self._pipe = open(reading, encoding="utf-8")  # noqa: SIM115 - `ended` closes it
        self._tail: deque[str] = deque(maxlen=_LAST_WORDS)
        self._listener = threading.Thread(target=self._listen, name="child-output", daemon=True)
        self._listener.start()

    def give(self, payload: Any) -> None:
        line = json.dumps({"payload": payload, "folder": os.getcwd()})
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; why is told later
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What it says until it ends."""
        for line in self._pipe:
            if line.endswith("\n"):  # else it was killed in the middle of a word
                yield from json.loads(line).items()

    @contextlib.contextmanager
    def watched(self, memory: int | None) -> Iterator[Watchdog | None]:
        if memory is None:
            yield None
            return
        with Watchdog(memory, pid=self.process.pid, last_resort=self.end_for_memory) as watch:
            yield watch

    def wait(self, grace_s: float) -> int:
        """Returns its status; it has said its last message."""
        try:
            return self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def end_for_memory(self, why: str) -> None:
        self.killed = why
        self.process.kill()

    def last_words(self) -> str:
        self._listener.join(timeout=1.0)  # a grandchild may hold the pipe
        return "".join(self._tail)

    def mourn(self, returncode: int, by_kernel: bool) -> NoReturn:
        """Raises Died."""
        words = self.last_words()
        number = -returncode if returncode < 0 else None
        oom = by_kernel or self.killed is not None or outofmemory.says_so(words)
        by = "the kernel, for memory" if by_kernel else signal.Signals(number).name if number else ""
        found = f"the process was ended by {by}"
        if self.killed:
            found = f"the process was ended: {self.killed}"
        elif not by:
            last = words.strip().splitlines()[-1:] or [f"status {returncode}"]
            found = f"the process gave up: {last[0][:200]}"
        raise Died(f"run {self.target}", found, signal=number, oom=oom, stderr=words)

    @contextlib.contextmanager
    def ended(self, grace_s: float) -> Iterator[None]:
        """On leaving, however that comes about, the process has ended and is buried."""
        try:
            yield
        except (KeyboardInterrupt, _Terminated):
            self._end(grace_s)
            raise
        except BaseException:
            self._end(0.0)
            raise
        finally:
            self.process.kill()
            self.process.wait()
            self._pipe.close()
            self._listener.join(timeout=1.0)
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()

    def _end(self, grace_s: float) -> None:
        """Asks it to stop, and reads on, lest it wait for a reader."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        reader = threading.Thread(target=self._drain, daemon=True)
        reader.start()
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt, _Terminated):
            self.process.wait(grace_s)
        self.process.kill()
        reader.join(timeout=1.0)

    def _drain(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(self._pipe.fileno(), 1 << 16):
                pass

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self.process.stdout:
                self._tail.append(line.decode("utf-8", "replace"))


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Makes SIGTERM wait until the child has ended; then it takes the effect that it would have had."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return

    def arrived(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    signal.signal(signal.SIGTERM, arrived)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt from None  # someone has a handler of his own, which let us live
    finally:
        signal.signal(signal.SIGTERM, before)


def _threads() -> dict[str, str]:
    """The number of threads that torch was told here, which no child would know of: sums depend on it."""
    torch = sys.modules.get("torch")
    if torch is None or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def _raise(target: str, error: Mapping[str, Any], words: str) -> NoReturn:
    if error["oom"]:
        raise Died(
            f"run {target}",
            f"out of memory, {(error['text'] or error['kind'])[:200]}",
            signal=None,
            oom=True,
            stderr=words,
        )
    kind = getattr(errors, error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, EdgeSdssError):
        raise kind(error["text"])
    raise Failed(error["traceback"])
