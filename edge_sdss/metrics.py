"""How alike two texts are: ROUGE by Google's `rouge-score` (Lin 2004). Knows nothing of models."""

from __future__ import annotations

from functools import cache
from typing import Any

from edge_sdss.errors import BackendUnavailable, message


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BackendUnavailable(message("measure ROUGE", str(error), "pip install 'edge_sdss[train]'")) from error
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def rouge(reference: str, text: str) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L F1 of a text, each in [0, 1]; 0 where either has no word."""
    found = _scorer().score(reference, text)
    return float(found["rouge1"].fmeasure), float(found["rougeL"].fmeasure)


def rouge1(reference: str, text: str) -> float:
    """ROUGE-1 F1, in [0, 1]."""
    return rouge(reference, text)[0]
