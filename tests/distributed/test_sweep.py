"""Ray Tune over real trials: ASHA stops the worse, a killed trial goes on, a killed search is restored."""

from __future__ import annotations

from functools import partial

import pytest
import safetensors.torch

from hubert_ray.config.cluster import Cluster
from hubert_ray.distributed.sweep import Trial, run_trials
from hubert_ray.distributed.train_loop import TrainJob
from hubert_ray.errors import CorpusError
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage
from tests.distributed.test_train_loop import RegressionTask

pytestmark = pytest.mark.slow
STEPS, RUNGS = 8, (2, 4, 8)


class ScoredTask(RegressionTask):
    """The regression with a learning rate of its own; scored by its last training loss."""

    def __init__(self, rate: float, refuse: bool = False, **faults):
        if refuse:
            raise CorpusError("no transcripts here")
        super().__init__(**faults)
        self._rate = rate

    def learning_rate(self, step):
        return self._rate

    def metrics(self, sums, seconds):
        self._last = super().metrics(sums, seconds)
        return self._last

    def evaluate(self):
        return {"score": float(self._last["loss"])}


def trials(storage, rates, **faults):
    return [
        Trial(
            f"{number:03d}",
            TrainJob(
                partial(ScoredTask, rate, **(faults if number == 0 else {})),
                storage, f"runs/r/finetune/trials/{number:03d}", STEPS, 1, 0.0, 2, 1, RUNGS,
            ),
        )
        for number, rate in enumerate(rates)
    ]  # fmt: skip


def sweep(storage, rates, cluster=None, **faults):
    return run_trials(
        trials(storage, rates, **faults), "score", RUNGS, "runs/r/finetune/tune", storage, cluster or Cluster()
    )


def test_the_worse_trials_are_stopped_and_the_best_ends(ray_local, tmp_path):
    storage = Storage(str(tmp_path))
    results = sweep(storage, [0.03, 1e-7, 1e-7, 1e-7], Cluster(concurrent_trials=1))
    steps = [result.reports[-1]["step"] for result in results]
    assert [result.name for result in results] == ["000", "001", "002", "003"]
    assert steps[0] == STEPS
    assert min(steps) < STEPS
    assert [row["step"] for row in results[0].reports] == list(RUNGS)
    assert storage.exists(f"runs/r/finetune/trials/000/{layout.MODEL}")


def test_a_killed_trial_goes_on_to_the_same_model(ray_local, tmp_path):
    calm, killed = Storage(str(tmp_path / "calm")), Storage(str(tmp_path / "killed"))
    sweep(calm, [0.03])
    marker = tmp_path / "died"
    sweep(killed, [0.03], die_at=5, marker=str(marker))
    assert marker.exists()
    first, second = (
        safetensors.torch.load(s.read(f"runs/r/finetune/trials/000/{layout.MODEL}")) for s in (calm, killed)
    )
    for name, value in first.items():
        assert (value - second[name]).abs().max() < 1e-6


def test_a_finished_search_is_restored_not_repeated(ray_local, tmp_path):
    storage = Storage(str(tmp_path))
    first = sweep(storage, [0.03, 0.01])
    written = storage.filesystem.get_file_info(storage.full(f"runs/r/finetune/trials/000/{layout.MODEL}")).mtime_ns
    assert sweep(storage, [0.03, 0.01]) == first
    again = storage.filesystem.get_file_info(storage.full(f"runs/r/finetune/trials/000/{layout.MODEL}")).mtime_ns
    assert again == written


def test_a_users_error_in_a_trial_arrives_as_itself(ray_local, tmp_path):
    with pytest.raises(CorpusError, match="no transcripts here"):
        sweep(Storage(str(tmp_path)), [0.03], Cluster(max_failures=0), refuse=True)


def test_trials_of_several_workers(ray_local, tmp_path):
    results = sweep(Storage(str(tmp_path)), [0.03], Cluster(trial_workers=2, concurrent_trials=1))
    assert [row["step"] for row in results[0].reports] == list(RUNGS)
