"""What runs in espeak-ng's own process? This script: a JSON job on stdin, raw speech and phoneme times on stdout.

espeak-ng is GPL-3 and keeps global state (noise generators, flutter phase), so `synthetic.py` never imports this file:
it starts a fresh interpreter per speaker. That keeps the licence at arm's length and makes a speaker's audio depend on
the job alone. Only the standard library and the extra `demo` (espeakng-loader) are used.

Job:   {"base": "gmw/en-US", "variant": "<lines of a voice file>", "rate_wpm": 165, "sentences": [...]}
Reply: per sentence one JSON line {"samples": n, "rate_hz": 22050, "phones": [[start_sample, "ARPABET"], ...]}, the
       phones contiguous from sample 0 to n, followed by 2n bytes of native int16 mono audio.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

EXIT_MISSING_EXTRA = 3
EXIT_BROKEN_ESPEAK = 4

# Names and numbers of espeak-ng's public header speak_lib.h.
OUTPUT_SYNCHRONOUS = 2
PHONEME_EVENTS_NO_EXIT = 0x8001
EVENT_END_OF_LIST = 0
EVENT_PHONEME = 7
PARAMETER_RATE = 1
CHARS_UTF8 = 1
MAX_DATA_PATH = 120  # espeak-ng builds file names in fixed buffers of 160 bytes that start with this path

VARIANT_NAME = "hubert"

SILENCE = "SIL"
SAMPLE_BYTES = 2
MIN_CLOSURE = 100  # samples of exact zero before a phone that count as its closure

# espeak-ng's English phoneme mnemonics without stress marks -> ARPAbet. `+` joins two labels that share one's time.
_LABELS = (
    "b=B d=D f=F g=G k=K l=L m=M n=N p=P r=R s=S t=T v=V w=W z=Z D=DH T=TH S=SH Z=ZH tS=CH dZ=JH N=NG h=HH j=Y "
    "r-=R t#=T _=SIL _:=SIL _!=SIL i:=IY i=IY I=IH I2=IH I#=IH E=EH a=AE aa=AE A:=AA 0=AA O:=AO O2=AO U=UH u:=UW "
    "V=AH @=AH @2=AH a#=AH 3=ER 3:=ER VR=ER IR=ER eI=EY aI=AY aI2=AY OI=OY aU=AW oU=OW @L=AH+L"
)
ARPABET = dict(entry.split("=") for entry in _LABELS.split())
# Vowels before a written r: one glide in American, a bare vowel elsewhere (Scottish adds an `r` of its own).
ARPABET_BY_BASE = {
    "gmw/en-US": {"A@": "AA+R", "i@3": "IH+R"},
    "gmw/en": {"A@": "AA", "i@3": "IH+AH"},
    "gmw/en-GB-x-rp": {"A@": "AA", "i@3": "IH+AH"},
    "gmw/en-GB-scotland": {"A@": "AA", "i@3": "IH"},
}
LINKING_GLIDE = ";"  # between "the" and a vowel: stays with the vowel before it


class Event(ctypes.Structure):
    """espeak_EVENT; `mnemonic` is the 8-byte union member that phoneme events fill."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("message", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("mnemonic", ctypes.c_char * 8),
    )


SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))


def fail(status: int, message: str) -> NoReturn:
    """End the process; the parent raises `message` in the caller's terms."""
    print(message, file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def private_data_folder(installed: Path, variant: str) -> Iterator[Path]:
    """A throw-away folder that looks like espeak-ng-data and holds our voice variant; site-packages stays untouched."""
    with tempfile.TemporaryDirectory(prefix="espeak-") as folder:
        data = Path(folder)
        if len(os.fsencode(data)) > MAX_DATA_PATH:
            fail(
                EXIT_BROKEN_ESPEAK,
                f"espeak-ng cannot use the temporary folder {data}: {len(os.fsencode(data))} bytes of path, at most "
                f"{MAX_DATA_PATH} fit. Set TMPDIR to a shorter path.",
            )
        for entry in installed.iterdir():
            if entry.name != "voices":
                (data / entry.name).symlink_to(entry)
        variants = data / "voices" / "!v"
        variants.mkdir(parents=True)
        (variants / VARIANT_NAME).write_text(variant, encoding="utf-8")
        yield data


class Espeak:
    """espeak-ng in this process, one voice."""

    def __init__(self, library: str, data: Path, base: str, rate_wpm: int) -> None:
        self._lib = ctypes.CDLL(library)
        self._audio: list[bytes] = []
        self._phonemes: list[tuple[int, str]] = []
        self._callback = SynthCallback(self._receive)  # kept alive: C holds the pointer
        self.rate_hz = self._lib.espeak_Initialize(OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), PHONEME_EVENTS_NO_EXIT)
        if self.rate_hz <= 0:
            fail(EXIT_BROKEN_ESPEAK, f"espeak_Initialize({data}) gave {self.rate_hz}, expected a sample rate.")
        self._lib.espeak_SetSynthCallback(self._callback)
        voice = f"{base}+{VARIANT_NAME}"
        status = self._lib.espeak_SetVoiceByName(voice.encode())
        if status != 0:
            fail(EXIT_BROKEN_ESPEAK, f"espeak-ng has no voice {voice!r} (status {status}); see its data folder lang/.")
        self._lib.espeak_SetParameter(PARAMETER_RATE, rate_wpm, 0)

    def _receive(self, wave: int | None, samples: int, events: ctypes._Pointer) -> int:
        index = 0
        while events[index].type != EVENT_END_OF_LIST:
            if events[index].type == EVENT_PHONEME:
                self._phonemes.append((events[index].sample, events[index].mnemonic.decode()))
            index += 1
        if wave and samples > 0:
            self._audio.append(ctypes.string_at(wave, SAMPLE_BYTES * samples))
        return 0  # go on

    def say(self, sentence: str) -> tuple[bytes, list[tuple[int, str]]]:
        """int16 audio of one sentence and the (start sample, mnemonic) of its phonemes."""
        self._audio, self._phonemes = [], []
        text = sentence.encode() + b"\0"
        status = self._lib.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, CHARS_UTF8, None, None)
        if status != 0 or not self._audio:
            fail(EXIT_BROKEN_ESPEAK, f"espeak_Synth gave status {status} and no audio for {sentence!r}.")
        return b"".join(self._audio), self._phonemes


def phones(base: str, audio: bytes, phonemes: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Phoneme events -> (start sample, ARPAbet label), contiguous from sample 0; pauses merged.

    espeak-ng reports a stop at its burst. The digital silence before it is its closure, so the phone starts there.
    """
    table = ARPABET | ARPABET_BY_BASE[base]
    starts: list[tuple[int, str]] = [(0, SILENCE)]
    ends = [start for start, _ in phonemes[1:]] + [len(audio) // SAMPLE_BYTES]
    for (start, mnemonic), end in zip(phonemes, ends, strict=True):
        mnemonic = mnemonic.lstrip("',%=")
        if mnemonic == LINKING_GLIDE:
            continue
        if mnemonic not in table:
            fail(
                EXIT_BROKEN_ESPEAK,
                f"espeak-ng spoke the phoneme {mnemonic!r}; espeak_voice.ARPABET has no label for it.",
            )
        labels = table[mnemonic].split("+")
        if starts[-1][1] != SILENCE and labels != [SILENCE]:
            spoken = audio[: SAMPLE_BYTES * start].rstrip(b"\0")
            voiced_end = -(-len(spoken) // SAMPLE_BYTES)
            if start - voiced_end >= MIN_CLOSURE:
                start = max(voiced_end, starts[-1][0] + 1)
        for part, label in enumerate(labels):
            if label != SILENCE or starts[-1][1] != SILENCE:
                starts.append((start + part * (end - start) // len(labels), label))
    if len(starts) > 1 and starts[1][0] == 0:
        del starts[0]
    return starts


def run(job: dict, reply: BinaryIO) -> None:
    """Speak every sentence of `job` and write the reply described above."""
    try:
        import espeakng_loader
    except ImportError as error:
        fail(
            EXIT_MISSING_EXTRA,
            f"The embedded corpus needs espeak-ng, found none in {sys.executable} ({error}); expected the package "
            "espeakng-loader. Install the extra: pip install hubert-ray[demo]",
        )
    with private_data_folder(Path(espeakng_loader.get_data_path()), job["variant"]) as data:
        espeak = Espeak(espeakng_loader.get_library_path(), data, job["base"], job["rate_wpm"])
        for sentence in job["sentences"]:
            audio, phonemes = espeak.say(sentence)
            header = {
                "samples": len(audio) // SAMPLE_BYTES,
                "rate_hz": espeak.rate_hz,
                "phones": phones(job["base"], audio, phonemes),
            }
            reply.write(json.dumps(header).encode() + b"\n" + audio)
        reply.flush()


def main() -> None:
    """Serve one job; whatever the C library prints goes to stderr, never between the audio bytes."""
    with os.fdopen(os.dup(1), "wb") as reply:
        os.dup2(2, 1)
        run(json.load(sys.stdin), reply)


if __name__ == "__main__":
    main()
