"""data/batching.py: the plan is a pure function of the step, covers every utterance, and crops where labels are exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.config.recipe import Pretrain
from hubert_ray.data.batching import BatchPlan, PaddedPlan, crop_frames
from hubert_ray.data.frames import samples_of
from hubert_ray.errors import TrainingError

PLAN = Pretrain(steps=10, peak_lr=1e-3, batch_seconds=60.0, micro_batch_seconds=20.0, crop_lengths=5, seed=3)


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20_000, 400_000, count)


def test_crop_lengths_span_the_bounds():
    frames = crop_frames(Pretrain(steps=1, peak_lr=1))
    assert (frames[0], frames[-1], len(frames)) == (99, 781, 12)
    assert (np.diff(frames) > 0).all()


@given(count=st.integers(1, 200), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_usable_utterance(count, seed):
    samples = lengths(count, seed)
    usable = np.flatnonzero(samples >= samples_of(99))
    if not len(usable):
        with pytest.raises(TrainingError, match="shortest crop"):
            BatchPlan(samples, PLAN)
        return
    plan = BatchPlan(samples, PLAN)
    assert plan.utterances == len(usable)
    for epoch in (0, 1):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([micro.rows for step in steps for micro in plan.step(step)])
        assert set(seen) == set(usable)


def test_crops_lie_inside_and_on_the_frame_grid():
    samples = lengths(300)
    plan = BatchPlan(samples, PLAN)
    for step in range(2 * plan.steps_per_epoch):
        for micro in plan.step(step):
            assert (micro.starts % 320 == 0).all()
            assert (micro.starts >= 0).all()
            assert (micro.starts + samples_of(micro.frames) <= samples[micro.rows]).all()
            assert micro.seconds <= PLAN.micro_batch_seconds


def test_any_step_can_be_asked_for_alone():
    samples = lengths(300)
    walked = BatchPlan(samples, PLAN)
    steps = 3 * walked.steps_per_epoch
    in_order = [walked.step(step) for step in range(steps)]
    for step in (steps - 1, 0, steps // 2):
        alone = BatchPlan(samples, PLAN).step(step)
        assert [m.rows.tolist() for m in alone] == [m.rows.tolist() for m in in_order[step]]
        assert [m.starts.tolist() for m in alone] == [m.starts.tolist() for m in in_order[step]]


def test_epochs_differ_and_seeds_differ():
    samples = lengths(300)
    plan = BatchPlan(samples, PLAN)
    other = BatchPlan(samples, Pretrain(**{f: getattr(PLAN, f) for f in PLAN.__struct_fields__} | {"seed": 4}))
    first = plan.step(0)[0].rows.tolist()
    assert first != plan.step(plan.steps_per_epoch)[0].rows.tolist()
    assert first != other.step(0)[0].rows.tolist()


def test_global_batch_is_in_seconds_whatever_the_crops():
    plan = BatchPlan(lengths(3000), PLAN)
    seconds = [sum(m.seconds for m in plan.step(step)) for step in range(plan.steps_per_epoch)]
    assert plan.micro_batches_per_step == 3
    assert 0.7 * PLAN.batch_seconds < np.mean(seconds) <= PLAN.batch_seconds


def test_padded_plan_covers_everything_and_bounds_padding():
    samples = lengths(157)
    plan = PaddedPlan(samples, batch_seconds=120.0, micro_batch_seconds=60.0, seed=0)
    for epoch in (0, 1):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [batch for step in steps for batch in plan.step(step)]
        assert set(np.concatenate([b.rows for b in batches])) == set(range(157))
        padded = [len(b.rows) * samples[b.rows].max() / 16_000 for b in batches]
        assert max(padded) < 60.0 * (1 + PaddedPlan.JITTER) * 1.1
    assert [b.rows.tolist() for b in plan.step(5)] == [
        b.rows.tolist() for b in PaddedPlan(samples, 120.0, 60.0, 0).step(5)
    ]
