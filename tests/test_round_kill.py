"""A round killed at every write point and at random ones, in one process and in a supervised child.

Each test runs this file as a process of its own, which has the model once and forks for every kill. A kill is a
SIGKILL, or a loss of power: what was written and not synced is half there, what was renamed in a folder that was
not synced has its old name. The round that is taken up again must come to the same bits: weights, moments, losses.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

if __name__ != "__main__":
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

RANDOM = 20
AMPLE = 4 << 30
WAYS = ("killed", "power cut", "in a child")
"""SIGKILL of `trainer.train`; loss of power there; SIGKILL of the child of `budgeted.train`, at random of both."""
LAYERS = ("q_proj", "down_proj")  # few, for speed


def drive(*arguments: object) -> dict[str, Any]:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs of a slow disk prove no more."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


CASES = [
    ("as loaded", "killed", True, 0),
    ("nf4", "killed", False, RANDOM),
    ("nf4", "power cut", True, 0),
    ("nf4", "in a child", True, 0),
    ("as loaded", "in a child", False, RANDOM),
]


@pytest.mark.parametrize(("weights", "way", "points", "draws"), CASES)
def test_killed_at_every_write_point_and_at_random_moments(
    tiny: Path, quick: Path, weights: str, way: str, points: bool, draws: int
) -> None:
    found = drive(tiny, quick, weights, way, int(points), draws)
    names = found["points"]
    # 3 checkpoints and an adapter, of 3 files each: opened, synced with both folders, renamed, deleted.
    counts = {name: names.count(name) for name in set(names)}
    assert counts == {"mkdir": 6, "save_file": 8, "open": 8, "fsync": 20, "rename": 4, "remove": 9, "rmdir": 4}
    assert found["killed"] == len(names) * points
    assert found["random"] == draws
    assert found["resumed"] > found["killed"] / 2 or not points


# The process that forks


class Writes:
    """Counts the write points below a folder, and dies at one of them."""

    def __init__(self, folder: Path, at: int | None, die: Callable[[], None]):
        self.names: list[str] = []
        self._folder, self._at, self._die = os.fspath(folder), at, die
        self._synced = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
        self._renamed: list[tuple[Path, Path]] = []

    def watch(self) -> None:
        """For the rest of this process's life."""
        import safetensors.torch

        sys.addaudithook(self._heard)
        fsync, save_file = os.fsync, safetensors.torch.save_file

        def synced(handle: int) -> None:
            self.point("fsync")
            fsync(handle)
            self._sync(os.fstat(handle).st_ino)

        def saved(*arguments: Any, **named: Any) -> None:
            self.point("save_file")
            save_file(*arguments, **named)
            self.point("save_file")

        os.fsync, safetensors.torch.save_file = synced, saved

    def point(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self._at:
            self._die()

    def cut_power(self) -> None:
        """Leaves on the disk what must be there, and no more."""
        self._at = None
        names, self.names = self.names, []
        for before, after in reversed(self._renamed):
            os.rename(after, before)
        for path in Path(self._folder).rglob("*"):
            if path.is_file() and path.stat().st_ino not in self._synced:
                os.truncate(path, path.stat().st_size // 2)
        self.names = names

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        name = event.removeprefix("os.")
        if name not in ("open", "rename", "remove", "mkdir", "rmdir", "truncate"):
            return
        path, *others = arguments
        if name == "open" and not others[-1] & (os.O_WRONLY | os.O_RDWR):
            return
        folder_handle = others[-1] if name in ("remove", "mkdir", "rmdir") else -1
        if isinstance(path, int) or not self._below(os.fspath(path), folder_handle):
            return
        self.point(name)
        if name == "remove":  # the next file may get its inode
            relative = {} if folder_handle < 0 else {"dir_fd": folder_handle}
            self._synced.discard(os.stat(path, **relative).st_ino)
        if name == "rename":
            self._renamed.append((Path(path), Path(others[0])))

    def _below(self, path: str, folder_handle: int) -> bool:
        if folder_handle < 0 or os.path.isabs(path):
            return os.path.abspath(path).startswith(self._folder)
        inode = os.fstat(folder_handle).st_ino
        folders = [self._folder, *(folder for folder, _, _ in os.walk(self._folder))]
        return any(os.stat(folder).st_ino == inode for folder in folders)

    def _sync(self, inode: int) -> None:
        self._synced.add(inode)
        self._renamed = [each for each in self._renamed if each[1].parent.stat().st_ino != inode]


class Round:
    """A round with the tiny model, which can be had over and over."""

    def __init__(self, tiny: str, root: Path, weights: str, way: str):
        from edge_sdss import config
        from edge_sdss.lm import LanguageModel
        from edge_sdss.tuning import adapter
        from edge_sdss.types import Example, Turn

        sizes = {"rank": 4, "batch_size": 2, "epochs": 1, "checkpoint_every": 1, "targets": LAYERS, "reserve": 0}
        # More logits at a time than there are tokens, also when halved for each death: the same arithmetic.
        changes = {"learning_rate": 3e-3, "dropout": 0.1, "loss_chunk": 4096, "weights": weights}
        self.settings = config.Tuning.model_validate(sizes | changes)
        self.examples = [Example((Turn("user", "rain " * n),), "and the mat " * (8 - n)) for n in range(1, 8)]
        self.model = config.Model(name=tiny, device="cpu")
        self.root, self.way, self.supervised = root, way, way == "in a child"
        self.lm = LanguageModel.load(self.model)
        assert self.lm.fingerprint  # is read once
        adapter.quantise(self.lm, self.settings)

    def folder(self, name: str) -> Path:
        return self.root / name / "work" / "adapter"

    def begin(self, name: str, at: int | None = None) -> int:
        """Trains in a process of its own, that is killed at write point `at`. Returns its pid."""
        out = self.folder(name)
        out.parent.mkdir(parents=True, exist_ok=True)
        process = os.fork()
        if process:
            return process
        try:
            os.setsid()
            (self._supervised if self.supervised else self._inside)(out, at)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _inside(self, out: Path, at: int | None) -> None:
        from edge_sdss.tuning.trainer import train

        def die() -> None:
            if self.way == "power cut":
                writes.cut_power()
            os.kill(os.getpid(), signal.SIGKILL)

        writes = Writes(out.parent, at, die)
        self._note(out)
        writes.watch()
        train(self.lm, self.examples, self.settings, out)
        self._points(out, writes)

    def _supervised(self, out: Path, at: int | None) -> None:
        from edge_sdss.tuning import budgeted, child, supervisor

        lives: list[Any] = []

        def live(target: str, pipe: int) -> int:
            writes = Writes(out.parent, None if lives[1:] else at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            self._note(out)
            writes.watch()
            status = child.main(target, pipe)
            self._points(out, writes)
            return status

        class Forked(_Forked):
            def __init__(self, command: list[str], **named: Any):
                lives.append(command)
                super().__init__(lambda: live(command[-2], int(command[-1])), **named)

        assert (supervisor.subprocess, budgeted._loaded.__module__) == (subprocess, budgeted.__name__)
        subprocess.Popen = Forked  # type: ignore[misc, assignment]
        budgeted._loaded = lambda *_arguments: self.lm  # a fork has it
        budgeted.train(self.model, self.examples, self.settings, out, budget_bytes=AMPLE)

    def _note(self, out: Path) -> None:
        """Keeps the optimizer's last state, and which checkpoint was the last to be written, beside the round."""
        from safetensors.torch import save_file

        from edge_sdss.tuning import course
        from edge_sdss.tuning.checkpoint import Checkpoints

        measured, write, beside = course.Course._measured, Checkpoints.write, out.parent.parent

        def keep(self: Any, run: Any) -> Any:
            save_file({name: tensor.detach() for name, tensor in run.tensors().items()}, beside / "state.safetensors")
            return measured(self, run)

        def written(self: Any, state: Any) -> None:
            write(self, state)
            (beside / "written").write_text(str(state.step))

        course.Course._measured, Checkpoints.write = keep, written  # type: ignore[method-assign]

    def _points(self, out: Path, writes: Writes) -> None:
        (out.parent.parent / "points").write_text(" ".join(writes.names))

    def end(self, process: int) -> bool:
        """Whether it was killed; nothing else may have happened to it."""
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        return code != 0

    def whole(self, name: str) -> tuple[Any, ...]:
        """All that a round comes to."""
        out = self.folder(name)
        assert sorted(path.name for path in out.parent.iterdir()) == ["adapter"], "litter"
        card = json.loads((out / "edge_sdss.json").read_text())
        losses = [(each["step"], each["loss"], each["learning_rate"], each["tokens"]) for each in card["losses"]]
        weights = (out / "adapter_model.safetensors").read_bytes()
        return weights, (out.parent.parent / "state.safetensors").read_bytes(), losses

    def check(self, name: str, wanted: tuple[Any, ...]) -> bool:
        """Right after a kill. Returns whether there is something to be taken up."""
        out = self.folder(name)
        if out.exists():  # whole, or not at all
            assert (out / "adapter_model.safetensors").read_bytes() == wanted[0]
            assert json.loads((out / "edge_sdss.json").read_text())["key"]
            return False
        steps = sorted((out.parent / "adapter.checkpoint").glob("step-*"))
        note = out.parent.parent / "written"
        if not steps:
            assert not note.exists(), "a checkpoint was lost"
            return False
        from edge_sdss.files import sha256

        manifest = json.loads((steps[-1] / "manifest.json").read_text())
        assert manifest == {file: sha256(steps[-1] / file) for file in ("record.json", "tensors.safetensors")}
        assert int(steps[-1].name[5:]) >= int(note.read_text() if note.exists() else 1)
        return True

    def again(self, name: str, wanted: tuple[Any, ...]) -> None:
        assert not self.end(self.begin(name))
        assert self.whole(name) == wanted


class _Forked:
    """As much of a Popen as the supervisor asks for; the interpreter is there already."""

    def __init__(self, work: Callable[[], int], *, env: dict[str, str], pass_fds: list[int], **_named: Any):
        (from_parent, to_child), (from_child, to_parent) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for handle, number in ((from_parent, 0), (to_parent, 1), (to_parent, 2)):
                    os.dup2(handle, number)
                for handle in range(3, 100):
                    if handle not in pass_fds:
                        with suppress(OSError):
                            os.close(handle)
                os.environ.update(env)
                os._exit(work())
            except BaseException:
                traceback.print_exc()
                os._exit(99)
        os.close(from_parent)
        os.close(to_parent)
        self.stdin, self.stdout = open(to_child, "wb"), open(from_child, "rb")  # noqa: SIM115 - the supervisor's
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (3600 if timeout is None else timeout)
        while self.returncode is None:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired("a child", timeout or 0)
            else:
                time.sleep(0.002)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)


def main(tiny: str, root: str, weights: str, way: str, every: str, draws: str) -> None:
    import torch

    torch.set_num_threads(1)
    a_round = Round(tiny, Path(root), weights, way)
    began = time.monotonic()
    assert not a_round.end(a_round.begin("whole"))
    seconds = time.monotonic() - began
    wanted = a_round.whole("whole")
    points = (Path(root) / "whole" / "points").read_text().split()
    killed = resumed = 0
    for at in range(1, int(every) * len(points) + 1):
        name = f"at-{at}"
        dead = a_round.end(a_round.begin(name, at))
        if way == "in a child":  # which is started again by itself
            assert not dead
            assert a_round.whole(name) == wanted, (at, points[at - 1])
            card = json.loads((a_round.folder(name) / "edge_sdss.json").read_text())
            # Dead after the adapter had got its name, it is not missed: nothing had to be done again.
            resumed += len(card["stepped_down"])
            killed += 1
            continue
        assert dead, (at, points[at - 1])
        resumed += a_round.check(name, wanted)
        a_round.again(name, wanted)
        killed += 1
    moments = random.Random(0)
    for number in range(int(draws)):
        name = f"random-{number}"
        process = a_round.begin(name)
        time.sleep(moments.uniform(0, seconds))
        both = number % 2 == 1
        for pid in (*[process] * (both or not a_round.supervised), *children(process)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if a_round.end(process):
            a_round.check(name, wanted)
            a_round.again(name, wanted)
        assert a_round.whole(name) == wanted
    print(json.dumps({"points": points, "killed": killed, "resumed": resumed, "random": int(draws)}))


def children(process: int) -> list[int]:
    """What there is of them now."""
    paths = Path(f"/proc/{process}/task").glob("*/children")
    return [int(pid) for path in paths for pid in path.read_text().split()]


if __name__ == "__main__":
    main(*sys.argv[1:])
