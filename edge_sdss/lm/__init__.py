"""The language model: load, embed, encode, measure, generate, attach an adapter.

    model.py     LanguageModel, the one class that others use
    chat.py      turns and answers to token ids
    decoding.py  the loop that writes answers
    adapters.py  PEFT folders
    loading.py   folders, devices, libraries

The only place that talks to transformers' causal models. Does not know why a text is embedded, where
examples come from or how an adapter is trained.
"""

from edge_sdss.lm.adapters import CARD
from edge_sdss.lm.chat import Encoded
from edge_sdss.lm.decoding import Generation
from edge_sdss.lm.model import LanguageModel

__all__ = ["CARD", "Encoded", "Generation", "LanguageModel"]
