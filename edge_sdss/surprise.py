"""How a dialogue's response surprises the base model: what `perplexity` and `ifd` select by.

Up to two forward passes beyond the one that embeds. Knows nothing of buffers.
"""

from __future__ import annotations

import math

from edge_sdss.config import Config
from edge_sdss.embedding import Model
from edge_sdss.errors import InputError
from edge_sdss.types import Dialogue, Example


def of(model: Model, dialogue: Dialogue, kind: str, settings: Config) -> float:
    """Returns the value, never negative; 0 where there is no response, or it is too short to be measured.

    perplexity: exp(s(A|Q)); ifd: s(A|Q) / s(A), the instruction-following difficulty of Li et al. (arXiv 2308.12032,
    eq. 4), where s is the mean loss in nats per token of the response A, behind the prompt Q or alone.
    """
    if not dialogue.response.strip():
        return 0.0
    example = Example(dialogue.messages, dialogue.response, dialogue.id)
    behind = float(model.nll([example], max_tokens=settings.model.max_tokens, batch_size=1)[0])
    if kind == "perplexity":
        return math.exp(min(behind, 700.0))
    try:
        return behind / max(model.text_nll(dialogue.response), 1e-6)
    except InputError:  # one token alone has no loss
        return 0.0
