"""Ctrl-C at a terminal: what it does while the program works, and that it is heard while `input` waits."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_S = 0.05  # until an unheard Ctrl-C is sent again


@contextmanager
def on_ctrl_c(does: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside, Ctrl-C calls `does` between two steps of the program."""
    before = signal.signal(signal.SIGINT, does)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ctrl_c_ends_waiting() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, once, however close to the prompt it is pressed. Main thread only.

    `input` shows its prompt and then waits in select. A signal that comes between the two interrupts no wait, and
    CPython would look for it after the next key only. So a thread, woken through the file that CPython's C handler
    writes to, sends it again until the Python handler has run.
    """
    heard, main = threading.Event(), threading.main_thread().ident
    heard.set()  # so far there is nothing to end
    woken, wakes = socket.socketpair()

    def raise_once(*_: object) -> None:
        if not heard.is_set():
            heard.set()
            raise KeyboardInterrupt

    def repeat() -> None:
        while woken.recv(1):  # empty once `wakes` is closed
            while not heard.wait(_AGAIN_S):
                signal.pthread_kill(main or 0, signal.SIGINT)

    thread = threading.Thread(target=repeat, daemon=True)
    wakes.setblocking(False)
    with woken, on_ctrl_c(raise_once):
        before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        thread.start()
        try:
            try:
                heard.clear()
                yield
            finally:
                heard.set()  # may be where it is raised
        finally:
            signal.set_wakeup_fd(before)
            wakes.close()
            thread.join()
