"""Phone times from every format: the same phones come out of all; what is malformed costs the utterance its phones only."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ray.data.alignments import Alignments, ctm_phones, textgrid_phones, timit_phones
from hubert_ray.errors import CorpusError
from hubert_ray.storage.filesystem import Storage

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.75
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.75
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 0.75
            text = "he said ""no"" 3"
    item [2]:
        class = "TextTier"
        name = "phones"
        xmin = 0
        xmax = 0.75
        points: size = 1
        points [1]:
            number = 0.5
            mark = "click"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.75
        intervals: size = 3
        intervals [1]:
            xmin = 0.0
            xmax = 0.25
            text = "" ! silence, "not" 5 intervals
        intervals [2]:
            xmin = 0.25
            xmax = 0.5
            text = "AH0"
        intervals [3]:
            xmin = 0.5
            xmax = 7.5e-1
            text = "spn"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
0.75
<exists>
1
"IntervalTier"
"anna - phones"
0
0.75
3
0
0.25
""
0.25
0.5
"AH0"
0.5
0.75
"spn"
"""
EXPECTED = [(0, 4000, ""), (4000, 8000, "AH0"), (8000, 12_000, "spn")]


def read(root: Path, place: str = "a/b", utterance_id: str = "b"):
    return Alignments(str(root)).read(place, utterance_id)


def write(root: Path, name: str, content: str | bytes) -> Path:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.mark.parametrize(
    "data",
    [
        LONG.encode(),
        SHORT.encode(),
        LONG.replace("\n", "\r\n").encode(),
        LONG.encode("utf-16"),
        SHORT.encode("utf-8-sig"),
        SHORT.replace('"ooTextFile"\nObject class = ', '"ooTextFile short"\n').encode(),
    ],
    ids=["long", "short", "carriage returns", "UTF-16", "byte order mark", "old short"],
)
def test_both_forms_of_textgrid_in_every_encoding(data):
    assert textgrid_phones(data) == EXPECTED


phones_of_ms = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 400), st.sampled_from(["AH0", "é", "a:", '"', "SIL", "spn", "t_h"])),
    min_size=1,
    max_size=12,
)


@given(phones_of_ms)
@settings(max_examples=60, deadline=None)
def test_every_format_gives_the_same_phones(steps):
    """With gaps between phones, for CTM and TIMIT; a TextGrid has its gaps as intervals without text."""
    phones, now = [], 0
    for gap, length, name in steps:
        now += gap
        phones.append((now, now + length, name))
        now += length
    expected = [(start * 16, end * 16, name) for start, end, name in phones]
    timit = "".join(f"{start} {end} {name}\n" for start, end, name in expected)
    assert timit_phones(timit.encode()) == expected
    ctm = [f"utt A {start / 1000:.3f} {(end - start) / 1000:.3f} {name} 0.9".encode() for start, end, name in phones]
    assert ctm_phones(ctm) == expected
    tier = "".join('{} {} "{}"\n'.format(s / 1000, e / 1000, name.replace('"', '""')) for s, e, name in phones)
    grid = f'"ooTextFile" "TextGrid" 0 {now / 1000} <exists> 1 "IntervalTier" "phones" 0 {now / 1000} {len(phones)}\n{tier}'
    assert textgrid_phones(grid.encode()) == expected


@pytest.mark.parametrize("name", ["a/b.TextGrid", "a/b.textgrid", "a/b.phn", "a/b.PHN", "x.ctm", "X.CTM"])
def test_the_format_is_found_by_what_lies_there(tmp_path, name):
    content = {
        ".textgrid": LONG,
        ".phn": "0 4000 sil\n4000 8000 AH0\n\n8000 12000 spn\n",
        ".ctm": "a 1 0 1 sil\nb 1 0 0.25 sil\nb 1 0.25 0.25 AH0_B\nb 1 0.5 0.25 spn\nc 1 0 1 T\n",
    }[Path(name).suffix.lower()]
    expected = [(0, 4000, "SIL"), (4000, 8000, "AH0"), (8000, 12_000, "spn")]
    assert read(write(tmp_path, name, content)) == (expected, None)
    assert read(tmp_path, "a/elsewhere", "elsewhere") == (None, None)
    if name.lower().endswith("ctm"):
        assert read(tmp_path / name) == (expected, None)


def test_silence_has_one_name_and_noise_keeps_its_own(tmp_path):
    write(tmp_path, "a/b.phn", "0 1 sil\n1 2 SP\n2 3 <eps>\n3 4 SIL\n4 5 spn\n5 6 +NSN+\n6 7 AH0\n")
    phones, _ = read(tmp_path)
    assert [name for *_, name in phones] == ["SIL"] * 4 + ["spn", "+NSN+", "AH0"]


def test_a_corpus_without_alignments():
    assert Alignments(None).read("a/b", "b") == (None, None)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_place_without_phone_times_is_an_error(tmp_path, place):
    write(tmp_path, "deep/er/notes.txt", "nothing")
    with pytest.raises(CorpusError, match=r"corpus\.alignments: "):
        Alignments(str(tmp_path / place))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("b.phn", "", "no phone in it"),
        ("b.phn", "0 320\n", "not enough values"),
        ("b.phn", "0 320 SIL more\n", "too many values"),
        ("b.phn", "0 0.5 SIL\n", "invalid literal"),
        ("b.phn", b"0 320 \xff\n", "codec can't decode"),
        ("b.phn", "-320 0 SIL\n", "times must rise"),
        ("b.phn", "0 320 SIL\n160 500 AH\n", "times must rise"),
        ("b.phn", "320 0 SIL\n", "times must rise"),
        ("b.phn", f"0 {2**31} SIL\n", "times must rise"),
        ("b.TextGrid", "", "found the end"),
        ("b.TextGrid", LONG[:-30], "found the end"),
        ("b.TextGrid", "ooBinaryFile\x08TextGrid", "found the end"),
        ("b.TextGrid", LONG.replace('"TextGrid"', '"PitchTier"'), "not a TextGrid"),
        (
            "b.TextGrid",
            SHORT.replace("phones", "letters"),
            "0 interval tiers named 'phones', expected one; it has anna",
        ),
        ("b.TextGrid", LONG.replace('"words"', '"phones"'), "2 interval tiers"),
        ("b.TextGrid", SHORT.replace("<exists>\n1", "<exists>\n1.5"), "expected how many"),
        ("b.TextGrid", SHORT.replace('0.5\n"AH0"', '"AH0"\n0.5'), "expected a number"),
        ("b.TextGrid", SHORT.replace('"AH0"', "AH0"), "expected a string"),
        ("b.TextGrid", SHORT.replace("0.25\n0.5", "0.1\n0.5"), "times must rise"),
        ("b.TextGrid", SHORT.replace("0.5\n0.75", "0.5\n1e99"), "no time in seconds"),
        ("x.ctm", "b 1 0 0.5\n", "expected lines of"),
        ("x.ctm", "b 1 0 0.5 A 1 2\n", "expected lines of"),
        ("x.ctm", "b 1 zero 0.5 A\n", "could not convert"),
        ("x.ctm", "b 1 0 nan A\n", "no time in seconds"),
        ("x.ctm", "b A 0 0.5 AH\nb B 0 0.5 AH\n", "more than one channel"),
        ("x.ctm", "b 1 0 0.5 AH\nb 1 0.2 0.5 AH\n", "times must rise"),
        ("x.ctm", "b 1 0 -0.5 AH\n", "times must rise"),
        ("x.ctm", b"b 1 0 0.5 \xff\n", "codec can't decode"),
        ("x.ctm", "b 1 0 0.5 AH\nc 1 0 0.5 AH\nb 1 0.5 0.5 T\n", "do not stand together"),
    ],
)
def test_a_malformed_alignment_costs_the_phones(tmp_path, name, content, says):
    write(tmp_path, name, content)
    phones, rejected = read(tmp_path, "b")
    assert phones is None
    assert (rejected.source, rejected.reason) == ("b", "bad_alignment")
    assert says in rejected.detail
    assert rejected.detail.endswith("; the audio is used without phones")


def test_ctm_files_are_read_by_utterance(tmp_path):
    """Comments, empty lines, ids that begin alike, a last line without its end, several files, and a file that changes."""
    write(tmp_path, "1.ctm", ";; made by hand\n\nb 1 0 0.01 A\n\n;; b 1 0 1 no\nb 1 0.01 0.01 B\nbb 1 0 0.01 C")
    write(tmp_path, "2.ctm", "c 1 0 0.01 D\n")
    assert read(tmp_path, utterance_id="b") == ([(0, 160, "A"), (160, 320, "B")], None)
    assert read(tmp_path, utterance_id="bb") == ([(0, 160, "C")], None)
    assert read(tmp_path, utterance_id="c") == ([(0, 160, "D")], None)
    assert read(tmp_path, utterance_id="d") == (None, None)
    write(tmp_path, "2.ctm", "b 1 0 0.01 D\nd 1 0 0.01 E\n")
    assert read(tmp_path, utterance_id="d") == ([(0, 160, "E")], None)
    assert "do not stand together" in read(tmp_path, utterance_id="b")[1].detail


def test_many_ctm_files_are_each_gone_through_once(tmp_path, monkeypatch):
    for number in range(20):
        lines = "".join(f"u{number}-{k} 1 0 0.01 P{k}\n" for k in range(3))
        write(tmp_path, f"{number:02d}.ctm", lines)
    opened: list[str] = []
    monkeypatch.setattr(Storage, "open", lambda self, path, real=Storage.open: opened.append(path) or real(self, path))
    alignments = Alignments(str(tmp_path))
    for number in range(20):
        for k in range(3):
            assert alignments.read("", f"u{number}-{k}") == ([(0, 160, f"P{k}")], None)
    assert alignments.read("", "nobody") == (None, None)
    assert len(opened) == 2 * 20  # once for the index, once for all lines of neighbours


def test_a_folder_without_alignments_is_listed_once(tmp_path, monkeypatch):
    write(tmp_path, "a/b.phn", "0 160 AH0\n")
    write(tmp_path, "c/1.txt", "")
    alignments, listed = Alignments(str(tmp_path)), []
    monkeypatch.setattr(Storage, "scan", lambda self, path, real=Storage.scan: listed.append(path) or real(self, path))
    for place in ("top", "top2", "c/1", "c/2", "c/3"):
        assert alignments.read(place, place) == (None, None)
    assert alignments.read("a/b", "b") == ([(0, 160, "AH0")], None)
    assert listed == ["", "c", "a"]


def test_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("hubert_ray.data.alignments._hash", lambda name: 7)
    write(tmp_path, "x.ctm", "b 1 0 0.01 A\nc 1 0 0.01 B\n")
    assert read(tmp_path, utterance_id="c") == ([(0, 160, "B")], None)
    assert read(tmp_path, utterance_id="d") == (None, None)
