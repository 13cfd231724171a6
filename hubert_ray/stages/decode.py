"""recognisers + an n-gram model of the training text -> hypotheses and word error rates.

The language model's weights are chosen on dev, for each recogniser by itself; test is decoded once, with those. Whole
utterances, a shard at a time on Ray Data; a result does not depend on what it was batched with.
HuBERT (Hsu et al. 2021) IV-D.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from hubert_ray.asr import ngram, wer
from hubert_ray.asr.decoder import BeamDecoder, greedy
from hubert_ray.asr.ngram import NgramLM
from hubert_ray.asr.transcripts import spellable, spelled_texts, transcribed_shards
from hubert_ray.asr.wer import ErrorRate
from hubert_ray.config.recipe import Decode
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.stages.context import ModelAt, Work, model_at
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage

LM_FILE = "lm.arpa"
SCORES = "scores.json"
BATCH = 16
Weights = tuple[float, float]  # language model weight, word score


@dataclass(frozen=True)
class _Heard:
    """One utterance as a recogniser heard it."""

    utterance_id: str
    reference: str
    log_probs_TV: torch.Tensor


class _Recogniser:
    """Opens the models once per worker and gives log-probabilities of a shard's transcribed utterances."""

    def __init__(self, storage: Storage, corpus: str, lm_path: str, systems: dict[str, ModelAt], settings: Decode):
        self._storage, self._corpus = storage, corpus
        self._reader = AudioReader(storage, corpus)
        self._models = {name: (model.ctc(), model.card().size.normalize_waveform) for name, model in systems.items()}
        lm = NgramLM.from_arpa(storage.read(lm_path).decode().splitlines())
        self._decoder = BeamDecoder(lm.words, lm, settings)

    @torch.inference_mode()
    def _hear(self, shard: str, system: str) -> Iterator[_Heard]:
        network, normalize = self._models[system]
        manifest, references = spellable(Manifest.read_shard(self._storage, self._corpus, shard))
        utterances = UtteranceReader(self._reader, manifest, normalize)
        ids = manifest.table["utterance_id"].to_pylist()
        for first in range(0, len(ids), BATCH):
            rows = list(range(first, min(first + BATCH, len(ids))))
            audio = utterances.padded(rows)
            log_probs_BTV, frames_B = network(audio.wave_BS.to(network.head.weight.device), audio.samples_B)
            log_probs_BTV = log_probs_BTV.cpu()
            for k, row in enumerate(rows):
                yield _Heard(ids[row], references[row], log_probs_BTV[k, : frames_B[k]].contiguous())


class _Tuner(_Recogniser):
    """Word errors of a dev shard for every pair of weights."""

    def __init__(self, *args: Any, grid: list[Weights]):
        super().__init__(*args)
        self._grid = grid

    def __call__(self, shard: str) -> dict[str, Any]:
        errors = {name: [ErrorRate()] * len(self._grid) for name in self._models}
        for name in self._models:
            for heard in self._hear(shard, name):
                for k, weights in enumerate(self._grid):
                    text = self._decoder.decode(heard.log_probs_TV, *weights)
                    errors[name][k] = errors[name][k] + wer.word_errors(heard.reference, text)
        return {"errors": {name: [rate.errors for rate in rates] for name, rates in errors.items()}}


class _Tester(_Recogniser):
    """Hypotheses of a test shard, greedy and with the language model, as a part file."""

    def __init__(self, *args: Any, weights: dict[str, Weights], folder: str):
        super().__init__(*args)
        self._weights, self._folder = weights, folder

    def __call__(self, shard: str) -> dict[str, Any]:
        rows = [
            {
                "utterance_id": heard.utterance_id,
                "reference": heard.reference,
                "system": name,
                "greedy": greedy(heard.log_probs_TV),
                "lm": self._decoder.decode(heard.log_probs_TV, *self._weights[name]),
            }
            for name in self._models
            for heard in self._hear(shard, name)
        ]
        table = pa.Table.from_pylist(rows, schema=schemas.HYPOTHESES)
        self._storage.write(f"{self._folder}/{layout.part(shard)}", schemas.encode(table))
        return {"utterances": len(rows) // len(self._models)}


def decode(work: Work, settings: Decode) -> dict[str, Any]:
    """Writes `lm.arpa`, a hypotheses part per test shard, and `scores.json`."""
    corpus = work.inputs["corpus"].path
    lm = ngram.estimate(spelled_texts(work.storage, corpus, "train"), settings.ngram_order)
    work.storage.write(work.output.file(LM_FILE), "".join(lm.arpa_lines()).encode())
    systems = {name: model_at(artifact) for name, artifact in work.inputs.items() if name != "corpus"}
    shared = (work.storage, corpus, work.output.file(LM_FILE), systems, settings)
    dev, shards = (transcribed_shards(work.storage, corpus, split) for split in ("dev", "test"))
    weights = _tune(work, dev, shared, settings)
    missing = [s for s in shards if not work.storage.exists(work.output.file(layout.part(s)))]
    for row in shard_map(partial(_Tester, *shared, weights=weights, folder=work.output.path), missing, work.cluster):
        print(f"{work.name}  {row['shard']}  {row['utterances']} utterances", flush=True)
    scores = _score(work, shards, systems)
    scores |= {
        "lm_weight": {name: pair[0] for name, pair in weights.items()},
        "word_score": {name: pair[1] for name, pair in weights.items()},
        "ngram_order": settings.ngram_order,
        "lm_perplexity_dev": lm.perplexity(spelled_texts(work.storage, corpus, "dev")),
    }
    work.output.write_json(SCORES, scores)
    for name in systems:
        print(
            f"{work.name}  {name}: WER greedy {scores['wer']['greedy'][name]:.3f}, with LM {scores['wer']['lm'][name]:.3f}"
        )
    return {"wer": scores["wer"], "cer": scores["cer"]}


def _tune(work: Work, shards: list[str], shared: tuple, settings: Decode) -> dict[str, Weights]:
    """The weights with the fewest dev errors; of equals, the first of the grid."""
    grid = list(itertools.product(settings.lm_weights, settings.word_scores))
    systems = list(shared[3])
    errors = {name: [0] * len(grid) for name in systems}
    for row in shard_map(partial(_Tuner, *shared, grid=grid), shards, work.cluster):
        for name, rates in row["errors"].items():
            errors[name] = [total + count for total, count in zip(errors[name], rates, strict=True)]
    return {name: grid[min(range(len(grid)), key=errors[name].__getitem__)] for name in systems}


def _score(work: Work, shards: list[str], systems: dict[str, ModelAt]) -> dict[str, Any]:
    """Word and character error rates over all test shards."""
    modes = ("greedy", "lm")
    words = {(mode, name): ErrorRate() for mode in modes for name in systems}
    characters = dict(words)
    for shard in shards:
        for row in schemas.decode(work.output.read(layout.part(shard))).to_pylist():
            for mode in modes:
                key = (mode, row["system"])
                words[key] = words[key] + wer.word_errors(row["reference"], row[mode])
                characters[key] = characters[key] + wer.character_errors(row["reference"], row[mode])
    return {
        "wer": {mode: {name: words[mode, name].rate for name in systems} for mode in modes},
        "cer": {mode: {name: characters[mode, name].rate for name in systems} for mode in modes},
        "test_words": words["greedy", next(iter(systems))].reference_units,
    }
