"""Folders that appear whole or not at all, and the checkpoints of a round. Knows nothing of models.

A checkpoint is `step-NNNNNN/` with `tensors.safetensors`, `record.json` and `manifest.json` (the sha256 of
the other two). What is on the disk after a power cut is believed only where the manifest agrees.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 2
_FILES = ("record.json", "tensors.safetensors")


def publish(folder: Path, final: Path) -> None:
    """Renames `folder` to `final`, beside it, so that a crash leaves all of it there or nothing."""
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)
    os.rename(folder, final)
    _sync(final.parent)


def fresh(folder: Path) -> Path:
    """Returns `folder` as an empty folder; what an interrupted run left there is deleted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@dataclass(frozen=True)
class State:
    """All that the steps before `step` have left behind."""

    step: int
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one round, in `folder`. `key` names all that the round's result depends on."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self._key = key

    def newest(self) -> State | None:
        """Returns the newest valid checkpoint of this round; deletes what is newer and not one."""
        newest = None
        for path in self._paths():
            newest = self._read(path)
            if newest is not None:
                break
            shutil.rmtree(path)
        return newest

    def write(self, state: State) -> None:
        """Writes a checkpoint and deletes all but the last two. Tensors are copied to the CPU."""
        from safetensors.torch import save_file

        partial = fresh(self.folder / ".partial")
        save_file({name: _plain(tensor) for name, tensor in state.tensors.items()}, partial / "tensors.safetensors")
        record = {"key": self._key, "step": state.step, "record": state.record}
        (partial / "record.json").write_text(json.dumps(record), encoding="utf-8")
        manifest = {name: sha256(partial / name) for name in _FILES}
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        publish(partial, self.folder / f"step-{state.step:06d}")
        for path in self._paths()[_KEPT:]:
            shutil.rmtree(path)

    def put_best(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the weights after `step`, whole or not at all, until the round ends."""
        from safetensors.torch import save_file

        partial = self.folder / ".best.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: _plain(tensor) for name, tensor in tensors.items()}, partial)
        _sync(partial)
        os.rename(partial, self._best(step))
        _sync(self.folder)

    def best(self, step: int) -> dict[str, Tensor]:
        """Returns what `put_best` was given after `step`."""
        from safetensors.torch import load_file

        return load_file(self._best(step))

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:06d}.safetensors"

    def remove(self) -> None:
        """Deletes the checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _read(self, path: Path) -> State | None:
        from safetensors.torch import load_file

        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            if any(manifest[name] != sha256(path / name) for name in _FILES):
                return None
            found = json.loads((path / "record.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if found["key"] != self._key:
            return None
        return State(found["step"], load_file(path / "tensors.safetensors"), found["record"])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
