"""What a bundle's answers are worth: NLL and KL to float32, size, and whether graph and torch compute the same.

No timing here: it may run on a busy machine. See benchmarks/inference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from inference_bundles import PRECISIONS, Subject
from inference_speed import BENCH, LLAMA, OURS, TORCH, Line, Peers

from edge_sdss import bundles, general, statistics
from edge_sdss.lm import LanguageModel
from edge_sdss.runtime import Engine
from edge_sdss.types import Turn

CHECKS = "inference-checks"
NLL, CHANGE, KL, SIZE = "held-out NLL", "change of NLL", "KL to float32", "size"
_MAX_TOKENS = 192
Rows = npt.NDArray[np.float32]
Way = Callable[[list[int], int], Rows]  # ids and a position -> the logits from there on


@dataclass(frozen=True)
class Text:
    """A dialogue in the model's template; its tokens from `first` on are the answer and its end."""

    ids: list[int]
    first: int


def quality(subject: Subject, peers: Peers, count: int) -> Iterator[Line]:
    """NLL of answers and KL from torch's float32 at the same tokens, of each bundle and of the peers; sizes."""
    lm = LanguageModel.load(subject.settings)
    examples, source = subject.texts(count)
    encoded = [lm.encode(example, _MAX_TOKENS) for example in examples]
    texts = [Text(list(one.ids), one.prompt_tokens) for one in encoded]
    facts = {**subject.facts, "data": source, "dialogues": len(texts)}
    base = _torch(lm.model)
    reference = [base(text.ids, text.first - 1)[:-1] for text in texts]
    weights = sum(p.numel() for p in lm.model.parameters())
    if "transformers" not in peers.without:
        yield from _lines(f"{TORCH}, float32", texts, reference, reference, 4 * weights, facts)
        lm.model.bfloat16()
        yield from _measured(f"{TORCH}, bfloat16", base, texts, reference, 2 * weights, facts)
    del lm
    for precision in PRECISIONS:
        folder = subject.bundle(precision)
        engine = Engine.open(folder, provider="cpu", threads=subject.threads)
        size = sum(one.size_bytes for one in bundles.load(folder).files)
        yield from _measured(
            f"{OURS}, {precision}",
            lambda ids, at, e=engine: e.logits(ids, None, first=at),
            texts,
            reference,
            size,
            facts,
        )
        del engine
    if "llama.cpp" not in peers.without:
        from inference_candidates import gguf

        file = peers.gguf or gguf()
        yield _line(LLAMA, SIZE, file.stat().st_size / 1e6, "MB", facts)
        if way := _llama(file, subject.threads):
            yield from _measured(LLAMA, way, texts, reference, None, facts)


def _torch(model: Any) -> Way:
    from edge_sdss.exporting.ways import of_torch

    way = of_torch(model)
    return lambda ids, at: way(np.array(ids, np.int64))[at:]


def _llama(file: Path, threads: int) -> Way | None:
    """llama.cpp by its Python bindings, token by token as it decodes; None where they are not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        print("inference: NLL and KL of llama.cpp are left out: pip install llama-cpp-python", flush=True)
        return None
    model = Llama(str(file), n_ctx=512, n_threads=threads, logits_all=False, verbose=False)

    def logits(ids: list[int], at: int) -> Rows:
        model.reset()
        rows = []
        for position, token in enumerate(ids):
            model.eval([token])
            if position >= at:
                rows.append(np.array(model._ctx.get_logits_ith(-1)[: model.n_vocab()], np.float32))
        return np.array(rows)

    return logits


def _measured(
    case: str, way: Way, texts: Sequence[Text], reference: Sequence[Rows], size: int | None, facts: dict[str, Any]
) -> Iterator[Line]:
    print(f"{case} ...", flush=True)
    yield from _lines(case, texts, [way(text.ids, text.first - 1)[:-1] for text in texts], reference, size, facts)


def _lines(
    case: str,
    texts: Sequence[Text],
    rows: Sequence[Rows],
    reference: Sequence[Rows],
    size: int | None,
    facts: dict[str, Any],
) -> Iterator[Line]:
    losses = np.array([_nll(text, own) for text, own in zip(texts, rows, strict=True)])
    before = np.array([_nll(text, own) for text, own in zip(texts, reference, strict=True)])
    tokens = sum(map(len, rows))
    facts = {**facts, "tokens": tokens}
    mean = statistics.mean_interval(losses)
    yield _line(case, NLL, mean.mean, "nats/token", facts, mean.lo, mean.hi, len(texts))
    if rows is reference:
        yield _line(case, SIZE, (size or 0) / 1e6, "MB", facts)
        return
    change = statistics.paired_interval(before, losses)
    percent = [100 * value / before.mean() for value in (change.mean, change.lo, change.hi)]
    yield _line(case, CHANGE, percent[0], "%", facts, percent[1], percent[2], len(texts))
    divergences = [kl(theirs, own).mean() for own, theirs in zip(rows, reference, strict=True)]
    found = statistics.mean_interval(np.array(divergences))
    yield _line(case, KL, found.mean, "nats/token", facts, found.lo, found.hi, len(texts))
    if size is not None:
        yield _line(case, SIZE, size / 1e6, "MB", facts)


def _line(
    case: str, metric: str, value: float, unit: str, facts: dict[str, Any], lo: float | None = None,
    hi: float | None = None, n: int = 1, bench: str = BENCH,
) -> Line:  # fmt: skip
    own = {"bench": bench, "case": case, "metric": metric, "value": float(value), "unit": unit}
    return {**own, "lo": lo, "hi": hi, "n": n, "settings": facts}


def _log_softmax(rows: Rows) -> npt.NDArray[np.float64]:
    shifted = rows.astype(np.float64) - rows.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def _nll(text: Text, rows: Rows) -> float:
    """Mean nats a token of the answer; rows: the logits before each of its tokens."""
    return float(-np.take_along_axis(_log_softmax(rows), np.array(text.ids[text.first :])[:, None], -1).mean())


def kl(reference: Rows, rows: Rows) -> npt.NDArray[np.float64]:
    """KL(reference ‖ this) at each position in nats, of logits [n, vocabulary]."""
    first, second = _log_softmax(reference), _log_softmax(rows)
    found: npt.NDArray[np.float64] = (np.exp(first) * (first - second)).sum(-1)
    return found


def parity(subject: Subject, prompts: int, new: int) -> Iterator[Line]:
    """The float32 bundle against torch: greedy answers, all logits along them, and an adapter against PEFT."""
    facts = subject.facts
    lm = LanguageModel.load(subject.settings)
    engine = Engine.open(subject.bundle("float32"), provider="cpu", threads=subject.threads)
    asked = [engine.chat.prompt_ids([Turn("user", one.messages[-1].text)], 64) for one in general.examples()[:prompts]]
    base, equal, largest, effect, departure = _torch(lm.model), 0, 0.0, 0.0, 0.0
    for number, prompt in enumerate(asked):
        ours = [id_ for id_, _ in zip(engine.follow(prompt, None), range(new), strict=False)]
        theirs = [id_ for id_, _ in zip(lm.follow(prompt), range(new), strict=False)]
        equal += ours == theirs
        ids = [*prompt, *theirs]
        largest = max(largest, float(np.abs(engine.logits(ids, None) - base(ids, 0)).max()))
        print(f"parity: {number + 1} of {len(asked)} prompts", flush=True)
    yield _line(
        "float32 graph",
        "greedy answers equal to torch",
        equal,
        f"of {len(asked)}",
        {**facts, "tokens": new},
        bench=CHECKS,
    )
    yield _line("float32 graph", "largest |Δlogit| to torch", largest, "1", facts, n=len(asked), bench=CHECKS)
    lm.attach(subject.adapter(0))
    tuned = _torch(lm.model)
    for prompt in asked:
        own, theirs = engine.logits(prompt, "r8"), tuned(prompt, 0)
        departure = max(departure, float(np.abs(own - theirs).max()))
        effect = max(effect, float(np.abs(engine.logits(prompt, None) - theirs).max()))
    facts = {**facts, "largest effect of the adapter": effect}
    case = "float32 graph, adapter of r = 8 as input"
    yield _line(case, "largest |Δlogit| to PEFT", departure, "1", facts, n=len(asked), bench=CHECKS)
