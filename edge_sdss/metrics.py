"""How alike two texts are: ROUGE by Google's `rouge-score` (Lin, 2004), for words of any script."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from edge_sdss.errors import BackendUnavailable, message

_SCRIPTS_WITHOUT_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SCRIPTS_WITHOUT_SPACES}]|[^\W_{_SCRIPTS_WITHOUT_SPACES}]+")


def words(text: str) -> list[str]:
    """Words of any script; on ASCII the same as rouge-score's own tokenizer, which knows no other."""
    return _WORD.findall(text.lower())


def rouge(reference: str, text: str) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L F1, each in [0, 1], without stemming; 0 where either text has no word."""
    found = _scorer().score(reference, text)
    return float(found["rouge1"].fmeasure), float(found["rougeL"].fmeasure)


def rouge1(reference: str, text: str) -> float:
    """ROUGE-1 F1, in [0, 1]."""
    return rouge(reference, text)[0]


class _Tokenizer:
    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BackendUnavailable(message("compute ROUGE", str(error), "pip install 'edge_sdss[train]'")) from error
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False, tokenizer=_Tokenizer())
