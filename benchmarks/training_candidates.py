"""A trainer in a process of its own, for benchmarks/training.py: this package's, or one that people use.

    stdin     one line of JSON, a Job; then, where that is gated, a line for each step to do
    stdout    JSON lines: {"ready": ...}, {"step": ...} after each step, {"end": ...}

All of them get the same tokens in the same batches and the same number of steps, and neither log, evaluate nor
save. Knows nothing of what is made of the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edge_sdss import config
from edge_sdss.errors import BudgetExceeded
from edge_sdss.lm import loading
from edge_sdss.types import Example, Turn, no_progress

OURS = "edge_sdss"
PLAIN, CHECKPOINTED, TRL = "PEFT + Trainer", "PEFT + Trainer, checkpointing", "TRL SFTTrainer"
PEERS = (PLAIN, CHECKPOINTED, TRL)
RANK = 8
MEASURED = 1  # the step whose tensors are counted: the first one makes the optimizer's state
_OFFLINE = MappingProxyType({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})


class Failed(RuntimeError):
    """The candidate ended before its time; the text is its last words."""


@dataclass(frozen=True)
class Job:
    """What a candidate does: `epochs` over the examples, pairs of a prompt and its answer.

    `tensors`: counts live tensors in one step. `gated`: waits for a line before each step. `fit` and
    `budget_bytes` are for this package's trainer alone.
    """

    trainer: str
    model: str | None
    weights: str
    examples: list[tuple[str, str]]
    batch_size: int
    max_tokens: int
    epochs: int = 1
    gated: bool = False
    tensors: bool = False
    fit: Mapping[str, Any] | None = None
    budget_bytes: int | None = None

    @property
    def settings(self) -> config.Tuning:
        """Of this package's trainer; what is not said here is the default."""
        said: dict[str, Any] = {"batch_size": self.batch_size, "max_tokens": self.max_tokens, "epochs": self.epochs}
        return config.Tuning(rank=RANK, weights=self.weights, checkpoint_every=1_000_000, **said)


class Candidate:
    """The process, as the benchmark sees it. `ready` is what it told when it was about to train."""

    def __init__(self, job: Job, threads: int, env: Mapping[str, str] = MappingProxyType({})) -> None:
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` does
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, **_OFFLINE, **loading.PATIENT, "OMP_NUM_THREADS": str(threads), **env},
        )
        self._write(json.dumps(asdict(job)))
        self.ready = self._read("ready")

    def step(self) -> dict[str, Any]:
        """Has a gated candidate do its next step, and returns what that told."""
        self._write("")
        return self._read("step")

    def end(self) -> dict[str, Any]:
        """Waits for the end and returns what was measured. Of a gated one, all steps must be done."""
        found = self._read("end")
        self.close()
        return found

    def close(self) -> None:
        """Ends it, wherever it is."""
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if kind in told:
                return dict(told[kind])
        self._process.wait()
        self._words.seek(0)
        last = (self._words.read().strip().splitlines() or [f"exit status {self._process.returncode}"])[-1]
        self.close()
        raise Failed(last)


def measure(job: Job, threads: int, env: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Runs a candidate to its end and returns all that it told of itself."""
    candidate = Candidate(job, threads, env)
    return {**candidate.ready, **candidate.end()}


# Within the process.


class _Talk:
    """Lines to and from the benchmark. What libraries print goes to stderr."""

    def __init__(self, job: Job) -> None:
        self._job, self._out, self._began = job, os.fdopen(os.dup(1), "w"), 0.0
        os.dup2(2, 1)
        if not job.gated:
            threading.Thread(target=_end_with_benchmark, daemon=True).start()

    def tell(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._out, flush=True)

    def ready(self, rows: list[Any]) -> None:
        """From here on the peak of RSS counts anew (proc(5): 5 resets it)."""
        facts = {"tokens": sum(len(row.ids) for row in rows), "longest": max(len(row.ids) for row in rows)}
        facts["labels"] = max(len(row.ids) - row.prompt_tokens for row in rows)
        facts["load_peak_rss_bytes"] = _memory("VmHWM")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.tell(ready=facts)

    def wait(self) -> None:
        """Before a step."""
        if self._job.gated and not sys.stdin.readline():
            sys.exit("the benchmark is gone")
        self._began = time.perf_counter()

    def stepped(self) -> None:
        """After it."""
        self.tell(step={"seconds": time.perf_counter() - self._began})

    def end(self, **facts: Any) -> None:
        self.tell(end={**facts, "peak_rss_bytes": _memory("VmHWM")})


def _end_with_benchmark() -> None:
    sys.stdin.read()
    os._exit(1)


def _memory(name: str) -> int:
    """A line of /proc/self/status (proc(5)), in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _ours(job: Job, talk: _Talk) -> None:
    from contextlib import nullcontext

    from edge_sdss.tuning import adapter, outofmemory, trainer
    from edge_sdss.tuning.fit import Fit
    from edge_sdss.tuning.watchdog import Watchdog

    lm = adapter.load(config.Model(name=job.model), job.settings)
    outofmemory.free()  # as the child of a budget does
    examples = [Example((Turn("user", prompt),), answer) for prompt, answer in job.examples]
    talk.ready([lm.encode(example, job.max_tokens) for example in examples])
    watch = None if job.budget_bytes is None else Watchdog(job.budget_bytes, reserve_bytes=job.settings.reserve)
    stepped_down: list[str] = []

    class Gate:
        def before_step(self) -> None:
            talk.wait()

    def hear(event: dict[str, Any]) -> None:
        if "step" in event:
            talk.stepped()
        if "stepped_down" in event:
            words = event["stepped_down"]["words"]
            if not job.gated:  # a trial of the budget: it does not do
                raise BudgetExceeded(f"it gave up {words}")
            stepped_down.append(words)

    fit = None if job.fit is None else Fit(**job.fit)
    conditions = trainer.Conditions(fit=fit, watch=watch, pace=Gate(), on_event=hear)
    with tempfile.TemporaryDirectory() as folder, watch or nullcontext():
        found = trainer.train(lm, examples, job.settings, Path(folder) / "adapter", conditions=conditions)
    talk.end(steps=found.steps, peak_tensor_bytes=found.peak_tensor_bytes, stepped_down=stepped_down)


def _peer(job: Job, talk: _Talk) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, rows = _peers_model(job)
    order = _order(job, [len(row.ids) for row in rows])
    labelled = [
        {"input_ids": row.ids, "labels": [-100] * row.prompt_tokens + row.ids[row.prompt_tokens :]}
        for row in (rows[index] for index in order)
    ]
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    checkpointing = job.trainer != PLAIN
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": job.batch_size,
            "num_train_epochs": 1,
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        kind: Any = Trainer
        given: dict[str, Any] = {"train_dataset": labelled, "processing_class": tokenizer}
        if job.trainer == TRL:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            kind, given["train_dataset"] = SFTTrainer, Dataset.from_list(labelled)
            prepared = {"skip_prepare_dataset": True}
            # Its loss "nll" never holds all logits: it goes through the head chunk by chunk.
            arguments: Any = SFTConfig(
                **common, bf16=False, max_length=job.max_tokens, loss_type="nll", dataset_kwargs=prepared
            )
            given |= {"model": model, "args": arguments, "peft_config": lora}
        else:
            arguments = TrainingArguments(**common)
            collator = DataCollatorForSeq2Seq(tokenizer)
            given |= {"model": get_peft_model(model, lora), "args": arguments, "data_collator": collator}

        class InOrder(kind):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any) -> Any:
                return SequentialSampler(self.train_dataset)

        callback = _callback(talk, rows, job)
        InOrder(**given, callbacks=[callback]).train()
        steps = len(order) // job.batch_size
        talk.end(steps=steps, peak_tensor_bytes=callback.peak, threads=torch.get_num_threads())


def _peers_model(job: Job) -> tuple[Any, Any, list[Any]]:
    """Model, tokenizer and encoded examples, with what each library's own guide does for the base's precision."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edge_sdss.lm.chat import Chat

    folder = loading.find(job.model, no_progress)
    how: dict[str, Any] = {"dtype": getattr(torch, "bfloat16" if job.weights == "nf4" else job.weights)}
    if job.weights == "nf4":
        from transformers import BitsAndBytesConfig

        double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **double)
        how["device_map"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    if job.weights == "nf4" and job.trainer != TRL:  # TRL does it itself
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.trainer == CHECKPOINTED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    chat = Chat(tokenizer, [model.generation_config.eos_token_id])
    rows = [chat.encode(Example((Turn("user", prompt),), answer), job.max_tokens) for prompt, answer in job.examples]
    return model, tokenizer, rows


def _order(job: Job, lengths: list[int]) -> list[int]:
    """The order in which this package takes the examples."""
    from edge_sdss.tuning.steps import batches

    seed = job.settings.seed
    return [i for epoch in range(job.epochs) for rows in batches(lengths, job.batch_size, seed, epoch) for i in rows]


def _callback(talk: _Talk, rows: list[Any], job: Job) -> Any:
    from transformers import TrainerCallback

    from edge_sdss.tuning.memory import PeakTensorBytes

    class Steps(TrainerCallback):  # type: ignore[misc]
        peak = 0
        memory: PeakTensorBytes | None = None

        def on_epoch_begin(self, *_: Any, **given: Any) -> None:
            talk.ready(rows)
            talk.wait()

        def on_step_begin(self, arguments: Any, state: Any, *_: Any, model: Any, optimizer: Any, **given: Any) -> None:
            if job.tensors and state.global_step == MEASURED:
                moments = [tensor for one in optimizer.state.values() for tensor in one.values()]
                self.memory = PeakTensorBytes([*model.parameters(), *model.buffers(), *moments])
                self.memory.__enter__()

        def on_step_end(self, arguments: Any, state: Any, *_: Any, **given: Any) -> None:
            if self.memory is not None:
                self.memory.__exit__(None, None, None)
                self.peak, self.memory = self.memory.peak, None
            talk.stepped()
            if state.global_step < state.max_steps:
                talk.wait()

    return Steps()


def main() -> None:
    """Does the job that stdin names."""
    given = json.loads(sys.stdin.readline())
    job = Job(**given)
    (_ours if job.trainer == OURS else _peer)(job, _Talk(job))


if __name__ == "__main__":
    main()
