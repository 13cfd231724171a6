"""Where is a long recording cut into utterances? At its pauses, and by index: the audio is stored once, unchanged.

A recording longer than `max_seconds` becomes several utterances, each a range of its samples that the reader seeks to and
decodes alone (`audio.decode_range`, `shards.AudioReader`). Three steps:

1. *Survey*: the recording is decoded once, a minute at a time. Kept are how loud each 20 ms is and, where the corpus has no
   voice activity of its own (Libri-light's JSON), what a detector says (`data/voice_activity.py`): 12 MB for ten hours.
2. *Plan*, a pure function (`plan_ranges`): pauses above `max_pause_seconds` always part two utterances. What lies between such
   pauses and is too long is cut from its start on, at the longest pause within reach; pauses in the second half of the reach go
   first, so pieces are not needlessly short. Speech is cut only where no pause is in reach, that is within a region that is
   itself longer than `max_seconds`: at the quietest 20 ms of the second half of the reach.
3. Ranges shorter than `min_seconds`, that of the pieces or that of the corpus's checks, are left out and counted, a row of the
   quarantine table per recording.

All of it is in samples at 16 kHz on a grid that falls on stored samples (every one at 16 or 8 kHz, every 10 ms at 44.1 kHz), so
a range has a whole number of samples at either rate and its length is known without decoding it. A transcript cannot be cut,
for nobody knows which word is where: pieces have text only where the whole recording came down to one piece. Phone times can,
and are.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hubert_ray.config.recipe import Checks, Segments
from hubert_ray.data import audio
from hubert_ray.data.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_ray.errors import AudioError

if TYPE_CHECKING:
    from hubert_ray.data.voice_activity import VoiceActivity

HOP = 320  # samples whose loudness is one number: 20 ms


@dataclass(frozen=True)
class Piece:
    """A range of a recording that is an utterance, [start, end) in samples at 16 kHz."""

    start: int
    end: int
    rate: int  # Hz, as stored
    speech_share: float
    digest: bytes  # of the recording's and of the range: the same recording, cut the same way, is found again

    @property
    def first(self) -> int:
        """First sample at the stored rate."""
        return self.start * self.rate // SAMPLE_RATE

    @property
    def stored_samples(self) -> int:
        """Length at the stored rate."""
        return (self.end - self.start) * self.rate // SAMPLE_RATE

    @property
    def suffix(self) -> str:
        """What is added to the recording's id: first and end in ms. Eight digits, so names sort by time up to 27 hours."""
        return f"-{self.start * 1000 // SAMPLE_RATE:08d}-{self.end * 1000 // SAMPLE_RATE:08d}"


@dataclass(frozen=True)
class Cut:
    """What became of a long recording; there is at least one piece."""

    pieces: list[Piece]
    left_out: str  # "" or what was too short to be a piece


class Cutter:
    """Cuts recordings into pieces, one after another. The detector is loaded when the first of them needs it."""

    def __init__(self, settings: Segments, checks: Checks):
        self._settings, self._checks = settings, checks
        self._detector: VoiceActivity | None = None

    def is_long(self, data: bytes) -> bool:
        """Whether a recording is to be cut. Raises AudioError where its header cannot be read."""
        frames, rate = audio.header(data)
        return frames > self._settings.max_seconds * rate

    def cut(self, data: bytes, speech: list[tuple[float, float]] | None) -> Cut:
        """The pieces of a long recording; `speech` are onsets and offsets in seconds, None asks the detector.

        Raises AudioError as `audio.decode_range` and `audio.examine_long` do, and `no_speech` (nothing that could be a piece).
        """
        frames, rate = audio.header(data)
        audio.decode_range(io.BytesIO(data), frames // 2, min(frames // 2, rate))  # can it be sought in at all?
        grid = SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE)
        total = frames * SAMPLE_RATE // rate // grid * grid
        digest, heard_R2, levels_H = self._survey(data, listen=speech is None)
        if speech is not None:
            seconds_R2 = np.minimum(np.array(speech, dtype=np.float64).reshape(-1, 2), frames / rate)
            heard_R2 = np.round(seconds_R2 * SAMPLE_RATE).astype(np.int64)
        speech_R2 = tidy(heard_R2, total, grid)
        ranges_P2 = plan_ranges(speech_R2, levels_H, grid, self._settings)
        lengths_P = ranges_P2[:, 1] - ranges_P2[:, 0]
        least = max(self._settings.min_seconds, self._checks.min_seconds)
        enough_P = lengths_P >= max(least * SAMPLE_RATE, RECEPTIVE_FIELD)
        spoken_P = np.diff(_speech_before(ranges_P2, speech_R2), axis=1)[:, 0]
        pieces = [
            Piece(
                start, end, rate, spoken / (end - start), hashlib.sha256(digest + b"%d %d" % (start, end)).digest()[:16]
            )
            for (start, end), spoken in zip(ranges_P2[enough_P].tolist(), spoken_P[enough_P].tolist(), strict=True)
        ]
        few = f"{int((~enough_P).sum())} pieces below {least:g} s"
        lost = f"{few}, {lengths_P[~enough_P].sum() / SAMPLE_RATE:.1f} s in all, were left out"
        if not pieces:
            raise AudioError(
                "no_speech", f"{frames / rate:.0f} s without speech to keep" + (f"; {lost}" if len(lengths_P) else "")
            )
        return Cut(pieces, "" if enough_P.all() else lost)

    def _survey(self, data: bytes, listen: bool) -> tuple[bytes, np.ndarray, np.ndarray]:
        """(digest, speech (R, 2), loudness of each 20 ms (H,)) of a recording, which is decoded to its end."""
        detector = self._begin() if listen else None
        levels: list[np.ndarray] = []

        def hear(wave_S: np.ndarray) -> None:
            levels.append(np.square(wave_S[: len(wave_S) // HOP * HOP]).reshape(-1, HOP).mean(axis=1))
            if detector:
                detector.hear(wave_S)

        digest = audio.examine_long(data, self._checks, hear).digest
        return digest, detector.regions() if detector else np.empty((0, 2), np.int64), np.concatenate(levels)

    def _begin(self) -> VoiceActivity:
        if self._detector is None:
            from hubert_ray.data.voice_activity import VoiceActivity  # here, for it loads torch

            self._detector = VoiceActivity()
        self._detector.begin()
        return self._detector


def tidy(speech_R2: np.ndarray, total: int, grid: int) -> np.ndarray:
    """Regions in any order as ascending, disjoint ones that do not touch, widened to the grid, within [0, total)."""
    clipped_R2 = np.clip(speech_R2, 0, total)
    starts_R, ends_R = clipped_R2[:, 0] // grid * grid, -(-clipped_R2[:, 1] // grid) * grid
    kept_R = starts_R < ends_R
    order_R = np.argsort(starts_R[kept_R], kind="stable")
    starts_R, ends_R = starts_R[kept_R][order_R], np.maximum.accumulate(ends_R[kept_R][order_R])
    opens_R = np.concatenate([[True], starts_R[1:] > ends_R[:-1]])[: len(starts_R)]
    closes_R = np.concatenate([opens_R[1:], [True]])[: len(starts_R)]
    return np.stack([starts_R[opens_R], ends_R[closes_R]], axis=1)


def plan_ranges(speech_R2: np.ndarray, levels_H: np.ndarray, grid: int, settings: Segments) -> np.ndarray:
    """(P, 2) [start, end): disjoint ascending ranges that hold all speech, none longer than `max_seconds`.

    `speech_R2` is tidy; `levels_H` the loudness of each 20 ms. Ranges begin and end on the grid. See the module's text.
    """
    if not len(speech_R2):
        return np.empty((0, 2), np.int64)
    longest = int(settings.max_seconds * SAMPLE_RATE) // grid * grid
    pauses_R = speech_R2[1:, 0] - speech_R2[:-1, 1]
    breaks = np.flatnonzero(pauses_R > settings.max_pause_seconds * SAMPLE_RATE) + 1
    ranges: list[tuple[int, int]] = []
    for run_R2 in np.split(speech_R2, breaks):
        start, end = int(run_R2[0, 0]), int(run_R2[-1, 1])
        while end - start > longest:
            stop, following = _next_cut(run_R2, levels_H, start, longest, grid)
            ranges.append((start, stop))
            start = following
        ranges.append((start, end))
    return np.array(ranges, dtype=np.int64)


def _next_cut(run_R2: np.ndarray, levels_H: np.ndarray, start: int, longest: int, grid: int) -> tuple[int, int]:
    """(end of the range that begins at `start`, start of the next one)."""
    middle, reach = start + longest // 2, start + longest
    ends_R = run_R2[:, 1]
    first, late, beyond = np.searchsorted(
        ends_R, [start, middle, reach], side="right"
    )  # pauses begin where regions end
    if first < beyond:
        chosen_R = np.arange(late if late < beyond else first, beyond)
        pauses_R = run_R2[chosen_R + 1, 0] - ends_R[chosen_R]
        chosen = chosen_R[np.flatnonzero(pauses_R == pauses_R.max())[-1]]  # of equals the last: longer pieces
        return int(ends_R[chosen]), int(run_R2[chosen + 1, 0])
    low, high = -(-middle // HOP), reach // HOP
    quietest = low + int(np.argmin(levels_H[low:high]))
    cut = (quietest * HOP + HOP // 2) // grid * grid
    return cut, cut


def _speech_before(places: np.ndarray, speech_R2: np.ndarray) -> np.ndarray:
    """Samples of speech before each place; exact, since the sum rises by one per sample within speech and rests between."""
    if not len(speech_R2):
        return np.zeros(places.shape)
    edges = speech_R2.ravel()
    total = np.cumsum(np.diff(speech_R2, axis=1)[:, 0])
    return np.interp(places, edges, np.stack([np.concatenate([[0], total[:-1]]), total], axis=1).ravel())
