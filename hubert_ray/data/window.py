"""How does a decoder read a part of a remote file as a file of its own? In blocks, as it asks for them; none is fetched twice.

A recording is a byte range of its shard; who seeks in a long one must not fetch it whole. A window lives for one utterance, and
so do its blocks: 1 MB for half a minute of FLAC.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class Window(io.RawIOBase):
    """A file of `size` bytes whose bytes come from `fetch(start, count)`."""

    # Bytes: few requests for half a minute of FLAC (0.5 MB), few bytes for each place that seeking probes.
    BLOCK = 128 * 1024

    def __init__(self, fetch: Callable[[int, int], bytes], size: int):
        self._fetch, self._size = fetch, size
        self._place = 0
        self._blocks: dict[int, bytes] = {}
        self.failure: Exception | None = None  # kept, for none can pass through libsndfile: to it the file ends

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, for libsndfile takes less for the end of the file."""
        filled = 0
        while filled < len(buffer) and self._place < self._size:
            number, within = divmod(self._place, self.BLOCK)
            if not self._fetched(number):
                break
            part = self._blocks[number][within : within + len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            filled += len(part)
            self._place += len(part)
        return filled

    def _fetched(self, number: int) -> bool:
        if number not in self._blocks and not self.failure:
            start = number * self.BLOCK
            try:
                self._blocks[number] = self._fetch(start, min(self.BLOCK, self._size - start))
            except Exception as error:
                self.failure = error
        return not self.failure
