"""Versions of a bundle on a device, one of them active; deploying is all or nothing.

    bundles/
      lock                     held while something changes
      active                   a symlink to the version that serves; replaced by one rename
      0003-5f1c8a07/           a version: a bundle, and record.json, which says what it came after; never changed
                               but for an empty file, `served`, once it is or was active
      .….partial               a change under way, or what a killed one left: the next one takes it away

A new version is written and synchronised to the disk, verified and checked before its folder gets its name, and only
then is `active` switched. A process that is killed, a full disk or a loss of power at any moment leaves the old
version active or the new one, and both are whole. Files that did not change are hard links.

Knows nothing of what a bundle computes: `check` is given from outside.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from edge_sdss.bundles import _disk as disk
from edge_sdss.bundles import adapters
from edge_sdss.bundles import manifest as manifests
from edge_sdss.bundles import probe as probes
from edge_sdss.bundles.manifest import MANIFEST, AdapterEntry, Check, Manifest
from edge_sdss.errors import InputError, message
from edge_sdss.files import read_record

RECORD, SERVED, ACTIVE, LOCK = "record.json", "served", "active", "lock"
_VERSION = re.compile(r"(\d{4,})-[0-9a-f]{8}")
_PARTIAL = ".partial"

Checker = Callable[[Path], Sequence[Check]]
"""Looks at a bundle that is to be deployed: raises an error where it must not serve, or says what was measured."""


class Record(BaseModel):
    """What a version came after, and when. `previous` is what a rollback goes back to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["1"] = "1"
    previous: str | None = None
    deployed_at: str
    source: str


class Version(BaseModel):
    """A version on the shelf. `own_bytes` is what its removal would free: other versions share the rest."""

    model_config = ConfigDict(frozen=True)

    version: str
    is_active: bool
    previous: str | None
    deployed_at: str
    base: str
    adapter: str | None
    adapters: tuple[str, ...]
    size_bytes: int
    own_bytes: int


class Shelf:
    """The versions of a bundle below `<home>/bundles`. Safe to be used by several processes."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "bundles"

    def active(self) -> Path | None:
        """Returns the folder of the version that serves, by its own name: it stays that version's. None without one.

        Raises InputError where what is active is gone.
        """
        name = self._active_name()
        if name is None:
            return None
        if not _VERSION.fullmatch(name) or not (self.folder / name / MANIFEST).is_file():
            found = f"it is {name}, and that is no version there"
            raise InputError(message(f"find the active bundle of {self.folder}", found, "deploy a bundle"))
        return self.folder / name

    def deploy(self, source: Path, *, check: Checker | None = None) -> Version:
        """Makes a bundle the active one. Raises InputError where it is not whole, or cannot be written.

        What `check` raises is passed on; the version that was active before stays so.
        """
        with self._change(f"deploy {source}") as before:
            manifest = manifests.verify(source)
            with self._stage() as staged:
                self._fill(staged, manifest, source)
                return self._finish(staged, manifest, before, str(source.resolve()), check)

    def deploy_adapter(
        self,
        source: Path,
        name: str,
        *,
        activate: bool = True,
        trust: bool = False,
        check: Checker | None = None,
    ) -> Version:
        """Adds a PEFT folder to the active bundle, in the place of an adapter of this name: a new version.

        It is converted for the bundle's graph, and costs its own size. The folder's probe, if there is one, comes
        with it (`probe.PROBE`). `activate` makes it the adapter that serves; `trust` takes a folder that does not say
        of which base it is.
        Raises what `adapters.convert` does; InputError without an active bundle. What `check` raises is passed on.
        """
        with self._change(f"deploy adapter {source}") as before:
            if before is None:
                raise InputError(message(f"deploy adapter {source}", "no bundle is active", "deploy a bundle first"))
            manifest = manifests.verify(self.folder / before)
            with self._stage() as staged:
                entry = self._convert(source, manifest, staged, name, trust)
                others = tuple(one for one in manifest.adapters if one.name != name)
                measured = tuple(c for c in manifest.checks if c.stage != f"adapter {name}")
                active = name if activate else manifest.active
                update = {"adapters": (*others, entry), "active": active, "checks": measured}
                manifest = manifest.model_copy(update=update)
                self._fill(staged, manifest, self.folder / before)
                return self._finish(staged, manifest, before, str(source.resolve()), check)

    def rollback(self) -> Version:
        """Makes the version active that was so before the active one was deployed. Raises InputError without one."""
        with self._change("roll back") as before:
            previous = self._record(before).previous if before else None
            if previous is None or not (self.folder / previous).is_dir():
                found = "no bundle is active" if before is None else f"nothing came before {before}, or it was pruned"
                raise InputError(message("roll back", found, "deploy a bundle"))
            manifests.verify(self.folder / previous)
            self._switch(previous, before)
            return self._version(previous)

    def activate(self, version: str) -> Version:
        """Makes any version of the shelf active. Raises InputError where it is not there, or not whole."""
        with self._change(f"activate {version}") as before:
            if version not in self._names():
                known = ", ".join(self._names()) or "empty"
                raise InputError(message(f"activate {version}", f"the shelf is {known}", "name one of these"))
            manifests.verify(self.folder / version)
            self._switch(version, before)
            return self._version(version)

    def list(self) -> tuple[Version, ...]:
        """Every version, oldest first."""
        return tuple(self._version(name) for name in self._names())

    def prune(self, keep: int = 2) -> tuple[str, ...]:
        """Removes old versions until `keep` are left, and returns their names.

        The active version and the one that a rollback goes to always stay.
        """
        with self._change("prune") as active:
            previous = self._record(active).previous if active else None
            names = self._names()
            held = [name for name in names if name in (active, previous)]
            others = [name for name in names if name not in held]
            spare = max(keep - len(held), 0)
            gone = tuple(others[: len(others) - spare])
            for name in gone:
                self._discard(name)
            return gone

    def _active_name(self) -> str | None:
        link = self.folder / ACTIVE
        try:
            return os.readlink(link)
        except FileNotFoundError:
            return None
        except OSError:  # no symlink: a file with the name, where the filesystem has no links
            return link.read_text(encoding="utf-8").strip()

    def _names(self) -> Sequence[str]:
        found = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted((name for name in found if _VERSION.fullmatch(name)), key=_number)

    def _record(self, name: str) -> Record:
        return read_record(self.folder / name / RECORD, Record, "the record of a deployed bundle")

    def _version(self, name: str) -> Version:
        folder = self.folder / name
        manifest, record = manifests.load(folder), self._record(name)
        sizes = [os.stat(folder / path) for path in (*(e.path for e in manifest.entries), MANIFEST, RECORD)]
        return Version(
            version=name,
            is_active=name == self._active_name(),
            previous=record.previous,
            deployed_at=record.deployed_at,
            base=manifest.base,
            adapter=manifest.active,
            adapters=tuple(entry.name for entry in manifest.adapters),
            size_bytes=sum(size.st_size for size in sizes),
            own_bytes=sum(size.st_size for size in sizes if size.st_nlink == 1),
        )

    @contextmanager
    def _change(self, asked: str) -> Iterator[str | None]:
        """Holds the lock, takes away what a killed deploy left, and yields the active version's name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with disk.locked(self.folder / LOCK, asked):
                name = self._active_name()
                before = name if name in self._names() else None
                for name in os.listdir(self.folder):
                    if name.endswith(_PARTIAL) or (_VERSION.fullmatch(name) and not self._is_kept(name, before)):
                        self._discard(name)
                yield before
        except OSError as error:
            found = f"{error.strerror or error}" + (f" at {error.filename}" if error.filename else "")
            raise InputError(message(asked, found, "what was active still is; mend that and try again")) from error

    def _is_kept(self, name: str, active: str | None) -> bool:
        """Whether a version is or was active: a deploy that was killed before its switch left one that never was."""
        return name == active or (self.folder / name / SERVED).exists()

    def _discard(self, name: str) -> None:
        path = self.folder / name
        if path.is_symlink() or path.is_file():
            path.unlink()
            return
        if not name.endswith(_PARTIAL):  # half a version must not look like one
            partial = self.folder / f".{name}{_PARTIAL}"
            os.rename(path, partial)
            path = partial
        shutil.rmtree(path)

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        staged = self.folder / f".new{_PARTIAL}"
        staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _convert(self, source: Path, manifest: Manifest, staged: Path, name: str, trust: bool) -> AdapterEntry:
        entry = adapters.convert(source, manifest, staged, name, trust=trust)
        disk.sync(staged / entry.file.path)
        if not (source / probes.PROBE).is_file():
            return entry
        probes.read(source / probes.PROBE)
        path = f"probes/{name}.npz"
        disk.copy(source / probes.PROBE, staged / path)
        return entry.model_copy(update={"probe": manifests.entry(staged, path)})

    def _fill(self, staged: Path, manifest: Manifest, source: Path) -> None:
        """Puts every file in its place: a link to a version that has it, or a copy from `source`."""
        here = {}
        for name in self._names():
            for entry in manifests.load(self.folder / name).entries:
                here[entry.sha256, entry.size_bytes] = self.folder / name / entry.path
        for entry in manifest.entries:
            target = staged / entry.path
            if target.exists():
                continue  # the new adapter
            target.parent.mkdir(parents=True, exist_ok=True)
            known = here.get((entry.sha256, entry.size_bytes))
            if known is None or not disk.link(known, target):
                disk.copy(source / entry.path, target)

    def _finish(
        self, staged: Path, manifest: Manifest, before: str | None, source: str, check: Checker | None
    ) -> Version:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = Record(previous=before, deployed_at=now, source=source)
        disk.write(staged / RECORD, record.model_dump_json(indent=1) + "\n")
        manifests.write(staged, manifest)
        manifests.verify(staged)
        if check:
            measured = check(staged)
            stages = {one.stage for one in measured}
            kept = tuple(one for one in manifest.checks if one.stage not in stages)
            manifests.write(staged, manifest.model_copy(update={"checks": (*kept, *measured)}))
        for folder, _, _ in os.walk(staged, topdown=False):
            disk.sync(Path(folder))
        number = max((_number(name) for name in self._names()), default=0) + 1
        version = f"{number:04}-{manifests.entry(staged, MANIFEST).sha256[:8]}"
        os.rename(staged, self.folder / version)
        try:
            disk.sync(self.folder)
            self._switch(version, before)
        except BaseException:
            with suppress(OSError):
                if self._active_name() != version:
                    self._discard(version)
            raise
        return self._version(version)

    def _switch(self, version: str, before: str | None) -> None:
        """Marks both: what was never active is what a deploy left that was killed before its switch."""
        if before is not None:
            self._mark(before)
        disk.point(self.folder / ACTIVE, version, self.folder / f".{ACTIVE}{_PARTIAL}")
        with suppress(OSError):  # it is active: the next change marks it
            self._mark(version)

    def _mark(self, name: str) -> None:
        if not (self.folder / name / SERVED).exists():
            disk.write(self.folder / name / SERVED, "")
            disk.sync(self.folder / name)


def _number(name: str) -> int:
    return int(name.partition("-")[0])
