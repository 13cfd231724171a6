"""Do samples, frames and labels line up, exactly, for every length and crop?"""

import numpy as np
import pytest

from hubert_ray.data.frames import (
    FrameError,
    crop_labels,
    frames_at,
    frames_of,
    label_index,
    mfcc_frames_of,
    samples_of,
)
from tests.reference import frames_by_convs


def test_frames_are_those_of_seven_convolutions():
    assert [frames_of(samples) for samples in range(5000)] == [frames_by_convs(samples) for samples in range(5000)]
    for samples in np.random.default_rng(0).integers(400, 2_000_000, 200).tolist():
        assert frames_of(samples) == frames_by_convs(samples)


@pytest.mark.parametrize(
    ("samples", "frames"), [(399, 0), (400, 1), (16_000, 49), (32_000, 99), (190_800, 596), (250_000, 781)]
)
def test_published_frame_counts(samples, frames):
    assert frames_of(samples) == frames


def test_samples_of_is_the_least():
    for frames in range(1, 500):
        assert frames_of(samples_of(frames)) == frames
        assert frames_of(samples_of(frames) - 1) == frames - 1


def test_mfcc_frames_cover_every_frame_once():
    for samples in range(400, 5000):
        assert 2 * frames_of(samples) - 1 <= mfcc_frames_of(samples) <= 2 * frames_of(samples)
    assert mfcc_frames_of(16_000) == 98
    assert mfcc_frames_of(399) == 0


@pytest.mark.parametrize(("rate", "stride"), [(50, 320), (100, 160)])
def test_a_crops_labels_start_at_its_frames_samples(rate, stride):
    """Labels that hold their own first sample: what the crop gets must be the first sample of each of its frames."""
    samples = 50_000
    first_sample = np.arange(0, samples - 400 + 1, stride)
    for start_frame in (0, 1, 7, 60):
        frames = frames_of(samples - 320 * start_frame)
        got = first_sample[crop_labels(320 * start_frame, frames, rate, len(first_sample))]
        assert got.tolist() == [320 * (start_frame + t) for t in range(frames)]
        assert first_sample[label_index(start_frame, rate)] == 320 * start_frame


def test_wrong_input_is_refused():
    with pytest.raises(FrameError, match="multiple of 320"):
        crop_labels(100, 10, 50)
    with pytest.raises(FrameError, match="25 Hz"):
        crop_labels(0, 10, 25)
    with pytest.raises(FrameError, match="needs 19 labels"):
        crop_labels(0, 10, 100, available=18)
    assert crop_labels(0, 10, 100, available=19) == slice(0, 19, 2)
    with pytest.raises(FrameError, match="0 frames"):
        samples_of(0)


def test_frames_of_many_lengths_are_those_of_each():
    lengths = np.concatenate([[0, 1], np.arange(395, 2100)]).astype(np.uint32)
    assert frames_at(lengths, 50).tolist() == [frames_of(int(n)) for n in lengths]
    assert frames_at(lengths, 100).tolist() == [mfcc_frames_of(int(n)) for n in lengths]
