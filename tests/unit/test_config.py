"""config/: presets resolve, overrides are checked by name and type, the paper's numbers stand."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from hubert_ray import pipeline
from hubert_ray.config.loading import load_cluster, load_recipe
from hubert_ray.config.presets import PRESETS
from hubert_ray.config.recipe import LibriSpeech, Recipe
from hubert_ray.config.sizes import SIZES
from hubert_ray.errors import CorpusError, RecipeError, StaleArtifactError
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_survive_json_and_unroll(name, tmp_path):
    recipe = load_recipe(name, [])
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe == PRESETS[name]
    planned = pipeline.plan(recipe, Storage(str(tmp_path)))
    assert [p.stage.name for p in planned][0] == "prepare_data"
    assert planned[-1].stage.name == "report"
    assert len({p.artifact.identity.fingerprint for p in planned}) == len(planned)


def test_overrides_reach_nested_settings_by_name():
    recipe = load_recipe(
        "demo",
        [
            "iterations.iter2.pretrain.steps=7",
            "iterations.iter1.kmeans.clusters=50",
            "name=other",
            "finetune.scratch_sweep=null",
        ],
    )
    assert recipe.iterations[1].pretrain.steps == 7
    assert recipe.iterations[0].kmeans.clusters == 50
    assert recipe.name == "other"
    assert recipe.finetune.scratch_sweep is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iterations.iter1.pretrain.stepz=7", "did you mean 'steps'"),
        ("iterations.iter3.pretrain.steps=7", "there are iter1, iter2"),
        ("iterations.iter1.pretrain.steps=many", "iterations.iter1.pretrain.steps = .many.: expected int, got str"),
        ("iterations.iter1.pretrain.steps", "write name=value"),
        ("iterations.iter1.kmeans.clusters=100000", "clusters = 100000: expected int <= 65536"),
        ("iterations.0.pretrain.steps=7", "there are iter1, iter2"),
        ("iterations.iter1.pretrain.micro_batch_seconds=1", "one crop"),
        ("iterations.iter2.name=iter1", "different names"),
        ("name=../elsewhere", "becomes a folder"),
        ("iterations.iter1.pretrain.mask.prob=1.5", "mask.prob = 1.5: expected float < 1.0"),
        ("iterations.iter1.pretrain.warmup_share=7", "expected float < 1.0"),
        ("finetune.steps=0", "finetune.steps = 0: expected int >= 1"),
        ("decode.beam=0", "decode.beam = 0: expected int >= 1"),
        ("decode.lm_weights=[]", "decode.lm_weights = .*length >= 1"),
        ("iterations.iter1.pretrain.crop_lengths=0", "expected int >= 1"),
        ("iterations.iter1.pretrain.checkpoint_steps=0", "expected int >= 1"),
        ("iterations.iter1.pretrain.batch_seconds=1.0", "at least one micro-batch"),
        ("iterations.iter1.pretrain.min_crop_seconds=0.01", "too short for"),
        ("iterations.iter1.model.position_groups=7", "multiple of model.position_groups"),
        ("iterations.iter1.model.dropout=2.0", "expected float < 1.0"),
        ("iterations.iter1.model=bsae", "did you mean 'base'"),
        ("finetune.schedule_shares=[0.9, 0.9, 0.9]", "together at most 1"),
        ("finetune.sweep.peak_lr=[0.01, 0.001]", "the smaller number first"),
        ("finetune.sweep.trials=0", "expected int >= 1"),
        ("finetune=false", "decode off too"),
        ("corpus.train_speakers=-3", "expected int >= 1"),
        ("corpus.kind=librspeech", "there are embedded, librispeech, .*mix; did you mean 'librispeech'"),
        ("iterations.iter2.teacher.kind=mffc", "did you mean 'mfcc'"),
        ("iterations.iter1.kmeans.clusters=[100]", "clusters = .*length >= 2"),
        ("iterations.iter1.kmeans.clusters=[100, 1]", "clusters.* = 1: expected int >= 2"),
        ("iterations.iter1.kmeans.clusters=[50, 50]", "the same codebook twice"),
        (
            "iterations.iter1.kmeans.product=true",
            "product with clusters = 100: give a number of clusters for each part",
        ),
        ("iterations.iter1.teacher.splice=2", "teacher.splice: an odd number"),
        ("iterations.iter1.teacher.derivatives=[0, 3]", "derivatives"),
        ("iterations.iter1.teacher.derivatives=[1, 1]", "each order once"),
        ("iterations.iter1.pretrain.seed=-1", "seed = -1: expected int >= 0"),
        ("iterations.iter2.kmeans.seed=-1", "seed = -1: expected int >= 0"),
        ("corpus.seed=-1", "seed = -1: expected int >= 0"),
        ("finetune.seed=-1", "seed = -1: expected int >= 0"),
        ("iterations.iter1.name=finetune", "cannot be called 'finetune'"),
        ("iterations.iter1.name=corpus", "cannot be called 'corpus'"),
        ("iterations.iter1.name=stability", "cannot be called 'stability'"),
        ("iterations.iter1.kmeans.algorithm=minibatch", "there are lloyd, mini_batch; did you mean 'mini_batch'"),
    ],
)
def test_bad_overrides_say_what_is_wrong(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iterations.iter2.teacher.of=iter9", "not an earlier iteration"),
        ("iterations.iter2.teacher.layer=9", "0 .input. to 4"),
        (
            "iterations.iter2.kmeans={clusters=[9, 9, 9, 9, 9], product=true}",
            "5 streams cannot share out the 192 features",
        ),
    ],
)
def test_impossible_teachers_are_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        pipeline.unroll(load_recipe("demo", [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.layer=9", "0 .input. to 4"),
        (
            "kmeans={clusters=[9, 9, 9, 9, 9], product=true}",
            "5 streams cannot share out the 192 features of 'other/iter1'",
        ),
    ],
)
def test_impossible_teachers_of_other_runs_are_refused(tmp_path, override, message):
    recipe, storage = load_recipe("demo", ["name=other"]), Storage(str(tmp_path))
    model = {step.stage.name: step.artifact for step in pipeline.plan(recipe, storage)}["iter1/pretrain"]
    model.write_json(layout.MODEL_CONFIG, {"kind": "hubert", "size": recipe.iterations[0].model})
    model.seal({})
    learns = ["iterations.iter2.teacher.of=other/iter1", "iterations.iter2.teacher.layer=1"]
    pipeline.plan(load_recipe("demo", learns), storage)
    with pytest.raises(RecipeError, match=message):
        pipeline.plan(load_recipe("demo", [*learns, f"iterations.iter2.{override}"]), storage)


def test_recipe_file_changes_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'preset = "demo"\nname = "mine"\n[corpus]\nkind = "librispeech"\nname = "speech"\npath = "/data"\n'
        "[iterations.iter1.pretrain]\nsteps = 3\n"
    )
    recipe = load_recipe(str(file), ["corpus.path=/other"])
    assert recipe.corpus == LibriSpeech(name="speech", path="/other")
    assert recipe.iterations[0].pretrain.steps == 3
    with pytest.raises(RecipeError, match="'corpus.train_speakers' is no setting|unknown field"):
        load_recipe(str(file), ["corpus.train_speakers=3"])


def test_every_field_of_a_switched_corpus_can_be_set(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "demo"\n[corpus]\nkind = "librispeech"\nname = "speech"\npath = "/data"\n')
    recipe = load_recipe(str(file), ["corpus.shard_mib=64", "corpus.alignments=/al", 'corpus.dev_speakers=["26"]'])
    assert recipe.corpus == LibriSpeech(
        name="speech", path="/data", alignments="/al", dev_speakers=("26",), shard_mib=64
    )


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_a_kind_is_switched_field_by_field_in_any_order(order):
    overrides = ["corpus.kind=librispeech", "corpus.name=speech", "corpus.path=/data"]
    recipe = load_recipe("demo", [overrides[i] for i in order])
    assert recipe.corpus == LibriSpeech(name="speech", path="/data")


def test_no_speaker_is_in_two_splits():
    corpus = 'corpus={kind="librispeech", name="a", path="/x", dev_speakers=["1", "2"], test_speakers=["2"]}'
    with pytest.raises(RecipeError, match="speakers 2 stand in both"):
        load_recipe("demo", [corpus])


def test_a_model_may_be_named_by_its_size():
    assert load_recipe("demo", ["iterations.iter1.model=base"]).iterations[0].model == SIZES["base"]


def test_false_switches_any_part_off_in_overrides_and_files(tmp_path):
    assert load_recipe("demo", ["finetune=false", "decode=false"]).finetune is None
    file = tmp_path / "mine.toml"
    file.write_text('preset = "demo"\n[finetune]\nscratch_sweep = false\n')
    assert load_recipe(str(file), []).finetune.scratch_sweep is None


def test_recognisers_can_be_turned_off_in_a_file(tmp_path):
    file = tmp_path / "units.toml"
    file.write_text('preset = "demo"\nfinetune = false\ndecode = false\n')
    recipe = load_recipe(str(file), [])
    assert (recipe.finetune, recipe.decode) == (None, None)
    assert [s.kind for s in pipeline.unroll(recipe)].count("finetune") == 0


def test_a_runs_recipe_json_is_a_recipe(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_bytes(msgspec.json.encode(PRESETS["demo"]))
    assert load_recipe(str(file), []) == PRESETS["demo"]


@pytest.mark.parametrize("text", ["[broken", "finetune = null", "", "preset = 5", 'preset = ["demo"]'])
def test_unusable_recipe_files_are_named(tmp_path, text):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match="bad.toml"):
        load_recipe(str(file), [])


def test_unknown_recipe_suggests_a_preset():
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        load_recipe("demmo", [])


def test_cluster_settings_are_checked():
    assert load_cluster(None, ["train_workers=8", "precision=bf16"]).train_workers == 8
    with pytest.raises(RecipeError, match="did you mean 'train_workers'"):
        load_cluster(None, ["train_worker=8"])
    with pytest.raises(RecipeError, match="train_workers = 0: expected int >= 1"):
        load_cluster(None, ["train_workers=0"])
    with pytest.raises(RecipeError, match="zero_stage"):
        load_cluster(None, ["zero_stage=4"])
    with pytest.raises(RecipeError, match="there are bf16, fp32"):
        load_cluster(None, ["precision=fp16"])
    with pytest.raises(RecipeError, match="train_gpus = -1"):
        load_cluster(None, ["train_gpus=-1"])
    with pytest.raises(RecipeError, match="at most train_workers = 2"):
        load_cluster(None, ["train_workers_min=5"])


def test_several_streams_reach_labels_and_model():
    overrides = ["clusters=[100, 200, 300]", "product=true"]
    recipe = load_recipe("demo", [f"iterations.iter1.kmeans.{o}" for o in overrides])
    assert recipe.iterations[0].kmeans.classes == (100, 200, 300)
    stages = {stage.name: stage.settings for stage in pipeline.unroll(recipe)}
    assert stages["iter1/assign_labels"]["classes"] == stages["iter1/pretrain"]["classes"] == (100, 200, 300)
    assert stages["iter2/pretrain"]["classes"] == (100,)
    with pytest.raises(RecipeError, match="5 streams cannot share out"):
        load_recipe(
            "demo", ["iterations.iter1.kmeans.clusters=[9, 9, 9, 9, 9]", "iterations.iter1.kmeans.product=true"]
        )
    assert load_recipe("demo", ["iterations.iter1.kmeans.clusters=[50, 100]"]).iterations[0].kmeans.classes == (50, 100)


def test_fingerprints_change_with_settings_and_flow_downstream_only(tmp_path):
    storage = Storage(str(tmp_path))

    def fingerprints(overrides):
        return {
            p.stage.name: p.artifact.identity.fingerprint
            for p in pipeline.plan(load_recipe("demo", overrides), storage)
        }

    before, after = fingerprints([]), fingerprints(["iterations.iter2.kmeans.clusters=64"])
    changed = {name for name in before if before[name] != after[name]}
    assert "iter2/learn_kmeans" in changed
    assert "report" in changed
    assert not changed & {"prepare_data", "iter1/learn_kmeans", "iter1/assign_labels", "iter1/pretrain"}


def test_what_changes_no_number_is_no_part_of_identity(tmp_path):
    def fingerprints(*overrides):
        planned = pipeline.plan(load_recipe("demo", list(overrides)), Storage(str(tmp_path)))
        return [p.artifact.identity.fingerprint for p in planned]

    balance = [f"iterations.iter1.pretrain.{name}_alpha=0.5" for name in ("language", "dataset")]
    assert fingerprints(*balance) == fingerprints()
    often = [f"iterations.iter1.pretrain.{name}_steps=7" for name in ("log", "checkpoint")]
    assert fingerprints(*often) == fingerprints() != fingerprints("iterations.iter1.pretrain.steps=7")


def test_a_corpus_that_lost_its_seal_makes_nothing_stale(tmp_path):
    """What was made of it waits for the new seal to say whether the content is the same."""
    storage, recipe = Storage(str(tmp_path)), load_recipe("demo", [])
    corpus, codebook, *_ = (planned.artifact for planned in pipeline.plan(recipe, storage))
    corpus.seal({"content": "abc"})
    _, codebook, labels, *_ = (planned.artifact for planned in pipeline.plan(recipe, storage))
    codebook.seal({})
    labels.claim()
    storage.delete(corpus.file(layout.SEAL))
    planned = pipeline.plan(recipe, storage)
    assert [p.stage.name for p in planned if p.seal] == ["iter1/learn_kmeans"]
    assert planned[1].artifact.identity == codebook.identity
    with pytest.raises(StaleArtifactError, match="inputs.corpus"):  # another corpus is another corpus
        pipeline.plan(load_recipe("demo", ["corpus.train_speakers=3", "corpus.name=other"]), storage)


@pytest.mark.parametrize("kind", ["librispeech", "folder", "table", "parquet", "webdataset"])
def test_storage_place_is_no_part_of_identity(tmp_path, kind):
    def fingerprints(path, checks=""):
        recipe = load_recipe("demo", [f'corpus={{kind="{kind}", name="c", path="{path}"{checks}}}'])
        return [p.artifact.identity.fingerprint for p in pipeline.plan(recipe, Storage(str(tmp_path)))]

    assert fingerprints("/one") == fingerprints("/two")
    assert fingerprints("/one") != fingerprints("/one", ", checks={max_seconds=30.0}")


MIX = """
preset = "demo"
name = "many"
[corpus]
kind = "mix"
name = "many"
parts = [
    {kind = "librispeech", name = "ls", path = "/data/ls", language = "en"},
    {kind = "folder", name = "radio", path = "/data/radio", language = "fr"},
    {kind = "embedded", name = "made-up", train_speakers = 2},
]
"""


@pytest.fixture
def mix(tmp_path) -> str:
    (tmp_path / "mix.toml").write_text(MIX)
    return str(tmp_path / "mix.toml")


def test_a_mix_is_read_and_its_parts_are_overridden_by_name(mix):
    recipe = load_recipe(mix, ["corpus.parts.radio.path=/elsewhere", "corpus.parts.ls.language=gb"])
    assert [(part.name, part.language) for part in recipe.corpus.parts] == [
        ("ls", "gb"),
        ("radio", "fr"),
        ("made-up", "en"),
    ]
    assert recipe.corpus.parts[1].path == "/elsewhere"
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.parts.tv.path=/x", "corpus.parts.tv.* there are ls, radio, made-up"),
        ("corpus.parts.radio.name=ls", "the parts of a mix must have different names"),
        ("corpus.parts.radio.name=a/b", "'a/b' becomes a folder"),
        ('corpus.parts.ls={dev_speakers=["1"], test_speakers=["1"]}', "corpus ls: speakers 1 stand in both"),
        ("corpus.parts=[]", "corpus.parts = .*length >= 1"),
        ("iterations.iter1.pretrain.language_alpha=1.5", "language_alpha = 1.5: expected float <= 1.0"),
    ],
)
def test_bad_mixes_say_what_is_wrong(mix, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(mix, [override])


def test_another_balance_of_a_mix_reads_no_audio_again(mix, tmp_path):
    """Neither another alpha nor another language changes what was read, clustered or labelled; training it does change."""

    def fingerprints(*overrides):
        planned = pipeline.plan(load_recipe(mix, list(overrides)), Storage(str(tmp_path / "storage")))
        return {p.stage.name: p.artifact.identity.fingerprint for p in planned}

    before = fingerprints()
    for override in ("iterations.iter1.pretrain.dataset_alpha=0.5", "corpus.parts.radio.language=it"):
        after = fingerprints(override)
        same = {name for name in before if before[name] == after[name]}
        assert {"prepare_data", "iter1/learn_kmeans", "iter1/assign_labels"} <= same
        assert "iter1/pretrain" not in same
    assert fingerprints("corpus.parts.ls.path=/elsewhere") == before
    assert fingerprints("corpus.parts.made-up.seed=1")["prepare_data"] != before["prepare_data"]


def test_a_missing_folder_of_a_mix_is_named_with_its_setting(mix, tmp_path):
    recipe = load_recipe(mix, [f"corpus.parts.ls.path={tmp_path}"])
    with pytest.raises(CorpusError, match="corpus.parts.radio.path: '/data/radio': there is no such folder"):
        pipeline._check_source(recipe)


def test_paper_numbers_of_the_presets():
    base, large, xlarge = (PRESETS[n] for n in ("hubert_base_ls960", "hubert_large_ll60k", "hubert_xlarge_ll60k"))
    first, second = base.iterations
    assert (first.kmeans.clusters, first.pretrain.steps, second.kmeans.clusters, second.pretrain.steps) == (
        100,
        250_000,
        500,
        400_000,
    )
    assert (second.teacher.layer, large.iterations[0].teacher.layer) == (6, 9)
    rates = [r.iterations[0].pretrain.peak_lr for r in (base, large, xlarge)]
    batches = [r.iterations[0].pretrain.batch_seconds for r in (base, large, xlarge)]
    clips = [r.iterations[0].pretrain.clip_norm for r in (base, large, xlarge)]
    assert (rates, batches, clips) == ([5e-4, 1.5e-3, 3e-3], [2800, 7200, 5760], [10, 1, 1])
