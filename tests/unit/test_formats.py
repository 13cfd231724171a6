"""Do models survive every format, are fairseq's own files read as they are, and is no code in a file ever run?"""

import argparse
import json
import os
import pickle
import sys
import types

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

import hubert_ray
from hubert_ray import cli
from hubert_ray.asr.letters import ALPHABET
from hubert_ray.config.sizes import BASE, LARGE, TINY
from hubert_ray.errors import RecipeError, StaleArtifactError, StorageError
from hubert_ray.formats import files, names
from hubert_ray.formats.checkpoint import BLANK, Checkpoint
from hubert_ray.formats.names import InteropError
from hubert_ray.model.hubert import Encoder, Hubert, InputError
from hubert_ray.speech_model import SpeechModel
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
CLUSTERS = (*SPECIALS, *map(str, range(20)))
SMALL_BASE = msgspec.structs.replace(
    BASE, conv_channels=32, layers=2, dim=64, ffn_dim=128, heads=2, codeword_dim=16, position_groups=4
)
SMALL_LARGE = msgspec.structs.replace(
    LARGE, conv_channels=32, layers=2, dim=64, ffn_dim=128, heads=4, codeword_dim=16, position_groups=4
)
SIZES = {
    "base": SMALL_BASE,
    "large": SMALL_LARGE,
    "conv bias": msgspec.structs.replace(SMALL_LARGE, conv_bias=True),
    "base, normalised": msgspec.structs.replace(SMALL_BASE, normalize_waveform=True),
}


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


FACEBOOK = (BLANK, "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")  # the order of their -ft models
FAIRSEQ = (BLANK, "<pad>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")


def with_letters(alphabet: tuple[str, ...], size=SMALL_BASE) -> SpeechModel:
    """A recogniser whose special symbols never win, as after training."""
    torch.manual_seed(0)
    head = torch.nn.Linear(size.dim, len(alphabet)).state_dict()
    head["bias"][[row for row, symbol in enumerate(alphabet) if symbol in SPECIALS]] = -1e4
    return SpeechModel(Checkpoint(size, Encoder(size).state_dict(), letters=head, alphabet=alphabet))


def test_fairseqs_letters_to_hugging_face(tmp_path):
    model = with_letters(FAIRSEQ)
    model.save("hugging_face", tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    assert sorted(vocabulary.values()) == list(range(len(FAIRSEQ)))
    assert vocabulary["<pad>"] == config["pad_token_id"] == 0
    wave_S = 0.1 * torch.randn(16_000)
    assert model.transcribe(wave_S)
    assert hubert_ray.load(tmp_path).transcribe(wave_S) == model.transcribe(wave_S)


def test_facebooks_letters_to_fairseq(tmp_path):
    model = with_letters(FACEBOOK)
    model.save("fairseq", tmp_path)
    back = hubert_ray.load(tmp_path / "model.pt")
    assert set(back.checkpoint.alphabet) == {*FACEBOOK[2:], BLANK, "<pad>"}
    wave_S = 0.1 * torch.randn(16_000)
    assert model.transcribe(wave_S)
    assert back.transcribe(wave_S) == model.transcribe(wave_S)


def test_the_blank_of_a_hugging_face_folder_is_its_padding(tmp_path):
    alphabet = ("|", "'", *ALPHABET[3:], "[UNK]", BLANK)
    model = with_letters(alphabet)
    model.save("hugging_face", tmp_path)
    vocabulary = {symbol.lower(): row for row, symbol in enumerate(alphabet[:-2])} | {"[UNK]": 28, "[PAD]": 29}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    back = hubert_ray.load(tmp_path)
    assert back.checkpoint.alphabet == alphabet
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('_id": 29', '_id": 30'))
    with pytest.raises(InteropError, match="blank"):
        hubert_ray.load(tmp_path)


def test_a_gap_in_a_hugging_face_vocabulary_shifts_no_letter(tmp_path):
    """One row without a name, and a token beyond the head, as `added_tokens.json` may hold."""
    model = with_letters(FACEBOOK)
    model.save("hugging_face", tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    gone = next(symbol for symbol, row in vocabulary.items() if row == 3)
    del vocabulary[gone]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": len(FACEBOOK)}))
    back = hubert_ray.load(tmp_path)
    assert back.checkpoint.alphabet[4:] == model.checkpoint.alphabet[4:]
    wave_S = 0.1 * torch.randn(16_000)
    assert back.transcribe(wave_S) == model.transcribe(wave_S) != ""


def test_fairseqs_label_may_be_one_word(tmp_path):
    """In the tasks of wav2vec 2.0 `labels` is "ltr" and not a list."""
    model = with_letters(FAIRSEQ)
    model.save("fairseq", tmp_path)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["cfg"]["task"]["labels"] = "ltr"
    torch.save(content, tmp_path / "model.pt")
    assert hubert_ray.load(tmp_path / "model.pt").checkpoint.alphabet == model.checkpoint.alphabet


@pytest.mark.parametrize("kind", ["fairseq", "s3prl"])
def test_a_folder_that_holds_a_fairseq_file_is_opened(kind, tmp_path, pretrained):
    SpeechModel(pretrained).save(kind, tmp_path)
    assert_equal(hubert_ray.load(tmp_path).checkpoint.encoder, pretrained.encoder)


def test_training_the_pretraining_model_leaves_what_was_read(tmp_path, pretrained):
    model = SpeechModel(pretrained)
    trained = model.pretraining_model().train()
    with torch.no_grad():
        trained.encoder.norm.bias.add_(1.0)
    model.extract(0.1 * torch.randn(16_000))  # not in train mode
    model.save("hubert_ray", tmp_path / "out")
    saved = hubert_ray.load(tmp_path / "out")
    assert torch.equal(saved.encoder.norm.bias, model.encoder.norm.bias)
    assert not torch.equal(saved.encoder.norm.bias, trained.encoder.norm.bias)


def test_a_hyphen_is_not_torchaudios_blank(tmp_path):
    alphabet = ("-", *ALPHABET[1:], BLANK)
    with_letters(alphabet).save("torchaudio", tmp_path)
    assert (tmp_path / "labels.txt").read_text().split("\n").count("-") == 1
    assert hubert_ray.load(tmp_path).checkpoint.alphabet == alphabet


def published(size) -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(size, Encoder(size).state_dict())


@pytest.mark.parametrize("name", ["alone.pt", "alone.safetensors"])
def test_weights_alone_have_the_settings_of_the_published_size(name, tmp_path):
    state = names.outward(published(TINY).encoder, "torchaudio", "legacy")
    if name.endswith(".pt"):
        torch.save(state, tmp_path / name)
    else:
        safetensors.torch.save_file(state, tmp_path / name)
    found = hubert_ray.load(tmp_path / name)
    assert found.size == TINY
    wave_S = 0.1 * torch.randn(8000)
    assert torch.equal(found.extract(wave_S), SpeechModel(published(TINY)).extract(wave_S))


@pytest.mark.parametrize(
    "changes", [{"layers": 3}, {"conv_norm": "layer"}], ids=str
)  # the second: as wide and deep as a published size, and yet another model
def test_weights_alone_of_no_published_size_are_refused(changes, tmp_path):
    encoder = published(msgspec.structs.replace(TINY, **changes)).encoder
    torch.save(names.outward(encoder, "torchaudio", "legacy"), tmp_path / "alone.pt")
    with pytest.raises(InteropError, match="give the folder"):
        hubert_ray.load(tmp_path / "alone.pt")


@pytest.mark.parametrize(
    ("kind", "file"),
    [("hubert_ray", "model.safetensors"), ("torchaudio", "model.pt"), ("hugging_face", "model.safetensors")],
)
def test_weights_named_beside_their_settings_keep_them(kind, file, recogniser, tmp_path):
    SpeechModel(recogniser).save(kind, tmp_path)
    by_file, by_folder = (hubert_ray.load(place) for place in (tmp_path / file, tmp_path))
    assert by_file.size == by_folder.size
    assert by_file.checkpoint.alphabet == ALPHABET
    assert_equal(by_file.checkpoint.letters, recogniser.letters)


def test_several_label_streams_through_fairseq(tmp_path):
    classes = (tuple("abc"), tuple("vwxyz"))
    hubert = Hubert(SMALL_BASE, (3, 5))
    model = SpeechModel(Checkpoint(SMALL_BASE, hubert.encoder.state_dict(), hubert.head.state_dict(), classes))
    model.save("fairseq", tmp_path / "model")
    for place in (tmp_path / "model" / "model.pt", f"file://{tmp_path}/model/model.pt"):
        back = hubert_ray.load(place).checkpoint
        assert back.classes == tuple((*SPECIALS, *entries) for entries in classes)
        own = [4, 5, 6, 11, 12, 13, 14, 15]  # behind four specials each
        assert torch.equal(back.prediction["codewords"][own], model.checkpoint.prediction["codewords"])
    (tmp_path / "model" / "dict.km1.txt").unlink()
    with pytest.raises(InteropError, match="dict.km1.txt"):
        hubert_ray.load(tmp_path / "model" / "model.pt")


def what_fairseq_opens(folder) -> dict:
    """What fairseq's loader asks of a file, in words: a training history whose last entry names its optimizer and scheduler
    state (else it looks for fields that only its oldest files have), a train iterator at epoch 1 or later, no `args` beside
    `cfg`; for the task a data folder with a dictionary for each of its labels, as long as the tables of the model."""
    content = torch.load(folder / "model.pt", weights_only=True)
    last, task = content["optimizer_history"][-1], content["cfg"]["task"]
    assert {"criterion_name", "optimizer_name", "lr_scheduler_state", "num_updates"} <= last.keys()
    assert "optimizer" not in last
    assert content["extra_state"]["train_iterator"]["epoch"] >= 1
    assert "iterations_in_epoch" in content["extra_state"]["train_iterator"]
    assert content["args"] is None
    assert isinstance(task["data"], str)
    content["rows"] = [4 + len((folder / f"dict.{label}.txt").read_text().splitlines()) for label in task["labels"]]
    return content


def test_fairseq_finds_what_it_asks_for(pretrained, recogniser, tmp_path):
    SpeechModel(pretrained).save("fairseq", tmp_path / "pretrained")
    content = what_fairseq_opens(tmp_path / "pretrained")
    assert content["rows"] == [len(content["model"]["label_embs_concat"])]
    assert content["cfg"]["task"]["label_rate"] == 50
    assert not content["cfg"]["task"].get("fine_tuning")

    SpeechModel(recogniser).save("fairseq", tmp_path / "fine")
    content = what_fairseq_opens(tmp_path / "fine")
    assert content["cfg"]["task"]["fine_tuning"] is True
    assert content["cfg"]["task"]["labels"] == ["ltr"]
    assert content["rows"] == [len(content["model"]["w2v_encoder.proj.weight"])]
    # It builds the pretraining model from the inner settings first, with codewords for the inner task's labels.
    inner = content["cfg"]["model"]["w2v_args"]
    assert inner["task"]["labels"] == ["ltr"]
    assert inner["task"]["normalize"] == content["cfg"]["model"]["normalize"] == recogniser.size.normalize_waveform
    codewords = content["model"]["w2v_encoder.w2v_model.label_embs_concat"]
    assert codewords.shape == (content["rows"][0], inner["model"]["final_dim"])


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
        "conv_feature_layers": "[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32,2,2)] + [(32,2,2)]",
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
    with pytest.raises(InteropError, match=r"posix\.system, which is not known to be plain data"):
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
        {"layer_norm_eps": 1e-6},
        {"conv_dim": [512] * 6 + [256]},
        {"add_adapter": True},
    ],
    ids=str,
)
def test_another_architecture_is_refused_by_its_settings(changes, tmp_path):
    with pytest.raises(InteropError, match=next(iter(changes))):
        hubert_ray.load(hugging_face_folder(tmp_path, **changes))


def test_other_strides_are_refused_in_every_format(pretrained, tmp_path):
    SpeechModel(pretrained).save("torchaudio", tmp_path / "ta")
    config = json.loads((tmp_path / "ta" / "config.json").read_text())
    config["extractor_conv_layer_config"][6][2] = 4
    (tmp_path / "ta" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InteropError, match="extractor_conv_layer_config"):
        hubert_ray.load(tmp_path / "ta")
    SpeechModel(pretrained).save("fairseq", tmp_path / "fs")
    content = torch.load(tmp_path / "fs" / "model.pt", weights_only=True)
    content["cfg"]["model"]["conv_feature_layers"] = "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] + [(32,2,4)]"
    torch.save(content, tmp_path / "fs" / "model.pt")
    with pytest.raises(InteropError, match="conv_feature_layers"):
        hubert_ray.load(tmp_path / "fs" / "model.pt")


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
    refused = {
        "shape": wave_S[None],
        r"\(399,\), expected \(samples,\)": wave_S[:399],
        r"\(0,\), expected \(samples,\)": [],
        "divide int16 by 32768": (32768 * wave_S).astype(np.int16),
        "peak of .*divide int16 by 32768": 32768 * wave_S,
        "<U": np.array(["a"] * 8000),
        "object": [None] * 8000,
        "complex": torch.zeros(8000, dtype=torch.complex64),
    }
    for message, wrong in refused.items():
        with pytest.raises(InputError, match=message):
            model.extract(wrong)
    wave_S[5] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        model.extract(wave_S)
    for layer in (3, -1, 1.5, "1"):
        with pytest.raises(InputError, match="layer"):
            model.extract(0 * wave_S[6:], layer=layer)
    with pytest.raises(InputError, match="letter head"):
        model.transcribe(wave_S)


def test_tensors_of_any_float_and_waveforms_of_any_rate_are_taken():
    model = SpeechModel(published(SMALL_BASE))
    wave_S = 0.1 * torch.randn(8000)
    rounded_S = wave_S.bfloat16()
    assert torch.equal(model.extract(rounded_S), model.extract(rounded_S.float()))
    assert torch.equal(model.extract(wave_S.clone().requires_grad_()), model.extract(wave_S))
    seconds_44k = torch.arange(44_100) / 44_100
    seconds_16k = torch.arange(16_000) / 16_000
    tone_44k, tone_16k = (torch.sin(2 * torch.pi * 440 * seconds) for seconds in (seconds_44k, seconds_16k))
    wanted_TD = model.extract(tone_16k)
    assert (model.extract(tone_44k, sample_rate=44_100)[5:-5] - wanted_TD[5:-5]).abs().max() < 0.01
    assert (model.extract_all(tone_44k, sample_rate=44_100)[2][5:-5] - wanted_TD[5:-5]).abs().max() < 0.01
    for rate in (0, -16_000, 44_100.5, "16k", 99_991):
        with pytest.raises(InputError, match="sample_rate"):
            model.extract(wave_S, sample_rate=rate)


def test_nothing_is_drawn_and_nothing_shared(recogniser):
    """Weights come from the file: the user's random numbers stay as they are, and training the model leaves the file's."""
    before = torch.random.get_rng_state()
    model = SpeechModel(recogniser)
    read = model.recogniser()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.recogniser() is read
    assert not any(parameter.is_meta for parameter in read.parameters())
    kept = {name: value.clone() for name, value in recogniser.encoder.items()}
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.add_(1.0)
    assert_equal(recogniser.encoder, kept)


def test_half_precision_files_are_computed_in_single(tmp_path):
    folder = hugging_face_folder(tmp_path)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({name: w.half() for name, w in state.items()}, folder / "model.safetensors")
    assert hubert_ray.load(folder).extract(0.1 * torch.randn(8000)).dtype == torch.float32


def test_an_alphabet_that_lacks_letters_is_refused(recogniser):
    short = Checkpoint(recogniser.size, recogniser.encoder, letters=recogniser.letters, alphabet=(*ALPHABET[:-1], "Ж"))
    with pytest.raises(InteropError, match="missing Z"):
        SpeechModel(short).recogniser()


def test_a_stored_model_is_sealed_and_not_overwritten(pretrained, tmp_path):
    storage = Storage(str(tmp_path))
    model = SpeechModel(pretrained)
    path = model.store(storage, "public/base")
    assert_equal(hubert_ray.load(tmp_path / path).checkpoint.encoder, pretrained.encoder)
    with pytest.raises(StaleArtifactError, match="another name"):
        model.store(storage, "public/base")


def seal_of(folder) -> dict:
    return json.loads((folder / layout.SEAL).read_text())


def test_the_seal_of_a_stored_model_tells_weights_and_settings(tmp_path):
    """Two models that differ in one setting only are not the same artifact."""
    storage, plain = Storage(str(tmp_path)), published(SMALL_BASE)
    normalised = Checkpoint(msgspec.structs.replace(plain.size, normalize_waveform=True), plain.encoder)
    folders = [
        SpeechModel(checkpoint).store(storage, f"public/m{i}") for i, checkpoint in enumerate([plain, normalised])
    ]
    one, other = (seal_of(tmp_path / folder)["fingerprint"] for folder in folders)
    assert one != other


@pytest.mark.parametrize("file", [layout.CLAIM, "checkpoints/step-00000001/model.pt"])
def test_a_folder_with_anything_in_it_is_not_sealed(file, tmp_path):
    Storage(str(tmp_path)).write(f"runs/mine/iter1/pretrain/{file}", b"{}")
    with pytest.raises(StaleArtifactError, match="hubert-ray remove"):
        SpeechModel(published(SMALL_BASE)).store(Storage(str(tmp_path)), "mine/iter1")
    assert not (tmp_path / "runs/mine/iter1/pretrain" / layout.SEAL).exists()


@pytest.mark.parametrize("name", ["base", "a/b/c", "../x", "x/..", "a/.b", "a b/c", "/base", "a/", "ä/b", "a/b\n"])
def test_imported_models_are_named_as_recipes_can_name_them(name, tmp_path, capsys):
    with pytest.raises(RecipeError, match="<run>/<iteration>"):
        SpeechModel(published(SMALL_BASE)).store(Storage(str(tmp_path)), name)
    assert cli.main(["import", "absent.pt", name, "--storage", str(tmp_path)]) == 1
    assert "<run>/<iteration>" in capsys.readouterr().err


def test_import_and_export_say_what_cannot_be_written(tmp_path, capsys):
    SpeechModel(published(TINY)).save("hubert_ray", tmp_path / "model")
    for command, place in (
        (["import", "public/base", "--storage"], "/proc/zz"),
        (["export", "fairseq"], "/proc/zz/model"),
    ):
        assert cli.main([command[0], str(tmp_path / "model"), *command[1:], place]) == 1
        assert "/proc/zz" in capsys.readouterr().err
    with pytest.raises(StorageError):
        SpeechModel(published(TINY)).store(Storage("/proc/zz"), "public/base")


def test_a_model_is_written_into_a_new_or_empty_folder_only(tmp_path, monkeypatch):
    pretrained = published(SMALL_BASE)
    model = SpeechModel(pretrained)
    model.save("hubert_ray", tmp_path / "model")
    before = (tmp_path / "model" / layout.MODEL_CONFIG).read_bytes()
    for kind in files.WRITERS:
        with pytest.raises(InteropError, match="model: found a folder with files in it"):
            model.save(kind, tmp_path / "model")
    assert (tmp_path / "model" / layout.MODEL_CONFIG).read_bytes() == before
    assert len(list((tmp_path / "model").iterdir())) == 2
    (tmp_path / "file").write_text("")
    for place, message in {
        tmp_path / "file": "found a file",
        tmp_path / "file" / "below": "cannot be written",
        "s3://bucket/model": "local folders",
        "/proc/nowhere/model": "cannot be written",
    }.items():
        with pytest.raises(InteropError, match=message):
            model.save("fairseq", place)
    with pytest.raises(InteropError, match="format: found 'onnx'"):
        model.save("onnx", tmp_path / "new")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (written, *_) = model.save("fairseq", "~/model")
    assert written == tmp_path / "home" / "model" / "model.pt"
    assert_equal(hubert_ray.load("~/model/model.pt").checkpoint.encoder, pretrained.encoder)


def test_a_writer_that_fails_leaves_nothing(recogniser, tmp_path):
    with pytest.raises(InteropError, match="s3prl"):
        SpeechModel(recogniser).save("s3prl", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    broken = Checkpoint(recogniser.size, recogniser.encoder, letters=recogniser.letters, alphabet=("A",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError):  # in the middle of writing
        files.write(broken, "hugging_face", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def change(file, edit) -> None:
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE = {  # format, what happens to its folder, what the message must say
    "cut .pt": (
        "fairseq",
        lambda f: (f / "model.pt").write_bytes((f / "model.pt").read_bytes()[:20_000]),
        "not a checkp",
    ),
    "cut .safetensors": (
        "hugging_face",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:20_000]),
        "not a checkpoint",
    ),
    "our weights are missing": ("hubert_ray", lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "torchaudio's are missing": ("torchaudio", lambda f: (f / "model.pt").unlink(), "no weights"),
    "Hugging Face's are missing": ("hugging_face", lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "numbers for weights": ("fairseq", lambda f: torch.save({"model": 5, "cfg": {}}, f / "model.pt"), "damaged"),
    "numbers for settings": (
        "fairseq",
        lambda f: change(f / "model.pt", lambda c: c.update(cfg={"model": 5})),
        "no publish",
    ),
    "no heads": (
        "hugging_face",
        lambda f: edit_json(f / "config.json", num_attention_heads=0),
        "found 0 attention heads",
    ),
    "text for heads": ("torchaudio", lambda f: edit_json(f / "config.json", encoder_num_heads="two"), "damaged"),
    "a setting is missing": (
        "torchaudio",
        lambda f: (f / "config.json").write_text('{"extractor_mode": "group_norm"}'),
        "'encoder_num_heads' is missing",
    ),
    "no text in a dictionary": (
        "fairseq",
        lambda f: (f / "dict.km.txt").write_bytes(b"\xff\xfe 1\n"),
        "dict.km.txt: .*UTF-8",
    ),
    "half a head": (
        "fairseq",
        lambda f: change(f / "model.pt", lambda c: c["model"].pop("final_proj.weight")),
        "'final_proj.weight' is missing",
    ),
    "a head of another width": (
        "fairseq",
        lambda f: change(f / "model.pt", lambda c: c["model"].update({"final_proj.bias": torch.zeros(3)})),
        "prediction head",
    ),
    "a table with too few axes": (
        "fairseq",
        lambda f: change(f / "model.pt", lambda c: c["model"].update({"encoder.pos_conv.0.weight_v": torch.zeros(4)})),
        "damaged",
    ),
    "a matrix of another shape": (
        "torchaudio",
        lambda f: change(
            f / "model.pt",
            lambda c: c.update({"encoder.transformer.layers.0.feed_forward.output_dense.weight": torch.zeros(3, 3)}),
        ),
        "do not fit",
    ),
    "settings are no object": ("hugging_face", lambda f: (f / "config.json").write_text("[]"), "expected an object"),
}


@pytest.mark.parametrize(("kind", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_told_and_no_traceback(kind, damage, message, tmp_path):
    torch.manual_seed(0)
    hubert = Hubert(SMALL_BASE, (len(CLUSTERS),))
    checkpoint = Checkpoint(SMALL_BASE, hubert.encoder.state_dict(), hubert.head.state_dict(), (CLUSTERS,))
    SpeechModel(checkpoint).save(kind, tmp_path)
    opened(kind, tmp_path)
    damage(tmp_path)
    with pytest.raises(InteropError, match=message) as caught:
        opened(kind, tmp_path)
    assert "weights_only" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_unfinished_run_is_called_so(tmp_path):
    pretrained = published(SMALL_BASE)
    (tmp_path / layout.CLAIM).write_text("{}")
    with pytest.raises(InteropError, match="not finished"):
        hubert_ray.load(tmp_path)
    SpeechModel(pretrained).save("hubert_ray", tmp_path / "model")
    (tmp_path / "model" / layout.MODEL).unlink()
    (tmp_path / "model" / layout.CLAIM).write_text("{}")
    with pytest.raises(InteropError, match="not finished"):
        hubert_ray.load(tmp_path / "model")


def test_weights_that_do_not_fit_are_told_in_three_names():
    pretrained = published(SMALL_BASE)
    deeper = msgspec.structs.replace(pretrained.size, layers=12)
    with pytest.raises(InteropError, match=r"120 differ, such as layers\.10\..*found none, expected") as caught:
        SpeechModel(Checkpoint(deeper, pretrained.encoder))
    assert str(caught.value).count("layers.") == 3


def test_places_that_hold_no_model_are_told_as_they_were_typed(tmp_path):
    for place in ("http://example.org/model.pt", "s3://", "s3://bucket", "facebook/hubert-base-ls960"):
        with pytest.raises(InteropError, match="download") as caught:
            hubert_ray.load(place)
        assert place in str(caught.value)
        assert "--storage" not in str(caught.value)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(InteropError, match=f"file://{tmp_path}/list.pt: holds a list"):
        hubert_ray.load(f"file://{tmp_path}/list.pt")


def test_load_follows_urls(pretrained, tmp_path):
    SpeechModel(pretrained).save("hubert_ray", tmp_path / "model")
    SpeechModel(pretrained).save("fairseq", tmp_path / "old")
    for place in ("model", "old/model.pt"):
        found = hubert_ray.load(f"file://{tmp_path}/{place}")
        assert_equal(found.checkpoint.encoder, pretrained.encoder)
    with pytest.raises(InteropError, match="neither a file nor a folder"):
        hubert_ray.load(f"file://{tmp_path}/absent")
