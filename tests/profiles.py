"""A realistic record of a profile for tests: made up, of a board that nobody measured."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

from edge_sdss.profiling import schema

# (name, test, item, primary, seconds per item, items a repetition, repetitions a run, watts)
CASES = (
    ("load", "load", "load", "time", 1.9, 1, 2, 7.4),
    ("embed", "embed", "dialogue", "time", 0.052, 1, 24, 11.8),
    ("select", "select", "offer", "time", 0.000131, 1, 60, 6.1),
    ("offer", "offer", "offer", "time", 0.055, 1, 24, 11.2),
    ("prefill", "pp512", "token", "rate", 0.0021, 512, 4, 13.9),
    ("decode", "tg128", "token", "rate", 0.041, 127, 2, 9.6),
    ("synth", "synth", "variant", "time", 2.8, 1, 2, 10.1),
    ("train-step", "train-step", "step", "time", 3.4, 1, 2, 14.3),
    ("round", "round", "round", "time", 31.0, 1, 1, 12.6),
)
RUNS, IDLE_W, NO_POWER = 3, 4.6, "no power sensor can be read here"


def example(power: bool = True, seed: int = 0, **changes: Any) -> schema.Report:
    """Every case, in three runs of random order; `power=False`: as on a machine without a power sensor."""
    rng = random.Random(seed)
    order = [case for _ in range(RUNS) for case in rng.sample(CASES, len(CASES))]
    now, blocks = 8.0, []
    for position, case in enumerate(order):
        run = _run(rng, position, now, case)
        blocks.append((case, run))
        now = run.end_s + 0.4
    end = now + 6.0
    info, trace = _sensors(power), _trace(rng, blocks, end, power)
    report = {
        "created": "2026-03-14T09:26:53Z",
        "command": "edge-sdss profile --out profile-out",
        "device": {
            "name": "example-board",
            "model": "Example board, 8 GB",
            "profile": "orin-nano-8gb",
            "cores": 6,
            "memory_bytes": 8 << 30,
            "l4t": "36.4.3",
            "jetpack": "6.2",
        },
        "environment": {
            "edge_sdss": "0.1.0",
            "python": "3.10.12",
            "platform": "Linux aarch64",
            "processor": "Example processor",
            "packages": {"torch": "2.8.0", "numpy": "1.26.4"},
            "commit": None,
        },
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "sha256": "5af571cb" * 8,
            "parameters": 134_515_008,
            "bytes": 538_060_032,
            "dtype": "float32",
            "backend": "torch cpu, 6 threads",
        },
        "total_scope": "module" if power else "none",
        "total_note": "VDD_IN alone, which feeds the whole module" if power else NO_POWER,
        "sensors": info,
        "sampler": {
            "interval_s": 0.1,
            "jitter": 0.3,
            "passes": len(trace[0]["times_s"]),
            "busy_s": 0.004 * end,
            "share": 0.004,
            "largest_gap_s": 0.131,
        },
        "idle": {"before_w": IDLE_W, "after_w": 4.9, "drift": 0.065, "flagged": True} if power else None,
        "before": _state(41.0, 5.2),
        "after": _state(63.5, 4.9, throttled=("soc0: throttled by temperature",)),
        "cases": [_case(case, [run for one, run in blocks if one is case], power) for case in CASES],
        "notes": ["policy4 changed its governor while measuring"],
        "trace": trace,
        "duration_s": end,
        "settings": {"profile": {"runs": RUNS, "seconds": 10.0, "cool_c": None}, "model": {"dtype": "float32"}},
    }
    return schema.Report.model_validate({**report, **changes})


def _run(rng: random.Random, order: int, start: float, case: tuple[Any, ...]) -> schema.Run:
    _, _, _, _, per_item, items, repetitions, _ = case
    luck = rng.lognormvariate(0, 0.02)
    times = [per_item * luck * rng.lognormvariate(0.002 * order, 0.04) for _ in range(repetitions)]
    seconds = max(math.fsum(times) * items, 1.4)
    samples = {"time": times, "rate": [1 / time for time in times]}
    if case[0] == "decode":
        samples |= {"ttft": [0.09 * luck * rng.uniform(0.95, 1.3) for _ in times]}
        samples |= {"inter_token": [per_item * luck * rng.lognormvariate(0, 0.06) for _ in range(60)]}
    done, peak = items * repetitions, 1_310_000_000 + 1000 * order
    return schema.Run(
        order=order, start_s=start, end_s=start + seconds, items=done, samples=samples, peak_rss_bytes=peak
    )


def _case(case: tuple[Any, ...], runs: list[schema.Run], power: bool) -> dict[str, Any]:
    name, test, item, primary, _, _, _, watts = case
    names = runs[0].samples
    seconds, items = math.fsum(r.end_s - r.start_s for r in runs), math.fsum(r.items for r in runs)
    energy: dict[str, Any] = {"scope": "none", "total_j": None, "above_idle_j": None, "per_item_j": None}
    energy |= {"reason": NO_POWER}
    if power:
        total = watts * seconds
        shares = {"ina3221:VDD_IN": 1.0, "ina3221:VDD_CPU_GPU_CV": 0.52, "ina3221:VDD_SOC": 0.21}
        energy = {
            "scope": "module",
            "total_j": total,
            "above_idle_j": total - IDLE_W * seconds,
            "per_item_j": total / items,
            "per_item_lo": 0.97 * total / items,
            "per_item_hi": 1.04 * total / items,
            "mean_w": watts,
            "peak_w": 1.18 * watts,
            "rails": {
                rail: {"joules": part * total, "mean_w": part * watts, "peak_w": 1.2 * part * watts}
                for rail, part in shares.items()
            },
            "samples": round(seconds * 10),
            "largest_gap_s": 0.128,
        }
    return {
        "name": name,
        "test": test,
        "about": f"Does what {name} does, once.",
        "item": item,
        "primary": primary,
        "settings": {"dialogues": 8} if name == "round" else {},
        "metrics": {one: _summary(one, item, [run.samples[one] for run in runs]) for one in names},
        "runs": runs,
        "energy": energy,
        "memory": {
            "peak_rss_bytes": 1_310_000_000 + 1000 * len(name),
            "rss_bytes": 1_204_000_000,
            "available_drop_bytes": 96 << 20,
        },
        "warnings": ["time drifted by +6% over the repetitions"] if name == "train-step" else [],
    }


def _summary(metric: str, item: str, runs: list[list[float]]) -> dict[str, Any]:
    values = sorted(value for run in runs for value in run)
    rank = lambda share: values[min(round(share * (len(values) - 1)), len(values) - 1)]  # noqa: E731
    median, medians = statistics.median(values), [statistics.median(run) for run in runs]
    unit, better = (f"{item}/s", "higher") if metric == "rate" else ("s", "lower")
    return {
        "unit": unit,
        "better": better,
        "n": len(values),
        "runs": len(runs),
        "median": median,
        "lo": min(medians) * 0.99,
        "hi": max(medians) * 1.01,
        "p95": rank(0.95) if len(values) >= 20 else None,
        "p99": rank(0.99) if len(values) >= 100 else None,
        "iqr": rank(0.75) - rank(0.25),
        "cv": statistics.stdev(values) / statistics.fmean(values),
        "drift": 0.06 if metric == "time" and item == "step" else None,
    }


def _state(hottest: float, available_gb: float, throttled: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "power_mode": "15W",
        "governors": {"policy0": "schedutil", "policy4": "schedutil"},
        "clocks_hz": {"policy0": 1.51e9, "policy4": 1.51e9, "gpu": 6.25e8},
        "clocks_locked": False,
        "fan": {"pwm-fan": 0.42},
        "temperatures_c": {"cpu": hottest, "gpu": hottest - 3.2},
        "throttled": throttled,
        "throttle_counts": {"soc0": 3 + len(throttled)},
        "available_bytes": round(available_gb * 1e9),
        "load_1min": 1.24,
    }


def _sensors(power: bool) -> list[dict[str, Any]]:
    ina = {"name": "ina3221", "usable": power, "channels": ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"] if power else []}
    ina |= {"absent": {"in7": "the sum of the shunts"}} if power else {"reason": "no INA3221 on this machine"}
    return [
        ina,
        {"name": "nvml", "usable": False, "reason": "cannot read nvml: not installed; pip install nvidia-ml-py"},
        {"name": "process", "usable": True, "channels": ["rss", "available"]},
        {"name": "thermal", "usable": True, "channels": ["cpu", "gpu", "policy0", "policy4", "gpu-clock"]},
    ]


def _trace(rng: random.Random, blocks: list[Any], end: float, power: bool) -> list[dict[str, Any]]:
    times = [0.1]
    while times[-1] < end - 0.4:
        times.append(round(times[-1] + 0.3 * rng.uniform(0.7, 1.3), 4))
    watts, heat, warm = [], [], 38.0
    for time in times:
        busy = next((case[7] for case, run in blocks if run.start_s <= time <= run.end_s), IDLE_W)
        watts.append(busy * rng.gauss(1, 0.04))
        warm += (36 + 2.4 * busy - warm) * 0.004
        heat.append(warm)
    channels = [
        ("thermal", "cpu", "temperature", heat),
        ("thermal", "gpu", "temperature", [value - 3 + rng.gauss(0, 0.2) for value in heat]),
        ("thermal", "policy0", "frequency", [1.51e9 if value > 5.5 else 7.3e8 for value in watts]),
        ("thermal", "policy4", "frequency", [1.51e9 if value > 7.5 else 7.3e8 for value in watts]),
        ("thermal", "gpu-clock", "frequency", [6.25e8 if value > 10 else 3.06e8 for value in watts]),
        ("process", "rss", "memory", [1.2e9 + 1e7 * math.sin(time / 9) for time in times]),
        ("process", "available", "memory", [5.1e9 - 2e6 * time for time in times]),
        ("process", "cpu", "load", [0.9 if value > 5.5 else 0.05 for value in watts]),
    ]
    if power:
        rails = (("VDD_IN", 1.0), ("VDD_CPU_GPU_CV", 0.52), ("VDD_SOC", 0.21))
        channels += [
            ("ina3221", rail, "power", [None if i == 40 else part * value for i, value in enumerate(watts)])
            for rail, part in rails
        ]
    units = {"power": "W", "temperature": "°C", "frequency": "Hz", "load": "1", "memory": "bytes"}
    return [
        {"sensor": sensor, "name": name, "kind": kind, "unit": units[kind], "times_s": times, "values": values}
        for sensor, name, kind, values in channels
    ]
