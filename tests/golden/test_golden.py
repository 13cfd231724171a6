"""Has a refactor changed a number? Twenty updates of a small model, pinned. A numerical change updates them."""

import math

import pytest
import torch

from hubert_ray.config.recipe import Pretrain
from hubert_ray.config.sizes import TINY, ModelSize
from hubert_ray.model.hubert import Hubert
from hubert_ray.model.loss import pretrain_loss
from hubert_ray.model.masking import batch_mask
from hubert_ray.model.optim import adamw, polynomial_lr, set_lr

SETTINGS = Pretrain(steps=20, peak_lr=2e-3)
DEBUG = ModelSize(
    **{
        **{field: getattr(TINY, field) for field in TINY.__struct_fields__},
        **{"conv_channels": 32, "layers": 2, "dim": 64, "ffn_dim": 128, "heads": 2, "codeword_dim": 32},
    }
)
POST_NORM = ModelSize(
    **{
        **{field: getattr(DEBUG, field) for field in DEBUG.__struct_fields__},
        **{"norm_first": False, "conv_norm": "layer", "conv_grad_scale": 0.1},
    }
)
GOLDEN_BITS = {
    "pre-norm": [
        4.81948,
        4.59163,
        4.87265,
        5.58238,
        4.05678,
        4.90016,
        4.25076,
        4.43132,
        5.09703,
        4.66387,
        4.56063,
        4.6478,
        3.49263,
        5.43567,
        4.75904,
        4.72399,
        3.8982,
        4.40719,
        5.02035,
        4.70151,
    ],
    "post-norm": [
        5.10193,
        4.85686,
        5.05469,
        5.9967,
        4.35226,
        5.36584,
        4.3133,
        4.49705,
        5.46022,
        4.89353,
        5.04595,
        5.16816,
        4.0392,
        5.53733,
        5.1292,
        4.74923,
        4.39807,
        4.69288,
        5.07838,
        4.96775,
    ],
}


def train(size: ModelSize) -> list[float]:
    """Bits per masked frame and feature penalty of every step, one number each: their sum."""
    torch.manual_seed(0)
    model = Hubert(size, (20,))
    optimizer = adamw(model.parameters(), SETTINGS.betas, SETTINGS.eps, SETTINGS.weight_decay)
    data = torch.Generator().manual_seed(1)
    losses = []
    for step in range(SETTINGS.steps):
        wave_BS = torch.randn(4, 16_000, generator=data) * 0.1
        labels_BT = torch.randint(0, 20, (4, 1), generator=data).expand(4, 49)
        wave_BS = wave_BS + torch.sin(torch.arange(16_000) * (labels_BT[:, :1] + 1) * 0.02)
        mask_BT = batch_mask(4, 49, SETTINGS.mask, SETTINGS.seed, step, 0)
        parts = pretrain_loss(model, model(wave_BS, mask_BT), labels_BT, mask_BT, SETTINGS)
        (parts.total / parts.frames).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        assert math.isfinite(norm)
        set_lr(optimizer, polynomial_lr(step, SETTINGS.steps, SETTINGS.warmup_share, SETTINGS.peak_lr))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts.masked_nats.item() / parts.frames / math.log(2) + parts.feature_penalty.item())
    return losses


@pytest.mark.parametrize(("name", "size"), [("pre-norm", DEBUG), ("post-norm", POST_NORM)])
def test_twenty_steps(name, size):
    assert train(size) == pytest.approx(GOLDEN_BITS[name], abs=1e-4)
