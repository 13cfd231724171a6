"""Does the report page show a run's numbers, survive what is missing, and load nothing?"""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from hubert_ray.stages.charts import (
    MOST_POINTS,
    Axis,
    Bar,
    Series,
    grouped_bars,
    heat_map,
    line_chart,
    nice_ticks,
    thin,
)
from hubert_ray.stages.report_numbers import duration, number, percent, size
from hubert_ray.stages.report_page import render, word_differences

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "circle", "rect"}
PHONES = ["AA","AE","AH","AO","AW","AY","B","CH","D","DH","EH","ER","EY","F","G","HH","IH","IY","K","L","M","N","NG","OW","P","R","S","SH","SIL","T","TH","UW","V","W","Y","Z"]  # fmt: skip
STEPS = range(0, 1501, 25)


class Page(HTMLParser):
    """Checks that tags nest, and collects classes, addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.classes: list[list[str]] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.classes.append((dict(attrs).get("class") or "").split())
        self.addresses += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data", "action"}
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, look: str) -> int:
        return sum(look in classes for classes in self.classes)


def _iteration(name: str, teacher: str, rate_hz: int, pnmi: float, floor: float) -> dict[str, Any]:
    units = 100
    wiggle = [0.06 * math.sin(step * 1.7) for step in STEPS]
    learned = [1 - math.exp(-step / 420) for step in STEPS]
    share = []
    for unit in range(units):
        main = unit * len(PHONES) // units
        near = {
            main: 0.62 + 0.3 * math.sin(unit * 2.3) ** 2,
            (main + 7 + unit % 5) % len(PHONES): 0.11,
            (main + 1) % len(PHONES): 0.06,
        }
        share.append([near.get(phone, 0.001) for phone in range(len(PHONES))])
    curve = [
        {
            "step": step,
            "loss_bits": 6.7 - (6.7 - floor) * got + noise,
            "masked_accuracy": 0.04 + 0.33 * got + noise / 9,
            "unmasked_accuracy": 0.05 + 0.52 * got - noise / 9,
            "lr": 5e-4 * min(step / 120, (1500 - step) / 1380),
            "audio_seconds_per_second": 61 + 40 * noise,
        }
        for step, got, noise in zip(STEPS, learned, wiggle, strict=True)
    ]
    return {
        "name": name,
        "teacher": teacher,
        "clusters": units,
        "frame_rate_hz": rate_hz,
        "codebook": {"inertia_history": [1410 + 390 * math.exp(-i / 4) for i in range(20)], "frames": 812_400, "empty_clusters": 0},
        "quality": {"pnmi": pnmi, "phone_purity": pnmi + 0.07, "cluster_purity": pnmi / 3.1, "frames": 64_200},
        "unit_by_phone": {"phones": PHONES, "units": [(unit * 37) % 100 for unit in range(units)], "share": share},
        "layers": [
            {
                "layer": layer,
                "trained": {"pnmi": pnmi + 0.02 + 0.05 * layer - 0.009 * layer**2, "phone_purity": 0.5, "cluster_purity": 0.1},
                "untrained": {"pnmi": 0.31 - 0.018 * layer, "phone_purity": 0.4, "cluster_purity": 0.1},
            }
            for layer in range(5)
        ],
        "pretrain": {
            "steps": 1500, "loss_bits_first": 6.71, "loss_bits_last": curve[-1]["loss_bits"], "unigram_entropy_bits": 6.18,
            "masked_accuracy": curve[-1]["masked_accuracy"], "unmasked_accuracy": curve[-1]["unmasked_accuracy"],
            "majority_share": 0.043, "audio_seconds_per_second": 61.3, "parameters": 1_942_180, "curve": curve,
        },
    }  # fmt: skip


def _trial(index: int, start: str, peak_lr: float, dev_wer: float) -> dict[str, Any]:
    stopped = index in {3, 7}
    steps = range(50, 301 if stopped else 801, 50)
    curve = [{"step": s, "dev_wer": dev_wer + (1 - dev_wer) * math.exp(-s / 160)} for s in steps]
    return {
        "id": f"{index % 4:03d}", "start": start, "peak_lr": peak_lr, "freeze_share": 0.25 * (index % 2), "mask_prob": 0.05,
        "steps": steps[-1], "stopped_early": stopped, "dev_wer": dev_wer, "curve": curve,
    }  # fmt: skip


def full_report() -> dict[str, Any]:
    """A made-up demo run, as the report stage writes it."""
    trials = [_trial(i, "pretrained", 10**-3.5 * (1 + i), 0.171 + 0.031 * ((i * 3) % 4)) for i in range(4)]
    trials += [_trial(i, "scratch", 10**-3.5 * (i - 3), 0.492 + 0.043 * ((i * 3 + 1) % 4)) for i in range(4, 8)]
    names = [
        "prepare_data",
        "iter1/learn_kmeans",
        "iter1/assign_labels",
        "iter1/pretrain",
        "iter2/learn_kmeans",
        "iter2/assign_labels",
    ]
    names += ["iter2/pretrain", "finetune/pretrained", "finetune/scratch", "decode", "report"]
    lengths = [38.2, 21.4, 12.9, 412.6, 29.8, 24.1, 433.0, 201.7, 100.0, 88.4, 6.3]
    stages, clock = [], 0.0
    for name, seconds in zip(names, lengths, strict=True):
        started = f"2026-03-14T09:{26 + int(clock // 60):02d}:{int(clock % 60):02d}+00:00"
        stages.append(
            {
                "name": name,
                "seconds": seconds,
                "started": started,
                "peak_memory_gib": 1.1 + seconds / 200,
                "skipped": name == "prepare_data",
            }
        )
        clock += seconds + 2
    split = {"utterances": 2400, "hours": 2.98, "speakers": 24, "transcribed": 2400, "aligned": 2400}
    small = {"utterances": 200, "hours": 0.251, "speakers": 6, "transcribed": 200, "aligned": 200}
    return {
        "run": "demo-two-iterations", "recipe": {"name": "demo", "seed": 7, "iterations": [{"teacher": "mfcc", "clusters": 100}]},
        "fingerprint": "b7c1d0f2a94e", "created": "2026-03-14T09:49:58+00:00", "seconds_total": 1388.4,
        "versions": {"hubert_ray": "0.1.0", "torch": "2.11.0", "ray": "2.60.0", "faiss": "1.15.1", "python": "3.12.3"},
        "hardware": {"cpus": 2, "gpus": 0, "memory_gib": 23.5, "cpu_model": "Example CPU at 2.6 GHz"},
        "corpus": {
            "name": "synthetic", "splits": {"train": split, "dev": small, "test": dict(small, utterances=210)},
            "quarantined": [{"reason": "shorter than 0.5 s", "count": 3}, {"reason": "no samples", "count": 1}],
            "shards": 12, "bytes": 402_653_184,
        },
        "stages": stages,
        "iterations": [_iteration("iter1", "mfcc", 100, 0.412, 4.4), _iteration("iter2", "iter1 layer 3", 50, 0.534, 3.6)],
        "finetune": {"label_seconds": 600.0, "trials": trials, "best": {"pretrained": trials[0], "scratch": trials[4]}},
        "decode": {
            "lm_weight": {"pretrained": 1.4, "scratch": 2.2}, "word_score": {"pretrained": -0.6, "scratch": 0.3},
            "ngram_order": 3, "lm_perplexity_dev": 41.7,
        },
        "wer": {"greedy": {"pretrained": 0.178, "scratch": 0.512}, "lm": {"pretrained": 0.094, "scratch": 0.383}},
        "cer": {"greedy": {"pretrained": 0.058, "scratch": 0.214}, "lm": {"pretrained": 0.041, "scratch": 0.197}},
        "examples": [
            {
                "utterance_id": "test-spk03-0017", "reference": "the old boat drifts slowly past the white stone bridge",
                "hypotheses": {
                    "pretrained greedy": "the old bote drifts slowly past the white stone bridge",
                    "pretrained lm": "the old boat drifts slowly past the white stone bridge",
                    "scratch greedy": "the ol bot drif slowly the wite ston a bridge",
                    "scratch lm": "the old boat slowly past the white a stone bridge",
                },
            },
            {
                "utterance_id": "test-spk05-0102", "reference": "seven green birds sang over the river at dawn",
                "hypotheses": {
                    "pretrained greedy": "seven green birds sang over the rivver at dawn",
                    "pretrained lm": "seven green birds sang over the river at dawn",
                    "scratch greedy": "sev gren bird sang ofer a river dawn", "scratch lm": "seven green bird sang over a river at the dawn",
                },
            },
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def full_page() -> Page:
    return Page(render(full_report()))


def test_key_numbers_are_on_the_page(full_page: Page) -> None:
    for expected in ["9.4%", "38.3%", "17.8%", "23 min 08 s", "1.94 M", "10 min of transcribed", "75% fewer word errors", "PNMI of the units +0.122",
                     "0.534", "3 × shorter than 0.5 s", "384 MiB", "6 min 53 s", "b7c1d0f2a94e", "2.60.0", "3-gram", "23.5 GiB"]:  # fmt: skip
        assert expected in full_page.text, expected


def test_nothing_is_loaded_or_run(full_page: Page) -> None:
    assert all(address.startswith("#") for address in full_page.addresses)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(full_page.tags)
    html = render(full_report())
    assert not re.search(r"https?://|url\(|@import|\son\w+=", html)


def test_every_link_of_the_contents_leads_somewhere() -> None:
    html = render(full_report())
    for target in re.findall(r'href="#([^"]+)"', html):
        assert f'id="{target}"' in html


def test_hostile_text_is_escaped_wherever_it_stands() -> None:
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'>"
    report = full_report()
    report["run"] = report["fingerprint"] = report["corpus"]["name"] = report["hardware"]["cpu_model"] = evil
    report["recipe"]["note"] = report["versions"]["torch"] = report["stages"][2]["name"] = evil
    report["iterations"][0]["name"] = report["iterations"][0]["teacher"] = evil
    report["iterations"][0]["unit_by_phone"]["phones"] = [evil, *PHONES[1:]]
    report["finetune"]["trials"][0]["id"] = report["finetune"]["trials"][0]["start"] = evil
    report["examples"][0]["reference"] = evil + " one"
    report["examples"][0]["hypotheses"]["scratch lm"] = evil + " two"
    html = render(report)
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;" in html
    assert not {"script", "img"} & set(Page(html).tags)


@pytest.mark.parametrize("missing", sorted(full_report()))
@pytest.mark.parametrize("how", ["absent", "null"])
def test_any_part_may_be_missing(missing: str, how: str) -> None:
    report = full_report()
    report.pop(missing) if how == "absent" else report.update({missing: None})
    assert "h1" in Page(render(report)).tags  # Page itself refuses what is not well-formed


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [found for key, child in children for found in [(*path, key), *_paths(child, (*path, key))]]


def test_any_value_at_any_depth_may_be_null() -> None:
    report = full_report()
    for iteration in report["iterations"]:  # short curves: this test renders a hundred pages
        iteration["pretrain"]["curve"] = iteration["pretrain"]["curve"][:3]
        iteration["unit_by_phone"] = {"phones": ["AA"], "units": [0], "share": [[1.0]]}
    paths = [p for p in _paths(report) if "unit_by_phone" not in p[:-1] and not isinstance(p[-1], int)]
    assert len(paths) > 80
    for path in paths:
        partial = copy.deepcopy(report)
        parent = partial
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = None
        try:
            render(partial)
        except Exception as error:
            raise AssertionError(f"null at {path}") from error


def test_a_pretraining_run_has_no_transcription_sections() -> None:
    report = full_report() | {"finetune": None, "decode": None, "wer": None, "cer": None, "examples": []}
    page = Page(render(report))
    assert "PNMI of the last units" in page.text and "0.534" in page.text
    for absent in ("Fine-tuning", "Error rates", "Examples", "CTC", "word errors", "None", "nan"):
        assert absent not in page.text, absent


def test_without_phones_there_is_no_quality() -> None:
    report = full_report()
    for iteration in report["iterations"]:
        iteration |= {"quality": None, "unit_by_phone": None, "layers": None}
    page = Page(render(report))
    assert "purity" not in page.text and "PNMI" not in page.text and "Units compared" not in page.text
    assert "bits below unigram entropy" in page.text


def test_streams_are_shown_side_by_side() -> None:
    report = full_report()
    first = report["iterations"][0]
    share = [[1.0] * len(PHONES)] * 3
    first["streams"] = [
        {"clusters": clusters, "codebook": dict(first["codebook"], empty_clusters=5), "quality": first["quality"] | {"pnmi": pnmi},
         "unit_by_phone": {"phones": PHONES, "units": [0, 1, 2], "share": share}, "unigram_entropy_bits": 6.18, "majority_share": 0.043}
        for clusters, pnmi in ((50, 0.377), (100, 0.399))
    ]  # fmt: skip
    first |= {"clusters": [50, 100]}
    del first["codebook"], first["unit_by_phone"]
    page = Page(render(report))
    for expected in ("50 + 100 units", "2 label streams", "0.377", "0.399", "Which phone a unit stands for, stream 2"):
        assert expected in page.text, expected
    assert page.count("cell") == 2 * 3 * len(PHONES) + 100 * 3
    plain = Page(render(full_report()))
    assert page.count("hit") == plain.count("hit") + 20, "the inertia of one more stream"
    assert "label streams" not in plain.text


def test_without_scratch_only_pretrained_is_compared() -> None:
    report = full_report()
    report["wer"] = {"greedy": {"pretrained": 0.178, "scratch": None}, "lm": {"pretrained": 0.094, "scratch": None}}
    page = Page(render(report))
    assert "9.4%" in page.text and "from scratch" not in page.text


def test_a_run_that_learned_nothing_is_not_praised() -> None:
    report = full_report()
    report["iterations"][0]["pretrain"] |= {"loss_bits_last": 6.5, "masked_accuracy": 0.02}
    report["wer"]["lm"] = {"pretrained": 0.6, "scratch": 0.5}
    page = Page(render(report))
    assert "loss 0.32 bits above unigram entropy" in page.text and "20% more word errors" in page.text
    assert page.count("no") == 3


def test_an_empty_report_is_still_a_page() -> None:
    assert "Unnamed run" in Page(render({})).text


def test_a_paused_run_is_laid_end_to_end() -> None:
    report = full_report()
    assert "laid end to end" not in Page(render(report)).text
    report["stages"][0]["started"] = "2026-03-01T09:00:00+00:00"
    assert "laid end to end" in Page(render(report)).text


def test_charts_draw_every_point_once() -> None:
    line = Series("a", [(0, 1.0), (1, 2.0), (2, None), (3, float("nan")), (4, 3.0)])
    chart = line_chart("t", [line, Series("b", [(0, 1.0), (4, 2.0)], "c2")], Axis("x"), Axis("y"))
    assert chart.count('class="hit') == 3 + 2
    path = re.search(r'class="line c1" d="([^"]+)"', chart).group(1)
    assert path.count("M") == 2 and path.count("L") == 1  # the gap lifts the pen
    bars = grouped_bars("t", [("g", [Bar("a", 0.5), Bar("b", None)]), ("h", [Bar("a", 0.0)])], Axis("x"))
    assert bars.count("<rect") == 2
    assert heat_map("t", ["p", "q"], [5, 9, 2], [[1, 0], [0.5, 0.5], [0, 0.001]]).count("<rect") == 3


def test_charts_of_the_page_have_the_curves_points(full_page: Page) -> None:
    curves = 2 * (5 * len(STEPS) + 20 + 2 * 5)  # loss, two accuracies, lr, speed; inertia; two kinds of layers
    trials = sum(len(trial["curve"]) for trial in full_report()["finetune"]["trials"])
    assert full_page.count("hit") == curves + trials
    assert full_page.count("cell") == 2 * 100 * 3


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", [Series("a", [(0, None)])], Axis("x"), Axis("y")) == ""
    assert grouped_bars("t", [("g", [Bar("a", None)])], Axis("x")) == ""


def test_thinning_keeps_ends_spikes_and_gaps() -> None:
    points: list[tuple[float, float | None]] = [(step, 1.0) for step in range(10_000)]
    points[4321] = (4321, 99.0)
    points[6000:6400] = [(step, None) for step in range(6000, 6400)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert kept[0] == points[0] and kept[-1] == points[-1] and (4321, 99.0) in kept
    assert any(value is None for _, value in kept)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.012, 0.087), (-3, 17), (5, 5), (0, 0), (1e-9, 4e-9), (0, 86400)])
def test_ticks_are_few_and_cover(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 9 and ticks[0] <= low and ticks[-1] >= high
    assert ticks == sorted(set(ticks))


def test_a_mismatched_heat_map_says_so() -> None:
    with pytest.raises(AssertionError, match="1 lists of shares for 2 units"):
        heat_map("t", ["p"], [1, 2], [[1.0]])


def test_numbers_are_written_with_their_units() -> None:
    assert [duration(s) for s in (0, 0.84, 38.2, 60, 725, 3599.8, 8040, 273_600)] == [
        "0 s", "0.84 s", "38.2 s", "1 min", "12 min 05 s", "1 h", "2 h 14 min", "3 d 04 h",
    ]  # fmt: skip
    assert [number(v) for v in (1234567, 0.5344, 12.34, 0.0003162, None, float("nan"), 0.0)] == [
        "1,234,567", "0.534", "12.3", "0.00032", "–", "–", "0.000",
    ]  # fmt: skip
    assert percent(0.0937) == "9.4%" and percent(None) == "–" and size(402_653_184) == "384 MiB"


def test_word_differences_name_what_was_said() -> None:
    assert word_differences("a b c d", "a x c d e") == [
        ("equal", "a", "a"), ("replace", "x", "b"), ("equal", "c d", "c d"), ("insert", "e", ""),
    ]  # fmt: skip


def test_one_best_trial_of_each_start_although_their_numbers_repeat():
    page = render(full_report())
    assert page.count(">best pretrained</span>") == page.count(">best scratch</span>") == 1


def test_the_timeline_tells_every_kind_of_work():
    page = render(full_report())
    chart = page[page.index("Stages in time") :]
    keys = chart[: chart.index("</figcaption>")]
    for work in ("k-means", "labels", "pretraining", "fine-tuning", "decoding", "data and report"):
        assert work in keys
