"""The verb that plans a round of tuning: what it takes of memory, and how it is cut so that it fits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from edge_sdss import config, console, device, options
from edge_sdss.errors import InputError, message
from edge_sdss.options import Json, Set, Settings

if TYPE_CHECKING:
    from edge_sdss.tuning.planner import Candidate, Plan
    from edge_sdss.tuning.shapes import Architecture

_MIB = 1 << 20

RESERVE = "1GiB"


def plan(
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="For the whole process, as 700MiB or 1.5GB.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A config.json, or a folder with one; default: SmolLM2-135M.")
    ] = None,
    board: Annotated[
        str | None, typer.Option("--board", help="A board's name or TOML file: never more than it has.")
    ] = None,
    reserve: Annotated[
        str, typer.Option("--reserve", metavar="SIZE", help="Of a board's memory, for its system and all else.")
    ] = RESERVE,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="TYPE", help="float32, bfloat16, int8, nf4, several as a,b, or auto."),
    ] = None,
    longest: Annotated[int | None, typer.Option("--longest", min=1, help="Tokens of the longest example.")] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", metavar="SIZE", help="Of Python and libraries; default: measured here.")
    ] = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Say whether and how a round of tuning fits into so much memory, and what each part of it takes.

    No weights and no torch are needed. Exit 2 where it cannot be, with the least that would do. Examples:
    edge-sdss plan --memory 700MiB --weights nf4; edge-sdss plan --model Llama-3.2-1B/config.json --board orin-nano-8gb
    --weights nf4
    """
    from edge_sdss.tuning import libraries, planner

    settings = options.settings(settings_file, set_, {"model": {"name": model}})
    board = board or device.emulated_board()
    budget, about = _budget(memory, board, reserve, settings.tuning.memory)
    name, architecture = _architecture(settings.model.name)
    found = planner.plan(
        architecture,
        budget,
        settings.tuning,
        runtime_bytes=options.size(runtime) if runtime else libraries.runtime_bytes(),
        weights=_weights(weights),
        loaded=settings.model.dtype,
        longest=longest,
    )
    if json_:
        console.emit({"model": name, "board": board, **_document(found)}, True)
        return
    console.table(f"{name} within {_mib(budget)} MiB", ["at the peak", "MiB"], _rows(found))
    texts = {"budget": about, **_choice(found)}
    console.emit({key: text for key, text in texts.items() if text}, False)


def budget_here(memory: str | None, default: int | None) -> int | None:
    """What a round may use here: what is given, on an emulated board never more than it has beside the reserve.

    None: no limit. Raises InputError as `plan` does.
    """
    board = device.emulated_board()
    if board is None:
        return options.size(memory) if memory else default
    return _budget(memory, board, RESERVE, default)[0]


def _budget(memory: str | None, board: str | None, reserve: str, default: int | None) -> tuple[int, str]:
    """What may be used, and in words where it comes from if not from --memory."""
    from edge_sdss import boards

    given = options.size(memory) if memory else default
    if board is None:
        if given is None:
            raise InputError(message("plan a round of tuning", "no budget", "give --memory SIZE or --board NAME"))
        return given, ""
    found = boards.load(board)
    usable = found.usable_bytes or found.memory_bytes
    if usable is None:
        if given is None:
            raise InputError(message(f"plan for board {board}", "its memory is not known", "give --memory SIZE"))
        return given, f"given for {found.name}, whose memory is not known"
    left = usable - options.size(reserve)
    if left < 1:
        do = f"give less than the {_mib(usable)} MiB that it has"
        raise InputError(message(f"plan for board {board}", f"--reserve {reserve} leaves nothing", do))
    if given is not None and given <= left:
        return given, f"given; {found.name} has {_mib(left)} MiB beside a reserve of {reserve}"
    return left, f"all that {found.name} has beside a reserve of {reserve}"


def _architecture(name: str | None) -> tuple[str, Architecture]:
    """The name and the sizes of a model, from its config.json."""
    from edge_sdss import default_model
    from edge_sdss.lm import loading
    from edge_sdss.tuning import shapes

    file = None if name is None else Path(name).expanduser()
    if file is None or not file.is_file():
        if file is None or not (file / "config.json").is_file():
            with console.progress() as progress:
                file = loading.find(name, progress)
        file = file / "config.json"
    shown = file.parent.name if file.name == "config.json" else file.stem
    return (shown if name else default_model.NAME), shapes.of(file)


def _weights(given: str | None) -> tuple[config.Weights, ...] | None:
    known: tuple[config.Weights, ...] = get_args(config.Weights)
    if given is None:
        return None
    if given == "auto":
        return tuple(kind for kind in known if kind != "as loaded")
    names = [name.strip() for name in given.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        do = f"choose from {', '.join(known)}, or auto"
        raise InputError(message(f"hold weights as {given}", f"{unknown[0]!r} is no type", do))
    return tuple(kind for kind in known if kind in names)


def _rows(found: Plan) -> list[list[str]]:
    parts, checkpointing = found.chosen.parts, found.fit.checkpointing
    calibrated = found.chosen.tensor_bytes - parts.peak_bytes
    sizes = {
        f"weights of the layers, {found.chosen.weights}": parts.weights,
        "embeddings, head, norms, biases": parts.embeddings,
        "adapter": parts.adapter,
        "its moments (Adam)": parts.optimizer,
        "its gradients": parts.gradients,
        "inputs of the layers" if checkpointing else "what the layers save": parts.kept,
        f"at the {parts.moment}": parts.working,
        "ids, positions, masks": parts.other,
        **({"by calibration": calibrated} if calibrated else {}),
        "tensors": found.chosen.tensor_bytes,
        "kernels and the tokenizer": found.chosen.untracked_bytes,
        "Python and libraries": found.runtime_bytes,
        "process": found.process_bytes,
    }
    return [[name, _mib(size)] for name, size in sizes.items()]


def _choice(found: Plan) -> dict[str, str]:
    ratio = found.chosen.tensor_bytes / found.limit_bytes
    texts = {
        "chosen": found.fit.words,
        "limit": f"{_mib(found.limit_bytes)} MiB of tensors, whatever the trainer; this is {ratio:.2f} of it",
        "next faster": "nothing: this is the fastest that the settings allow",
        "least": f"{_mib(found.least.needed_bytes + found.runtime_bytes)} MiB, {_words(found.least)}",
        "loading": "",
    }
    if found.faster is not None and found.speed_up is not None:
        needed = found.faster.needed_bytes + found.runtime_bytes
        texts["next faster"] = f"{_mib(needed)} MiB, about x {found.speed_up:.2f}: {_words(found.faster)}"
    loading = found.loading_bytes + found.runtime_bytes
    if loading > found.budget_bytes:
        texts["loading"] = f"takes {_mib(loading)} MiB for a moment, more than the budget, if done all at once"
    return texts


def _words(candidate: Candidate) -> str:
    return f"{candidate.fit.words}, weights {candidate.weights}"


def _document(found: Plan) -> dict[str, Any]:
    def one(candidate: Candidate) -> dict[str, Any]:
        return {
            "fit": asdict(candidate.fit),
            "weights": candidate.weights,
            "tensor_bytes": candidate.tensor_bytes,
            "untracked_bytes": candidate.untracked_bytes,
            "process_bytes": candidate.needed_bytes + found.runtime_bytes,
            "parts": asdict(candidate.parts),
        }

    return {
        "budget_bytes": found.budget_bytes,
        "runtime_bytes": found.runtime_bytes,
        "limit_bytes": found.limit_bytes,
        "loading_bytes": found.loading_bytes,
        "chosen": one(found.chosen),
        "faster": None if found.faster is None else one(found.faster),
        "speed_up": found.speed_up,
        "least": one(found.least),
    }


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}"
