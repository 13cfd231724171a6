"""How does text become settings? A preset or a short TOML file, then `a.b=c` overrides, each checked by name and type.

A recipe file names what it starts from and what it changes; iterations are addressed by name:

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
from hubert_ray.config.recipe import EmbeddedCorpus, Finetune, Iteration, Mfcc, Recipe, parts_of
from hubert_ray.config.sizes import SIZES
from hubert_ray.errors import RecipeError

# What else lies in a run's folder, and the role of the corpus beside the iterations that a study looks at.
_NO_ITERATION = ("corpus", "decode", "extract_features", "finetune", "layers", "recipe.json", "report", "stability")
Loaded = TypeVar("Loaded", Recipe, Cluster)


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
    _merge(data, _changes(overrides), "")
    return _check(_convert(data, Recipe))


def load_cluster(source: str | None, overrides: list[str]) -> Cluster:
    """Cluster settings from a TOML file (None: the defaults) with overrides. Raises RecipeError."""
    data = _plain(Cluster())
    if source:
        _merge(data, _parsed(source), "")
    _merge(data, _changes(overrides), "")
    cluster = _convert(data, Cluster)
    if cluster.train_workers_min is not None and cluster.train_workers_min > cluster.train_workers:
        raise RecipeError(
            f"cluster train_workers_min = {cluster.train_workers_min}: at most train_workers = {cluster.train_workers}"
        )
    return cluster


def _plain(settings: Recipe | Cluster) -> dict[str, Any]:
    """Settings as dicts and lists that can be changed."""
    return msgspec.json.decode(msgspec.json.encode(settings))


def _read(file: str) -> dict[str, Any]:
    changes = _parsed(file)
    preset = changes.pop("preset", None)
    if preset is None:
        data: dict[str, Any] = dict.fromkeys(Recipe.__struct_fields__)
    elif isinstance(preset, str) and preset in PRESETS:
        data = _plain(PRESETS[preset])
    else:
        raise RecipeError(
            f"{file}: preset {preset!r} does not exist; there are {', '.join(PRESETS)}{_hint(str(preset), PRESETS)}"
        )
    _merge(data, changes, "")
    missing = [name for name in ("name", "corpus", "iterations") if data[name] is None]
    if missing:
        raise RecipeError(f'{file}: {", ".join(missing)} missing; give them, or start from a preset: preset = "demo"')
    return _plain(_convert(data, Recipe))


def _parsed(file: str) -> dict[str, Any]:
    try:
        text = Path(file).read_text(encoding="utf-8")
        content = json.loads(text) if file.endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"'{file}' cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{file}: {error}; strings need quotes, and for 'off' write false") from error
    except ValueError as error:  # what json and the decoder of UTF-8 raise
        raise RecipeError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: found a {type(content).__name__}, expected settings by name")
    return content


def _changes(overrides: list[str]) -> dict[str, Any]:
    """All `a.b=c` as nested tables, later ones over earlier ones: their order matters for nothing else."""
    changes: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"'{override}': write name=value, such as iterations.iter1.pretrain.steps=2000")
        *tables, last = name.strip().split(".")
        table = changes
        for key in tables:
            if not isinstance(table.get(key), dict):
                table[key] = {}
            table = table[key]
        table[last] = _value(text)
    return changes


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
            data[slot] = _meant(key, value, old)  # type: ignore[index]


def _meant(key: str, value: Any, old: Any) -> Any:
    """`false` for a whole table, or for what may be absent, switches it off; a model may be named by its size."""
    if value is False and (old is None or isinstance(old, dict)):
        return None
    if key == "model" and isinstance(value, str):
        if value not in SIZES:
            raise RecipeError(f"model = {value!r}: there are {', '.join(SIZES)}{_hint(value, SIZES)}")
        return msgspec.to_builtins(SIZES[value])
    return value


def _position(data: list[Any], key: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in data]
    if key in names:
        return names.index(key)
    raise RecipeError(f"'{where}.{key}' does not exist; there are {', '.join(map(str, names))}{_hint(key, names)}")


def _convert(data: dict[str, Any], kind: type[Loaded]) -> Loaded:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        dotted, value = _locate(data, path.rstrip("`"))
        where = f"{dotted} = {value!r}: " if path else ""
        choices = _choices(msgspec.inspect.type_info(kind), re.findall(r"[^.\[\]]+", path.rstrip("`")))
        there_are = f"; there are {', '.join(choices)}{_hint(str(value), choices)}" if choices else ""
        raise RecipeError(f"{where}{what[0].lower()}{what[1:].replace('`', '')}{there_are}") from error


def _choices(kind: Any, path: list[str]) -> list[str]:
    """The words that may stand at `path` of settings of this type; empty where it is not for words to choose from."""
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    found: list[str] = []
    for one in kinds:
        if isinstance(one, msgspec.inspect.LiteralType) and not path:
            found += map(str, one.values)
        elif isinstance(one, msgspec.inspect.VarTupleType) and path:
            found += _choices(one.item_type, path[1:])
        elif isinstance(one, msgspec.inspect.StructType) and path == [one.tag_field]:
            found.append(str(one.tag))
        elif isinstance(one, msgspec.inspect.StructType) and path:
            found += [word for field in one.fields if field.name == path[0] for word in _choices(field.type, path[1:])]
    return found


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
    iterations = [iteration.name for iteration in recipe.iterations]
    parts = [part.name for part in parts_of(recipe.corpus)]
    for name in [recipe.name, recipe.corpus.name, *parts, *iterations]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise RecipeError(
                f"'{name}' becomes a folder: use letters, digits, '_', '-' and '.', beginning with one of the first two"
            )
    if not recipe.iterations:
        raise RecipeError("a recipe needs at least one iteration")
    for name in set(iterations) & set(_NO_ITERATION):
        raise RecipeError(f"an iteration cannot be called '{name}', for a run keeps something else under that name")
    for what, names in (("iterations", iterations), ("the parts of a mix", parts)):
        if len(set(names)) < len(names):
            raise RecipeError(f"{what} must have different names; found {names}")
    for iteration in recipe.iterations:
        _check_iteration(iteration)
    if recipe.decode and not recipe.finetune:
        raise RecipeError("decode needs finetune: switch decode off too (decode = false), or give finetune settings")
    for part in parts_of(recipe.corpus):
        if isinstance(part, EmbeddedCorpus):
            continue
        both = sorted(set(part.dev_speakers) & set(part.test_speakers))
        if both:
            raise RecipeError(
                f"corpus {part.name}: speakers {', '.join(both)} stand in both dev_speakers and test_speakers"
            )
        segments, longest = part.segments, part.checks.max_seconds
        if segments and not segments.min_seconds <= segments.max_seconds <= longest:
            raise RecipeError(
                f"corpus.segments: pieces of {segments.min_seconds:g} to {segments.max_seconds:g} s; min_seconds <= max_seconds "
                f"<= {longest:g}, corpus.checks.max_seconds"
            )
    if recipe.finetune:
        _check_finetune(recipe.finetune)
    return recipe


def _check_iteration(iteration: Iteration) -> None:
    pretrain, model, mask = iteration.pretrain, iteration.model, iteration.pretrain.mask
    teacher, kmeans = iteration.teacher, iteration.kmeans
    shortest = int(pretrain.min_crop_seconds * 50) - 1  # frames
    spans = max(mask.min_spans, int(mask.prob * shortest / mask.length) + 1)
    rules = [
        (
            not isinstance(teacher, Mfcc) or teacher.splice % 2 == 1,
            "teacher.splice: an odd number, as many frames before as after",
        ),
        (
            not isinstance(teacher, Mfcc) or len(set(teacher.derivatives)) == len(teacher.derivatives),
            "teacher.derivatives: each order once",
        ),
        (
            kmeans.product or len(set(kmeans.classes)) == len(kmeans.classes),
            f"kmeans.clusters = {list(kmeans.classes)}: streams of equal size on the same features are the same codebook twice; "
            "give them different sizes, or kmeans.product = true, which gives each a part of the features",
        ),
        (
            not kmeans.product or len(kmeans.classes) > 1,
            f"kmeans.product with clusters = {kmeans.clusters}: give a number of clusters for each part of the features, such as "
            "[100, 100, 100]",
        ),
        (
            not kmeans.product or not isinstance(teacher, Mfcc) or teacher.dim % len(kmeans.classes) == 0,
            f"kmeans.product: {len(kmeans.classes)} streams cannot share out the features of this teacher evenly",
        ),
        (
            shortest > mask.length + spans,
            f"pretrain.min_crop_seconds = {pretrain.min_crop_seconds:g}: too short for {spans} spans of "
            f"{mask.length} frames of 20 ms",
        ),
        (
            pretrain.min_crop_seconds <= pretrain.max_crop_seconds,
            f"pretrain crops from {pretrain.min_crop_seconds:g} to {pretrain.max_crop_seconds:g} s: "
            "min_crop_seconds <= max_crop_seconds",
        ),
        (
            pretrain.micro_batch_seconds >= pretrain.max_crop_seconds,
            f"pretrain.micro_batch_seconds = {pretrain.micro_batch_seconds:g}: at least one crop of "
            f"{pretrain.max_crop_seconds:g} s must fit",
        ),
        (
            pretrain.batch_seconds >= pretrain.micro_batch_seconds,
            f"pretrain.batch_seconds = {pretrain.batch_seconds:g}: at least one micro-batch of "
            f"{pretrain.micro_batch_seconds:g} s",
        ),
        (model.dim % model.heads == 0, f"model.dim = {model.dim}: a multiple of model.heads = {model.heads}"),
        (
            model.dim % model.position_groups == 0,
            f"model.dim = {model.dim}: a multiple of model.position_groups = {model.position_groups}",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise RecipeError(f"iteration '{iteration.name}': {message}")


def _check_finetune(finetune: Finetune) -> None:
    if sum(finetune.schedule_shares) > 1 + 1e-9:
        raise RecipeError(f"finetune.schedule_shares = {finetune.schedule_shares}: together at most 1")
    for name, sweep in (("sweep", finetune.sweep), ("scratch_sweep", finetune.scratch_sweep)):
        for setting in ("peak_lr", "freeze_share", "mask_prob") if sweep else ():
            least, most = getattr(sweep, setting)
            if least > most:
                raise RecipeError(f"finetune.{name}.{setting} = {[least, most]}: the smaller number first")


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known if k], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
