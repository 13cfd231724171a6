"""What can be typed? hubert-ray plan | run | <stage> | show | doctor | layers | stability | presets | remove | import | export |
bundle | units | extract_features.

    hubert-ray run --recipe demo --storage ./runs
    hubert-ray plan --recipe mine.toml --set iterations.iter1.pretrain.steps=2000
    hubert-ray pretrain --recipe demo --storage s3://bucket/speech --of iter1 --cluster train_workers=8

A recipe says what is computed; --cluster says how, and never changes a result. Errors that a user can mend are printed as
one message, without a traceback.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, get_origin

import msgspec

from hubert_ray import __version__, pipeline
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.loading import load_cluster, load_recipe
from hubert_ray.config.presets import PRESETS
from hubert_ray.config.recipe import Layer, Mfcc, Recipe, Teacher
from hubert_ray.config.values import Clusters, Count, Positive
from hubert_ray.errors import HubertRayError, RecipeError
from hubert_ray.machine import NodeReport
from hubert_ray.storage import layout
from hubert_ray.storage.cache import RangeCache
from hubert_ray.storage.filesystem import Storage

STAGES = (
    "prepare_data",
    "learn_kmeans",
    "assign_labels",
    "pretrain",
    "measure_layers",
    "finetune",
    "decode",
    "report",
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 an error that the message explains, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except HubertRayError as error:
        print(f"hubert-ray: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `hubert-ray units … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        return 1
    except KeyboardInterrupt:
        print("hubert-ray: interrupted; the same command goes on from what is sealed", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hubert-ray", description="HuBERT pretraining end to end on Ray.")
    parser.add_argument("--version", action="version", version=f"hubert-ray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _command(commands, "run", _run, "run a whole recipe, or go on with it")
    plan = _command(commands, "plan", _plan, "show the stages of a recipe and what is done, without running anything")
    plan.add_argument(
        "--settings", action="store_true", help="print every setting of the recipe as JSON, usable as a recipe"
    )
    _command(commands, "show", _show, "show the figures of finished stages")
    doctor = _command(
        commands, "doctor", _doctor, "check a run, its corpus and the nodes; exit code 1 if a check fails"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--no-nodes", action="store_true", help="leave the nodes out: needs no Ray and answers at once")
    _study_commands(commands)
    for stage in STAGES:
        sub = _command(commands, stage, _stage, f"run only {stage}; its inputs must be finished")
        sub.set_defaults(stage=stage)
        sub.add_argument("--of", metavar="NAME", help="iteration (iter1), or pretrained | scratch for finetune")
    presets = commands.add_parser("presets", help="list the recipes that come with hubert_ray")
    presets.set_defaults(command=_presets)
    take = commands.add_parser("import", help="put a model of fairseq, s3prl, Hugging Face or torchaudio into storage")
    take.add_argument("model", help="file, folder, s3://… or gs://… URL")
    take.add_argument("name", help="<run>/<iteration> under which recipes name it as a teacher, such as public/base")
    take.add_argument("--storage", default="storage", help="folder or URL (default: ./storage)")
    take.set_defaults(command=_import)
    export = commands.add_parser("export", help="write a model for another tool")
    export.add_argument("model", help="a training stage's folder, such as storage/runs/demo/iter2/pretrain, or a URL")
    export.add_argument("format", choices=("hugging_face", "fairseq", "s3prl", "torchaudio", "hubert_ray"))
    export.add_argument("folder", help="where to write it")
    export.set_defaults(command=_export)
    bundle = _command(
        commands, "bundle", _bundle, "put a codebook and its teacher into one folder that turns audio into units"
    )
    bundle.add_argument("folder", help="where to write it: a new folder or URL")
    bundle.add_argument("--of", metavar="NAME", help="iteration whose codebook it is, such as iter2")
    bundle.add_argument(
        "--window-seconds", type=float, help="audio up to here is one pass (default: 30, or the longest utterance)"
    )
    bundle.add_argument(
        "--context-seconds", type=float, default=5.0, help="of each side of a window, not kept (default: 5)"
    )
    units = commands.add_parser(
        "units", help="turn audio into units with a bundle; exit code 1 if a recording cannot be used"
    )
    units.add_argument("--bundle", required=True, help="folder, s3://… or gs://… URL")
    units.add_argument(
        "--audio", required=True, nargs="+", help="files, folders, or - for one recording on standard input"
    )
    units.add_argument(
        "--deduplicate", action="store_true", help="runs of one unit become one, with durations in frames"
    )
    units.add_argument("--output", default="-", help="file or URL named .jsonl or .parquet (default: lines on stdout)")
    units.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    units.set_defaults(command=_units)
    extract = _command(
        commands, "extract_features", _extract_features, "write features of the recipe's corpus, for other tools"
    )
    extract.add_argument("name", help="the artifact's: runs/<run>/extract_features/<name>")
    extract.add_argument("--model", required=True, help="mfcc, or a file, folder or URL of a model")
    extract.add_argument("--layer", type=int, help="of a model: counted from 1; 0 is the input of the first block")
    extract.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="(default: float16)")
    remove = commands.add_parser("remove", help="delete an artifact, a run or a corpus from storage")
    remove.add_argument("path", help="as messages name it, such as runs/demo/iter2 or corpora/embedded")
    remove.add_argument("--storage", default="storage", help="folder or URL (default: ./storage)")
    remove.set_defaults(command=_remove)
    return parser


def _study_commands(commands) -> None:
    layers = _command(commands, "layers", _layers, "units of every layer of finished models; which should teach next")
    layers.add_argument("--models", type=_names, help="iter1,… or <run>/<iteration>,… (default: all that are finished)")
    layers.add_argument("--hours", type=_value(Positive), default=1.0, help="train audio fitted on (default: 1)")
    layers.add_argument("--seeds", type=_value(Count), default=1, help="fits of a kind, averaged (default: 1)")
    layers.add_argument("--abx", action="store_true", help="the ABX error of each layer too; needs hubert-ray[abx]")
    stability = _command(
        commands, "stability", _stability, "how much units depend on chance and on the amount of audio"
    )
    features = "mfcc,iter1:6,<run>/<iteration>:9 (default: the recipe's teachers, where finished)"
    stability.add_argument("--features", type=_names, help=features)
    hours = "train audio fitted on (default: 0.1,1)"
    stability.add_argument("--hours", type=_value(list[Positive]), default=[0.1, 1.0], help=hours)
    stability.add_argument("--seeds", type=_value(Count), default=10, help="fits of a kind (default: 10)")
    for study in (layers, stability):
        clusters = "numbers of clusters (default: 100,500)"
        study.add_argument("--clusters", type=_value(list[Clusters]), default=[100, 500], help=clusters)


def _command(commands, name: str, function, help_text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text)
    parser.add_argument("--recipe", default="demo", help="preset name or TOML file (default: demo)")
    parser.add_argument("--storage", default="storage", help="folder, s3://… or gs://… URL (default: ./storage)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a setting of the recipe")
    parser.add_argument("--cluster-file", metavar="FILE", help="TOML file with cluster settings")
    parser.add_argument("--cluster", action="append", default=[], metavar="A=B", help="override a cluster setting")
    parser.set_defaults(command=function)
    return parser


def _load(options: argparse.Namespace) -> tuple[Recipe, Storage, Cluster]:
    recipe = load_recipe(options.recipe, options.set)
    cluster = load_cluster(options.cluster_file, options.cluster)
    cache = RangeCache(cluster.cache_dir, int(cluster.cache_gib * 2**30)) if cluster.cache_dir else None
    return recipe, Storage(options.storage, cache), cluster


def _run(options: argparse.Namespace, only: str | None = None) -> None:
    recipe, storage, cluster = _load(options)
    begun = time.perf_counter()
    for step, seal, skipped in pipeline.run(recipe, storage, cluster, _Connection(cluster), only):
        how = "done before" if skipped else f"{seal.facts['seconds']:.1f} s"
        print(f"[{time.perf_counter() - begun:7.1f} s] {step.stage.name}: {how}", flush=True)
    if only is None or only == "report":
        print(storage.full(f"runs/{recipe.name}/report/report.html"))
        print(storage.full(f"runs/{recipe.name}/report/report.json"))


class _Connection:
    """Ray, imported and started only when a stage has to run."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster

    def __enter__(self) -> None:
        from hubert_ray.distributed.cluster import connected

        self._inner = connected(self._cluster)
        self._inner.__enter__()

    def __exit__(self, *details) -> None:
        self._inner.__exit__(*details)


def _stage(options: argparse.Namespace) -> None:
    _run(options, _name_of_stage(load_recipe(options.recipe, options.set), options.stage, options.of))


def _name_of_stage(recipe: Recipe, kind: str, of: str | None) -> str:
    """The one stage of this kind, or the one of them that `of` names."""
    there = [stage.name for stage in pipeline.unroll(recipe) if stage.kind == kind]
    names = [name for name in there if of is None or of in name.split("/")]
    if len(names) != 1:
        raise RecipeError(
            f"{kind}{f' --of {of}' if of else ''} names {len(names)} stages; this recipe has "
            f"{', '.join(there) or 'none of this kind'}. Say which with --of, such as --of iter1 or --of pretrained"
        )
    return names[0]


def _plan(options: argparse.Namespace) -> None:
    recipe, storage, _ = _load(options)
    if options.settings:
        print(msgspec.json.format(msgspec.json.encode(recipe), indent=2).decode())
        return
    steps = pipeline.plan(recipe, storage)
    print(f"{recipe.name} in {storage.url}")
    made_here = {planned.artifact.path for planned in steps}
    for artifact in {a.path: a for planned in steps for a in planned.inputs.values()}.values():
        if artifact.path not in made_here and not storage.exists(artifact.file(layout.SEAL)):
            print(f"  missing: {artifact.path}; finish that run, or `hubert-ray import` a model under this name, first")
    for planned in steps:
        state = f"done in {planned.seal.facts['seconds']:.1f} s" if planned.seal else "to do"
        inputs = ", ".join(planned.stage.inputs.values()) if planned.stage.kind != "report" else "all of the above"
        print(
            f"  {planned.stage.name:24} {planned.artifact.identity.fingerprint}  {state:18} from: {inputs or 'source'}"
        )


def _show(options: argparse.Namespace) -> None:
    recipe, storage, _ = _load(options)
    for planned in pipeline.plan(recipe, storage):
        print(f"{planned.stage.name}: {'not finished' if planned.seal is None else ''}")
        hidden = ("versions", "hardware", "cluster")
        for name, value in planned.seal.facts.items() if planned.seal else ():
            if name not in hidden:
                print(f"    {name}: {msgspec.json.encode(value).decode()}")


def _doctor(options: argparse.Namespace) -> int:
    recipe, storage, cluster = _load(options)
    nodes = [] if options.no_nodes or not storage.exists("") else _nodes(storage, cluster)  # they would make it
    findings = list(pipeline.examine(recipe, storage, cluster, nodes))
    ok = all(finding.status != "failed" for finding in findings)
    if options.json:
        print(msgspec.json.encode({"ok": ok, "findings": findings}).decode())
        return 0 if ok else 1
    for finding in findings:
        print(f"{finding.status:8} {finding.check:24} {finding.found}")
        if finding.status != "ok":
            print(f"{'':33} prevents: {finding.prevents}")
    return 0 if ok else 1


def _nodes(storage: Storage, cluster: Cluster) -> list[NodeReport]:
    from hubert_ray.distributed.cluster import ask_nodes, connected

    with connected(cluster):
        return ask_nodes(storage)


def _layers(options: argparse.Namespace) -> None:
    recipe, storage, cluster = _load(options)
    models = options.models or pipeline.finished_models(recipe, storage)
    if not models:
        raise RecipeError(
            f"no model of {recipe.name} is finished in {storage.url}; run pretrain first, or name one with --models"
        )
    settings = {
        "clusters": options.clusters,
        "hours": options.hours,
        "seeds": options.seeds,
        "abx": options.abx,
    }
    pipeline.study("layers", recipe, storage, cluster, _Connection(cluster), models, settings)


def _stability(options: argparse.Namespace) -> None:
    recipe, storage, cluster = _load(options)
    if options.features:
        features = [_teacher(name) for name in options.features]
    else:
        finished = pipeline.finished_models(recipe, storage)
        teachers = dict.fromkeys(iteration.teacher for iteration in recipe.iterations)
        features = [t for t in teachers if isinstance(t, Mfcc) or t.of in finished]
    models = list(dict.fromkeys(teacher.of for teacher in features if isinstance(teacher, Layer)))
    settings = {"features": features, "clusters": options.clusters, "hours": options.hours, "seeds": options.seeds}
    pipeline.study("stability", recipe, storage, cluster, _Connection(cluster), models, settings)


def _teacher(name: str) -> Teacher:
    if name == "mfcc":
        return Mfcc()
    model, _, layer = name.rpartition(":")
    if not (model and layer.isdecimal()):
        raise RecipeError(f"--features {name}: expected mfcc, or a model and a layer such as iter1:6 or public/base:9")
    return Layer(of=model, layer=int(layer))


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _value(kind: Any) -> Callable[[str], Any]:
    """A reader of one value, or of several between commas, within the bounds of its type."""

    def read(text: str) -> Any:
        try:
            return msgspec.convert(_names(text) if get_origin(kind) is list else text, kind, strict=False)
        except msgspec.ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from error

    return read


def _presets(_: argparse.Namespace) -> None:
    for name, recipe in PRESETS.items():
        teachers = " -> ".join(
            f"{iteration.name} ({' + '.join(map(str, iteration.kmeans.classes))} clusters, {iteration.pretrain.steps} steps)"
            for iteration in recipe.iterations
        )
        print(f"{name:22} {recipe.corpus.name}: {teachers}")


def _import(options: argparse.Namespace) -> None:
    from hubert_ray.speech_model import load, path_of

    path_of(options.name)  # a wrong name or place is told before the model is read
    storage = Storage(options.storage)
    print(load(options.model).store(storage, options.name))


def _export(options: argparse.Namespace) -> None:
    from hubert_ray.speech_model import load

    for file in load(options.model).save(options.format, options.folder):
        print(file)


def _extract_features(options: argparse.Namespace) -> None:
    recipe, storage, cluster = _load(options)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", options.name):
        raise RecipeError(f"'{options.name}': give a name of letters, digits, '_', '-' and '.'")
    what = options.name, options.model, options.layer, options.dtype
    step, seal, skipped = pipeline.extract_features(recipe, storage, cluster, _Connection(cluster), *what)
    print(storage.full(step.artifact.path), "done before" if skipped else f"{seal.facts['seconds']:.1f} s")


def _bundle(options: argparse.Namespace) -> None:
    recipe, storage, _ = _load(options)
    name = _name_of_stage(recipe, "learn_kmeans", options.of)
    (step,) = (planned for planned in pipeline.plan(recipe, storage) if planned.stage.name == name)
    from hubert_ray.unit_bundle import make_bundle

    seconds = options.window_seconds, options.context_seconds
    teacher, kmeans = step.stage.settings["teacher"], step.stage.settings["kmeans"]
    card = make_bundle(step.artifact, teacher, kmeans.classes, step.inputs, options.folder, *seconds)
    print(
        f"{options.folder}: {' + '.join(map(str, card.classes))} units at {card.label_rate_hz} Hz, digest {card.digest[:16]}"
    )


def _units(options: argparse.Namespace) -> int:
    from hubert_ray.unit_bundle import load_units
    from hubert_ray.unit_files import write_units

    bundle = load_units(options.bundle, options.device)
    written, failed = write_units(bundle, options.audio, options.output, options.deduplicate)
    if failed:
        print(f"hubert-ray: {failed} of {written + failed} recordings could not be used", file=sys.stderr)
    return 1 if failed else 0


def _remove(options: argparse.Namespace) -> None:
    storage = Storage(options.storage)
    path = options.path.strip("/")
    if path.split("/")[0] not in ("runs", "corpora") or "/" not in path or ".." in path.split("/"):
        raise RecipeError(
            f"'{options.path}': give a path below the storage folder, such as runs/mine or runs/mine/iter2"
        )
    if not storage.exists(path):
        raise RecipeError(f"'{path}' does not exist in {storage.url}")
    for name in storage.list(path, recursive=True):
        if name.split("/")[-1] == layout.SEAL:
            storage.delete(
                f"{path}/{name}"
            )  # unseal first: a removal that is interrupted leaves nothing that looks whole
    storage.delete(path)
    print(f"removed {path}")


if __name__ == "__main__":
    sys.exit(main())
