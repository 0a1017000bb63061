"""What a person sees: progress on stderr, tables on stdout. Knows nothing of how results came about."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from edge_sdss import types
from edge_sdss.page.formats import size

if TYPE_CHECKING:
    from edge_sdss.readers import Reading
    from edge_sdss.report import RunReport

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_live: list[Progress] = []


@contextmanager
def progress() -> Iterator[types.Progress]:
    """Yields a `Progress` that draws bars on stderr; one that says nothing where stderr is no terminal."""
    if not err.is_terminal:
        yield types.no_progress
        return
    said = TextColumn("{task.description}"), TextColumn("{task.fields[detail]}", style="dim")
    columns = (said[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said[1])
    bars = Progress(*columns, console=err, transient=True)
    _live.append(bars)
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        bars.start()  # only now: a live display would wipe the questions of a verb that asks
        if stage not in tasks:
            for earlier in tasks.values():
                bars.update(earlier, visible=False)
            tasks[stage] = bars.add_task(stage, total=total or None, detail="")
        bars.update(tasks[stage], completed=done, total=total or None, visible=not total or done < total)

    try:
        yield report
    finally:
        bars.stop()
        _live.remove(bars)


def _quiet() -> None:
    """Takes the bars off the screen before something else is written; the next progress brings them back."""
    for bars in _live:
        bars.stop()


def emit(document: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Prints one JSON document, or its plain values as a table of two columns."""
    _quiet()
    if as_json:
        sys.stdout.write(json.dumps(document, ensure_ascii=False, default=str) + "\n")
        return
    grid = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for key, value in _flat(document):
        grid.add_row(key, Text(str(value)))
    out.print(grid)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], whole: Sequence[str] = ()) -> None:
    """Prints a table; texts of users are never read as markup. The columns `whole` are never cut."""
    _quiet()
    found = Table(title=title, title_justify="left", show_lines=False)
    for name in columns:
        found.add_column(name, no_wrap=name in whole, overflow="fold")
    for row in rows:
        found.add_row(*(Text(str(cell)) for cell in row))
    out.print(found)


def panel(title: str, body: str) -> None:
    """Prints a text in a frame."""
    out.print(Panel(Text(body), title=Text(title), title_align="left"))


def note(text: str) -> None:
    """Prints a line on stderr."""
    _quiet()
    err.print(Text(text), soft_wrap=True)


def event(told: Mapping[str, Any]) -> None:
    """Shows how a round goes beside its bar, and says on stderr what it gave up or was told."""
    if "step" in told:
        for bars in _live:
            for task in bars.tasks[-1:]:
                bars.update(task.id, detail=step_words(told["step"]))
    elif "held_out" in told:
        held = told["held_out"]
        note(f"Held-out loss {held['loss']:.3f} after step {held['step']}, lowest after step {held['best']}.")
    elif "stepped_down" in told:
        given = told["stepped_down"]
        note(f"Out of memory at step {given['step']} ({given['why']}): going on with {given['words']}.")
    elif "note" in told:
        note(told["note"])


def step_words(step: Mapping[str, Any]) -> str:
    """A step in words: its loss, its speed, and the peak of memory against the budget where there is one."""
    words = f"loss {step['loss']:.3f} · {step['tokens_per_s']:,.0f} tokens/s"
    if step["peak_bytes"] is not None:
        words += f" · peak {size(step['peak_bytes'])} of {size(step['budget_bytes'])}"
    return words


def decision(made: types.Decision) -> dict[str, Any]:
    """A decision as a document."""
    evicted = list(made.evicted.values())
    facts = {"seq": made.seq, "id": made.dialogue_id, "action": made.action, "domain": made.domain}
    return {**facts, **asdict(made.scores), "evicted": evicted, "reason": made.reason}


def exemplar(kept: types.Exemplar) -> dict[str, Any]:
    """A kept dialogue as a document, without its vector."""
    d = kept.dialogue
    facts = {"id": d.id, "seq": kept.seq, "domain": kept.domain, "eoe": kept.eoe, "dss": kept.dss}
    said = kept.annotation.answer if kept.annotation else None
    return {**facts, "prompt": d.prompt, "response": d.response, "time": d.time, "annotation": said}


def outcome(report: RunReport, folder: Path, as_json: bool) -> None:
    """Prints what came of a run: the report itself as JSON, or its figures and where the rest is."""
    if as_json:
        emit(report.model_dump(mode="json"), True)
        return
    for fact in (report.buffer, report.synthesis, report.tuning):
        if fact is not None:
            emit(fact.model_dump(), False, type(fact).__name__.removesuffix("Info"))
    if report.eval is not None:
        before, after = report.eval.before.model_dump(), report.eval.after.model_dump()
        rows = [[key, _number(before[key]), _number(after[key])] for key in before]
        table(f"Held out, n = {report.eval.n}", ["", "before", "after"], rows)
    from edge_sdss.report import headline

    out.print(Text(headline(report)))
    out.print(Text(f"Open {folder / 'report.html'}"))


def rejected(reading: Reading, aside: Path) -> None:
    """Says which records could not be used, and where they are."""
    for reject in reading.rejects[:3]:
        note(f"{reject.file}, {reading.unit} {reject.line}: {reject.reason}")
    if reading.rejected:
        note(f"{reading.rejected} unusable, {reading.accepted} dialogues read; all rejects are in {aside}")


def short(text: str, width: int = 60) -> str:
    """A text on one line, cut where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{key}".replace("_", " "), f"{value:.4f}" if isinstance(value, float) else value
