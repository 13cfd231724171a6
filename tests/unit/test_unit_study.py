"""The parts of the studies without Ray: cells are pure, features are taken once, audio is drawn as is said; tables and plots."""

from __future__ import annotations

import io
import xml.etree.ElementTree
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from hubert_ray.config.recipe import Kmeans, Mfcc
from hubert_ray.data.audio import decode
from hubert_ray.data.shards import WHOLE, AudioReader, Manifest, RawUtterance, write_shard
from hubert_ray.stages.charts import Axis, Series, draw_lines, svg_file
from hubert_ray.stages.layers import choose
from hubert_ray.stages.unit_study import (
    Cell,
    Facts,
    _gib,
    _Measure,
    _parts,
    audio,
    drawn,
    markdown_table,
    mfcc_features,
)
from hubert_ray.storage import schemas
from hubert_ray.storage.filesystem import Storage
from hubert_ray.units import kmeans
from hubert_ray.units.features import MfccExtractor
from hubert_ray.units.quality import PhoneCounts
from tests.corpora import whole_manifest, write_corpus

TONES = {"A": 300.0, "B": 900.0, "C": 2500.0}
PATH = "corpora/tones"


def utterance(number: int, aligned: bool, tones: int) -> tuple[bytes, list[tuple[int, int, str]] | None]:
    """Three tones, a tenth of a second each, in an order of their own."""
    rng = np.random.default_rng(number)
    names = [list(TONES)[place] for place in rng.integers(0, 3, tones)]
    time_S = np.arange(1600) / 16_000
    wave_S = np.concatenate([0.3 * np.sin(2 * np.pi * TONES[name] * time_S) for name in names])
    buffer = io.BytesIO()
    soundfile.write(buffer, wave_S + 0.003 * rng.standard_normal(len(wave_S)), 16_000, format="FLAC")
    return buffer.getvalue(), [(1600 * n, 1600 * (n + 1), name) for n, name in enumerate(names)] if aligned else None


def made(storage: Storage, splits: dict[str, tuple[int, bool]], tones: int = 10) -> Manifest:
    """A corpus of so many utterances a split, aligned or not."""
    utterances = []
    for split, (count, aligned) in splits.items():
        for n in range(count):
            flac, phones = utterance(len(utterances), aligned, tones)
            utterances.append(RawUtterance(f"{split}-{n}", "s", split, "flac", flac, None, phones))
    shards = {f"{split}-00000": [raw for raw in utterances if raw.split == split] for split in splits}
    tables = {shard: write_shard(storage, PATH, shard, raws).manifest for shard, raws in shards.items()}
    write_corpus(storage, PATH, tables)
    return Manifest(pa.concat_tables(tables.values()))


@pytest.fixture
def storage(tmp_path) -> Storage:
    storage = Storage(str(tmp_path))
    made(storage, {"train": (12, True), "dev": (5, True), "test": (2, True)})
    return storage


def facts(storage: Storage, cells: list[Cell]) -> list[Facts]:
    named = [(cell, f"cells/{n}.json") for n, cell in enumerate(cells)]
    _Measure(storage, PATH, [named])("0")
    return [msgspec.json.decode(storage.read(file), type=Facts) for _, file in named]


def test_a_cell_is_what_its_parts_give(storage):
    """Against features, fit, labels and counts made one by one."""
    cell = Cell(mfcc_features(Mfcc()), 4, 100.0, 100.0, seed=3)
    (found,) = facts(storage, [cell])
    manifest, reader, extract = whole_manifest(storage, PATH), AudioReader(storage, PATH), MfccExtractor()

    def frames(split):
        return extract([decode(reader.read(r["shard"], r["offset"], r["size"])) for r in split.table.to_pylist()])

    train_ND = np.concatenate(frames(manifest.split("train")))
    fit = kmeans.fit(train_ND, 4, Kmeans(clusters=4, seed=3))
    counts = PhoneCounts(4)
    for frames_FD, phones in zip(
        frames(manifest.split("dev")), manifest.split("dev").table["phones"].to_pylist(), strict=True
    ):
        counts.add(phones, kmeans.assign(frames_FD, fit.centroids_KD)[0], 100)
    assert found.quality == counts.quality()
    assert (found.clusters, found.frames) == (4, len(train_ND))
    assert found.inertia == pytest.approx(kmeans.partial(train_ND, fit.centroids_KD).inertia / len(train_ND))
    assert found.quality.pnmi > 0.8  # tones


def test_cells_do_not_depend_on_what_they_are_measured_with(storage, monkeypatch):
    """Of one part or alone, in any order; and each utterance's features are taken once for all of them."""
    taken = []
    original = MfccExtractor.__call__
    monkeypatch.setattr(
        MfccExtractor, "__call__", lambda self, waves: taken.append(len(waves)) or original(self, waves)
    )
    cells = [Cell(mfcc_features(Mfcc()), k, s, 9.0, seed) for k in (3, 5) for s in (4.0, 9.0) for seed in (0, 1)]
    together = facts(storage, cells)
    assert sum(taken) == 9 + 5
    assert facts(storage, cells[::-1])[::-1] == together
    assert [facts(storage, [cell])[0] for cell in cells] == together


def test_seeds_draw_the_audio_of_smaller_amounts_only(storage):
    """Pools end with the utterance that fills them: 8.5 s are 9 utterances of a second."""
    cells = [Cell(mfcc_features(Mfcc()), 1, seconds, 8.5, seed) for seconds in (4.0, 8.5) for seed in range(4)]
    found = facts(storage, cells)
    assert [f.frames for f in found] == [4 * 98] * 4 + [9 * 98] * 4
    assert len({f.inertia for f in found[:4]}) == 4
    assert len({f.inertia for f in found[4:]}) == 1


def test_as_many_clusters_as_the_audio_suffices_for(storage):
    assert facts(storage, [Cell(mfcc_features(Mfcc()), 500, 1.0, 1.0)])[0].clusters == 9


def test_drawn_utterances_just_reach_the_amount():
    samples_U = np.random.default_rng(0).integers(16_000, 160_000, 200)
    for seconds in (0.5, 30.0, 200.0):
        rows = drawn(samples_U, seconds, seed=1)
        assert list(rows) == sorted(set(rows))
        assert samples_U[rows].sum() >= seconds * 16_000
        assert samples_U[rows].sum() - 160_000 < seconds * 16_000
    assert list(drawn(samples_U, 1e9, 0)) == list(range(200))
    assert list(drawn(samples_U, 30.0, 1)) != list(drawn(samples_U, 30.0, 2))


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": (3, True), "dev": (2, True)}, {"dev"}),
        ({"train": (3, True), "dev": (2, False)}, {"train"}),
        ({"train": (3, False), "dev": (2, False)}, {"dev"}),
        ({"train": (3, False)}, {"train"}),
    ],
)
def test_units_are_scored_on_dev_where_it_can_be(tmp_path, splits, expected):
    storage = Storage(str(tmp_path))
    made(storage, splits)
    train, scored = audio(storage, PATH, 1e9)
    assert (set(train.table["split"].to_pylist()), set(scored.table["split"].to_pylist())) == ({"train"}, expected)
    assert len(train) == 3


def test_only_the_parts_of_drawn_utterances_are_read(tmp_path, monkeypatch):
    """A study of an hour must not cost what the corpus does, in any of its workers."""
    storage, usual = Storage(str(tmp_path)), {"speaker": "s", "offset": 0, "size": 1, "sample_rate_hz": 16_000} | WHOLE
    said = {False: None, True: [{"start": 0, "end": 16_000, "phone": "A"}]}
    tables = {}
    for shard, aligned in [(f"{split}-{n:05d}", n % 2) for split in ("dev", "train") for n in range(100)]:
        row = usual | {"split": shard[:-6], "shard": shard, "samples": 16_000, "phones": said[bool(aligned)]}
        rows = [row | {"utterance_id": f"{shard}-{n}"} for n in range(4)]
        rows[0]["phones"] = None
        tables[shard] = pa.Table.from_pylist(rows, schema=schemas.MANIFEST)
    write_corpus(storage, PATH, tables)
    read, decoded = [], schemas.decode
    monkeypatch.setattr(schemas, "decode", lambda *part: read.append(1) or decoded(*part))
    train, scored = audio(storage, PATH, 10.0)
    assert len(train) == len(scored) == 10
    assert not scored.table["phones"].null_count
    assert all(int(shard[-5:]) % 2 for shard in scored.shards())
    assert len(read) <= 10 + 30
    again = audio(storage, PATH, 10.0)
    assert (again[0].table, again[1].table) == (train.table, scored.table)


def test_features_of_other_settings_have_another_name():
    settings = [Mfcc(), Mfcc(splice=3), Mfcc(derivatives=(0,)), Mfcc(splice=3, derivatives=(0,))]
    assert [mfcc_features(s).name for s in settings] == [
        "MFCC",
        "MFCC splice=3",
        "MFCC derivatives=[0]",
        "MFCC splice=3 derivatives=[0]",
    ]


def test_without_phones_labels_alone_are_scored(tmp_path):
    storage = Storage(str(tmp_path))
    made(storage, {"train": (4, False), "dev": (2, False)}, tones=20)
    (found,) = facts(storage, [Cell(mfcc_features(Mfcc()), 3, 9.0, 9.0)])
    assert found.quality is None
    assert found.predictability != 0


def test_parts_hold_every_cell_once_and_features_together():
    one, other = mfcc_features(Mfcc()), replace(mfcc_features(Mfcc()), name="other")
    cells = [Cell(f, 10, 60.0, 60.0, seed) for f in (one, other) for seed in range(5)]
    for workers, parts in ((1, 2), (2, 2), (3, 2), (4, 4), (9, 8), (50, 10)):
        found = _parts(cells, workers)
        assert len(found) == parts
        assert sorted((c for part in found for c in part), key=cells.index) == cells
        assert all(len({cell.features for cell in part}) == 1 for part in found)
    assert _parts([], 4) == []


def test_memory_is_that_of_the_frames():
    cells = [Cell(mfcc_features(Mfcc()), 10, hours * 3600, 36_000.0) for hours in (1, 2, 10)]
    assert _gib(cells) * 2**30 == (10 + 10 + 2) * 3600 * 100 * 39 * 4


# --- what is made of them ---------------------------------------------------------------------------------------------


def row(layer: int, clusters: int, pnmi: float | None, predictability: float = 0.1) -> dict:
    return {"model": "m", "layer": layer, "clusters": clusters, "pnmi": pnmi, "predictability": predictability}


def test_the_fewest_clusters_that_do_nearly_as_well_are_chosen():
    rows = [
        row(1, 50, 0.60),
        row(2, 50, 0.50),
        row(1, 100, 0.66),
        row(2, 100, 0.67),
        row(1, 500, 0.68),
        row(2, 500, 0.70),
    ]
    assert choose(rows) == row(2, 100, 0.67)
    assert choose([*rows, row(3, 500, 0.80)]) == row(3, 500, 0.80)
    assert choose(rows[:1]) == rows[0]


def test_without_phones_the_labels_choose():
    rows = [row(1, 50, None, 0.1), row(2, 50, None, 0.3), row(1, 100, None, 0.31), row(2, 100, None, 0.2)]
    assert choose(rows) == row(2, 50, None, 0.3)
    assert choose([row(1, 50, None, -0.1), row(1, 100, None, -0.01)]) == row(1, 100, None, -0.01)


def test_tables_are_markdown():
    text = markdown_table(["features", "K"], [["MFCC", "100"], ["iter1 layer 3", "50"]])
    assert text.splitlines() == [
        "| features      |   K |",
        "|---------------|----:|",
        "| MFCC          | 100 |",
        "| iter1 layer 3 |  50 |",
    ]


def test_plots_are_whole_svg_files():
    axis = Axis("x")
    lines = [draw_lines(f"A < {n}", [Series("s & t", [(0, 1), (1, 2)], dots=True)], axis, axis) for n in range(3)]
    root = xml.etree.ElementTree.fromstring(svg_file([*lines, draw_lines("nothing", [], axis, axis)]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text.startswith("A <")] == ["A < 0", "A < 1", "A < 2"]
    assert texts.count("s & t") == 3
    groups = [g.get("transform") for g in root if g.tag.endswith("}g")]
    tops = [float(t.split(",")[1][:-1]) for t in groups]
    assert all(below - above > 200 for above, below in pairwise(tops))
    assert float(root.get("height")) > tops[-1] + 200
