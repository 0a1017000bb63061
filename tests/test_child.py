"""The trainer's child process: its protocol, its deaths, and those of its parent. All processes are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_sdss.errors import ConfigError
from edge_sdss.tuning import outofmemory
from edge_sdss.tuning.supervisor import Died, Failed, supervise

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and signals")

TARGETS = """
import os, signal, sys, time
from pathlib import Path

from edge_sdss.errors import ConfigError
from edge_sdss.tuning.child import Stopped

def echo(payload, channel):
    print("a library prints")
    for step in range(3):
        channel.progress("tune", step + 1, 3)
    channel.event({"loss": 0.5})
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"payload": payload, "folder": os.getcwd(), "threads": threads, "first": sys.path[0]}

def refuse(payload, channel):
    raise ConfigError("tune the model: asked; found.")

def slip(payload, channel):
    return 1 / 0

def die(payload, channel):
    for line in range(80):
        print("line", line, flush=True)
    channel.progress("tune", 1, 2)
    os.kill(os.getpid(), payload)
    time.sleep(60)

def die_within_a_word(payload, channel):
    channel._file.write('{"result": 12')
    channel._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def abort(payload, channel):
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\\n")
    os.abort()

def run_out(payload, channel):
    import resource
    held = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (held + payload, held + payload))
    blocks = []
    while True:
        blocks.append(bytearray(1 << 20))

def hog(payload, channel):
    held = bytearray(b"x") * payload
    time.sleep(60)

def train(payload, channel):
    folder = Path(payload["folder"])
    (folder / "pid").write_text(str(os.getpid()))
    try:
        for step in range(10_000):
            channel.progress("tune", step, 10_000)
            if channel.stopping is not None:
                (folder / "told").touch()
            if payload["polls"]:
                channel.check()
            time.sleep(0.01)
    except Stopped:
        time.sleep(0.1)
        (folder / "checkpoint").write_text("whole")
        raise
"""

PARENT = """
import json, signal, sys
from edge_sdss.tuning.supervisor import supervise
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored
signal.signal(signal.SIGTERM, signal.SIG_DFL)
try:
    supervise("planted:train", json.loads(sys.argv[1]), env={"PYTHONPATH": sys.argv[2]}, grace_s=60.0)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


@pytest.fixture
def run(tmp_path_factory) -> Callable:
    """`supervise` with the targets above; afterwards nothing may be left of the child."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "planted.py").write_text(TARGETS, encoding="utf-8")

    def supervised(name: str, payload=None, **options):
        before = held()
        try:
            return supervise(f"planted:{name}", payload, env={"PYTHONPATH": str(folder)}, **options)
        finally:
            after = held()
            assert after[0] <= before[0]
            assert after[1] <= before[1]
            assert not {thread.name for thread in threading.enumerate()} & {"child-output", "memory-watch"}

    return supervised


def held() -> tuple[set[str], int]:
    """The children of this process, zombies included, and the number of its open files."""
    tasks = Path("/proc/self/task").glob("*/children")
    children = {pid for path in tasks for pid in path.read_text().split()}
    return children, len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def test_there_and_back(run, capfd, monkeypatch, tmp_path: Path) -> None:
    for name in ("json", "planted"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user, not ours')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps, events, payload = [], [], {"text": "ä\n" * 500_000, "none": None}
    found = run("echo", payload, progress=lambda *step: steps.append(step), on_event=events.append)
    assert "targets" in found.pop("first")
    assert found == {"payload": payload, "folder": str(tmp_path), "threads": "1"}
    assert steps == [("tune", done, 3) for done in (1, 2, 3)]
    assert events[0] == {"loss": 0.5}
    assert [*events[1]] == ["peak_rss_bytes"]
    if sys.platform == "linux":
        assert 5 << 20 < events[1]["peak_rss_bytes"] < 1 << 30
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"json.py", "planted.py"}


def test_the_number_of_threads_follows_torch(run, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"get_num_threads": staticmethod(lambda: 3)}))
    assert run("echo")["threads"] == "3"


def test_errors_keep_their_kind(run) -> None:
    with pytest.raises(ConfigError, match=r"^tune the model: asked; found\.$"):
        run("refuse")
    with pytest.raises(Failed, match=r"(?s)in slip.*ZeroDivisionError: division by zero"):
        run("slip")
    with pytest.raises(Failed, match="has no attribute 'missing'"):
        run("missing")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_death_in_the_middle(run, number: int, monkeypatch) -> None:
    monkeypatch.setattr(outofmemory, "oom_kills", lambda: 7)
    with pytest.raises(Died, match=signal.Signals(number).name) as caught:
        run("die", int(number))
    assert (caught.value.signal, caught.value.oom) == (number, False)
    assert "line 79" in caught.value.stderr
    assert len(caught.value.stderr.splitlines()) == 50


def test_the_kernels_kill_is_told_apart(run, monkeypatch) -> None:
    counts = iter([7, 8])
    monkeypatch.setattr(outofmemory, "oom_kills", lambda: next(counts))
    with pytest.raises(Died, match="by the kernel, for memory; free memory") as caught:
        run("die", int(signal.SIGKILL))
    assert (caught.value.signal, caught.value.oom) == (signal.SIGKILL, True)


def test_half_a_result_is_none(run) -> None:
    with pytest.raises(Died, match="SIGKILL"):
        run("die_within_a_word")


def test_an_abort_for_memory(run) -> None:
    with pytest.raises(Died, match="SIGABRT") as caught:
        run("abort")
    assert (caught.value.signal, caught.value.oom) == (signal.SIGABRT, True)


@pytest.mark.skipif(sys.platform != "linux", reason="plants a limit")
def test_a_planted_limit(run) -> None:
    with pytest.raises(Died, match="out of memory, MemoryError") as caught:
        run("run_out", 100 << 20)
    assert (caught.value.signal, caught.value.oom) == (None, True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_that_takes_too_much_is_ended(run) -> None:
    events: list[dict] = []
    with pytest.raises(Died, match=r"MiB in use for 1 s, 100 MiB allowed; free memory") as caught:
        run("hog", 200 << 20, memory=100 << 20, on_event=events.append)
    assert (caught.value.signal, caught.value.oom) == (signal.SIGKILL, True)
    assert events[-1]["peak_rss_bytes"] > 200 << 20


def test_an_interpreter_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(Died, match="gave up") as caught:
        supervise("planted:echo", "x" * (1 << 20), env={"PYTHONHOME": str(tmp_path)})
    assert caught.value.signal is None
    assert caught.value.stderr


def test_a_callback_that_fails_ends_the_child(run, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        run("train", {"folder": str(tmp_path), "polls": True}, progress=progress)
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not state(pid).startswith("Z")  # an orphan's zombie is buried by init


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].strip()
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Callable]:
    """Starts a process that supervises `train`, and returns it with the pid of the child once that is at work."""
    (tmp_path / "planted.py").write_text(TARGETS, encoding="utf-8")
    started: list[int] = []

    def start(polls: bool = True) -> tuple[subprocess.Popen, int]:
        payload = json.dumps({"folder": str(tmp_path), "polls": polls})
        command = [sys.executable, "-c", PARENT, payload, str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
        started.append(process.pid)
        wait_for(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
        started.append(int((tmp_path / "pid").read_text()))
        return process, started[-1]

    yield start
    for pid in started:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_ctrl_c_waits_for_the_checkpoint(parent, tmp_path: Path) -> None:
    process, child = parent()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "interrupted\n", "")
    assert (tmp_path / "checkpoint").read_text() == "whole"
    assert not alive(child)


def test_sigterm_waits_for_the_checkpoint_and_then_takes_effect(parent, tmp_path: Path) -> None:
    process, child = parent()
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    assert (tmp_path / "checkpoint").read_text() == "whole"
    assert not alive(child)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_ends_a_child_that_does_not_listen(parent, tmp_path: Path, number, status) -> None:
    process, child = parent(polls=False)
    process.send_signal(number)
    wait_for((tmp_path / "told").exists)
    assert process.poll() is None
    assert alive(child)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == status
    assert not alive(child)
    assert not (tmp_path / "checkpoint").exists()


def test_when_the_parent_is_killed_the_child_ends_in_order(parent, tmp_path: Path) -> None:
    process, child = parent()
    process.kill()
    process.communicate(timeout=120)
    wait_for(lambda: not alive(child))
    assert (tmp_path / "checkpoint").read_text() == "whole"


def test_a_child_that_is_told_to_stop_by_another(run, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if done == 5:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)

    with pytest.raises(Died, match="SIGTERM") as caught:
        run("train", {"folder": str(tmp_path), "polls": True}, progress=progress)
    assert (caught.value.signal, caught.value.oom) == (signal.SIGTERM, False)
    assert (tmp_path / "checkpoint").read_text() == "whole"


def test_a_child_that_is_told_twice_need_not_listen(run, tmp_path: Path) -> None:
    told: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if (not told and done == 5) or (len(told) == 1 and (tmp_path / "told").exists()):
            told.append(done)
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)

    with pytest.raises(Died, match="SIGTERM"):
        run("train", {"folder": str(tmp_path), "polls": False}, progress=progress)
    assert not (tmp_path / "checkpoint").exists()


def test_from_a_thread(run) -> None:
    found: list = []
    thread = threading.Thread(target=lambda: found.append(run("echo", 1)["payload"]))
    thread.start()
    thread.join(timeout=120)
    assert found == [1]
