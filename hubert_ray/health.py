"""Is a run in order? Checks of what lies on storage and of the machines, each of which names the trouble that it prevents.

A check reads sealed artifacts only and ends in a `Finding`; what is not made yet is not checked. `pipeline.run` makes those of
a stage when it has finished, `hubert-ray doctor` all of them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Kmeans, Pretrain
from hubert_ray.config.sizes import ModelSize
from hubert_ray.data.frames import CONV_KERNELS, SAMPLE_RATE, frames_at, frames_of
from hubert_ray.data.index import Index, Shard, repeated
from hubert_ray.data.labels import LabelStore
from hubert_ray.data.shards import AudioReader, Manifest, draw_share
from hubert_ray.errors import HubertRayError
from hubert_ray.machine import NodeReport
from hubert_ray.storage import layout
from hubert_ray.storage.artifacts import Artifact
from hubert_ray.storage.filesystem import Storage

Status = Literal["ok", "warning", "failed"]
MUCH_QUARANTINE = 0.05  # of the recordings
MUCH_UPSAMPLED = 0.01  # of the utterances
DOMINANT = 0.3  # share of the frames that one cluster may have
DEAD = 0.1  # share of the clusters that may never occur
MUCH_READING = 2 * 10**9  # bytes of recordings
READS_AT_ONCE = 32
EXAMPLES = 3  # named in a message


@dataclass(frozen=True)
class Finding:
    """What one check found. `prevents` is the symptom that would have shown much later."""

    check: str
    status: Status
    found: str
    prevents: str


def corpus_findings(artifact: Artifact, read_audio: bool) -> Iterator[Finding]:
    """Of a sealed corpus: its shards, splits and sample rates; with `read_audio` also its duplicates."""
    index = Index.open(artifact.storage, artifact.path)
    facts = artifact.require().facts
    again = f"; make it again after {artifact.remove_command()}"
    yield _shards(artifact.storage, artifact.path, index, again)
    if read_audio:
        yield _manifest(artifact.storage, artifact.path, index, again)
    yield _speakers(index.contents.shared_speakers)
    if read_audio:
        yield _duplicates(artifact.storage, artifact.path, index)
    low = index.contents.low_rate
    yield Finding(
        "corpus.sample_rate",
        "warning" if low > MUCH_UPSAMPLED * len(index) else "ok",
        f"{low} of {len(index)} utterances are stored below {SAMPLE_RATE} Hz",
        "clusters that tell telephone speech from wideband speech, not phones from each other",
    )
    bad = facts["lost"]
    total = bad + sum(
        int(index.begin_recordings(np.arange(rows.start, rows.stop)).sum()) for _, rows in index.by_shard()
    )
    yield Finding(
        "corpus.quarantine",
        "warning" if bad > MUCH_QUARANTINE * total else "ok",
        f"{bad} of {total} recordings were lost" + (f", see {layout.QUARANTINE}" if facts["quarantined"] else ""),
        "training on a part of the corpus without knowing it",
    )


def _shards(storage: Storage, path: str, index: Index, again: str) -> Finding:
    reader = AudioReader(storage, path)

    def is_broken(_: Shard, rows: slice) -> bool:
        end = int((index.numbers("offset")[rows] + index.numbers("size")[rows]).max())
        try:
            reader.read(index.shard_of(rows.start), end - 1, 1)
        except HubertRayError:
            return True
        return False

    broken = _shards_where(is_broken, index)
    return Finding(
        "corpus.shards",
        "failed" if broken else "ok",
        f"{len(broken)} of {len(index.shards)} shards are missing or cut short{_such_as(broken)}{again if broken else ''}",
        "a run that stops in the middle of an epoch",
    )


def _shards_where(is_broken: Callable[[Shard, slice], bool], index: Index) -> list[str]:
    """Names of the shards of which it is true; many are read at a time."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = pool.map(lambda place: is_broken(*place), index.by_shard())
        return [shard.name for shard, wrong in zip(index.shards, found, strict=True) if wrong]


def _manifest(storage: Storage, path: str, index: Index, again: str) -> Finding:
    def is_broken(shard: Shard, _: slice) -> bool:
        try:
            return len(Manifest.read(storage, path, [shard.name], ["utterance_id"])) != shard.utterances
        except (OSError, pa.ArrowException, HubertRayError):
            return True

    broken = _shards_where(is_broken, index)
    return Finding(
        "corpus.manifest",
        "failed" if broken else "ok",
        f"{len(broken)} of {len(index.shards)} parts of the manifest are missing or have other rows than the index"
        f"{_such_as(broken)}{again if broken else ''}",
        "labels and transcripts that are given to other utterances",
    )


def _speakers(shared: tuple[str, ...]) -> Finding:
    return Finding(
        "corpus.speakers",
        "warning" if shared else "ok",
        f"{len(shared)} speakers are in train and in dev or test{_such_as(list(shared))}",
        "error rates on voices that the model has been trained on",
    )


def _duplicates(storage: Storage, path: str, index: Index) -> Finding:
    """Recordings with the same bytes; only those of equal size and length (of their first piece) are read, and not too many."""
    sizes_N, samples_N = index.numbers("size"), index.numbers("samples")

    def keys_of(rows: slice) -> np.ndarray:
        """Of the rows that begin a recording; the others, which share its bytes, have negative ones that never repeat."""
        rows_M = np.arange(rows.start, rows.stop)
        keys_M = sizes_N[rows].astype(np.int64) << 31 ^ samples_N[rows]
        return np.where(index.begin_recordings(rows_M), keys_M, ~rows_M)

    candidates = repeated(keys_of, len(index))
    compared = candidates[np.cumsum(sizes_N[candidates], dtype=np.int64) <= MUCH_READING]
    reader = AudioReader(storage, path)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row in compared.tolist():
        try:
            audio = reader.read(index.shard_of(row), int(index.numbers("offset")[row]), int(sizes_N[row]))
        except HubertRayError:  # a shard that was cut short has a finding of its own
            continue
        groups[hashlib.sha256(audio).digest()].append(row)
    same = [rows for rows in groups.values() if len(rows) > 1]
    named = [" = ".join(index.id_of(storage, path, row) for row in rows) for rows in same[: EXAMPLES + 1]]
    return Finding(
        "corpus.duplicates",
        "warning" if same else "ok",
        f"{len(same)} recordings occur more than once{_such_as(named)}" + _unread(len(candidates) - len(compared)),
        "test speech in train, and speech that counts twice",
    )


def _unread(recordings: int) -> str:
    return f"; {recordings} more of equal size and length were not compared" if recordings > 0 else ""


def label_findings(
    corpus: Artifact, labels: Artifact, frame_rate_hz: int, classes: tuple[int, ...], reread: bool
) -> Iterator[Finding]:
    """Of sealed labels: how they are spread over each stream's clusters; with `reread` also whether each utterance has those of its
    frames, and whether they are those that were counted."""
    name = labels.path.split("/")[-2]
    quality = labels.read_json(layout.QUALITY)
    if not reread:
        yield _spread(name, [np.array(stream["histogram"]) for stream in quality["streams"]], classes)
        return
    index = Index.open(corpus.storage, corpus.path)
    try:
        store = LabelStore(corpus.storage, corpus.path, labels.path, index, frame_rate_hz, len(classes))
    except HubertRayError as error:
        store, said = None, f"{error}, after {labels.remove_command()}"
    yield Finding(
        f"{name}.labels.lengths",
        "ok" if store else "failed",
        f"every utterance has {len(classes) if len(classes) > 1 else 'one'} label{'s' if len(classes) > 1 else ''} per frame at "
        f"{frame_rate_hz} Hz"
        if store
        else said,
        "labels that slide against the audio: a loss that stays at the unigram entropy",
    )
    if store:
        histograms = store.histograms(index.rows_of("train"), classes)
        yield _spread(name, histograms, classes)
        parts = {shard: f"{labels.path}/{layout.part(shard)}" for shard in quality["parts"]}
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            found = dict(zip(parts, pool.map(labels.storage.sha256, parts.values()), strict=True))
        altered = [shard for shard, digest in quality["parts"].items() if found[shard] != digest]
        yield Finding(
            f"{name}.labels.unchanged",
            "failed" if altered else "ok",
            f"{len(altered)} of {len(parts)} label parts are not those that were written{_such_as(altered)}"
            + (f"; make them again after {labels.remove_command()}" if altered else ""),
            "training on labels that were replaced or mixed up since",
        )


def _spread(name: str, histograms: list[np.ndarray], classes: tuple[int, ...]) -> Finding:
    worst: Status = "ok"
    told = []
    for stream, (counts_K, clusters) in enumerate(zip(histograms, classes, strict=True), start=1):
        total, beyond = max(1, int(counts_K.sum())), int(counts_K[clusters:].sum())
        dead, share = int((counts_K[:clusters] == 0).sum()), float(counts_K.max() / total)
        if beyond:
            worst = "failed"
        elif worst == "ok" and (dead > DEAD * clusters or share > DOMINANT):
            worst = "warning"
        told.append(
            (f"stream {stream}: " if len(classes) > 1 else "")
            + f"{dead} of {clusters} clusters never occur in train, the commonest has {100 * share:.1f} % of the frames"
            + (f", {beyond} labels are no cluster of this codebook" if beyond else "")
        )
    return Finding(
        f"{name}.labels.clusters",
        worst,
        "; ".join(told),
        "a model that learns a constant; a head that is indexed out of its rows",
    )


def codebook_findings(corpus: Artifact, codebook: Artifact, frame_rate_hz: int, kmeans: Kmeans) -> Iterator[Finding]:
    """Of sealed centroids: their shape and values, and whether they were fitted on as many frames as the train sample has."""
    name = codebook.path.split("/")[-2]
    centroids_KD = np.load(pa.BufferReader(codebook.read(layout.CENTROIDS)), allow_pickle=False)
    fine = len(centroids_KD) == sum(kmeans.classes) and bool(np.isfinite(centroids_KD).all())
    yield Finding(
        f"{name}.codebook.centroids",
        "ok" if fine else "failed",
        f"{centroids_KD.shape} {centroids_KD.dtype}, {(~np.isfinite(centroids_KD)).sum()} numbers not finite; the recipe has "
        f"{' + '.join(map(str, kmeans.classes))} clusters",
        "labels beyond the model's classes, or all of one class",
    )
    expected = 0
    train = Index.open(corpus.storage, corpus.path).split("train")
    for shard, rows in train.by_shard():
        chosen_N = draw_share(shard.utterances, kmeans.sample_share, kmeans.seed, shard.name) + rows.start
        expected += int(frames_at(train.numbers("samples")[chosen_N], frame_rate_hz).sum())
    fitted = codebook.require().facts["frames"]
    yield Finding(
        f"{name}.codebook.train_only",
        "ok" if fitted == expected else "failed",
        f"fitted on {fitted} frames; the sample of the train split has {expected}",
        "clusters that have seen the dev and test speech which they are measured on",
    )


def files_finding(name: str, artifact: Artifact) -> Finding:
    """Whether the files of a sealed artifact are those that were sealed."""
    altered, all_files = artifact.altered(), artifact.require().files
    return Finding(
        f"{name}.files",
        "failed" if altered else "ok",
        f"{len(altered)} of {len(all_files)} files are gone or not those that were sealed{_such_as(altered)}"
        + (f"; make it again after {artifact.remove_command()}" if altered else ""),
        "units, labels and scores of something else than their names say",
    )


def weights_finding(name: str, model: Artifact) -> Finding:
    """Of a sealed model: whether its settings can be read, and its file of weights is as long as its header says."""
    said = "the weights are all there"
    try:
        model.read_json(layout.MODEL_CONFIG)
        with model.storage.open(model.file(layout.MODEL)) as file:
            header_bytes = int.from_bytes(file.read_at(8, 0), "little")
            header = msgspec.json.decode(file.read_at(header_bytes, 8))
            ends = [tensor["data_offsets"][1] for tensor in header.values() if "data_offsets" in tensor]
            whole = 8 + header_bytes + max(ends)
            if file.size() != whole:
                said = f"{layout.MODEL} has {file.size()} bytes, its header tells of {whole}"
    except (OSError, ValueError, msgspec.DecodeError) as error:
        said = f"cannot be read ({error})"
    fine = said == "the weights are all there"
    said += "" if fine else f"; make it again after {model.remove_command()}"
    return Finding(
        f"{name}.weights", "ok" if fine else "failed", said, "the next iteration that dies when it opens its teacher"
    )


def chain_finding(inputs: dict[str, dict[str, Artifact]]) -> Finding:
    """Whether what finished artifacts (path -> inputs) were made from is still there."""
    gone = [
        f"{path} was made from {artifact.path}"
        for path, artifacts in inputs.items()
        for artifact in artifacts.values()
        if not artifact.storage.exists(artifact.file(layout.SEAL))
    ]
    return Finding(
        "run.artifacts",
        "warning" if gone else "ok",
        f"{len(gone)} finished artifacts were made from others that are gone{_such_as(gone)}; remove them too"
        if gone
        else "every artifact belongs to this recipe and to its inputs",
        "results of one recipe under the name of another",
    )


def memory_finding(name: str, model: ModelSize, settings: Pretrain, cluster: Cluster, gpu_gib: float | None) -> Finding:
    """How much GPU memory a training worker will need: an estimate by arithmetic, not a measurement.

    Per parameter, bf16: 4 bytes of weight and gradient and 12 of master weight and moments; fp32: 8 and 8; the latter are shared
    out among workers from ZeRO 1 on. A block keeps about 34 bytes per frame and width in bf16 (Korthikanti et al. 2022, without
    attention weights, which flash attention never stores), twice that in fp32; where blocks are recomputed, all keep their input
    and one the rest. The conv stack keeps three tensors of each layer, the first 64 times as long as the frames.
    """
    half = cluster.precision == "bf16"
    frames = frames_of(int(settings.micro_batch_seconds * SAMPLE_RATE))
    kept, shared = (4, 12) if half else (8, 8)
    state = encoder_parameters(model) * (kept + shared / (cluster.train_workers if cluster.zero_stage else 1))
    block = frames * model.dim * (34 if half else 68)
    blocks = (
        model.layers * frames * model.dim * (2 if half else 4) + block if cluster.recompute else model.layers * block
    )
    conv = 3 * (2 if half else 4) * frames * model.conv_channels * (64 + 32 + 16 + 8 + 4 + 2 + 1)
    gib = (state + blocks + conv) / 2**30
    return Finding(
        f"{name}.gpu_memory",
        "warning" if gpu_gib is not None and gib > gpu_gib else "ok",
        f"about {gib:.1f} GiB per training worker in {cluster.precision}, {settings.micro_batch_seconds:g} s of audio at a time"
        + (f"; the smallest GPU has {gpu_gib:.0f} GiB" if gpu_gib else "; no GPU in sight"),
        "running out of memory in the first step; lower pretrain.micro_batch_seconds, or --cluster recompute=true, precision=bf16",
    )


def encoder_parameters(model: ModelSize) -> int:
    """How many numbers a body has (all but the head)."""
    dim, ffn_dim, channels = model.dim, model.ffn_dim, model.conv_channels
    conv = channels * (CONV_KERNELS[0] + channels * sum(CONV_KERNELS[1:]))
    norms = 2 * channels * (len(CONV_KERNELS) if model.conv_norm == "layer" else 1)
    biases = channels * (len(CONV_KERNELS) if model.conv_norm == "layer" else len(CONV_KERNELS) - 1) * model.conv_bias
    projection = 2 * channels + channels * dim + dim
    position = dim * (dim // model.position_groups) * model.position_kernel + model.position_kernel + dim
    block = 4 * (dim * dim + dim) + 2 * dim * ffn_dim + ffn_dim + dim + 4 * dim
    return conv + norms + biases + projection + dim + position + 2 * dim + model.layers * block


def node_findings(reports: list[NodeReport]) -> Iterator[Finding]:
    """Of the nodes of the cluster: whether each reaches the storage and has the same libraries."""
    unreachable = [f"{report.node} ({report.storage_error})" for report in reports if report.storage_error]
    yield Finding(
        "nodes.storage",
        "failed" if unreachable else "ok",
        f"{len(reports) - len(unreachable)} of {len(reports)} nodes can write to the storage and read back{_such_as(unreachable)}",
        "a stage that dies on some nodes only, hours into the run",
    )
    names = sorted({name for report in reports for name in report.versions})
    values = {name: sorted({report.versions.get(name, "absent") for report in reports}) for name in names}
    differing = [f"{name} {' and '.join(found)}" for name, found in values.items() if len(found) > 1]
    yield Finding(
        "nodes.versions",
        "failed" if differing else "ok",
        f"{len(differing)} libraries differ between {len(reports)} nodes{_such_as(differing)}",
        "errors in unpickling, and results that depend on the node",
    )


def _such_as(names: list[str]) -> str:
    if not names:
        return ""
    return ": " + ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")
