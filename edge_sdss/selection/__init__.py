"""Which dialogues of a stream are kept: the scores, the buffer, the policies and the selector."""

from edge_sdss.selection.buffer import Buffer
from edge_sdss.selection.selector import Selector

__all__ = ["Buffer", "Selector"]
