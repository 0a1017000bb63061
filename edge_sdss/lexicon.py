"""Domains and their word lists. Knows nothing of embeddings, scores over time or the buffer.

The default lists are categories of the `empath` package (Fast et al., CHI 2016), grouped into the
domains below; only its data file is read. A folder of `<domain>.txt` files replaces them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_sdss.errors import BackendUnavailable, ConfigError, message

GENERAL = "general"
"""The domain of a dialogue in which no list has a word."""

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "health": ("health", "medical_emergency", "pain", "injury", "healing", "body", "exercise", "sleep"),
    "emotion": ("sadness", "joy", "fear", "anger", "nervousness", "emotional", "love", "shame"),
    "food": ("cooking", "eating", "restaurant", "alcohol"),
    "home": ("home", "domestic_work", "furniture", "cleaning"),
    "family": ("family", "children", "friends", "wedding"),
    "animals": ("animal", "pet", "farming", "plant"),
    "work": ("office", "occupation", "blue_collar_job", "white_collar_job", "business", "tool"),
    "money": ("money", "banking", "payment", "economics", "shopping"),
    "leisure": ("sports", "music", "art", "dance", "reading", "hiking", "swimming", "play"),
    "travel": ("traveling", "air_travel", "vacation", "tourism", "vehicle", "sailing", "weather"),
    "technology": ("technology", "computer", "internet", "programming", "phone"),
    "learning": ("school", "college", "science", "writing"),
}

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """The case-folded word tokens of a text."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True, slots=True)
class Hits:
    """What the lists find in a text: per-domain counts, and the number n of its words."""

    counts: tuple[int, ...]
    words: int
    domain: str

    @property
    def dss(self) -> float:
        """DSS(T) = (1/m) sum_i |T ∩ l_i| / n, in [0, 1] (paper, eq. 2); 0 for a text without words."""
        return sum(self.counts) / (len(self.counts) * self.words) if self.words else 0.0


class Lexicon:
    """m word lists, one a domain. Terms of several words match as a phrase and count once."""

    def __init__(self, lists: Mapping[str, Iterable[str]]) -> None:
        """Takes the terms of each domain; raises ConfigError for no domain or an empty one."""
        self.domains = tuple(lists)
        if not self.domains:
            raise ConfigError(message("use a lexicon", "it has no domain", "give at least one list of words"))
        self._terms_from: dict[str, list[tuple[tuple[str, ...], int]]] = {}  # by first word
        digest = hashlib.sha256()
        for index, domain in enumerate(self.domains):
            terms = sorted({tuple(words(term.replace("_", " "))) for term in lists[domain]} - {()})
            if not terms:
                raise ConfigError(message(f"use domain {domain!r}", "its list is empty", "add one term a line"))
            for term in terms:
                self._terms_from.setdefault(term[0], []).append((term, index))
            digest.update(repr((domain, terms)).encode())
        self.digest = digest.hexdigest()

    def hits(self, text: str) -> Hits:
        """Counts |T ∩ l_i| with multiplicity; Dom(T) = argmax_i, or `general` where nothing matches."""
        tokens = words(text)
        counts = [0] * len(self.domains)
        for position, token in enumerate(tokens):
            if terms := self._terms_from.get(token):
                for index in {i for term, i in terms if term == tuple(tokens[position : position + len(term)])}:
                    counts[index] += 1
        most = max(counts)
        domain = self.domains[counts.index(most)] if most else GENERAL
        return Hits(tuple(counts), len(tokens), domain)


def load(folder: Path | None = None) -> Lexicon:
    """The default lexicon, or the one in a folder of `<domain>.txt` files (one term a line, `#` comments).

    Raises ConfigError where the folder holds no list, BackendUnavailable where `empath` is missing.
    """
    if folder is None:
        return Lexicon(_empath_lists())
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ConfigError(message(f"read lexicons from {folder}", "no .txt file there", "add <domain>.txt files"))
    return Lexicon({file.stem: _terms(file) for file in files})


def _terms(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(message(f"read lexicon {file}", str(error), "save it as UTF-8 text")) from error
    return [line for line in lines if not line.startswith("#")]


def categories() -> Lexicon:
    """The default lists without their grouping, a domain for each: finer topics. Raises what `load` raises."""
    terms = _empath_categories()
    return Lexicon({name: terms[name] for names in DOMAINS.values() for name in names})


def _empath_lists() -> dict[str, list[str]]:
    terms = _empath_categories()
    return {domain: [t for name in names for t in terms[name]] for domain, names in DOMAINS.items()}


def _empath_categories() -> dict[str, list[str]]:
    spec = importlib.util.find_spec("empath")  # finds the folder without importing its code
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable(message("use the default lexicon", "no `empath` here", "pip install empath"))
    table = Path(spec.submodule_search_locations[0]) / "data" / "categories.tsv"
    rows = (line.split("\t") for line in table.read_text(encoding="utf-8").splitlines())
    return {row[0]: row[1:] for row in rows}
