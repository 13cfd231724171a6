"""Is the embedded corpus the same bytes every time, honest about phones and splits, clear when it cannot run?"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from hubert_ray.config.recipe import EmbeddedCorpus
from hubert_ray.data import sentences, synthetic
from hubert_ray.errors import CorpusError

CORPUS = EmbeddedCorpus(train_speakers=2, dev_speakers=1, test_speakers=1, utterances_per_speaker=6)
ARPABET_39 = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONES = {*ARPABET_39.split(), "SIL"}


@pytest.fixture(scope="module")
def utterances() -> list[synthetic.Utterance]:
    pytest.importorskip("espeakng_loader")
    return [made for speaker in synthetic.speakers(CORPUS) for made in synthetic.synthesise(speaker, CORPUS)]


def digest(utterances: list[synthetic.Utterance]) -> str:
    return hashlib.sha256(b"".join(made.flac + repr(made.phones).encode() for made in utterances)).hexdigest()


def test_a_speaker_is_the_same_bytes_again_and_without_the_others(utterances):
    last = synthetic.speakers(CORPUS)[-1]
    again = list(synthetic.synthesise(last, CORPUS))
    assert digest(again) == digest([made for made in utterances if made.speaker == last.id])


def test_a_speaker_is_the_same_bytes_in_another_process_and_in_a_smaller_corpus(utterances):
    script = """
import hashlib
from hubert_ray.config.recipe import EmbeddedCorpus
from hubert_ray.data import synthetic
corpus = EmbeddedCorpus(train_speakers=1, dev_speakers=0, test_speakers=0, utterances_per_speaker=6)
made = list(synthetic.synthesise(synthetic.speakers(corpus)[0], corpus))
print(hashlib.sha256(b"".join(one.flac + repr(one.phones).encode() for one in made)).hexdigest())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert found == digest([made for made in utterances if made.speaker == utterances[0].speaker])


def test_another_seed_is_another_corpus():
    other = EmbeddedCorpus(seed=1)
    voices = {(speaker.base, speaker.variant) for speaker in synthetic.speakers(EmbeddedCorpus())}
    assert voices.isdisjoint((speaker.base, speaker.variant) for speaker in synthetic.speakers(other))


def test_speakers_are_distinct_and_belong_to_one_split():
    corpus = EmbeddedCorpus()
    people = synthetic.speakers(corpus)
    assert len(people) == corpus.train_speakers + corpus.dev_speakers + corpus.test_speakers
    assert len({speaker.id for speaker in people}) == len(people)
    assert len({(speaker.base, speaker.variant) for speaker in people}) == len(people) >= 40
    assert len({speaker.base for speaker in people}) > 2
    assert not any("breath" in speaker.variant for speaker in people)


def test_more_speakers_leave_the_others_as_they_were():
    few = synthetic.speakers(CORPUS)
    many = {speaker.id: speaker for speaker in synthetic.speakers(EmbeddedCorpus(train_speakers=90))}
    assert all(many[speaker.id] == speaker for speaker in few)


def test_too_many_speakers_for_a_split_is_an_error():
    with pytest.raises(CorpusError, match="train_speakers"):
        synthetic.speakers(EmbeddedCorpus(train_speakers=10_001))


def test_sentences_are_thousands_and_no_split_shares_one():
    counts = {"train": 3000, "dev": 400, "test": 400}
    drawn = {split: set(sentences.sentences(split, count, np.random.default_rng(5))) for split, count in counts.items()}
    assert {split: len(texts) for split, texts in drawn.items()} == counts
    assert drawn["train"].isdisjoint(drawn["dev"] | drawn["test"]) and drawn["dev"].isdisjoint(drawn["test"])
    words = {word for texts in drawn.values() for text in texts for word in text.split()}
    assert words == set(sentences.vocabulary()) and 45 <= len(words) <= 60
    assert all(4 <= len(text.split()) <= 9 for texts in drawn.values() for text in texts)
    assert all(re.fullmatch(r"[A-Z']+( [A-Z']+)*", text) for texts in drawn.values() for text in texts)
    assert not any(re.search(r"\bA [AEIOU]|\bAN [^AEIOU]", text) for texts in drawn.values() for text in texts)


def test_audio_is_16_khz_mono_16_bit_long_enough_and_not_clipped(utterances):
    for made in utterances:
        wave, rate_hz = soundfile.read(io.BytesIO(made.flac), dtype="int16")
        info = soundfile.info(io.BytesIO(made.flac))
        assert (rate_hz, info.channels, info.subtype, len(wave)) == (16_000, 1, "PCM_16", made.samples)
        assert 2.1 <= made.samples / rate_hz <= 6.0
        assert 1000 < np.abs(wave.astype(int)).max() < 32767


def test_utterances_are_named_as_in_librispeech_and_hold_their_splits_sentences(utterances):
    assert len({made.utterance_id for made in utterances}) == len(utterances) == 24
    for made in utterances:
        assert re.fullmatch(rf"{made.speaker}-0-\d{{4}}", made.utterance_id)
        assert sentences.split_of(made.text) == made.split


def test_phones_are_contiguous_fill_the_audio_and_say_the_text(utterances):
    for made in utterances:
        starts, ends, labels = zip(*made.phones, strict=True)
        assert starts[0] == 0 and ends[-1] == made.samples and starts[1:] == ends[:-1]
        assert all(start < end for start, end, _ in made.phones)
        assert set(labels) <= PHONES
        assert labels[0] == labels[-1] == "SIL"
        assert not any(before == after == "SIL" for before, after in pairwise(labels))
    text = next(made for made in utterances if "FATHER" in made.text.split())
    assert "F AA DH ER" in " ".join(label for _, _, label in text.phones)


def test_silence_is_quiet_and_scarce(utterances):
    silent = sum(end - start for made in utterances for start, end, label in made.phones if label == "SIL")
    assert silent / sum(made.samples for made in utterances) < 0.2
    for made in utterances:
        wave, _ = soundfile.read(io.BytesIO(made.flac))
        _, end, _ = made.phones[0]
        assert np.sqrt(np.mean(wave[:end] ** 2)) < 0.2 * np.sqrt(np.mean(wave**2))


@pytest.mark.parametrize("base", ["gmw/en-US", "gmw/en", "gmw/en-GB-x-rp", "gmw/en-GB-scotland"])
def test_every_word_has_phone_labels_in_every_accent(base):
    pytest.importorskip("espeakng_loader")
    speaker = dataclasses.replace(synthetic.speakers(CORPUS)[0], base=base)
    met = sentences.sentences("train", 60, np.random.default_rng(9))  # words beside words: links and flaps
    replies = list(synthetic._speak(speaker, [*sentences.vocabulary(), *met]))
    seen = {label for header, _ in replies for _, label in header["phones"]}
    assert seen == PHONES


def test_a_tone_comes_through_the_resampler_in_place():
    seconds, hz = 0.5, 1000.0
    dry = np.sin(2 * np.pi * hz * np.arange(int(22_050 * seconds)) / 22_050)
    wet = synthetic._resample(dry, 22_050)
    expected = np.sin(2 * np.pi * hz * np.arange(len(wet)) / 16_000)
    assert abs(len(wet) - 16_000 * seconds) <= 1
    assert np.abs(wet - expected)[200:-200].max() < 2e-3
    alias = np.sin(2 * np.pi * 9_500.0 * np.arange(int(22_050 * seconds)) / 22_050)
    assert np.abs(synthetic._resample(alias, 22_050)[200:-200]).max() < 1e-2


def test_the_tree_is_laid_out_as_librispeech(tmp_path):
    pytest.importorskip("espeakng_loader")
    corpus = EmbeddedCorpus(train_speakers=1, dev_speakers=1, test_speakers=0, utterances_per_speaker=2)
    synthetic.write_librispeech_tree(corpus, tmp_path)
    train, dev = synthetic.speakers(corpus)
    for speaker, subset in ((train, "train-synthetic"), (dev, "dev-synthetic")):
        chapter = tmp_path / subset / speaker.id / "0"
        made = list(synthetic.synthesise(speaker, corpus))
        assert (chapter / f"{speaker.id}-0.trans.txt").read_text() == "".join(
            f"{one.utterance_id} {one.text}\n" for one in made
        )
        for one in made:
            assert (chapter / f"{one.utterance_id}.flac").read_bytes() == one.flac
            alignment = tmp_path / "alignments" / subset / speaker.id / "0" / f"{one.utterance_id}.phn"
            rows = [line.split() for line in alignment.read_text().splitlines()]
            assert [(int(start), int(end), label) for start, end, label in rows] == one.phones


def test_a_missing_extra_says_what_to_install(monkeypatch):
    python, *script = synthetic._ESPEAK_COMMAND
    monkeypatch.setattr(synthetic, "_ESPEAK_COMMAND", (python, "-S", *script))  # -S: no site-packages
    with pytest.raises(CorpusError, match=r"found none.*expected.*pip install hubert-ray\[demo\]"):
        list(synthetic.synthesise(synthetic.speakers(CORPUS)[0], CORPUS))


def test_an_unknown_voice_is_an_error_that_names_it():
    pytest.importorskip("espeakng_loader")
    speaker = dataclasses.replace(synthetic.speakers(CORPUS)[0], base="gmw/none")
    with pytest.raises(CorpusError, match="gmw/none"):
        list(synthetic.synthesise(speaker, CORPUS))
