"""A model's folder and a recipe become a bundle that is known to answer as the model does.

    make.py       bundle: graph, tokenizer, adapters, manifest; all of it or nothing
    agreement.py  torch, float graph, graph and engine agree on a few texts
    probing.py    what PEFT computes with an adapter, and whether the engine does the same

Puts `exporting`, `bundles` and `runtime` together; knows neither rounds nor the shelf that versions lie on.
"""

from edge_sdss.bundling.make import bundle, check_installed
from edge_sdss.bundling.probing import has_torch, probed, record, served

__all__ = ["bundle", "check_installed", "has_torch", "probed", "record", "served"]
