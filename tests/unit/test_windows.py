"""Do units of audio in pieces equal those of the whole, exactly, at every border, and are they those of the windows?"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.config.sizes import TINY
from hubert_ray.data.frames import MFCC_STRIDE, STRIDE, frames_of, mfcc_frames_of
from hubert_ray.model.hubert import Encoder
from hubert_ray.units.features import LayerExtractor, MfccExtractor
from hubert_ray.units.kmeans import assign
from hubert_ray.units.windows import UnitStream, Windows, deduplicate

WINDOWS = Windows(frames=13, context=4)
NOISE = (0.1 * np.random.default_rng(0).standard_normal(60_000)).astype(np.float32)
SMALL = msgspec.structs.replace(
    TINY, conv_channels=8, layers=1, dim=16, ffn_dim=32, heads=2, position_kernel=8, position_groups=4
)
LARGE = msgspec.structs.replace(SMALL, conv_norm="layer", normalize_waveform=True)


def layer_extractor(size) -> LayerExtractor:
    torch.manual_seed(0)
    return LayerExtractor(Encoder(size), 1)


TEACHERS = {
    "group norm": (layer_extractor(SMALL), STRIDE, frames_of),
    "layer norm": (layer_extractor(LARGE), STRIDE, frames_of),
    "mfcc": (MfccExtractor(), MFCC_STRIDE, mfcc_frames_of),
}


class Labeller:
    """Units of one window, and which windows were asked for."""

    def __init__(self, teacher: str):
        self._extract, self.stride, self.frames = TEACHERS[teacher]
        features_FD = self._extract([NOISE])[0]
        self._centroids_KD = features_FD[np.random.default_rng(1).choice(len(features_FD), 24, replace=False)]
        self.asked: list[int] = []

    def __call__(self, wave_S: np.ndarray) -> np.ndarray:
        self.asked.append(len(wave_S))
        return assign(self._extract([wave_S])[0], self._centroids_KD)[0].astype(np.uint16)

    def stream(self, windows: Windows = WINDOWS) -> UnitStream:
        return UnitStream(self, self.stride, windows)

    def whole(self, wave_S: np.ndarray, windows: Windows = WINDOWS) -> np.ndarray:
        stream = self.stream(windows)
        return np.concatenate([stream.push(wave_S), stream.close()])


def by_definition(labeller: Labeller, wave_S: np.ndarray, windows: Windows = WINDOWS) -> list[int]:
    """Frame by frame: the first window whose kept part has frame t gives its unit."""
    frames, hop = labeller.frames(len(wave_S)), windows.frames - 2 * windows.context
    count = max(1, -(-(frames - windows.frames) // hop) + 1)
    of_window: dict[int, np.ndarray] = {}
    units = []
    for t in range(frames):
        k = min(max(0, (t - windows.context) // hop), count - 1)
        start = k * hop * labeller.stride
        samples = labeller.stride * (windows.frames - 1) + 400 if k < count - 1 else len(wave_S)
        if k not in of_window:
            of_window[k] = labeller(wave_S[start : start + samples])
        units.append(int(of_window[k][t - k * hop]))
    return units


@st.composite
def lengths(draw, stride: int) -> int:
    """Samples around the border of a window, a frame more or less, with any remainder; sometimes anything."""
    border = WINDOWS.frames + draw(st.integers(0, 4)) * WINDOWS.hop + draw(st.integers(-1, 2))
    near = st.just(400 + (border - 1) * stride)
    return draw(st.integers(0, 12_000) | near.flatmap(lambda n: st.integers(n - 2, n + stride - 1)))


pieces_of = st.lists(st.sampled_from([0, 1, 7, 160, 319, 320, 400, 401, 5000]), min_size=1, max_size=30)


@pytest.mark.parametrize("teacher", TEACHERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_stream_gives_the_units_of_the_whole(teacher, data):
    labeller = Labeller(teacher)
    wave_S = NOISE[: data.draw(lengths(labeller.stride))]
    sizes, stream, at, known = data.draw(pieces_of), labeller.stream(), 0, []
    for size in sizes:
        known.append(stream.push(wave_S[at : at + size]))
        at += size
    known += [stream.push(wave_S[at:]), stream.close()]
    units_F = np.concatenate(known)
    asked, labeller.asked = labeller.asked, []
    assert units_F.dtype == np.uint16
    assert len(units_F) == labeller.frames(len(wave_S))
    assert np.array_equal(units_F, labeller.whole(wave_S))
    assert asked == labeller.asked


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("more", [-1, 0, 1, 319])
@pytest.mark.parametrize("frames", [1, 12, 13, 14, 17, 18, 19, 23, 24])
def test_units_are_those_of_the_definition(teacher, frames, more):
    labeller = Labeller(teacher)
    wave_S = NOISE[: 400 + (frames - 1) * labeller.stride + more]
    assert labeller.whole(wave_S).tolist() == by_definition(labeller, wave_S)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_audio_of_up_to_a_window_is_one_pass_over_all_samples(teacher):
    labeller = Labeller(teacher)
    longest = 400 + WINDOWS.frames * labeller.stride - 1
    for samples in (400, longest - 1, longest):
        labeller.asked = []
        assert np.array_equal(labeller.whole(NOISE[:samples]), labeller(NOISE[:samples]))
        assert labeller.asked == [samples, samples]
    labeller.asked = []
    labeller.whole(NOISE[: longest + 1])
    assert len(labeller.asked) == 2


def test_windows_of_mfcc_with_context_are_the_whole():
    """Deltas of deltas see four neighbours; three are too few."""
    extract, _, frames = TEACHERS["mfcc"]
    whole_FD = extract([NOISE])[0]
    for context, equal in ((4, True), (3, False)):
        stream = UnitStream(lambda wave_S: extract([wave_S])[0], MFCC_STRIDE, Windows(frames=13, context=context))
        kept = [stream.push(NOISE), stream.close()]
        assert sum(map(len, kept)) == frames(len(NOISE))
        assert np.array_equal(np.concatenate(kept), whole_FD) == equal


@pytest.mark.parametrize("teacher", ["group norm", "layer norm"])
def test_windows_matter_to_a_transformer(teacher):
    """The other tests would pass if windows were ignored."""
    labeller = Labeller(teacher)
    assert not np.array_equal(labeller.whole(NOISE), labeller(NOISE))


def test_units_come_as_soon_as_one_frame_more_than_a_window_is_there():
    labeller = Labeller("mfcc")
    stream = labeller.stream()
    enough = 400 + WINDOWS.frames * MFCC_STRIDE
    assert len(stream.push(NOISE[: enough - 1])) == 0
    assert len(stream.push(NOISE[enough - 1 : enough])) == WINDOWS.frames - WINDOWS.context
    assert len(stream.push(NOISE[enough : enough + WINDOWS.hop * MFCC_STRIDE])) == WINDOWS.hop


def test_a_stream_keeps_one_window_and_no_piece_of_the_callers():
    labeller = Labeller("mfcc")
    stream, piece = labeller.stream(), NOISE[:1600].copy()
    units = [stream.push(piece)]
    piece[:] = 0  # a microphone fills the same buffer again
    for start in range(1600, 48_000, 1600):
        piece[:] = NOISE[start : start + 1600]
        units.append(stream.push(piece))
        assert sum(map(len, stream._pieces)) < 400 + MFCC_STRIDE * (WINDOWS.frames + 1) + 1600
    assert np.array_equal(np.concatenate([*units, stream.close()]), labeller.whole(NOISE[:48_000]))
    with pytest.raises(ValueError, match="closed"):
        stream.push(piece)


@pytest.mark.parametrize(("frames", "context"), [(10, 5), (0, 0), (4, -1)])
def test_windows_without_a_middle(frames, context):
    with pytest.raises(ValueError, match="context"):
        Windows(frames=frames, context=context)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_deduplicate(units):
    once_N, durations_N = deduplicate(np.array(units, dtype=np.uint16))
    assert once_N.dtype == np.uint16
    assert np.repeat(once_N, durations_N).tolist() == units
    assert all(a != b for a, b in zip(once_N, once_N[1:], strict=False))
    assert (durations_N > 0).all()
