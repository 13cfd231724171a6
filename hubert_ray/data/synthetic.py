"""Where does speech come from when there is none? The embedded corpus: invented sentences (`sentences.py`), spoken offline.

espeak-ng (extra `demo`, in a process of its own: `espeak_voice.py`) speaks for invented voices; a light room, noise
and gain make the signal less clean. Transcripts and phone times come from the synthesiser, so the whole recipe can be
trained and scored on a laptop. Everything is a pure function of (corpus.seed, speaker id): no order, process or worker
count changes a byte. Signal work is numpy without BLAS, whose sums have one order whatever the thread count.
Splits share neither speakers nor sentences. All samples are at 16 kHz unless named otherwise.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from hubert_ray.config.recipe import EmbeddedCorpus
from hubert_ray.data.sentences import Split, sentences
from hubert_ray.errors import CorpusError

SAMPLE_RATE_HZ = 16_000
CHAPTER = "0"
MIN_SECONDS = 2.1  # shorter utterances get more silence: pretraining drops what is under 2 s
SPEAKER_TIMEOUT_SECONDS = 900.0

_FIRST_SPEAKER_ID: dict[Split, int] = {"train": 1001, "dev": 11001, "test": 21001}
MAX_SPEAKERS_PER_SPLIT = 10_000  # ids of two splits would meet

# --- speakers ---------------------------------------------------------------------------------------------------------


class Echo(NamedTuple):
    """One reflection of the speaker's room."""

    delay_samples: int
    gain: float


@dataclass(frozen=True)
class Speaker:
    """An invented person: a voice for espeak-ng, and the room and microphone they speak into."""

    id: str
    split: Split
    base: str  # espeak-ng voice file: the accent
    variant: str  # lines of an espeak-ng voice variant: pitch, vocal tract, roughness
    rate_wpm: int
    room: tuple[Echo, ...]
    tilt: float  # microphone: y[n] = x[n] + tilt * x[n-1]


# Accents and their shares. `breath` never enters a variant: it draws from an unseeded generator.
_ACCENTS = {"gmw/en-US": 0.6, "gmw/en": 0.15, "gmw/en-GB-x-rp": 0.1, "gmw/en-GB-scotland": 0.15}
_STREAM = {"voice": 0, "text": 1, "noise": 2}


def _rng(corpus: EmbeddedCorpus, speaker_id: str, stream: str) -> np.random.Generator:
    return np.random.default_rng([corpus.seed, int(speaker_id), _STREAM[stream]])


def _variant(rng: np.random.Generator, female: bool) -> str:
    pitch_hz = rng.uniform(140, 205) if female else rng.uniform(75, 118)
    tract = rng.uniform(1.08, 1.20) if female else rng.uniform(0.92, 1.06)
    lines = [
        "language variant",
        "name invented",
        f"gender {'female' if female else 'male'}",
        f"pitch {pitch_hz:.0f} {pitch_hz * rng.uniform(1.3, 1.5):.0f}",
        f"roughness {rng.integers(0, 3)}",
        f"flutter {rng.integers(1, 5)}",
        f"voicing {rng.integers(85, 120)}",
        f"consonants {rng.integers(90, 120)} {rng.integers(90, 120)}",
    ]
    for formant in range(1, 9):
        frequency, strength = 100 * tract * rng.uniform(0.97, 1.03), rng.uniform(85, 110)
        lines.append(f"formant {formant} {frequency:.0f} {strength:.0f} {rng.uniform(95, 130):.0f}")
    return "\n".join(lines) + "\n"


def _room(rng: np.random.Generator) -> tuple[Echo, ...]:
    """Sparse reflections within 80 ms, fading by 60 dB in 0.15 to 0.35 s."""
    fade_seconds, level = rng.uniform(0.15, 0.35), rng.uniform(0.08, 0.22)
    delays = np.sort(rng.integers(32, SAMPLE_RATE_HZ * 80 // 1000, size=12))
    signs = rng.choice([-1.0, 1.0], size=12)
    gains = signs * level * 10.0 ** (-3.0 * delays / (fade_seconds * SAMPLE_RATE_HZ))
    return tuple(Echo(int(delay), float(gain)) for delay, gain in zip(delays, gains, strict=True))


def _speaker(corpus: EmbeddedCorpus, split: Split, index: int) -> Speaker:
    speaker_id = str(_FIRST_SPEAKER_ID[split] + index)
    rng = _rng(corpus, speaker_id, "voice")
    return Speaker(
        id=speaker_id,
        split=split,
        base=str(rng.choice(list(_ACCENTS), p=list(_ACCENTS.values()))),
        variant=_variant(rng, female=index % 2 == 0),
        rate_wpm=int(rng.integers(150, 176)),
        room=_room(rng),
        tilt=float(rng.uniform(-0.5, 0.5)),
    )


def speakers(corpus: EmbeddedCorpus) -> list[Speaker]:
    """All speakers, train then dev then test. A speaker does not change when the corpus gets more of them."""
    counts: dict[Split, int] = {
        "train": corpus.train_speakers,
        "dev": corpus.dev_speakers,
        "test": corpus.test_speakers,
    }
    for split, count in counts.items():
        if count > MAX_SPEAKERS_PER_SPLIT:
            raise CorpusError(
                f"corpus.{split}_speakers is {count}; the embedded corpus has ids for at most "
                f"{MAX_SPEAKERS_PER_SPLIT} per split."
            )
    return [_speaker(corpus, split, index) for split, count in counts.items() for index in range(count)]


# --- signal -----------------------------------------------------------------------------------------------------------


@cache
def _resampling_taps(rate_hz: int) -> tuple[np.ndarray, np.ndarray]:
    """(first input sample P, taps PxK) of a windowed-sinc filter for each of the P output phases of one period."""
    period = SAMPLE_RATE_HZ // int(np.gcd(rate_hz, SAMPLE_RATE_HZ))
    cutoff = 0.95 * min(1.0, SAMPLE_RATE_HZ / rate_hz)
    half_width = int(np.ceil(12 / cutoff))
    position = np.arange(period) * rate_hz / SAMPLE_RATE_HZ
    first = np.floor(position).astype(np.int64) - half_width + 1
    distance = first[:, None] + np.arange(2 * half_width) - position[:, None]
    window = np.cos(np.pi * distance / (2 * half_width)) ** 2
    return first, cutoff * np.sinc(cutoff * distance) * window


def _resample(wave: np.ndarray, rate_hz: int) -> np.ndarray:
    first, taps = _resampling_taps(rate_hz)
    period, advance = len(first), len(first) * rate_hz // SAMPLE_RATE_HZ
    samples = -(-len(wave) * SAMPLE_RATE_HZ // rate_hz)
    periods = -(-samples // period)
    lead, width = -int(first[0]), taps.shape[1]
    padded = np.zeros(lead + periods * advance + width)
    padded[lead : lead + len(wave)] = wave
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    out = np.empty((periods, period))
    for phase in range(period):
        inputs = windows[lead + first[phase] :: advance][:periods]
        out[:, phase] = np.einsum("ij,j->i", inputs, taps[phase])
    return out.ravel()[:samples]


def _record(wave: np.ndarray, speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """Dry speech -> int16 as the speaker's microphone hears it: room, tilt, background noise, gain."""
    wet = wave.copy()
    for echo in speaker.room:
        wet[echo.delay_samples :] += echo.gain * wave[: -echo.delay_samples]
    wet[1:] += speaker.tilt * wet[:-1]
    snr_db, level_db, colour = rng.uniform(20, 35), rng.uniform(-30, -22), rng.uniform(0.2, 0.9)
    noise = rng.standard_normal(len(wet) + 2)
    noise = noise[2:] + colour * noise[1:-1] + colour**2 * noise[:-2]
    speech_rms = np.sqrt(np.mean(wet**2))
    noise *= speech_rms * 10.0 ** (-snr_db / 20) / np.sqrt(np.mean(noise**2))
    heard = (wet + noise) * 10.0 ** (level_db / 20) / speech_rms
    heard *= min(1.0, 0.98 / np.abs(heard).max())
    return np.round(32767 * heard).astype(np.int16)


# --- utterances -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utterance:
    """One recording with all that is known about it."""

    utterance_id: str
    speaker: str
    split: Split
    flac: bytes  # 16 kHz, mono, 16 bits
    samples: int
    text: str
    phones: list[tuple[int, int, str]]  # (start sample, end sample, ARPAbet or SIL), contiguous from 0 to `samples`


_ESPEAK_COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("espeak_voice.py")))


def _speak(speaker: Speaker, texts: list[str]) -> Iterator[tuple[dict, np.ndarray]]:
    """(reply header, dry audio at header["rate_hz"]) per text, all from one fresh espeak-ng process."""
    voice = {"base": speaker.base, "variant": speaker.variant, "rate_wpm": speaker.rate_wpm}
    job = json.dumps({**voice, "sentences": [text.lower() for text in texts]}).encode()
    process = subprocess.run(
        _ESPEAK_COMMAND, input=job, capture_output=True, check=False, timeout=SPEAKER_TIMEOUT_SECONDS
    )
    if process.returncode != 0:
        reason = process.stderr.decode(errors="replace").strip() or f"exit status {process.returncode}, no message"
        raise CorpusError(f"No synthetic speech for speaker {speaker.id}. {reason}")
    reply = io.BytesIO(process.stdout)
    for _ in texts:
        header = json.loads(reply.readline())
        yield header, np.frombuffer(reply.read(2 * header["samples"]), np.int16).astype(np.float64)


def _phones(header: dict, before: int, spoken: int, samples: int) -> list[tuple[int, int, str]]:
    """Phone starts of the dry audio -> phones of the padded utterance, whose speech fills before .. before + spoken."""
    starts = [(before + round(start * SAMPLE_RATE_HZ / header["rate_hz"]), label) for start, label in header["phones"]]
    marks = [(0, "SIL"), *starts, (before + spoken, "SIL"), (samples, "")]
    phones: list[tuple[int, int, str]] = []
    for (start, label), (end, _) in pairwise(marks):
        if phones and label == phones[-1][2] == "SIL":
            phones[-1] = (phones[-1][0], end, label)
        elif end > start:
            phones.append((start, end, label))
    return phones


def _utterance(
    speaker: Speaker, index: int, text: str, header: dict, dry: np.ndarray, rng: np.random.Generator
) -> Utterance:
    wave = _resample(dry, header["rate_hz"])
    before, after = (int(pad) for pad in rng.integers(1600, 4000, size=2))
    short = max(0, int(MIN_SECONDS * SAMPLE_RATE_HZ) - before - len(wave) - after)
    before, after = before + short // 2, after + short - short // 2
    heard = _record(np.concatenate([np.zeros(before), wave, np.zeros(after)]), speaker, rng)
    flac = io.BytesIO()
    soundfile.write(flac, heard, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return Utterance(
        utterance_id=f"{speaker.id}-{CHAPTER}-{index:04d}",
        speaker=speaker.id,
        split=speaker.split,
        flac=flac.getvalue(),
        samples=len(heard),
        text=text,
        phones=_phones(header, before, len(wave), len(heard)),
    )


def synthesise(speaker: Speaker, corpus: EmbeddedCorpus) -> Iterator[Utterance]:
    """Everything one speaker says, in order. The same bytes in any process, after any other speaker."""
    texts = sentences(speaker.split, corpus.utterances_per_speaker, _rng(corpus, speaker.id, "text"))
    rng = _rng(corpus, speaker.id, "noise")
    for index, (text, (header, dry)) in enumerate(zip(texts, _speak(speaker, texts), strict=True)):
        yield _utterance(speaker, index, text, header, dry, rng)


def write_librispeech_tree(corpus: EmbeddedCorpus, folder: Path) -> None:
    """The corpus as files, laid out as LibriSpeech and its alignments.

    `<split>-synthetic/<speaker>/<chapter>/<utterance>.flac`, `<speaker>-<chapter>.trans.txt` beside them, and
    `alignments/<split>-synthetic/<speaker>/<chapter>/<utterance>.phn` with lines `start_sample end_sample PHONE`.
    """
    for speaker in speakers(corpus):
        place = Path(f"{speaker.split}-synthetic", speaker.id, CHAPTER)
        audio, alignments = folder / place, folder / "alignments" / place
        audio.mkdir(parents=True, exist_ok=True)
        alignments.mkdir(parents=True, exist_ok=True)
        transcripts = []
        for utterance in synthesise(speaker, corpus):
            (audio / f"{utterance.utterance_id}.flac").write_bytes(utterance.flac)
            lines = [f"{start} {end} {label}\n" for start, end, label in utterance.phones]
            (alignments / f"{utterance.utterance_id}.phn").write_text("".join(lines), encoding="utf-8")
            transcripts.append(f"{utterance.utterance_id} {utterance.text}\n")
        (audio / f"{speaker.id}-{CHAPTER}.trans.txt").write_text("".join(transcripts), encoding="utf-8")
