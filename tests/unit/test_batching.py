"""data/batching.py: the plan is a pure function of the step, covers every utterance, and crops where labels are exact."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.config.recipe import Pretrain
from hubert_ray.data import batching
from hubert_ray.data.batching import BatchPlan, PaddedPlan, _Lines, crop_frames
from hubert_ray.data.frames import samples_of
from hubert_ray.errors import TrainingError

PLAN = Pretrain(steps=10, peak_lr=1e-3, batch_seconds=60.0, micro_batch_seconds=20.0, crop_lengths=5, seed=3)


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20_000, 400_000, count)


def test_crop_lengths_span_the_bounds():
    frames = crop_frames(Pretrain(steps=1, peak_lr=1))
    assert (frames[0], frames[-1], len(frames)) == (99, 781, 12)
    assert (np.diff(frames) > 0).all()


def rows_of_epoch(plan: BatchPlan, epoch: int) -> np.ndarray:
    """All rows that an epoch draws, in order."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.concatenate([micro.rows for step in steps for micro in plan.step(step)])


def filled_up(plan: BatchPlan) -> int:
    """How many crops of an epoch are there only because the last micro-batch of a length, and the last step, were not full."""
    lines = plan._ends_PC[-1]
    longest = int(plan._rows.max())
    missing = plan.steps_per_epoch * plan.micro_batches_per_step - int(plan._micro_ends[-1])
    return int((-lines % plan._rows)[lines > 0].sum()) + missing * longest


@given(count=st.integers(1, 500), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_an_epoch_holds_every_usable_utterance_once(count, seed):
    samples = lengths(count, seed)
    usable = np.flatnonzero(samples >= samples_of(99))
    if not len(usable):
        with pytest.raises(TrainingError, match="shortest crop"):
            BatchPlan(samples, PLAN)
        return
    plan = BatchPlan(samples, PLAN)
    assert plan.utterances == len(usable)
    for epoch in (0, 1):
        drawn = np.bincount(rows_of_epoch(plan, epoch), minlength=count)
        assert set(np.flatnonzero(drawn)) == set(usable)
        assert (drawn - 1)[usable].sum() <= filled_up(plan)


@given(
    count=st.integers(1, 5000), seed=st.integers(0, 50), row=st.integers(0, 5000), block=st.sampled_from([1, 7, 1024])
)
@settings(max_examples=60, deadline=None)
def test_lines_hold_what_a_sort_would(count, seed, row, block):
    samples = lengths(count, seed).astype(np.uint32)
    crops = np.array([samples_of(frames) for frames in crop_frames(PLAN)])
    line_of = np.searchsorted(crops, samples, side="right") - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "_BLOCK", block)
        patch.setattr(batching, "_ROWS_AT_ONCE", 3 * block)
        lines = _Lines(samples, crops)
        row = min(row, count)
        assert lines.before(row).tolist() == [(line_of[:row] == line).sum() for line in range(len(crops))]
        for line in range(len(crops)):
            members = np.flatnonzero(line_of == line)
            assert lines.find(line, np.arange(len(members))).tolist() == members.tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 13, 32, 64])
def test_any_number_of_ranks_draws_the_same_global_batches_and_none_starves(world):
    """Rank r asks its own plan for micro-batches r, r + world, …, as distributed/train_loop.py does."""
    samples = lengths(500)
    settings = msgspec.structs.replace(PLAN, batch_seconds=640.0)  # 32 micro-batches
    whole = BatchPlan(samples, settings)
    ranks = [BatchPlan(samples, settings) for _ in range(world)]
    for step in (0, 1, whole.steps_per_epoch, 7 * whole.steps_per_epoch - 1):
        expected = [(m.rows.tolist(), m.starts.tolist(), m.frames) for m in whole.step(step)]
        assert whole.shapes(step) == [(len(rows), frames) for rows, _, frames in expected]
        found = {}
        for rank, plan in enumerate(ranks):
            mine = range(rank, plan.micro_batches_per_step, world)
            assert len(mine) in (32 // world, -(-32 // world))
            found |= {index: plan.micro_batch(step, index) for index in mine}
        assert [(found[i].rows.tolist(), found[i].starts.tolist(), found[i].frames) for i in range(32)] == expected


# --- mixes ------------------------------------------------------------------------------------------------------------

PARTS = st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any)


def mix(counts: list[int], seed: int = 0) -> tuple[np.ndarray, dict[str, slice]]:
    """Lengths of all utterances, and the rows of parts "0", "1", …"""
    bounds = np.cumsum([0, *counts]).tolist()
    rows = {str(part): slice(*pair) for part, pair in enumerate(pairwise(bounds))}
    return np.random.default_rng(seed).integers(33_000, 400_000, bounds[-1]), rows


def settings_of(language: float, dataset: float) -> Pretrain:
    return msgspec.structs.replace(PLAN, language_alpha=language, dataset_alpha=dataset)


@given(
    counts=PARTS,
    language=st.floats(0, 1),
    dataset=st.floats(0, 1),
    languages=st.lists(st.sampled_from("xy"), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_each_utterance_of_a_mix_comes_as_often_as_its_part_is_repeated(counts, language, dataset, languages):
    samples, rows = mix(counts)
    named = {str(part): name for part, name in enumerate(languages)}
    plan = BatchPlan(samples, settings_of(language, dataset), rows, named)
    if max(plan.repeats.values()) > 20:
        return  # too long an epoch
    drawn = np.bincount(rows_of_epoch(plan, 1), minlength=len(samples))
    over = 0
    for part, chosen in rows.items():
        least = math.floor(plan.repeats[part] + 1e-9)
        assert (drawn[chosen] >= least).all()
        over += np.maximum(drawn[chosen] - least - 1, 0).sum()
        lines = len(crop_frames(PLAN))
        wanted = plan.repeats[part] * (chosen.stop - chosen.start)
        assert wanted - lines / 2 <= drawn[chosen].sum() <= wanted + lines / 2 + filled_up(plan)
    assert over <= filled_up(plan)
    assert min(plan.repeats[part] for part, chosen in rows.items() if chosen.stop > chosen.start) == 1


def test_shares_of_an_epoch_follow_the_hours_to_the_power_of_alpha():
    """Two languages, one of them of two datasets: mHuBERT-147's two levels."""
    samples, rows = mix([900, 300, 150])
    languages = {"0": "en", "1": "fr", "2": "fr"}
    once = BatchPlan(samples, PLAN)
    hours = np.zeros(len(samples))
    for step in range(once.steps_per_epoch):
        for micro in once.step(step):
            hours[micro.rows] = micro.seconds / len(micro.rows)
    for language, dataset in ((1.0, 1.0), (0.7, 0.9), (0.5, 0.0), (0.0, 1.0)):
        plan = BatchPlan(samples, settings_of(language, dataset), rows, languages)
        seconds = np.zeros(len(samples))
        for step in range(plan.steps_per_epoch):
            for micro in plan.step(step):
                np.add.at(seconds, micro.rows, micro.seconds / len(micro.rows))
        en, fr1, fr2 = (hours[chosen].sum() for chosen in rows.values())
        wanted = np.array(
            [
                en**language,
                (fr1 + fr2) ** language * fr1**dataset / (fr1**dataset + fr2**dataset),
                (fr1 + fr2) ** language * fr2**dataset / (fr1**dataset + fr2**dataset),
            ]
        )
        found = np.array([seconds[chosen].sum() for chosen in rows.values()])
        assert found / found.sum() == pytest.approx(wanted / wanted.sum(), rel=0.05)


def test_who_comes_more_often_differs_by_epoch_and_evens_out():
    samples, rows = mix([300, 100])
    plan = BatchPlan(samples, settings_of(1.0, 0.5), rows)
    assert 1.6 < plan.repeats["1"] < 1.9
    epochs = [np.bincount(rows_of_epoch(plan, epoch), minlength=400)[300:] for epoch in range(30)]
    often = np.stack(epochs) > 1
    assert not np.array_equal(often[0], often[1])
    share = often.mean(axis=0)
    assert share.min() > 0.25 and share.max() < 1
    assert share.mean() == pytest.approx(plan.repeats["1"] - 1, abs=0.05)


def test_a_mix_that_is_not_balanced_is_as_one_corpus():
    samples, rows = mix([300, 100, 50])
    plan, whole = BatchPlan(samples, PLAN, rows, {"0": "en"}), BatchPlan(samples, PLAN)
    assert list(plan.repeats.values()) == pytest.approx([1, 1, 1])
    assert plan.steps_per_epoch == whole.steps_per_epoch


@given(counts=PARTS, step=st.integers(0, 10**9), language=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_any_step_of_a_mix_can_be_asked_for_alone(counts, step, language):
    samples, rows = mix(counts)
    made = [BatchPlan(samples, settings_of(language, 0.5), rows, {"0": "en"}).step(step) for _ in range(2)]
    assert [m.rows.tolist() for m in made[0]] == [m.rows.tolist() for m in made[1]]
    for micro in made[0]:
        assert (micro.starts + samples_of(micro.frames) <= samples[micro.rows]).all()


# --- crops ------------------------------------------------------------------------------------------------------------


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
