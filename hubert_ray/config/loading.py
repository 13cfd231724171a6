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
import json
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
_FINETUNE_RULES = {"steps": 1, "label_seconds": 1.0, "batch_seconds": 1.0, "micro_batch_seconds": 1.0}
_DECODE_RULES = {"ngram_order": 1, "beam": 1}


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """The recipe of a preset name, a TOML file or a run's recipe.json, with `a.b=c` overrides. Raises RecipeError."""
    if source in PRESETS:
        data = _plain(PRESETS[source])
    elif source.endswith((".toml", ".json")) or Path(source).exists():
        data = _read(source)
    else:
        raise RecipeError(
            f"'{source}' is neither a preset ({', '.join(PRESETS)}) nor a recipe file{_hint(source, PRESETS)}"
        )
    for override in overrides:
        _merge(data, _change(override), "")
        data = _plain(_convert(data, Recipe))  # fills in what a replaced table left to its defaults
    return _check(_convert(data, Recipe))


def load_cluster(source: str | None, overrides: list[str]) -> Cluster:
    """Cluster settings from a TOML file (None: the defaults) with overrides. Raises RecipeError."""
    data = _plain(Cluster())
    if source:
        _merge(data, _parsed(source), "")
    for override in overrides:
        _merge(data, _change(override), "")
    cluster = _convert(data, Cluster)
    for name in (
        "train_workers",
        "data_workers",
        "kmeans_workers",
        "concurrent_trials",
        "trial_workers",
        "keep_checkpoints",
    ):
        if getattr(cluster, name) < 1:
            raise RecipeError(f"cluster {name} = {getattr(cluster, name)}: at least 1")
    return cluster


def _plain(settings: Recipe | Cluster) -> dict[str, Any]:
    """Settings as dicts and lists that can be changed."""
    return msgspec.json.decode(msgspec.json.encode(settings))


def _read(file: str) -> dict[str, Any]:
    changes = _parsed(file)
    preset = changes.pop("preset", None)
    for optional in ("finetune", "decode"):  # TOML has no null
        if changes.get(optional) is False:
            changes[optional] = None
    if preset is None:
        return _plain(_convert(changes, Recipe))
    if preset not in PRESETS:
        raise RecipeError(
            f"{file}: preset '{preset}' does not exist; there are {', '.join(PRESETS)}{_hint(preset, PRESETS)}"
        )
    data = _plain(PRESETS[preset])
    _merge(data, changes, "")
    return _plain(_convert(data, Recipe))


def _parsed(file: str) -> dict[str, Any]:
    try:
        text = Path(file).read_text(encoding="utf-8")
        return json.loads(text) if file.endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"'{file}' cannot be read: {error.strerror}") from error
    except ValueError as error:  # what json, tomllib and the decoder raise
        raise RecipeError(f"{file}: {error}; strings need quotes, and for 'off' write false") from error


def _change(override: str) -> dict[str, Any]:
    """`a.b=c` as nested tables."""
    name, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"'{override}': write name=value, such as iterations.iter1.pretrain.steps=2000")
    value: Any = _value(text)
    for key in reversed(name.strip().split(".")):
        value = {key: value}
    return value


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
        what, _, path = str(error).partition(" - at `$.")
        dotted, value = _locate(data, path.rstrip("`"))
        where = f"{dotted} = {value!r}: " if path else ""
        raise RecipeError(f"{where}{what[0].lower()}{what[1:].replace('`', '')}") from error


def _locate(data: Any, path: str) -> tuple[str, Any]:
    """A validation error's place as a user would write it (`iterations.iter1.pretrain.steps`), and the value there."""
    names = []
    for key in re.findall(r"[^.\[\]]+", path):
        if isinstance(data, list) and key.isdigit() and int(key) < len(data):
            data = data[int(key)]
            names.append(data.get("name", key) if isinstance(data, dict) else key)
        else:
            data = data.get(key) if isinstance(data, dict) else None
            names.append(key)
    return ".".join(names), data


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
    for part, rules in ((recipe.finetune, _FINETUNE_RULES), (recipe.decode, _DECODE_RULES)):
        for name, least in rules.items() if part else ():
            if getattr(part, name) < least:
                raise RecipeError(f"{type(part).__name__.lower()}.{name} = {getattr(part, name):g}: at least {least:g}")
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
        (0 <= pretrain.warmup_share < 1, f"pretrain.warmup_share = {pretrain.warmup_share:g}: from 0 to below 1"),
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
