"""The profiling harness: latency, energy and memory of any code, and verdicts on their differences."""

from edge_sdss.profiling.meter import Meter

__all__ = ["Meter"]
