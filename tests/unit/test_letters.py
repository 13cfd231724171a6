"""Are transcripts spelled in the paper's 29 symbols, and is what cannot be spelled refused?"""

import pickle

import pytest

from hubert_ray.asr.letters import ALPHABET, BLANK, SEPARATOR, UnspellableTextError, decode, encode, normalise


def test_the_alphabet_is_the_papers():
    assert len(ALPHABET) == len(set(ALPHABET)) == 29
    assert BLANK == 0 and ALPHABET[SEPARATOR] == "|"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,  world!\n", "HELLO WORLD"),
        ("don\u2019t `tis DON\u02bcT", "DON'T 'TIS DON'T"),
        ("twenty-one\u2014and \u201cmore\u201d\u2026", "TWENTY ONE AND MORE"),
        ("caf\u00e9 na\u00efve", "CAFE NAIVE"),
        ("stra\u00dfe", "STRASSE"),
        ("a ' b -- c", "A B C"),
        (" ?! ", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("room 101", ("0", "1")),
        ("\u043f\u0440\u0438\u0432\u0435\u0442 all", tuple(sorted("\u041f\u0420\u0418\u0412\u0415\u0422"))),
        ("5% off", ("%", "5")),
        ("[noise] yes", ("[", "]")),
        ("a|b", ("|",)),
        ("<unk>", ("<", ">")),
    ],
)
def test_text_that_cannot_be_spelled_is_refused_with_its_characters(text, characters):
    with pytest.raises(UnspellableTextError) as caught:
        normalise(text)
    assert caught.value.characters == characters
    assert text in str(caught.value) and "drop this transcript" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).characters == characters


def test_encode_closes_every_word():
    assert "".join(ALPHABET[i] for i in encode("IT'S ME")) == "IT'S|ME|"
    assert encode("") == []
    with pytest.raises(UnspellableTextError):
        encode("lower")


def test_decode_merges_repeats_before_it_drops_blanks():
    ids = {symbol: number for number, symbol in enumerate(ALPHABET)} | {"_": BLANK}
    assert decode(ids[c] for c in "__HHEE_LL_LLOO__||_|W_") == "HELLO W"
    assert decode([]) == decode([BLANK, SEPARATOR, SEPARATOR, BLANK]) == ""


def test_decode_returns_what_was_encoded():
    text = "ALL FEET ARE SPELLED"
    apart = [number for letter in encode(text) for number in (letter, BLANK)]
    assert decode(apart) == text
