"""The command line: verbs only. Each one opens a session, calls it and prints what came of it."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import click
import typer

from edge_sdss import (
    __version__,
    cli_bundle,
    cli_chat,
    cli_device,
    cli_plan,
    cli_profile,
    cli_service,
    console,
    options,
)
from edge_sdss.errors import EdgeSdssError, InputError, message
from edge_sdss.options import (
    Backend,
    Bins,
    Bundle,
    Format,
    Home,
    Json,
    MaxBytes,
    Model,
    Out,
    Overwrite,
    Policy,
    Seed,
    Set,
    Settings,
    TrainOn,
)

app = typer.Typer(
    name="edge-sdss",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Learn from the user of a device, on the device: select, ask, synthesise, tune, gate.

    State lives in --home; nothing is sent anywhere. Exit codes: 0 done, 1 a round was rejected by the
    gate, 2 an error, 130 stopped with Ctrl-C (the same command goes on where it stopped).
    """
    if version:
        typer.echo(__version__)


@app.command()
def demo(
    out: Out = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer dialogues, variants and epochs.")] = False,
    overwrite: Overwrite = False,
    model: Model = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Watch an assistant become one user's own, in about ten minutes on two cores.

    Example: edge-sdss demo --out demo-out
    """
    from edge_sdss import demo as data

    quick_settings = ["synthesis.variants=1", "tuning.epochs=2", "evaluation.rouge_items=8"] if quick else []
    settings = options.settings(None, [*quick_settings, *(set_ or [])], {"model": {"name": model}})
    options.experiment(lambda: data.stream(quick), out, settings, overwrite, "edge_sdss demo", None, json_)


@app.command()
def run(
    stream: Annotated[str, typer.Option("--stream", help="File of dialogues, or - for stdin.")],
    out: Out = Path("run-out"),
    first: Annotated[int | None, typer.Option("--first", min=2, help="Read only the first N dialogues.")] = None,
    holdout: Annotated[float | None, typer.Option("--holdout", help="Share of the stream held out.")] = None,
    interval: Annotated[int | None, typer.Option("--interval", help="Offers between rounds.")] = None,
    annotate: Annotated[
        Literal["stream", "none"],
        typer.Option("--annotate", help="stream: its own responses answer the review."),
    ] = "stream",
    policy: Policy = None,
    bins: Bins = None,
    max_bytes: MaxBytes = None,
    backend: Backend = None,
    train_on: TrainOn = None,
    seed: Seed = None,
    model: Model = None,
    format_: Format = None,
    home: Annotated[Path | None, typer.Option("--home", help="Folder of the state; default: OUT/home.")] = None,
    overwrite: Overwrite = False,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Run the whole loop on a stream of dialogues and measure it on held-out ones.

    Example: edge-sdss run --stream chats.jsonl --first 400 --out report
    """
    from edge_sdss import experiment, readers

    flags = options.flags(policy, bins, max_bytes, backend, train_on, seed, model)
    settings = options.settings(settings_file, set_, {**flags, "tuning": {**flags["tuning"], "interval": interval}})
    settings = settings.override({"evaluation": {"holdout": holdout}})

    def read() -> experiment.Stream:
        rejects = options.fresh(out / "rejects.jsonl")
        reading = readers.read(stream, settings=settings.reading, format=format_, rejects=rejects)
        found = experiment.read(reading, settings.evaluation, first)
        console.rejected(reading, rejects)
        return found

    options.experiment(
        read,
        out,
        settings,
        overwrite,
        f"edge_sdss run on {Path(stream).name}",
        home,
        json_,
        annotate == "stream",
    )


@app.command()
def observe(
    file: Annotated[str | None, typer.Argument(help="File of dialogues, or - for stdin.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Offer one dialogue: what the user said.")] = None,
    response: Annotated[str, typer.Option("--response", help="What the assistant answered.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Offer a file anew that was offered before.")] = False,
    rejects: Annotated[Path | None, typer.Option("--rejects", help="Where unusable records are written.")] = None,
    policy: Policy = None,
    bins: Bins = None,
    max_bytes: MaxBytes = None,
    backend: Backend = None,
    seed: Seed = None,
    model: Model = None,
    bundle: Bundle = None,
    format_: Format = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Offer dialogues to the buffer; a file that was stopped half-way goes on where it stopped.

    The torch model embeds them, or with --bundle, and where torch is not installed, a bundle.
    Examples: edge-sdss observe chats.jsonl; edge-sdss observe --prompt "My cat eats no fish" --response "Noted."
    """
    from edge_sdss import readers

    if (file is None) == (prompt is None):
        raise InputError(message("observe", "no input, or two", "give a FILE, or --prompt with --response"))
    settings = options.settings(settings_file, set_, options.flags(policy, bins, max_bytes, backend, None, seed, model))
    with options.session(home, settings, options.engine(home, bundle)) as session:
        if prompt is not None:
            dialogue = readers.one(prompt, response, "command line")
            console.emit(console.decision(session.observe(dialogue)), json_)
            return
        aside = rejects or options.fresh(options.home(home) / "rejects" / f"{Path(str(file)).name}.jsonl")
        reading = readers.read(str(file), settings=settings.reading, format=format_, rejects=aside)
        source = None if file == "-" or again else str(Path(str(file)).resolve())
        before = session.store.counts
        kept = []
        for decision in session.observe_all(reading, source):
            session.progress("observing", decision.seq - before.offers, 0)
            kept += [console.decision(decision)] if decision.action == "kept" else []
        after = session.store.counts
        counts = {key: value - asdict(before)[key] for key, value in asdict(after).items()}
        read = {"format": reading.format, "read": reading.accepted, "rejected": reading.rejected}
        read |= {"skipped": reading.skipped, "unusable": len(session.unusable)}
        console.emit({**read, **counts, "in_buffer": len(session.selector.buffer), "decisions": kept}, json_)
        console.rejected(reading, aside)
        for problem in session.unusable[:3]:
            console.note(problem)
        if session.round_due:
            console.note("A round is due: edge-sdss review, then edge-sdss tune.")


@app.command()
def review(
    dialogue_id: Annotated[str | None, typer.Argument(help="Answer one dialogue by its id, without questions.")] = None,
    accept: Annotated[bool, typer.Option("--accept", help="The response was right.")] = False,
    edit: Annotated[str | None, typer.Option("--edit", help="What the response should have been.")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Do not ask again.")] = False,
    from_stream: Annotated[bool, typer.Option("--from-stream", help="Let the stream's own responses answer.")] = False,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Say of the kept dialogues whether the response was right; a few a day, none twice.

    Examples: edge-sdss review; edge-sdss review 17bce1a26cb9a0ae --edit "In metric, please: 2 m."
    """
    from edge_sdss.review import ask

    with options.session(home, options.settings(settings_file, set_, {})) as session:
        if from_stream:
            console.emit({"answered": session.annotate_from_stream()}, json_)
        elif dialogue_id is not None:
            annotation = options.annotation(accept, edit, skip)
            session.annotate(dialogue_id, annotation)
            console.emit({"id": dialogue_id, **asdict(annotation)}, json_)
        elif json_:
            console.emit({"pending": [console.exemplar(e) for e in session.pending()]}, True)
        else:
            ask(session)


@app.command()
def synth(
    show: Annotated[int, typer.Option("--show", min=0, help="How many originals to print with their variants.")] = 3,
    model: Model = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Let the model write variants of the annotated dialogues, for the next round.

    Example: edge-sdss synth --set synthesis.variants=5
    """
    with options.session(home, options.settings(settings_file, set_, {"model": {"name": model}})) as session:
        tally = session.synthesise()
        variants = session.store.variants()
        shown = {e.dialogue_id: e for e in session.examples(held_out=False) if e.dialogue_id in variants}
        rows = [
            [kind, console.short(prompt, 60), console.short(answer, 70), fate]
            for key, e in list(shown.items())[: 0 if json_ else show]
            for kind, prompt, answer, fate in [
                ("original", e.messages[-1].text, e.answer, ""),
                *(
                    ("variant", v.prompt, v.response, v.dropped or f"kept, ROUGE-1 {v.rouge1:.2f}")
                    for v in variants[key]
                ),
            ]
        ]
        made = [asdict(v) for found in variants.values() for v in found]
        console.emit({**asdict(tally), "dropped": tally.dropped, "variants": made}, json_)
        if rows:
            console.table("Variants", ["", "prompt", "response", "fate"], rows)


@app.command()
def tune(
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Budget, as 700MiB; trains in its own process.")
    ] = None,
    train_on: TrainOn = None,
    model: Model = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Run a round: missing variants, LoRA, the gate; activate the adapter if it passes. Exit 1 if not.

    With --memory the fastest way that fits is planned, see `edge-sdss plan`; where memory is taken away all the
    same, the step is done again with less. Examples: edge-sdss tune --set tuning.epochs=2; edge-sdss tune
    --memory 700MiB --set tuning.weights=nf4
    """
    flags: dict[str, dict[str, object]] = {"model": {"name": model}, "review": {"train_on": train_on}}
    settings = options.settings(settings_file, set_, flags)
    settings = settings.override({"tuning": {"memory": cli_plan.budget_here(memory, settings.tuning.memory)}})
    with options.session(home, settings) as session:
        adapted = session.adapt()
        tuned, verdict = adapted.tuned, adapted.verdict
        facts = {k: v for k, v in asdict(tuned).items() if k != "losses"}
        losses = [asdict(step) for step in tuned.losses]
        console.emit({"round": adapted.number, **facts, "gate": asdict(verdict), "losses": losses}, json_)
        if not verdict.accepted:
            console.note("The previous adapter stays active; the new one is kept aside.")
            raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    data: Annotated[str, typer.Argument(help="File of held-out dialogues.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="PEFT folder; default: the active adapter.")] = None,
    model: Model = None,
    format_: Format = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Measure the base model and an adapter on held-out dialogues: NLL, ROUGE, with intervals.

    Example: edge-sdss eval heldout.jsonl
    """
    from edge_sdss import experiment, readers

    settings = options.settings(settings_file, set_, {"model": {"name": model}})
    with options.session(home, settings) as session:
        reading = readers.read(data, settings=settings.reading, format=format_)
        examples = experiment.held_out_examples(list(reading))
        used = adapter or session.active_adapter
        before = experiment.evaluate(session, examples, None)
        after = experiment.evaluate(session, examples, used) if used else before
        compared = experiment.compare(before, after)
        console.emit({"adapter": str(used) if used else None, **compared.model_dump(mode="json")}, json_)


@app.command()
def status(home: Home = None, settings_file: Settings = None, set_: Set = None, json_: Json = False) -> None:
    """Show what is kept and why, what was asked, the rounds and the active adapter.

    Example: edge-sdss status --json
    """
    with options.session(home, options.settings(settings_file, set_, {})) as session:
        store = session.store
        active = store.active_round()
        rounds = [{k: v for k, v in asdict(r).items() if k != "report"} for r in store.rounds()]
        reasons = {d.seq: d.reason for d in store.decisions() if d.action == "kept"}
        kept = [
            {"slot": slot, **console.exemplar(e), "reason": reasons.get(e.seq, "")}
            for slot, e in store.exemplars().items()
        ]
        facts = {**asdict(store.counts), "in_buffer": len(kept), "pending_reviews": len(session.pending())}
        serving = {"active_round": active.number if active else None, "stale": bool(active and active.stale)}
        console.emit({**facts, **serving, "rounds": rounds, "buffer": kept}, json_)
        if kept and not json_:
            rows = [
                [
                    e["slot"],
                    e["id"],
                    e["domain"],
                    e["annotation"] or "",
                    console.short(e["prompt"]),
                    e["reason"],
                ]
                for e in kept
            ]
            console.table("Kept", ["bin", "id", "domain", "said", "prompt", "why"], rows)


@app.command()
def forget(
    dialogue_id: Annotated[str, typer.Argument(help="Id of the dialogue, as `status` shows it.")],
    home: Home = None,
    settings_file: Settings = None,
    json_: Json = False,
) -> None:
    """Delete a dialogue, its vector, its annotation and variants; mark adapters trained on it as stale.

    Example: edge-sdss forget 17bce1a26cb9a0ae
    """
    with options.session(home, options.settings(settings_file, None, {})) as session:
        stale = session.forget(dialogue_id)
        console.emit({"forgotten": dialogue_id, "stale_rounds": stale}, json_)
        active = session.store.active_round()
        if active and active.stale:
            do = "`edge-sdss tune` trains a new one from the base model; `edge-sdss rollback` leaves it now."
            console.note(f"The active adapter (round {active.number}) was trained on it: {do}")


@app.command()
def rollback(
    bundle: Annotated[bool, typer.Option("--bundle", help="The deployed bundle before, not the round.")] = False,
    home: Home = None,
    settings_file: Settings = None,
    json_: Json = False,
) -> None:
    """Make the adapter before the active one active again, or the base model.

    Examples: edge-sdss rollback; edge-sdss rollback --bundle
    """
    if bundle:
        cli_bundle.roll_back(options.home(home), json_)
        return
    with options.session(home, options.settings(settings_file, None, {})) as session:
        number = session.rollback()
        console.emit({"active_round": number, "adapter": str(session.active_adapter) if number else None}, json_)


for _verb in (
    *(cli_service.serve, cli_service.health),
    *(cli_bundle.export, cli_bundle.deploy, cli_bundle.bundles, cli_device.emulate, cli_device.adapt),
    *(cli_chat.chat, cli_plan.plan, cli_profile.profile, cli_profile.compare, cli_profile.doctor),
):
    app.command()(_verb)
app.command(name="flash-plan")(cli_service.flash_plan)


def main() -> None:
    """Runs the command line; prints an error as one line."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        _fail("UsageError", error.format_message())
        code = 2
    except (KeyboardInterrupt, typer.Abort, click.Abort):
        console.note("Stopped. What was accepted is stored; the same command goes on.")
        code = 130
    except EdgeSdssError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _fail(type(error).__name__, str(error))
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _fail(kind: str, text: str) -> None:
    """One line on stderr, and with --json one document on stdout."""
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": kind, "message": text}) + "\n")
    console.note(f"edge-sdss: {text}")
