"""Do the same weights give the same layer outputs as torchaudio's and transformers' HuBERT, at every size and layer?

Weights go through files each way: ours written and opened by the library itself, the library's own written by it and
opened by us.
"""

import json

import msgspec
import pytest
import torch

import hubert_ray
from hubert_ray.config.sizes import BASE, LARGE, TINY, XLARGE, ModelSize
from hubert_ray.formats.checkpoint import Checkpoint
from hubert_ray.model.hubert import Hubert
from hubert_ray.speech_model import SpeechModel

TOLERANCE = 1e-5
CASES = {
    "base": BASE,
    "large-6-layers": msgspec.structs.replace(LARGE, layers=6),
    "xlarge-2-layers": msgspec.structs.replace(XLARGE, layers=2),
    "large-2-layers-conv-bias": msgspec.structs.replace(LARGE, layers=2, conv_bias=True),
    "base-2-layers-conv-bias": msgspec.structs.replace(BASE, layers=2, conv_bias=True),
    "tiny": TINY,
    "tiny-post-norm": msgspec.structs.replace(TINY, norm_first=False),
}
SMALL = ("tiny", "tiny-post-norm", "large-2-layers-conv-bias", "base-2-layers-conv-bias")


def checkpoint_of(size: ModelSize) -> Checkpoint:
    """Random weights away from the initial values, at which a forgotten bias or gain would not show."""
    torch.manual_seed(0)
    hubert = Hubert(size, (104,))
    with torch.no_grad():
        for name, parameter in hubert.encoder.named_parameters():
            if "norm" in name or name.endswith(("bias", "weight_g")):
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1))
    names = ("<s>", "<pad>", "</s>", "<unk>", *map(str, range(100)))
    return Checkpoint(size, hubert.encoder.state_dict(), hubert.head.state_dict(), (names,))


@pytest.fixture(scope="module", params=CASES, ids=str)
def ours(request) -> SpeechModel:
    return SpeechModel(checkpoint_of(CASES[request.param]))


@pytest.fixture(scope="module")
def wave_S() -> torch.Tensor:
    return torch.randn(16_000, generator=torch.Generator().manual_seed(1)) * 0.1


def torchaudio_model(folder):
    """As a user of torchaudio opens what we exported."""
    from torchaudio.models import wav2vec2_model

    model = wav2vec2_model(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return model.eval()


def prepared(model: SpeechModel, wave_S: torch.Tensor) -> torch.Tensor:
    """What the foreign models want to be given: they leave normalising to the caller."""
    return model._prepared(wave_S)


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Absolute up to 1, relative above: the residual stream of pre-norm sizes grows."""
    assert len(ours) == len(theirs)
    for layer, (mine_TD, foreign_1TD) in enumerate(zip(ours, theirs, strict=True)):
        error = (mine_TD - foreign_1TD[0]).abs().max().item() / max(1.0, foreign_1TD.abs().max().item())
        assert error <= TOLERANCE, f"layer {layer}: largest difference {error:.2e}"


def test_torchaudio(ours, wave_S, tmp_path):
    ours.save("torchaudio", tmp_path)
    theirs = torchaudio_model(tmp_path)
    wave_1S = prepared(ours, wave_S)
    with torch.no_grad():
        foreign, _ = theirs.extract_features(wave_1S)
        assert_same(ours.extract_all(wave_S)[1:], foreign)
        assert_same([ours.extract(wave_S)], [theirs(wave_1S)[0]])


def test_s3prl(ours, wave_S, tmp_path):
    """With s3prl's own loader and copy of fairseq's model, where it is installed; it is no dependency, not even of tests."""
    convert = pytest.importorskip("s3prl.upstream.hubert.convert")
    (file,) = ours.save("s3prl", tmp_path)
    theirs, task = convert.load_converted_model(str(file))
    assert task.normalize == ours.size.normalize_waveform
    wave_1S = prepared(ours, wave_S)
    with torch.no_grad():
        for layer in range(1, ours.size.layers + 1):
            foreign, _ = theirs.eval().extract_features(wave_1S, padding_mask=None, mask=False, output_layer=layer)
            assert_same([ours.extract(wave_S, layer)], [foreign])


@pytest.mark.slow
def test_xlarge_with_all_its_layers(wave_S, tmp_path):
    ours = SpeechModel(checkpoint_of(XLARGE))
    ours.save("torchaudio", tmp_path)
    theirs = torchaudio_model(tmp_path)
    with torch.no_grad():
        foreign, _ = theirs.extract_features(prepared(ours, wave_S))
    assert len(foreign) == 48
    assert_same(ours.extract_all(wave_S)[1:], foreign)


def test_transformers(ours, wave_S, tmp_path):
    from transformers import AutoFeatureExtractor, HubertModel

    ours.save("hugging_face", tmp_path)
    theirs, loading = HubertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    processor = AutoFeatureExtractor.from_pretrained(tmp_path)
    given = processor(wave_S.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        foreign = theirs.eval()(given, output_hidden_states=True)
    # Versions differ on a final norm in the last entry of pre-norm models.
    raw = slice(None, -1) if ours.size.norm_first else slice(None)
    assert_same(ours.extract_all(wave_S)[raw], list(foreign.hidden_states)[raw])
    assert_same([ours.extract(wave_S)], [foreign.last_hidden_state])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["HubertModel", "Wav2Vec2Model", "HubertForCTC", "Wav2Vec2ForPreTraining"])
def test_a_folder_written_by_transformers(kind, name, wave_S, tmp_path):
    import transformers

    size = CASES[name]
    config = getattr(transformers, "HubertConfig" if kind.startswith("Hubert") else "Wav2Vec2Config")(
        hidden_size=size.dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn_dim,
        conv_dim=[size.conv_channels] * 7,
        conv_bias=size.conv_bias,
        feat_extract_norm=size.conv_norm,
        do_stable_layer_norm=size.norm_first,
        num_codevectors_per_group=8,
        codevector_dim=16,
        proj_codevector_dim=16,
    )
    torch.manual_seed(2)
    theirs = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    symbols = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: row for row, symbol in enumerate(symbols)}))
    ours = hubert_ray.load(tmp_path)
    assert (ours.size.layers, ours.size.heads, ours.size.norm_first) == (size.layers, size.heads, size.norm_first)
    wave_1S = prepared(ours, wave_S)
    with torch.no_grad():
        body = getattr(theirs, theirs.base_model_prefix, theirs)
        assert_same([ours.extract(wave_S)], [body(wave_1S).last_hidden_state])
        if kind == "HubertForCTC":
            scores_1TV = theirs(wave_1S).logits
            rows = [0, 4, 5, *range(6, 32)]
            log_probs_1TV, _ = ours.recogniser()(wave_1S, torch.tensor([len(wave_S)]))
            assert_same([log_probs_1TV[0]], [scores_1TV[..., rows].log_softmax(2)])


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_written_from_torchaudio(wrapped, wave_S, tmp_path):
    import torchaudio

    torch.manual_seed(3)
    pretraining = torchaudio.models.hubert_pretrain_base(num_classes=100).eval()
    torch.save((pretraining if wrapped else pretraining.wav2vec2).state_dict(), tmp_path / "weights.pt")
    ours = hubert_ray.load(tmp_path / "weights.pt")
    with torch.no_grad():
        assert_same([ours.extract(wave_S)], [pretraining.wav2vec2(wave_S[None])[0]])
    vector = ours.checkpoint.encoder["mask_vector"]
    assert torch.equal(vector, pretraining.mask_generator.mask_embedding if wrapped else torch.zeros(768))


def test_a_recogniser_opens_in_transformers_and_torchaudio(wave_S, tmp_path):
    from transformers import AutoTokenizer, HubertForCTC

    from hubert_ray.asr.letters import ALPHABET

    body = checkpoint_of(TINY)
    head = torch.nn.Linear(TINY.dim, len(ALPHABET)).state_dict()
    ours = SpeechModel(Checkpoint(TINY, body.encoder, letters=head, alphabet=ALPHABET))
    wave_1S = prepared(ours, wave_S)
    wanted = ours.recogniser()(wave_1S, torch.tensor([len(wave_S)]))[0].detach()
    ours.save("hugging_face", tmp_path / "hf")
    theirs = HubertForCTC.from_pretrained(tmp_path / "hf").eval()
    scores_1TV = theirs(wave_1S).logits.detach()
    assert_same([wanted[0]], [scores_1TV.log_softmax(2)])
    text = AutoTokenizer.from_pretrained(tmp_path / "hf").decode(scores_1TV[0].argmax(1))
    assert text.strip() == ours.transcribe(wave_S)
    ours.save("torchaudio", tmp_path / "ta")
    assert_same([wanted[0]], [torchaudio_model(tmp_path / "ta")(wave_1S)[0].log_softmax(2).detach()])


def test_fairseqs_letters_are_decoded_by_transformers(wave_S, tmp_path):
    """Its dictionaries have a `<pad>` of their own beside the blank, and its letters stand in another order."""
    from transformers import AutoTokenizer, HubertForCTC

    from hubert_ray.formats.checkpoint import BLANK

    symbols = (BLANK, "<pad>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
    torch.manual_seed(0)
    head = torch.nn.Linear(TINY.dim, len(symbols)).state_dict()
    head["bias"][0] += 1.0
    head["bias"][1:4] = -1e4  # never in any transcript
    checkpoint = Checkpoint(TINY, checkpoint_of(TINY).encoder, letters=head, alphabet=symbols)
    SpeechModel(checkpoint).save("fairseq", tmp_path / "fs")
    ours = hubert_ray.load(tmp_path / "fs" / "model.pt")
    ours.save("hugging_face", tmp_path / "hf")
    theirs = HubertForCTC.from_pretrained(tmp_path / "hf").eval()
    rows_T = theirs(prepared(ours, wave_S)).logits[0].argmax(1)
    assert 0 in rows_T and len(set(rows_T.tolist())) > 2, "the test needs blanks and letters"
    assert ours.transcribe(wave_S)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").decode(rows_T).strip() == ours.transcribe(wave_S)
