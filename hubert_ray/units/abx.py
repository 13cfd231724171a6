"""Do features keep phones apart, before any clustering? The ABX error rate, computed by fastabx (extra `abx`, Python 3.12).

Of three spoken phones A, B and X, where X is of A's kind, how often is X closer to B? 0 is perfect, 0.5 is chance. As in ZeroSpeech
2021 (fastabx, `zerospeech_abx`): phones between the same two neighbours, of the same speaker; distance: angles between frames along
the path of dynamic time warping; at most 10 phones of a kind compared at a time; the mean over neighbours, then speakers, then
pairs of kinds. Silence and noise are neighbours only. Needs two phones of one kind and one of another between the same neighbours:
minutes of speech of a speaker, not seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.errors import RecipeError

MOST_OF_A_KIND = 10
_NOT_SPEECH = ("SIL", "spn", "nsn", "noise")


def check_installed() -> None:
    """Raises RecipeError where fastabx is not there."""
    if find_spec("fastabx") is None:
        raise RecipeError(
            "ABX needs fastabx, which needs Python 3.12: pip install 'hubert-ray[abx]' there, or leave --abx out"
        )


def abx_error(
    features: Sequence[np.ndarray], phones: Sequence[list[dict] | None], speakers: Sequence[str], frame_rate_hz: int
) -> float | None:
    """The error rate within speakers and neighbours, from 0 to 1; None where no three phones can be compared.

    Utterance by utterance: features (F, D), phones with start and end in 16 kHz samples, and the speaker.
    """
    import polars  # comes with fastabx
    import torch
    from fastabx import Dataset, EmptyTaskError, InMemoryAccessor, Score, Subsampler, Task

    pieces, rows = [], []
    for frames_FD, spoken, speaker in zip(features, phones, speakers, strict=True):
        names = ["SIL", *(phone["phone"].rstrip("012") for phone in spoken or []), "SIL"]
        for place, phone in enumerate(spoken or [], start=1):
            piece = frames_FD[frames_between(phone["start"], phone["end"], frame_rate_hz)]
            if len(piece) and not is_noise(names[place]):
                pieces.append(piece)
                rows.append((names[place], names[place - 1], names[place + 1], speaker))
    if not rows:
        return None
    labels = polars.DataFrame(rows, schema=["phone", "before", "after", "speaker"], orient="row")
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    places = dict(enumerate(zip([0, *ends], ends, strict=False)))
    data = torch.from_numpy(np.concatenate(pieces))
    dataset = Dataset(
        labels, InMemoryAccessor(places, data, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    )
    try:
        task = Task(dataset, on="phone", by=["before", "after", "speaker"], subsampler=Subsampler(MOST_OF_A_KIND, None))
    except EmptyTaskError:
        return None
    return Score(task, "angular", progress=False).collapse(levels=[("before", "after"), "speaker"])


def frames_between(start: int, end: int, frame_rate_hz: int) -> slice:
    """The frames whose centres lie between two times in samples; fastabx's rule for its item files."""
    first, last = (time * frame_rate_hz / SAMPLE_RATE - 0.5 for time in (start, end))
    return slice(max(0, math.ceil(first)), max(0, math.floor(last) + 1))


def is_noise(phone: str) -> bool:
    return phone in _NOT_SPEECH or phone[:1] in ("+", "<", "[")
