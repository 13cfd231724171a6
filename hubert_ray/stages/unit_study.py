"""How good are k-means units of which features, of how many clusters, fitted on how much audio, from which seed?

A *cell* is one such choice; its facts are pure functions of the corpus, the model and the cell. Cells of the same features form
a *part*: one worker extracts those features once, of as much train audio as the largest cell is fitted on and of the audio that
units are scored on, and fits and scores every cell on them. A finished cell is a file named by the hash of all that shapes it, so a
study that was interrupted, or is asked for more, makes what is missing. Where there are fewer features than workers, the cells of
a part are shared out over several.

Units are scored on aligned dev audio, on all aligned audio where dev has no phones, and without any phones, by labels alone, on dev
audio or else on train audio. `measure_layers` (a stage), `layers` and `stability` (commands) are made of this.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, groupby
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow.compute as pc

from hubert_ray.config.recipe import Kmeans, Layer, Mfcc
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.draw import draw
from hubert_ray.data.frames import SAMPLE_RATE, frames_at
from hubert_ray.data.index import Index, Shard
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.shard_map import shard_map
from hubert_ray.errors import RecipeError
from hubert_ray.stages.charts import Drawing, svg_file
from hubert_ray.stages.context import TeacherAt, Work, model_at
from hubert_ray.storage.artifacts import identity_of
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units import abx, kmeans
from hubert_ray.units.features import FeatureExtractor, in_groups
from hubert_ray.units.quality import PhoneCounts, Quality, predictability

FRAMES_PER_CLUSTER = 10  # at least: of so little audio, more clusters than that would only learn it by heart
COLOURS = ("c1", "c2", "c3", "c4", "c5", "grey")  # of the lines of a plot
POOL_SEED = 0  # which utterances a study looks at; the seeds of cells draw from these


@dataclass(frozen=True)
class Features:
    """What is clustered. `origin` is the fingerprint of the model, if there is one: cells of another model are other cells."""

    name: str
    teacher: TeacherAt
    origin: str
    dim: int

    @property
    def frame_rate_hz(self) -> int:
        return self.teacher.teacher.frame_rate_hz

    @property
    def identity(self) -> dict[str, Any]:
        teacher = self.teacher.teacher
        if isinstance(teacher, Layer):
            teacher = msgspec.structs.replace(teacher, of=self.origin)  # whatever name the model goes by here
        return {"teacher": msgspec.to_builtins(teacher), "untrained": self.teacher.untrained}


@dataclass(frozen=True)
class Cell:
    """One k-means fit: of `features`, on `seconds` of train audio drawn by `seed` from `pool_seconds`, also seeded by `seed`.

    Where the two are equal all seeds see the same audio.
    """

    features: Features
    clusters: int
    seconds: float
    pool_seconds: float
    seed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        return self.features.identity | {
            "clusters": self.clusters,
            "seconds": self.seconds,
            "pool_seconds": self.pool_seconds,
            "seed": self.seed,
        }


def mfcc_features(settings: Mfcc) -> Features:
    """MFCC, whose name tells what is not as usual: `MFCC splice=3 derivatives=[0]`."""
    usual = Mfcc()
    unlike = {
        field: value for field, value in msgspec.structs.asdict(settings).items() if value != getattr(usual, field)
    }
    name = " ".join(["MFCC", *(f"{field}={msgspec.json.encode(value).decode()}" for field, value in unlike.items())])
    teacher = TeacherAt(settings, None)
    return Features(name, teacher, "", teacher.open().dim)


def layer_features(work: Work, model: str, layer: int, untrained: bool = False) -> Features:
    """A layer of the model that is the input `model` of `work`. Raises RecipeError where it has no such layer."""
    artifact = work.inputs[model]
    size = model_at(artifact).card().size
    if layer > size.layers:
        raise RecipeError(f"layer {layer} of '{model}': it has layers 0 (input) to {size.layers}")
    teacher = TeacherAt(Layer(of=model, layer=layer), model_at(artifact), untrained)
    name = f"{model} layer {layer}" + (" untrained" if untrained else "")
    return Features(name, teacher, artifact.identity.fingerprint, size.dim)


class Facts(msgspec.Struct, frozen=True):
    """What a cell found."""

    clusters: int  # as many as asked for, or as the audio suffices for
    inertia: float  # mean squared distance of the frames fitted on
    frames: int  # fitted on
    quality: Quality | None  # of units against phones; None without phones
    predictability: float  # of the labels alone, units/quality.py


class _Pool:
    """Features of some utterances, one after the other in one array."""

    def __init__(self, manifest: Manifest, reader: AudioReader, extract: FeatureExtractor):
        self.samples_U = manifest.numbers("samples")
        self._ends_U = np.cumsum(frames_at(self.samples_U, extract.frame_rate_hz))
        self.frames_ND = np.empty((self._ends_U[-1], extract.dim), dtype=np.float32)
        utterances = UtteranceReader(reader, manifest, normalize=False)
        for row, frames_FD in enumerate(chain.from_iterable(in_groups(extract, utterances))):
            self[row][:] = frames_FD

    def __getitem__(self, row: int) -> np.ndarray:
        """A view of one utterance's frames."""
        return self.frames_ND[self._ends_U[row - 1] if row else 0 : self._ends_U[row]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self._ends_U)))

    def drawn(self, seconds: float, seed: int) -> np.ndarray:
        """Frames (N, D) of so many seconds of audio, drawn by seed."""
        return np.concatenate([self[row] for row in drawn(self.samples_U, seconds, seed)])


def drawn(samples_U: np.ndarray, seconds: float, seed: int) -> np.ndarray:
    """Rows of utterances, ascending, drawn by seed until they reach `seconds`; all rows where they do not."""
    order = np.random.default_rng(seed).permutation(len(samples_U))
    ends = np.cumsum(samples_U[order])
    return np.sort(order[: int(np.searchsorted(ends, seconds * SAMPLE_RATE)) + 1])


class _Measure:
    """Measures the cells of a part and writes each to its file. A part is named by its place in `parts`."""

    def __init__(self, storage: Storage, corpus: str, parts: Sequence[Sequence[tuple[Cell, str]]]):
        self._storage, self._parts = storage, parts
        self._reader = AudioReader(storage, corpus)
        self._audio = lru_cache(1)(partial(audio, storage, corpus))  # the parts of a study have the same

    def __call__(self, part: str) -> dict[str, Any]:
        cells = sorted(self._parts[int(part)], key=_audio_of)
        features, pool_seconds = cells[0][0].features, cells[0][0].pool_seconds
        extract = features.teacher.open()
        train, scored = self._audio(pool_seconds)
        pool, heard = (_Pool(manifest, self._reader, extract) for manifest in (train, scored))
        phones = scored.table["phones"].to_pylist()
        for (seconds, seed), same_audio in groupby(cells, _audio_of):
            frames_ND = pool.drawn(seconds, seed) if seconds < pool_seconds else pool.frames_ND
            for cell, file in same_audio:
                facts = _facts(cell, frames_ND, heard, phones, extract.frame_rate_hz)
                self._storage.write(file, msgspec.json.encode(facts))
        return {"features": features.name, "cells": len(cells)}


def _audio_of(named: tuple[Cell, str]) -> tuple[float, int]:
    return named[0].seconds, named[0].seed


def audio(storage: Storage, corpus: str, seconds: float) -> tuple[Manifest, Manifest]:
    """Utterances to fit on and utterances to score on, `seconds` of each, or all there are; in the order of their shards."""
    shards = Index.open(storage, corpus).shards
    scorable: tuple[Callable[[Shard], bool], ...] = (
        lambda shard: shard.aligned > 0 and shard.split == "dev",
        lambda shard: shard.aligned > 0,
        lambda shard: shard.split == "dev",
        _in_train,
    )
    scored = next(among for among in scorable if any(map(among, shards)))
    keep = _aligned if any(scored(shard) and shard.aligned for shard in shards) else _all
    train = draw(storage, corpus, _in_train, _all, seconds, POOL_SEED)
    heard = draw(storage, corpus, scored, keep, seconds, POOL_SEED)
    in_place = [(column, "ascending") for column in ("shard", "offset", "first")]
    return Manifest(train.table.sort_by(in_place)), Manifest(heard.table.sort_by(in_place))


def _in_train(shard: Shard) -> bool:
    return shard.split == "train"


def _all(rows: Manifest) -> Manifest:
    return rows


def _aligned(rows: Manifest) -> Manifest:
    return rows.where(pc.is_valid(rows.table["phones"]))


def _facts(cell: Cell, frames_ND: np.ndarray, heard: Iterable[np.ndarray], phones: list, frame_rate_hz: int) -> Facts:
    clusters = max(1, min(cell.clusters, len(frames_ND) // FRAMES_PER_CLUSTER))
    fit = kmeans.fit(frames_ND, clusters, Kmeans(clusters=cell.clusters, seed=cell.seed))
    labels = [kmeans.assign(frames_FD, fit.centroids_KD)[0] for frames_FD in heard]
    counts = PhoneCounts(clusters)
    for labels_F, spoken in zip(labels, phones, strict=True):
        if spoken is not None:
            counts.add(spoken, labels_F, frame_rate_hz)
    alone = predictability(labels, frame_rate_hz)
    return Facts(clusters, fit.inertia_history[-1], len(frames_ND), counts.quality(), alone)


def measure(work: Work, cells: Sequence[Cell]) -> dict[Cell, Facts]:
    """The facts of every cell; those that `work.output` has are read, the others are made, over Ray."""
    files, missing = _kept(work, "cells", {cell: cell.identity for cell in cells})
    parts = _parts(missing, work.cluster.data_workers)
    if parts:
        memory = f"a worker holds up to {max(_gib(part) for part in parts):.2f} GiB of features"
        print(f"{work.name}  {len(missing)} of {len(cells)} cells to measure; {memory}", flush=True)
    named = [[(cell, files[cell]) for cell in part] for part in parts]
    worker = partial(_Measure, work.storage, work.inputs["corpus"].path, named)
    for row in shard_map(worker, [str(number) for number in range(len(parts))], work.cluster):
        print(f"{work.name}  {row['features']}  {row['cells']} cells measured", flush=True)
    return {cell: msgspec.json.decode(work.storage.read(file), type=Facts) for cell, file in files.items()}


Key = TypeVar("Key", bound=Hashable)


def _kept(work: Work, folder: str, identities: Mapping[Key, dict[str, Any]]) -> tuple[dict[Key, str], list[Key]]:
    """(the file of each piece of a study, named by a hash of all that shapes it; those pieces that have none yet)."""
    corpus = work.inputs["corpus"]
    shaped_by = {"corpus": f"{corpus.identity.fingerprint}-{corpus.require().facts['content']}"}
    there = set(work.storage.list(work.output.file(folder)))
    names = {key: f"{identity_of(folder, what, shaped_by).fingerprint}.json" for key, what in identities.items()}
    missing = [key for key, name in names.items() if name not in there]
    return {key: work.output.file(f"{folder}/{name}") for key, name in names.items()}, missing


class _Abx:
    """Measures the ABX error of features and writes each to its file. Named by their place in the list."""

    def __init__(
        self, storage: Storage, corpus: str, features: Sequence[Features], files: Sequence[str], seconds: float
    ):
        self._storage, self._features, self._files = storage, features, files
        self._reader = AudioReader(storage, corpus)
        self._scored = audio(storage, corpus, seconds)[1]

    def __call__(self, place: str) -> dict[str, Any]:
        features, table = self._features[int(place)], self._scored.table
        extract = features.teacher.open()
        heard = list(_Pool(self._scored, self._reader, extract))
        speakers = table["speaker"].to_pylist()
        error = abx.abx_error(heard, table["phones"].to_pylist(), speakers, extract.frame_rate_hz)
        self._storage.write(self._files[int(place)], msgspec.json.encode(error))
        return {"features": features.name}


def measure_abx(work: Work, features: Sequence[Features], seconds: float) -> dict[Features, float | None]:
    """The ABX error of each, on the audio that units are scored on; None where no three phones can be compared."""
    abx.check_installed()
    files, missing = _kept(work, "abx", {f: f.identity | {"seconds": seconds} for f in features})
    worker = partial(_Abx, work.storage, work.inputs["corpus"].path, missing, [files[f] for f in missing], seconds)
    for row in shard_map(worker, [str(place) for place in range(len(missing))], work.cluster):
        print(f"{work.name}  {row['features']}  ABX measured", flush=True)
    return {f: msgspec.json.decode(work.storage.read(file), type=float | None) for f, file in files.items()}


def _parts(cells: Sequence[Cell], workers: int) -> list[list[Cell]]:
    """Cells of the same features together, or cut in as many parts as give every worker one."""
    by_features: dict[tuple[Features, float], list[Cell]] = {}
    for cell in cells:
        by_features.setdefault((cell.features, cell.pool_seconds), []).append(cell)
    cuts = max(1, workers // len(by_features)) if by_features else 1
    return [part for same in by_features.values() for start in range(cuts) if (part := same[start::cuts])]


def _gib(part: Sequence[Cell]) -> float:
    """Memory for the frames of a part: the pool, the largest draw from it, and as much again to score on."""
    features, pool = part[0].features, part[0].pool_seconds
    draws = max((cell.seconds for cell in part if cell.seconds < pool), default=0.0)
    return (2 * pool + draws) * features.frame_rate_hz * features.dim * 4 / 2**30


# --- what commands share ----------------------------------------------------------------------------------------------


def check_hours(work: Work, hours: float) -> None:
    """Raises RecipeError where the corpus has not that much train audio: a table must not say what nobody measured."""
    there = float(work.index().split("train").numbers("samples").sum(dtype=np.int64)) / SAMPLE_RATE / 3600
    if hours > there:
        raise RecipeError(
            f"{work.name}: {hours:g} hours of audio to fit on, but {work.inputs['corpus'].path} has {there:.2f} in train; "
            f"ask for less with --hours"
        )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of even width; text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    rule = "|".join(f"{'-' * (w + 2)}" if n == 0 else f"{'-' * (w + 1)}:" for n, w in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"


def write_study(work: Work, facts: Any, text: str, drawings: Sequence[Drawing | None]) -> None:
    """Leaves the findings in the study's folder as `<name>.json`, `.md` and `.svg`, and prints the text and where they are."""
    work.output.write_json(f"{work.name}.json", facts)
    for suffix, content in (("md", text), ("svg", svg_file(drawings))):
        work.storage.write(work.output.file(f"{work.name}.{suffix}"), content.encode())
    print(f"\n{text}")
    for suffix in ("json", "md", "svg"):
        print(work.storage.full(work.output.file(f"{work.name}.{suffix}")))
