"""What are the units of audio that is longer than a model can look at, or that has not ended yet? Those of fixed windows.

A transformer attends to everything, so the units of an hour would need the whole hour at once, and the first unit would wait
for the last sample. Instead they are *defined* by windows at fixed places: window k begins at frame k x (frames - 2 context)
and is `frames` long; of its own frames it gives the middle, the others are context. The first window gives its left context
too, the last one ends with the audio and gives all that is left. Audio of up to one window is one pass over all its samples.

    audio     ......................................
    window 0  KKKKKKKKKKKKcccc                                   K kept, c context
    window 1          ccccKKKKKKKKcccc
    window 2                  ccccKKKKKKKKcccc
    window 3                          ccccKKKKKKKKKK     ends with the audio; longer than two contexts

Windows begin on frames, at multiples of the teacher's stride; frame t of a window is frame start + t of the audio, covering the
same samples, so no frame is lost or doubled at a joint (fairseq's `--max_chunk` cuts at samples and loses one per chunk).
Which window is the last is known as soon as one more frame than a window has is there: a stream therefore decides as the
whole waveform does, whatever pieces it comes in, and computes the very same windows.

What a model computes over time, it computes per window: Base's group norm after the first convolution, the zero mean and unit
variance that Large wants of a waveform, attention, and the padding of the positional convolution. MFCC frames depend on
four neighbours on each side (two for each delta), spliced ones on some more; with as much context they are those of the whole
waveform.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from hubert_ray.data.frames import RECEPTIVE_FIELD


class Windows(msgspec.Struct, frozen=True, kw_only=True):
    """How long windows are, in frames of the teacher. Raises ValueError where no frame would be kept."""

    frames: int
    context: int  # on each side, seen and not kept

    def __post_init__(self) -> None:
        if self.context < 0 or self.frames <= 2 * self.context:
            raise ValueError(
                f"windows of {self.frames} frames with {self.context} of context on each side: expected more than twice the context"
            )

    @property
    def hop(self) -> int:
        """Frames from the start of one window to the start of the next."""
        return self.frames - 2 * self.context


class UnitStream:
    """Units of a waveform that comes in pieces of any size. `push` the pieces, then `close`; both return the units (F,) that
    have become known. All of them joined are those of the whole waveform: as many as it has frames.

    A stream holds the samples of one window, and is behind by a window less its left context.
    """

    def __init__(self, units_of: Callable[[np.ndarray], np.ndarray], stride: int, windows: Windows, streams: int = 1):
        """`units_of` gives the units of one window's samples, one every `stride` samples; (F, streams) where there are several."""
        self._units_of = units_of
        self._stride = stride
        self._windows = windows
        self._pieces: list[np.ndarray] = []  # samples from the start of the next window on
        self._samples = 0
        self._kept_from = 0  # the first frame of the next window that no earlier window has given
        self._closed = False
        self._none = np.empty((0, streams) if streams > 1 else 0, dtype=np.uint16)

    def push(self, wave_S: np.ndarray) -> np.ndarray:
        """Units of the windows that are full and not the last one. `wave_S` may be empty, and is copied.

        Raises ValueError after `close`.
        """
        if self._closed:
            raise ValueError("this stream is closed; begin another one for another waveform")
        self._pieces.append(np.array(wave_S, dtype=np.float32))
        self._samples += len(wave_S)
        full = self._stride * self._windows.frames + RECEPTIVE_FIELD  # one frame more than a window has
        if self._samples < full:
            return self._none
        waiting_S, start, known = np.concatenate(self._pieces), 0, []
        while len(waiting_S) - start >= full:
            window_S = waiting_S[start : start + full - self._stride]
            known.append(self._units_of(window_S)[self._kept_from : -self._windows.context or None])
            start += self._stride * self._windows.hop
            self._kept_from = self._windows.context
        self._pieces, self._samples = [waiting_S[start:].copy()], len(waiting_S) - start
        return np.concatenate(known)

    def close(self) -> np.ndarray:
        """Units of the last window. None where all of the audio is shorter than one frame."""
        self._closed = True
        if self._samples < RECEPTIVE_FIELD:
            return self._none
        waiting_S, self._pieces, self._samples = np.concatenate(self._pieces), [], 0
        return self._units_of(waiting_S)[self._kept_from :]


def deduplicate(units_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(units (N,) with no two neighbours equal, durations (N,) in frames int32); np.repeat undoes it. Of units (F, streams) a new
    run begins where any stream changes."""
    streams_FS = units_F.reshape(len(units_F), -1) if len(units_F) else np.empty((0, 1))
    changes_F = (np.diff(streams_FS.astype(np.int32), axis=0) != 0).any(axis=1)
    starts = np.flatnonzero(np.concatenate([[len(units_F) > 0], changes_F]))
    return units_F[starts], np.diff(np.append(starts, len(units_F))).astype(np.int32)
