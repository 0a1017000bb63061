"""The one session that a bundle's engine has open: without adapters' nodes until an adapter is asked for.

Even of rank 0 these nodes take a twelfth of a decode step. Knows nothing of tokens and of what adapters hold.
"""

from __future__ import annotations

from pathlib import Path

from edge_sdss.bundles import Manifest
from edge_sdss.runtime import providers
from edge_sdss.runtime.lane import Loaded


class Sessions:
    """Opens the bundle's graph on the provider asked for, as `providers.open_session` does, and raises what it does.

    `provider` is what it runs on, `reason` why, `device` where its tensors are bound.
    """

    def __init__(self, folder: Path, manifest: Manifest, asked: str, threads: int | None) -> None:
        graph = manifest.graph
        self._folder, self._manifest, self._threads = folder, manifest, threads
        self._loaded = self._open(graph.plain if graph.plain and manifest.active is None else graph.file, asked)

    def loaded(self, *, adapters: bool) -> Loaded:
        """Returns the open session; where `adapters` are asked for, and it has none of their inputs, another.

        It takes the place of the first, and stays: two would hold the weights twice.
        """
        if adapters and not self._loaded.adapters:
            self._loaded = self._open(self._manifest.graph.file, self.provider)
        return self._loaded

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self._loaded.device

    def _open(self, file: str, asked: str) -> Loaded:
        opened = providers.open_session(self._folder / file, self._manifest, asked, self._threads)
        if not hasattr(self, "provider"):
            self.provider, self.reason = opened.provider, opened.reason
        whole = file == self._manifest.graph.file
        return Loaded.of(opened.session, self._manifest, opened.device, adapters=whole)
