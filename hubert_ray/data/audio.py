"""Is a recording usable, and what is its waveform?

Decoding goes through libsndfile (FLAC, WAV, OGG, MP3) from bytes in memory. All waveforms in the project are mono
float32 in [-1, 1] at 16 kHz; other rates are resampled, several channels are averaged.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from hubert_ray.data.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_ray.errors import AudioError

MAX_SECONDS = 120.0  # a longer file is a recording to be segmented first, not an utterance
UNKNOWN_FRAMES = (
    2**63 - 1
)  # libsndfile's word for a FLAC stream whose header has no length; it cannot read those to the end
MAX_FILTER_TAPS = 10_000_000  # of the resampling filters; 44.1 kHz has 70,560, an odd rate in a broken header gigabytes


def decode(data: bytes) -> np.ndarray:
    """The 16 kHz waveform of compressed audio, shape (S,), float32.

    Raises AudioError with reason `empty`, `undecodable`, `too_long`, `not_finite`, `sample_rate` (too odd to resample)
    or `too_short` (below 400 samples, one frame of the model).
    """
    if not data:
        raise AudioError("empty", "0 bytes")
    (wave_S,) = pieces(io.BytesIO(data), MAX_SECONDS)  # a piece is as long as an utterance may be
    return wave_S


def pieces(source: BinaryIO, max_seconds: float = math.inf) -> Iterator[np.ndarray]:
    """The 16 kHz waveform of a recording of any length, in pieces (S,) of at most MAX_SECONDS; memory holds two or three.

    Raises AudioError as `decode` does, where the trouble is: of a recording that ends early after its last good piece, and
    `too_long` beyond `max_seconds`.
    """
    samples = 0
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            if file.frames == UNKNOWN_FRAMES:
                raise AudioError("undecodable", "the header has no length, as a stream's; encode it again from a file")
            if file.frames > max_seconds * rate:
                raise AudioError("too_long", f"{file.frames / rate:.0f} s, at most {max_seconds:.0f} s")
            for wave_S in _at_16_khz(_mono(file), rate):
                samples += len(wave_S)
                if samples < RECEPTIVE_FIELD:  # never of a first piece that others follow
                    break
                yield np.ascontiguousarray(wave_S)
    except (soundfile.SoundFileError, ValueError, MemoryError) as error:
        # libsndfile's own words: str(error) also names a memory address, which would differ from run to run.
        raise AudioError("undecodable", getattr(error, "error_string", str(error))) from error
    if samples < RECEPTIVE_FIELD:
        raise AudioError("too_short", f"{samples} samples at 16 kHz, at least {RECEPTIVE_FIELD}")


def _mono(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """MAX_SECONDS after MAX_SECONDS at the file's own rate, channels averaged."""
    done, declared, step = 0, file.frames, int(MAX_SECONDS * file.samplerate)
    while done < declared:
        wanted = min(step, declared - done)
        wave_SC = file.read(frames=wanted, dtype="float32", always_2d=True)
        done += len(wave_SC)
        if len(wave_SC) < wanted:
            raise AudioError("undecodable", f"ends after {done} of {declared} samples")
        wave_S = wave_SC[:, 0] if wave_SC.shape[1] == 1 else wave_SC.mean(axis=1)
        if not np.isfinite(wave_S).all():
            raise AudioError("not_finite", f"{np.count_nonzero(~np.isfinite(wave_S))} samples are NaN or infinite")
        yield wave_S


def examine(data: bytes) -> tuple[int, int]:
    """(samples at 16 kHz, stored sample rate) of a recording that may enter a corpus.

    Raises AudioError as `decode` does, and with reason `silent` where every sample is the same.
    """
    wave_S = decode(data)
    if np.ptp(wave_S) == 0:
        raise AudioError("silent", f"all {len(wave_S)} samples equal {wave_S[0]:g}")
    return len(wave_S), soundfile.info(io.BytesIO(data)).samplerate


def normalise(wave_S: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the whole utterance, as Large and X-Large expect (epsilon 1e-5 as layer norm)."""
    return (wave_S - wave_S.mean()) / np.sqrt(wave_S.var() + 1e-5)


def _at_16_khz(waves: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Resamples piece by piece: each with a second of its neighbours, far more than the filter is wide, which is cut off again.

    A piece of MAX_SECONDS and a margin of one are whole numbers of the filter's period, so the joints fall between two samples.
    """
    if rate == SAMPLE_RATE:
        yield from waves
        return
    before = np.empty(0, dtype=np.float32)
    current = next(waves, before)
    while len(current):
        following = next(waves, np.empty(0, dtype=np.float32))
        resampled_S = _resample(np.concatenate([before, current, following[:rate]]), rate)
        start = len(before) * SAMPLE_RATE // rate
        yield resampled_S[start : start + -(-len(current) * SAMPLE_RATE // rate)]
        before, current = current[-rate:], following


def _resample(wave_S: np.ndarray, rate: int) -> np.ndarray:
    common = math.gcd(rate, SAMPLE_RATE)
    if (rate // common) * (SAMPLE_RATE // common) > MAX_FILTER_TAPS:
        raise AudioError("sample_rate", f"{rate} Hz cannot be resampled to {SAMPLE_RATE} Hz in reasonable memory")
    import torch  # here, so that listing a corpus does not load it
    import torchaudio.functional

    return torchaudio.functional.resample(torch.from_numpy(np.ascontiguousarray(wave_S)), rate, SAMPLE_RATE).numpy()
