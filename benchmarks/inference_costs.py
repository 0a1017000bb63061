"""What adapters cost while they serve, and what embeddings out of an answer's own passes save.

A part of benchmarks/inference.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from inference_bundles import ADAPTERS, Subject
from inference_speed import Line
from results import timed

from edge_sdss import bundles, embedding, processes
from edge_sdss.bundles import adapters
from edge_sdss.config import Config
from edge_sdss.profiling.versus import versus
from edge_sdss.runtime import Engine, Stream
from edge_sdss.runtime.adapters import ACTIVE, Asked
from edge_sdss.tree import Tree
from edge_sdss.types import Dialogue, Turn

CHECKS = "inference-checks"
_QUESTION = "My doctor says that I should walk more, but it rains every day here in autumn. What can I do instead?"


def costs(subject: Subject, blocks: int) -> Iterator[Line]:
    """Switching, converting, ten adapters in memory, and an exchange that is offered to the buffer."""
    with tempfile.TemporaryDirectory() as scratch:
        made = _converted(subject, Path(scratch))
        yield from _switching(subject, made, blocks)
        yield from _converting(subject, Path(scratch), blocks)
        yield _memory(subject, made)
    yield from _observing(subject, blocks)


def _converted(subject: Subject, out: Path) -> dict[str, Path]:
    manifest = bundles.load(subject.bundle("int4"))
    names = {f"a{number}": subject.adapter(number) for number in range(ADAPTERS)}
    return {n: out / adapters.convert(folder, manifest, out, n).file.path for n, folder in names.items()}


def _switching(subject: Subject, made: dict[str, Path], blocks: int) -> Iterator[Line]:
    """A request is one token and its logits. In turn: two adapters alternate, and one stays."""
    engine = _engine(subject)
    for name in ("a0", "a1"):
        engine.load_adapter(name, made[name])

    def requests(*names: str) -> Callable[[], None]:
        def run() -> None:
            for name in names:
                engine.attach(name)
                next(engine.follow([17]))

        return run

    found = versus(requests("a0", "a1"), requests("a0", "a0"), blocks=blocks)
    line = timed(CHECKS, "int4 bundle", "two requests, each with another adapter", found, "the same adapter twice")
    yield {**line, "settings": {**subject.facts, **line["settings"]}}
    switch = versus(lambda: (engine.attach("a0"), engine.attach("a1")), lambda: engine.attach("a0"), blocks=blocks)
    yield _line(subject, "int4 bundle", "switch to a loaded adapter", switch.peer.median * 1e3, "ms", blocks)
    load = versus(
        lambda: engine.load_adapter("a0", made["a0"]), lambda: engine.load_adapter("a1", made["a1"]), blocks=blocks
    )
    yield _line(subject, "int4 bundle", "load an adapter of r = 8 from its file", load.ours.median * 1e3, "ms", blocks)


def _converting(subject: Subject, out: Path, blocks: int) -> Iterator[Line]:
    manifest, folder = bundles.load(subject.bundle("int4")), subject.adapter(0)

    def convert() -> None:
        adapters.convert(folder, manifest, out, "timed")

    found = versus(convert, lambda: (folder / "adapter_model.safetensors").read_bytes(), blocks=blocks)
    yield _line(subject, "adapter of r = 8", "PEFT folder to .onnx_adapter", found.ours.median, "s", blocks)


def _memory(subject: Subject, made: dict[str, Path]) -> Line:
    """In a process of its own: how it grows from one adapter that has answered to eleven that have."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown, own = pool.apply(_grown, (subject, made))
    line = _line(subject, "ten more adapters of r = 8", "growth of the process / their own size", grown / own, "1", 1)
    line["settings"] |= {"grown_mib": grown / 2**20, "own_mib": own / 2**20}
    return line


def _grown(subject: Subject, made: dict[str, Path]) -> tuple[int, int]:
    engine = _engine(subject)

    def answers(name: str) -> None:
        list(engine.stream([Turn("user", _QUESTION)], max_new_tokens=4, adapter=name))

    def resident() -> int:
        gc.collect()
        processes.trim()
        return processes.sizes(Tree(Path("/")), "proc/self/status")["VmRSS"]

    first, *others = made
    engine.load_adapter(first, made[first])
    for _ in range(3):
        answers(first)
    before, own = resident(), 0
    for name in others:
        own += engine.load_adapter(name, made[name]).size_bytes
        answers(name)
    return resident() - before, own


def _observing(subject: Subject, blocks: int) -> Iterator[Line]:
    """An exchange of a chat with E(T) for the buffer: out of its own passes, by a second one, and without E(T).

    With an adapter active the base model prefills what the adapted one has said: E(T) is the base model's.
    """
    engine, settings, numbers = _engine(subject), Config(), count()

    def measured(case: str, adapter: Asked) -> Iterator[Line]:
        def answer(embeddings: bool) -> tuple[Stream, str]:
            asked = f"{next(numbers)}. {_QUESTION}"  # another beginning, so that each prompt is prefilled
            turns = [Turn("user", asked)]
            stream = engine.stream(turns, max_new_tokens=32, embeddings=embeddings, adapter=adapter)
            return stream, "".join(stream)

        def own() -> None:
            stream, _ = answer(True)
            embedding.of_answer(engine, stream, settings)

        def separate() -> None:
            _, text = answer(False)
            embedding.of(engine, Dialogue(_QUESTION, text), settings)

        def alone() -> None:
            answer(False)

        for peer, function in (("E(T) by a second forward pass", separate), ("the answer alone", alone)):
            found = versus(own, function, blocks=blocks)
            line = timed(CHECKS, case, f"answer and E(T) of its own passes / {peer}", found, peer)
            yield {**line, "settings": {**subject.facts, **line["settings"]}}

    yield from measured("exchange of 32 tokens", None)
    yield from measured("exchange of 32 tokens, r = 8 active", ACTIVE)


def _engine(subject: Subject) -> Engine:
    return Engine.open(subject.bundle("int4"), provider="cpu", threads=subject.threads)


def _line(subject: Subject, case: str, metric: str, value: float, unit: str, n: int) -> Line:
    own = {"bench": CHECKS, "case": case, "metric": metric, "value": value, "unit": unit, "n": n}
    return {**own, "settings": dict(subject.facts)}
