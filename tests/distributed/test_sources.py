"""Does every source read the same from a folder and from an object store, even one that stumbles? And what does prepare_data make
of tars in place, and of what occurs twice?"""

from __future__ import annotations

import csv
import io
import json
import tarfile

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from hubert_ray import pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.config.recipe import AudioFolder, AudioTable, Checks, Corpus, LibriSpeech, Parquet, WebDataset
from hubert_ray.data.corpora import open_source, plan_shards
from hubert_ray.data.shards import AudioReader, RawUtterance
from hubert_ray.distributed.cluster import connected
from hubert_ray.errors import CorpusError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.artifacts import Artifact
from hubert_ray.storage.filesystem import Storage
from tests.conftest import SMOKE
from tests.corpora import whole_manifest
from tests.distributed.conftest import Faults, s3_server

pytestmark = pytest.mark.slow

SPEAKERS = ("anna", "ben", "cleo")


def recording(seed: int) -> bytes:
    buffer = io.BytesIO()
    wave = 0.1 * np.random.default_rng(seed).standard_normal(8000 + seed)
    soundfile.write(buffer, wave, 16_000, format="FLAC")
    return buffer.getvalue()


def tar_of(keys: dict[str, int], speaker: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, seed in keys.items():
            told = json.dumps({"speaker": speaker, "text": f"TEXT {seed}"}).encode()
            for name, data in ((f"{key}.flac", recording(seed)), (f"{key}.json", told)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def speech(storage: Storage) -> None:
    """The same kinds of corpora that the sources read, each of 3 speakers with 4 recordings; written to any storage."""
    for number, speaker in enumerate(SPEAKERS):
        seeds = range(10 * number, 10 * number + 4)
        for seed in seeds:
            storage.write(f"tree/train-a/{number}/7/{number}-7-{seed:04d}.flac", recording(seed))
            storage.write(f"folder/train/{speaker}/{seed}.flac", recording(seed))
            storage.write(f"folder/train/{speaker}/{seed}.txt", f"TEXT {seed}".encode())
        lines = "".join(f"{number}-7-{seed:04d} TEXT {seed}\n" for seed in seeds)
        storage.write(f"tree/train-a/{number}/7/{number}-7.trans.txt", lines.encode())
        storage.write(f"tars/train-{number:05d}.tar", tar_of({f"{seed:04d}": seed for seed in seeds}, speaker))
        rows = [
            {"audio": {"bytes": recording(n), "path": f"{n}.flac"}, "speaker_id": speaker, "text": f"TEXT {n}"}
            for n in seeds
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=3)
        storage.write(f"parquet/train-{number:05d}-of-00003.parquet", buffer.getvalue())
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["path", "speaker", "text"])
    table.writerows(
        [f"train/{s}/{10 * n + k}.flac", s, f"TEXT {10 * n + k}"] for n, s in enumerate(SPEAKERS) for k in range(4)
    )
    storage.write("folder/table.csv", text.getvalue().encode())


def corpora(url: str) -> dict[str, Corpus]:
    """A corpus of each kind below `url`, whose second speaker is for dev and third for test."""
    place, mark, options = url.partition("?")

    def below(path: str) -> str:
        return f"{place}/{path}{mark}{options}"

    moved = {"dev_speakers": ("ben",), "test_speakers": ("cleo",)}
    return {
        "tree": LibriSpeech(name="tree", path=below("tree"), dev_speakers=("1",), test_speakers=("2",), shard_mib=1),
        "folder": AudioFolder(name="folder", path=below("folder"), **moved),
        "table": AudioTable(name="table", path=below("folder/table.csv"), **moved),
        "parquet": Parquet(name="parquet", path=below("parquet"), **moved),
        "tars": WebDataset(name="tars", path=below("tars"), **moved),
    }


def utterances(corpus: Corpus) -> list[RawUtterance]:
    source = open_source(corpus)
    plan = plan_shards(source.groups(), source.shard_bytes)
    return [item for groups in plan.values() for group in groups for item in source.read(group)]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("speech"))
    speech(Storage(folder))
    return folder


@pytest.fixture(scope="module")
def there(bucket) -> str:
    speech(Storage(bucket))
    return bucket


@pytest.mark.parametrize("kind", corpora(""))
def test_an_object_store_is_read_as_a_folder_is(here, there, kind):
    found = utterances(corpora(here)[kind])
    assert found == utterances(corpora(there)[kind])
    seeds = [10 * number + k for number in range(3) for k in range(4)]
    assert sorted(u.audio for u in found) == sorted(map(recording, seeds))
    assert sorted((u.split, u.text) for u in found) == sorted(
        (split, f"TEXT {10 * n + k}") for n, split in enumerate(("train", "dev", "test")) for k in range(4)
    )


def test_a_store_that_stumbles_costs_no_recording(here):
    """Errors that another try mends are tried again, and none becomes a row of the quarantine table."""
    faults: list[Faults] = []

    def stumbling(app):
        faults.append(Faults(app))
        return faults[0]

    with s3_server(stumbling) as url:
        speech(Storage(url))
        for kind in ("folder", "tars", "parquet"):
            assert utterances(corpora(url)[kind]) == utterances(corpora(here)[kind])
    assert min(faults[0].answered.values()) > 1


def test_a_store_that_is_gone_is_an_error_and_no_quarantine(here):
    with s3_server() as url:
        speech(Storage(url))
        source = open_source(corpora(url)["folder"])
        groups = source.groups()
    with pytest.raises(OSError):
        list(source.read(groups[0]))


# --- the whole stage --------------------------------------------------------------------------------------------------


def prepare(storage: Storage, corpus: Corpus, only: str = "prepare_data") -> Artifact:
    recipe = load_recipe(str(SMOKE), ["finetune=null", "decode=null", "iterations.iter1.kmeans.max_iterations=2"])
    recipe = msgspec.structs.replace(recipe, corpus=corpus, name=f"of-{corpus.name}")
    ((step, _, _),) = pipeline.run(recipe, storage, Cluster(), connected(Cluster()), only)
    return step.artifact


def test_tars_are_indexed_in_place_and_may_move(ray_local, there, tmp_path):
    storage = Storage(str(tmp_path / "out"))
    speech(Storage(str(tmp_path / "in")))
    local = prepare(storage, corpora(str(tmp_path / "in"))["tars"])
    assert storage.list(local.file("audio")) == []
    manifest = whole_manifest(storage, local.path).table.to_pylist()
    shards = ["train-00000", "dev-00001", "test-00002"]  # each tar is read for each split, since speakers are moved
    assert [row["shard"] for row in manifest] == [shard for shard in shards for _ in range(4)]
    reader = AudioReader(storage, local.path)
    assert [reader.read(row["shard"], row["offset"], row["size"]) for row in manifest] == [
        recording(10 * number + k) for number in range(3) for k in range(4)
    ]
    assert [(row["utterance_id"], row["speaker"], row["split"], row["text"]) for row in manifest[4:6]] == [
        ("train-00001/0010", "ben", "dev", "TEXT 10"),
        ("train-00001/0011", "ben", "dev", "TEXT 11"),
    ]
    (tmp_path / "in").rename(tmp_path / "moved")
    row = manifest[0]
    with pytest.raises(
        CorpusError, match=r"if the tars have moved, write where they are now into corpora/tars/locations"
    ):
        AudioReader(storage, local.path).read(row["shard"], row["offset"], row["size"])
    places = local.read(layout.LOCATIONS).decode()
    storage.write(local.file(layout.LOCATIONS), places.replace(str(tmp_path / "in"), str(tmp_path / "moved")).encode())
    assert AudioReader(storage, local.path).read(row["shard"], row["offset"], row["size"]) == recording(0)

    other = Storage(str(tmp_path / "other"))
    remote = prepare(other, corpora(there)["tars"])
    assert remote.require().facts["content"] == local.require().facts["content"]
    assert remote.identity == local.identity
    assert AudioReader(other, remote.path).read(row["shard"], row["offset"], row["size"]) == recording(0)
    learned = prepare(other, corpora(there)["tars"], "iter1/learn_kmeans")  # audio from the bucket, by range
    assert learned.require().facts["frames"] == sum((8000 + seed - 400) // 160 + 1 for seed in range(4))


def test_repeats_are_rows_of_the_quarantine_table(ray_local, here, tmp_path):
    storage = Storage(str(tmp_path))
    doubled = Storage(f"{here}/doubled")
    for split in ("train", "test"):
        for seed in range(3):
            doubled.write(f"{split}/anna/{seed}.flac", recording(seed + (split == "test")))
    artifact = prepare(storage, AudioFolder(name="doubled", path=f"{here}/doubled"))
    assert whole_manifest(storage, artifact.path).table["utterance_id"].to_pylist() == [
        "train/anna/0",
        *(f"test/anna/{n}" for n in range(3)),
    ]
    rows = schemas.decode(artifact.read(layout.QUARANTINE)).to_pylist()
    assert [(row["source"], row["reason"]) for row in rows] == [
        (f"train/anna/{n}", "duplicate_content") for n in (1, 2)
    ]
    facts = artifact.require().facts
    assert (facts["utterances"], facts["quarantined"]) == (4, 2)
    kept = AudioFolder(name="kept", path=f"{here}/doubled", checks=Checks(reject_duplicates=False))
    assert prepare(storage, kept).require().facts["utterances"] == 6
