"""The records of a profile's `report.json`: every key, its unit and what None means.

Knows nothing of how they are measured, written or drawn. What was not measured is None, never 0, and a
text beside it says why. Times are seconds of a monotonic clock since the start of the profile.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge_sdss.sensors import Kind, Scope

SCHEMA_VERSION = "1"
UTC_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$"


class Record(BaseModel):
    """Frozen, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Summary(Record):
    """What the samples of one metric say. The interval is of the median, over runs and their samples."""

    unit: str = Field(description="SI unit of every figure here, such as s or tokens/s")
    better: Literal["lower", "higher"] = Field(description="which direction is better")
    n: int = Field(ge=1, description="samples, count")
    runs: int = Field(ge=1, description="runs that they come from, count")
    median: float
    lo: float | None = Field(description="95 % interval of the median; None where the samples are too few")
    hi: float | None
    p95: float | None = Field(description="None below 20 samples")
    p99: float | None = Field(description="None below 100 samples")
    iqr: float = Field(ge=0, description="interquartile range")
    cv: float | None = Field(description="standard deviation / mean; None where the mean is 0 or n is 1")
    drift: float | None = Field(
        description="change over the repetitions as a share of the median, where it is significant; else None"
    )


class Rail(Record):
    """One power channel over a window."""

    joules: float | None = Field(description="None where the samples are too few or too far apart")
    mean_w: float | None
    peak_w: float | None = Field(description="None for an energy counter")


class Energy(Record):
    """The energy of a case: all its measured runs, without warm-up and pauses."""

    scope: Scope = Field(description="of what the total is")
    total_j: float | None = Field(description="None where there is no total; `reason` says why")
    above_idle_j: float | None = Field(description="total minus idle power times the duration")
    per_item_j: float | None = Field(description="total / items")
    per_item_lo: float | None = Field(default=None, description="95 % interval of J per item over the runs")
    per_item_hi: float | None = None
    mean_w: float | None = None
    peak_w: float | None = None
    rails: dict[str, Rail] = Field(default_factory=dict, description="by sensor:channel")
    samples: int = Field(default=0, ge=0, description="power samples within the runs, count")
    largest_gap_s: float | None = Field(default=None, description="longest time between two of them, s")
    reason: str = Field(default="", description="why a figure is missing")


class Memory(Record):
    """The process's memory in a case, bytes. Peaks are those of the case where the kernel resets them."""

    peak_rss_bytes: int | None
    rss_bytes: int | None = Field(description="at the end")
    uss_bytes: int | None = None
    pss_bytes: int | None = None
    swap_bytes: int | None = None
    cgroup_peak_bytes: int | None = None
    torch_allocated_bytes: int | None = Field(default=None, description="peak on the GPU")
    torch_reserved_bytes: int | None = Field(default=None, description="peak on the GPU")
    available_drop_bytes: int | None = Field(
        default=None, description="MemAvailable before minus its least value during the case"
    )
    note: str = ""


class Run(Record):
    """One block of repetitions, in the order in which blocks were run."""

    order: int = Field(ge=0, description="position among the blocks of all cases")
    start_s: float
    end_s: float
    items: float = Field(ge=0, description="tokens, offers, steps that it processed")
    samples: dict[str, list[float]] = Field(description="raw samples by metric")
    peak_rss_bytes: int | None = Field(default=None, ge=0, description="peak of the process's memory in it")


class Case(Record):
    """One measured case."""

    name: str = Field(description="name of the case, such as decode")
    test: str = Field(description="what exactly, in llama-bench's way, such as tg128")
    about: str = Field(description="one sentence: what a repetition does")
    item: str = Field(description="what is counted, singular, such as token")
    primary: str = Field(description="the metric that a comparison looks at first")
    settings: dict[str, Any]
    metrics: dict[str, Summary]
    runs: tuple[Run, ...]
    energy: Energy
    memory: Memory
    warnings: tuple[str, ...] = ()


class Channel(Record):
    """One channel's samples over the whole profile, thinned for a drawing where there are very many."""

    sensor: str
    name: str
    kind: Kind
    unit: str
    times_s: list[float]
    values: list[float | None]


class SensorInfo(Record):
    """A sensor: usable, or why not."""

    name: str
    usable: bool
    reason: str = Field(default="", description="why it is not usable, and the way out")
    channels: tuple[str, ...] = ()
    absent: dict[str, str] = Field(default_factory=dict, description="rails that are not used, and why")


class Sampler(Record):
    """What the sampling itself did."""

    interval_s: float
    jitter: float = Field(description="share of the interval by which each wait varies, both ways")
    passes: int
    busy_s: float = Field(description="processor time of the sampling thread, s")
    share: float = Field(description="busy_s / duration: share of one core")
    largest_gap_s: float | None = None


class Idle(Record):
    """Power of the machine while nothing is measured, before and after the cases."""

    before_w: float | None
    after_w: float | None
    drift: float | None = Field(description="(after - before) / before")
    flagged: bool = Field(description="whether the drift is above 5 %")


class State(Record):
    """What a result depends on and what may change while measuring. None or empty: not known here."""

    power_mode: str | None = Field(default=None, description="nvpmodel's or the firmware's mode")
    governors: dict[str, str] = Field(default_factory=dict, description="by cpu policy")
    clocks_hz: dict[str, float] = Field(default_factory=dict)
    clocks_locked: bool | None = Field(default=None, description="least = greatest clock on every cpu policy")
    fan: dict[str, float] = Field(default_factory=dict, description="duty of each fan, 0 to 1")
    temperatures_c: dict[str, float] = Field(default_factory=dict)
    throttled: tuple[str, ...] = Field(default=(), description="alarms that are on, in words")
    throttle_counts: dict[str, int] = Field(default_factory=dict, description="throttling events since boot")
    available_bytes: int | None = None
    load_1min: float | None = None


class Device(Record):
    """The machine."""

    name: str = Field(description="slug under which results are kept")
    model: str = Field(description="the board's or the processor's name")
    profile: str | None = Field(default=None, description="file of edge_sdss/boards that fits it; None: none")
    cores: int
    memory_bytes: int | None
    l4t: str | None = None
    jetpack: str | None = None
    emulated: bool = False
    replayed: bool = Field(default=False, description="sensors come from a recording: no figure here is a device's")


class Model(Record):
    """The language model that was measured."""

    name: str
    sha256: str
    parameters: int
    bytes: int
    dtype: str
    backend: str = Field(description="what computes, such as torch cpu, 2 threads")


class Report(Record):
    """Everything that a profile measured."""

    schema_version: Literal["1"] = "1"
    kind: Literal["profile"] = "profile"
    created: str = Field(pattern=UTC_TIME)
    command: str
    device: Device
    environment: dict[str, Any]
    model: Model | None
    clocks: Literal["observe", "require", "set"] = "observe"
    total_scope: Scope
    total_note: str = Field(description="which rails add up to the total, or why there is none")
    sensors: tuple[SensorInfo, ...]
    sampler: Sampler
    idle: Idle | None = Field(description="None where there is no total")
    before: State
    after: State
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = Field(default=(), description="what was set, or changed, while measuring, in words")
    failed: dict[str, str] = Field(default_factory=dict, description="cases that ended with an error, and which")
    trace: tuple[Channel, ...]
    duration_s: float
    settings: dict[str, Any]


def json_schema() -> str:
    """Returns the JSON Schema (draft 2020-12) of a profile's `report.json`, as text."""
    return json.dumps(Report.model_json_schema(), indent=2) + "\n"
