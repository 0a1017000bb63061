"""The service of a device: says over a socket of the machine's own whether it is well, and what serves.

HTTP over a Unix socket, so that curl and container engines can ask, and nobody outside the machine can:

    GET /health    200 where the deployed bundle is whole or there is none, else 503; one JSON document

It holds no model and changes nothing: chat and rounds are processes of their own, which the home's lock keeps apart.
The files of a bundle are hashed once, and again where another version serves.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from edge_sdss import __version__, bundles, device
from edge_sdss.bundles.shelf import Shelf
from edge_sdss.errors import EdgeSdssError, InputError, message

_TIMEOUT_S = 5.0
_LONGEST_PATH = 100  # bytes of a Unix socket's address: 108 on Linux, 104 on macOS


class Health:
    """What `/health` answers."""

    def __init__(self, home: Path) -> None:
        self._home, self._since = home, time.monotonic()
        self._looked: tuple[Path, str] | None = None

    def look(self) -> tuple[bool, dict[str, Any]]:
        """Whether all is well, and the document. Never raises."""
        problem, serves, adapter = "", "nothing is deployed", None
        try:
            active = Shelf(self._home).active()
            if active is not None:
                serves, problem = active.name, self._whole(active)
                adapter = None if problem else bundles.load(active).active
        except (EdgeSdssError, OSError) as error:
            problem = str(error)
        facts = {"serves": serves, "adapter": adapter or "base model" if not problem else None, "problem": problem}
        about = {
            "version": __version__,
            "emulated": device.emulated(),
            "uptime_s": round(time.monotonic() - self._since),
        }
        return not problem, {"status": "failing" if problem else "ok", **facts, **about}

    def _whole(self, active: Path) -> str:
        """What is wrong with the files of a version, in words; empty where nothing is."""
        if self._looked is None or self._looked[0] != active:
            try:
                bundles.verify(active)
                self._looked = active, ""
            except EdgeSdssError as error:
                self._looked = active, str(error)
        return self._looked[1]


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    health: Health


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        if self.path != "/health":
            self.send_error(404, "only /health is here")
            return
        well, document = self.server.health.look()
        body = json.dumps(document).encode() + b"\n"
        self.send_response(200 if well else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a health check each half a minute is no news."""


@contextmanager
def server(path: Path, home: Path) -> Iterator[socketserver.BaseServer]:
    """A server that listens at a socket, which owner and group may use; `serve_forever` on it answers.

    A socket that a killed server left is replaced. Raises InputError where one answers there, or it cannot be made.
    """
    asked = f"listen at {path}"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise InputError(message(asked, "the path is too long for a socket", "give a shorter --socket"))
    if _answers(path):
        raise InputError(message(asked, "another server answers there", "stop it, or give another --socket"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_socket():
            path.unlink()
        before = os.umask(0o117)
        try:
            made = _Server(str(path), _Handler)
        finally:
            os.umask(before)
    except OSError as error:
        raise InputError(message(asked, error.strerror or "failed", "give another --socket")) from error
    made.health = Health(home)
    try:
        yield made
    finally:
        made.server_close()
        with suppress(OSError):
            path.unlink()


def ask(path: Path) -> tuple[bool, dict[str, Any]]:
    """What the server at a socket says of itself. Raises InputError where none answers."""
    connection = _Connection(path)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status == 200, dict(json.loads(answer.read()))
    except (OSError, HTTPException, ValueError) as error:
        found = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        do = "start `edge-sdss serve`, or give its --socket"
        raise InputError(message(f"ask the service at {path}", found, do)) from error
    finally:
        connection.close()


class _Connection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def _answers(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_S)
        probe.connect(str(path))
        return True
    return False
