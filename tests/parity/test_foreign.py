"""Do the same weights give the same layer outputs as torchaudio's and transformers' HuBERT, at every size and layer?"""

import msgspec
import pytest
import torch

from hubert_ray.config.sizes import BASE, LARGE, TINY, XLARGE, ModelSize
from hubert_ray.model import interop
from hubert_ray.model.hubert import Hubert

TOLERANCE = 1e-5
WAVE_SAMPLES = 16_000
CASES = {
    "base": msgspec.structs.replace(BASE),
    "large-6-layers": msgspec.structs.replace(LARGE, layers=6),
    "xlarge-2-layers": msgspec.structs.replace(XLARGE, layers=2),
    "tiny": TINY,
    "tiny-post-norm": msgspec.structs.replace(TINY, norm_first=False),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def hubert(request) -> Hubert:
    torch.manual_seed(0)
    model = Hubert(request.param, (100,)).eval()
    with torch.no_grad():  # away from the initial values, at which a forgotten bias or gain would not show
        for name, parameter in model.encoder.named_parameters():
            if "norm" in name or name.endswith(("bias", "weight_g")):
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1))
    return model


@pytest.fixture(scope="module")
def wave_BS() -> torch.Tensor:
    return torch.randn(2, WAVE_SAMPLES, generator=torch.Generator().manual_seed(1)) * 0.1


def torchaudio_model(size: ModelSize):
    from torchaudio.models import wav2vec2_model

    return wav2vec2_model(
        extractor_mode="group_norm" if size.conv_norm == "group" else "layer_norm",
        extractor_conv_layer_config=[(size.conv_channels, k, s) for k, s in [(10, 5)] + [(3, 2)] * 4 + [(2, 2)] * 2],
        extractor_conv_bias=False,
        encoder_embed_dim=size.dim,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=size.position_kernel,
        encoder_pos_conv_groups=size.position_groups,
        encoder_num_layers=size.layers,
        encoder_num_heads=size.heads,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=size.ffn_dim,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=size.norm_first,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    ).eval()  # fmt: skip


def hugging_face_model(size: ModelSize):
    from transformers import HubertConfig, HubertModel

    config = HubertConfig(
        hidden_size=size.dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn_dim,
        conv_dim=[size.conv_channels] * 7,
        conv_bias=False,
        feat_extract_norm=size.conv_norm,
        do_stable_layer_norm=size.norm_first,
        num_conv_pos_embeddings=size.position_kernel,
        num_conv_pos_embedding_groups=size.position_groups,
        feat_proj_layer_norm=True,
    )
    return HubertModel(config).eval()


def weight_norm_of(model: torch.nn.Module) -> interop.WeightNorm:
    return "parametrized" if any("parametrizations" in name for name in model.state_dict()) else "legacy"


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Absolute up to 1, relative above: the residual stream of pre-norm sizes grows."""
    assert len(ours) == len(theirs)
    for layer, (mine, foreign) in enumerate(zip(ours, theirs, strict=True)):
        error = (mine - foreign).abs().max().item() / max(1.0, foreign.abs().max().item())
        assert error <= TOLERANCE, f"layer {layer}: largest difference {error:.2e}"


def test_torchaudio(hubert, wave_BS):
    theirs = torchaudio_model(hubert.size)
    theirs.load_state_dict(interop.to_torchaudio(hubert.encoder.state_dict(), weight_norm_of(theirs)))
    with torch.no_grad():
        foreign, _ = theirs.extract_features(wave_BS)
    assert_same(hubert.all_layers(wave_BS)[1:], foreign)
    with torch.no_grad():
        assert_same([hubert.features(wave_BS)], [theirs(wave_BS)[0]])


def test_transformers(hubert, wave_BS):
    theirs = hugging_face_model(hubert.size)
    theirs.load_state_dict(interop.to_hugging_face(hubert.encoder.state_dict(), weight_norm_of(theirs)))
    with torch.no_grad():
        foreign = theirs(wave_BS, output_hidden_states=True)
    ours = hubert.all_layers(wave_BS)
    raw = (
        slice(None, -1) if hubert.size.norm_first else slice(None)
    )  # versions differ on a final norm in the last entry
    assert_same(ours[raw], list(foreign.hidden_states)[raw])
    assert_same([hubert.features(wave_BS)], [foreign.last_hidden_state])


@pytest.mark.parametrize("weight_norm", ["parametrized", "legacy"])
@pytest.mark.parametrize("library", ["hugging_face", "torchaudio"])
def test_there_and_back(library, weight_norm):
    state = Hubert(TINY, (100,)).encoder.state_dict()
    out, back = (getattr(interop, f"{way}_{library}") for way in ("to", "from"))
    returned = back(out(state, weight_norm))
    assert returned.keys() == state.keys()
    for name in state.keys() - ({"mask_vector"} if library == "torchaudio" else set()):
        assert torch.equal(returned[name], state[name]), name


def test_models_around_the_encoder_are_read():
    state = Hubert(TINY, (100,)).encoder.state_dict()
    theirs = {f"hubert.{name}": value for name, value in interop.to_hugging_face(state).items()}
    assert interop.from_hugging_face({**theirs, "lm_head.weight": torch.zeros(1)}).keys() == state.keys()


def test_a_foreign_architecture_is_refused():
    theirs = interop.to_hugging_face(Hubert(TINY, (100,)).encoder.state_dict())
    with pytest.raises(interop.InteropError, match="no place in HuBERT"):
        interop.from_hugging_face({**theirs, "encoder.layers.0.relative_bias": torch.zeros(1)})
    del theirs["encoder.layers.2.attention.q_proj.weight"]
    with pytest.raises(interop.InteropError, match="is missing"):
        interop.from_hugging_face(theirs)
