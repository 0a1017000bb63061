"""What the verbs have in common: options, settings from file and flags, the session, a whole experiment."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import platformdirs
import typer

from edge_sdss import config, console
from edge_sdss.config import Config
from edge_sdss.errors import ConfigError, InputError, message
from edge_sdss.types import Annotation

if TYPE_CHECKING:
    from edge_sdss.experiment import Stream
    from edge_sdss.runtime import Engine
    from edge_sdss.session import Session

Home = Annotated[Path | None, typer.Option("--home", envvar="EDGE_SDSS_HOME", help="Folder of the state.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Settings = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.NAME=VALUE", help="Change any setting.")]
Model = Annotated[str | None, typer.Option("--model", help="Hugging Face folder; default: the embedded SmolLM2-135M.")]
Format = Annotated[str | None, typer.Option("--format", help="Insist on a format instead of detecting it.")]
Bundle = Annotated[Path | None, typer.Option("--bundle", help="Folder of a bundle; default: the home's active one.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for report.json, report.html and adapter/.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds an earlier run.")]
Policy = Annotated[str | None, typer.Option("--policy", help="Which dialogues are kept.")]
Bins = Annotated[int | None, typer.Option("--bins", help="Entries of the buffer.")]
MaxBytes = Annotated[int | None, typer.Option("--max-bytes", help="Bytes of the buffer.")]
Backend = Annotated[str | None, typer.Option("--backend", help="auto, numpy, torch or cuda.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every draw.")]
TrainOn = Annotated[str | None, typer.Option("--train-on", help="accepted (what the user approved) or all.")]


def settings(file: Path | None, sets: Sequence[str] | None, flags: Mapping[str, Mapping[str, Any]]) -> Config:
    """The settings: defaults, then the TOML file, then --set, then the verb's own flags."""
    found = config.load(file)
    for assignment in sets or ():
        name, equals, value = assignment.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise ConfigError(message(f"read --set {assignment}", "no SECTION.NAME=VALUE", "e.g. tuning.rank=16"))
        found = found.override({section: {key: _value(value.strip())}})
    return found.override(flags)


def flags(
    policy: str | None,
    bins: int | None,
    max_bytes: int | None,
    backend: str | None,
    train_on: str | None,
    seed: int | None,
    model: str | None,
) -> dict[str, dict[str, Any]]:
    """The flags that several verbs share, by section; --seed sets every section's seed."""
    return {
        "selection": {"policy": policy, "backend": backend, "seed": seed},
        "buffer": {"bins": bins, "max_bytes": max_bytes},
        "review": {"train_on": train_on},
        "synthesis": {"seed": seed},
        "tuning": {"seed": seed},
        "evaluation": {"seed": seed},
        "model": {"name": model},
    }


def home(given: Path | None) -> Path:
    """The folder of the state: the one given, or the platform's place for application data."""
    return given or Path(platformdirs.user_data_dir("edge_sdss", appauthor=False))


def share(text: str) -> float:
    """A share from a text such as 5% or 0.05. Raises InputError for anything else, and below 0."""
    try:
        found = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise InputError(message(f"read {text!r}", "no share", "write 5% or 0.05"))
    return found


def size(text: str) -> int:
    """Bytes from a text such as 700MiB, 1.5GB or 4096. Raises InputError for anything else, and below 1."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) *(?:([kmgt])(i?)b?|b)?", text.strip(), re.IGNORECASE)
    count = 0
    if found:
        number, prefix, binary = found.groups()
        power = " kmgt".index(prefix.lower()) if prefix else 0
        count = int(float(number) * (1024 if binary else 1000) ** power)
    if count < 1:
        raise InputError(message(f"read {text!r}", "no size", "write 700MiB, 1.5GB or a number of bytes"))
    return count


def quantity(text: str, units: Mapping[str, float], example: str) -> float:
    """A number above 0 with one of the units, in that of factor 1. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) *([A-Za-z]+)", text.strip())
    value = float(found[1]) * units.get(found[2], 0.0) if found else 0.0
    if value <= 0:
        raise InputError(message(f"read {text!r}", "no quantity", f"write {example}; units: {', '.join(units)}"))
    return value


SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
JOULES = {"J": 1.0, "kJ": 1e3, "Wh": 3600.0}


def fresh(path: Path) -> Path:
    """A path of ours, without what an earlier call left there."""
    path.unlink(missing_ok=True)
    return path


def engine(given_home: Path | None, bundle: Path | None) -> Engine | None:
    """The bundle that embeds: the one given, or without torch the home's active one; None: the torch model does."""
    from edge_sdss import speakers
    from edge_sdss.runtime import Engine

    found = bundle if speakers.has_torch() else speakers.bundle(home(given_home), bundle)
    return Engine.open(found) if found else None


@contextmanager
def session(given: Path | None, found: Config, lm: Engine | None = None) -> Iterator[Session]:
    """Opens the session of a home, with progress on the terminal; an engine stands in for the torch model."""
    from edge_sdss.session import Session

    with (
        console.progress() as progress,
        Session(home(given), found, lm=lm, progress=progress, on_event=console.event) as opened,
    ):
        yield opened


def annotation(accept: bool, edit: str | None, skip: bool) -> Annotation:
    """The answer that the flags of `review` give; exactly one is needed."""
    if accept + (edit is not None) + skip != 1:
        raise InputError(
            message("answer a dialogue", "none or several answers", "give --accept, --edit TEXT or --skip")
        )
    return Annotation("edit", edit) if edit is not None else Annotation("accept" if accept else "skip")


def experiment(
    read: Callable[[], Stream],
    out: Path,
    found: Config,
    overwrite: bool,
    title: str,
    given_home: Path | None,
    as_json: bool,
    annotate: bool = True,
) -> None:
    """Runs the loop on a stream, writes --out and prints the outcome; exit 1 where the gate rejects."""
    from edge_sdss import experiment as exp

    if (out / "report.json").exists():
        if not overwrite:
            do = "choose another --out or pass --overwrite"
            raise InputError(message(f"write to {out}", "it holds a finished run", do))
        exp.clear(out)
    stream = read()
    with session(given_home or out / "home", found) as opened:
        if not as_json:
            console.note(f"{title}: {len(stream.offered)} dialogues, {len(stream.held_out)} held out")
        outcome = exp.run(opened, stream, annotate=annotate)
        command = shlex.join(["edge-sdss", *sys.argv[1:]])
        report = exp.build_report(opened, stream, outcome, title=title, command=command)
        exp.save(report, outcome, out)
    console.outcome(report, out, as_json)
    if report.gate and not report.gate.accepted:
        raise typer.Exit(1)


def _value(text: str) -> Any:
    """A value as TOML reads it; a bare word is a text."""
    try:
        return config.parse(f"value = {text}")["value"]
    except ValueError:
        return text
