"""learn_kmeans and assign_labels on real audio: the number of workers, a lost one and a second start change no byte."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from hubert_ray import cli, pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.config.sizes import TINY
from hubert_ray.data.frames import mfcc_frames_of
from hubert_ray.data.index import Index
from hubert_ray.data.shards import AudioReader, Manifest
from hubert_ray.distributed.cluster import connected
from hubert_ray.errors import RecipeError, StaleArtifactError, UnsealedArtifactError
from hubert_ray.formats.checkpoint import Checkpoint
from hubert_ray.model.hubert import Encoder
from hubert_ray.speech_model import SpeechModel
from hubert_ray.storage import layout, schemas
from hubert_ray.unit_bundle import load_units
from hubert_ray.units import kmeans
from hubert_ray.units.features import LayerExtractor, MfccExtractor
from tests.conftest import SMOKE
from tests.corpora import whole_manifest

pytestmark = pytest.mark.slow


def recipe_of(name, *overrides):
    return load_recipe(str(SMOKE), [f"name={name}", "iterations.iter1.kmeans.max_iterations=6", *overrides])


def run(storage, name, stage, *overrides, **cluster):
    settings = Cluster(**cluster)
    recipe = recipe_of(name, *overrides)
    for step, seal, _ in pipeline.run(recipe, storage, settings, connected(settings), f"iter1/{stage}"):
        return step.artifact, seal


@pytest.fixture(scope="module")
def reference(corpus):
    storage, _ = corpus
    codebook, _ = run(storage, "one", "learn_kmeans", kmeans_workers=1, data_workers=1)
    labels, seal = run(storage, "one", "assign_labels", data_workers=1)
    return codebook.read(layout.CENTROIDS), labels, seal


def test_labels_fit_the_audio_and_are_good(corpus, reference):
    storage, path = corpus
    _, labels, seal = reference
    index = Index.open(storage, path)
    found = 0
    for shard in index.shards:
        part = schemas.decode(labels.read(layout.part(shard.name)))
        rows = Manifest.read_shard(storage, path, shard.name)
        assert part["utterance_id"].to_pylist() == rows.table["utterance_id"].to_pylist()
        counts = pc.list_value_length(part["labels"]).to_pylist()
        assert counts == [mfcc_frames_of(int(samples)) for samples in rows.numbers("samples")]
        assert pc.unique(part["frame_rate_hz"]).to_pylist() == [100]
        found += part.num_rows
    assert found == len(index)
    assert seal.facts["quality"]["pnmi"] > 0.3  # twenty clusters of MFCC on clean synthetic speech
    assert 0.5 < seal.facts["unigram_entropy_bits"] <= np.log2(20)


def test_more_workers_give_the_same_bytes(corpus, reference):
    storage, _ = corpus
    codebook, _ = run(storage, "many", "learn_kmeans", kmeans_workers=3, data_workers=3, data_cpus=0.5)
    assert codebook.read(layout.CENTROIDS) == reference[0]
    labels, _ = run(storage, "many", "assign_labels", data_workers=3, data_cpus=0.5)
    for part in storage.list(f"{labels.path}/parts"):
        assert storage.read(f"{labels.path}/parts/{part}") == storage.read(f"{reference[1].path}/parts/{part}")


def test_codebook_is_fitted_on_every_train_frame_and_no_other(corpus, reference):
    storage, path = corpus
    shards = [shard.name for shard in Index.open(storage, path).split("train").shards]
    train = Manifest.read(storage, path, shards)
    expected = sum(mfcc_frames_of(int(samples)) for samples in train.numbers("samples"))
    assert msgspec.json.decode(storage.read("runs/one/iter1/learn_kmeans/history.json"))["frames"] == expected
    assert reference[2].facts["train_frames"] == expected
    centroids = np.load(io.BytesIO(reference[0]))
    reader, extract = AudioReader(storage, path), MfccExtractor()
    rows = train.table.select(["shard", "offset", "size"]).to_pylist()
    frames = np.concatenate(extract([reader.wave(**row) for row in rows]))
    recorded = storage.read("runs/one/iter1/learn_kmeans/history.json")
    inertia = kmeans.partial(frames, centroids).inertia / len(frames)
    assert inertia == pytest.approx(msgspec.json.decode(recorded)["streams"][0]["inertia_history"][-1], rel=1e-5)


def test_finished_parts_are_not_made_again(corpus, reference, monkeypatch):
    """Unsealed labels with one part missing: only that part is written."""
    storage, _ = corpus
    run(storage, "again", "learn_kmeans")
    labels, _ = run(storage, "again", "assign_labels")
    parts = storage.list(f"{labels.path}/parts")
    lost, kept = parts[0], parts[1:]
    before = {
        name: storage.filesystem.get_file_info(storage.full(f"{labels.path}/parts/{name}")).mtime_ns for name in kept
    }
    expected = storage.read(f"{labels.path}/parts/{lost}")
    storage.delete(labels.file(layout.SEAL))
    storage.delete(f"{labels.path}/parts/{lost}")
    run(storage, "again", "assign_labels")
    after = {
        name: storage.filesystem.get_file_info(storage.full(f"{labels.path}/parts/{name}")).mtime_ns for name in kept
    }
    assert after == before
    assert storage.read(f"{labels.path}/parts/{lost}") == expected


# --- bundles and features ---------------------------------------------------------------------------------------------

TAUGHT = 'iterations.iter1.teacher={kind="layer", of="public/taught", layer=2}'


@pytest.fixture(scope="module")
def teacher(corpus):
    """A small model of random weights, imported."""
    size = msgspec.structs.replace(TINY, conv_channels=16, layers=3, dim=32, ffn_dim=64, heads=2, position_kernel=16)
    torch.manual_seed(0)
    model = SpeechModel(Checkpoint(size, Encoder(size).state_dict()))
    model.store(corpus[0], "public/taught")
    return model


def waves(storage, path):
    """Every utterance of the corpus: (id, shard, waveform)."""
    reader = AudioReader(storage, path)
    for row in whole_manifest(storage, path).table.to_pylist():
        yield row["utterance_id"], row["shard"], reader.wave(row["shard"], row["offset"], row["size"])


@pytest.mark.parametrize("overrides", [(), (TAUGHT,)], ids=["mfcc", "layer"])
def test_units_of_a_bundle_are_the_labels(corpus, teacher, tmp_path, overrides):
    storage, path = corpus
    name = f"bundled{len(overrides)}"
    run(storage, name, "learn_kmeans", *overrides)
    labels, _ = run(storage, name, "assign_labels", *overrides, data_workers=2, data_cpus=0.5)
    recipe = tmp_path / "recipe.json"
    recipe.write_bytes(msgspec.json.encode(recipe_of(name, *overrides)))
    folder = str(tmp_path / "bundle")
    assert cli.main(["bundle", "--recipe", str(recipe), "--storage", storage.url, "--of", "iter1", folder]) == 0
    bundle = load_units(folder)
    written = {
        row["utterance_id"]: row["labels"]
        for shard in whole_manifest(storage, path).shards()
        for row in schemas.decode(labels.read(layout.part(shard))).to_pylist()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray's workers have: sums are rounded alike
    found = {name: bundle.units(wave_S).tolist() for name, _, wave_S in waves(storage, path)}
    torch.set_num_threads(threads)
    assert found == written
    assert len({unit for units in found.values() for unit in units}) > 10


def extract(storage, *arguments, **cluster):
    recipe = recipe_of("extracted")
    settings = Cluster(**cluster)
    return pipeline.extract_features(recipe, storage, settings, connected(settings), *arguments)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["mfcc", "layer"])
def test_extracted_features_are_the_teachers(corpus, teacher, tmp_path, kind, dtype, capsys):
    storage, path = corpus
    model = "mfcc" if kind == "mfcc" else str(teacher.save("fairseq", tmp_path / "model")[0])
    layer, extractor = (None, MfccExtractor()) if kind == "mfcc" else (2, LayerExtractor(teacher.encoder, 2))
    step, seal, skipped = extract(storage, f"{kind}-{dtype}", model, layer, dtype, data_workers=2, data_cpus=0.5)
    assert not skipped
    said = capsys.readouterr().out.splitlines()[0]
    read, size = {}, 0
    for shard in whole_manifest(storage, path).shards():
        table = pa.ipc.open_file(storage.read(step.artifact.file(layout.feature_part(shard)))).read_all()
        assert pc.unique(table["frame_rate_hz"]).to_pylist() == [extractor.frame_rate_hz]
        for name, features in zip(table["utterance_id"].to_pylist(), table["features"], strict=True):
            flat_N = features.values.flatten().to_numpy()
            read[name] = flat_N.reshape(-1, extractor.dim)
            size += flat_N.nbytes
    assert f"{size:,} bytes" in said
    assert seal.facts["bytes"] == size
    for name, _, wave_S in waves(storage, path):
        assert read[name].dtype == np.dtype(dtype)
        assert np.array_equal(read.pop(name), extractor([wave_S])[0].astype(dtype))
    assert not read
    assert extract(storage, f"{kind}-{dtype}", model, layer, dtype)[2]  # done before


def test_extraction_goes_on_and_refuses(corpus, teacher, tmp_path):
    storage, _ = corpus
    native = teacher.save("hubert_ray", tmp_path / "native")[0].parent
    step, _, _ = extract(storage, "again", str(native), 1, "float16")
    parts = storage.list(step.artifact.file("parts"))
    expected = storage.read(step.artifact.file(f"parts/{parts[0]}"))
    storage.write(step.artifact.file(f"parts/{parts[1]}"), b"kept as it is")
    storage.delete(step.artifact.file(f"parts/{parts[0]}"))
    storage.delete(step.artifact.file(layout.SEAL))
    teacher.save("hugging_face", tmp_path / "elsewhere")
    extract(storage, "again", str(tmp_path / "elsewhere"), 1, "float16")  # the same weights in another file
    assert storage.read(step.artifact.file(f"parts/{parts[0]}")) == expected
    assert storage.read(step.artifact.file(f"parts/{parts[1]}")) == b"kept as it is"
    with pytest.raises(StaleArtifactError, match="layer: 1 on storage, 2"):
        extract(storage, "again", str(native), 2, "float16")
    for model, layer in ((str(native), 4), (str(native), None), ("mfcc", 1)):
        with pytest.raises(RecipeError, match="--layer"):
            extract(storage, "wrong", model, layer, "float16")
    with pytest.raises(UnsealedArtifactError):
        recipe = load_recipe(str(SMOKE), ["corpus.name=not-made"])
        pipeline.extract_features(recipe, storage, Cluster(), connected(Cluster()), "x", "mfcc", None, "float16")
