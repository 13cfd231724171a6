"""The same chain on an object store: a real S3 API on loopback instead of a folder, behind a proxy that fails one request in
five, and the same bytes come out."""

from __future__ import annotations

import itertools

import msgspec
import pytest

import hubert_ray
from hubert_ray import cli, pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_recipe
from hubert_ray.distributed import checkpoint
from hubert_ray.distributed.cluster import connected
from hubert_ray.errors import StaleArtifactError
from hubert_ray.storage import layout
from hubert_ray.storage.cache import RangeCache
from hubert_ray.storage.filesystem import Storage
from hubert_ray.unit_bundle import BundleError
from tests.conftest import SMOKE
from tests.faults import faulty_s3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3():
    with faulty_s3() as server:
        yield server


def test_whole_or_absent(bucket):
    storage = Storage(bucket)
    storage.write("a/file", b"1234")
    assert storage.read("a/file") == b"1234"
    with storage.open("a/file") as file:
        assert file.read_at(2, 1) == b"23"
    with pytest.raises(RuntimeError), storage.create("a/half") as stream:
        stream.write(b"12")
        raise RuntimeError
    assert storage.list("a") == ["file"]
    storage.delete("a")
    assert not storage.exists("a/file")


def test_chain_on_failing_s3_gives_the_bytes_of_a_local_one(s3, corpus, tmp_path):
    local, path = corpus
    cache = RangeCache(str(tmp_path / "cache"), 2**30)
    remote = Storage(s3.url(), cache)
    numbers, met = {method: itertools.count() for method in ("GET", "HEAD", "PUT", "POST", "DELETE")}, set()

    def fails(method, path):
        """Every fifth read, every third write. Not the end of an upload: a real store repeats its answer, moto does not know it."""
        kinds = ["500", "503", "cut", *{"GET": ("truncated", "slow"), "PUT": ("lost",)}.get(method, ())]
        k, rest = divmod(next(numbers[method]), 3 if method == "PUT" else 5)
        if rest or method == "POST":
            return None
        met.add((method, kinds[k % len(kinds)]))
        return kinds[k % len(kinds)]

    s3.plan = fails
    overrides = ["iterations.iter1.kmeans.max_iterations=4", "name=places"]
    recipe = load_recipe(str(SMOKE), overrides)
    stages = ("iter1/learn_kmeans", "iter1/assign_labels")
    for storage, wanted in ((local, stages), (remote, ("prepare_data", *stages, "iter1/pretrain"))):
        for stage in wanted:
            if stage == "iter1/pretrain":  # Ray Train has a client of its own, with its own patience
                s3.plan = lambda method, path: None
            for _ in pipeline.run(recipe, storage, Cluster(), connected(Cluster()), stage):
                pass
    assert {("GET", "truncated"), ("GET", "cut"), ("GET", "503"), ("PUT", "500"), ("PUT", "lost")} <= met
    assert any((tmp_path / "cache").rglob("*"))
    for folder in (f"{path}/audio", *(f"runs/places/{stage}/parts" for stage in stages)):
        assert remote.list(folder) == local.list(folder)
        for name in local.list(folder):
            assert remote.read(f"{folder}/{name}") == local.read(f"{folder}/{name}"), name
    bundles = {local.url: str(tmp_path / "bundle"), remote.url: s3.url().replace("/hubert?", "/units/bundle?")}
    (tmp_path / "recipe.json").write_bytes(msgspec.json.encode(recipe))
    for storage_url, url in bundles.items():
        made = ["bundle", "--recipe", str(tmp_path / "recipe.json"), "--storage", storage_url, "--of", "iter1", url]
        assert cli.main(made) == 0
    from_disk, from_s3 = (hubert_ray.load_units(url) for url in bundles.values())
    assert from_disk.card == from_s3.card
    remote_bundle = Storage(s3.url().replace("/hubert?", "/units?"))
    remote_bundle.write(f"bundle/{layout.CENTROIDS}", b"another")
    with pytest.raises(BundleError, match=f"s3://k:s@speech/units/bundle/{layout.CENTROIDS}: found sha256"):
        hubert_ray.load_units(bundles[remote.url])
    trained = "runs/places/iter1/pretrain"
    assert remote.exists(f"{trained}/{layout.MODEL}")
    assert checkpoint.steps(remote, trained) == [5, 10]
    assert remote.list(f"{trained}/tensorboard")
    with pytest.raises(StaleArtifactError):
        pipeline.plan(load_recipe(str(SMOKE), [*overrides, "iterations.iter1.pretrain.steps=13"]), remote)
