"""What a step brings to a GPU: words written to pinned memory, then one copy that the host does not wait for.

The host is ahead of its copies, so the pinned memory is a ring; on the device one array does, for copies and kernels run in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.worker.device import Device

__all__ = ["Staging"]


class Staging:
    """`num_buffers`: how many copies may be under way at once. `num_words`: 32-bit words to begin with; it grows with what is asked for."""

    def __init__(self, device: Device, num_buffers: int, num_words: int) -> None:
        self._device = device
        self._pinned = [device.pinned(num_words, "int32") for _ in range(num_buffers)]
        self._turn = 0
        self.words: Any = device.zeros(num_words, "int32")  # on the device: what was sent last

    def take(self, num_words: int) -> np.ndarray:
        """Memory of at least that many words which no copy under way reads."""
        self._turn = (self._turn + 1) % len(self._pinned)
        if self._pinned[self._turn].host.size < num_words:
            size = 1 << (num_words - 1).bit_length()
            self._pinned[self._turn] = self._device.pinned(size, "int32")
            if self.words.shape[0] < size:
                self.words = self._device.empty(size, "int32")
        return self._pinned[self._turn].host

    def send(self, num_words: int) -> None:
        """What was written to the memory taken last goes to the front of `words`."""
        self._device.copy(self.words[:num_words], self._pinned[self._turn].tensor[:num_words])
