"""Is a recording usable, and what is its waveform?

Decoding goes through libsndfile (FLAC, WAV, OGG, MP3): of a whole recording from bytes in memory, of a range of a long one
from a file that is read only where it must be. All waveforms in the project are mono float32 in [-1, 1] at 16 kHz; other
rates are resampled, several channels are averaged. What a corpus lets in is examined on
the samples as they are stored, since resampling and averaging hide what was clipped.

What seeking gives, with libsndfile 1.2.2: in FLAC, WAV and Ogg Vorbis the samples of the whole recording bit for bit. An Opus
decoder needs time to settle, so a range is decoded from two seconds before it on, after which differences are below 1e-4; every
range comes out the same each time. MP3 has no index: to find minute 50 libsndfile parses 16 MB in 2 s, and what follows may begin
with muted frames. Ranges of MP3 are refused.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soundfile

from hubert_ray.config.recipe import Checks
from hubert_ray.data.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_ray.errors import AudioError

UNKNOWN_BYTES = 2**31 - 2**16  # a WAV's chunk of this size or more was written to a pipe, its length not known yet
# libsndfile's word for a FLAC stream whose header has no length; it cannot read those to the end
UNKNOWN_FRAMES = 2**63 - 1
SETTLING_SECONDS = 2  # of an Opus decoder after seeking
BLOCK_SECONDS = 60  # of a long recording that are in memory at a time
PIECE_SECONDS = 120  # of one whose units are wanted; up to here it is decoded as an utterance is
_LAST_BYTES = 2**17  # an Ogg page has at most half as many
MAX_FILTER_TAPS = 10_000_000  # of the resampling filters; 44.1 kHz has 70,560, an odd rate in a broken header gigabytes
FULL_SCALE = 0.999  # and more is clipped: the largest sample of 16 bits is 0.99997


@dataclass(frozen=True)
class Recording:
    """What is known of a recording that was let in."""

    samples: int  # at 16 kHz
    rate: int  # of the stored audio, Hz
    digest: (
        bytes  # 16 bytes, of the samples rounded to 16 bits: the same for WAV and FLAC, whatever the tags in the file
    )


def decode(data: bytes) -> np.ndarray:
    """The 16 kHz waveform of compressed audio, shape (S,), float32.

    Raises AudioError with reason `empty`, `undecodable`, `not_finite`, `sample_rate` (too odd to resample) or `too_short`
    (below 400 samples, one frame of the model).
    """
    return _at_16_khz(*_stored(data, math.inf))


def examine(data: bytes, checks: Checks) -> Recording:
    """What a recording is that may enter a corpus.

    Raises AudioError as `decode` does, and with the reasons that `Checks` names.
    """
    wave_SC, rate = _stored(data, checks.max_seconds)
    _check_rate(rate, checks)
    wave_S = _at_16_khz(wave_SC, rate)
    if len(wave_S) < checks.min_seconds * SAMPLE_RATE:
        raise AudioError("too_short", f"{len(wave_S) / SAMPLE_RATE:g} s, at least {checks.min_seconds:g} s")
    signal = _Signal(rate)
    signal.add(wave_SC)
    return signal.checked(checks, len(wave_S))


def examine_long(data: bytes, checks: Checks, hear: Callable[[np.ndarray], None]) -> Recording:
    """`examine` for a recording of any length, BLOCK_SECONDS at a time; memory holds one block.

    `hear` is given the 16 kHz waveform block by block, each resampled by itself; see `decode_range`.
    """
    with _opened(data) as file:
        rate, left = file.samplerate, file.frames
        _check_rate(rate, checks)
        _check_end(data, file)
        signal = _Signal(rate)
        while left > 0:
            wave_SC = _read(file, min(left, BLOCK_SECONDS * rate))
            signal.add(wave_SC)
            hear(_resampled(wave_SC, rate))
            left -= len(wave_SC)
        return signal.checked(checks, file.frames * SAMPLE_RATE // rate)


def decode_range(file: io.IOBase, first: int, stored_samples: int) -> np.ndarray:
    """The 16 kHz waveform of a range of a recording, shape (S,), float32; the file is read where the range lies only.

    `first` and `stored_samples` count samples at the stored rate. The range is resampled by itself, as if the recording began
    and ended there: within 6 zero crossings of the filter (0.8 ms at 8 kHz) of either end it differs from the resampled whole.
    Raises AudioError as `decode` does, also where the recording ends before the range, and `not_seekable` for MP3.
    """
    with _opened(file) as opened:
        if opened.format == "MP3":
            raise AudioError(
                "not_seekable",
                "MP3 has no index, so each piece of a long recording would be searched for from its beginning; encode it as "
                "FLAC, Ogg Vorbis or Opus",
            )
        if opened.subtype == "OPUS":
            before = min(first, SETTLING_SECONDS * opened.samplerate)
            opened.seek(first - before)
            opened.read(before)
        else:
            opened.seek(first)
        return _at_16_khz(_read(opened, stored_samples), opened.samplerate)


def header(data: bytes) -> tuple[int, int]:
    """(samples per channel, sample rate) as stored, without decoding. Raises AudioError `empty` or `undecodable`."""
    with _opened(data) as file:
        return file.frames, file.samplerate


def pieces(source: BinaryIO) -> Iterator[np.ndarray]:
    """The 16 kHz waveform of a recording of any length, in pieces (S,) of at most PIECE_SECONDS; joined they are what `decode`
    gives, but for rounding where a long one is resampled. Memory holds two or three.

    Raises AudioError as `decode` does, where the trouble is: of a recording that ends early after its last good piece.
    """
    size = source.seek(0, io.SEEK_END)
    source.seek(max(0, size - _LAST_BYTES))
    end = source.read()
    source.seek(0)
    if not end:
        raise AudioError("empty", "0 bytes")
    samples = 0
    with _opened(source) as file:
        _check_end(end, file)
        for wave_S in _resampled_in_turn(_stored_in_turn(file), file.samplerate):
            samples += len(wave_S)
            if samples < RECEPTIVE_FIELD:  # never of a first piece that others follow
                break
            yield np.ascontiguousarray(wave_S)
    if samples < RECEPTIVE_FIELD:
        raise AudioError("too_short", f"{samples} samples at 16 kHz, at least {RECEPTIVE_FIELD}")


def _stored_in_turn(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """PIECE_SECONDS after PIECE_SECONDS at the stored rate, mono, shape (S,)."""
    left = file.frames
    while left > 0:
        wave_SC = _read(file, min(left, int(PIECE_SECONDS * file.samplerate)))
        left -= len(wave_SC)
        yield _mono(wave_SC)


def _resampled_in_turn(waves: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Resamples piece by piece: each with a second of its neighbours, far more than the filter is wide, which is cut off again.

    Pieces and a second are whole numbers of the filter's period, so the joints fall between two samples.
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


@contextmanager
def _opened(source: bytes | BinaryIO | io.IOBase) -> Iterator[soundfile.SoundFile]:
    """A recording whose header tells its length; what libsndfile says against it becomes an AudioError."""
    if source == b"":
        raise AudioError("empty", "0 bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if file.frames == UNKNOWN_FRAMES:
                raise AudioError("undecodable", "the header has no length, as a stream's; encode it again from a file")
            yield file
    except (soundfile.SoundFileError, ValueError, MemoryError) as error:
        # libsndfile's own words: str(error) also names a memory address, which would differ from run to run.
        raise AudioError("undecodable", getattr(error, "error_string", str(error))) from error


def _stored(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """Samples as stored, shape (S, C) float32, and their rate. Length and rate are looked at before they cost memory."""
    with _opened(data) as file:
        if file.frames > max_seconds * file.samplerate:
            raise AudioError(
                "too_long",
                f"{file.frames / file.samplerate:.0f} s, at most {max_seconds:.0f} s; with corpus.segments (max_seconds = 30, for "
                "instance) long recordings are cut at their pauses",
            )
        _check_end(data, file)
        return _read(file, file.frames), file.samplerate


def _read(file: soundfile.SoundFile, samples: int) -> np.ndarray:
    """The next samples as stored, shape (S, C) float32."""
    wave_SC = file.read(frames=samples, dtype="float32", always_2d=True)
    if len(wave_SC) < samples:
        raise AudioError("undecodable", f"ends after {len(wave_SC)} of {samples} samples")
    with np.errstate(over="ignore", invalid="ignore"):
        total = wave_SC.sum()  # takes a third of the time of looking at each sample
    if not np.isfinite(total) and (bad := np.count_nonzero(~np.isfinite(wave_SC))):
        raise AudioError("not_finite", f"{bad} samples are NaN or infinite")
    return wave_SC


def _check_end(data: bytes, file: soundfile.SoundFile) -> None:
    """Finds files that were cut short in the two formats which libsndfile then reads as shorter ones without a word."""
    declared = re.search(
        r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE
    )  # its log of a WAV's chunks
    if declared and int(declared[2]) < int(declared[1]) < UNKNOWN_BYTES:
        raise AudioError(
            "undecodable", f"has {declared[2]} of the {declared[1]} bytes of samples that the header promises"
        )
    if file.format == "OGG":
        page = data.rfind(b"OggS")  # RFC 3533: flags at byte 5, of which 4 marks the stream's end
        if len(data) < page + 14 or not data[page + 5] & 4:
            raise AudioError("undecodable", "the last page is not the stream's end")
        end = int.from_bytes(data[page + 6 : page + 14], "little")  # samples, in Vorbis at the file's own rate
        if file.subtype == "VORBIS" and file.frames < end:
            raise AudioError("undecodable", f"{file.frames} of {end} samples can be read")


def _check_rate(rate: int, checks: Checks) -> None:
    if rate < checks.min_sample_rate_hz:
        raise AudioError("sample_rate", f"{rate} Hz, at least {checks.min_sample_rate_hz} Hz")


def _at_16_khz(wave_SC: np.ndarray, rate: int) -> np.ndarray:
    wave_S = _resampled(wave_SC, rate)
    if len(wave_S) < RECEPTIVE_FIELD:
        raise AudioError("too_short", f"{len(wave_S)} samples at 16 kHz, at least {RECEPTIVE_FIELD}")
    return np.ascontiguousarray(wave_S)


def _resampled(wave_SC: np.ndarray, rate: int) -> np.ndarray:
    wave_S = _mono(wave_SC)
    return wave_S if rate == SAMPLE_RATE else _resample(wave_S, rate)


def _mono(wave_SC: np.ndarray) -> np.ndarray:
    return wave_SC[:, 0] if wave_SC.shape[1] == 1 else wave_SC.mean(axis=1)


class _Signal:
    """Clipping of any channel; mean and power of the channels' average, which is what the model hears. Block by block."""

    def __init__(self, rate: int):
        self._rate = rate
        self._digest = hashlib.blake2b(digest_size=16, key=rate.to_bytes(8, "little"))
        self._values = self._clipped = self._samples = 0
        self._sum = self._squares = 0.0

    def add(self, wave_SC: np.ndarray) -> None:
        """The next samples as stored, (S, C)."""
        rounded_SC = np.clip(np.rint(wave_SC * np.float32(2**15)), -(2**15), 2**15 - 1).astype("<i2")
        self._digest.update(rounded_SC.tobytes())
        self._values += wave_SC.size
        self._clipped += int(np.count_nonzero(wave_SC >= FULL_SCALE) + np.count_nonzero(wave_SC <= -FULL_SCALE))
        wave_S = _mono(wave_SC).astype(np.float64)
        self._samples += len(wave_S)
        self._sum += float(wave_S.sum())
        # Not by BLAS, whose threads spin and change the order of the sum.
        self._squares += float(np.square(wave_S).sum())

    def checked(self, checks: Checks, samples: int) -> Recording:
        """The recording, `samples` long at 16 kHz. Raises AudioError where the signal is not as `checks` ask for."""
        clipped = self._clipped / self._values
        if clipped > checks.max_clipped_share:
            raise AudioError(
                "clipped", f"{100 * clipped:.1f} % of the samples, at most {100 * checks.max_clipped_share:g} %"
            )
        mean = self._sum / self._samples
        level_db = 10 * math.log10(max(self._squares / self._samples - mean**2, 1e-20))
        if level_db < checks.min_level_db:
            raise AudioError("silent", f"{level_db:.0f} dB around {mean:.3g}, at least {checks.min_level_db:g} dB")
        if abs(mean) > checks.max_dc_offset:
            raise AudioError("dc_offset", f"the mean is {mean:.3g} of full scale, at most {checks.max_dc_offset:g}")
        return Recording(samples, self._rate, self._digest.digest())


def normalise(wave_S: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the whole utterance, as Large and X-Large expect (epsilon 1e-5 as layer norm)."""
    return (wave_S - wave_S.mean()) / np.sqrt(wave_S.var() + 1e-5)


def _resample(wave_S: np.ndarray, rate: int) -> np.ndarray:
    common = math.gcd(rate, SAMPLE_RATE)
    if (rate // common) * (SAMPLE_RATE // common) > MAX_FILTER_TAPS:
        raise AudioError("sample_rate", f"{rate} Hz cannot be resampled to {SAMPLE_RATE} Hz in reasonable memory")
    import torch  # here, so that listing a corpus does not load it
    import torchaudio.functional

    return torchaudio.functional.resample(torch.from_numpy(np.ascontiguousarray(wave_S)), rate, SAMPLE_RATE).numpy()
