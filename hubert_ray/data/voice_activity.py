"""Where in a recording does somebody speak? Silero's detector (extra `vad`; MIT licence, its model ships in the wheel).

It gives a probability per 32 ms and remembers what it has heard, so a recording goes through it once, in order, block by block;
kept are the probabilities, 4 bytes each: 4.5 MB for ten hours. The library itself turns them into regions.
"""

from __future__ import annotations

import numpy as np
import torch

from hubert_ray.data.frames import SAMPLE_RATE
from hubert_ray.errors import CorpusError

_CHUNK = 512  # samples that the detector hears at a time


class VoiceActivity:
    """A detector for one recording after another. Raises CorpusError where the library is not installed."""

    def __init__(self) -> None:
        try:
            import silero_vad
        except ImportError as error:
            raise CorpusError(
                "corpus.segments needs voice activity to cut at, and the detector is not installed: pip install "
                "'hubert-ray[vad]', or give recordings with Libri-light's JSON files, whose `voice_activity` is used instead"
            ) from error
        # The import has set torch to one thread in this process: right for chunks this small, and the same sums everywhere.
        self._model = silero_vad.load_silero_vad()
        self._regions = silero_vad.get_speech_timestamps_from_probs
        self.begin()

    def begin(self) -> None:
        """Forgets the recording heard so far."""
        self._model.reset_states()
        self._heard: list[np.ndarray] = []
        self._samples = 0

    @torch.inference_mode()
    def hear(self, wave_S: np.ndarray) -> None:
        """The next block of the recording at 16 kHz; all but the last are a multiple of 512 samples long."""
        self._samples += len(wave_S)
        padded_S = torch.from_numpy(np.pad(wave_S, (0, -len(wave_S) % _CHUNK)))
        chances = [self._model(chunk_S, SAMPLE_RATE).item() for chunk_S in padded_S.split(_CHUNK)]
        self._heard.append(np.array(chances, dtype=np.float32))

    def regions(self) -> np.ndarray:
        """Speech heard since `begin`, (R, 2) [start, end) in samples at 16 kHz, ascending.

        The library's own defaults: a probability of 0.5 begins speech, 100 ms below 0.35 end it, what lasts less than 250 ms is
        none, and 30 ms are added at each side.
        """
        chances_N = np.concatenate([*self._heard, np.empty(0, np.float32)])
        found = self._regions(chances_N, SAMPLE_RATE, audio_length_samples=self._samples)
        return np.array([(region["start"], region["end"]) for region in found], dtype=np.int64).reshape(-1, 2)
