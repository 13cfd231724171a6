"""Does the doctor see what is wrong, and call a healthy run healthy? A small corpus with labels, broken in one place each time."""

from __future__ import annotations

import io
import threading

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import soundfile
import torch

from hubert_ray import health
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Checks, Kmeans, Pretrain, Segments
from hubert_ray.config.sizes import BASE, LARGE, TINY, XLARGE
from hubert_ray.data.frames import mfcc_frames_of
from hubert_ray.data.shards import RawUtterance, write_shard
from hubert_ray.machine import NodeReport
from hubert_ray.model.hubert import Encoder
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.artifacts import Artifact, identity_of
from hubert_ray.storage.filesystem import Storage
from tests.corpora import write_corpus

CLUSTERS, UTTERANCES = 10, 30


def flac(seed: int, rate: int = 16_000) -> bytes:
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


class Run:
    """A corpus of two shards, its labels and its codebook, each sealed; `seal` makes them from what the attributes hold."""

    def __init__(self, folder):
        self.storage = Storage(str(folder))
        self.utterances = [
            RawUtterance(
                f"u{number:02}",
                f"s{number % 5 + 5 * (number >= 20)}",
                "dev" if number >= 20 else "train",
                "flac",
                flac(number),
            )
            for number in range(UTTERANCES)
        ]
        self.lost = 0
        self.corpus, self.labels, self.codebook = (
            Artifact(self.storage, path, identity_of(path, {}, {}))
            for path in ("corpora/small", "runs/r/iter1/assign_labels", "runs/r/iter1/learn_kmeans")
        )
        self.rows: list[dict] = []
        self.centroids = np.zeros((CLUSTERS, 39), dtype=np.float32)
        self.kmeans = Kmeans(clusters=CLUSTERS)
        self.fitted = 20 * 98

    def seal_corpus(self) -> None:
        lax = Checks(reject_duplicates=False)
        tables = {
            f"{split}-00000": write_shard(
                self.storage,
                self.corpus.path,
                f"{split}-00000",
                [u for u in self.utterances if u.split == split],
                checks=lax,
            ).manifest
            for split in ("train", "dev")
        }
        write_corpus(self.storage, self.corpus.path, tables)
        self.corpus.seal({"quarantined": self.lost, "lost": self.lost})
        rng = np.random.default_rng(0)
        self.rows = [
            {
                "utterance_id": row["utterance_id"],
                "labels": rng.integers(0, CLUSTERS, mfcc_frames_of(row["samples"])),
                "frame_rate_hz": 100,
            }
            for table in tables.values()
            for row in table.to_pylist()
        ]

    def seal_labels(self) -> None:
        self.write_labels()
        train = np.concatenate([row["labels"] for row in self.rows[:20]])
        self.measured([{"histogram": np.bincount(train, minlength=CLUSTERS).tolist()}])
        self.labels.seal({})

    def measured(self, streams: list[dict]) -> None:
        digests = {
            name: self.labels.storage.sha256(self.labels.file(layout.part(name)))
            for name in ("train-00000", "dev-00000")
        }
        self.labels.write_json(layout.QUALITY, {"streams": streams, "parts": digests})

    def write_labels(self) -> None:
        for shard, split in (("train-00000", range(20)), ("dev-00000", range(20, UTTERANCES))):
            names = {f"u{number:02}" for number in split}
            rows = [row for row in self.rows if row["utterance_id"] in names]
            table = pa.Table.from_pylist(rows, schema=schemas.LABELS)
            self.storage.write(self.labels.file(layout.part(shard)), schemas.encode(table))

    def seal_codebook(self) -> None:
        buffer = io.BytesIO()
        np.save(buffer, self.centroids)
        self.storage.write(self.codebook.file(layout.CENTROIDS), buffer.getvalue())
        self.codebook.seal({"frames": self.fitted})

    def findings(self) -> dict[str, health.Finding]:
        found = [
            *health.corpus_findings(self.corpus, read_audio=True),
            *health.label_findings(self.corpus, self.labels, 100, (CLUSTERS,), reread=True),
            *health.codebook_findings(self.corpus, self.codebook, 100, self.kmeans),
        ]
        return {finding.check: finding for finding in found}


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(tmp_path)
    run.seal_corpus()
    run.seal_labels()
    run.seal_codebook()
    return run


def not_ok(findings: dict[str, health.Finding]) -> dict[str, str]:
    return {name: finding.status for name, finding in findings.items() if finding.status != "ok"}


def test_a_healthy_run_is_healthy(run):
    findings = run.findings()
    assert len(findings) == 11
    assert not_ok(findings) == {}
    assert all(finding.prevents for finding in findings.values())


def change_utterance(run: Run, number: int, **changes) -> None:
    old = run.utterances[number]
    fields = {name: getattr(old, name) for name in ("utterance_id", "speaker", "split", "suffix", "audio")}
    run.utterances[number] = RawUtterance(**fields | changes)
    run.seal_corpus()
    run.seal_labels()


def test_a_speaker_of_train_in_dev(run):
    change_utterance(run, 25, speaker="s1")
    findings = run.findings()
    assert not_ok(findings) == {"corpus.speakers": "warning"}
    assert "s1" in findings["corpus.speakers"].found


def test_a_recording_that_occurs_twice(run):
    change_utterance(run, 25, audio=flac(3))
    findings = run.findings()
    assert not_ok(findings) == {"corpus.duplicates": "warning"}
    assert "u03 = u25" in findings["corpus.duplicates"].found


def test_telephone_speech(run):
    change_utterance(run, 4, audio=flac(4, rate=8000))
    assert not_ok(run.findings()) == {"corpus.sample_rate": "warning"}


def test_many_recordings_set_aside(run):
    run.corpus.seal({"quarantined": 4, "lost": 3})
    findings = run.findings()
    assert not_ok(findings) == {"corpus.quarantine": "warning"}
    assert "3 of 33" in findings["corpus.quarantine"].found


def talk(name: str, seed: int) -> RawUtterance:
    """A recording of three pieces, all of one length."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, 15 * 16_000)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 16_000, format="FLAC", subtype="PCM_16")
    return RawUtterance(name, "s", "train", "flac", buffer.getvalue(), speech=[(0, 3), (6, 9), (12, 15)])


def findings_of_talks(storage: Storage, talks: list[RawUtterance], lost: int = 0) -> dict[str, health.Finding]:
    corpus = Artifact(storage, "corpora/talks", identity_of("talks", {}, {}))
    lax, segments = Checks(reject_duplicates=False), Segments(max_seconds=10)
    tables = write_shard(storage, corpus.path, "train-00000", talks, checks=lax, segments=segments)
    assert tables.manifest.num_rows == 3 * len(talks)
    write_corpus(storage, corpus.path, {"train-00000": tables.manifest})
    corpus.seal({"quarantined": lost, "lost": lost})
    return {finding.check: finding for finding in health.corpus_findings(corpus, read_audio=True)}


def test_recordings_are_counted_and_not_their_pieces(tmp_path):
    findings = findings_of_talks(Storage(str(tmp_path)), [talk("a", 0), talk("b", 1)], lost=1)
    assert findings["corpus.quarantine"].status == "warning"
    assert "1 of 3 recordings" in findings["corpus.quarantine"].found


def test_pieces_of_one_recording_are_no_reason_to_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "MUCH_READING", 0)
    found = findings_of_talks(Storage(str(tmp_path)), [talk("a", 0), talk("b", 1)])["corpus.duplicates"].found
    assert found == "0 recordings occur more than once"


def test_long_recordings_that_occur_twice_are_read_as_far_as_bytes_allow(tmp_path, monkeypatch):
    talks = [talk("a", 0), talk("b", 0), talk("c", 1), talk("d", 1)]
    size = len(talks[0].audio)
    monkeypatch.setattr(health, "MUCH_READING", 2 * size)
    found = findings_of_talks(Storage(str(tmp_path)), talks)["corpus.duplicates"].found
    assert found.startswith("1 recordings occur more than once: a-00000000-00003000 = b-00000000-00003000")
    assert found.endswith("; 2 more of equal size and length were not compared")


def test_shards_are_looked_at_side_by_side(run):
    class Meeting(Storage):
        both = threading.Barrier(2)

        def open(self, path: str) -> pa.NativeFile:
            if path.endswith(".tar"):
                self.both.wait(timeout=5)
            return super().open(path)

    corpus = Artifact(Meeting(run.storage.url), run.corpus.path, run.corpus.identity)
    findings = {finding.check: finding for finding in health.corpus_findings(corpus, read_audio=False)}
    assert findings["corpus.shards"].status == "ok"


@pytest.mark.parametrize("kept", [0.0, 0.7])
def test_a_shard_that_was_cut_short_or_lost(run, kept):
    path = run.corpus.file(layout.audio_shard("train-00000"))
    data = run.storage.read(path)
    run.storage.delete(path) if kept == 0 else run.storage.write(path, data[: int(kept * len(data))])
    findings = run.findings()
    assert not_ok(findings) == {"corpus.shards": "failed"}
    assert "1 of 2 shards" in findings["corpus.shards"].found


@pytest.mark.parametrize("rows", [slice(0, -1), slice(5, None)])
def test_utterances_without_labels(run, rows):
    run.rows = run.rows[rows]
    run.write_labels()
    findings = run.findings()
    assert not_ok(findings) == {"iter1.labels.lengths": "failed"}
    assert "have no labels" in findings["iter1.labels.lengths"].found


def test_a_missing_part_of_the_labels(run):
    run.storage.delete(run.labels.file(layout.part("train-00000")))
    findings = run.findings()
    assert not_ok(findings) == {"iter1.labels.lengths": "failed"}
    assert "labels of shard train-00000 are missing" in findings["iter1.labels.lengths"].found
    quick = health.label_findings(run.corpus, run.labels, 100, (CLUSTERS,), reread=False)
    assert [(finding.check, finding.status) for finding in quick] == [("iter1.labels.clusters", "ok")]


def test_labels_one_frame_short(run):
    run.rows[7]["labels"] = run.rows[7]["labels"][:-1]
    run.write_labels()
    assert "'u07' has 97 labels" in run.findings()["iter1.labels.lengths"].found


def test_a_part_of_the_manifest_that_is_gone(run):
    run.storage.delete(f"{run.corpus.path}/{layout.manifest_part('dev-00000')}")
    found = {f.check: f for f in health.corpus_findings(run.corpus, read_audio=True)}["corpus.manifest"]
    assert (found.status, "1 of 2 parts" in found.found, "dev-00000" in found.found) == ("failed", True, True)


def test_a_codebook_that_was_replaced(run):
    assert health.files_finding("iter1/learn_kmeans", run.codebook).status == "ok"
    data = bytearray(run.codebook.read(layout.CENTROIDS))
    data[-3] ^= 1
    run.storage.write(run.codebook.file(layout.CENTROIDS), bytes(data))
    found = health.files_finding("iter1/learn_kmeans", run.codebook)
    assert (found.status, found.found.split(";")[0]) == (
        "failed",
        "1 of 1 files are gone or not those that were sealed: centroids.npy",
    )


def test_labels_at_another_rate(run):
    run.rows = [row | {"frame_rate_hz": 50} for row in run.rows]
    run.write_labels()
    assert "expected 100 Hz" in run.findings()["iter1.labels.lengths"].found


def test_labels_that_were_replaced(run):
    run.rows[3]["labels"] = np.roll(run.rows[3]["labels"], 1)  # as many of each as before
    run.write_labels()
    assert not_ok(run.findings()) == {"iter1.labels.unchanged": "failed"}
    assert (
        "1 of 2 label parts are not those that were written: train-00000"
        in run.findings()["iter1.labels.unchanged"].found
    )


def test_dead_and_dominant_clusters(run):
    for row in run.rows:
        row["labels"] = np.where(row["labels"] > 6, 0, row["labels"])
    run.seal_labels()
    findings = run.findings()
    assert not_ok(findings) == {"iter1.labels.clusters": "warning"}
    assert "3 of 10 clusters never occur" in findings["iter1.labels.clusters"].found


def test_a_label_beyond_the_codebook(run):
    run.rows[2]["labels"][5] = CLUSTERS + 2
    run.seal_labels()
    findings = run.findings()
    assert not_ok(findings) == {"iter1.labels.clusters": "failed"}
    assert "1 labels are no cluster" in findings["iter1.labels.clusters"].found


def test_several_streams_are_checked_each(run):
    """A second stream of 5 clusters beside the first, of which it takes the remainder; then three of its clusters die."""

    def findings() -> dict[str, health.Finding]:
        train = np.concatenate([row["labels"] for row in run.rows[:20]]).reshape(-1, 2)
        sizes = zip(train.T, (CLUSTERS, 5), strict=True)
        measured = [{"histogram": np.bincount(labels, minlength=size).tolist()} for labels, size in sizes]
        run.write_labels()
        run.measured(measured)
        found = health.label_findings(run.corpus, run.labels, 100, (CLUSTERS, 5), reread=True)
        return {finding.check: finding for finding in found}

    for row in run.rows:
        row["labels"] = np.stack([row["labels"], row["labels"] % 5], axis=1).ravel()
    assert not_ok(findings()) == {}
    for row in run.rows:
        row["labels"] = np.where(np.arange(len(row["labels"])) % 2, row["labels"] % 2, row["labels"])
    told = findings()
    assert not_ok(told) == {"iter1.labels.clusters": "warning"}
    assert "stream 1: 0 of 10 clusters never" in told["iter1.labels.clusters"].found
    assert "stream 2: 3 of 5 clusters never" in told["iter1.labels.clusters"].found
    run.kmeans = Kmeans(clusters=(CLUSTERS, 5))
    assert run.findings()["iter1.codebook.centroids"].status == "failed"
    run.centroids = np.zeros((CLUSTERS + 5, 39), dtype=np.float32)
    run.seal_codebook()
    assert run.findings()["iter1.codebook.centroids"].status == "ok"


@pytest.mark.parametrize(("share", "right"), [(1.0, 20), (0.5, 10), (0.01, 1)])
def test_a_codebook_that_saw_more_than_train(run, share, right):
    run.kmeans = Kmeans(clusters=CLUSTERS, sample_share=share)
    for utterances in (right, right + 1, right + 10):
        run.fitted = utterances * 98
        run.seal_codebook()
        finding = run.findings()["iter1.codebook.train_only"]
        assert finding.status == ("ok" if utterances == right else "failed")
        assert f"fitted on {98 * utterances} frames; the sample of the train split has {98 * right}" in finding.found


@pytest.mark.parametrize("spoil", [lambda c: c[:-1], lambda c: c + np.nan])
def test_broken_centroids(run, spoil):
    run.centroids = spoil(run.centroids)
    run.seal_codebook()
    assert not_ok(run.findings()) == {"iter1.codebook.centroids": "failed"}


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"text", lambda data: None]
)
def test_weights_that_are_not_whole(run, spoil):
    model = Artifact(run.storage, "runs/r/iter1/pretrain", identity_of("pretrain", {}, {}))
    model.write_json(layout.MODEL_CONFIG, {})
    data = safetensors.torch.save({"a": torch.zeros(3, 4), "b": torch.ones(5)})
    run.storage.write(model.file(layout.MODEL), data)
    assert health.weights_finding("iter1/pretrain", model).status == "ok"
    spoilt = spoil(data)
    run.storage.delete(model.file(layout.MODEL)) if spoilt is None else run.storage.write(
        model.file(layout.MODEL), spoilt
    )
    finding = health.weights_finding("iter1/pretrain", model)
    assert finding.status == "failed"
    assert "hubert-ray remove runs/r/iter1/pretrain" in finding.found


def test_what_an_artifact_was_made_from_is_missed(run):
    made = {run.labels.path: {"corpus": run.corpus, "codebook": run.codebook}}
    assert health.chain_finding(made).status == "ok"
    run.storage.delete(run.codebook.file(layout.SEAL))
    finding = health.chain_finding(made)
    assert finding.status == "warning"
    assert "runs/r/iter1/assign_labels was made from runs/r/iter1/learn_kmeans" in finding.found


def test_nodes_that_differ_or_do_not_reach_the_storage():
    good = NodeReport("a", {"torch": "2.11.0"}, None, None)
    assert {f.status for f in health.node_findings([good, good])} == {"ok"}
    bad = NodeReport("b", {"torch": "2.10.0"}, "no such bucket", None)
    storage, versions = health.node_findings([good, bad])
    assert (storage.status, versions.status) == ("failed", "failed")
    assert "b (no such bucket)" in storage.found
    assert "torch 2.10.0 and 2.11.0" in versions.found


@pytest.mark.parametrize(
    "size",
    [TINY, msgspec.structs.replace(TINY, conv_norm="layer", conv_bias=True), BASE],
    ids=["tiny", "layer", "base"],
)
def test_parameters_are_counted_right(size):
    assert health.encoder_parameters(size) == sum(p.numel() for p in Encoder(size).parameters())


def test_parameters_of_the_papers_sizes():
    head = {1024: 768 * 1024 + 768 + 504 * 768, 1280: 1024 * 1280 + 1024 + 504 * 1024}
    assert health.encoder_parameters(LARGE) + head[1024] == 316_609_408
    assert health.encoder_parameters(XLARGE) + head[1280] == 964_321_664


def test_memory_follows_the_model_the_precision_and_the_workers():
    def gib(size, gpu_gib=None, **cluster):
        settings = Pretrain(steps=1, peak_lr=1e-3, micro_batch_seconds=22.5)
        finding = health.memory_finding("iter1", size, settings, Cluster(**cluster), gpu_gib)
        return float(finding.found.split()[1]), finding.status

    one, many = (gib(XLARGE, train_workers=workers, precision="bf16")[0] for workers in (1, 64))
    assert one - many == pytest.approx(964e6 * 12 * 63 / 64 / 2**30, abs=0.2)
    assert gib(XLARGE, train_workers=64, zero_stage=0)[0] == gib(XLARGE, train_workers=1, zero_stage=0)[0]
    assert gib(LARGE)[0] < gib(XLARGE)[0]
    assert gib(LARGE, precision="bf16")[0] < gib(LARGE)[0]
    assert gib(XLARGE, recompute=True)[0] < gib(XLARGE)[0]
    assert gib(XLARGE, gpu_gib=one - 1, train_workers=1, precision="bf16")[1] == "warning"
    assert gib(XLARGE, gpu_gib=one + 1, train_workers=1, precision="bf16")[1] == "ok"
