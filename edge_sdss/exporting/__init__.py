"""From a model's folder to the graph that a bundle holds.

    onnx.py      a Hugging Face folder to a plain graph with a KV cache, through Optimum
    graphs.py    adapters as optional inputs, the hidden state as an output
    quantize.py  4 and 8 bits
    merge.py     an adapter merged into the weights instead, for targets without runtime adapters
    parity.py    torch, graph and quantised graph agree, logit by logit
    ways.py      the torch model and the graph as parity and `bundles.checks` ask them

Knows nothing of bundles on the disk, of targets and of how a graph is run on a device.
"""

from edge_sdss.exporting.portable import portable

__all__ = ["portable"]
