"""Stage by stage, what was made computes what it was made from: torch, float graph, graph, engine.

The texts are everyday ones of the package's own. Knows nothing of bundles on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sdss import config, general
from edge_sdss.bundles import Check, Graph
from edge_sdss.bundling import probing
from edge_sdss.errors import ParityError, message
from edge_sdss.exporting import parity
from edge_sdss.exporting.parity import Ids, Logits, Rows
from edge_sdss.exporting.ways import GraphModel, of_torch
from edge_sdss.types import Progress

if TYPE_CHECKING:
    from edge_sdss.bundles.recipes import Recipe
    from edge_sdss.lm.chat import Chat

_TEXTS, _TOKENS = 6, 40


def texts(chat: Chat) -> list[Ids]:
    """Question and answer in the model's own template, ids [n], n up to 40 each."""
    examples = general.examples()[:: max(len(general.examples()) // _TEXTS, 1)][:_TEXTS]
    return [np.array(chat.encode(example, _TOKENS).ids, np.int64) for example in examples]


class Stages:
    """The comparisons of one export, in their order; `checks` is what was measured, `notes` what was not.

    Of a stage its logits are kept, [n, vocabulary] for each text, and not the model.
    """

    def __init__(self, texts: list[Ids], progress: Progress) -> None:
        self.texts, self.progress = texts, progress
        self.checks: tuple[Check, ...] = ()
        self.notes: list[str] = []
        self.known: dict[str, Logits] = {}

    def torch(self, folder: Path, adapters: Mapping[str, Path], fingerprint: str, merged: Path | None) -> None:
        """Takes what torch says, with the adapter to be merged where there is one, and the probes that lack.

        The model is loaded in float32 and let go. Raises what loading it and attaching an adapter raise.
        """
        if not probing.has_torch():
            self.notes.append("not compared with torch: it is not installed here")
            return
        from edge_sdss.lm import LanguageModel

        settings = config.Model(name=str(folder), device="cpu", dtype="float32")
        lm = LanguageModel.load(settings, progress=self.progress)
        lacking = [adapter for adapter in adapters.values() if not probing.probed(adapter, fingerprint)]
        for done, adapter in enumerate(lacking):
            self.progress("probing adapters", done, len(lacking))
            probing.record(lm, adapter)
        if lacking:
            self.progress("probing adapters", len(lacking), len(lacking))
        lm.attach(merged)
        self._keep("torch", of_torch(lm.model))

    def graph(self, stage: str, against: str, folder: Path, graph: Graph, *, keep: bool = False) -> None:
        """Compares a graph with an earlier stage, if that was possible. Raises ParityError."""
        way: Logits = GraphModel(folder, graph).base
        if keep:
            self._keep(stage, way)
            way = self.known[stage]
        self.compare(stage, against, way, parity.LIMITS[graph.precision])

    def compare(self, stage: str, against: str, way: Logits, limits: parity.Limits) -> None:
        """Compares a way with an earlier stage, if there was that one. Raises ParityError."""
        if against not in self.known:
            return
        counted = self._counted(f"comparing {stage} with {against}", way)
        self.checks += parity.compare(stage, against, self.known[against], counted, self.texts, limits)

    def judge(self, recipe: Recipe, size_bytes: int | None, beyond_limits: bool) -> None:
        """Holds what was measured against the recipe's own limits, which are closer than those of a precision.

        Raises ParityError with the figures that are beyond; with `beyond_limits` they are noted instead.
        """
        limits, beyond = recipe.limits, []
        stated = {"max |Δlogit|": limits.logit_difference, "NLL change": limits.nll_increase, "mean KL": limits.kl_nats}
        for check in self.checks:
            limit = stated.get(check.metric)
            if limit is not None and check.value > limit and "engine" not in check.stage:
                beyond.append(
                    f"{check.stage} against {check.against}: {check.metric} {check.value:.3g} on {check.n} tokens, "
                    f"recipe {recipe.name} allows {limit:g}"
                )
        if size_bytes is not None and limits.bundle_bytes is not None and size_bytes > limits.bundle_bytes:
            allowed = f"recipe {recipe.name} allows {limits.bundle_bytes / 1e6:.0f} MB"
            beyond.append(f"the bundle has {size_bytes / 1e6:.1f} MB, {allowed}")
        if beyond and not beyond_limits:
            do = "choose a recipe of higher precision, or pass --beyond-limits to have it all the same"
            raise ParityError(message(f"export for {recipe.name}", "; ".join(beyond), do))
        self.notes += beyond

    def _keep(self, stage: str, way: Logits) -> None:
        counted = self._counted(f"computing with {stage}", way)
        rows: Mapping[bytes, Rows] = {ids.tobytes(): counted(ids) for ids in self.texts}
        self.known[stage] = lambda ids: rows[ids.tobytes()]

    def _counted(self, what: str, way: Logits) -> Logits:
        done = 0

        def logits(ids: Ids) -> Rows:
            nonlocal done
            self.progress(what, done, len(self.texts))
            rows = way(ids)
            done += 1
            self.progress(what, done, len(self.texts))
            return rows

        return logits


def of_engine(logits: Callable[..., Rows]) -> Logits:
    """Returns ids -> logits of an `Engine.logits`, the base model's."""
    return lambda ids: logits(ids.tolist(), None)
