"""Whether clocks may vary while measuring: left alone, required to be locked, or locked for a while and put back.

`set` gives each cpu policy the governor `performance` and each, GPUs on the processor too, its upper limit as the
lower one. Upper limits, which belong to the power mode, stay. What was there before is written to a note on disk
first, so that it comes back after SIGKILL as well: the next start reads the note. Knows nothing of measuring.
Sources: kernel documentation, cpu-freq and ABI/testing/sysfs-class-devfreq.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from edge_sdss.errors import ConfigError, message
from edge_sdss.sensors import thermal
from edge_sdss.tree import Tree

Mode = Literal["observe", "require", "set"]

_POLICIES = "sys/devices/system/cpu/cpufreq/policy*"
_SIGNALS = ("SIGTERM", "SIGHUP")  # SIGINT unwinds by itself, as KeyboardInterrupt
_FIXED = ("performance", "userspace")
_LIMITS = ("min_freq", "max_freq", "governor")
# A note may be writable for others than root, and this module runs as root: it writes to no other file.
_OURS = re.compile(
    r"sys/(devices/system/cpu/cpufreq/policy\d+/scaling_(governor|min_freq)|class/devfreq/[^/]+/min_freq)"
)


@dataclass(frozen=True)
class Setting:
    """One file that is changed: what it held, and what it held after the change (None: not yet written)."""

    path: str
    before: str
    after: str | None = None

    def words(self) -> str:
        """Such as `policy0 scaling_governor: schedutil -> performance`."""
        device, file = self.path.split("/")[-2:]
        return f"{device} {file}: {self.before} -> {self.after}"


@contextmanager
def held(mode: Mode, tree: Tree, note: Path) -> Iterator[list[str]]:
    """Keeps the clocks as `mode` says within the block; yields what was changed, in words, and adds to it after.

    In every mode, what a killed run left behind in `note` is put back first. Raises ConfigError where `require`
    finds a clock that may vary, and where `set` may not or cannot write one (what it had set is back then), or
    cannot put one back at the end; the message has the way out.
    """
    words = [] if tree.recorded else restore(tree, note)
    if mode == "require":
        require(tree)
    if mode != "set":
        yield words
        return
    planned = _plan(tree)
    with _put_back_on_the_way_out(lambda: _put_back(tree, note)):
        try:
            words += _apply(planned, tree, note)
            yield words
        finally:
            words += _put_back(tree, note)
    if note.exists():
        raise ConfigError(message("put the clocks back", "; ".join(words), _by_hand(note)))


def require(tree: Tree) -> None:
    """Raises ConfigError that names each clock that may vary, with the command that locks them."""
    asked, loose = "measure with locked clocks", []
    for policy in tree.glob(_POLICIES):
        least, most, governor = (thermal.text(tree, f"{policy}/scaling_{name}") for name in _LIMITS)
        if governor != "performance" and (least is None or least != most):
            loose.append(f"{policy.split('/')[-1]} ({governor}, {least or '?'} to {most or '?'} kHz)")
    for path in thermal.devfreq(tree):
        folder, name = path.rsplit("/", 1)[0], path.split("/")[-2]
        least, most = (thermal.text(tree, f"{folder}/{limit}_freq") for limit in ("min", "max"))
        if thermal.text(tree, f"{folder}/governor") != "performance" and (least is None or least != most):
            loose.append(f"{name} ({least or '?'} to {most or '?'} Hz)")
    if loose:
        raise ConfigError(message(asked, f"not locked: {', '.join(loose)}", _lock(tree)))
    if not tree.glob(_POLICIES):
        do = "measure on a machine that shows its clocks, or with clocks = observe"
        raise ConfigError(message(asked, "no cpufreq policy, so it cannot be known", do))


def restore(tree: Tree, note: Path) -> list[str]:
    """Puts back what `note` says was changed, and removes it; returns what was done, in words.

    A file that someone else has changed meanwhile is left as it is. The note stays where a file cannot be
    written. Does nothing without a note. Raises ConfigError while the run that wrote it is alive.
    """
    found = _read_note(note)
    if found and found["started"] is not None and _started(found["pid"]) == found["started"]:
        asked = f"put back the clocks of {note}"
        raise ConfigError(message(asked, f"process {found['pid']} is using them", "wait until it ends"))
    return _put_back(tree, note)


def _put_back(tree: Tree, note: Path) -> list[str]:
    if not note.exists():
        return []
    found = _read_note(note)
    if found is None or found["boot"] != _boot(tree):
        note.unlink(missing_ok=True)
        why = "cannot be understood" if found is None else "is from before a restart, which put the clocks back"
        return [f"{note} {why}; it was removed"]
    words, failed = [], False
    for setting in reversed(found["settings"]):
        now = thermal.text(tree, setting.path)
        if now == setting.before:
            continue
        if setting.after is not None and now is not None and now != setting.after:
            words.append(f"{setting.path} is left at {now}: it was changed meanwhile")
            continue
        try:
            _write(tree, setting.path, setting.before)
            words.append(Setting(setting.path, now or "?", setting.before).words())
        except OSError as error:
            failed = True
            words.append(f"{setting.path} could not be put back to {setting.before}: {error.strerror}")
    if not failed:
        note.unlink(missing_ok=True)
    return words


def _plan(tree: Tree) -> list[tuple[Setting, str]]:
    """Each setting to change and the value it gets, governors first. Raises ConfigError where one may not."""
    asked = "set the clocks"
    if tree.recorded:
        raise ConfigError(message(asked, "these are a recording's", "replay with clocks = observe"))
    wanted: list[tuple[str, str | None]] = []
    for policy in tree.glob(_POLICIES):
        governors = (thermal.text(tree, f"{policy}/scaling_available_governors") or "performance").split()
        if "performance" in governors and thermal.text(tree, f"{policy}/scaling_governor") not in _FIXED:
            wanted.append((f"{policy}/scaling_governor", "performance"))
        wanted.append((f"{policy}/scaling_min_freq", thermal.text(tree, f"{policy}/scaling_max_freq")))
    for path in thermal.devfreq(tree, memory=False):
        folder = path.rsplit("/", 1)[0]
        wanted.append((f"{folder}/min_freq", thermal.text(tree, f"{folder}/max_freq")))
    if not wanted:
        raise ConfigError(message(asked, "no cpufreq policy or GPU to set", "use clocks = observe"))
    planned, refused = [], []
    for path, target in wanted:
        before = thermal.text(tree, path)
        if before is None or target is None or not os.access(tree.root / path, os.W_OK):
            refused.append(f"/{path}")
        elif before != target:
            planned.append((Setting(path, before), target))
    if refused:
        do = f"run as root, or {_lock(tree)} and use clocks = require"
        raise ConfigError(message(asked, f"may not write {', '.join(refused)}", do))
    return planned


def _apply(planned: Sequence[tuple[Setting, str]], tree: Tree, note: Path) -> list[str]:
    """Writes the note, then the files, then into the note what the files hold now, as a driver may round."""
    if not planned:
        return []
    try:
        _write_note(note, tree, [setting for setting, _ in planned])
    except OSError as error:
        found, do = f"{error.strerror} on {note}", "use a folder that can be written, or clocks = observe"
        raise ConfigError(message("note the clocks before they are set", found, do)) from error
    done = []
    for setting, target in planned:
        try:
            _write(tree, setting.path, target)
        except OSError as error:
            found = f"{error.strerror} on /{setting.path}"
            raise ConfigError(message("set the clocks", found, "use clocks = observe; what was set is back")) from error
        done.append(replace(setting, after=thermal.text(tree, setting.path) or target))
    _write_note(note, tree, done)
    return [setting.words() for setting in done]


@contextmanager
def _put_back_on_the_way_out(put_back: Callable[[], Any]) -> Iterator[None]:
    """Also on SIGTERM and SIGHUP, which else end Python without unwinding, and where the interpreter exits."""
    former: dict[int, Any] = {}

    def ended(number: int, frame: FrameType | None) -> None:
        if callable(former[number]):  # it raises, which unwinds, or goes on, with the clocks held
            former[number](number, frame)
            return
        try:
            put_back()
        finally:
            signal.signal(number, former[number])
            signal.raise_signal(signal.Signals(number))

    if threading.current_thread() is threading.main_thread():
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                former[number] = signal.getsignal(number)
                signal.signal(number, ended)
    atexit.register(put_back)
    try:
        yield
    finally:
        atexit.unregister(put_back)
        for number, handler in former.items():
            signal.signal(number, handler)


def _write(tree: Tree, path: str, value: str) -> None:
    if path in tree.faults:
        tree.text(path)
    number = os.open(tree.root / path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(number, f"{value}\n".encode())
    finally:
        os.close(number)


def _write_note(note: Path, tree: Tree, settings: Sequence[Setting]) -> None:
    """Whole or not at all, and on disk before any clock changes."""
    found = {"pid": os.getpid(), "started": _started(os.getpid()), "boot": _boot(tree)}
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f"{note.name}.new")
    with fresh.open("w", encoding="utf-8") as stream:
        json.dump(found | {"settings": [asdict(setting) for setting in settings]}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(note)


def _read_note(note: Path) -> dict[str, Any] | None:
    """None where there is none, or none that this module can have written."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        settings = [Setting(**each) for each in found["settings"]]
        ours = all(_OURS.fullmatch(setting.path) and isinstance(setting.before, str) for setting in settings)
        pid, started, boot = int(found["pid"]), found["started"], found["boot"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {"pid": pid, "started": started, "boot": boot, "settings": settings} if ours else None


def _boot(tree: Tree) -> str | None:
    return thermal.text(tree, "proc/sys/kernel/random/boot_id")


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None where there is no such process."""
    found = re.search(r"\)(?: \S+){19} (\d+)", thermal.text(Tree(), f"proc/{pid}/stat") or "")
    return found[1] if found else None


def _lock(tree: Tree) -> str:
    if tree.exists("etc/nv_tegra_release") or tree.exists("usr/bin/jetson_clocks"):
        return "lock them with `sudo jetson_clocks` (its --store keeps the former values)"
    return "lock them with `sudo cpupower frequency-set -g performance`"


def _by_hand(note: Path) -> str:
    return f"the former values are in {note}: write them as root, or restart the machine"
