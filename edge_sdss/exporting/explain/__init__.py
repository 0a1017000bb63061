"""Why a graph gives other answers at one stage than at the one before: the first tensor that goes wrong, and the cause.

    graph.py      a graph's tensors in order, what makes them and what takes them
    quantised.py  how a tensor is quantised, where it is in a QDQ graph, more tensors as outputs
    stages.py     a stage: feeds and names of tensors in, their values out; torch, and a graph on any provider
    measure.py    how far two values of one tensor are apart
    bisecting.py  from the first stage to the last, the first tensor that goes wrong
    suspects.py   that tensor, with all that can be asked of it
    causes.py     known faults, each told by evidence in the graph and in the values; attention.py, ranges.py: more
    placement.py  which node runs where, and why one fell back
    report.py     all of it in words and tables

Knows nothing of bundles, of how a graph was made, and of what it computes.
"""

from edge_sdss.exporting.explain.bisecting import Explanation, Finding, Pair, explain
from edge_sdss.exporting.explain.graph import Topology
from edge_sdss.exporting.explain.quantised import Quantisation
from edge_sdss.exporting.explain.stages import Stage, of_model, of_torch

__all__ = [
    "Explanation",
    "Finding",
    "Pair",
    "Quantisation",
    "Stage",
    "Topology",
    "explain",
    "of_model",
    "of_torch",
]
