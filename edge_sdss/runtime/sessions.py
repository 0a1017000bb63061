"""The one session that a bundle's engine has open: without adapters' nodes until an adapter is asked for.

Even of rank 0 these nodes take a twelfth of a decode step. Knows nothing of tokens and of what adapters hold.
"""

from __future__ import annotations

from pathlib import Path

from edge_sdss.bundles import Manifest
from edge_sdss.runtime import providers
from edge_sdss.runtime.lane import Loaded
from edge_sdss.runtime.providers import Opened


class Sessions:
    """Opens the bundle's graph on the provider asked for, as `providers.open_session` does, and raises what it does.

    `provider` is what it runs on, `reason` why, `device` where its tensors are bound.
    """

    def __init__(self, folder: Path, manifest: Manifest, asked: str, threads: int | None) -> None:
        self._folder, self._manifest, self._threads = folder, manifest, threads
        self._whole = not manifest.graph.plain or manifest.active is not None
        opened = self._open(asked)
        self.provider, self.reason = opened.provider, opened.reason
        self._loaded: Loaded | None = self._of(opened)

    def would_change(self, *, adapters: bool) -> bool:
        """Whether `loaded` would open another session: what holds the one before keeps its weights in memory."""
        return adapters and not self._whole

    def loaded(self, *, adapters: bool) -> Loaded:
        """Returns the open session; where `adapters` are asked for, and it has none of their inputs, another.

        It takes the place of the first, and stays: two would hold the weights twice.
        """
        if self.would_change(adapters=adapters):
            self._loaded, self._whole = None, True
        if self._loaded is None:
            self._loaded = self._of(self._open(self.provider))
        return self._loaded

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self.loaded(adapters=False).device

    def _open(self, asked: str) -> Opened:
        graph = self._manifest.graph
        file = graph.file if self._whole or not graph.plain else graph.plain
        return providers.open_session(self._folder / file, self._manifest, asked, self._threads)

    def _of(self, opened: Opened) -> Loaded:
        return Loaded.of(opened.session, self._manifest, opened.device, adapters=self._whole)
