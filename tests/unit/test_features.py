"""Do the teachers compute what the paper's did, the same for an utterance in any company?"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from hubert_ray.config.recipe import Mfcc
from hubert_ray.config.sizes import TINY, ModelSize
from hubert_ray.data.audio import normalise
from hubert_ray.data.frames import frames_of, mfcc_frames_of
from hubert_ray.model.hubert import Encoder
from hubert_ray.units.features import LayerExtractor, MfccExtractor, batches
from tests.reference import slow_deltas, slow_mfcc


def waves(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Noise with a tone and an offset, each at another level."""
    rng = np.random.default_rng(seed)
    made = []
    for samples in lengths:
        tone = np.sin(2 * np.pi * rng.uniform(80, 400) * np.arange(samples) / 16_000)
        made.append((rng.uniform(0.02, 0.3) * (tone + 0.3 * rng.standard_normal(samples)) + 0.01).astype(np.float32))
    return made


# --- MFCC -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["speech-like", "faint", "int16 scale"])
def test_mfcc_is_kaldis(kind):
    """`faint`: most mel energies lie under the floor of the logarithm."""
    wave_S = waves(3000, seed=3)[0]
    wave_S = {"speech-like": wave_S, "faint": wave_S * np.float32(1e-5), "int16 scale": wave_S * np.float32(32768)}[
        kind
    ]
    static_FC = slow_mfcc(wave_S)
    delta_FC = slow_deltas(static_FC)
    expected_FD = np.concatenate([static_FC, delta_FC, slow_deltas(delta_FC)], axis=1)
    (got_FD,) = MfccExtractor()([wave_S])
    assert got_FD.shape == expected_FD.shape
    assert np.abs(got_FD - expected_FD).max() < 5e-3  # of values up to 100; fp32 against fp64
    assert np.abs(expected_FD).max() > 10


def test_faint_audio_meets_the_floor():
    """The point of `faint` above: silence is finite, and one and the same frame everywhere."""
    (silent_FD,) = MfccExtractor()([np.zeros(2000, dtype=np.float32)])
    assert np.isfinite(silent_FD).all()
    assert np.allclose(silent_FD[:, :13], silent_FD[0, :13])
    assert np.allclose(silent_FD[:, 13:], 0, atol=1e-5)
    assert silent_FD[0, 0] == pytest.approx(23**0.5 * np.log(np.finfo(np.float32).eps), rel=1e-5)


def test_slow_deltas_by_hand():
    ramp = np.arange(6.0)[:, None] ** 2
    by_hand = [(1 * (1 - 0) + 2 * (4 - 0)) / 10, (1 * (4 - 0) + 2 * (9 - 0)) / 10, (1 * (9 - 1) + 2 * (16 - 0)) / 10]
    assert slow_deltas(ramp)[:3, 0].tolist() == by_hand


@pytest.mark.parametrize("samples", [400, 559, 560, 720, 4321, 16_000])
def test_mfcc_frames_are_those_that_labels_count(samples):
    (features_FD,) = MfccExtractor()(waves(samples))
    assert features_FD.shape == (mfcc_frames_of(samples), MfccExtractor().dim)
    assert features_FD.dtype == np.float32
    assert np.isfinite(features_FD).all()


def test_mfcc_of_an_utterance_is_its_own():
    several = waves(4000, 400, 9000)
    together = MfccExtractor()(several)
    assert [len(features) for features in together] == [mfcc_frames_of(len(wave)) for wave in several]
    for wave_S, features_FD in zip(several, together, strict=True):
        before = wave_S.copy()
        assert np.array_equal(MfccExtractor()([wave_S])[0], features_FD)
        assert np.array_equal(wave_S, before)
    assert MfccExtractor()([]) == []


def test_spliced_frames_are_grouped_by_derivative():
    (plain_FD,) = MfccExtractor()(several := waves(4000))
    (spliced_FD,) = MfccExtractor(Mfcc(splice=3))(several)
    frames = len(plain_FD)
    assert spliced_FD.shape == (frames, 117)
    for frame in range(frames):
        neighbours = [max(frame - 1, 0), frame, min(frame + 1, frames - 1)]
        for order in range(3):
            expected = np.concatenate([plain_FD[n, 13 * order : 13 * order + 13] for n in neighbours])
            assert np.array_equal(spliced_FD[frame, 39 * order : 39 * order + 39], expected)


@pytest.mark.parametrize("splice", [1, 3])
def test_chosen_derivatives_are_those_of_all(splice):
    several = waves(4000, 400)
    for whole, second in zip(
        MfccExtractor(Mfcc(splice=splice))(several),
        MfccExtractor(Mfcc(splice=splice, derivatives=(2, 0)))(several),
        strict=True,
    ):
        width = 13 * splice
        assert np.array_equal(second, np.concatenate([whole[:, 2 * width :], whole[:, :width]], axis=1))
        assert second.shape[1] == MfccExtractor(Mfcc(splice=splice, derivatives=(2, 0))).dim


def test_mfcc_knows_no_level_but_in_c0():
    """No mean subtraction and no scaling to int16: a gain moves C0 by a constant, and nothing else."""
    wave_S = waves(4000, seed=5)[0]
    quiet_FD, loud_FD = MfccExtractor()([wave_S, 2 * wave_S])
    difference_FD = loud_FD - quiet_FD
    assert np.allclose(difference_FD[:, 0], 23**0.5 * np.log(4), atol=1e-3)
    assert np.allclose(difference_FD[:, 1:], 0, atol=1e-3)


# --- layers -----------------------------------------------------------------------------------------------------------

SIZES = {
    "group": msgspec.structs.replace(TINY, layers=2),
    "layer": msgspec.structs.replace(TINY, layers=2, conv_norm="layer"),
    "post": msgspec.structs.replace(TINY, layers=2, norm_first=False),
}


def model(size: ModelSize) -> Encoder:
    torch.manual_seed(0)
    return Encoder(size)


def layer_of(encoder, layer, normalize, **budget):
    encoder.size = msgspec.structs.replace(encoder.size, normalize_waveform=normalize)
    return LayerExtractor(encoder, layer, **budget)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_layer_of_a_batch_is_that_of_each_utterance_alone(name, normalize):
    hubert = model(SIZES[name])
    several = waves(9000, 400, 16_123, 5000, 9001, 719)
    together = layer_of(hubert, 2, normalize)(several)
    for wave_S, features_TD in zip(several, together, strict=True):
        (alone_TD,) = layer_of(hubert, 2, normalize)([wave_S])
        assert features_TD.shape == alone_TD.shape == (frames_of(len(wave_S)), TINY.dim)
        assert features_TD.dtype == np.float32
        assert np.abs(features_TD - alone_TD).max() < 1e-5


def test_layers_zero_to_last():
    hubert = model(SIZES["group"])
    wave_S = waves(8000)[0]
    expected = hubert.eval().all_layers(torch.from_numpy(wave_S)[None])
    assert len(expected) == 3
    for layer, hidden_1TD in enumerate(expected):
        extractor = layer_of(hubert, layer, normalize=False)
        (features_TD,) = extractor([wave_S])
        assert features_TD.shape == (frames_of(8000), extractor.dim)
        assert np.abs(features_TD - hidden_1TD[0].numpy()).max() < 1e-5
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert (expected[1] - expected[2]).abs().max() > 1e-2


def test_layer_of_a_model_in_train_mode_has_no_dropout():
    hubert = model(msgspec.structs.replace(SIZES["group"], dropout=0.5, layer_drop=0.5)).train()
    extractor = layer_of(hubert, 2, normalize=False)
    first, second = extractor(waves(3000)), extractor(waves(3000))
    assert np.array_equal(first[0], second[0])


def test_normalize_is_per_whole_utterance_before_padding():
    hubert = model(SIZES["layer"])
    several = waves(6000, 3000)
    wanted = layer_of(hubert, 1, normalize=False)([normalise(wave_S) for wave_S in several])
    got = layer_of(hubert, 1, normalize=True)(several)
    assert all(np.abs(a - b).max() < 1e-6 for a, b in zip(got, wanted, strict=True))
    assert np.abs(layer_of(hubert, 1, normalize=False)(several)[0] - got[0]).max() > 1e-2


def test_a_small_budget_changes_nothing_but_the_batches():
    hubert = model(SIZES["group"])
    several = waves(5000, 1000, 3000, 1000, 7000)
    wide = layer_of(hubert, 1, normalize=False)(several)
    narrow = layer_of(hubert, 1, normalize=False, batch_seconds=0.2)(several)
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(wide, narrow, strict=True))


def test_batches_keep_the_budget_and_miss_nobody():
    lengths = np.random.default_rng(0).integers(400, 5000, 60).tolist()
    groups = list(batches(lengths, 0.75))
    assert sorted(i for group in groups for i in group) == list(range(60))
    assert all(len(group) * max(lengths[i] for i in group) <= 12_000 for group in groups)
    assert len(groups) < 40
    assert list(batches([9000, 400], 0.0625)) == [[1], [0]]  # longer than the budget: alone
    assert list(batches([], 1)) == []
