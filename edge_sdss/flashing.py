"""The commands that put NVIDIA's Jetson Linux with our overlay on a board. Runs nothing and fetches nothing.

From the Jetson Linux Developer Guides of L4T 35, 36 and 38, chapters Quick Start and Flashing Support. What flashes
is NVIDIA's own; our overlay is unpacked over its root file system before.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from edge_sdss.errors import InputError, message
from edge_sdss.jetpack import RELEASES

ARCHIVE = "https://developer.nvidia.com/embedded/jetson-linux-archive"

_NVME = (
    "sudo ./tools/kernel_flash/l4t_initrd_flash.sh --external-device nvme0n1p1"
    " -c tools/kernel_flash/flash_l4t_t234_nvme.xml"
    ' -p "-c bootloader/generic/cfg/flash_t234_qspi.xml" --showlogs --network usb0 {config} internal'
)
_EMMC = "sudo ./flash.sh {config} internal"
_THOR = "sudo ./l4t_initrd_flash.sh {config} internal"


class _Carrier(NamedTuple):
    """Of the developer kit: NVIDIA's name for its configuration, the L4T that know it, and how it is flashed."""

    config: str
    majors: tuple[int, ...]
    flash: str
    options: str = ""  # of apply_binaries.sh


# A carrier of one's own has a configuration of its maker's; the rest is the same.
_CARRIERS = {
    "orin-nano-4gb": _Carrier("jetson-orin-nano-devkit", (36, 39), _NVME),
    "orin-nano-8gb": _Carrier("jetson-orin-nano-devkit", (36, 39), _NVME),
    "orin-nano-super": _Carrier("jetson-orin-nano-devkit-super", (36, 39), _NVME),
    "orin-nx-8gb": _Carrier("jetson-orin-nano-devkit", (36, 39), _NVME),
    "orin-nx-16gb": _Carrier("jetson-orin-nano-devkit", (36, 39), _NVME),
    "agx-orin-32gb": _Carrier("jetson-agx-orin-devkit", (36, 39), _EMMC),
    "agx-orin-64gb": _Carrier("jetson-agx-orin-devkit", (36, 39), _EMMC),
    "agx-orin-devkit": _Carrier("jetson-agx-orin-devkit", (36, 39), _EMMC),
    "thor": _Carrier("jetson-agx-thor-devkit", (38, 39), _THOR, " --openrm"),
}


class Step(NamedTuple):
    """Why, and the command."""

    about: str
    command: str


class Plan(NamedTuple):
    """The steps in order; `notes` is what to know before."""

    board: str
    l4t: str
    jetpack: str
    python: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...]


def boards() -> tuple[str, ...]:
    """The boards that there is a plan for."""
    return tuple(_CARRIERS)


def plan(board: str, l4t: str, overlay: str | None = None) -> Plan:
    """The commands for a board and an L4T such as 36.4.3, on an x86-64 Ubuntu host.

    Raises InputError where the board is none that is flashed so, the L4T is unknown, or one does not go with the other.
    """
    asked = f"plan to flash {board} with L4T {l4t}"
    carrier = _CARRIERS.get(board)
    if carrier is None:
        raise InputError(message(asked, "no such Jetson", f"choose {', '.join(sorted(_CARRIERS))}"))
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", l4t):
        raise InputError(message(asked, f"{l4t!r} is no L4T", "write it as 36.4.3, see " + ARCHIVE))
    major = int(l4t.partition(".")[0])
    release = RELEASES.get(l4t) or RELEASES.get(".".join(l4t.split(".")[:2]))
    if major not in carrier.majors or release is None:
        known = [number for number in RELEASES if int(number.partition(".")[0]) in carrier.majors]
        found = f"L4T {major} is not for this board" if major not in carrier.majors else "this release is not known"
        raise InputError(message(asked, found, f"choose one of {', '.join(known)} or a point release of it"))
    return Plan(
        board, l4t, release.jetpack, release.python, _steps(carrier, l4t, release.python, board, overlay), _NOTES
    )


_NOTES = (
    "Everything on the board is erased. Put it into recovery mode and connect it by USB first.",
    "These are the developer kit's commands; a carrier of another maker has a configuration of its own.",
    "Printed from NVIDIA's guides; this program has not run them on a board.",
)


def _steps(carrier: _Carrier, l4t: str, python: str, board: str, overlay: str | None) -> tuple[Step, ...]:
    release = f"R{l4t}_aarch64.tbz2"
    made = overlay or f"dist/edge-sdss-overlay_arm64_py{python}.tar"
    build = f"python docker/build.py --python {python} --architecture arm64 --board {board} --out dist"
    into = "Linux_for_Tegra"
    return (
        *(() if overlay else (Step("Our overlay and .deb, bit for bit the same each time.", build),)),
        Step(
            f"Both archives are at {ARCHIVE}, under this release.",
            f"sha256sum Jetson_Linux_{release} Tegra_Linux_Sample-Root-Filesystem_{release}",
        ),
        Step("NVIDIA's driver package.", f"tar xf Jetson_Linux_{release}"),
        Step(
            "The root file system; as root, for its owners.",
            f"sudo tar xpf Tegra_Linux_Sample-Root-Filesystem_{release} -C {into}/rootfs/",
        ),
        Step("What flashing needs on this host.", f"cd {into} && sudo ./tools/l4t_flash_prerequisites.sh"),
        Step("NVIDIA's drivers into the root file system.", f"sudo ./apply_binaries.sh{carrier.options}"),
        Step("Our overlay over it.", f"sudo tar xpf ../{made} -C rootfs/ --keep-directory-symlink --numeric-owner"),
        Step("Flashes. Nothing before this touches the board.", carrier.flash.format(config=carrier.config)),
        Step("On the board, after its first boot.", "edge-sdss health --socket /run/edge-sdss/health.sock"),
    )
