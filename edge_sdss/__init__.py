"""Learn from the user of a device, on the device: select, ask, synthesise, tune, gate.

`import edge_sdss` loads nothing heavy; each of the names below comes with its module when it is first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# ONNX Runtime's own wheels give the machine an id and send events of its use; nothing leaves the device.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "Annotation": "types",
    "Buffer": "selection",
    "Config": "config",
    "Decision": "types",
    "Dialogue": "types",
    "EdgeSdssError": "errors",
    "LanguageModel": "lm",
    "Selector": "selection",
    "Session": "session",
}

if TYPE_CHECKING:
    from edge_sdss.config import Config as Config
    from edge_sdss.errors import EdgeSdssError as EdgeSdssError
    from edge_sdss.lm import LanguageModel as LanguageModel
    from edge_sdss.selection import Buffer as Buffer
    from edge_sdss.selection import Selector as Selector
    from edge_sdss.session import Session as Session
    from edge_sdss.types import Annotation as Annotation
    from edge_sdss.types import Decision as Decision
    from edge_sdss.types import Dialogue as Dialogue


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
