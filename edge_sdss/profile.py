"""A profile from end to end: sensors, state, cases, report. Knows the order of the work, and nothing of any part."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdss import boards, cases, device, jetpack
from edge_sdss.config import Config
from edge_sdss.profiling import clocks, harness, schema, state
from edge_sdss.profiling.meter import Meter
from edge_sdss.sensors import total
from edge_sdss.tree import Tree
from edge_sdss.types import Progress, no_progress

if TYPE_CHECKING:
    from edge_sdss.lm import LanguageModel


def profile(
    chosen: Sequence[str],
    settings: Config,
    *,
    home: Path,
    tree: Tree | None = None,
    sensors: Sequence[str] | None = None,
    command: str = "",
    lm: LanguageModel | None = None,
    progress: Progress = no_progress,
) -> schema.Report:
    """Measures the cases `chosen` (none: all) on the model of the settings.

    `sensors` names those that must be readable (None: every one that is). `home` holds the note from which
    clocks are restored should the process be killed. Raises InputError for an unknown case, SensorUnavailable
    and ConfigError where a sensor or the clocks that were asked for are not to be had.
    """
    tree = tree or Tree()
    plan = settings.profile
    subject = cases.Subject(settings, lm=lm, clock=time.perf_counter, progress=progress)
    try:
        workloads = cases.workloads(chosen or cases.names(), subject)
        meter = Meter.auto(tree, sensors, interval_s=plan.interval_s, jitter=plan.jitter, seed=plan.seed)
        with clocks.held(plan.clocks, tree, home / "clocks.json") as changed, meter:
            model = _model(subject.lm)
            before = state.capture(tree)
            found = harness.measure(workloads, plan, meter, tree=tree, progress=progress)
            after = state.capture(tree)
            duration = meter.now() - meter.origin_s
    finally:
        subject.close()
    _, summed = total(meter.sensors)
    return schema.Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        device=describe(tree),
        environment=device.environment(tree.root),
        model=model,
        clocks=plan.clocks,
        total_scope=summed.scope,
        total_note=summed.note,
        sensors=meter.sensors_info(),
        sampler=meter.sampler_info(),
        idle=found.idle,
        before=before,
        after=after,
        cases=found.cases,
        notes=(*changed, *state.changes(before, after)),
        failed=found.failed,
        trace=meter.trace(),
        duration_s=duration,
        settings=settings.model_dump(mode="json"),
    )


def describe(tree: Tree) -> schema.Device:
    """The machine, as results name it."""
    board, jetson = boards.match(tree), jetpack.detect(tree)
    return schema.Device(
        name=device.slug(tree.root),
        model=device.processor(tree.root),
        profile=device.emulated() or (board.name if board else None),
        cores=device.cores(),
        memory_bytes=device.memory_bytes(tree.root),
        l4t=jetson.l4t if jetson else None,
        jetpack=jetson.jetpack if jetson else None,
        emulated=device.emulated() is not None,
        replayed=tree.recorded or _foreign(tree),
    )


def _foreign(tree: Tree) -> bool:
    """Whether the tree is another machine's than the one that computes: a board's, below an x86 processor."""
    board = tree.exists("proc/device-tree/model") or tree.exists("sys/firmware/devicetree/base/model")
    return board and platform.machine() in ("x86_64", "AMD64")


def _model(lm: LanguageModel) -> schema.Model:
    import torch

    weights = list(lm.base.parameters())
    threads = f", {torch.get_num_threads()} threads" if lm.device.type == "cpu" else ""
    return schema.Model(
        name=Path(lm.name).name,
        sha256=lm.fingerprint,
        parameters=lm.parameters,
        bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        dtype=str(weights[0].dtype).removeprefix("torch."),
        backend=f"torch {lm.device.type}{threads}",
    )
