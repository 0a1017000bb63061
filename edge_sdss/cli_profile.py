"""The verbs that measure: profile, compare, doctor."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edge_sdss import console, options
from edge_sdss.errors import InputError, message
from edge_sdss.options import Home, Json, Model, Overwrite, Set, Settings

if TYPE_CHECKING:
    from edge_sdss.tree import Tree


def profile(
    chosen: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Cases; default: all.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("profile-out"),
    runs: Annotated[int | None, typer.Option("--runs", min=1, help="Blocks of repetitions of each case.")] = None,
    repetitions: Annotated[int | None, typer.Option("--repetitions", min=1, help="Of each case, at least.")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0, help="Of each case, at least.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One run of one second each: to try, not to compare.")] = False,
    prompt: Annotated[int | None, typer.Option("--prompt", min=1, help="Tokens of prefill.")] = None,
    new: Annotated[int | None, typer.Option("--new", min=2, help="Tokens of decode.")] = None,
    sensors: Annotated[str | None, typer.Option("--sensors", help="Those that must work, as a,b.")] = None,
    clocks: Annotated[
        Literal["observe", "require", "set"] | None,
        typer.Option("--clocks", help="require: stop where they are not locked; set: lock them, restore after."),
    ] = None,
    cool_to: Annotated[float | None, typer.Option("--cool-to", help="Wait before each run for so many °C.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the cases.")] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Record this board's sensors to DIR; no case.")
    ] = None,
    replay: Annotated[Path | None, typer.Option("--replay", help="Take the sensors from a recording.")] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Where /sys and /proc are, as in a container.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Energy of a phone's power trace; no case.")] = None,
    span: Annotated[
        str | None, typer.Option("--span", metavar="FROM:TO", help="With --trace: seconds from its beginning.")
    ] = None,
    items: Annotated[
        float | None, typer.Option("--items", min=0, help="With --trace: so many tokens, say, were done in the span.")
    ] = None,
    overwrite: Overwrite = False,
    model: Model = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Measure latency, energy and memory of what the product does, case by case.

    Exit 1 where a case failed; the others are in the report. Examples: edge-sdss profile;
    edge-sdss profile decode prefill --runs 10 --clocks require; edge-sdss profile --record my-board;
    edge-sdss profile --trace phone.csv --span 2.5:12.5 --items 640
    """
    from edge_sdss import cases
    from edge_sdss.tree import Tree

    if list_:
        console.emit({name: cases.about(name) for name in cases.names()}, json_)
        return
    if trace is not None:
        console.emit(_imported(trace, span, items), json_)
        return
    if (replay is not None) + (root is not None) > 1 or (record and replay):
        raise InputError(message("profile", "two of --record, --replay and --root", "choose one"))
    tree = Tree.of(replay) if replay else Tree(root) if root else Tree()
    if record is not None:
        console.emit(_recorded(record, tree, 10.0 if seconds is None else seconds), json_)
        console.note(f"Look through {record} before you give it away; edge-sdss profile --replay {record} runs on it.")
        return
    flags = {
        "runs": runs if runs or not quick else 1,
        "repetitions": repetitions if repetitions or not quick else 1,
        "seconds": seconds if seconds is not None or not quick else 1.0,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "clocks": clocks,
        "cool_c": cool_to,
    }
    settings = options.settings(settings_file, set_, {"profile": flags, "model": {"name": model}})
    from edge_sdss import profile as measuring
    from edge_sdss.profiling import files, markdown

    if (out / "report.json").exists() and not overwrite:
        raise InputError(message(f"write to {out}", "it holds a report", "choose another --out or pass --overwrite"))
    with console.progress() as progress:
        report = measuring.profile(
            chosen or [],
            settings,
            home=options.home(home),
            tree=tree,
            sensors=[name.strip() for name in sensors.split(",")] if sensors else None,
            command=shlex.join(["edge-sdss", *sys.argv[1:]]),
            progress=progress,
        )
    files.write(report, out)
    if json_:
        console.emit(report.model_dump(mode="json"), True)
    else:
        columns, rows = markdown.figures(report)
        console.table(markdown.title(report), columns, rows)
        console.note(markdown.footnote(report))
        for note in report.notes:
            console.note(note)
        console.note(f"Open {out / 'report.html'}")
    for name, problem in report.failed.items():
        console.note(f"{name} failed: {problem}")
    if report.failed:
        raise typer.Exit(1)


def _recorded(folder: Path, tree: Tree, seconds: float) -> dict[str, Any]:
    from edge_sdss.profiling import recording

    with console.progress() as progress:
        return recording.record(folder, tree, seconds, progress=progress)


def _imported(trace: Path, span: str | None, items: float | None) -> dict[str, Any]:
    from edge_sdss.profiling import imported

    try:
        start, _, end = (span or "").partition(":")
        ends = {"start_s": float(start or 0.0), "end_s": float(end or "inf")}
    except ValueError as error:
        raise InputError(message(f"read --span {span}", "no FROM:TO", "e.g. --span 2.5:12.5")) from error
    energy, seconds = imported.energy(trace, **ends, items=items)
    return {"trace": trace.name, "seconds": seconds, **energy.model_dump(mode="json")}


def compare(
    a: Annotated[Path, typer.Argument(help="Report, or its folder: what was before.")],
    b: Annotated[Path, typer.Argument(help="Report, or its folder: what is now.")],
    max_regress: Annotated[
        str | None, typer.Option("--max-regress", metavar="PERCENT", help="Exit 1 where b is surely worse by more.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say of each figure whether it got better or worse, surely, or whether it cannot be compared.

    Exit codes with --max-regress: 0 no regression beyond it, 1 a sure one, 2 incomparable.
    Example: edge-sdss compare before/ after/ --max-regress 5%
    """
    from edge_sdss.profiling import compare as comparing
    from edge_sdss.profiling import files

    limit = None if max_regress is None else options.share(max_regress)
    found = comparing.compare(files.load(a), files.load(b), max_regress=limit)
    if json_:
        console.emit(found.model_dump(mode="json"), True)
    else:
        columns, rows = comparing.table(found)
        console.table(f"{b} against {a}", columns, rows, whole=("test", "verdict"))
        for line in comparing.why(found):
            console.note(line)
    if limit is not None and (code := comparing.exit_code(found)):
        raise typer.Exit(code)


def doctor(
    root: Annotated[Path | None, typer.Option("--root", help="Where /sys and /proc are, as in a container.")] = None,
    replay: Annotated[Path | None, typer.Option("--replay", help="Examine a recorded board.")] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Check and measure the CUDA kernels on this device.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="With --selftest: the result's file.")] = Path("selftest.json"),
    overwrite: Overwrite = False,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Say what this board is, and of each sensor, backend and target: usable, or why not and how to mend it.

    Holds no serial numbers, names of users or hosts. Exit 1 where the main loop cannot run here.
    With --selftest: exit 1 where a kernel disagrees with NumPy, 2 without a driver.
    Examples: edge-sdss doctor; edge-sdss doctor --selftest --out orin-nano.json
    """
    from edge_sdss import doctor as examining
    from edge_sdss.tree import Tree

    if selftest:
        _selftest(Tree(root) if root else Tree(), out, overwrite, json_)
        return
    tree = Tree.of(replay) if replay else Tree(root) if root else Tree()
    found = examining.examine(tree, options.settings(settings_file, set_, {}))
    if json_:
        console.emit(found.model_dump(mode="json"), True)
    else:
        columns, rows = examining.rows(found)
        console.table("", columns, rows)
    if not found.usable:
        raise typer.Exit(1)


def _selftest(tree: Tree, out: Path, overwrite: bool, json_: bool) -> None:
    from edge_sdss import files
    from edge_sdss.doctor import selftest

    if out.exists() and not overwrite:
        raise InputError(message(f"write {out}", "it is there already", "choose another --out or pass --overwrite"))
    with console.progress() as progress:
        result = selftest.run(tree, progress)
    files.replace(out, result.model_dump_json(indent=1) + "\n")
    if json_:
        console.emit(result.model_dump(mode="json"), True)
    else:
        columns, rows = selftest.rows(result)
        title = f"{result.device.name}, sm_{result.device.compute_capability.replace('.', '')}"
        console.table(title, columns, rows)
    if result.device.interpreted:
        console.note("INTERPRETED on a CPU: this says nothing of a device.")
    console.note(f"{out} can be sent in; it names the device, its software and these figures, nothing else.")
    if not result.passed:
        raise typer.Exit(1)
