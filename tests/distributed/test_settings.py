"""Settings that would wait for ever, or that nothing can carry out, are refused before anything runs."""

from __future__ import annotations

import pytest

from hubert_ray.config.cluster import Cluster
from hubert_ray.distributed.cluster import check_fits, check_settings, connected
from hubert_ray.errors import RecipeError

MACHINE = {"CPU": 4.0, "GPU": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"train_workers": 5},
        {"train_workers": 2, "train_gpus": 1},
        {"train_workers": 8, "train_workers_min": 5},
        {"trial_workers": 4},  # beside what two waiting trials take
        {"trial_workers": 5},
        {"train_workers": 1, "trial_workers": 2, "train_gpus": 1},
        {"data_cpus": 4.5},
        {"data_gpus": 2},
        {"kmeans_workers": 4, "kmeans_cpus": 1},  # no CPU is left to extract with
    ],
)
def test_pools_that_do_not_fit_on_the_machine_are_refused(settings):
    with pytest.raises(RecipeError, match=r"needed, this machine offers [41]\. Lower --cluster"):
        check_fits(Cluster(**settings), MACHINE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_workers": 4},
        {"train_workers": 8, "train_workers_min": 4},
        {"trial_workers": 3},
        {"train_workers": 1, "train_gpus": 1, "data_gpus": 1},
        {"data_cpus": 4},
        {"data_workers": 50},  # as many run as fit
        {"kmeans_workers": 3, "kmeans_cpus": 1},
        {"kmeans_workers": 50},
    ],
)
def test_pools_that_fit_are_taken(settings):
    check_fits(Cluster(**settings), MACHINE)


def test_a_gpu_on_a_machine_without_is_refused():
    with pytest.raises(RecipeError, match=r"a data worker .*: 1 GPU needed, this machine offers 0\. .*data_gpus"):
        check_fits(Cluster(data_gpus=1), {"CPU": 4.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16", "zero_stage": 0}, "zero_stage 1 or 2"),
        ({"train_workers": 2, "train_gpus": 0.5}, "cannot share a GPU"),
        ({"train_workers": 1, "trial_workers": 2, "train_gpus": 0.5}, "cannot share a GPU"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_before_ray_is_up(settings, message):
    with pytest.raises(RecipeError, match=message):
        with connected(Cluster(**settings)):
            pytest.fail("the block ran")
    check_settings(Cluster(train_workers=1, train_gpus=0.5, precision="bf16"))
