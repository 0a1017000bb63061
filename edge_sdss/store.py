"""What survives: offers, exemplars, annotations, variants, rounds, in one SQLite file.

Each offer is one transaction, so a kill at any moment loses at most the offer in flight. Write-ahead
logging keeps readers off the writer's way; `secure_delete` makes a forgotten text unreadable in the
file. Knows nothing of models, scores or policies.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

from edge_sdss import config
from edge_sdss.errors import ConfigError, InputError, message
from edge_sdss.types import Annotation, Answer, Decision, Dialogue, Exemplar, Scores, Turn, Variant

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS offers (
    seq INTEGER PRIMARY KEY, dialogue_id TEXT, action TEXT, domain TEXT, eoe REAL, dss REAL, idd REAL,
    slot INTEGER, evicted TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS exemplars (
    slot INTEGER PRIMARY KEY, dialogue_id TEXT UNIQUE, seq INTEGER, domain TEXT, eoe REAL, dss REAL,
    words INTEGER, vector BLOB, prompt TEXT, response TEXT, context TEXT, preferred TEXT,
    conversation TEXT, time TEXT, source TEXT, value REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS annotations (
    dialogue_id TEXT PRIMARY KEY, answer TEXT, preferred TEXT, asked TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS variants (
    dialogue_id TEXT, number INTEGER, prompt TEXT, response TEXT, rouge1 REAL, dropped TEXT,
    PRIMARY KEY (dialogue_id, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, state TEXT, start INTEGER, offers INTEGER, report TEXT, created TEXT,
    stale INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS trained (
    round INTEGER, dialogue_id TEXT, PRIMARY KEY (round, dialogue_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forgotten (dialogue_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS memory (part TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sources (source TEXT PRIMARY KEY, position INTEGER, chain TEXT) WITHOUT ROWID;
"""

SCHEMA_VERSION = 2

_MIGRATIONS = {1: "ALTER TABLE exemplars ADD COLUMN value REAL NOT NULL DEFAULT 0"}
"""What brings a file of a version to the next one, in the transaction that opens it."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of tuning, opened after `offers` offers, going on from the adapter of round `start`."""

    number: int
    state: Literal["running", "accepted", "rejected"]
    start: int | None
    offers: int
    report: Mapping[str, Any]
    created: str
    stale: bool


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals over the whole stream."""

    offers: int = 0
    kept: int = 0
    evicted: int = 0


def now() -> str:
    """The time in UTC, ISO 8601, seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def lock(home: Path) -> Iterator[None]:
    """Holds a home for one writing process; raises InputError where another one holds it."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            found = f"process {file.read() or '?'} is using it"
            raise InputError(message(f"use home {home}", found, "wait for it, or choose another --home")) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Store:
    """The SQLite file of a home."""

    def __init__(self, path: Path, settings: config.Store) -> None:
        """Opens or creates the file. Raises ConfigError where it is no store or a newer version's."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = settings.offer_log
        self._db = sqlite3.connect(path, isolation_level=None, cached_statements=256)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {settings.synchronous}")
            self._db.execute("PRAGMA secure_delete = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                found = f"its version is {version}, this program knows {SCHEMA_VERSION}"
                raise ConfigError(message(f"open {path}", found, "update edge_sdss"))
            with self.transaction():
                for old in range(version, SCHEMA_VERSION) if version else ():
                    self._db.execute(_MIGRATIONS[old])
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            raise ConfigError(message(f"open {path}", str(error), "move the file away")) from error
        self._totals = Counts(**self.meta("counts", {}))

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside happen together or not at all."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # meta

    def meta(self, key: str, default: Any = None) -> Any:
        """A value by key, as JSON; `default` where there is none."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else default

    def set_meta(self, key: str, value: Any) -> None:
        """Writes a value that JSON can hold."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    # offers

    @property
    def counts(self) -> Counts:
        """Totals over the whole stream, in O(1)."""
        return self._totals

    def record(self, decision: Decision, source: str | None = None, chain: str = "", position: int = 0) -> None:
        """Writes one offer, what it changed in the buffer, and how far its source has been read."""
        kept = decision.exemplar is not None
        old = self._totals
        totals = Counts(old.offers + 1, old.kept + kept, old.evicted + len(decision.evicted))
        with self.transaction():
            s = decision.scores
            evicted = json.dumps(list(decision.evicted.values())) if decision.evicted else None
            values = (
                decision.seq,
                decision.dialogue_id,
                decision.action,
                decision.domain,
                s.eoe,
                s.dss,
                s.idd,
            )
            self._db.execute(
                "INSERT INTO offers VALUES (?,?,?,?,?,?,?,?,?,?)",
                (*values, decision.slot, evicted, decision.reason),
            )
            self._db.execute("DELETE FROM offers WHERE seq <= ?", (decision.seq - self._log,))
            for gone in decision.evicted.values():
                self._drop(gone)
            if decision.exemplar is not None:
                self._insert(cast(int, decision.slot), decision.exemplar)
            self._remember(decision.remembered)
            if source is not None:
                self._db.execute("INSERT OR REPLACE INTO sources VALUES (?,?,?)", (source, position, chain))
            self.set_meta("counts", asdict(totals))
        self._totals = totals

    def source(self, source: str) -> tuple[int, str]:
        """How many dialogues of a source were offered, and the chained digest of their ids."""
        row = self._db.execute("SELECT position, chain FROM sources WHERE source = ?", (source,)).fetchone()
        return (row[0], row[1]) if row else (0, "")

    def decisions(self) -> Iterator[Decision]:
        """The newest decisions, oldest first, without the dialogues' text."""
        for row in self._db.execute("SELECT * FROM offers ORDER BY seq"):
            seq, dialogue_id, action, domain, eoe, dss, idd, slot, evicted, reason = row
            gone = dict(enumerate(json.loads(evicted))) if evicted else {}
            yield Decision(seq, dialogue_id, action, domain, Scores(eoe, dss, idd), reason, slot, gone)

    # what the policy remembers of the stream

    def memory(self) -> dict[str, bytes]:
        """Its parts by name; none where it has to begin anew."""
        return dict(self._db.execute("SELECT part, value FROM memory"))

    def remember(self, parts: Mapping[str, bytes]) -> None:
        """Replaces all of it."""
        with self.transaction():
            self._db.execute("DELETE FROM memory")
            self._remember(parts)

    def _remember(self, parts: Mapping[str, bytes]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO memory VALUES (?,?)", list(parts.items()))

    # exemplars

    def exemplars(self) -> dict[int, Exemplar]:
        """What is kept, by bin."""
        rows = self._db.execute(
            "SELECT e.*, a.answer, a.preferred FROM exemplars e LEFT JOIN annotations a USING (dialogue_id) "
            "ORDER BY slot"
        )
        return {row[0]: _exemplar(row) for row in rows}

    def rescore(self, kept: Mapping[int, Exemplar], identity: Mapping[str, str]) -> None:
        """Writes EOE and vector of all that is kept, by bin, together with what they are comparable under.

        What a policy remembers is of the old vectors, and goes.
        """
        with self.transaction():
            rows = [(exemplar.eoe, exemplar.vector, slot) for slot, exemplar in kept.items()]
            self._db.executemany("UPDATE exemplars SET eoe = ?, vector = ? WHERE slot = ?", rows)
            self._db.execute("DELETE FROM memory")
            self.set_meta("identity", dict(identity))

    def revalue(self, values: Mapping[int, float], kind: str | None) -> None:
        """Writes the values of all that is kept, by bin, together with what kind of value they are."""
        with self.transaction():
            rows = [(value, slot) for slot, value in values.items()]
            self._db.executemany("UPDATE exemplars SET value = ? WHERE slot = ?", rows)
            self.set_meta("values", kind)

    def _insert(self, slot: int, exemplar: Exemplar) -> None:
        d = exemplar.dialogue
        context = json.dumps([(turn.role, turn.text) for turn in d.context])
        scored = (slot, d.id, exemplar.seq, exemplar.domain, exemplar.eoe, exemplar.dss, exemplar.words)
        text = (d.prompt, d.response, context, d.preferred, d.conversation, d.time, d.source)
        row = (*scored, exemplar.vector, *text, exemplar.value)
        self._db.execute(f"INSERT INTO exemplars VALUES ({','.join('?' * len(row))})", row)

    def _drop(self, dialogue_id: str) -> None:
        """Removes an exemplar; that the user was asked about it stays, the answer's text does not."""
        self._db.execute("DELETE FROM exemplars WHERE dialogue_id = ?", (dialogue_id,))
        self._db.execute("DELETE FROM variants WHERE dialogue_id = ?", (dialogue_id,))
        self._db.execute("UPDATE annotations SET preferred = NULL WHERE dialogue_id = ?", (dialogue_id,))

    # annotations

    def annotate(self, dialogue_id: str, annotation: Annotation, asked: str | None = None) -> None:
        """Writes what the user said of a kept dialogue; variants of an older answer go."""
        with self.transaction():
            row = (dialogue_id, annotation.answer, annotation.preferred, asked or now())
            self._db.execute("INSERT OR REPLACE INTO annotations VALUES (?,?,?,?)", row)
            self._db.execute("DELETE FROM variants WHERE dialogue_id = ?", (dialogue_id,))

    def asked(self) -> dict[str, str]:
        """When the user was asked, by dialogue id; evicted dialogues included."""
        return dict(self._db.execute("SELECT dialogue_id, asked FROM annotations"))

    def forget(self, dialogue_id: str) -> list[int]:
        """Deletes a dialogue everywhere; returns the rounds that were trained on it, now marked stale.

        What a policy remembers of the stream goes as a whole: the dialogue has its part in it.
        """
        with self.transaction():
            self._drop(dialogue_id)
            self._db.execute("DELETE FROM memory")
            self._db.execute("DELETE FROM annotations WHERE dialogue_id = ?", (dialogue_id,))
            self._db.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (dialogue_id,))
            rows = self._db.execute("SELECT round FROM trained WHERE dialogue_id = ?", (dialogue_id,)).fetchall()
            stale = self._descendants(row[0] for row in rows)
            self._db.executemany("UPDATE rounds SET stale = 1 WHERE round = ?", [(number,) for number in stale])
            self._db.execute("DELETE FROM trained WHERE dialogue_id = ?", (dialogue_id,))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log held the text too
        return stale

    def answers(self) -> Counter[str]:
        """How often each answer was given, evicted dialogues included."""
        return Counter(row[0] for row in self._db.execute("SELECT answer FROM annotations"))

    def knows(self, dialogue_id: str) -> bool:
        """Whether a round was trained on a dialogue, or the user was asked about it."""
        query = "SELECT 1 FROM trained WHERE dialogue_id = ? UNION SELECT 1 FROM annotations WHERE dialogue_id = ?"
        return self._db.execute(query, (dialogue_id, dialogue_id)).fetchone() is not None

    def forgotten(self) -> set[str]:
        """Ids of the dialogues that the user asked to forget: they are never kept again."""
        return {row[0] for row in self._db.execute("SELECT dialogue_id FROM forgotten")}

    def _descendants(self, numbers: Iterable[int]) -> list[int]:
        """The rounds themselves and those whose adapter went on from them."""
        stale = set(numbers)
        for number, start in self._db.execute("SELECT round, start FROM rounds ORDER BY round"):
            if start in stale:
                stale.add(number)
        return sorted(stale)

    # variants

    def put_variants(self, made: Mapping[str, Sequence[Variant]]) -> None:
        """Writes all the variants of some exemplars, by dialogue id, together."""
        rows = [(key, i, v.prompt, v.response, v.rouge1, v.dropped) for key in made for i, v in enumerate(made[key])]
        with self.transaction():
            self._db.executemany("DELETE FROM variants WHERE dialogue_id = ?", [(key,) for key in made])
            self._db.executemany("INSERT INTO variants VALUES (?,?,?,?,?,?)", rows)

    def variants(self) -> dict[str, list[Variant]]:
        """The variants made so far, by dialogue id, dropped ones included."""
        found: dict[str, list[Variant]] = {}
        for dialogue_id, *rest in self._db.execute(
            "SELECT dialogue_id, prompt, response, rouge1, dropped FROM variants ORDER BY dialogue_id, number"
        ):
            found.setdefault(dialogue_id, []).append(Variant(dialogue_id, *rest))
        return found

    # rounds

    def open_round(self, start: int | None) -> Round:
        """The running round, or a new one that goes on from round `start`."""
        if running := [r for r in self.rounds() if r.state == "running"]:
            return running[0]
        row = ("running", start, self.counts.offers, "{}", now())
        cursor = self._db.execute("INSERT INTO rounds (state, start, offers, report, created) VALUES (?,?,?,?,?)", row)
        return self._round(cast(int, cursor.lastrowid))

    def close_round(self, number: int, accepted: bool, report: Mapping[str, Any], trained: Iterable[str]) -> None:
        """Ends a round: its adapter becomes the active one where accepted; its variants are not kept."""
        with self.transaction():
            state = "accepted" if accepted else "rejected"
            self._db.execute(
                "UPDATE rounds SET state = ?, report = ? WHERE round = ?", (state, json.dumps(report), number)
            )
            self._db.executemany("INSERT OR IGNORE INTO trained VALUES (?,?)", [(number, i) for i in trained])
            self._db.execute("DELETE FROM variants")
            if accepted:
                self.set_meta("active", number)

    def learnt(self) -> set[str]:
        """The dialogues that the accepted rounds were trained on."""
        query = "SELECT dialogue_id FROM trained JOIN rounds USING (round) WHERE state = 'accepted'"
        return {row[0] for row in self._db.execute(query).fetchall()}

    def tried(self) -> set[str]:
        """The dialogues that a round was trained on, whether or not it was accepted."""
        return {row[0] for row in self._db.execute("SELECT dialogue_id FROM trained").fetchall()}

    def rounds(self) -> list[Round]:
        """All rounds, oldest first."""
        return [self._round(row[0]) for row in self._db.execute("SELECT round FROM rounds ORDER BY round").fetchall()]

    def active_round(self) -> Round | None:
        """The round whose adapter serves; None for the base model."""
        number = self.meta("active")
        return None if number is None else self._round(number)

    def activate(self, number: int | None) -> None:
        """Makes an accepted round's adapter the active one; None for the base model."""
        self.set_meta("active", number)

    def _round(self, number: int) -> Round:
        row = self._db.execute("SELECT * FROM rounds WHERE round = ?", (number,)).fetchone()
        return Round(row[0], row[1], row[2], row[3], json.loads(row[4]), row[5], bool(row[6]))


def _exemplar(row: tuple[Any, ...]) -> Exemplar:
    _, _, seq, domain, eoe, dss, words, vector, prompt, response, context, preferred, *rest = row
    conversation, time, source, value, answer, wanted = rest
    turns = tuple(Turn(role, text) for role, text in json.loads(context))
    dialogue = Dialogue(prompt, response, turns, preferred, conversation, time, source)
    annotation = Annotation(cast(Answer, answer), wanted) if answer else None
    return Exemplar(dialogue, vector, domain, eoe, dss, words, seq, annotation, value)
