"""An adapter merged into the weights, for targets that cannot take adapters at run time.

Knows nothing of graphs: the merged folder is exported like any other model.
"""

from __future__ import annotations

from pathlib import Path

from edge_sdss import config
from edge_sdss.errors import ExportError, message
from edge_sdss.lm import LanguageModel
from edge_sdss.types import Progress, no_progress


def merged(folder: Path, adapter: Path, out: Path, *, progress: Progress = no_progress) -> Path:
    """Writes W + (alpha / r) B A of the model in `folder` and its PEFT folder into `out`, float32; returns `out`.

    What `out` answers is what the model with the adapter answers, until it is quantised: then the adapter's small
    changes are rounded with the rest, which adapters as inputs avoid. Raises InputError for an adapter of another
    base, as `LanguageModel.attach` does, and ExportError where `out` cannot be written.
    """
    model = LanguageModel.load(config.Model(name=str(folder), device="cpu", dtype="float32"), progress=progress)
    model.attach(adapter)
    plain = model.model.merge_and_unload()
    plain.__dict__.pop("peft_config", None)
    try:
        plain.save_pretrained(out, safe_serialization=True)
        model.tokenizer.save_pretrained(out)
    except OSError as error:
        found = error.strerror or "failed"
        raise ExportError(message(f"write {out}", found, "free space or choose another folder")) from error
    return out
