"""Does one folder turn audio into the right units, without Ray, and are pieces that do not belong together refused by name?"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import hubert_ray
from hubert_ray import cli
from hubert_ray.config.recipe import Layer, Mfcc
from hubert_ray.config.sizes import TINY
from hubert_ray.data import audio
from hubert_ray.data.frames import frames_of, mfcc_frames_of
from hubert_ray.data.shards import WHOLE
from hubert_ray.errors import CorpusError, StorageError, UnsealedArtifactError
from hubert_ray.formats.checkpoint import Checkpoint
from hubert_ray.model.hubert import Encoder, InputError
from hubert_ray.speech_model import SpeechModel
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.artifacts import Artifact, Identity
from hubert_ray.storage.filesystem import Storage
from hubert_ray.unit_bundle import CARD, BundleCard, BundleError, load_units, make_bundle
from hubert_ray.unit_files import recordings as found_recordings
from hubert_ray.unit_files import write_units
from hubert_ray.units.features import LayerExtractor, MfccExtractor
from hubert_ray.units.kmeans import Codebook, assign
from hubert_ray.units.windows import deduplicate
from tests.corpora import write_corpus

SMALL = msgspec.structs.replace(
    TINY, conv_channels=8, layers=2, dim=16, ffn_dim=32, heads=2, position_kernel=8, position_groups=4
)
SIZES = {"group norm": SMALL, "layer norm": msgspec.structs.replace(SMALL, conv_norm="layer", normalize_waveform=True)}
NOISE = (0.1 * np.random.default_rng(0).standard_normal(80_000)).astype(np.float32)
CLUSTERS = 12


def sealed(storage: Storage, path: str, **files: bytes) -> Artifact:
    artifact = Artifact(storage, path, Identity(path.split("/")[-1], {}, {}))
    for name, data in files.items():
        storage.write(artifact.file(name), data)
    artifact.seal({"versions": {"torch": "2"}})
    return artifact


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def artifacts(storage: Storage, size=None, seed: int = 0, longest: int = 48_000):
    """(codebook, teacher, inputs) as a run leaves them: of MFCC, or of layer 1 of random weights."""
    torch.manual_seed(seed)
    row = {"utterance_id": "a", "split": "train", "offset": 0, "size": 1, "samples": longest, "sample_rate_hz": 16_000}
    table = pa.Table.from_pylist([row | WHOLE], schema=schemas.MANIFEST)
    write_corpus(storage, f"corpora/c{seed}", {"train-00000": table})
    inputs = {"corpus": sealed(storage, f"corpora/c{seed}")}
    teacher, extractor = Mfcc(), MfccExtractor()
    if size:
        encoder = Encoder(size)
        path = SpeechModel(Checkpoint(size, encoder.state_dict())).store(storage, f"public/m{seed}")
        seal = msgspec.json.decode(storage.read(f"{path}/{layout.SEAL}"))
        inputs["teacher"] = Artifact(storage, path, msgspec.convert(seal["identity"], Identity))
        teacher, extractor = Layer(of="public/m", layer=1), LayerExtractor(encoder, 1)
    frames_FD = extractor([NOISE])[0]
    centroids_KD = frames_FD[np.random.default_rng(seed).choice(len(frames_FD), CLUSTERS, replace=False)]
    codebook = sealed(storage, f"runs/r{seed}/iter1/learn_kmeans", **{layout.CENTROIDS: npy(centroids_KD)})
    return codebook, teacher, (CLUSTERS,), inputs, extractor, centroids_KD


@pytest.fixture(params=[None, *SIZES], ids=["mfcc", *SIZES])
def made(request, tmp_path):
    """(folder of a bundle, its card, units_of(wave) of one pass)."""
    codebook, teacher, classes, inputs, extractor, centroids_KD = artifacts(
        Storage(str(tmp_path / "s")), SIZES.get(request.param)
    )
    card = make_bundle(codebook, teacher, classes, inputs, str(tmp_path / "bundle"), 1.0, 0.3)
    return tmp_path / "bundle", card, lambda wave_S: assign(extractor([wave_S])[0], centroids_KD)[0].astype(np.uint16)


# --- units ------------------------------------------------------------------------------------------------------------


def test_units_of_a_window_and_of_more(made):
    folder, card, one_pass = made
    bundle = hubert_ray.load_units(folder)
    frames, stride = (mfcc_frames_of, 160) if card.teacher == Mfcc() else (frames_of, 320)
    assert bundle.label_rate_hz == 16_000 // stride == card.windows.frames
    for samples in (400, 9_000, 16_399):  # up to 1 s of frames
        assert np.array_equal(bundle.units(NOISE[:samples]), one_pass(NOISE[:samples]))
    for samples in (0, 399, 16_400, 50_001):
        units_F = bundle.units(torch.from_numpy(NOISE[:samples]))
        assert units_F.dtype == np.uint16
        assert len(units_F) == frames(samples)
        stream = bundle.stream()
        pieces = [stream.push(NOISE[start : min(start + 333, samples)]) for start in range(0, samples, 333)]
        assert np.array_equal(np.concatenate([*pieces, stream.close()]), units_F)


@pytest.mark.parametrize(("classes", "width"), [((5, 7), 39), ((4, 4, 4), 13)], ids=["ensemble", "product"])
def test_units_of_several_streams(tmp_path, classes, width):
    storage = Storage(str(tmp_path / "s"))
    codebook, teacher, _, inputs, extractor, centroids_KD = artifacts(storage)
    if width < 39:
        centroids_KD = np.concatenate([centroids_KD[4 * part :][:4, 13 * part :][:, :13] for part in range(3)])
    storage.write(codebook.file(layout.CENTROIDS), npy(centroids_KD))
    if width < 39:
        with pytest.raises(BundleError, match=r"centroids.npy: found sha256 .*, sealed was .*; make it again after"):
            make_bundle(codebook, teacher, classes, inputs, str(tmp_path / "altered"), 1.0, 0.3)
        assert not (tmp_path / "altered" / CARD).exists()
    codebook.seal(codebook.require().facts)
    make_bundle(codebook, teacher, classes, inputs, str(tmp_path / "bundle"), 1.0, 0.3)
    bundle = load_units(tmp_path / "bundle")
    wave_S = NOISE[:9_000]
    expected_FS = Codebook(centroids_KD, classes).labels(extractor([wave_S])[0])
    assert np.array_equal(bundle.units(wave_S), expected_FS)
    assert len(np.unique(expected_FS, axis=0)) > max(classes)  # the streams differ
    stream = bundle.stream()
    assert stream.push(NOISE[:100]).shape == (0, len(classes))
    assert np.array_equal(
        np.concatenate([stream.push(NOISE[100:50_001]), stream.close()]), bundle.units(NOISE[:50_001])
    )
    soundfile.write(tmp_path / "a.flac", wave_S, 16_000, subtype="PCM_24")
    for name in ("u.jsonl", "u.parquet"):
        assert write_units(bundle, [str(tmp_path / "a.flac")], str(tmp_path / name), True) == (1, 0)
    row = json.loads((tmp_path / "u.jsonl").read_text())
    assert np.array_equal(
        np.repeat(row["units"], row["durations"], axis=0),
        bundle.units(audio.decode((tmp_path / "a.flac").read_bytes())),
    )
    assert pq.read_table(tmp_path / "u.parquet")["units"].to_pylist() == [row["units"]]
    with pytest.raises(BundleError, match="found 12 centroids, expected 5 \\+ 8"):
        make_bundle(codebook, teacher, (5, 8), inputs, str(tmp_path / "b"))


def test_other_rates_and_what_is_no_audio(made):
    bundle = load_units(made[0])
    assert len(bundle.units(NOISE[:24_000], sample_rate=48_000)) == len(bundle.units(NOISE[:8_000]))
    for wrong in (np.zeros((2, 800), np.float32), np.zeros(800, np.int16), np.full(800, np.nan, np.float32)):
        with pytest.raises(InputError):
            bundle.units(wrong)
        with pytest.raises(InputError):
            bundle.stream().push(wrong)


def test_the_default_window_holds_the_longest_utterance(tmp_path):
    storage = Storage(str(tmp_path / "s"))
    for longest, frames in ((48_000, 3000), (40 * 16_000 + 77, 4001)):
        codebook, teacher, classes, inputs, *_ = artifacts(storage, seed=longest, longest=longest)
        assert make_bundle(codebook, teacher, classes, inputs, str(tmp_path / str(longest))).windows.frames == frames
        assert frames >= mfcc_frames_of(longest)


def test_a_bundle_says_where_it_came_from_and_opens_as_a_model(made):
    folder, card, _ = made
    assert card == msgspec.json.decode((folder / CARD).read_bytes(), type=BundleCard)
    assert (card.classes, card.versions) == ((CLUSTERS,), {"torch": "2"})
    assert card.made_from["codebook"].path == "runs/r0/iter1/learn_kmeans"
    assert card.made_from["corpus"].fingerprint == Identity("c0", {}, {}).fingerprint
    assert str(folder.parent) not in (folder / CARD).read_text()
    if card.teacher != Mfcc():
        assert "teacher" in card.made_from
        assert hubert_ray.load(folder).size.dim == card.dim


def test_a_bundle_of_an_earlier_version_stays_good(tmp_path):
    """Settings with a default that its card does not know of, such as a later teacher's, are not an alteration."""
    card = make_bundle(*artifacts(Storage(str(tmp_path / "s")))[:4], str(tmp_path / "b"))
    plain = json.loads((tmp_path / "b" / CARD).read_text()) | {"teacher": {"kind": "mfcc"}}
    (tmp_path / "b" / CARD).write_text(json.dumps(plain | {"digest": BundleCard.digest_of(plain)}))
    assert load_units(tmp_path / "b").card.teacher == card.teacher


def test_needs_no_ray(tmp_path):
    make_bundle(*artifacts(Storage(str(tmp_path / "s")), SMALL)[:4], str(tmp_path / "bundle"))
    script = (
        "import sys, numpy, hubert_ray\n"
        f"print(len(hubert_ray.load_units({str(tmp_path / 'bundle')!r}).units(numpy.zeros(8000, numpy.float32))))\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what is refused --------------------------------------------------------------------------------------------------


def test_every_altered_piece_is_refused_by_name(made):
    folder, card, _ = made
    for name in card.sha256:
        good = (folder / name).read_bytes()
        for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), good + b"0"):
            (folder / name).write_bytes(bad)
            with pytest.raises(BundleError, match=f"{name}: found sha256 .* altered"):
                load_units(folder)
        (folder / name).unlink()
        with pytest.raises(BundleError, match=f"{name}: cannot be read"):
            load_units(folder)
        (folder / name).write_bytes(good)
    load_units(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher", {"kind": "layer", "of": "public/m", "layer": 2}),
        ("label_rate_hz", 25),
        ("classes", [5]),
        ("windows", {"frames": 20, "context": 2}),
        ("convention", ""),
    ],
)
def test_an_edited_card_is_refused(made, field, value):
    folder, _, _ = made
    (folder / CARD).write_text(json.dumps(json.loads((folder / CARD).read_text()) | {field: value}))
    with pytest.raises(BundleError, match=f"{CARD}: was altered"):
        load_units(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', "[1]"])
def test_a_card_that_is_none(made, text):
    folder, _, _ = made
    (folder / CARD).write_text(text)
    with pytest.raises(BundleError, match=f"{CARD}: cannot be read"):
        load_units(folder)
    (folder / CARD).unlink()
    with pytest.raises(BundleError, match="no unit bundle"):
        load_units(folder)


def test_pieces_of_other_bundles(tmp_path):
    """Each right by itself, and with the right digests in the card: they still do not fit."""
    wide = msgspec.structs.replace(SMALL, dim=32)
    one = artifacts(Storage(str(tmp_path / "s")), SMALL, seed=1)
    two = artifacts(Storage(str(tmp_path / "s")), wide, seed=2)
    make_bundle(*one[:3], two[3], str(tmp_path / "mixed"))
    with pytest.raises(BundleError, match="another teacher's codebook"):
        load_units(tmp_path / "mixed")
    for name, change in (
        ("layer", {"teacher": Layer(of="public/m", layer=3)}),
        ("rate", {"label_rate_hz": 100}),
        ("convention", {"convention": "?"}),
    ):
        card = make_bundle(*one[:4], str(tmp_path / name))
        card = msgspec.structs.replace(card, **change)
        card = msgspec.structs.replace(card, digest=BundleCard.digest_of(msgspec.to_builtins(card)))
        (tmp_path / name / CARD).write_bytes(msgspec.json.encode(card))
        with pytest.raises(BundleError):
            load_units(tmp_path / name)


def test_what_cannot_be_made(tmp_path):
    storage = Storage(str(tmp_path / "s"))
    codebook, teacher, classes, inputs, *_ = artifacts(storage)
    for seconds in ((1.0, 0.5), (-1.0, 0.0), (1.0, -0.1)):
        with pytest.raises(BundleError, match="context"):
            make_bundle(codebook, teacher, classes, inputs, str(tmp_path / "b"), *seconds)
    assert not (tmp_path / "b").exists()
    with pytest.raises(BundleError, match="expected none"):
        make_bundle(codebook, teacher, classes, inputs, str(tmp_path / "s"))
    storage.write(codebook.file(layout.CENTROIDS), npy(np.full((3, 39), np.nan, np.float32)))
    with pytest.raises(BundleError, match="finite"):
        make_bundle(codebook, teacher, classes, inputs, str(tmp_path / "b"))
    storage.delete(codebook.file(layout.SEAL))
    with pytest.raises(UnsealedArtifactError):
        make_bundle(codebook, teacher, classes, inputs, str(tmp_path / "b"))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "audio"
    (folder / "b").mkdir(parents=True)
    soundfile.write(folder / "b" / "two.wav", NOISE[:30_000], 16_000, subtype="FLOAT")
    soundfile.write(folder / "one.wav", np.stack([NOISE[:20_000], NOISE[:20_000]], 1), 16_000, subtype="FLOAT")
    (folder / "a.flac").write_bytes(b"no audio at all")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def test_names_that_are_not_utf_8_are_written_as_near_as_can_be(tmp_path):
    (tmp_path / "b").mkdir()
    file = os.fsencode(tmp_path / "b") + b"/caf\xe9.wav"
    with open(file, "wb") as empty:
        empty.write(b"")
    ((name, path),) = found_recordings([str(tmp_path)])
    assert (name, os.fsencode(path)) == ("b/caf\ufffd", file)
    assert json.loads(msgspec.json.encode({"id": name}))["id"] == name


def lines(out: str) -> dict[str, dict]:
    return {row.pop("id"): row for row in map(json.loads, out.splitlines())}


def test_units_of_a_folder(made, recordings, capsys):
    folder, card, _ = made
    bundle = load_units(folder)
    assert cli.main(["units", "--bundle", str(folder), "--audio", str(recordings)]) == 1
    out, err = capsys.readouterr()
    found = lines(out)
    assert list(found) == ["one", "b/two"]
    for name, samples in (("one", 20_000), ("b/two", 30_000)):
        assert found[name] == {"units": bundle.units(NOISE[:samples]).tolist(), "frame_rate_hz": card.label_rate_hz}
    assert [line.split(":")[1].rsplit("/")[-1] for line in err.splitlines()[:2]] == ["a.flac", "empty.wav"]
    assert "2 of 4" in err
    assert len(err.splitlines()) == 3


def test_duplicates_removed_and_parquet(made, recordings, capsys, tmp_path):
    folder, _, _ = made
    units_F = load_units(folder).units(NOISE[:30_000])
    files = [str(recordings / "b" / "two.wav"), str(recordings / "one.wav")]
    command = ["units", "--bundle", str(folder), "--deduplicate", "--audio", *files]
    assert cli.main(command) == 0
    row = lines(capsys.readouterr().out)["two"]
    assert np.repeat(row["units"], row["durations"]).tolist() == units_F.tolist()
    assert row["units"] == deduplicate(units_F)[0].tolist()
    for name in ("u.parquet", "u.jsonl"):
        assert cli.main([*command, "--output", str(tmp_path / name)]) == 0
    assert lines((tmp_path / "u.jsonl").read_text())["two"] == row
    table = pq.read_table(tmp_path / "u.parquet")
    assert table["units"].type == pa.list_(pa.uint16())
    assert {r.pop("id"): r for r in table.to_pylist()}["two"] == row


def test_standard_input(made, recordings, capsys, monkeypatch):
    folder, _, _ = made
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((recordings / "b" / "two.wav").read_bytes())))
    assert cli.main(["units", "--bundle", str(folder), "--audio", "-"]) == 0
    assert lines(capsys.readouterr().out)["-"]["units"] == load_units(folder).units(NOISE[:30_000]).tolist()


def test_paths_that_are_not_there(made, recordings, capsys, tmp_path):
    folder, _, _ = made
    bundle = load_units(folder)
    assert write_units(bundle, [str(tmp_path / "gone.wav"), str(recordings / "one.wav")], "-", False) == (1, 1)
    assert "gone.wav: No such file" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CorpusError, match="holds no"):
        write_units(bundle, [str(tmp_path / "nothing")], "-", False)
    with pytest.raises(StorageError, match="jsonl or .parquet"):
        write_units(bundle, [str(recordings)], str(tmp_path / "units.txt"), False)
    assert cli.main(["units", "--bundle", str(tmp_path / "nothing"), "--audio", str(recordings)]) == 1
    assert "no unit bundle" in capsys.readouterr().err
