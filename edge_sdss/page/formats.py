"""Numbers and names as people read them: a true minus sign, a dash for what is unknown. Knows no record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"

__all__ = ["count", "duration", "figures", "mib", "num", "plural", "quantity", "share", "signed", "size"]

_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB")
_PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G"}
_PREFIXED = {"s": (-3, 0), "J": (-2, 1), "W": (-1, 1), "Hz": (0, 3)}


def num(value: float | None, digits: int = 2) -> str:
    """Formats a number with a true minus sign; None is a dash."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """Formats a difference: always with its sign."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def count(value: int | None) -> str:
    """Formats a count with thousands set apart."""
    return NONE if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Formats bytes in the binary unit that keeps it below 1024."""
    if value is None:
        return NONE
    divisor, unit = prefixed(value, "bytes")
    return f"{value / divisor:.{0 if unit == 'bytes' else 1}f} {unit}"


def mib(value: float) -> str:
    """Formats bytes in whole MiB, for texts that compare several."""
    return f"{value / (1 << 20):.0f} MiB"


def duration(value: float | None) -> str:
    """Formats seconds."""
    if value is None:
        return NONE
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{value:.{1 if value < 9.95 else 0}f} s"


def share(part: float, whole: float = 1) -> str:
    """Formats part / whole in percent."""
    return NONE if not whole else f"{100 * part / whole:.{0 if 10 * part >= whole else 1}f} %"


def figures(value: float | None, digits: int = 3) -> str:
    """Formats a number by its significant digits, thousands set apart, never as a power of ten."""
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}".replace("-", MINUS)
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}".replace("-", MINUS)


def prefixed(value: float, unit: str, digits: int = 3) -> tuple[float, str]:
    """Returns the divisor and the unit in which `value` of an SI unit reads best: 0.00013, "s" gives 1e-6, "µs"."""
    if unit == "bytes":
        power = min(int(math.log2(abs(value)) // 10), len(_BINARY) - 1) if abs(value) >= 1024 else 0
        return 1024.0**power, _BINARY[power]
    least, most = _PREFIXED.get(unit, (0, 0))
    rounded = abs(float(f"{value:.{digits - 1}e}"))
    power = min(max(math.floor(math.log10(rounded) / 3), least), most) if rounded else 0
    return 1000.0**power, _PREFIXES[power] + unit


def quantity(value: float | None, unit: str, digits: int = 3) -> str:
    """Formats a value of an SI unit with the prefix that suits it: 0.00013 s is 130 µs, 1e9 Hz is 1.00 GHz."""
    if value is None:
        return NONE
    if unit == "bytes":
        return size(value)
    divisor, label = prefixed(value, unit, digits)
    return f"{figures(value / divisor, digits)} {label}"


def plural(noun: str) -> str:
    """Returns an English noun's regular plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def flat(value: Mapping[str, Any], none: str = "default", prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields nested settings as (section.name, text); None reads as `none`."""
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield from flat(one, none, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", none if one is None else str(one)
