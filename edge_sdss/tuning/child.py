"""The child's side of `supervisor`: talks to the parent, stops when asked, ends when the parent has gone.

`python -m edge_sdss.tuning.child MODULE:FUNCTION PIPE` reads one line of JSON from stdin, {"payload", "folder"},
calls `function(payload, channel)` and writes messages to the pipe. Knows nothing of what the function does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any

from edge_sdss.processes import sizes
from edge_sdss.tree import Tree
from edge_sdss.tuning import outofmemory

GRACE_S = 30.0  # for a checkpoint, after the wish to stop


class Stopped(Exception):
    """Raised by `Channel.check` within the child: someone wants it to end."""


class Channel:
    """What the function in the child talks through. Safe to use from several threads."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._lock = file, threading.Lock()
        self.stopping: int | None = None  # the signal

    def progress(self, stage: str, done: int, total: int) -> None:
        """A `Progress` that the parent hears."""
        self.send("progress", [stage, done, total])

    def event(self, event: Mapping[str, Any]) -> None:
        """Tells the parent of anything else that JSON can say."""
        self.send("event", dict(event))

    def check(self) -> None:
        """Raises Stopped where the process is to end."""
        if self.stopping is not None:
            raise Stopped(signal.Signals(self.stopping).name)

    def send(self, kind: str, value: Any) -> None:
        """Sends one message; a parent that is gone is none to complain to."""
        line = json.dumps({kind: value})
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._file.write(f"{line}\n")
            self._file.flush()


def main(target: str, pipe: int) -> int:
    """The child's side. Returns its exit status."""
    sys.path.append(sys.path.pop(0))  # the package's folder, behind the standard library
    os.set_inheritable(pipe, False)
    faulthandler.enable()
    channel = Channel(open(pipe, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end

    def stop(number: int, frame: FrameType | None) -> None:
        if channel.stopping is not None:
            raise KeyboardInterrupt
        channel.stopping = number

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(OSError):  # should the kernel have to choose, let it be the child
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    first = json.loads(sys.stdin.buffer.readline() or b"null")
    if first is None:
        return 1
    os.chdir(first["folder"])
    threading.Thread(target=_end_with_parent, args=(channel,), daemon=True).start()
    status = _call(target, first["payload"], channel)
    if status is None:  # die of it, as those expect who sent the signal
        number = channel.stopping or signal.SIGINT
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return status or 0


def _call(target: str, payload: Any, channel: Channel) -> int | None:
    """Returns 0 after a result, 1 after an error, None where it was stopped."""
    module, _, name = target.partition(":")
    try:
        channel.send("result", getattr(importlib.import_module(module), name)(payload, channel))
        return 0
    except (Stopped, KeyboardInterrupt):
        return None
    except BaseException as error:
        oom = outofmemory.is_out_of_memory(error)
        outofmemory.free(error)
        text = traceback.format_exc()
        channel.send("error", {"kind": type(error).__name__, "text": str(error), "traceback": text, "oom": oom})
        return 1
    finally:
        channel.send("peak", sizes(Tree(), "proc/self/status").get("VmHWM", 0))


def _end_with_parent(channel: Channel) -> None:
    """The end of stdin is the end of the parent: stop in order, or else at all."""
    while os.read(0, 1 << 16):
        pass
    if channel.stopping is None:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    from edge_sdss.tuning import child  # not `__main__`: whoever catches Stopped must mean the same class

    sys.exit(child.main(sys.argv[1], int(sys.argv[2])))
