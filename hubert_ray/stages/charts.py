"""How does a list of numbers become a chart that needs nothing but a browser?

Each chart function returns one `<figure>`: a title, a legend in HTML that wraps on a phone, and an inline SVG.
Colours are the class names `c1` to `c5` and `grey`; the page's CSS gives them a light and a dark value, so a chart
follows the reader's theme. `svg_file` puts drawings of lines into an SVG file instead, with colours of its own. Every mark
carries a `<title>`, which browsers show on hover and screen readers speak.
Values that are None, NaN or infinite are gaps: a line breaks there. With nothing to draw, the result is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup

WIDTH = 480  # of a half-page chart, in SVG units; text of 12 units stays readable on a phone
WIDE = 980  # of a full-page chart; the page lets it scroll sideways on a phone
MOST_POINTS = 240  # drawn for one series; a longer one is thinned
LEAST_SHARE = 0.005  # paler cells of a heat map could not be seen, and a 500-unit map would weigh megabytes

Point = tuple[float | None, float | None]


@dataclass(frozen=True)
class Axis:
    """What an axis measures: its label with the unit, how a value and a tick are written, whether zero is on it."""

    label: str
    show: Callable[[float], str] = "{:g}".format
    tick: Callable[[float], str] = "{:,g}".format
    from_zero: bool = False
    whole_numbers: bool = False


@dataclass(frozen=True)
class Series:
    """One line. A faint one is context: thin, in no legend, with no value at its end."""

    name: str
    points: Sequence[Point]
    colour: str = "c1"
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line to compare with, such as chance."""

    name: str
    value: float | None
    colour: str = "grey"


@dataclass(frozen=True)
class Bar:
    name: str
    value: float | None
    colour: str = "c1"


@dataclass(frozen=True)
class Span:
    """One row of a timeline. A hollow one cost nothing this time."""

    name: str
    start_seconds: float
    seconds: float
    colour: str = "c1"
    hollow: bool = False


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def nice_ticks(low: float, high: float, target: int = 5, whole_numbers: bool = False) -> list[float]:
    """Round numbers a step of 1, 2, 2.5 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    raw_step = ((high - low) or abs(high) or 1.0) / target
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw_step * 0.999)
    if whole_numbers:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: both ends, and the lowest and highest of each bucket, so that a spike survives."""
    if len(points) <= most:
        return list(points)
    buckets = (most - 2) // 2
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        members = inner[bucket * len(inner) // buckets : (bucket + 1) * len(inner) // buckets]
        drawable = {index: y for index in members if is_number(y := points[index][1])}
        if drawable:
            kept.add(min(drawable, key=drawable.__getitem__))
            kept.add(max(drawable, key=drawable.__getitem__))
        else:
            kept.add(members[0])  # all of this bucket is a gap: one missing point keeps it visible
    return [points[index] for index in sorted(kept)]


@dataclass(frozen=True)
class Drawing:
    """The parts of a chart, before they become a figure of a page or a piece of a file."""

    title: str
    keys: Sequence[tuple[str, str, str]]  # of the legend: name, colour, kind of mark
    parts: Sequence[Markup]  # of the SVG
    width: int
    height: float


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, levels: Sequence[Level] = ()) -> Markup:
    """Several lines over one x axis, with the last value of each written at its end."""
    drawing = draw_lines(title, series, x, y, levels)
    return _figure(drawing) if drawing else Markup("")


def draw_lines(title: str, series: Sequence[Series], x: Axis, y: Axis, levels: Sequence[Level] = ()) -> Drawing | None:
    """`line_chart` as a drawing; None where there is nothing to draw."""
    thinned = [(line, thin(line.points)) for line in sorted(series, key=lambda line: not line.faint)]
    lines = [(line, points) for line, points in thinned if _drawable(points)]
    heights = [(level, level.value) for level in levels if is_number(level.value)]
    if not lines:
        return None
    xs = [point[0] for _, points in lines for point in _drawable(points)]
    ys = [point[1] for _, points in lines for point in _drawable(points)] + [height for _, height in heights]
    y_ticks = nice_ticks(min([*ys, 0] if y.from_zero else ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    x_ticks = [v for v in nice_ticks(x_low, x_high, 6, x.whole_numbers) if x_low <= v <= x_high]
    left, right, top, bottom = 50, WIDTH - 50, 26, 236

    def across(value: float) -> float:
        return round(left + (right - left) * ((value - x_low) / (x_high - x_low) if x_high > x_low else 0.5), 1)

    def down(value: float) -> float:
        return round(bottom - (bottom - top) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    parts = [_text(0, 12, y.label, "axis")]
    for tick in y_ticks:
        parts += [_rule(left, down(tick), right, down(tick)), _text(left - 8, down(tick) + 4, y.tick(tick), "tick end")]
    parts += [_text(across(tick), bottom + 18, x.tick(tick), "tick middle") for tick in x_ticks]
    parts.append(_text(right, bottom + 34, x.label, "axis end"))
    for level, height in heights:
        parts.append(
            Markup('<path class="level {}" d="M{} {}H{}"><title>{}: {}</title></path>').format(
                level.colour, left, down(height), right, level.name, y.show(height)
            )
        )
    for line, points in lines:
        parts.append(
            _polyline(line, [(across(a), down(b)) if is_number(a) and is_number(b) else None for a, b in points])
        )
    for line, points in lines:
        parts += [_hit(line, across(a), down(b), f"{x.label} {x.show(a)}: {y.show(b)}") for a, b in _drawable(points)]
    ends = [(down(height), y.show(height), level.colour) for level, height in heights]
    for line, points in lines:
        if not line.faint:
            value = _drawable(points)[-1][1]
            ends.append((down(value), y.show(value), line.colour))
    for position, (_, text, colour) in zip(_spread([end[0] for end in ends], top, bottom), ends, strict=True):
        parts.append(_text(right + 7, position + 4, text, f"value {colour}"))
    keys = [(line.name, line.colour, "line") for line in series if not line.faint and _drawable(line.points)]
    keys += [(level.name, level.colour, "dash") for level, _ in heights]
    return Drawing(title, keys, parts, WIDTH, bottom + 38)


def grouped_bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], value: Axis) -> Markup:
    """Horizontal bars in named groups, on one scale from zero, each with its value."""
    found = [(name, [(bar, bar.value) for bar in bars if is_number(bar.value)]) for name, bars in groups]
    drawn = [(name, bars) for name, bars in found if bars]
    if not drawn:
        return Markup("")
    thickness, gap, top, left, right = 22, 18, 4, 112, WIDTH - 62
    ticks = nice_ticks(0, max(max(amount for _, bars in drawn for _, amount in bars), 1e-9), 4)
    bottom = top + sum(len(bars) * thickness + gap for _, bars in drawn)

    def across(amount: float) -> float:
        return round(left + (right - left) * amount / ticks[-1], 1)

    parts = [_rule(across(tick), top, across(tick), bottom) for tick in ticks]
    parts += [_text(across(tick), bottom + 18, value.tick(tick), "tick middle") for tick in ticks]
    parts.append(_text(right, bottom + 36, value.label, "axis end"))
    y = top + gap / 2
    for name, bars in drawn:
        parts.append(_text(left - 10, y + len(bars) * thickness / 2 + 4, name, "name end"))
        for bar, amount in bars:
            tip = f"{name}, {bar.name}: {value.show(amount)}"
            width = max(across(max(amount, 0)) - left, 1)
            parts.append(_rect(left, y + 2, width, thickness - 4, f"bar {bar.colour}", tip))
            parts.append(_text(left + width + 7, y + thickness / 2 + 4, value.show(amount), f"value {bar.colour}"))
            y += thickness
        y += gap
    keys = list(dict.fromkeys((bar.name, bar.colour, "block") for _, bars in drawn for bar, _ in bars))
    return _figure(Drawing(title, keys, parts, WIDTH, bottom + 42))


def timeline(title: str, spans: Sequence[Span], keys: Sequence[tuple[str, str]], time: Axis) -> Markup:
    """A Gantt chart: one row a stage, placed by when it started, as long as it took."""
    if not spans:
        return Markup("")
    row, top, left, right = 26, 6, 170, WIDE - 90
    end = max(span.start_seconds + span.seconds for span in spans)
    unit = next((unit for unit in (86400, 3600, 60) if end >= 3 * unit), 1)  # ticks are round in the unit they show
    ticks = [tick * unit for tick in nice_ticks(0, end / unit, 6) if tick * unit <= end]
    bottom = top + row * len(spans)

    def across(seconds: float) -> float:
        return round(left + (right - left) * seconds / (end or 1), 1)

    parts = [_rule(across(tick), top, across(tick), bottom) for tick in ticks]
    parts += [_text(across(tick), bottom + 18, time.tick(tick), "tick middle") for tick in ticks]
    parts.append(_text(right, bottom + 36, time.label, "axis end"))
    for index, span in enumerate(spans):
        y = top + index * row
        start, stop = across(span.start_seconds), across(span.start_seconds + span.seconds)
        took = time.show(span.seconds) + (", reused" if span.hollow else "")
        look = f"bar {span.colour} hollow" if span.hollow else f"bar {span.colour}"
        parts.append(_text(left - 12, y + row / 2 + 4, span.name, "name end"))
        parts.append(_rect(start, y + 5, max(stop - start, 2), row - 10, look, f"{span.name}: {took}"))
        parts.append(_text(max(stop, start + 2) + 7, y + row / 2 + 4, took, "tick"))
    return _figure(Drawing(title, [(name, colour, "block") for name, colour in keys], parts, WIDE, bottom + 42))


def heat_map(title: str, rows: Sequence[str], columns: Sequence[object], share: Sequence[Sequence[float]]) -> Markup:
    """`share[column][row]` from 0 to 1 as the strength of one hue; the columns are units, the rows phones."""
    assert len(share) == len(columns), f"{len(share)} lists of shares for {len(columns)} units"
    assert all(len(column) == len(rows) for column in share), f"each unit needs a share for all {len(rows)} phones"
    if not rows or not columns:
        return Markup("")
    left, top, right = 52, 6, WIDE - 6
    tall, wide = min(22.0, max(12.0, 440 / len(rows))), (right - left) / len(columns)
    bottom = top + tall * len(rows)
    parts = [_rule(left, top + tall * (index + 1), right, top + tall * (index + 1)) for index in range(len(rows))]
    parts += [_text(left - 8, top + tall * (i + 0.5) + 4, name, "tick end") for i, name in enumerate(rows)]
    for index, column in enumerate(share):
        for place, amount in enumerate(column):
            if is_number(amount) and amount >= LEAST_SHARE:
                parts.append(
                    Markup(
                        '<rect class="cell" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" opacity="{:.2f}">'
                        "<title>unit {}, phone {}: {:.0%}</title></rect>"
                    ).format(
                        left + index * wide,
                        top + place * tall + 0.5,
                        max(wide - 0.6, 0.6),
                        tall - 1,
                        min(amount, 1) ** 0.7,
                        columns[index],
                        rows[place],
                        amount,
                    )
                )
    every = math.ceil(len(columns) * 26 / (right - left))
    for index in range(0, len(columns), every):
        parts.append(_text(left + (index + 0.5) * wide, bottom + 16, columns[index], "tick middle"))
    parts.append(_text(right, bottom + 34, "unit, ordered by its most frequent phone", "axis end"))
    scale = [(f"{share_shown:.0%}", "c1", f"heat h{share_shown * 100:.0f}") for share_shown in (0.05, 0.25, 0.5, 1)]
    return _figure(Drawing(title, scale, parts, WIDE, bottom + 42))


def _drawable(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in points if is_number(a) and is_number(b)]


def _polyline(line: Series, places: Sequence[tuple[float, float] | None]) -> Markup:
    path, pen_down = [], False
    for place in places:
        if place is not None:
            path.append(f"{'L' if pen_down else 'M'}{place[0]} {place[1]}")
        pen_down = place is not None
    look = f"line {line.colour} faint" if line.faint else f"line {line.colour}"
    return Markup('<path class="{}" d="{}"/>').format(look, "".join(path))


def _hit(line: Series, x: float, y: float, tip: str) -> Markup:
    look = f"hit {line.colour} dot" if line.dots else f"hit {line.colour}"
    mark = Markup('<circle class="{}" cx="{}" cy="{}" r="4"><title>{}, {}</title></circle>')
    return mark.format(look, x, y, line.name, tip)


def _spread(places: Sequence[float], top: float, bottom: float, apart: float = 14) -> list[float]:
    """The same places, moved as little as keeps labels from covering each other."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [places[index] for index in order]
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + apart)
    limit = bottom
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - apart
    back = dict(zip(order, moved, strict=True))
    return [round(max(back[index], top - 20), 1) for index in range(len(places))]


def _text(x: float, y: float, text: object, look: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(look, x, y, text)


def _rule(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="rule" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x1, y1, x2, y2)


def _rect(x: float, y: float, width: float, height: float, look: str, tip: str) -> Markup:
    shape = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="2"><title>{}</title></rect>')
    return shape.format(look, x, y, width, height, tip)


def _figure(drawing: Drawing) -> Markup:
    key = Markup('<span class="key"><i class="{} {}"></i>{}</span>')
    legend = Markup("").join(key.format(kind, colour, name) for name, colour, kind in drawing.keys)
    return Markup(
        '<figure class="{}"><figcaption><b>{}</b><span class="keys">{}</span></figcaption><div class="plot">'
        '<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg></div></figure>'
    ).format(
        "wide" if drawing.width == WIDE else "half",
        drawing.title,
        legend,
        drawing.width,
        drawing.height,
        drawing.title,
        Markup("").join(drawing.parts),
    )


# --- a file of its own ------------------------------------------------------------------------------------------------

_COLOURS = {
    "c1": "#0a62ab", "c2": "#c04a05", "c3": "#00775a", "c4": "#8b469f", "c5": "#8f6400", "grey": "#727b86"
}  # fmt: skip
# Without variables, which viewers other than browsers do not know.
_FILE_STYLE = (
    "text{fill:#59626d;font:12px sans-serif}text.title{fill:#16191d;font-weight:bold;font-size:14px}"
    "text.value{font-weight:bold}text.end{text-anchor:end}text.middle{text-anchor:middle}.rule{stroke:#e4e1da;fill:none}"
    ".line{stroke-width:2.25;fill:none;stroke-linejoin:round}.line.faint{stroke-width:1.2;opacity:.38}"
    ".level{stroke-width:1.6;stroke-dasharray:5 4;fill:none}.hit{opacity:0}.hit.dot{opacity:1}"
) + "".join(
    f".line.{name},.level.{name},.key.{name}{{stroke:{hue}}}.value.{name},.hit.{name}{{fill:{hue}}}"
    for name, hue in _COLOURS.items()
)


def svg_file(drawings: Sequence[Drawing | None]) -> str:
    """One below the other, each under its title and legend, as a whole SVG file; those that are None are left out."""
    margin, parts, y = 18, [], 0.0
    drawn = [drawing for drawing in drawings if drawing]
    for drawing in drawn:
        head = 40 + 16 * len(drawing.keys)
        names = [_text(0, 14, drawing.title, "title")]
        for row, (name, colour, _) in enumerate(drawing.keys):
            line = Markup('<path class="key {}" stroke-width="3" d="M0 {}H16"/>')
            names += [line.format(colour, 30 + 16 * row), _text(22, 34 + 16 * row, name, "name")]
        group = Markup('<g transform="translate({},{:.0f})">{}<g transform="translate(0,{})">{}</g></g>')
        parts.append(group.format(margin, y + margin, Markup("").join(names), head, Markup("").join(drawing.parts)))
        y += head + drawing.height + margin
    wide = max((drawing.width for drawing in drawn), default=0) + 2 * margin
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1:.0f}" viewBox="0 0 {0} {1:.0f}">'
        '<style>{2}</style><rect width="100%" height="100%" fill="#ffffff"/>{3}</svg>\n'
    ).format(wide, y + margin, Markup(_FILE_STYLE), Markup("").join(parts))
