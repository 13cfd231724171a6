"""Do the learning rates follow fairseq's schedules, and does AdamW decay every weight?"""

import pytest
import torch

from hubert_ray.model.optim import adamw, polynomial_lr, set_lr, tri_stage_lr
from tests.reference import slow_tri_stage


def test_polynomial_at_the_papers_points():
    rate = [
        polynomial_lr(step, 400_000, 0.08, 5e-4) for step in (0, 1, 16_000, 32_000, 216_000, 399_999, 400_000, 500_000)
    ]
    peak = 5e-4
    assert rate[0] == rate[1] == pytest.approx(peak / 32_000)
    assert rate[2:5] == pytest.approx([peak / 2, peak, peak / 2])
    assert 0 < rate[5] < 1e-8
    assert rate[6:] == [0, 0]


def test_polynomial_without_warmup():
    assert polynomial_lr(0, 10, 0.0, 1.0) == 1.0


@pytest.mark.parametrize("shares", [(0.1, 0.4, 0.5), (0.1, 0.0, 0.9), (0.2, 0.3, 0.3)])
def test_tri_stage_matches_the_slow_one(shares):
    slow = slow_tri_stage(200, *(round(200 * share) for share in shares), peak=2e-5, final_scale=0.05)
    fast = [tri_stage_lr(step, 200, shares, 2e-5, 0.05) for step in range(200)]
    assert fast == pytest.approx(slow, rel=1e-6)


def test_weight_decay_is_decoupled_and_reaches_biases():
    weight, bias, frozen = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = adamw([weight, bias, frozen], (0.9, 0.98), 1e-6, weight_decay=0.01)
    set_lr(optimizer, 0.1)
    weight.grad, bias.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3,), 1 - 0.1 * 0.01))
    assert torch.equal(weight, bias)
    assert torch.equal(frozen, torch.ones(3))


def test_the_first_step_moves_by_the_rate():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = adamw([weight], (0.9, 0.98), 1e-6)
    set_lr(optimizer, 0.5)
    weight.grad = torch.tensor([3.0, -7.0])
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.5, 0.5], rel=1e-4)
