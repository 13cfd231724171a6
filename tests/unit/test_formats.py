"""Do models survive every format, are fairseq's own files read as they are, and is no code in a file ever run?"""

import argparse
import json
import os
import pickle
import sys
import types

import msgspec
import pytest
import torch

import hubert_ray
from hubert_ray.asr.letters import ALPHABET
from hubert_ray.config.sizes import BASE, LARGE
from hubert_ray.formats import files, names
from hubert_ray.formats.checkpoint import BLANK, Checkpoint
from hubert_ray.formats.names import InteropError
from hubert_ray.model.hubert import Hubert, InputError
from hubert_ray.speech_model import SpeechModel
from hubert_ray.storage.filesystem import Storage

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
CLUSTERS = (*SPECIALS, *map(str, range(20)))
SMALL_BASE = msgspec.structs.replace(
    BASE, conv_channels=32, layers=2, dim=64, ffn_dim=128, heads=2, codeword_dim=16, position_groups=4
)
SMALL_LARGE = msgspec.structs.replace(
    LARGE, conv_channels=32, layers=2, dim=64, ffn_dim=128, heads=4, codeword_dim=16, position_groups=4
)
SIZES = {"base": SMALL_BASE, "large": SMALL_LARGE, "conv bias": msgspec.structs.replace(SMALL_LARGE, conv_bias=True)}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def pretrained(request) -> Checkpoint:
    torch.manual_seed(0)
    hubert = Hubert(request.param, (len(CLUSTERS),))
    return Checkpoint(request.param, hubert.encoder.state_dict(), hubert.head.state_dict(), (CLUSTERS,))


@pytest.fixture
def recogniser(pretrained) -> Checkpoint:
    head = torch.nn.Linear(pretrained.size.dim, len(ALPHABET)).state_dict()
    return Checkpoint(pretrained.size, pretrained.encoder, letters=head, alphabet=ALPHABET)


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def opened(kind: str, folder) -> SpeechModel:
    return hubert_ray.load(folder / "model.pt" if kind in ("fairseq", "s3prl") else folder)


@pytest.mark.parametrize("kind", files.WRITERS)
def test_a_pretrained_model_there_and_back(kind, pretrained, tmp_path):
    SpeechModel(pretrained).save(kind, tmp_path)
    back = opened(kind, tmp_path).checkpoint
    wanted = dict(pretrained.encoder)
    if kind == "torchaudio":
        wanted["mask_vector"] = torch.zeros_like(wanted["mask_vector"])
    assert_equal(back.encoder, wanted)
    keeps_head = kind in ("fairseq", "s3prl", "hubert_ray")
    assert (back.prediction is not None) == keeps_head
    if keeps_head:
        assert_equal(back.prediction, pretrained.prediction)
        assert back.classes == pretrained.classes
    size = pretrained.size if keeps_head else msgspec.structs.replace(pretrained.size, codeword_dim=pretrained.size.dim)
    if kind in ("hugging_face", "torchaudio"):  # no field for it there
        size = msgspec.structs.replace(size, conv_grad_scale=1.0)
    assert back.size == size


@pytest.mark.parametrize("kind", ["hugging_face", "fairseq", "torchaudio", "hubert_ray"])
def test_a_recogniser_there_and_back(kind, recogniser, tmp_path):
    SpeechModel(recogniser).save(kind, tmp_path)
    back = opened(kind, tmp_path)
    wave_S = 0.1 * torch.randn(8000)
    mine, theirs = (
        model.recogniser()(model._prepared(wave_S), torch.tensor([8000]))[0]
        for model in (SpeechModel(recogniser), back)
    )
    assert (mine - theirs).abs().max() < 1e-5
    assert back.transcribe(wave_S) == SpeechModel(recogniser).transcribe(wave_S)


@pytest.mark.parametrize("weight_norm", ["parametrized", "legacy"])
@pytest.mark.parametrize("library", ["fairseq", "hugging_face", "torchaudio"])
def test_both_spellings_of_weight_norm(library, weight_norm, pretrained):
    foreign = names.outward(pretrained.encoder, library, weight_norm)
    assert names.library_of(foreign) == library
    back = names.inward(foreign, library)
    wanted = dict(pretrained.encoder)
    if library == "torchaudio":
        wanted["mask_vector"] = torch.zeros_like(wanted["mask_vector"])
    assert_equal(back, wanted)


@pytest.fixture
def fairseq_dictionary(monkeypatch):
    """fairseq's Dictionary as its files name it, for writing only: reading happens without it."""

    class Dictionary:
        def __init__(self, symbols):
            self.bos_word, self.pad_word, self.eos_word, self.unk_word = SPECIALS
            self.symbols = list(symbols)
            self.count = [1] * len(self.symbols)
            self.indices = {symbol: row for row, symbol in enumerate(self.symbols)}
            self.nspecial = 4

    Dictionary.__module__, Dictionary.__qualname__ = "fairseq.data.dictionary", "Dictionary"
    modules = {name: types.ModuleType(name) for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary")}
    modules["fairseq.data.dictionary"].Dictionary = Dictionary
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield Dictionary
    for name in modules:
        assert name in sys.modules


def fairseq_settings(size, normalize) -> dict:
    model = {
        "_name": "hubert",
        "label_rate": 50,
        "extractor_mode": "default" if size.conv_norm == "group" else "layer_norm",
        "encoder_layers": size.layers,
        "encoder_embed_dim": size.dim,
        "encoder_ffn_embed_dim": size.ffn_dim,
        "encoder_attention_heads": size.heads,
        "activation_fn": "gelu",
        "dropout": size.dropout,
        "attention_dropout": size.attention_dropout,
        "activation_dropout": size.activation_dropout,
        "encoder_layerdrop": size.layer_drop,
        "dropout_input": size.input_dropout,
        "final_dim": size.codeword_dim,
        "untie_final_proj": True,
        "layer_norm_first": size.norm_first,
        "conv_feature_layers": f"[({size.conv_channels},10,5)] + [({size.conv_channels},3,2)] * 4 + ...",
        "conv_bias": size.conv_bias,
        "feature_grad_mult": size.conv_grad_scale,
        "conv_pos": 128,
        "conv_pos_groups": size.position_groups,
    }
    return {"model": model, "task": {"_name": "hubert_pretraining", "normalize": normalize, "sample_rate": 16000}}


@pytest.mark.parametrize("as_namespace", [False, True], ids=["cfg", "args"])
def test_a_pretraining_file_as_fairseq_writes_it(as_namespace, pretrained, fairseq_dictionary, tmp_path, monkeypatch):
    state = names.outward(pretrained.encoder, "fairseq", "legacy")
    state |= {f"final_proj.{ending}": pretrained.prediction[f"projection.{ending}"] for ending in ("weight", "bias")}
    state["label_embs_concat"] = pretrained.prediction["codewords"]
    shuffled = (*SPECIALS, *reversed(CLUSTERS[4:]))  # rows follow the file's own dictionary
    settings = fairseq_settings(pretrained.size, pretrained.size.normalize_waveform)
    flat = argparse.Namespace(**settings["model"], **{"normalize": settings["task"]["normalize"]})
    content = {
        "args": flat if as_namespace else None,
        "cfg": None if as_namespace else settings,
        "model": state,
        "criterion": {},
        "optimizer_history": [{"criterion_name": "HubertCriterion", "num_updates": 400_000}],
        "task_state": {"dictionaries": [fairseq_dictionary(shuffled)]},
        "extra_state": {"train_iterator": {"epoch": 1}, "metrics": [[10, "loss", "AverageMeter", {"val": 1.0}]]},
        "last_optimizer_state": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}},
    }
    torch.save(content, tmp_path / "hubert_base.pt")
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails, as for those who do not have it
    found = hubert_ray.load(tmp_path / "hubert_base.pt")
    assert found.size == pretrained.size
    assert_equal(found.checkpoint.encoder, pretrained.encoder)
    assert_equal(found.checkpoint.prediction, pretrained.prediction)
    assert found.checkpoint.classes == (shuffled,)
    assert found.pretraining_model().head.classes == (24,)
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def test_a_fine_tuned_file_as_fairseq_writes_it(pretrained, fairseq_dictionary, tmp_path):
    symbols = [*SPECIALS, "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
    body = names.outward(pretrained.encoder, "fairseq", "legacy")
    head = torch.nn.Linear(pretrained.size.dim, len(symbols))
    state = {f"w2v_encoder.w2v_model.{name}": value for name, value in body.items()}
    state |= {"w2v_encoder.w2v_model.label_embs_concat": pretrained.prediction["codewords"]}
    state |= {f"w2v_encoder.proj.{name}": value for name, value in head.state_dict().items()}
    inner = fairseq_settings(pretrained.size, pretrained.size.normalize_waveform)
    settings = {
        "model": {
            "_name": "hubert_ctc",
            "w2v_path": "x.pt",
            "w2v_args": inner,
            "dropout": 0.0,
            "feature_grad_mult": 0.0,
        },
        "task": {"_name": "hubert_pretraining", "fine_tuning": True},
    }
    content = {"cfg": settings, "model": state, "task_state": {"target_dictionary": fairseq_dictionary(symbols)}}
    torch.save(content, tmp_path / "fine.pt")
    found = hubert_ray.load(tmp_path / "fine.pt")
    assert found.size.heads == pretrained.size.heads
    assert found.size.normalize_waveform == pretrained.size.normalize_waveform
    assert found.size.conv_grad_scale == 0.0
    assert found.checkpoint.alphabet == (BLANK, *symbols[1:])
    wave_S = 0.1 * torch.randn(8000)
    hidden_TD = found.extract(wave_S)
    scores_TV = head(hidden_TD)[:, [symbols.index(s) for s in ("<s>", *ALPHABET[1:])]].log_softmax(1)
    log_probs_1TV, _ = found.recogniser()(found._prepared(wave_S), torch.tensor([8000]))
    assert torch.allclose(log_probs_1TV[0], scores_TV, atol=1e-5)


class Hostile:
    def __reduce__(self):
        return os.system, ("echo code was run > stolen",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["beside the weights", "in the settings", "instead of a tensor"])
def test_no_pickled_code_is_run(place, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "beside the weights": {"model": {}, "cfg": {}, "extra": Hostile()},
        "in the settings": {"model": {}, "cfg": {"model": argparse.Namespace(name=Hostile())}},
        "instead of a tensor": {"encoder.layer_norm.bias": Hostile()},
    }[place]
    torch.save(content, "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InteropError, match=r"posix\.system"):
        hubert_ray.load("bad.pt")
    assert not (tmp_path / "stolen").exists()


def test_a_plain_pickle_and_rubbish_are_refused(tmp_path):
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "text.safetensors").write_bytes(b"not a header")
    for name in ("plain.pt", "empty.bin", "text.safetensors"):
        with pytest.raises(InteropError, match=name):
            hubert_ray.load(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(InteropError, match="holds a list"):
        hubert_ray.load(tmp_path / "list.pt")
    with pytest.raises(InteropError, match="neither a file nor a folder"):
        hubert_ray.load(tmp_path / "absent.pt")
    with pytest.raises(InteropError, match="found neither"):
        hubert_ray.load(tmp_path)


def hugging_face_folder(tmp_path, **changes):
    hubert = Hubert(SMALL_BASE, (24,))
    SpeechModel(Checkpoint(SMALL_BASE, hubert.encoder.state_dict())).save("hugging_face", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "wavlm"},
        {"feat_proj_layer_norm": False},
        {"conv_pos_batch_norm": True},
        {"hidden_act": "relu"},
        {"conv_stride": [5, 2, 2, 2, 2, 2, 4]},
        {"conv_dim": [512] * 6 + [256]},
        {"add_adapter": True},
    ],
    ids=str,
)
def test_another_architecture_is_refused_by_its_settings(changes, tmp_path):
    with pytest.raises(InteropError, match=next(iter(changes))):
        hubert_ray.load(hugging_face_folder(tmp_path, **changes))


def test_another_architecture_is_refused_by_its_weights(pretrained):
    theirs = names.outward(pretrained.encoder, "hugging_face", "legacy")
    with pytest.raises(InteropError, match="no place in HuBERT"):
        names.inward({**theirs, "encoder.layers.0.relative_bias": torch.zeros(1)}, "hugging_face")
    del theirs["feature_projection.layer_norm.weight"]  # as DistilHuBERT
    with pytest.raises(InteropError, match="Distilled"):
        names.inward(theirs, "hugging_face")
    with pytest.raises(InteropError, match="expected those of a HuBERT"):
        names.library_of({"model.layers.0.weight": torch.zeros(1)})


def test_weights_that_do_not_fit_their_settings(tmp_path):
    folder = hugging_face_folder(tmp_path, num_attention_heads=3)
    with pytest.raises(InteropError, match="heads"):
        hubert_ray.load(folder)


def test_extract_is_the_models_own_layer_and_refuses_what_is_no_waveform(pretrained):
    model = SpeechModel(pretrained)
    wave_S = (0.1 * torch.randn(8000)).numpy()
    layers = model.extract_all(wave_S)
    assert [tuple(layer.shape) for layer in layers] == [(24, 64)] * 3
    assert torch.equal(model.extract(wave_S, layer=2), layers[2])
    assert not torch.allclose(layers[1], layers[2])
    for wrong in (wave_S[None], wave_S[:399]):
        with pytest.raises(InputError, match="waveform"):
            model.extract(wrong)
    wave_S[5] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        model.extract(wave_S)
    with pytest.raises(InputError, match="layer"):
        model.extract(0 * wave_S[6:], layer=3)
    with pytest.raises(InputError, match="letter head"):
        model.transcribe(wave_S)


def test_an_alphabet_that_lacks_letters_is_refused(recogniser):
    short = Checkpoint(recogniser.size, recogniser.encoder, letters=recogniser.letters, alphabet=(*ALPHABET[:-1], "Ж"))
    with pytest.raises(InteropError, match="missing Z"):
        SpeechModel(short).recogniser()


def test_a_stored_model_is_sealed_and_not_overwritten(pretrained, tmp_path):
    from hubert_ray.errors import StaleArtifactError

    storage = Storage(str(tmp_path))
    model = SpeechModel(pretrained)
    path = model.store(storage, "public/base")
    assert_equal(hubert_ray.load(tmp_path / path).checkpoint.encoder, pretrained.encoder)
    with pytest.raises(StaleArtifactError, match="another name"):
        model.store(storage, "public/base")


def test_load_follows_urls(pretrained, tmp_path):
    SpeechModel(pretrained).save("hubert_ray", tmp_path / "model")
    SpeechModel(pretrained).save("fairseq", tmp_path / "old")
    for place in ("model", "old/model.pt"):
        found = hubert_ray.load(f"file://{tmp_path}/{place}")
        assert_equal(found.checkpoint.encoder, pretrained.encoder)
    with pytest.raises(InteropError, match="neither a file nor a folder"):
        hubert_ray.load(f"file://{tmp_path}/absent")
