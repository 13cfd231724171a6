"""How does text become settings? A preset or a short TOML file, then `a.b=c` overrides, each checked by name and type.

A recipe file names what it starts from and what it changes; iterations are addressed by name or number:

    preset = "demo"
    name = "mine"
    [corpus]
    kind = "librispeech"
    name = "my-speech"
    path = "/data/LibriSpeech"
    [iterations.iter1.pretrain]
    steps = 2000
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hubert_ray.config.cluster import Cluster
from hubert_ray.config.presets import PRESETS
from hubert_ray.config.recipe import Recipe
from hubert_ray.errors import RecipeError

Settings = TypeVar("Settings", Recipe, Cluster)
MAX_CLUSTERS = 2**16  # labels are uint16


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """The recipe of a preset name or a TOML file, with `a.b=c` overrides applied. Raises RecipeError."""
    if source in PRESETS:
        data = _plain(PRESETS[source])
    elif source.endswith(".toml") or Path(source).exists():
        data = _read(source)
    else:
        raise RecipeError(
            f"'{source}' is neither a preset ({', '.join(PRESETS)}) nor a recipe file{_hint(source, PRESETS)}"
        )
    return _check(_convert(_override(data, overrides), Recipe))


def load_cluster(source: str | None, overrides: list[str]) -> Cluster:
    """Cluster settings from a TOML file (None: the defaults) with overrides. Raises RecipeError."""
    data = _plain(Cluster())
    if source:
        _merge(data, _toml(source), "")
    return _convert(_override(data, overrides), Cluster)


def _plain(settings: Recipe | Cluster) -> dict[str, Any]:
    """Settings as dicts and lists that can be changed."""
    return msgspec.json.decode(msgspec.json.encode(settings))


def _read(file: str) -> dict[str, Any]:
    changes = _toml(file)
    preset = changes.pop("preset", None)
    if preset is None:
        return changes
    if preset not in PRESETS:
        raise RecipeError(
            f"{file}: preset '{preset}' does not exist; there are {', '.join(PRESETS)}{_hint(preset, PRESETS)}"
        )
    data = _plain(PRESETS[preset])
    _merge(data, changes, "")
    return data


def _toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: {error}") from error


def _override(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"'{override}': write name=value, such as iterations.iter1.pretrain.steps=2000")
        value: Any = _value(text)
        for key in reversed(name.strip().split(".")):
            value = {key: value}
        _merge(data, value, "")
    return data


def _value(text: str) -> Any:
    """A TOML value; what is not one is a string, so that names and paths need no quotes."""
    if text.strip() in ("null", "none", "None"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(data: dict[str, Any] | list[Any], changes: dict[str, Any], where: str) -> None:
    """Puts `changes` into `data` in place; names that are not there are errors."""
    for key, value in changes.items():
        slot: str | int = _position(data, key, where) if isinstance(data, list) else key
        dotted = f"{where}.{key}" if where else key
        if isinstance(data, dict) and key not in data:
            raise RecipeError(f"'{dotted}' is no setting{_hint(key, data)}; there are {', '.join(data)}")
        old = data[slot]  # type: ignore[index]
        switches = (
            isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) != old.get("kind")
        )
        if isinstance(value, dict) and isinstance(old, (dict, list)) and not switches:
            _merge(old, value, dotted)
        else:
            data[slot] = value  # type: ignore[index]


def _position(data: list[Any], key: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in data]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(data):
        return int(key)
    raise RecipeError(f"'{where}.{key}' does not exist; there are {', '.join(map(str, names))}{_hint(key, names)}")


def _convert(data: dict[str, Any], kind: type[Settings]) -> Settings:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise RecipeError(f"the settings do not fit: {error}") from error


def _check(recipe: Recipe) -> Recipe:
    """What types alone cannot say."""
    names = [recipe.name, recipe.corpus.name, *(iteration.name for iteration in recipe.iterations)]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise RecipeError(
                f"'{name}' becomes a folder: use letters, digits, '_', '-' and '.', beginning with one of the first two"
            )
    if not recipe.iterations:
        raise RecipeError("a recipe needs at least one iteration")
    if len(set(names[2:])) < len(names[2:]):
        raise RecipeError(f"iterations must have different names; found {names[2:]}")
    for iteration in recipe.iterations:
        _check_iteration(iteration)
    if recipe.decode and not recipe.finetune:
        raise RecipeError("decode needs finetune: set decode=null, or give finetune settings")
    return recipe


def _check_iteration(iteration: Any) -> None:
    kmeans, pretrain, model = iteration.kmeans, iteration.pretrain, iteration.model
    rules = [
        (2 <= kmeans.clusters <= MAX_CLUSTERS, f"kmeans.clusters = {kmeans.clusters}: between 2 and {MAX_CLUSTERS}"),
        (0 < kmeans.sample_share <= 1, f"kmeans.sample_share = {kmeans.sample_share:g}: above 0, at most 1"),
        (pretrain.steps > 0, f"pretrain.steps = {pretrain.steps}: at least 1"),
        (pretrain.peak_lr > 0, f"pretrain.peak_lr = {pretrain.peak_lr:g}: above 0"),
        (
            0 < pretrain.min_crop_seconds <= pretrain.max_crop_seconds,
            f"pretrain crops from {pretrain.min_crop_seconds:g} to {pretrain.max_crop_seconds:g} s: "
            "0 < min_crop_seconds <= max_crop_seconds",
        ),
        (
            pretrain.micro_batch_seconds >= pretrain.max_crop_seconds,
            f"pretrain.micro_batch_seconds = {pretrain.micro_batch_seconds:g}: at least one crop of "
            f"{pretrain.max_crop_seconds:g} s must fit",
        ),
        (0 <= pretrain.mask.prob < 1, f"pretrain.mask.prob = {pretrain.mask.prob:g}: from 0 to below 1"),
        (model.dim % model.heads == 0, f"model.dim = {model.dim}: a multiple of model.heads = {model.heads}"),
    ]
    for holds, message in rules:
        if not holds:
            raise RecipeError(f"iteration '{iteration.name}': {message}")


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known if k], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
