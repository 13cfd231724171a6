"""What learn_kmeans keeps between passes is what it goes on from."""

from __future__ import annotations

import numpy as np

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.presets import PRESETS
from hubert_ray.stages.context import Work
from hubert_ray.stages.learn_kmeans import _resume, _save
from hubert_ray.storage.artifacts import Artifact, identity_of
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units.kmeans import Fit


def test_fits_of_unequal_streams_are_read_back_as_they_were(tmp_path):
    output = Artifact(Storage(str(tmp_path)), "runs/r/iter1/learn_kmeans", identity_of("learn_kmeans", {}, {}))
    work = Work("iter1/learn_kmeans", PRESETS["demo"], Cluster(), output, {})
    assert _resume(work) == []
    rng = np.random.default_rng(0)
    fits = [
        Fit(rng.normal(size=(5, 3)).astype(np.float32), 16, 0, 0, (0, 3)),
        Fit(rng.normal(size=(9, 3)).astype(np.float32), 4, 1, 0, (3, 6), (1.0 / 3, 0.25), 2),
        Fit(rng.normal(size=(9, 3)).astype(np.float32), 1, 1, 1, (3, 6), (0.1,), 0, True),
    ]
    _save(work, fits)
    for found, kept in zip(_resume(work), fits, strict=True):
        assert found.centroids_KD.tobytes() == kept.centroids_KD.tobytes()
        assert {**vars(found), "centroids_KD": None} == {**vars(kept), "centroids_KD": None}
