"""Which utterances does a LibriSpeech tree hold, however untidy, and how are they packed into shards?"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.presets import PRESETS
from hubert_ray.config.recipe import AudioFolder, AudioTable, Checks, LibriSpeech, Mix, WebDataset
from hubert_ray.data import audio
from hubert_ray.data.corpora import PlannedShard, open_source, plan_corpus, plan_shards, read_shard
from hubert_ray.data.corpora.source import Group
from hubert_ray.data.corpora.trees import AudioFolderSource, LibriSpeechSource
from hubert_ray.data.shards import RawUtterance, Rejected, write_shard
from hubert_ray.errors import CorpusError
from hubert_ray.stages import prepare_data
from hubert_ray.stages.context import Work
from hubert_ray.storage import filesystem
from hubert_ray.storage.artifacts import Artifact, identity_of
from hubert_ray.storage.filesystem import Storage


def flac(seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(seed).standard_normal(2000 + seed), 16_000, format="FLAC")
    return buffer.getvalue()


def chapter(root: Path, place: str, recordings: int, transcripts: str | bytes | None = None) -> Path:
    """`<subset>/<speaker>/<chapter>` with that many recordings."""
    folder = root / place
    folder.mkdir(parents=True)
    _, speaker, number = Path(place).parts
    for index in range(recordings):
        (folder / f"{speaker}-{number}-{index:04d}.flac").write_bytes(flac(index))
    if transcripts is not None:
        data = transcripts if isinstance(transcripts, bytes) else transcripts.encode()
        (folder / f"{speaker}-{number}.trans.txt").write_bytes(data)
    return folder


def source(root: Path, **settings) -> LibriSpeechSource:
    made = open_source(LibriSpeech(name="c", path=str(root), **settings))
    assert isinstance(made, LibriSpeechSource)
    return made


def contents(root: Path, **settings) -> tuple[list[RawUtterance], list[Rejected]]:
    """All that the source reads, utterances and rejections apart."""
    opened = source(root, **settings)
    found = [item for group in opened.groups() for item in opened.read(group)]
    return [i for i in found if isinstance(i, RawUtterance)], [i for i in found if isinstance(i, Rejected)]


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_a_chapter_is_a_group_and_its_utterances_come_in_order(tmp_path):
    chapter(tmp_path, "train-clean-100/19/198", 3, "19-198-0002 THREE\n19-198-0000 ONE TWO\n19-198-0001 TWO\n")
    chapter(tmp_path, "dev-clean/84/121", 1, "84-121-0000 DEV\n")
    (tmp_path / "SPEAKERS.TXT").write_text("ignored")
    groups = source(tmp_path).groups()
    sizes = [len(flac(0)), sum(len(flac(n)) for n in range(3))]
    assert groups == [
        Group("dev-clean/84/121", "dev", sizes[0]),
        Group("train-clean-100/19/198", "train", sizes[1]),
    ]
    utterances, rejected = contents(tmp_path)
    assert not rejected
    assert [(u.utterance_id, u.speaker, u.split, u.text) for u in utterances] == [
        ("84-121-0000", "84", "dev", "DEV"),
        ("19-198-0000", "19", "train", "ONE TWO"),
        ("19-198-0001", "19", "train", "TWO"),
        ("19-198-0002", "19", "train", "THREE"),
    ]
    assert [u.audio for u in utterances[1:]] == [flac(0), flac(1), flac(2)]
    assert {(u.suffix, u.phones) for u in utterances} == {("flac", None)}


def test_missing_transcripts_leave_utterances_without_text(tmp_path):
    chapter(tmp_path, "train-a/1/1", 2)
    chapter(tmp_path, "train-a/2/1", 3, "2-1-0000 HERE\n2-1-0002 \n\n")
    utterances, rejected = contents(tmp_path)
    assert not rejected
    assert [u.text for u in utterances] == [None, None, "HERE", None, None]


def test_a_transcript_without_audio_is_rejected_by_name(tmp_path):
    chapter(tmp_path, "train-a/1/1", 1, "1-1-0000 HERE\n1-1-0001 GONE\n")
    utterances, rejected = contents(tmp_path)
    assert [u.text for u in utterances] == ["HERE"]
    assert [(r.source, r.reason) for r in rejected] == [("1-1-0001", "no_audio")]
    assert "train-a/1/1" in rejected[0].detail


def test_a_transcript_that_is_not_utf8_costs_the_text_only(tmp_path):
    chapter(tmp_path, "train-a/1/1", 2, b"1-1-0000 FINE\n1-1-0001 CAF\xc9\n")
    chapter(tmp_path, "train-a/2/1", 1, "2-1-0000 CAFÉ\n")
    utterances, rejected = contents(tmp_path)
    assert [u.text for u in utterances] == [None, None, "CAFÉ"]
    assert [(r.source, r.reason) for r in rejected] == [("1-1.trans.txt", "bad_transcript")]


def test_a_file_name_that_is_not_utf8_is_rejected_and_fits_the_tables(tmp_path):
    folder = chapter(tmp_path / "tree", "train-a/1/1", 1)
    try:
        (folder / os.fsdecode(b"1-1-\xff.flac")).write_bytes(flac(5))
    except OSError:
        pytest.skip("this file system refuses such names")
    opened = source(tmp_path / "tree")
    (group,) = opened.groups()
    tables = write_shard(Storage(str(tmp_path / "out")), "c", "train-00000", opened.read(group))
    assert tables.manifest["utterance_id"].to_pylist() == ["1-1-0000"]
    assert tables.quarantine["reason"].to_pylist() == ["bad_name"]


def test_named_speakers_move_to_dev_and_test(tmp_path):
    for speaker in ("1", "2", "3"):
        chapter(tmp_path, f"train-a/{speaker}/7", 1)
    groups = source(tmp_path, dev_speakers=("2",), test_speakers=("3",)).groups()
    assert {group.name: group.split for group in groups} == {
        "train-a/1/7": "train",
        "train-a/2/7": "dev",
        "train-a/3/7": "test",
    }
    utterances, _ = contents(tmp_path, dev_speakers=("2",), test_speakers=("3",))
    assert [u.split for u in utterances] == ["train", "dev", "test"]


def test_a_moved_speaker_that_is_not_there_is_an_error(tmp_path):
    chapter(tmp_path, "train-a/1/7", 1)
    with pytest.raises(CorpusError, match=r"name 01, 9, but .* no such speaker"):
        source(tmp_path, dev_speakers=("9", "1"), test_speakers=("01",)).groups()


def test_subsets_of_other_names_are_for_training(tmp_path):
    chapter(tmp_path, "train-a/1/1", 1)
    chapter(tmp_path, "medium/2/1", 1)
    chapter(tmp_path, "dev-b/3/1", 1)
    splits = {group.name: group.split for group in source(tmp_path).groups()}
    assert splits == {"train-a/1/1": "train", "medium/2/1": "train", "dev-b/3/1": "dev"}


def test_a_folder_without_the_layout_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="has no <subset>/<speaker>/<chapter>"):
        source(tmp_path).groups()
    (tmp_path / "one.flac").write_bytes(flac(0))
    chapter(tmp_path, "train-a/1/1", 0, "1-1-0000 NO AUDIO\n")
    with pytest.raises(CorpusError, match="has no <subset>/<speaker>/<chapter>"):
        source(tmp_path).groups()


def test_folders_that_do_not_exist_are_errors(tmp_path):
    with pytest.raises(CorpusError, match=r"corpus\.path: .*nowhere"):
        source(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"corpus\.alignments: .*nowhere"):
        source(tmp_path, alignments=str(tmp_path / "nowhere"))


# --- phone times ------------------------------------------------------------------------------------------------------


def aligned(tmp_path: Path, *files: str | bytes | None) -> tuple[list[RawUtterance], list[Rejected]]:
    """A chapter whose recordings have these .phn files."""
    chapter(tmp_path / "audio", "train-a/1/1", len(files))
    folder = tmp_path / "phones" / "train-a/1/1"
    folder.mkdir(parents=True)
    for index, content in enumerate(files):
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode()
            (folder / f"1-1-{index:04d}.phn").write_bytes(data)
    return contents(tmp_path / "audio", alignments=str(tmp_path / "phones"))


def test_alignments_are_read_along(tmp_path):
    utterances, rejected = aligned(tmp_path, "0 320 SIL\n320 800 AH0\n\n", None, "0 500 +SPN+\n")
    assert not rejected
    assert [u.phones for u in utterances] == [[(0, 320, "SIL"), (320, 800, "AH0")], None, [(0, 500, "+SPN+")]]


def test_a_bad_alignment_costs_the_phones_only(tmp_path):
    utterances, rejected = aligned(tmp_path, "0 320\n", "0 320 SIL\n")
    assert [u.phones for u in utterances] == [None, [(0, 320, "SIL")]]
    assert [u.audio for u in utterances] == [flac(0), flac(1)]
    assert [(r.source, r.reason) for r in rejected] == [("1-1-0000", "bad_alignment")]
    assert "1-1-0000.phn" in rejected[0].detail


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_bounded_pure_complete_and_the_same_for_any_order():
    rng = random.Random(0)
    splits = {"train": 60, "dev": 7, "test": 1}
    groups = [
        Group(f"{split}/{n:02d}", split, rng.randint(1, 400)) for split, count in splits.items() for n in range(count)
    ]
    plan = plan_shards(groups, 1000)
    for shard, members in plan.items():
        assert {group.split for group in members} == {shard.split("-")[0]}
        assert sum(group.bytes for group in members) <= 1000
    for split, count in splits.items():
        own = [shard for shard in plan if shard.startswith(split)]
        assert own == [f"{split}-{n:05d}" for n in range(len(own))]
        assert [group.name for shard in own for group in plan[shard]] == [f"{split}/{n:02d}" for n in range(count)]
        for first, second in itertools.pairwise(own):  # no shard was closed early
            assert sum(group.bytes for group in plan[first]) + plan[second][0].bytes > 1000
    for _ in range(5):
        rng.shuffle(groups)
        assert list(plan_shards(groups, 1000).items()) == list(plan.items())


def test_a_group_larger_than_a_shard_gets_one_of_its_own():
    groups = [Group(name, "train", size) for name, size in (("a", 10), ("b", 5000), ("c", 10), ("d", 90), ("e", 1))]
    names = [[group.name for group in members] for members in plan_shards(groups, 100).values()]
    assert names == [["a"], ["b"], ["c", "d"], ["e"]]


def test_the_parts_of_a_mix_keep_their_ids_with_their_names_in_front(tmp_path):
    """Two trees with the same speakers and utterances, and a sick file."""
    for root in ("one", "two"):
        chapter(tmp_path / root, "train-clean/1/1", 2)
        chapter(tmp_path / root, "dev-clean/2/1", 1, f"2-1-0000 {root.upper()}\n9-9-0009 LOST\n")
    parts = tuple(LibriSpeech(name=name, path=str(tmp_path / name), shard_mib=1) for name in ("two", "one"))
    corpus = Mix(name="both", parts=parts)
    plan = plan_corpus(corpus)
    assert [(name, shard.part, shard.split) for name, shard in plan.items()] == [
        ("two-train-00000", "two", "train"),
        ("one-train-00000", "one", "train"),
        ("two-dev-00000", "two", "dev"),
        ("one-dev-00000", "one", "dev"),
    ]
    found = [(item, name) for name, shard in plan.items() for item in read_shard(corpus, shard)]
    utterances = [(u.utterance_id, u.speaker, u.text) for u, _ in found if isinstance(u, RawUtterance)]
    assert utterances == [
        ("two/1-1-0000", "two/1", None), ("two/1-1-0001", "two/1", None), ("one/1-1-0000", "one/1", None),
        ("one/1-1-0001", "one/1", None), ("two/2-1-0000", "two/2", "TWO"), ("one/2-1-0000", "one/2", "ONE"),
    ]  # fmt: skip
    assert [(r.source, r.reason) for r, _ in found if isinstance(r, Rejected)] == [
        ("two/9-9-0009", "no_audio"), ("one/9-9-0009", "no_audio"),
    ]  # fmt: skip


def test_a_corpus_that_is_no_mix_keeps_its_names(tmp_path):
    (tmp_path / "a.flac").write_bytes(flac(1))
    corpus = AudioFolder(name="c", path=str(tmp_path))
    ((name, shard),) = plan_corpus(corpus).items()
    assert (name, shard.part, shard.split) == ("train-00000", "", "train")
    assert [(u.utterance_id, u.speaker) for u in read_shard(corpus, shard)] == [("a", "")]


# --- real speech ------------------------------------------------------------------------------------------------------

REAL = Path(
    os.environ.get("HUBERT_RAY_LIBRISPEECH") or Path(__file__).parents[2].parent / "shared" / "data" / "LibriSpeech"
)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no LibriSpeech at {REAL}; name one with HUBERT_RAY_LIBRISPEECH")
def test_the_real_tree():
    alignments = REAL.parent / "alignments"
    opened = source(REAL, alignments=str(alignments) if alignments.is_dir() else None, dev_speakers=("26",))
    groups = opened.groups()
    assert len(groups) == 254
    assert {group.name.split("/")[0] for group in groups} == {"train-clean-100"}
    assert len({group.name.split("/")[1] for group in groups}) == 251
    assert sum(1 for group in groups for _ in (REAL / group.name).glob("*.flac")) == 615
    assert {g.name.split("/")[1] for g in groups if g.split == "dev"} == {"26"}
    smallest = min((g for g in groups if g.split == "dev"), key=lambda g: g.bytes)
    items = list(opened.read(smallest))
    assert items
    for item in items:
        assert isinstance(item, RawUtterance)
        assert (item.speaker, item.split) == ("26", "dev")
        assert item.utterance_id.startswith("26-")
        assert item.text
        recording = audio.examine(item.audio, Checks())
        assert recording.rate == 16_000
        if alignments.is_dir():
            assert item.phones
            assert item.phones[0][0] == 0
            assert item.phones[-1][1] <= recording.samples


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no LibriSpeech at {REAL}; name one with HUBERT_RAY_LIBRISPEECH")
def test_the_checks_let_the_real_tree_in():
    digests = set()
    opened = source(REAL)
    for group in opened.groups():
        for item in opened.read(group):
            assert isinstance(item, RawUtterance)
            digests.add(audio.examine(item.audio, Checks()).digest)
    assert len(digests) == 615


# --- any folder -------------------------------------------------------------------------------------------------------


def recording(file: Path, suffix: str) -> bytes:
    """A recording in the format that the suffix names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = {
        "ogg": ("OGG", "VORBIS"),
        "opus": ("OGG", "OPUS"),
        "mp3": ("MP3", "MPEG_LAYER_III"),
        "wav": ("WAV", "PCM_16"),
        "flac": ("FLAC", "PCM_16"),
    }
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000)
    with file.open("wb") as stream:
        soundfile.write(stream, noise, 16_000, format=kind[suffix][0], subtype=kind[suffix][1])
    return file.read_bytes()


def folder_contents(root: Path, **settings) -> tuple[list[RawUtterance], list[Rejected]]:
    opened = open_source(AudioFolder(name="c", path=str(root), **settings))
    found = [item for group in opened.groups() for item in opened.read(group)]
    return [i for i in found if isinstance(i, RawUtterance)], [i for i in found if isinstance(i, Rejected)]


@pytest.mark.parametrize("suffix", ["flac", "wav", "ogg", "opus", "mp3"])
def test_a_folder_of_any_format_can_be_decoded(tmp_path, suffix):
    data = recording(tmp_path / "anna" / f"one.{suffix.upper()}", suffix)
    (utterance,), rejected = folder_contents(tmp_path)
    assert not rejected
    assert (utterance.utterance_id, utterance.speaker, utterance.split) == ("anna/one", "anna", "train")
    assert (utterance.suffix, utterance.audio) == (suffix, data)
    assert abs(len(audio.decode(data)) - 16_000) < 2000  # lossy formats pad


def test_splits_speakers_and_texts_of_a_folder(tmp_path):
    for place in (
        "train/anna/a.wav",
        "train/anna/deep/b.wav",
        "dev-clean/ben/c.wav",
        "test/cleo/d.wav",
        "lone.wav",
        "train/anna/._a.wav",
    ):
        recording(tmp_path / place, "wav")
    (tmp_path / "train/anna/a.txt").write_text("HELLO\n WORLD\n")
    (tmp_path / "dev-clean/ben/c.txt").write_bytes(b"CAF\xc9")
    (tmp_path / "notes.pdf").write_text("ignored")
    (tmp_path / "lone.phn").write_text("0 160 AH0\n")
    (tmp_path / "test/cleo/d.phn").write_text("0 160\n")
    utterances, rejected = folder_contents(tmp_path, alignments=str(tmp_path))
    assert {u.utterance_id: u.phones for u in utterances if u.phones} == {"lone": [(0, 160, "AH0")]}
    assert sorted((u.utterance_id, u.speaker, u.split, u.text) for u in utterances) == [
        ("dev-clean/ben/c", "ben", "dev", None),
        ("lone", "", "train", None),
        ("test/cleo/d", "cleo", "test", None),
        ("train/anna/a", "anna", "train", "HELLO WORLD"),
        ("train/anna/deep/b", "anna", "train", None),
    ]
    assert [(r.source, r.reason) for r in rejected] == [
        ("dev-clean/ben/c", "bad_transcript"),
        ("test/cleo/d", "bad_alignment"),
    ]


def test_speakers_of_a_folder_are_moved_and_must_be_there(tmp_path):
    for speaker in ("anna", "ben"):
        recording(tmp_path / speaker / "a.wav", "wav")
    utterances, _ = folder_contents(tmp_path, dev_speakers=("ben",))
    assert {(u.speaker, u.split) for u in utterances} == {("anna", "train"), ("ben", "dev")}
    with pytest.raises(CorpusError, match="name cleo"):
        folder_contents(tmp_path, test_speakers=("cleo",))


def test_a_large_folder_is_several_groups_that_hold_every_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr(AudioFolderSource, "FILES_A_GROUP", 3)
    for number in range(8):
        recording(tmp_path / "anna" / f"{number}.wav", "wav")
    opened = open_source(AudioFolder(name="c", path=str(tmp_path)))
    groups = opened.groups()
    assert [group.bytes // (tmp_path / "anna" / "0.wav").stat().st_size for group in groups] == [3, 3, 2]
    names = [u.utterance_id for group in groups for u in opened.read(group)]
    assert names == [f"anna/{number}" for number in range(8)]


def test_a_large_folder_is_listed_once_by_each_process_and_its_plan_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(AudioFolderSource, "FILES_A_GROUP", 3)
    for number in range(30):
        recording(tmp_path / "anna" / f"a-rather-long-name-{number:02d}.wav", "wav")
    corpus = AudioFolder(name="c", path=str(tmp_path), shard_mib=1)
    plan = plan_corpus(corpus)
    assert b"a-rather-long-name" not in pickle.dumps(plan)
    listed: list[str] = []
    monkeypatch.setattr(Storage, "scan", lambda self, path, real=Storage.scan: listed.append(path) or real(self, path))
    shards = [PlannedShard("", "train", [group]) for shard in plan.values() for group in shard.groups]
    assert len(shards) == 10
    assert len([item for shard in shards for item in read_shard(corpus, shard)]) == 30
    assert listed == ["anna"]


def test_a_folder_that_changed_since_the_plan_is_an_error(tmp_path):
    for name in "ac":
        recording(tmp_path / "anna" / f"{name}.wav", "wav")
    opened = open_source(AudioFolder(name="c", path=str(tmp_path)))
    (group,) = opened.groups()
    recording(tmp_path / "anna" / "b.wav", "wav")
    with pytest.raises(CorpusError, match="has other files than when the corpus was begun"):
        list(opened.read(group))


# --- the plan of a begun corpus ---------------------------------------------------------------------------------------


def test_a_name_that_is_not_utf8_spoils_no_plan_and_its_change_is_seen(tmp_path):
    work, bad = _work(tmp_path / "out"), os.fsdecode(b"caf\xe9.flac")
    try:
        recording(tmp_path / "in" / "anna" / bad, "flac")
    except OSError:
        pytest.skip("this file system refuses such names")
    corpus = AudioFolder(name="c", path=str(tmp_path / "in"))
    plan = plan_corpus(corpus)
    prepare_data._check_unchanged(work, plan)
    prepare_data._check_unchanged(work, plan)
    (shard,) = plan.values()
    assert [found.reason for found in read_shard(corpus, shard)] == ["bad_name"]
    (tmp_path / "in" / "anna" / bad).rename(tmp_path / "in" / "anna" / os.fsdecode(b"caf\xe8.flac"))
    with pytest.raises(CorpusError, match="begun from other recordings"):
        prepare_data._check_unchanged(work, plan_corpus(corpus))


def test_any_name_of_a_group_can_be_planned(tmp_path):
    work = _work(tmp_path)
    plan = {"train-00000": PlannedShard("", "train", [Group(os.fsdecode(b"caf\xe9#0"), "train", 1)])}
    prepare_data._check_unchanged(work, plan)
    prepare_data._check_unchanged(work, plan)
    plan["train-00000"].groups[0] = Group(os.fsdecode(b"caf\xe8#0"), "train", 1)
    with pytest.raises(CorpusError, match="begun from other recordings"):
        prepare_data._check_unchanged(work, plan)


def _work(out: Path) -> Work:
    output = Artifact(Storage(str(out)), "corpora/c", identity_of("prepare_data", {}, {}))
    return Work("prepare_data", PRESETS["demo"], Cluster(), output, {})


def test_the_driver_asks_once_where_tars_are_and_never_opens_another_kind(tmp_path, monkeypatch):
    (tmp_path / "tars").mkdir()
    (tmp_path / "table").mkdir()
    for number in range(5):
        (tmp_path / "tars" / f"{number}.tar").write_bytes(bytes(10_240))
    recording(tmp_path / "table" / "a.wav", "wav")
    (tmp_path / "table" / "t.csv").write_text("path\na.wav\n")
    tars = WebDataset(name="tars", path=str(tmp_path / "tars"))
    table = AudioTable(name="table", path=str(tmp_path / "table" / "t.csv"))
    corpus = Mix(name="c", parts=(tars, table))
    plan = plan_corpus(corpus)
    looks: list[str] = []
    real = filesystem._connect
    monkeypatch.setattr(filesystem, "_connect", lambda url: looks.append(url) or real(url))
    found = [prepare_data._tar_in_place(corpus, shard) for shard in plan.values()]
    assert found == [(str(tmp_path / "tars"), f"{number}.tar") for number in range(5)] + [None]
    assert {*looks} == {str(tmp_path / "tars")}
    assert len(looks) <= 2  # what is there, and the folder


def test_same_names_with_two_suffixes_are_quarantined_once(tmp_path):
    for suffix in ("wav", "flac"):
        recording(tmp_path / "tree" / "anna" / f"a.{suffix}", suffix)
    opened = open_source(AudioFolder(name="c", path=str(tmp_path / "tree")))
    (group,) = opened.groups()
    tables = write_shard(Storage(str(tmp_path / "out")), "c", "train-00000", opened.read(group))
    assert tables.manifest["utterance_id"].to_pylist() == ["anna/a"]
    assert tables.quarantine["reason"].to_pylist() == ["duplicate_id"]


def test_a_folder_without_recordings_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="holds no .flac"):
        folder_contents(tmp_path)
