"""What `export --explain` and `export --phone` do."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edge_sdss import console, default_model
from edge_sdss.errors import InputError, message

if TYPE_CHECKING:
    from edge_sdss import config
    from edge_sdss.bundles.recipes import Recipe
    from edge_sdss.bundling.explaining import Which
    from edge_sdss.types import Example


def run(
    settings: config.Config,
    recipe: Recipe,
    graph: Which,
    adapters: Mapping[str, Path],
    kept: Sequence[Example],
    out: Path,
    overwrite: bool,
    allowed: Collection[str],
    as_json: bool,
) -> None:
    """Writes OUT.explain.md and OUT.explain.json. Exit 1 where an output of the graph is wrong.

    Raises ExportError, after the report is written, where a node fell back that is not allowed to.
    """
    from edge_sdss import files
    from edge_sdss.bundling.explaining import explain_export
    from edge_sdss.exporting.explain import placement, report

    adapter = _one(adapters)
    written = {kind: out.with_name(f"{out.name}.explain.{kind}") for kind in ("md", "json")}
    if not overwrite and (there := next((file for file in written.values() if file.exists()), None)):
        raise InputError(message(f"write {there}", "it is there already", "choose another --out or pass --overwrite"))
    with console.progress() as progress:
        explained = explain_export(settings.model, recipe, graph=graph, adapter=adapter, kept=kept, progress=progress)
    found, placed = explained.found, explained.placed
    document = {"recipe": recipe.name, "notes": list(explained.notes), **report.document(found, placed)}
    title = f"{settings.model.name or default_model.NAME} for {recipe.name}, {graph}"
    files.replace(written["md"], report.markdown(title, found, placed, explained.notes))
    files.replace(written["json"], json.dumps(document, indent=1, allow_nan=False) + "\n")
    if as_json:
        console.emit(document, True)
    else:
        console.note(report.verdict(found, placed))
        if found.first and found.first.finding and found.first.finding.cause:
            for line in found.first.finding.cause.evidence:
                console.note(f"  {line}")
    console.note(f"Open {written['md']}")
    placement.check(placed, allowed)
    if any(pair.harmful for pair in found.pairs):
        raise typer.Exit(1)


def phone(
    settings: config.Config,
    recipe: Recipe,
    graph: Which,
    adapters: Mapping[str, Path],
    kept: Sequence[Example],
    out: Path,
    as_json: bool,
) -> None:
    """Writes the folder for a phone, and says what to do with it."""
    from edge_sdss.bundling.explaining import phone_folder

    with console.progress() as progress:
        made = phone_folder(
            settings.model, recipe, out, graph=graph, adapter=_one(adapters), kept=kept, progress=progress
        )
    told = json.loads((made / "cases.json").read_text(encoding="utf-8"))
    errors = [{name: file["emulated"] for name, file in case["outputs"].items()} for case in told["cases"]]
    console.emit({"phone": str(made), "binary": told["binary"], "emulated_errors": errors}, as_json)
    console.note(f"Copy {made} to the phone; there, python run.py or sh run.sh; then python compare.py, anywhere.")
    console.note("The limits come from the emulation; no device has run it.")


def _one(adapters: Mapping[str, Path]) -> Path | None:
    if len(adapters) > 1:
        given = f"{', '.join(adapters)} are given"
        raise InputError(message("look at an export", given, "give one --adapter, or --base-only"))
    return next(iter(adapters.values()), None)
