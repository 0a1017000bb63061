"""Which power rails of a Jetson add up, and to the power of what. Knows labels only, no files and no versions.

Sources: the developer guides of Jetson Linux 32 to 38 (chapters on platform power and performance: what each
INA3221 channel measures), the design guide of AGX Xavier (its six monitored supplies are apart from each
other), NVIDIA's forum 200883 (VDD_IN is the module as a whole) and 366461 (Thor's INA238 measures all that the
board draws).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_sdss.sensors import Scope, Total

_LEAST_W, _MOST_W = -1.0, 1000.0


@dataclass(frozen=True)
class _Family:
    """Rails none of which feeds another, and of what they are the power when all are there."""

    rails: tuple[str, ...]
    scope: Scope
    note: str


# In the order in which they are preferred: the single inputs first, for they contain the others.
_FAMILIES = (
    _Family(("VIN",), "board", "VIN: all that the board draws at its input, module and carrier"),
    _Family(("VDD_IN",), "module", "VDD_IN: the module's input, which contains its other rails"),
    _Family(("POM_5V_IN",), "module", "POM_5V_IN: the module's input, which contains its other rails"),
    _Family(
        ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        "module",
        "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0: the module's supplies; VDDQ_VDD2_1V8AO is fed by the last",
    ),
    _Family(
        ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
        "module",
        "GPU + CPU + SOC + CV + VDDRQ + SYS5V: the module's supplies",
    ),
    _Family(("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), "partial", "the monitored supplies; VIN is missing"),
    _Family(("VDD_CPU_GPU_CV", "VDD_SOC"), "partial", "processors only; VDD_IN is missing"),
    _Family(("VDD_CPU_GPU", "VDD_SOC"), "partial", "processors only; VDD_IN is missing"),
    _Family(("POM_5V_GPU", "POM_5V_CPU"), "partial", "processors only; POM_5V_IN is missing"),
    _Family(
        ("VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_SYS_CPU", "VDD_SYS_DDR", "VDD_4V0_WIFI"),
        "partial",
        "the monitored supplies; VDD_IN is missing",
    ),
    _Family(
        ("VDD_GPU", "VDD_SOC", "VDD_CPU", "VDD_DDR", "VDD_WIFI"), "partial", "the monitored supplies; VDD_IN is missing"
    ),
)


def total(labels: Iterable[str]) -> Total:
    """Returns the widest total that the rails at hand allow; a family with a rail missing is `partial`."""
    here = tuple(dict.fromkeys(labels))
    for family in _FAMILIES:
        if family.scope != "partial" and set(family.rails) <= set(here):
            return Total(family.scope, family.rails, family.note)
    best = max(_FAMILIES, key=lambda family: len(set(family.rails) & set(here)))
    rails = tuple(rail for rail in best.rails if rail in here)
    if not rails:
        known = "; it is not known which rail contains which, so none are added up" if here else ""
        return Total(note=f"no rail whose meaning is known{known}")
    missing = [rail for rail in best.rails if rail not in here]
    lacking = f"without {', '.join(missing)}" if missing else best.note
    return Total("partial", rails, f"{' + '.join(rails)}: {lacking}")


def plausible(watts: float) -> float | None:
    """Returns a rail's power, None where no board draws it. Idle rails may read a little below 0: an offset."""
    return watts if _LEAST_W <= watts <= _MOST_W else None


def connected(label: str) -> bool:
    """Whether a channel has a name; `NC` is what device trees call one that is not connected."""
    return bool(label) and not (label[:2].upper() == "NC" and not label[2:].strip("0123456789"))
