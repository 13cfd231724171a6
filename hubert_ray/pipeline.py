"""In what order does a recipe run, and what is already done? recipe -> stages with their inputs -> plan, skip, run.

A recipe unrolls into stages without a special case: each iteration is learn_kmeans, assign_labels, pretrain and
measure_layers; its teacher is an input like any other. Stage functions are imported when they run, so that planning needs
neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from hubert_ray import machine
from hubert_ray.config.cluster import Cluster
from hubert_ray.config.recipe import Iteration, Kmeans, Layer, Mix, Recipe, parts_of
from hubert_ray.config.sizes import ModelSize
from hubert_ray.errors import CorpusError, HubertRayError, RecipeError, StorageError
from hubert_ray.machine import NodeReport
from hubert_ray.storage import layout
from hubert_ray.storage.artifacts import Artifact, Identity, Seal, identity_of
from hubert_ray.storage.filesystem import Storage

if TYPE_CHECKING:
    from hubert_ray.health import Finding

MEASURE_SECONDS = 300.0  # of train and of dev audio that measure_layers uses


@dataclass(frozen=True)
class Stage:
    """One node of the run. `kind` names the module and the function in stages/; `settings` are its arguments."""

    name: str
    kind: str
    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)  # role -> name of another stage, or `run/iteration` elsewhere


@dataclass(frozen=True)
class Planned:
    """A stage with its identity and, where it is finished, its seal."""

    stage: Stage
    artifact: Artifact
    inputs: dict[str, Artifact]
    seal: Seal | None


def unroll(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe in order. Raises RecipeError where iterations do not fit together."""
    stages = [Stage("prepare_data", "prepare_data", {"corpus": recipe.corpus})]
    for position, iteration in enumerate(recipe.iterations):
        stages += _iteration_stages(recipe, position, iteration)
    if recipe.finetune:
        stages += _recogniser_stages(recipe)
    finished = {stage.name: stage.name for stage in stages}
    return [*stages, Stage("report", "report", {}, finished)]


def _iteration_stages(recipe: Recipe, position: int, iteration: Iteration) -> list[Stage]:
    name, teacher = iteration.name, iteration.teacher
    learned: dict[str, str] = {"corpus": "prepare_data"}
    if isinstance(teacher, Layer):
        learned["teacher"] = _teacher_input(recipe, position, teacher)
    classes = iteration.kmeans.classes
    following = recipe.iterations[position + 1 :]
    probe = max(following[0].kmeans.classes if following else classes)
    trained = {
        "model": iteration.model,
        "classes": classes,
        "frame_rate_hz": teacher.frame_rate_hz,
        "settings": iteration.pretrain,
        "languages": {part.name: part.language for part in recipe.corpus.parts}
        if isinstance(recipe.corpus, Mix)
        else {},
    }
    measured = {"layers": iteration.model.layers, "clusters": probe, "seconds": MEASURE_SECONDS}
    codebook, labels, model = f"{name}/learn_kmeans", f"{name}/assign_labels", f"{name}/pretrain"
    return [
        Stage(codebook, "learn_kmeans", {"teacher": teacher, "kmeans": iteration.kmeans}, learned),
        Stage(labels, "assign_labels", {"teacher": teacher, "classes": classes}, learned | {"codebook": codebook}),
        Stage(model, "pretrain", trained, {"corpus": "prepare_data", "labels": labels}),
        Stage(f"{name}/measure_layers", "measure_layers", measured, {"corpus": "prepare_data", "model": model}),
    ]


def _teacher_input(recipe: Recipe, position: int, teacher: Layer) -> str:
    """The stage whose model teaches: an earlier iteration of this recipe, or `run/iteration` of another run."""
    if "/" in teacher.of:
        if len(teacher.of.split("/")) != 2:
            raise RecipeError(f"teacher.of = '{teacher.of}': for a model of another run write '<run>/<iteration>'")
        return teacher.of + "/pretrain"
    earlier = {iteration.name: iteration for iteration in recipe.iterations[:position]}
    if teacher.of not in earlier:
        raise RecipeError(
            f"iteration '{recipe.iterations[position].name}' learns from '{teacher.of}', which is not an earlier iteration; "
            f"found {sorted(earlier) or 'none'}. For a model of another run write of = '<run>/<iteration>'"
        )
    _check_teacher(teacher, recipe.iterations[position].kmeans, earlier[teacher.of].model)
    return f"{teacher.of}/pretrain"


def _check_teacher(teacher: Layer, kmeans: Kmeans, model: ModelSize) -> None:
    if teacher.layer > model.layers:
        raise RecipeError(f"teacher layer {teacher.layer} of '{teacher.of}': it has layers 0 (input) to {model.layers}")
    if kmeans.product and model.dim % len(kmeans.classes):
        raise RecipeError(
            f"kmeans.product: {len(kmeans.classes)} streams cannot share out the {model.dim} features of '{teacher.of}' evenly; "
            f"give kmeans.clusters a number of sizes that divides {model.dim}"
        )


def _recogniser_stages(recipe: Recipe) -> list[Stage]:
    assert recipe.finetune
    inputs = {"corpus": "prepare_data", "model": f"{recipe.iterations[-1].name}/pretrain"}
    settings = msgspec.structs.replace(recipe.finetune, sweep=None, scratch_sweep=None)
    sweeps = {"pretrained": recipe.finetune.sweep, "scratch": recipe.finetune.scratch_sweep}
    stages = [
        Stage(f"finetune/{start}", "finetune", {"start": start, "settings": settings, "sweep": sweep}, inputs)
        for start, sweep in sweeps.items()
        if sweep
    ]
    if recipe.decode:
        systems = {stage.settings["start"]: stage.name for stage in stages}
        stages.append(Stage("decode", "decode", {"settings": recipe.decode}, {"corpus": "prepare_data"} | systems))
    return stages


def plan(recipe: Recipe, storage: Storage) -> list[Planned]:
    """Every stage with its identity and state. Raises StaleArtifactError where storage holds another recipe's work."""
    artifacts: dict[str, Artifact] = {}
    planned: list[Planned] = []
    for stage in unroll(recipe):
        inputs = {role: artifacts.get(name) or _elsewhere(storage, name) for role, name in stage.inputs.items()}
        fingerprints = {role: artifact.identity.fingerprint for role, artifact in inputs.items()}
        path = _path(recipe, stage)
        if "corpus" in inputs:
            corpus = planned[0].seal
            fingerprints["corpus"] = _content(corpus) if corpus else _content_of(storage, path, fingerprints["corpus"])
        artifact = Artifact(storage, path, identity_of(stage.kind, _identity_settings(stage), fingerprints))
        if "teacher" in inputs and stage.kind == "learn_kmeans":
            _check_other_teacher(stage.settings["teacher"], stage.settings["kmeans"], inputs["teacher"])
        artifacts[stage.name] = artifact
        planned.append(Planned(stage, artifact, inputs, artifact.seal_or_none()))
    return planned


def _content(corpus: Seal) -> str:
    """What was read in belongs to the identity of all that is made of a corpus; where it was read from does not."""
    return f"{corpus.fingerprint}-{corpus.facts['content']}"


def _content_of(storage: Storage, path: str, corpus: str) -> str:
    """What stands in the place of `_content` while the corpus has no seal: the content that an artifact was made from, if it was
    of this corpus. Its own seal will tell."""
    there = Artifact(storage, path, Identity("", {}, {})).identity_there()
    found = there.inputs.get("corpus", "") if there else ""
    return found if found.startswith(f"{corpus}-") else corpus


def _path(recipe: Recipe, stage: Stage) -> str:
    return (
        layout.corpus(recipe.corpus.name) if stage.kind == "prepare_data" else layout.artifact(recipe.name, stage.name)
    )


def _identity_settings(stage: Stage) -> dict[str, Any]:
    """A stage's settings as plain data, without the places where things lie and how often it says how it is doing."""
    settings = msgspec.to_builtins(stage.settings)
    if stage.kind == "pretrain":
        for name in ("checkpoint_steps", "log_steps"):
            del settings["settings"][name]
    if "corpus" in settings:
        corpus = settings["corpus"]
        for part in corpus.get("parts", [corpus]):
            # Languages are no matter of reading either: they come with the settings of training.
            part |= {name: "" for name in ("path", "language") if name in part}
            if part.get("alignments"):
                part["alignments"] = "given"
    if settings.get("languages") == {}:  # the corpus is no mix: there is nothing to balance
        for name in ("language_alpha", "dataset_alpha"):
            del settings["settings"][name]
    return settings


def _elsewhere(storage: Storage, name: str) -> Artifact:
    """A sealed model of another run of the same storage, with the identity it has; a placeholder until it is sealed."""
    path = f"runs/{name}"
    seal_file = f"{path}/{layout.SEAL}"
    if not storage.exists(seal_file):
        return Artifact(storage, path, Identity("not made yet", {"run": name}, {}))
    return Artifact(storage, path, msgspec.json.decode(storage.read(seal_file), type=Seal).identity)


def _check_other_teacher(teacher: Layer, kmeans: Kmeans, model: Artifact) -> None:
    """What a model of another run, or an imported one, cannot give is found before anything runs."""
    if "/" in teacher.of and model.storage.exists(model.file(layout.SEAL)):
        _check_teacher(teacher, kmeans, msgspec.convert(model.read_json(layout.MODEL_CONFIG)["size"], ModelSize))


def run(
    recipe: Recipe, storage: Storage, cluster: Cluster, connect: AbstractContextManager, only: str | None = None
) -> Iterator[tuple[Planned, Seal, bool]]:
    """Runs what is not sealed, in order; yields (stage, seal, skipped). `connect` brings Ray up, once it is needed.

    `only` names a single stage: its inputs must be sealed, and nothing else runs.
    """
    names = [stage.name for stage in unroll(recipe) if only in (None, stage.name)]
    if not names:
        raise RecipeError(f"'{only}' is no stage of this recipe; it has {[s.name for s in unroll(recipe)]}")
    steps = {step.stage.name: step for step in plan(recipe, storage)}
    made_here = {step.artifact.path for step in steps.values()}
    for step in steps.values():
        for artifact in step.inputs.values():
            if artifact.path not in made_here:
                artifact.require()  # a teacher of another run: better missed now than after days of preparation
    storage.write(layout.recipe(recipe.name), msgspec.json.format(msgspec.json.encode(recipe), indent=2))
    up = False
    try:
        for name in names:
            step = steps[name]
            if step.stage.kind == "prepare_data" and step.seal:
                _check_corpus(recipe, step.seal)
            if step.seal:
                yield step, step.seal, True
                continue
            for artifact in step.inputs.values():
                artifact.require()
            if step.stage.kind == "prepare_data":
                _check_source(recipe)
            if not up:
                connect.__enter__()
                up = True
            seal = _execute(step, recipe, cluster)
            yield step, seal, False
            _check_quickly(dataclasses.replace(step, seal=seal))
            steps = {step.stage.name: step for step in plan(recipe, storage)}  # what was made is part of what follows
            if step.stage.kind == "prepare_data" and only is None:
                _check_corpus(recipe, seal)
    finally:
        if up:
            connect.__exit__(None, None, None)


def extract_features(
    recipe: Recipe,
    storage: Storage,
    cluster: Cluster,
    connect: AbstractContextManager,
    name: str,
    model: str,
    layer: int | None,
    dtype: str,
) -> tuple[Planned, Seal, bool]:
    """Features of the recipe's corpus, which must be sealed, as an artifact `name` of its run: (stage, seal, skipped).

    Not part of `run`, for nothing that follows reads them.
    """
    corpus = plan(recipe, storage)[0]
    content = _content(corpus.artifact.require())
    from hubert_ray.stages.extract_features import Source  # with torch

    source = Source.of(model, layer)
    stage = Stage(f"extract_features/{name}", "extract_features", {"source": source, "dtype": dtype})
    inputs = {"corpus": content, "model": source.fingerprint}
    identity = identity_of(stage.kind, {"layer": source.layer, "dtype": dtype}, inputs)
    artifact = Artifact(storage, layout.artifact(recipe.name, stage.name), identity)
    step = Planned(stage, artifact, {"corpus": corpus.artifact}, artifact.seal_or_none())
    if step.seal:
        return step, step.seal, True
    with connect:
        return step, _execute(step, recipe, cluster), False


def _check_quickly(step: Planned) -> None:
    """Tells what is wrong with a stage that has just finished. A check that cannot be made must not cost the run."""
    try:
        for finding in findings_of(step):
            if finding.status != "ok":
                print(f"{finding.status}: {finding.check}: {finding.found}. The check is against {finding.prevents}")
    except Exception as error:
        print(f"warning: {step.stage.name} could not be checked: {error!r}. Try `hubert-ray doctor`")


def findings_of(step: Planned, reread: bool = False) -> Iterator[Finding]:
    """The checks of one finished stage; none where it is not finished. `reread`: those too that go over audio and labels again."""
    from hubert_ray import health  # with numpy

    if step.seal is None:
        return
    settings = step.stage.settings
    match step.stage.kind:
        case "prepare_data":
            yield from health.corpus_findings(step.artifact, reread)
        case "learn_kmeans":
            rate, kmeans = settings["teacher"].frame_rate_hz, settings["kmeans"]
            yield from health.codebook_findings(step.inputs["corpus"], step.artifact, rate, kmeans)
        case "assign_labels":
            rate, classes = settings["teacher"].frame_rate_hz, settings["classes"]
            yield from health.label_findings(step.inputs["corpus"], step.artifact, rate, classes, reread)
        case "pretrain" | "finetune":
            yield health.weights_finding(step.stage.name, step.artifact)


def examine(recipe: Recipe, storage: Storage, cluster: Cluster, nodes: list[NodeReport]) -> Iterator[Finding]:
    """Every check of a run: of what is finished, of the nodes (none: not asked), and of GPU memory for what is to come."""
    from hubert_ray import health

    if not storage.exists(""):
        yield health.Finding(
            "run.storage", "failed", f"there is nothing at {storage.url}", "looking at the wrong storage"
        )
        return
    try:
        steps = plan(recipe, storage)
    except HubertRayError as error:
        yield health.Finding("run.artifacts", "failed", str(error), "results of one recipe under the name of another")
        steps = []
    else:
        yield health.chain_finding({step.artifact.path: step.inputs for step in steps if step.seal})
        done = sum(step.seal is not None for step in steps)
        said = f"{done} of {len(steps)} stages of {recipe.name} are finished in {storage.url}"
        yield health.Finding("run.finished", "ok" if done else "warning", said, "looking at the wrong storage or run")
    corpus_is_sound = True
    for step in steps:
        try:
            if step.seal:
                yield health.files_finding(step.stage.name, step.artifact)
            for finding in findings_of(step, reread=True):
                corpus_is_sound &= step.stage.kind != "prepare_data" or finding.status != "failed"
                yield finding
        except Exception as error:  # whatever a damaged file makes a library raise
            again = (
                f"make it again after {step.artifact.remove_command()}" if corpus_is_sound else "mend the corpus first"
            )
            said = f"cannot be read ({type(error).__name__}: {error}); {again}"
            yield health.Finding(f"{step.stage.name}.readable", "failed", said, "a later stage that dies of it")
    if steps and not steps[0].seal:
        yield _source_finding(recipe)
    if nodes:
        yield from health.node_findings(nodes)
    gpu_gib = min((node.gpu_gib for node in nodes if node.gpu_gib), default=None)
    for iteration in recipe.iterations if cluster.train_gpus else ():
        yield health.memory_finding(iteration.name, iteration.model, iteration.pretrain, cluster, gpu_gib)


def _source_finding(recipe: Recipe) -> Finding:
    from hubert_ray.health import Finding

    try:
        _check_source(recipe)
    except CorpusError as error:
        return Finding("corpus.source", "failed", str(error), "a run that ends before it began")
    return Finding("corpus.source", "ok", "the recordings' folders are there", "a run that ends before it began")


def _check_source(recipe: Recipe) -> None:
    """Says before Ray is started that there is nothing to read."""
    for part in parts_of(recipe.corpus):
        for name in ("path", "alignments"):
            place = getattr(part, name, None)
            if place is not None:
                try:
                    Storage.of(place)
                except StorageError as error:
                    setting = f"corpus.parts.{part.name}.{name}" if isinstance(recipe.corpus, Mix) else f"corpus.{name}"
                    raise CorpusError(f"{setting}: {error}; give one with --set {setting}=…") from error


def _check_corpus(recipe: Recipe, seal: Seal) -> None:
    """Says now what fine-tuning and decoding would find missing after days of pretraining."""
    for part in parts_of(recipe.corpus):
        source, made_from = getattr(part, "path", None), seal.facts["sources"][part.name]
        if source != made_from:
            print(
                f"note: corpora/{recipe.corpus.name} was made from '{made_from}', and the recipe names '{source}'. If that "
                "is other speech, give it another corpus.name"
            )
    needed = (["train", "dev"] if recipe.finetune else []) + (["test"] if recipe.decode else [])
    missing = [split for split in needed if not seal.facts["transcribed"][split]]
    if missing:
        raise RecipeError(
            f"fine-tuning and decoding need transcribed utterances in {', '.join(needed)}; corpora/{recipe.corpus.name} has none "
            f"in {', '.join(missing)}. Name speakers with corpus.dev_speakers and corpus.test_speakers, or turn both off: "
            "finetune = false and decode = false in the recipe file, --set finetune=null --set decode=null on the command line"
        )


def study(
    kind: str,
    recipe: Recipe,
    storage: Storage,
    cluster: Cluster,
    connect: AbstractContextManager,
    models: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Runs stages/<kind>.py on the recipe's corpus and on finished models: iterations of the recipe, or `<run>/<iteration>`.

    It is no stage: nothing is made of what it finds, and it may be asked again for other settings; what it has measured stays.
    """
    artifacts = {step.stage.name: step.artifact for step in plan(recipe, storage)}
    stages = {name: f"{name}/pretrain" for name in models}
    inputs = {"corpus": artifacts["prepare_data"]} | {
        name: artifacts.get(stage) or _elsewhere(storage, stage) for name, stage in stages.items()
    }
    for artifact in inputs.values():
        artifact.require()
    from hubert_ray.stages.context import Work  # with torch

    function = getattr(importlib.import_module(f"hubert_ray.stages.{kind}"), kind)
    output = Artifact(storage, layout.artifact(recipe.name, kind), identity_of(kind, {}, {}))
    with connect:
        function(Work(kind, recipe, cluster, output, inputs), **settings)


def finished_models(recipe: Recipe, storage: Storage) -> list[str]:
    """The recipe's iterations whose models are sealed."""
    return [
        step.stage.name.split("/")[0] for step in plan(recipe, storage) if step.stage.kind == "pretrain" and step.seal
    ]


def _execute(step: Planned, recipe: Recipe, cluster: Cluster) -> Seal:
    from hubert_ray.stages.context import Work  # with torch

    function = getattr(importlib.import_module(f"hubert_ray.stages.{step.stage.kind}"), step.stage.kind)
    step.artifact.claim()
    started, clock = datetime.now(UTC), time.perf_counter()
    work = Work(step.stage.name, recipe, cluster, step.artifact, step.inputs)
    with machine.PeakMemory() as memory:
        facts = function(work, **step.stage.settings)
    step.artifact.seal(
        {
            **facts,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - clock, 3),
            "peak_memory_gib": memory.gib,
            "versions": machine.versions(),
            "hardware": machine.hardware(),
            "cluster": msgspec.to_builtins(cluster),
        }
    )
    return step.artifact.require()
