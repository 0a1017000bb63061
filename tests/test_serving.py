"""The service: well where what serves is whole, not well where it is not, and reachable by nobody outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles as made
import pytest

from edge_sdss import device, serving
from edge_sdss.bundles.shelf import Shelf
from edge_sdss.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "health.sock"


@pytest.fixture
def service(path: Path, home: Path) -> Iterator[Path]:
    with serving.server(path, home) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield path
        server.shutdown()
        thread.join()


def deploy(home: Path, source: Path) -> Path:
    shelf = Shelf(home)
    shelf.deploy(source, check=lambda staged: ())
    found = shelf.active()
    assert found is not None
    return found


def test_an_empty_home_is_well_and_says_that_nothing_is_deployed(service: Path) -> None:
    well, told = serving.ask(service)
    assert well
    assert (told["status"], told["serves"], told["adapter"]) == ("ok", "nothing is deployed", "base model")


def test_it_names_the_bundle_that_serves_and_sees_a_file_that_was_changed(
    service: Path, home: Path, tmp_path: Path
) -> None:
    active = deploy(home, made.bundle(tmp_path / "one"))
    well, told = serving.ask(service)
    assert (well, told["serves"], told["problem"]) == (True, active.name, "")
    deploy(home, made.bundle(tmp_path / "two", seed=1))
    active = Shelf(home).active() or Path()
    broken = active / "model.onnx"
    broken.chmod(0o644)
    broken.write_bytes(broken.read_bytes()[:-1] + b"!")
    well, told = serving.ask(service)
    assert not well
    assert (told["status"], told["adapter"]) == ("failing", None)
    assert "model.onnx" in told["problem"]


def test_an_emulated_service_says_so(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.EMULATED, "thor")
    assert serving.ask(service)[1]["emulated"] == "thor"


def test_only_owner_and_group_may_ask(service: Path) -> None:
    assert stat.S_IMODE(service.stat().st_mode) == 0o660


@pytest.mark.parametrize(
    "request_line", [b"GET / HTTP/1.0\r\n\r\n", b"nonsense\r\n\r\n", b"POST /health HTTP/1.0\r\n\r\n"]
)
def test_anything_else_is_refused_and_the_next_one_is_answered(service: Path, request_line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(service))
        other.sendall(request_line)
        assert b" 200 " not in other.recv(65536)
    assert serving.ask(service)[0]


def test_one_that_says_nothing_does_not_keep_others_out(service: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(service))
        assert serving.ask(service)[0]


def test_a_second_server_is_refused_and_a_dead_ones_socket_replaced(service: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another server answers there; stop it"), serving.server(service, home):
        pass
    assert serving.ask(service)[0], "the first goes on"
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    with serving.server(dead, home):
        pass
    assert not dead.exists()


def test_a_file_is_never_taken_for_a_socket(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "letter"
    file.write_text("dear")
    with pytest.raises(InputError, match=r"listen at .*give another --socket"), serving.server(file, home):
        pass
    assert file.read_text() == "dear"
    with pytest.raises(InputError, match="too long"), serving.server(tmp_path / ("x" * 120), home):
        pass


def test_where_nobody_answers_that_is_one_line(path: Path) -> None:
    with pytest.raises(InputError, match=r"ask the service at .*; start `edge-sdss serve`"):
        serving.ask(path)


def test_the_verbs_serve_until_they_are_stopped(path: Path) -> None:
    def verb(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "edge_sdss", *map(str, arguments)]

    env: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "EDGE_SDSS_SOCKET": str(path)}
    with subprocess.Popen(verb("serve"), env=env, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert "Listening at" in server.stderr.readline()
        done = subprocess.run(verb("health", "--json"), env=env, capture_output=True, text=True)
        assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "ok")
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not path.exists()
    assert subprocess.run(verb("health"), env=env, capture_output=True).returncode == 2
