"""Is a recording usable, and what is its waveform?

Decoding goes through libsndfile (FLAC, WAV, OGG, MP3) from bytes in memory. All waveforms in the project are mono
float32 in [-1, 1] at 16 kHz; other rates are resampled, several channels are averaged. What a corpus lets in is examined on
the samples as they are stored, since resampling and averaging hide what was clipped.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from dataclasses import dataclass

import numpy as np
import soundfile

from hubert_ray.config.recipe import Checks
from hubert_ray.data.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_ray.errors import AudioError

UNKNOWN_BYTES = 2**31 - 2**16  # a WAV's chunk of this size or more was written to a pipe, its length not known yet
# libsndfile's word for a FLAC stream whose header has no length; it cannot read those to the end
UNKNOWN_FRAMES = 2**63 - 1
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
    if rate < checks.min_sample_rate_hz:
        raise AudioError("sample_rate", f"{rate} Hz, at least {checks.min_sample_rate_hz} Hz")
    wave_S = _at_16_khz(wave_SC, rate)
    if len(wave_S) < checks.min_seconds * SAMPLE_RATE:
        raise AudioError("too_short", f"{len(wave_S) / SAMPLE_RATE:g} s, at least {checks.min_seconds:g} s")
    _check_signal(wave_SC, checks)
    return Recording(len(wave_S), rate, _digest(wave_SC, rate))


def _stored(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """Samples as stored, shape (S, C) float32, and their rate. Length and rate are looked at before they cost memory."""
    if not data:
        raise AudioError("empty", "0 bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, declared = file.samplerate, file.frames
            if declared == UNKNOWN_FRAMES:
                raise AudioError("undecodable", "the header has no length, as a stream's; encode it again from a file")
            if declared > max_seconds * rate:
                raise AudioError("too_long", f"{declared / rate:.0f} s, at most {max_seconds:.0f} s")
            _check_end(data, file)
            wave_SC = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError, MemoryError) as error:
        # libsndfile's own words: str(error) also names a memory address, which would differ from run to run.
        raise AudioError("undecodable", getattr(error, "error_string", str(error))) from error
    if len(wave_SC) < declared:
        raise AudioError("undecodable", f"ends after {len(wave_SC)} of {declared} samples")
    finite_SC = np.isfinite(wave_SC)
    if not finite_SC.all():
        raise AudioError("not_finite", f"{np.count_nonzero(~finite_SC)} samples are NaN or infinite")
    return wave_SC, rate


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
        page = data.rfind(
            b"OggS"
        )  # RFC 3533: flags at byte 5, of which 4 marks the stream's end; lengths from byte 27 on
        segments = data[page + 27 : page + 27 + data[page + 26]]
        if not data[page + 5] & 4 or page + 27 + data[page + 26] + sum(segments) > len(data):
            raise AudioError("undecodable", "the last page is not the stream's end")
        end = int.from_bytes(data[page + 6 : page + 14], "little")  # samples, in Vorbis at the file's own rate
        if file.subtype == "VORBIS" and file.frames < end:
            raise AudioError("undecodable", f"{file.frames} of {end} samples can be read")


def _at_16_khz(wave_SC: np.ndarray, rate: int) -> np.ndarray:
    wave_S = _mono(wave_SC)
    if rate != SAMPLE_RATE:
        wave_S = _resample(wave_S, rate)
    if len(wave_S) < RECEPTIVE_FIELD:
        raise AudioError("too_short", f"{len(wave_S)} samples at 16 kHz, at least {RECEPTIVE_FIELD}")
    return np.ascontiguousarray(wave_S)


def _mono(wave_SC: np.ndarray) -> np.ndarray:
    return wave_SC[:, 0] if wave_SC.shape[1] == 1 else wave_SC.mean(axis=1)


def _digest(wave_SC: np.ndarray, rate: int) -> bytes:
    rounded_SC = np.clip(np.rint(wave_SC * np.float32(2**15)), -(2**15), 2**15 - 1).astype("<i2")
    return hashlib.blake2b(rounded_SC.tobytes(), digest_size=16, key=rate.to_bytes(8, "little")).digest()


def _check_signal(wave_SC: np.ndarray, checks: Checks) -> None:
    """Clipping of any channel; mean and power of the channels' average, which is what the model hears."""
    clipped = (np.count_nonzero(wave_SC >= FULL_SCALE) + np.count_nonzero(wave_SC <= -FULL_SCALE)) / wave_SC.size
    if clipped > checks.max_clipped_share:
        raise AudioError(
            "clipped", f"{100 * clipped:.1f} % of the samples, at most {100 * checks.max_clipped_share:g} %"
        )
    wave_S = _mono(wave_SC)
    mean, deviation = float(wave_S.mean(dtype=np.float64)), float(wave_S.std())
    level_db = 20 * math.log10(max(deviation, 1e-10))
    if level_db < checks.min_level_db:
        raise AudioError("silent", f"{level_db:.0f} dB around {mean:.3g}, at least {checks.min_level_db:g} dB")
    if abs(mean) > checks.max_dc_offset:
        raise AudioError("dc_offset", f"the mean is {mean:.3g} of full scale, at most {checks.max_dc_offset:g}")


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
