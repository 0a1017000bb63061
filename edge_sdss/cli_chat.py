"""The verb `chat`: what is typed goes into a conversation, and what comes of it onto the screen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sdss import console, options
from edge_sdss.cli_interrupt import ctrl_c_ends_waiting, on_ctrl_c
from edge_sdss.config import Config
from edge_sdss.errors import BackendUnavailable, EdgeSdssError, InputError, message
from edge_sdss.options import Bundle, Home, Json, Model, Seed, Set, Settings
from edge_sdss.page.formats import size

if TYPE_CHECKING:
    from edge_sdss.conversation import Conversation, Exchange

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a terminal would obey instead of showing."""


def chat(
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this one and end; else stdin, or talk.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="NAME, none, or a=0.7,b=0.3.")] = None,
    bundle: Bundle = None,
    provider: Annotated[str, typer.Option("--provider", help="Of ONNX Runtime: auto, cpu, cuda, ...")] = "auto",
    no_observe: Annotated[bool, typer.Option("--no-observe", help="Offer nothing to the buffer.")] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="The longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0: always the most probable.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Mass of the most probable tokens that count.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="How many of the most probable count; 0: all.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: what was said comes less often.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text before which an answer ends.")] = None,
    seed: Seed = None,
    model: Model = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Talk with the model of the device. Each exchange is offered to the buffer, and stays on the device.

    The home's active bundle answers; without one the torch model and its active adapter, if torch is installed. In
    the conversation /help lists the commands, Ctrl-C ends an answer, which is then not offered, Ctrl-D the
    conversation. Offering costs no pass through the model while no adapter is active, and with one a prefill of the
    new tokens by the base model. Examples: edge-sdss chat; edge-sdss chat --prompt "What do I feed my cat?" --json
    """
    asked: dict[str, Any] = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked |= {"repetition_penalty": repetition_penalty, "stop": tuple(stop) if stop else None, "seed": seed}
    settings = options.settings(settings_file, set_, {"chat": asked, "model": {"name": model}})
    if prompt is None and not sys.stdin.isatty():
        prompt = _typed(sys.stdin.read)
    if prompt is None and json_:
        raise InputError(message("print JSON", "there is no prompt", "give --prompt, or the prompt on stdin"))
    with _open(home, bundle, provider, settings, observe=not no_observe) as conversation:
        if adapter is not None:
            _use(conversation, adapter)
        if prompt is None:
            with on_ctrl_c(lambda *_: conversation.stop()):  # heeded between two pieces, and never while one is stored
                _talk(conversation)
        else:
            _once(conversation, prompt, json_)


@contextmanager
def _open(
    home: Path | None, bundle: Path | None, provider: str, settings: Config, *, observe: bool
) -> Iterator[Conversation]:
    from edge_sdss import speakers
    from edge_sdss.conversation import Conversation
    from edge_sdss.runtime import Engine

    folder = speakers.bundle(options.home(home), bundle)
    if folder is None:
        if not speakers.has_torch():
            found = f"no bundle is active in {options.home(home)}, and torch is not installed"
            do = "make one with `edge-sdss export` and deploy it, or give --bundle"
            raise BackendUnavailable(message("chat", found, do))
        console.note("No bundle is active: the torch model answers; `edge-sdss export` makes a faster one.")
        with options.session(home, settings) as session:
            yield Conversation(speakers.TorchSpeaker(session, settings), settings, session if observe else None)
        return
    engine = Engine.open(folder, provider=provider)
    if observe and not engine.manifest.graph.hidden_states:
        console.note("The bundle gives no hidden states, so nothing is offered; export it with embeddings.")
        observe = False
    speaker = speakers.BundleSpeaker(engine, settings, embeds=observe)
    if not observe:
        yield Conversation(speaker, settings, None)
        return
    with options.session(home, settings, engine) as session:
        yield Conversation(speaker, settings, session)


def _once(conversation: Conversation, prompt: str, as_json: bool) -> None:
    exchange = conversation.ask(prompt, _ignore if as_json else _show)
    if as_json:
        console.emit(_document(conversation, exchange), True)
        return
    _show("\n")
    _tell(exchange)


def _document(conversation: Conversation, exchange: Exchange) -> dict[str, Any]:
    made = exchange.decision
    facts = {key: value for key, value in asdict(exchange).items() if key != "decision"}
    return {"model": conversation.speaker.name, **facts, "decision": console.decision(made) if made else None}


def _talk(conversation: Conversation) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 (its import gives `input` a history and an editor)
    _greet(conversation)
    while True:
        try:
            with ctrl_c_ends_waiting():
                text = _typed(lambda: input("> ")).strip()
        except EOFError:
            _show("\n")
            return
        except KeyboardInterrupt:
            _show("\n")
            console.note("/quit or Ctrl-D ends the conversation.")
            continue
        except InputError as error:
            console.note(str(error))
            continue
        try:
            if text.startswith("/"):
                if not _command(conversation, text):
                    return
            elif text:
                _answer(conversation, text)
        except EdgeSdssError as error:
            console.note(str(error))


def _typed(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise InputError(message("read the prompt", f"it is no {error.encoding}", "write it in UTF-8")) from error


def _answer(conversation: Conversation, text: str) -> None:
    exchange = conversation.ask(text, _show)
    _show("\n")
    if exchange.stopped:
        console.note("Stopped; not offered to the buffer.")
    elif not exchange.finished:
        console.note(f"Cut off after {exchange.tokens} tokens: --max-tokens.")
    if exchange.problem:
        console.note(f"Not offered to the buffer: {exchange.problem}")


def _tell(exchange: Exchange) -> None:
    if exchange.problem:
        console.note(f"Not offered to the buffer: {exchange.problem}")
    elif exchange.decision:
        console.note(f"{exchange.decision.action.capitalize()}: {exchange.decision.reason}.")


def _greet(conversation: Conversation) -> None:
    fill = conversation.fill
    seen = f"offered to the buffer, {fill.entries} of {fill.bins} bins" if fill else "not offered to the buffer"
    console.note(f"{conversation.speaker.name} · adapter {_words(conversation.speaker.adapter)} · {seen} · /help")


def _command(conversation: Conversation, text: str) -> bool:
    """Does what a line with a slash asks for; returns whether the conversation goes on."""
    name, _, rest = text[1:].partition(" ")
    if name in ("quit", "exit"):
        return False
    if name not in _COMMANDS:
        console.note(f"There is no /{name}; /help lists what there is.")
        return True
    _COMMANDS[name][0](conversation, rest.strip())
    return True


def _help(conversation: Conversation, rest: str) -> None:
    rows = [[f"/{name}", words] for name, (_, words) in _COMMANDS.items()]
    console.table("", ["command", "what it does"], [*rows, ["/quit", "end, as Ctrl-D does"]])


def _adapter(conversation: Conversation, rest: str) -> None:
    if rest:
        _use(conversation, rest)
    known = ", ".join(conversation.speaker.adapters) or "none"
    console.note(f"Adapter {_words(conversation.speaker.adapter)}; there are: {known}.")


def _why(conversation: Conversation, rest: str) -> None:
    fill = conversation.fill
    if fill is None:
        console.note("Nothing of this conversation is offered to the buffer.")
        return
    rows = []
    for number, exchange in enumerate(conversation.exchanges, start=1):
        made = exchange.decision
        fate, scores, why = "not offered", ["", "", "", ""], exchange.problem or "stopped"
        if made:
            fate = made.action if made.action == "dropped" or conversation.is_kept(exchange) else "kept, since replaced"
            scores = [f"{made.scores.eoe:.3f}", f"{made.scores.dss:.3f}", f"{made.scores.idd:.3f}", made.domain]
            why = made.reason
        rows.append([number, console.short(exchange.prompt, 30), fate, *scores, why])
    if rows:
        columns = ["", "prompt", "fate", "EOE", "DSS", "IDD", "domain", "why"]
        console.table("This conversation", columns, rows, whole=("EOE", "DSS", "IDD"))
    filled = f"{fill.entries} of {fill.bins} bins, {size(fill.bytes)} of {size(fill.max_bytes)}"
    console.note(f"The buffer holds {filled}. `edge-sdss status` shows all of it afterwards.")


def _clear(conversation: Conversation, rest: str) -> None:
    conversation.clear()
    console.note("The conversation begins anew; what was kept of it stays in the buffer.")


_COMMANDS: Mapping[str, tuple[Callable[[Conversation, str], None], str]] = {
    "adapter": (_adapter, "adapters there are; NAME, none or a=0.7,b=0.3 to answer with"),
    "why": (_why, "what was kept of this conversation and why, and how full the buffer is"),
    "clear": (_clear, "begin anew, without the turns so far"),
    "help": (_help, "this list"),
}


def _use(conversation: Conversation, text: str) -> None:
    from edge_sdss import speakers

    conversation.speaker.use(speakers.read_adapter(text))


def _words(adapter: Mapping[str, float]) -> str:
    return ", ".join(name if scale == 1 else f"{name}={scale:g}" for name, scale in adapter.items()) or "none"


def _show(piece: str) -> None:
    sys.stdout.write(piece.translate(_CONTROL))
    sys.stdout.flush()


def _ignore(piece: str) -> None:
    pass
