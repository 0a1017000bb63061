"""NVML: energy or power, temperature, clock, load and memory of NVIDIA's GPUs, through the package nvidia-ml-py.

Energy is a counter in mJ since the driver was loaded (Volta and later); power, in mW, is what older GPUs have, and
from Ampere on (GA100 apart) NVML averages it over 1 s. Source: docs.nvidia.com/deploy/nvml-api, device queries.
On a Jetson NVML starts, counts one GPU and then answers "Not Supported" to every question, so it says so here.
Knows nothing of which GPU a model runs on: the total is of all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Kind, Reading, Total
from edge_sdss.tree import Tree

ASKED = "read NVIDIA GPUs (nvml)"
DRIVER = "install NVIDIA's driver, or in a container start it with --gpus all"
GROUP = "let this user open /dev/nvidia*, on many systems by the group video"

Query = Callable[[], float]


class Nvml:
    """The quantities that each GPU answered when it was opened. A GPU that is lost later reads as None."""

    name = "nvml"

    def __init__(
        self, library: Any, clock: Clock, queries: dict[Channel, Query], total: Total, absent: Mapping[str, str]
    ) -> None:
        self._library, self._clock, self._queries = library, clock, queries
        self._open = True
        self.channels = tuple(queries)
        self.total = total
        self.absent = absent

    def read(self) -> Reading | None:
        """Returns every quantity of every GPU, in SI units."""
        time_s = self._clock()
        return Reading(time_s, {channel.name: self._ask(query) for channel, query in self._queries.items()})

    def _ask(self, query: Query) -> float | None:
        try:
            return query()
        except self._library.NVMLError:
            return None

    def close(self) -> None:
        """Ends NVML."""
        if self._open:
            self._open = False
            _shutdown(self._library)


def open(tree: Tree, clock: Clock, *, library: Any = None) -> Nvml:
    """Starts NVML and asks every GPU what it can tell. `library` stands for pynvml.

    Raises SensorUnavailable where NVML is missing or refuses, and where no GPU tells its energy or power.
    """
    library = library or _import(tree)
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        do = GROUP if isinstance(error, library.NVMLError_NoPermission) else DRIVER
        raise SensorUnavailable(message(ASKED, f"NVML does not start: {error}", do)) from error
    try:
        gpus, absent = _gpus(library)
        queries = _queries(library, gpus, absent)
        return Nvml(library, clock, queries, _total(queries, gpus, absent), absent)
    except BaseException:
        _shutdown(library)
        raise


def _import(tree: Tree) -> Any:
    if tree.recorded or tree.root != Path("/"):
        found = f"{tree.root} is not this machine, and files hold no GPU"
        raise SensorUnavailable(message(ASKED, found, "run it where the GPU is"))
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        do = "run `pip install nvidia-ml-py` where there is an NVIDIA GPU"
        raise SensorUnavailable(message(ASKED, "the package nvidia-ml-py is not installed", do)) from error


def _gpus(library: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The handles of the GPUs, and why others have none. Raises SensorUnavailable where they cannot be counted."""
    gpus: dict[str, Any] = {}
    absent: dict[str, str] = {}
    try:
        count = library.nvmlDeviceGetCount()
    except library.NVMLError as error:
        raise SensorUnavailable(message(ASKED, f"the GPUs cannot be counted: {error}", DRIVER)) from error
    for index in range(count):
        try:
            gpus[f"gpu{index}"] = library.nvmlDeviceGetHandleByIndex(index)
        except library.NVMLError as error:
            absent[f"gpu{index}"] = str(error)
    return gpus, absent


def _queries(library: Any, gpus: Mapping[str, Any], absent: dict[str, str]) -> dict[Channel, Query]:
    """The questions that the GPUs answer; those they refuse go to `absent`.

    Of energy and power it keeps the one that more GPUs tell, energy between equals: a total is of one kind.
    Raises SensorUnavailable where no GPU tells either.
    """
    queries: dict[Channel, Query] = {}
    for gpu, handle in gpus.items():
        for kind, query in _quantities(library, handle).items():
            try:
                query()
                queries[Channel(f"{gpu}/{kind}", kind)] = query
            except library.NVMLError as error:
                absent[f"{gpu}/{kind}"] = str(error)
    kinds = [channel.kind for channel in queries]
    if not {"energy", "power"} & set(kinds):
        seen = ", ".join(f"{_name(library, handle)}: no energy, no power" for handle in gpus.values())
        why = "; ".join(sorted(set(absent.values())))
        do = "on a Jetson use ina3221 or tegrastats, elsewhere a GPU and driver that tell their power"
        raise SensorUnavailable(message(ASKED, " ".join(filter(None, [seen or "no GPU", why and f"({why})"])), do))
    other = "power" if kinds.count("energy") >= kinds.count("power") else "energy"
    for gpu in gpus:
        absent.pop(f"{gpu}/{other}", None)
    return {channel: query for channel, query in queries.items() if channel.kind != other}


def _quantities(library: Any, gpu: Any) -> dict[Kind, Query]:
    """The questions to one GPU, whose answers are in SI units."""
    return {
        "energy": lambda: library.nvmlDeviceGetTotalEnergyConsumption(gpu) * 1e-3,
        "power": lambda: library.nvmlDeviceGetPowerUsage(gpu) * 1e-3,
        "temperature": lambda: float(library.nvmlDeviceGetTemperature(gpu, library.NVML_TEMPERATURE_GPU)),
        "frequency": lambda: library.nvmlDeviceGetClockInfo(gpu, library.NVML_CLOCK_SM) * 1e6,
        "load": lambda: library.nvmlDeviceGetUtilizationRates(gpu).gpu * 1e-2,
        "memory": lambda: float(library.nvmlDeviceGetMemoryInfo(gpu).used),
    }


def _total(queries: Mapping[Channel, Query], gpus: Mapping[str, Any], absent: Mapping[str, str]) -> Total:
    """All GPUs: `partial` where one of them does not tell what the others do."""
    powers = {channel.name.partition("/")[0]: channel for channel in queries if channel.kind in ("energy", "power")}
    lost = [name for name in absent if "/" not in name] + [gpu for gpu in gpus if gpu not in powers]
    note = f"without {', '.join(sorted(lost))}" if lost else "all GPUs with their memory"
    if any(channel.kind == "power" for channel in powers.values()):
        note += "; power may be an average over 1 s"
    return Total("partial" if lost else "gpu", tuple(channel.name for channel in powers.values()), note)


def _name(library: Any, gpu: Any) -> str:
    try:
        name = library.nvmlDeviceGetName(gpu)
    except library.NVMLError:
        return "unnamed"
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _shutdown(library: Any) -> None:
    try:
        library.nvmlShutdown()
    except library.NVMLError:
        return
