"""Is the mask fairseq's in distribution, constant in count, and a pure function of its place in the batch plan?"""

import numpy as np
import pytest
import torch

from hubert_ray.config.recipe import Finetune, Mask
from hubert_ray.model.masking import MaskError, batch_mask, finetune_mask, masked_count, span_mask
from tests.reference import slow_equalised_count, slow_spans

MASK = Mask()


def test_spans_match_the_slow_sampler_frame_by_frame():
    frames, draws = 60, 4000
    rng, slow_rng = np.random.default_rng(1), np.random.default_rng(2)
    fast = np.mean([span_mask(frames, MASK, rng) for _ in range(draws)], axis=0)
    slow = np.zeros(frames)
    for _ in range(draws):
        slow[list(slow_spans(frames, MASK.prob, MASK.length, MASK.min_spans, slow_rng))] += 1 / draws
    assert np.abs(fast - slow).max() < 0.045  # four standard errors of a difference of shares
    assert abs(fast.mean() - slow.mean()) < 0.008
    assert fast[-1] == 0


def test_coverage_at_the_papers_settings():
    rng = np.random.default_rng(0)
    hidden = np.array([span_mask(781, MASK, rng) for _ in range(400)])
    assert hidden.mean() == pytest.approx(0.567, abs=0.01)
    assert hidden[:, 0].mean() == pytest.approx(0.076, abs=0.04)
    assert not hidden[:, -1].any()


def test_at_least_two_spans():
    rng = np.random.default_rng(0)
    counts = [span_mask(200, Mask(prob=0.01), rng).sum() for _ in range(100)]
    assert max(counts) == 20
    assert min(counts) > 10


def test_masked_count_is_the_expected_minimum_of_eight_rows():
    for frames in (49, 99):
        slow = slow_equalised_count(frames, MASK.prob, MASK.length, MASK.min_spans, batches=300)
        assert abs(masked_count(frames, MASK) - slow) < 1.0
    assert masked_count(781, MASK) / 781 == pytest.approx(0.529, abs=0.002)


def test_every_row_hides_the_same_number():
    for step in range(30):
        mask_BT = batch_mask(8, 99, MASK, seed=0, step=step, micro_batch=0)
        assert mask_BT.dtype == torch.bool
        assert mask_BT.sum(1).tolist() == [masked_count(99, MASK)] * 8


def test_a_pure_function_of_its_arguments():
    first = batch_mask(4, 99, MASK, seed=3, step=5, micro_batch=7)
    masked_count.cache_clear()
    np.random.seed(0)
    assert torch.equal(first, batch_mask(4, 99, MASK, seed=3, step=5, micro_batch=7))
    assert torch.equal(first[:2], batch_mask(2, 99, MASK, seed=3, step=5, micro_batch=7))
    others = [(4, 5, 7), (3, 6, 7), (3, 5, 8), (3, 7, 5)]
    assert not any(torch.equal(first, batch_mask(4, 99, MASK, *other)) for other in others)
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_equalising_keeps_spans_where_it_can():
    """Most hidden frames still lie in runs: un-masking makes single holes, it does not scatter the mask."""
    mask_BT = batch_mask(64, 99, MASK, 0, 0, 0).numpy()
    neighbours = (mask_BT[:, 1:] & mask_BT[:, :-1]).sum() / mask_BT.sum()
    assert neighbours > 0.65  # 0.46 if scattered


def test_too_short_a_row_is_refused():
    with pytest.raises(MaskError, match="row of 11 frames"):
        span_mask(11, MASK, np.random.default_rng(0))
    with pytest.raises(MaskError, match="row of 11 frames"):
        masked_count(11, MASK)


def test_finetune_masks_stay_inside_each_row():
    frames_B = torch.tensor([99, 40, 9])
    settings = Finetune(channel_mask_prob=0.5)
    masks = [finetune_mask(frames_B, 99, 192, 0.65, settings, 0, step, 0) for step in range(200)]
    time = torch.stack([mask.time_BT for mask in masks]).float()
    channel = torch.stack([mask.channel_BD for mask in masks])
    assert time[:, 1, 40:].sum() == 0
    assert time[:, 2].sum() == 0
    assert time[:, 0].mean() == pytest.approx(0.49, abs=0.04)
    assert len(set(time[:, 0].sum(1).tolist())) > 5  # not equalised
    spans = 0.5 * 192 / 64
    assert channel.float().mean() == pytest.approx(spans * 64 / 192 * 0.9, abs=0.06)
    assert (channel[:, 0] != channel[:, 1]).any()
    assert torch.equal(masks[3].time_BT, finetune_mask(frames_B, 99, 192, 0.65, settings, 0, 3, 0).time_BT)


def test_finetune_masks_can_be_off():
    mask = finetune_mask(torch.tensor([99]), 99, 192, 0.0, Finetune(channel_mask_prob=0.0), 0, 0, 0)
    assert not mask.time_BT.any()
    assert not mask.channel_BD.any()
