"""A bundle: the folder that a device needs to answer with a model and its adapters, without torch.

    bundle/
      manifest.json        what is in it, whose base it is of, how it was checked; written last
      model.onnx(.data)    the graph; adapters are optional inputs of dynamic rank
      tokenizer.json       and tokenizer_config.json, chat_template.jinja, generation_config.json, config.json
      adapters/<name>.onnx_adapter
      probes/<name>.npz    what PEFT computes with that adapter, for the checks before it is activated

`manifest` reads and verifies it, `adapters` converts PEFT folders for it, `checks` finds an adapter that does not
do its work, `shelf` keeps versions and switches between them. Knows nothing of how a graph is made or run.
"""

from edge_sdss.bundles.manifest import (
    MANIFEST,
    AdapterEntry,
    Check,
    FileEntry,
    Graph,
    Manifest,
    Site,
    Static,
    entry,
    load,
    verify,
    write,
)

__all__ = [
    "MANIFEST",
    "AdapterEntry",
    "Check",
    "FileEntry",
    "Graph",
    "Manifest",
    "Site",
    "Static",
    "entry",
    "load",
    "verify",
    "write",
]
