"""Does a decoder give the right tokens on Snapdragon's NPU? Measured in emulation, every node on the HTP.

    python benchmarks/npu.py --data DIR --work DIR

Compares graphs of fixed shapes on the emulated HTP with the same graphs in float32 on the CPU: prefill over real
dialogue that calibration has not seen, decode steps along it, greedy answers, adapters as inputs, context binaries.
Each part's figures lie in the work folder and are not measured again; `--store` appends all of them to the results.
Nothing here is a device's figure, and times of an emulation are none of anything.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import results

from edge_sdss import default_model, readers
from edge_sdss.exporting import htp, npu, static_ways
from edge_sdss.exporting.cpu import on_cpu
from edge_sdss.exporting.qdq import Scheme
from edge_sdss.exporting.static_decoder import Shape, drawn
from edge_sdss.exporting.static_feeds import Feeds
from edge_sdss.exporting.static_ways import Graphs, Prefix, StaticModel
from edge_sdss.files import replace
from edge_sdss.types import Turn, no_progress

BENCH = "npu"
SETS = (
    "memorybank/memory_bank_en.json", "empathetic_dialogues/ed_test_pairs.jsonl", "chatdoctor/chatdoctor5k.json",
    "dolly/dolly_3k.json",
)  # fmt: skip
RANK = 8
RANKS = (RANK, RANK // 2, RANK, RANK // 2)
PREFILL, DECODE = Shape(64, 64, RANK), Shape(1, 95, RANK)
LENGTH, NEW, PER_SET, DECODED = 128, 32, 3, 32
CALIBRATION, UNSEEN = 24, 400
"""Dialogues of each set for calibration, from its beginning, and from which one on others are measured on."""

SETUPS: dict[str, Scheme | None] = {
    "fp16": None,
    "fp16, first token as a prefix": None,
    "A16W8, blocks of 32": Scheme(bits=8, head_bits=8, block=32),
    "A16W8, blocks of 32, four float layers": Scheme(bits=8, head_bits=8, float_layers=4, block=32),
    "A16W8, four float layers": Scheme(bits=8, head_bits=8, float_layers=4),
    "A16W4, blocks of 32, four float layers, head of 8 bits": Scheme(bits=4, head_bits=8, float_layers=4, block=32),
}
Rows = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Line = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Where parts lie, how many of each are measured, and the model."""

    folder: Path
    data: Path
    texts: int
    prompts: int
    decoded: int
    model: Path

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns what a part found, from its file where it was measured before."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            replace(file, json.dumps(make(), indent=1) + "\n")
            print(f"{name}: {file.read_text()[:400]}", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def dialogues(self, first: int, count: int, least: int, most: int, *, answered: bool) -> list[Ids]:
        """The first `count` of each set from number `first` on that have from `least` to `most` tokens, cut there."""
        from edge_sdss.lm.chat import Chat
        from edge_sdss.runtime.chat import Tokenizer
        from edge_sdss.types import Example

        chat, found = Chat(Tokenizer(self.model), [2]), []
        for name in SETS:
            own: list[Ids] = []
            for number, one in enumerate(readers.read(self.data / name)):
                if number < first or not one.response or len(own) == count:
                    continue
                turns = (Turn("user", one.prompt),)
                if answered:
                    ids = list(chat.encode(Example(turns, one.preferred or one.response), 10 * LENGTH).ids)[:most]
                else:
                    ids = list(chat.prompt_ids(turns, 10 * LENGTH))
                if least <= len(ids) <= most:
                    own.append(np.array(ids, np.int64))
            found += own
        return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for parts; give it again to go on")
    parser.add_argument(
        "--setups",
        default="fp16, first token as a prefix;A16W8, blocks of 32",
        help=f"some of {'; '.join(SETUPS)}",
    )
    parser.add_argument("--only", default="prefill,adapters,context,greedy,decode", help="which parts")
    parser.add_argument("--texts", type=int, default=10, help=f"of {LENGTH} tokens, {4 * PER_SET} at most")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--decoded", type=int, default=DECODED, help=f"texts of which {NEW} tokens are decoded")
    parser.add_argument("--on", choices=("htp", "cpu"), default="htp", help="cpu: to search, not stored")
    parser.add_argument("--store", action="store_true", help="append what was measured to the results")
    parser.add_argument("--context", nargs=2, metavar=("GRAPH", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--reload", nargs=2, metavar=("CONTEXT", "FEED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.context or asked.reload:
        child(asked)
        return
    work = Work(asked.work, asked.data, asked.texts, asked.prompts, asked.decoded, default_model.path(no_progress))
    asked.work.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    for setup in asked.setups.split(";"):
        for part in asked.only.split(","):
            lines += PARTS[part](work, setup, asked.on)
            gc.collect()
    if asked.store and asked.on == "htp":
        print(results.append(lines))


def made(work: Work, setup: str, name: str, shape: Shape) -> Path:
    """Returns the graph of a setup, and writes it where it is not there."""
    scheme = SETUPS[setup]
    out = work.folder / ("fp16" if scheme is None else setup.replace(", ", "-").replace(" ", "-"))
    if (out / f"{name}.onnx").is_file():
        return out / f"{name}.onnx"
    model = npu.Model(work.model, scheme)
    if scheme is not None:
        saved = work.folder / "statistics.npz"
        if not saved.is_file():
            texts = work.dialogues(0, CALIBRATION, 64, LENGTH, answered=True)
            model.calibrate(texts, Shape(LENGTH, 0, RANK), work.folder, progress=progress)
            stored = {f"gram {k}": v.astype(np.float32) for k, v in model.statistics.grams.items()}
            np.savez(saved, **stored, **{f"largest {k}": np.array(v) for k, v in model.statistics.largest.items()})
        with np.load(saved) as loaded:
            for key in loaded.files:
                kind, _, tensor = key.partition(" ")
                getattr(model.statistics, f"{kind}s" if kind == "gram" else kind)[tensor] = loaded[key]
        for both, own in (("prefill", PREFILL), ("decode", DECODE)):
            model.write(out, both, own)
    else:
        model.write(out, name, shape)
    return out / f"{name}.onnx"


def progress(what: str, done: int, of: int) -> None:
    """Prints now and then."""
    if done % 16 == 0:
        print(f"{what} {done} of {of}", flush=True)


def static(work: Work, setup: str, on: str, names: Sequence[str]) -> StaticModel:
    """The model of a setup, embedding in float16 as bundles do; "float32" is the same graphs on the CPU."""
    model, shapes = npu.Model(work.model), {"prefill": PREFILL, "decode": DECODE}
    embedding = model.feeds.embedding
    feeds = Feeds(model.spec, embedding if setup == "float32" else embedding.astype(np.float16))
    graphs = {}
    for name in names:
        file = made(work, "fp16" if setup == "float32" else setup, name, shapes[name])
        graphs[name] = Graphs(shapes[name], (on_cpu(file, 2) if on == "cpu" else htp.session(file),))
    return StaticModel(feeds, graphs.get("prefill"), graphs.get("decode"))


@dataclass(frozen=True)
class Both:
    """The reference and a setup's model, with these graphs, opened when a part that was not measured asks for them."""

    work: Work
    setup: str
    on: str
    reference_graphs: Sequence[str]
    graphs: Sequence[str]

    @cached_property
    def reference(self) -> StaticModel:
        """In float32 on the CPU."""
        return static(self.work, "float32", "cpu", self.reference_graphs)

    @cached_property
    def ours(self) -> StaticModel:
        """As the setup says."""
        return static(self.work, self.setup, self.on, self.graphs)


def begun(work: Work, setup: str, reference: StaticModel, ids: Any, adapter: Any = None) -> Prefix | None:
    """The first token as float32 computes it, in all setups but plain fp16."""
    if setup == "fp16":
        return None
    assert reference.prefill is not None
    return static_ways.prefix(reference.prefill, reference.feeds, [int(ids[0])], adapter)


def log_softmax(rows: Rows) -> npt.NDArray[np.float64]:
    """Of logits [n, vocabulary]."""
    shifted = rows.astype(np.float64) - rows.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def compared(reference: Rows, rows: Rows, following: Any) -> dict[str, float]:
    """Sums over positions: agreement of argmax, both NLL of what follows, KL, in nats."""
    first, second = log_softmax(reference), log_softmax(rows)
    at = np.arange(len(following)), following
    return {
        "n": len(rows), "same": int((reference.argmax(-1) == rows.argmax(-1)).sum()),
        "kl": float((np.exp(first) * (first - second)).sum()),
        "nll_reference": float(-first[at].sum()), "nll": float(-second[at].sum()),
    }  # fmt: skip


def prefill(work: Work, setup: str, on: str) -> Iterator[Line]:
    """Agreement and NLL over texts, positions of the system prompt, which all texts share, not counted."""
    texts = work.dialogues(UNSEEN, PER_SET, LENGTH + 1, 10 * LENGTH, answered=True)[: work.texts]
    shared = next((i for i in range(LENGTH) if len({text[i] for text in texts}) > 1), 1)
    both, found = Both(work, setup, on, ["prefill"], ["prefill"]), []
    for number, text in enumerate(texts):
        file = work.folder / f"reference {number}.npy"

        def measure(text: Any = text, file: Path = file) -> dict[str, float]:
            if not file.is_file():
                np.save(file, both.reference.logits(text[:LENGTH]))
            start = begun(work, setup, both.reference, text)
            rows = both.ours.logits(text[:LENGTH], prefix=start)
            return compared(np.load(file)[shared:], rows[shared:], text[shared + 1 : LENGTH + 1])

        found.append(work.part(f"{setup} {on} prefill {number}", measure))
    yield from agreement(setup, on, "prefill", found)


def decode(work: Work, setup: str, on: str) -> Iterator[Line]:
    """The same of decode steps, each behind the dialogue's own tokens."""
    total = DECODE.past + DECODE.tokens
    texts = work.dialogues(UNSEEN, DECODED // len(SETS), total + 1, 10 * LENGTH, answered=True)[: work.decoded]
    both, found = Both(work, setup, on, ["prefill"], ["prefill", "decode"]), []
    for number, text in enumerate(texts):

        def measure(text: Any = text) -> dict[str, float]:
            start = begun(work, setup, both.reference, text)
            rows = both.ours.decoded(text[:total], NEW, prefix=start)
            return compared(both.reference.logits(text[:total])[-NEW:], rows, text[total - NEW + 1 : total + 1])

        found.append(work.part(f"{setup} {on} decode {number}", measure))
    yield from agreement(setup, on, "decode", found)


def agreement(setup: str, on: str, which: str, found: Sequence[dict[str, float]]) -> Iterator[Line]:
    """The lines of `compared` over all texts."""
    total = {key: sum(one[key] for one in found) for key in found[0]}
    rise = 100 * (total["nll"] / total["nll_reference"] - 1)
    n = int(total["n"])
    print(
        f"{setup} on {on}, {which}: {total['same'] / n:.4f} of {n}, NLL {rise:+.2f} %, KL {total['kl'] / n:.5f}",
        flush=True,
    )
    yield line(setup, f"{which}: argmax agreement with float32", 100 * total["same"] / n, "%", n)
    yield line(setup, f"{which}: change of NLL", rise, "%", n)
    yield line(setup, f"{which}: mean KL from float32", total["kl"] / n, "nats/token", n)


def greedy(work: Work, setup: str, on: str) -> Iterator[Line]:
    """Greedy answers, token by token against float32's."""
    prompts = work.dialogues(UNSEEN, PER_SET, 8, PREFILL.tokens, answered=False)[: work.prompts]
    both, found = Both(work, setup, on, ["prefill", "decode"], ["prefill", "decode"]), []
    for number, prompt in enumerate(prompts):

        def measure(prompt: Any = prompt) -> dict[str, Any]:
            start = begun(work, setup, both.reference, prompt)
            theirs = both.reference.follow(prompt, NEW)
            own = both.ours.follow(prompt, NEW, prefix=start)
            return {"theirs": theirs, "ours": own}

        found.append(work.part(f"{setup} {on} greedy {number}", measure))
    equal = sum(one["theirs"] == one["ours"] for one in found)
    print(f"{setup} on {on}: greedy {equal} of {len(found)}", flush=True)
    yield line(setup, f"greedy: answers of {NEW} tokens equal to float32's", equal, f"of {len(found)}", len(found))


def adapter(seed: int, rank: int, model: npu.Model) -> dict[str, Rows]:
    """One that calibration has not drawn, whose effect on the logits is as clear as `probe.CLEAR` wants it."""
    return drawn(model.spec, rank, UNSEEN + seed, effect=0.12 * rank**0.5)


def adapters(work: Work, setup: str, on: str) -> Iterator[Line]:
    """What adapters change in the logits, in one session, against what they change in float32; the worst of a rank."""
    text = work.dialogues(UNSEEN, 1, LENGTH + 1, 10 * LENGTH, answered=True)[0][: PREFILL.tokens]

    def measure() -> dict[str, Any]:
        reference, ours = static(work, "float32", "cpu", ["prefill"]), static(work, setup, on, ["prefill"])
        model, rows = npu.Model(work.model), []
        for given in (None, *(adapter(seed, rank, model) for seed, rank in enumerate(RANKS, start=1))):
            start = begun(work, setup, reference, text, given)
            both = reference.logits(text, given), ours.logits(text, given, start)
            rows.append([one[1:].astype(np.float64) for one in both])
        (base, own), *adapted = rows
        changes = [(their - base, our - own) for their, our in adapted]
        norm = np.linalg.norm
        apart = norm(changes[0][1] - changes[1][1]) / norm(changes[0][0] - changes[1][0])
        return {
            "errors": [float(norm(o - t) / norm(t)) for t, o in changes],
            "effects": [float(norm(t) / norm(base)) for t, _ in changes],
            "apart": float(apart),
        }

    found = work.part(f"{setup} {on} adapters", measure)
    print(setup, on, "adapters", found, flush=True)
    for rank in sorted(set(RANKS), reverse=True):
        own = [error for error, its in zip(found["errors"], RANKS, strict=True) if its == rank]
        settings = {"effects / logits": found["effects"], "graph's rank": RANK}
        yield line(setup, f"adapter of r = {rank}: error of its effect", 100 * max(own), "%", len(own), **settings)


def context(work: Work, setup: str, on: str) -> Iterator[Line]:
    """A context binary: its bytes, the compiler's peak memory, and whether a fresh process computes the same bits."""
    if on == "cpu":
        return
    file = made(work, setup, "prefill", PREFILL)
    out = file.with_name("prefill_context.onnx")

    def measure() -> dict[str, Any]:
        for old in file.parent.glob("prefill_context*"):
            old.unlink()
        compiled = _child("--context", file, out)
        again = _child("--reload", out, out.with_suffix(".npz"))
        binaries = [one for one in file.parent.glob("prefill_context*") if one.suffix == ".bin"]
        return {**compiled, **again, "bytes": sum(one.stat().st_size for one in binaries)}

    found = work.part(f"{setup} context", measure)
    print(setup, "context", found, flush=True)
    yield line(setup, "context binary of prefill", found["bytes"] / 1e6, "MB", 1)
    yield line(setup, "compiling: peak memory of the process", found["peak_bytes"] / 1e6, "MB", 1)
    yield line(setup, "context reloaded in a fresh process: outputs equal bit by bit", found["equal"], "of 1", 1)


def _child(option: str, *paths: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--data", "-", "--work", "-", option, *map(str, paths)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def child(asked: argparse.Namespace) -> None:
    """A process of its own: compiles and writes a context with a feed and its outputs, or runs one again."""
    if asked.context:
        file, out = map(Path, asked.context)
        session = htp.session(file, context=out)
        draws = np.random.default_rng(0)
        feed = {v.name: draws.normal(0, 0.1, v.shape).astype(np.float32) for v in session.get_inputs()}
        made = session.run(None, feed)
        np.savez(out.with_suffix(".npz"), **feed, **{f"output {i}": array for i, array in enumerate(made)})
        print(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    session = htp.session(Path(asked.reload[0]))
    with np.load(asked.reload[1]) as stored:
        arrays = {name: stored[name] for name in stored.files}
    made = session.run(None, {name: array for name, array in arrays.items() if not name.startswith("output ")})
    equal = all(np.array_equal(array, arrays[f"output {i}"]) for i, array in enumerate(made))
    print(json.dumps({"equal": int(equal)}))


def line(setup: str, metric: str, value: float, unit: str, n: int, **settings: Any) -> Line:
    """A line of results; the device is the emulation of one."""
    facts = {"model": default_model.NAME, "on": "emulated HTP, onnxruntime-qnn", **htp.OPTIONS, **settings}
    whole = {"bench": BENCH, "case": setup, "metric": metric, "value": float(value), "unit": unit}
    return {**whole, "n": n, "settings": facts, "emulated": True}


PARTS = {"prefill": prefill, "greedy": greedy, "adapters": adapters, "context": context, "decode": decode}

if __name__ == "__main__":
    main()
