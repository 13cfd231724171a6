"""On a GPU, without Ray: Base trains in bf16, fp32 layers equal the CPU's, and both training tasks resume over NCCL."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Pretrain
from hubert_ray.config.sizes import BASE, TINY
from hubert_ray.distributed import telemetry
from hubert_ray.model.hubert import Hubert
from hubert_ray.model.loss import pretrain_loss
from hubert_ray.model.masking import batch_mask
from hubert_ray.model.optim import adamw, set_lr
from hubert_ray.storage import layout
from hubert_ray.units import kmeans
from tests.distributed import alone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_layers_equal_those_of_the_cpu():
    torch.manual_seed(0)
    model = Hubert(TINY, (50,)).eval()
    wave_BS = torch.randn(3, 31_760) * 0.1
    samples_B = torch.tensor([31_760, 20_000, 5_000])
    on_cpu = model.encoder.all_layers(wave_BS, samples_B)
    on_gpu = model.cuda().encoder.all_layers(wave_BS.cuda(), samples_B)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(gpu[0].cpu(), cpu[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(gpu[2, :15].cpu(), cpu[2, :15], rtol=1e-3, atol=1e-3)


def test_base_learns_one_batch_in_bf16():
    torch.manual_seed(0)
    model = Hubert(BASE, (504,)).cuda().train()
    optimizer = adamw(model.parameters(), (0.9, 0.98), 1e-6, 0.01)
    set_lr(optimizer, 1e-4)
    settings = Pretrain(steps=10, peak_lr=1e-4)
    wave_BS = torch.randn(4, 80_080, device="cuda") * 0.1
    frames = 250
    labels_BT = torch.arange(frames).repeat(4, 1) % 20
    losses = []
    for step in range(10):
        mask_BT = batch_mask(4, frames, settings.mask, 0, step, 0)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            parts = pretrain_loss(model, model(wave_BS, mask_BT), labels_BT, mask_BT, settings)
        (parts.total / parts.frames).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(parts.masked_nats) / parts.masked_frames)
    assert all(loss == loss for loss in losses)
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return alone.make_inputs(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("make", [alone.pretraining, alone.finetuning])
@pytest.mark.parametrize(
    "settings",
    [
        {"train_gpus": 1},
        {"train_gpus": 1, "precision": "bf16"},
        {"train_gpus": 1, "precision": "bf16", "zero_stage": 2, "recompute": True},
        {"train_gpus": 1, "zero_stage": 0},
        {"train_gpus": 0},  # the GPU is another worker's: training stays on the CPU
    ],
    ids=str,
)
def test_training_killed_and_resumed_goes_the_same_way(storage, tmp_path, make, settings):
    """Losses of the whole run, the part after the kill included, are those of an undisturbed run up to rounding."""
    cluster, folder = Cluster(**settings), tmp_path.name
    assert alone.train(make(storage, f"{folder}/calm", cluster.recompute), cluster)[0] == 0
    job = make(storage, f"{folder}/killed", cluster.recompute, die_at=4, marker=str(tmp_path / "died"))
    assert [alone.train(job, cluster)[0] for _ in range(2)] == [9, 0]
    calm, killed = (telemetry.read(storage, f"{folder}/{name}") for name in ("calm", "killed"))
    assert [row["step"] for row in killed] == list(range(1, alone.STEPS + 1))
    loss = "loss_bits" if make is alone.pretraining else "loss"
    np.testing.assert_allclose([row[loss] for row in killed], [row[loss] for row in calm], rtol=0.02)
    weights = safetensors.torch.load(storage.read(f"{folder}/killed/{layout.MODEL}"))
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in weights.values())


def test_assignment_on_the_gpu_is_that_of_the_cpu():
    """Up to frames that are as near to one centroid as to another."""
    rng = np.random.default_rng(0)
    frames_ND = rng.normal(size=(200_000, 39)).astype(np.float32)
    centroids_KD = frames_ND[:500].copy()
    cpu, gpu = kmeans.partial(frames_ND, centroids_KD), kmeans.partial(frames_ND, centroids_KD, torch.device("cuda"))
    assert np.abs(cpu.counts_K - gpu.counts_K).sum() < 1e-3 * len(frames_ND)
    assert gpu.inertia == pytest.approx(cpu.inertia, rel=1e-5)
    again = kmeans.partial(frames_ND, centroids_KD, torch.device("cuda"))
    assert again.sums_KD.tobytes() == gpu.sums_KD.tobytes(), "a pass that is repeated must not change the centroids"
