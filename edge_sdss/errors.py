"""The exception tree. The command line prints the message as one line and exits 2.

    EdgeSdssError
    ├── InputError           what was given cannot be used (a file, a record, an answer)
    ├── ConfigError          a setting is unknown, out of range or contradicts another
    ├── BackendUnavailable   a backend, model or library that was asked for is not here
    ├── SensorUnavailable    a sensor cannot be read
    ├── BudgetExceeded       a stated budget (bins, bytes, memory) cannot be kept
    ├── ParityError          two computations that must agree do not
    ├── ExportError          a model or adapter cannot be exported
    └── GateRejected         a round made the model worse, so its adapter was not activated

A message says what was asked, what was found and what to do; `message` puts the three together.
"""

from __future__ import annotations


class EdgeSdssError(Exception):
    """Root of every error that this package raises on purpose."""


class InputError(EdgeSdssError):
    """What was given cannot be used."""


class ConfigError(EdgeSdssError):
    """A setting is unknown, out of range or contradicts another."""


class BackendUnavailable(EdgeSdssError):
    """A backend, model or library that was asked for is not here."""


class SensorUnavailable(EdgeSdssError):
    """A sensor cannot be read."""


class BudgetExceeded(EdgeSdssError):
    """A stated budget (bins, bytes, memory) cannot be kept."""


class ParityError(EdgeSdssError):
    """Two computations that must agree do not."""


class ExportError(EdgeSdssError):
    """A model or adapter cannot be exported."""


class GateRejected(EdgeSdssError):
    """A round made the model worse, so its adapter was not activated."""


def message(asked: str, found: str, do: str) -> str:
    """Returns the one-line message of an error: what was asked, what was found, what to do."""
    return f"{asked}: {found}; {do}."
