"""How is a number written for a reader? With its unit and no more digits than carry meaning.

Each function takes what report.json holds; None, NaN and missing values become a dash.
"""

from __future__ import annotations

from datetime import datetime

from hubert_ray.stages.charts import is_number

NONE = "–"


def number(value: object, digits: int | None = None) -> str:
    """Three significant digits, or `digits` decimals; whole numbers in full, with thousands apart."""
    if not is_number(value):
        return NONE
    if isinstance(value, int):
        return f"{value:,}"
    if digits is None:
        size_of = abs(value)
        if 0 < size_of < 0.01:
            return f"{value:.2g}"
        digits = 0 if size_of >= 100 else 1 if size_of >= 10 else 2 if size_of >= 1 else 3
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def units(clusters: object) -> str:
    """The size of a codebook: 100, or 50 + 100 where it has several label streams."""
    return " + ".join(map(number, clusters)) if isinstance(clusters, list | tuple) else number(clusters)


def percent(value: object, digits: int = 1) -> str:
    return f"{value:.{digits}%}".replace("-", "\N{MINUS SIGN}") if is_number(value) else NONE


def percent_tick(share: float) -> str:
    """A round share on an axis, with no more digits than it has: 20%, 2.5%."""
    return f"{100 * share:.6g}%"


def duration(seconds: object) -> str:
    """Two units at most: 38.2 s, 12 min 05 s, 2 h 14 min, 3 d 4 h."""
    if not is_number(seconds):
        return NONE
    if seconds < 59.95:
        return f"{seconds:.2f} s" if 0 < seconds < 1 else f"{seconds:.1f} s".replace(".0 s", " s")
    if round(seconds) < 3600:
        big, small, names = *divmod(round(seconds), 60), ("min", "s")
    elif seconds < 86400:
        big, small, names = *divmod(round(seconds / 60), 60), ("h", "min")
    else:
        big, small, names = *divmod(round(seconds / 3600), 24), ("d", "h")
    return f"{big} {names[0]} {small:02d} {names[1]}" if small else f"{big} {names[0]}"


def size(value: object) -> str:
    """A number of bytes in the binary unit that suits it."""
    if not is_number(value):
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def moment(iso: object) -> str:
    """An ISO time as a reader writes it; what is no ISO time is shown as it is."""
    try:
        return datetime.fromisoformat(str(iso)).strftime("%-d %B %Y, %H:%M %Z").strip()
    except ValueError:
        return str(iso) if iso else NONE


def short(value: object) -> str:
    """A count on an axis or in a chip: 94.7 M, 250 k."""
    if not is_number(value):
        return NONE
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g}\N{NO-BREAK SPACE}{name}"
    return f"{value:,g}"
