"""Peaks of tensors and of whole processes against the lower limit M*, of all trainers: see benchmarks/training.py."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from training_candidates import MEASURED, OURS, PEERS, PLAIN, RANK, Failed, Job, measure
from training_scale import ABOVE, MIB, Line, Scale, least_that_does, long_texts

from edge_sdss import config
from edge_sdss.errors import BudgetExceeded
from edge_sdss.lm import loading
from edge_sdss.tuning import budgeted, libraries, limit, planner
from edge_sdss.tuning.fit import Fit
from edge_sdss.types import Example, Turn, no_progress

WEIGHTS = ("float32", "bfloat16", "nf4")


def ratios(scale: Scale) -> Iterator[Line]:
    """The peak of live tensors against M*, for each precision of the base, of all trainers."""
    for weights in WEIGHTS:
        job = Job(OURS, scale.model, weights, long_texts(MEASURED + 1), 1, scale.sequence, tensors=True)
        plan = scale.plan(job.settings)
        found = all_of(replace(job, fit=asdict(plan.least.fit)), scale)
        least = _limit(scale, plan, found[OURS]["labels"])
        for trainer, told in found.items():
            peak = told["peak_tensor_bytes"]
            yield {
                "bench": "training",
                "case": f"{trainer}, {weights}",
                "metric": "peak of live tensors / M*",
                "value": peak / least,
                "unit": "1",
                **_against(PLAIN, {name: one["peak_tensor_bytes"] for name, one in found.items()}, trainer),
                "settings": _step(scale, plan, trainer) | {"peak_mib": peak / MIB, "limit_mib": least / MIB},
            }


def process(scale: Scale) -> Iterator[Line]:
    """The peak of RSS against M* and what the libraries take alone: of the whole life, and since all was loaded."""
    runtime = runtime_bytes(scale)
    yield {
        "bench": "training",
        "case": "runtime",
        "metric": "RSS of the libraries and the tokenizer",
        "value": runtime / MIB,
        "unit": "MiB",
        "n": 3,
        "settings": scale.facts | {"planned_mib": libraries.runtime_bytes() / MIB},
    }
    for weights in WEIGHTS:
        job = Job(OURS, scale.model, weights, long_texts(3), 1, scale.sequence)
        plan = scale.plan(job.settings)
        fit, least = plan.least.fit, scale.least_bytes(job.settings)
        above, ours = least_that_does(lambda budget, job=job, fit=fit: child(job, fit, budget), least)
        found = {OURS: ours} | all_of(job, scale, PEERS)
        labels = max((one["labels"] for one in found.values() if "labels" in one), default=None)
        base = _limit(scale, plan, labels) + runtime
        for trainer, told in found.items():
            for metric, name in (("whole life", "life"), ("since loaded", "since")):
                peaks = {each: _rss(one)[name] for each, one in found.items()}
                facts = {"peak_mib": peaks[trainer] / MIB, "base_mib": base / MIB, "runtime_mib": runtime / MIB}
                if trainer == OURS:
                    facts |= {"budget_mib": told["budget_bytes"] / MIB}
                yield {
                    "bench": "training",
                    "case": f"{trainer}, {weights}",
                    "metric": f"peak RSS / (M* + runtime), {metric}",
                    "value": peaks[trainer] / base,
                    "unit": "1",
                    **_against(PLAIN, peaks, trainer),
                    "settings": _step(scale, plan, trainer) | facts,
                }
        yield {
            "bench": "training",
            "case": f"{OURS}, {weights}",
            "metric": "least budget that did / the planner's least",
            "value": above,
            "unit": "1",
            "settings": scale.facts | {"tried": ABOVE, "planned_mib": least / MIB},
        }


_RUNTIME = """
import sys, torch, transformers
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
from transformers import AutoModelForCausalLM, LlamaForCausalLM
weight = torch.zeros(64, 64, requires_grad=True)
(weight @ weight).sum().backward()
torch.optim.AdamW([weight], fused=True).step()
status = open("/proc/self/status").read().split()
print(status[status.index("VmRSS:") + 1])
"""


def runtime_bytes(scale: Scale) -> int:
    """RSS of a process with torch, transformers and the tokenizer that has done a tiny step; the median of three."""
    command = [sys.executable, "-c", _RUNTIME, str(loading.find(scale.model, no_progress))]
    env = {**os.environ, "OMP_NUM_THREADS": str(scale.threads), "HF_HUB_OFFLINE": "1"}
    told = [subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return sorted(int(each.split()[-1]) for each in told)[1] * 1024


def child(job: Job, fit: Fit, budget_bytes: int) -> dict[str, Any]:
    """A round of this package's trainer within a budget, as `edge-sdss tune --memory` does it.

    Raises BudgetExceeded also where it did not come to its end with `fit`, for then it did less.
    """
    told: dict[str, Any] = {"budget_bytes": budget_bytes}

    def hear(event: dict[str, Any]) -> None:
        told.update(event.get("ready", {}))
        if "peak_rss_bytes" in event:
            told["peak_rss_bytes"] = event["peak_rss_bytes"]
        if "stepped_down" in event:
            raise BudgetExceeded(f"it gave up {event['stepped_down']['words']}")

    examples = [Example((Turn("user", prompt),), answer) for prompt, answer in job.examples]
    model, room = config.Model(name=job.model), {"budget_bytes": budget_bytes, "fit": fit}
    with tempfile.TemporaryDirectory() as folder:
        found = budgeted.train(model, examples, job.settings, Path(folder) / "adapter", on_event=hear, **room)
    return {**told, "round": found, "peak_tensor_bytes": found.peak_tensor_bytes}


def _rss(told: dict[str, Any]) -> dict[str, int]:
    return {"since": told["peak_rss_bytes"], "life": max(told["peak_rss_bytes"], told["load_peak_rss_bytes"])}


def all_of(job: Job, scale: Scale, trainers: Sequence[str] = (OURS, *PEERS)) -> dict[str, dict[str, Any]]:
    """What each trainer told of the same job; one that cannot do it is left out, and that is said."""
    found = {}
    for trainer in trainers:
        try:
            found[trainer] = measure(replace(job, trainer=trainer), scale.threads)
        except Failed as failed:
            if trainer == OURS:
                raise
            print(f"left out: {trainer}, {job.weights}: {failed}")
    return found


def _limit(scale: Scale, plan: planner.Plan, labels: int | None) -> int:
    """M* of the least step, where so many tokens have a label."""
    return limit.lower_limit(scale.architecture, replace(plan.least.setup, labels=labels)).total_bytes


def _step(scale: Scale, plan: planner.Plan, trainer: str) -> dict[str, Any]:
    facts = scale.facts | {"batch": 1, "sequence": scale.sequence, "rank": RANK}
    return facts | ({"fit": plan.least.fit.words} if trainer == OURS else {})


def _against(peer: str, figures: dict[str, int], trainer: str) -> dict[str, Any]:
    """Ours / the peer's, on our own line alone."""
    if trainer != OURS or peer not in figures:
        return {}
    return {"peer": peer, "ratio": round(figures[OURS] / figures[peer], 4)}
