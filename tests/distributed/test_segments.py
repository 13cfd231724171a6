"""A corpus of long recordings through every stage up to training: cut by index, labelled and trained on as utterances."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from hubert_ray import health, pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.config.recipe import EmbeddedCorpus
from hubert_ray.data import synthetic
from hubert_ray.data.collate import UtteranceReader
from hubert_ray.data.frames import SAMPLE_RATE, mfcc_frames_of
from hubert_ray.data.index import Index
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.cluster import connected
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage
from tests.conftest import SMOKE
from tests.corpora import whole_manifest

pytestmark = pytest.mark.slow
pytest.importorskip("silero_vad")
PAUSE = np.zeros(SAMPLE_RATE * 3 // 5, dtype=np.int16)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """`<split>/<speaker>/talk.flac`: the sentences of a speaker one after another, with pauses of 0.6 s between them."""
    folder = tmp_path_factory.mktemp("tree")
    corpus = EmbeddedCorpus(train_speakers=2, dev_speakers=1, test_speakers=0, utterances_per_speaker=12)
    for speaker in synthetic.speakers(corpus):
        waves = [soundfile.read(io.BytesIO(u.flac), dtype="int16")[0] for u in synthetic.synthesise(speaker, corpus)]
        place = folder / speaker.split / speaker.id
        place.mkdir(parents=True)
        talk = np.concatenate([part for wave in waves for part in (wave, PAUSE)])
        soundfile.write(place / "talk.flac", talk, SAMPLE_RATE)
        (place / "talk.txt").write_text("TOO LONG TO BE CUT")
    return folder


def run(tree, storage, stage, **cluster):
    recipe = load_recipe(
        str(SMOKE),
        [
            f'corpus={{kind="folder", name="talks", path="{tree}", shard_mib=1, segments={{max_seconds=8.0}}}}',
            "finetune=null", "decode=null", "iterations.iter1.kmeans.max_iterations=3", "iterations.iter1.pretrain.steps=3",
        ],
    )  # fmt: skip
    settings = Cluster(**cluster)
    for step, seal, _ in pipeline.run(recipe, storage, settings, connected(settings), stage):
        last = step.artifact, seal
    return last


def test_long_recordings_from_folder_to_model(ray_local, tree, tmp_path):
    storage = Storage(str(tmp_path / "one"))
    corpus, _ = run(tree, storage, "prepare_data", data_workers=1)
    manifest = whole_manifest(storage, corpus.path)
    talks = {path.parent.name: path.read_bytes() for path in tree.rglob("*.flac")}
    assert Index.open(storage, corpus.path).begin_recordings(np.arange(len(manifest))).sum() == len(talks) == 3
    assert len(manifest) > 8
    assert (manifest.numbers("samples") <= 8 * SAMPLE_RATE).all()
    assert manifest.table["text"].null_count == len(manifest)
    reader, audio = (
        AudioReader(storage, corpus.path),
        UtteranceReader(AudioReader(storage, corpus.path), manifest, False),
    )
    spoken = 0
    for row, fields in enumerate(manifest.table.to_pylist()):
        assert reader.read(fields["shard"], fields["offset"], fields["size"]) == talks[fields["speaker"]]
        whole_S = soundfile.read(io.BytesIO(talks[fields["speaker"]]), dtype="float32")[0]
        assert np.array_equal(audio.wave(row), whole_S[fields["first"] :][: fields["stored_samples"]])
        # It begins and ends in a pause or, where a sentence is longer than a piece, anywhere; nothing long is silent.
        assert 0.5 < fields["speech_share"] <= 1
        spoken += int((audio.wave(row) != 0).sum())
    everything = sum(int((soundfile.read(io.BytesIO(data))[0] != 0).sum()) for data in talks.values())
    assert spoken > 0.9 * everything

    again = Storage(str(tmp_path / "three"))
    run(tree, again, "prepare_data", data_workers=3, data_cpus=0.5)
    for name in storage.list(corpus.path, recursive=True):
        if name.endswith((".parquet", ".tar")):
            assert again.read(f"{corpus.path}/{name}") == storage.read(f"{corpus.path}/{name}"), name

    run(tree, storage, "iter1/learn_kmeans")
    labels, _ = run(tree, storage, "iter1/assign_labels")
    for shard in manifest.shards():
        part = schemas.decode(labels.read(layout.part(shard)))
        rows = Manifest.read_shard(storage, corpus.path, shard)
        assert part["utterance_id"].to_pylist() == rows.table["utterance_id"].to_pylist()
        assert list(map(len, part["labels"].to_pylist())) == [
            mfcc_frames_of(n) for n in rows.numbers("samples").tolist()
        ]
    model, trained = run(tree, storage, "iter1/pretrain")
    assert np.isfinite(trained.facts["loss_bits_last"])
    assert storage.exists(model.file(layout.MODEL))
    findings = {finding.check: finding for finding in health.corpus_findings(corpus, read_audio=True)}
    assert {name for name, finding in findings.items() if finding.status != "ok"} == set(), findings
