"""The profiling harness: latency, energy and memory of any code, and verdicts on their differences."""
