"""What a policy may remember of the stream beyond the buffer, in bounded bytes: the mean of all vectors, and a sample.

Remembering is part of an offer: `after` says what it changes, the decision carries that, and it comes true together
with the rest. Knows nothing of policies, dialogues or the store; no text is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from edge_sdss.selection.vectors import Codec

SAMPLE = 64
"""Vectors in the sample: with the default model 38 KiB as int8."""

MEAN, ROWS = "mean", "sample"


class Memory:
    """The mean and a uniform sample of the vectors offered so far (Vitter 1985, algorithm R)."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.count = 0
        self._sum = np.zeros(codec.width)
        self._rows = np.zeros((0, codec.row_bytes), np.uint8)
        self._sample: npt.NDArray[np.float32] | None = None

    @property
    def max_bytes(self) -> int:
        """What it takes when the sample is full."""
        return 8 + self._sum.nbytes + SAMPLE * self._codec.row_bytes

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """[d] float64, the mean of the unit vectors; zeros before the first."""
        return self._sum / max(self.count, 1)

    @property
    def sample(self) -> npt.NDArray[np.float32]:
        """[at most SAMPLE, d] float32 unit vectors."""
        if self._sample is None:
            self._sample = self._codec.decode(self._rows)
        return self._sample

    def after(self, code: npt.NDArray[np.uint8], draws: np.random.Generator) -> dict[str, bytes]:
        """The parts that one more vector changes, by name; nothing is changed yet.

        code: [row_bytes] uint8, as the codec made it.
        """
        count = self.count + 1
        total = self._sum + self._codec.decode(code[None])[0]
        parts = {MEAN: np.int64(count).tobytes() + total.tobytes()}
        place = int(draws.integers(count))
        if len(self._rows) < SAMPLE:
            parts[ROWS] = self._rows.tobytes() + code.tobytes()
        elif place < SAMPLE:
            rows = self._rows.copy()
            rows[place] = code
            parts[ROWS] = rows.tobytes()
        return parts

    def update(self, parts: Mapping[str, bytes]) -> None:
        """Makes parts that `after` gave, now or in an earlier process, what is remembered."""
        if MEAN in parts:
            self.count = int(np.frombuffer(parts[MEAN][:8], np.int64)[0])
            self._sum = np.frombuffer(parts[MEAN][8:], np.float64).copy()
        if ROWS in parts:
            self._rows = np.frombuffer(parts[ROWS], np.uint8).reshape(-1, self._codec.row_bytes).copy()
            self._sample = None

    def restart(self, codes: Iterable[bytes], draws: np.random.Generator) -> dict[str, bytes]:
        """Forgets the stream: what is remembered now is of these vectors alone. Returns all parts."""
        self.update({MEAN: np.int64(0).tobytes() + np.zeros(self._codec.width).tobytes(), ROWS: b""})
        for code in codes:
            self.update(self.after(np.frombuffer(code, np.uint8), draws))
        return {MEAN: np.int64(self.count).tobytes() + self._sum.tobytes(), ROWS: self._rows.tobytes()}
