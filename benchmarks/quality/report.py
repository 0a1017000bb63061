"""Writes what the study found: tables in Markdown and drawings, from the file of results alone.

Knows nothing of how a cell was run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality import ledger, plots
from quality.analysis import Contrast, Line, contrast, differences, grouped, holm, mean, verdict
from quality.protocol import BASELINE, CONFIRMATION, FULL, MAIN_ORDERS, NONE, STANDS_FOR

DOCS = Path(__file__).resolve().parents[2] / "docs"
REFERENCES = (NONE, FULL)  # lines to read the others by; no hypothesis, so not corrected for
PAPERS, PAPERS_BASELINES = "sdss", ("random", "fifo", "kcenter")

Row = tuple[str, ...]
Setup = tuple[int, int | None, int, int | None, str]
PLAIN: Setup = (32, None, 0, None, "")
SYNTHESISED: Setup = (32, None, 3, None, "")


def newest(lines: Iterable[Line]) -> list[Line]:
    """The lines of the protocol that was run last, each cell once, its newest."""
    every = list(lines)
    if not every:
        return []
    last = max(every, key=lambda line: line["time"])["protocol"]
    cells = {tuple(line["cell"].values()): line for line in every if line["protocol"] == last}
    return list(cells.values())


def setup_of(line: Line) -> Setup:
    """Bins, bytes, variants, interval, and an order that has a table of its own: what is compared shares these."""
    cell = line["cell"]
    order = "" if cell["order"] in MAIN_ORDERS else cell["order"]
    return cell["bins"], cell["max_bytes"], cell["variants"], cell["interval"], order


def words_of(setup: Setup) -> str:
    """A setup in words."""
    bins, max_bytes, variants, interval, order = setup
    budget = f"{bins} bins" if max_bytes is None else f"{max_bytes:,} bytes"
    synthesis = f", {variants} variants of each" if variants else ""
    rounds = f", a round every {interval} offers" if interval else ""
    return budget + synthesis + rounds + (f", {order}" if order else "")


class Comparison:
    """All policies of one setup against one of them by set; `adjusted` has Holm's p by (set, policy, metric)."""

    def __init__(
        self, lines: Sequence[Line], metrics: Sequence[str] = ("nll", "rouge1"), baseline: str = BASELINE
    ) -> None:
        by = {name: grouped(own, lambda line: line["cell"]["policy"]) for name, own in _by_set(lines).items()}
        self.lines: Mapping[str, Mapping[str, list[Line]]] = by
        self.tables: dict[tuple[str, str, str], Any] = {}
        for name, policies in self.lines.items():
            for policy, own in policies.items():
                if policy == baseline or baseline not in policies:
                    continue
                for metric in metrics:
                    table = differences(own, policies[baseline], metric)
                    if table is not None:
                        self.tables[name, policy, metric] = table
        self.found = {key: contrast([table]) for key, table in self.tables.items()}
        self.adjusted: dict[tuple[str, str, str], float] = {}
        for metric in metrics:
            keys = [key for key in self.found if key[2] == metric and key[1] not in REFERENCES]
            self.adjusted.update(zip(keys, holm([self.found[key].p for key in keys]), strict=True))

    def pooled(self, policy: str, metric: str) -> Contrast | None:
        """Over all sets that have both the policy and the baseline; None where there is none."""
        tables = [table for (_, own, kind), table in self.tables.items() if (own, kind) == (policy, metric)]
        return contrast(tables) if tables else None

    @property
    def policies(self) -> list[str]:
        """In the order in which they first come, the references last."""
        names = dict.fromkeys(policy for own in self.lines.values() for policy in own)
        return sorted(names, key=lambda name: name in REFERENCES)


def _by_set(lines: Sequence[Line]) -> dict[str, list[Line]]:
    return grouped(lines, lambda line: line["cell"]["set"])


def table(columns: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (columns, ("---",) * len(columns), *rows))


def difference(found: Contrast | None, digits: int = 3) -> str:
    """The mean and its interval; empty where there is none."""
    if found is None:
        return ""
    return f"{found.mean:+.{digits}f} ({found.lo:+.{digits}f} to {found.hi:+.{digits}f})"


def set_rows(found: Comparison, name: str) -> Iterator[Row]:
    """One row a policy of a set."""
    for policy in [policy for policy in found.policies if policy in found.lines[name]]:
        own = found.lines[name][policy]
        cells = [policy, f"{mean(own, 'rouge1'):.3f}", difference(found.found.get((name, policy, "rouge1")))]
        cells += [f"{mean(own, 'nll'):.3f}", difference(found.found.get((name, policy, "nll")))]
        p = found.adjusted.get((name, policy, "nll"))
        contrast_ = found.found.get((name, policy, "nll"))
        cells += ["", ""] if p is None or contrast_ is None else [f"{p:.3f}", verdict(contrast_, p, "nll")]
        seconds = [sum(line["seconds"].get(part, 0.0) for part in ("select", "synthesise", "train")) for line in own]
        cells += [f"{sum(seconds) / len(own):.0f}", f"{sum(line['requests'] for line in own) / len(own):.0f}"]
        yield (*cells, str(len(own)))


COLUMNS = (
    "Policy", "ROUGE-1", f"− {BASELINE} (95 %)", "NLL", f"− {BASELINE} (95 %)", "p (Holm)", "NLL says",
    "seconds", "asked", "runs",
)  # fmt: skip


def summary(lines: Sequence[Line]) -> str:
    """The table of the README: every policy over all sets for design, of the plain setup."""
    design, _ = parted(newest(lines))
    return table(POOLED, pooled_rows(Comparison(design)))


def confirmation(lines: Sequence[Line]) -> str:
    """The same over the sets that had no part in a policy's design, and against the paper's policy; empty without."""
    _, confirming = parted(newest(lines))
    if not confirming:
        return ""
    against = Comparison(confirming, baseline=PAPERS)
    rows = [
        (*row, difference(against.pooled(row[0], "rouge1")), difference(against.pooled(row[0], "nll")))
        for row in pooled_rows(Comparison(confirming))
    ]
    return table((*POOLED, f"ROUGE-1 − {PAPERS} (95 %)", f"NLL − {PAPERS} (95 %)"), rows)


def parted(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """The plain setup's lines of the sets for design, and of those that confirm."""
    plain = [line for line in lines if setup_of(line) == PLAIN]
    return [line for line in plain if not _confirms(line)], [line for line in plain if _confirms(line)]


def _confirms(line: Line) -> bool:
    return line["cell"]["set"] in CONFIRMATION


def pooled_rows(found: Comparison) -> Iterator[Row]:
    """One row a policy over all sets, each counting the same."""
    shown = [policy for policy in found.policies if policy != BASELINE]
    pooled = {policy: found.pooled(policy, "nll") for policy in shown}
    tested = [policy for policy in shown if policy not in REFERENCES and pooled[policy]]
    adjusted = dict(zip(tested, holm([c.p for policy in tested if (c := pooled[policy])]), strict=True))
    for policy in shown:
        nll, p = pooled[policy], adjusted.get(policy)
        said = verdict(nll, p, "nll") if nll is not None and p is not None else ""
        sets = sum((name, policy, "nll") in found.tables for name in found.lines)
        runs = sum(len(found.tables.get((name, policy, "nll"), ())) for name in found.lines)
        yield policy, difference(found.pooled(policy, "rouge1")), difference(nll), said, f"{sets}", f"{runs}"


def synthesis_rows(lines: Sequence[Line]) -> Iterator[Row]:
    """What variants change, one row a set and policy, against the same runs of the same policy without any."""

    def told(line: Line) -> tuple[str, str]:
        return line["cell"]["set"], line["cell"]["policy"]

    without = grouped([line for line in lines if setup_of(line) == PLAIN], told)
    for key, own in grouped([line for line in lines if setup_of(line) == SYNTHESISED], told).items():
        tables = [differences(own, without.get(key, []), metric) for metric in ("rouge1", "nll")]
        cells = [difference(contrast([found])) if found is not None else "" for found in tables]
        yield (*key, *cells, f"{sum(line['examples'] for line in own) / len(own):.0f}", f"{len(own)}")


SYNTHESIS = ("Set", "Policy", "ROUGE-1 (95 %)", "NLL (95 %)", "examples", "runs")
SAID_OF_SYNTHESIS = (
    "Of three variants of each dialogue those that pass the check are trained on too, for as many epochs: more "
    "examples are more steps."
)
POOLED = (
    "Policy", f"ROUGE-1 − {BASELINE} (95 %)", f"NLL − {BASELINE} (95 %)", "NLL says", "sets", "pairs of runs",
)  # fmt: skip


def claim(found: Comparison) -> str:
    """The paper's claim, and what its comparison gives here."""
    rows = []
    for name, policies in found.lines.items():
        others = {p: mean(policies[p], "rouge1") for p in PAPERS_BASELINES if p in policies}
        if PAPERS not in policies or not others:
            continue
        ours, best = mean(policies[PAPERS], "rouge1"), max(others, key=lambda p: others[p])
        gain = f"{100 * (ours / others[best] - 1):+.1f} %" if others[best] else ""
        rows.append((name, f"{ours:.3f}", f"{others[best]:.3f} ({best})", gain))
    if not rows:
        return ""
    said = "The paper: ROUGE-1 up to 38 % higher than Random Replace, FIFO and K-Center. The same comparison here:\n\n"
    return said + table(("Set", PAPERS, "best of the three", f"{PAPERS} is higher by"), rows) + "\n"


def page(lines: Sequence[Line]) -> Iterator[str]:
    """The parts of the report, one after the other."""
    every = newest(lines)
    if not every:
        yield "# The study\n\nNo results yet: `make study`.\n"
        return
    last = max(every, key=lambda line: line["time"])
    yield "# Does the selection pay?\n\nWritten by `python benchmarks/study.py report`; not to be edited.\n\n"
    yield (
        f"Model {last['model']}, protocol {last['protocol']}, {len(every)} cells on {_all(every, 'device')}, commits "
        f"{_all(every, 'commit')}. NLL in nats per token of held-out answers, "
        "lower is better. Differences are paired with the baseline's run on the same stream and seed, item by "
        "item; runs and items are both resampled. `asked` counts annotation requests, `seconds` are of selecting "
        "(embedding included), synthesis and training. A tie is what is not shown to differ.\n\n"
    )
    design = [line for line in every if not _confirms(line)]
    for setup, own in sorted(grouped(design, setup_of).items(), key=lambda pair: pair[0] != PLAIN):
        yield from _setup(setup, own)
    if added := list(synthesis_rows(design)):
        said = f"{SAID_OF_SYNTHESIS}\n\n{table(SYNTHESIS, added)}"
        yield f"## What synthesis adds: with variants minus without\n\n{said}\n"
    if confirmed := confirmation(every):
        yield f"## Confirmation: {words_of(PLAIN)}, sets that had no part in the design of a policy\n\n{confirmed}\n"
        yield from _sets(Comparison(parted(every)[1]))
    for name, (_, alt) in plots.every(every).items():
        yield f"![{alt}](study-{name}.svg)\n\n"


def _all(lines: Sequence[Line], field: str) -> str:
    return ", ".join(dict.fromkeys(line[field] for line in lines))


def _setup(setup: Setup, lines: Sequence[Line]) -> Iterator[str]:
    found = Comparison(lines)
    yield f"## {words_of(setup)}\n\n"
    if setup == PLAIN:
        yield claim(found)
        yield "All sets together:\n\n" + table(POOLED, pooled_rows(found)) + "\n"
    yield from _sets(found)


def _sets(found: Comparison) -> Iterator[str]:
    for name, policies in found.lines.items():
        standing = f", standing for {STANDS_FOR[name]}" if name in STANDS_FOR else ""
        orders = dict.fromkeys(line["cell"]["order"] for own in policies.values() for line in own)
        yield f"### {name}{standing} ({', '.join(orders)})\n\n{table(COLUMNS, set_rows(found, name))}\n"


def write(results: Path, folder: Path) -> Path:
    """Writes study.md and its drawings; returns the page."""
    lines = ledger.read(results)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (drawing, _) in plots.every(newest(lines)).items():
        (folder / f"study-{name}.svg").write_text(drawing, encoding="utf-8")
    out = folder / "study.md"
    out.write_text("".join(page(lines)).rstrip("\n") + "\n", encoding="utf-8")
    return out


def all_lines(folder: Path) -> list[Line]:
    """The results of all devices under a folder of files."""
    return [line for file in sorted(folder.glob("*.jsonl")) for line in ledger.read(file)]
