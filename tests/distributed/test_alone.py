"""Both real tasks, trained without Ray: killed and resumed they end in the same model, and no report is lost."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from hubert_ray.config.cluster import Cluster
from hubert_ray.distributed import telemetry, zero
from hubert_ray.distributed.train_loop import StepLoss, reports
from hubert_ray.storage import layout
from tests.distributed import alone


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return alone.make_inputs(tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
def test_pretraining_killed_and_resumed_ends_in_the_same_model(storage, tmp_path):
    assert alone.train(alone.pretraining(storage, "calm"), Cluster())[0] == 0
    job = alone.pretraining(storage, "killed", die_at=3, marker=str(tmp_path / "died"))
    assert [alone.train(job, Cluster())[0] for _ in range(2)] == [9, 0]
    calm, killed = (safetensors.torch.load(storage.read(f"{name}/{layout.MODEL}")) for name in ("calm", "killed"))
    for name, value in calm.items():
        torch.testing.assert_close(killed[name], value, rtol=1e-6, atol=1e-6)
    assert [row["step"] for row in telemetry.read(storage, "killed")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_trial_killed_while_it_evaluates_reports_that_rung_later(storage, tmp_path):
    job = alone.finetuning(storage, "trial", die_at=4, marker=str(tmp_path / "died"))
    status, heard = alone.train(job, Cluster())
    assert (status, [row["step"] for row in heard]) == (9, [2])
    status, heard = alone.train(job, Cluster())
    # 2 is told again: a search that was killed as well may have forgotten it
    assert (status, [row["step"] for row in heard]) == (0, [2, 4, 6])
    assert reports(storage, "trial") == heard
    assert all(row["dev_wer"] > 0 for row in heard)


@pytest.mark.parametrize("make", [alone.pretraining, alone.finetuning])
def test_recomputing_gives_the_same_gradients(storage, make):
    """With dropout; and the blocks do run twice."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        module = make(storage, "none", recompute).factory()
        batch = module.load(0, 0)
        module = module.module.train()
        runs: list[None] = []
        module.model.encoder.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(None))
        torch.manual_seed(1)
        module(batch).total.backward()
        found.append({name: parameter.grad for name, parameter in module.named_parameters()})
        assert len(runs) == 1 + recompute
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


def test_all_that_a_step_makes_lies_on_the_device_of_the_model():
    """NCCL sums no CPU tensor, and a fused AdamW takes no step count from there. Seen on the device without memory."""
    total = torch.zeros((), device="meta", requires_grad=True)
    sums = StepLoss.of(total, [total, 3, 0.5, torch.zeros((), dtype=torch.int64, device="meta")]).sums
    assert (sums.device.type, sums.dtype, sums.shape, sums.requires_grad) == ("meta", torch.float64, (4,), False)
    state = zero._empty_state(torch.zeros(3, dtype=torch.bfloat16, device="meta"), 7)
    assert {value.device.type for value in state.values()} == {"meta"}
    assert zero._empty_state(torch.zeros(3), 7)["step"] == 7
    numbers = StepLoss.of(torch.tensor(2.0), [torch.tensor(2.0), 3, 0.5]).sums
    assert numbers.tolist() == [2.0, 3.0, 0.5]
