"""Which recordings are usable, and is the waveform of a usable one the right one?"""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from hubert_ray.config.recipe import Checks
from hubert_ray.data import audio
from hubert_ray.errors import AudioError

NOISE = (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int = 16_000, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)


def reason_of(data: bytes, **checks: float) -> str:
    with pytest.raises(AudioError) as caught:
        audio.examine(data, Checks(**checks))
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason


def length_of(data: bytes, **checks: float) -> tuple[int, int]:
    recording = audio.examine(data, Checks(**checks))
    return recording.samples, recording.rate


# --- usable -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype", "tolerance"), [("FLAC", "PCM_16", 2**-15), ("WAV", "PCM_16", 2**-15), ("WAV", "FLOAT", 0)]
)
def test_decoded_samples_are_the_encoded_ones(kind, subtype, tolerance):
    wave_S = audio.decode(encoded(NOISE, kind=kind, subtype=subtype))
    assert wave_S.dtype == np.float32
    assert wave_S.shape == NOISE.shape
    assert np.abs(wave_S - NOISE).max() <= tolerance


def test_channels_are_averaged():
    wave_S = audio.decode(encoded(np.stack([NOISE, 3 * NOISE], axis=1), kind="WAV", subtype="FLOAT"))
    assert wave_S.shape == NOISE.shape
    assert wave_S.flags.c_contiguous
    assert np.allclose(wave_S, 2 * NOISE, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_other_rates_are_resampled_to_16_khz(rate):
    wave_S = audio.decode(encoded(tone(rate), rate, kind="WAV", subtype="FLOAT"))
    assert wave_S.dtype == np.float32
    assert wave_S.shape == (16_000,)
    assert (
        np.abs(wave_S - tone(16_000))[500:-500].max() < 5e-3
    )  # the same tone at the same place; filters ring at the ends


def test_examine_tells_length_at_16_khz_and_the_stored_rate():
    assert length_of(encoded(NOISE)) == (16_000, 16_000)
    assert length_of(encoded(tone(8_000, 0.5), 8_000)) == (8_000, 8_000)


def test_the_digest_is_that_of_the_samples():
    def digest(data: bytes) -> bytes:
        return audio.examine(data, Checks()).digest

    whole = (NOISE * 2**15).astype(np.int16)
    same = {
        digest(encoded(whole)),
        digest(encoded(whole, kind="WAV")),
        digest(encoded(whole / 2**15, kind="WAV", subtype="FLOAT")),
    }
    assert len(same) == 1
    assert len(same.pop()) == 16
    other = whole.copy()
    other[8000] += 1
    assert len({digest(encoded(whole)), digest(encoded(other)), digest(encoded(whole, 8_000))}) == 3


# --- unusable ---------------------------------------------------------------------------------------------------------


def test_empty():
    assert reason_of(b"") == "empty"


FLAC = encoded(NOISE)


@pytest.mark.parametrize(
    "data",
    [
        b"<html>404 not found</html>" * 40,
        FLAC[:20],
        FLAC[: len(FLAC) // 2],
        FLAC[:-1],
        FLAC[:9000] + bytes(200) + FLAC[9200:],
    ],
    ids=["not audio", "header cut", "cut in half", "last byte gone", "overwritten"],
)
def test_undecodable(data):
    assert reason_of(data) == "undecodable"


def test_a_stream_without_a_length_is_not_called_too_long():
    header = bytearray(FLAC)
    header[21] &= 0xF0  # STREAMINFO's 36 bits of total samples
    header[22:26] = bytes(4)
    assert reason_of(bytes(header)) == "undecodable"


def test_the_detail_depends_on_the_bytes_only():
    """libsndfile's message names a memory address: the quarantine table would differ from run to run."""
    details = set()
    for data in (bytearray(FLAC[:20]), bytearray(FLAC[:20])):
        with pytest.raises(AudioError) as caught:
            audio.decode(bytes(data))
        details.add(caught.value.detail)
    (detail,) = details
    assert detail
    assert "0x" not in detail


def test_short_reads_are_undecodable(monkeypatch):
    """A decoder that stops early without an error, as some formats' do, must not yield a short utterance."""
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, **options: read(self, **options)[:9000])
    with pytest.raises(AudioError, match="ends after 9000 of 16000"):
        audio.decode(FLAC)


@pytest.mark.parametrize(("samples", "rate"), [(0, 16_000), (399, 16_000), (199, 8_000), (1000, 48_000)])
def test_too_short_is_counted_at_16_khz(samples, rate):
    assert reason_of(encoded(NOISE[:samples], rate, kind="WAV")) == "too_short"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value):
    wave = NOISE.copy()
    wave[77] = value
    data = encoded(wave, kind="WAV", subtype="FLOAT")
    assert reason_of(data) == "not_finite"
    with pytest.raises(AudioError, match="1 samples"):
        audio.decode(data)


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_silent_is_any_constant(level):
    data = encoded(np.full(16_000, level))
    assert reason_of(data) == "silent"
    assert len(audio.decode(data)) == 16_000  # decodable all the same: the corpus refuses it, the codec does not


@pytest.mark.parametrize(("level_db", "silent"), [(-69.5, False), (-70.5, True)])
def test_silence_is_power_around_the_mean(level_db, silent):
    wave = 0.05 + 10 ** (level_db / 20) * NOISE / NOISE.std()
    data = encoded(wave, kind="WAV", subtype="FLOAT")
    assert reason_of(data) == "silent" if silent else length_of(data)


@pytest.mark.parametrize("sign", [1, -1])
def test_dc_offset(sign):
    assert reason_of(encoded(NOISE + sign * 0.51, kind="WAV", subtype="FLOAT")) == "dc_offset"
    assert length_of(encoded(NOISE + sign * 0.49, kind="WAV", subtype="FLOAT"))
    assert reason_of(encoded(NOISE + sign * 0.11, kind="WAV", subtype="FLOAT"), max_dc_offset=0.1) == "dc_offset"


@pytest.mark.parametrize("full", [1.0, -1.0, 1.5])
def test_clipping_is_a_share_of_the_samples_of_all_channels(full):
    wave = np.stack([NOISE, NOISE], axis=1)
    wave[:1500, 1] = full * np.resize([1, -1], 1500)  # 4.7 % of both channels
    assert length_of(encoded(wave, kind="WAV", subtype="FLOAT"))
    wave[:1700, 1] = full * np.resize([1, -1], 1700)
    assert reason_of(encoded(wave, kind="WAV", subtype="FLOAT")) == "clipped"
    assert length_of(encoded(wave, kind="WAV", subtype="FLOAT"), max_clipped_share=0.06)


def test_length_in_seconds():
    assert reason_of(encoded(NOISE[:8001]), max_seconds=0.5) == "too_long"
    assert reason_of(encoded(NOISE[:4001], 8_000), max_seconds=0.5) == "too_long"  # seconds, not samples
    assert length_of(encoded(NOISE[:8000]), max_seconds=0.5) == (8000, 16_000)
    assert reason_of(encoded(NOISE[:1599])) == "too_short"
    assert length_of(encoded(NOISE[:1600])) == (1600, 16_000)
    assert length_of(encoded(NOISE[:400]), min_seconds=0.001) == (400, 16_000)  # one frame of the model


@pytest.mark.parametrize("rate", [44_101, 2_000_003])
def test_a_rate_too_odd_to_resample_is_refused_before_the_memory_is_asked_for(rate):
    assert reason_of(encoded(NOISE, rate, kind="WAV")) == "sample_rate"


# --- normalise --------------------------------------------------------------------------------------------------------


def test_normalise_is_a_layer_norm_over_the_utterance():
    wave_S = audio.normalise(3 * NOISE + 0.5)
    assert wave_S.dtype == np.float32
    assert wave_S.mean() == pytest.approx(0, abs=1e-5)
    assert wave_S.std() == pytest.approx(1, abs=1e-3)


def test_normalise_has_the_epsilon_of_layer_norm():
    torch = pytest.importorskip("torch")
    quiet = 0.01 * NOISE  # variance 1e-6: a tenth of epsilon, so the result is far from unit variance
    expected = torch.nn.functional.layer_norm(torch.from_numpy(quiet), (len(quiet),)).numpy()
    assert np.abs(audio.normalise(quiet) - expected).max() < 1e-5
    assert not audio.normalise(np.full(500, 0.3, dtype=np.float32)).any()


# --- any length -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 8_000, 11_025, 22_050])
@pytest.mark.parametrize("seconds", [2.0, 4.0, 4.0001, 7.3])
def test_pieces_joined_are_the_whole(rate, seconds, monkeypatch):
    wave = 0.1 * np.random.default_rng(1).standard_normal(round(rate * seconds))
    data = encoded(wave, rate, kind="WAV", subtype="FLOAT")
    whole_S = audio.decode(data)
    monkeypatch.setattr(audio, "PIECE_SECONDS", 2.0)
    found = list(audio.pieces(io.BytesIO(data)))
    assert len(found) == np.ceil(seconds / 2)
    assert max(map(len, found)) <= 32_000
    assert all(piece.dtype == np.float32 for piece in found)
    joined_S = np.concatenate(found)
    assert joined_S.shape == whole_S.shape
    assert np.abs(joined_S - whole_S).max() < 1e-6
    if len(found) == 1 or rate == 16_000:
        assert np.array_equal(joined_S, whole_S)


def test_a_long_recording_that_ends_early_gives_what_it_has(monkeypatch):
    monkeypatch.setattr(audio, "PIECE_SECONDS", 0.25)
    data = encoded(NOISE)
    found = []
    with pytest.raises(AudioError, match="undecodable"):
        for piece in audio.pieces(io.BytesIO(data[: len(data) // 2])):
            found.append(piece)
    assert 0 < sum(map(len, found)) <= 8_000
