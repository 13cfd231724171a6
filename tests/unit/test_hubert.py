"""Does the network have the published size, the published initial weights, and outputs that padding cannot change?"""

import msgspec
import pytest
import torch
import torch.nn.functional as F

from hubert_ray.config.sizes import BASE, LARGE, TINY, XLARGE, ModelSize
from hubert_ray.data.frames import frames_of
from hubert_ray.model.frontend import PositionalConv, _fft_length, strided_conv
from hubert_ray.model.hubert import Hubert, InputError

MINI = ModelSize(
    conv_channels=16, conv_norm="group", layers=3, dim=32, ffn_dim=64, heads=2, norm_first=False, codeword_dim=16,
    position_groups=4, normalize_waveform=False, conv_grad_scale=1.0, dropout=0.0, attention_dropout=0.0,
    input_dropout=0.0, layer_drop=0.0,
)  # fmt: skip
SHAPES = [
    MINI,
    msgspec.structs.replace(MINI, norm_first=True),
    msgspec.structs.replace(MINI, norm_first=True, conv_norm="layer"),
]


def mini(size: ModelSize = MINI, seed: int = 0) -> Hubert:
    torch.manual_seed(seed)
    return Hubert(size, (7,)).eval()


@pytest.mark.parametrize(("size", "total"), [(BASE, 94_697_600), (LARGE, 316_609_408), (XLARGE, 964_321_664)])
def test_published_parameter_counts(size, total):
    with torch.device("meta"):
        model = Hubert(size, (504,))
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    if size is BASE:
        assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 94_371_712
        assert sum(parameter.numel() for parameter in model.encoder.layers[0].parameters()) == 7_087_872
        assert sum(parameter.numel() for parameter in model.encoder.position.parameters()) == 4_719_488


def is_normal(values: torch.Tensor, std: float) -> bool:
    """Could these be draws of N(0, std²)? Mean, spread and tails within five standard errors for their number."""
    z = values.detach().double().flatten() / std
    moments = {1: (0, 1), 2: (1, 2), 4: (3, 96)}  # power: (expectation, variance) of a standard normal's power
    return all(abs(z.pow(k).mean() - mean) < 5 * (variance / len(z)) ** 0.5 for k, (mean, variance) in moments.items())


def is_uniform(values: torch.Tensor, low: float, high: float) -> bool:
    """Could these be draws of U[low, high)? None outside, the mean within five standard errors, no gap at the ends."""
    u = (values.detach().double().flatten() - low) / (high - low)
    ends = max(u.min(), 1 - u.max())  # a gap of x is as likely as exp(-n x)
    return bool(u.min() >= 0 and u.max() <= 1 and abs(u.mean() - 0.5) < 5 / (12 * len(u)) ** 0.5 and ends < 12 / len(u))


def test_initial_weights():
    torch.manual_seed(0)
    model = Hubert(TINY, (100,))
    encoder, position = model.encoder, model.encoder.position
    for block in encoder.layers:
        for linear in (block.qkv, block.out, block.ffn_in, block.ffn_out):
            assert is_normal(linear.weight, 0.02)
            assert not linear.bias.any()
    assert is_normal(position.weight_v, (4 / (TINY.position_kernel * TINY.dim)) ** 0.5)
    assert torch.allclose(position.weight(), position.weight_v, atol=1e-6)
    assert not position.bias.any()
    for conv in encoder.conv.layers:
        assert is_normal(conv.weight, (2 / conv.weight[0].numel()) ** 0.5)  # Kaiming: by fan-in, gain of a ReLU
    for linear in (encoder.projection, model.head.projection):  # torch's default for a Linear
        bound = linear.in_features**-0.5
        assert is_uniform(linear.weight, -bound, bound)
        assert is_uniform(linear.bias, -bound, bound)
    for table in (encoder.mask_vector, model.head.codewords):
        assert is_uniform(table, 0, 1)


def test_head_is_cosine_over_temperature_per_stream():
    torch.manual_seed(0)
    head = Hubert(MINI, (5, 9)).head
    hidden_ND = torch.randn(6, 32)
    projected = head.projection(hidden_ND)[:, 16:]
    cosine = F.cosine_similarity(projected[:, None], head.codewords[5:][None], dim=2)
    assert torch.allclose(head.logits(hidden_ND, stream=1), cosine / 0.1, atol=1e-4)
    assert head.logits(hidden_ND).shape == (6, 5)


@pytest.mark.parametrize(("taps", "steps"), [(3, 40), (3, 41), (2, 40), (2, 41), (3, 3), (2, 2)])
def test_strided_conv_is_a_convolution(taps, steps):
    torch.manual_seed(0)
    x = torch.randn(2, steps, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, taps, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(x.transpose(1, 2), weight, stride=2).transpose(1, 2)
    assert torch.allclose(strided_conv(x, weight, 2), expected)
    assert torch.autograd.gradcheck(lambda a, b: strided_conv(a, b, 2), (x, weight))


@pytest.mark.parametrize("frames", [1, 30, 99, 300])
def test_positional_conv_is_a_padded_grouped_convolution(frames):
    torch.manual_seed(0)
    position = PositionalConv(24, 128, 4)
    torch.nn.init.normal_(position.bias)
    torch.nn.init.uniform_(position.weight_g, 0.5, 2.0)
    x = torch.randn(2, frames, 24, requires_grad=True)
    kernel = position.weight_g * position.weight_v / position.weight_v.norm(dim=(0, 1), keepdim=True)
    plain = F.gelu(F.conv1d(x.transpose(1, 2), kernel, position.bias, padding=64, groups=4)[..., :-1]).transpose(1, 2)
    ours = position(x)
    assert torch.allclose(ours, plain, atol=2e-6)
    leaves = [x, position.weight_v, position.weight_g, position.bias]
    pull = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, pull), torch.autograd.grad(plain, leaves, pull), strict=True
    ):
        assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_fft_lengths_are_smooth():
    assert [_fft_length(least) for least in (226, 908, 128)] == [240, 960, 128]
    for least in range(2, 400):
        length = rest = _fft_length(least)
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1
        assert length >= least
        assert length % 2 == 0


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_first_conv_is_group_norm_even_on_low_pass_audio(offset):
    torch.manual_seed(0)
    layer = mini().encoder.conv.layers[0]
    torch.nn.init.normal_(layer.norm_weight)
    torch.nn.init.normal_(layer.norm_bias)
    wave_BS = torch.sin(torch.arange(8000) * 2 * torch.pi * 60 / 16000).repeat(2, 1) * torch.tensor([[0.3], [0.9]])
    wave_BS = wave_BS + offset + 1e-4 * torch.randn(2, 8000)
    wide = wave_BS.double()[:, None]
    expected = F.group_norm(
        F.conv1d(wide, layer.weight.double(), stride=5), 16, layer.norm_weight.double(), layer.norm_bias.double()
    )
    got = layer(wave_BS.unsqueeze(2)).transpose(1, 2)
    # fp32 audio on an offset has lost digits that the gain of a quiet channel brings back into sight.
    assert (got - F.gelu(expected)).abs().max() < (2e-3 if offset else 1e-4)


@pytest.mark.parametrize("size", SHAPES)
def test_a_padded_batch_equals_batches_of_one(size):
    model = mini(size)
    samples_B = torch.tensor([9000, 4001, 6399, 400])
    wave_BS = torch.randn(4, 9000)  # padding holds noise: whatever is there must not matter
    for layer in (None, 0, 2):
        batched = model.encoder.features(wave_BS, layer, samples_B)
        for row, samples in enumerate(samples_B.tolist()):
            alone = model.encoder.features(wave_BS[row : row + 1, :samples], layer)[0]
            assert alone.shape[0] == frames_of(samples)
            assert (batched[row, : alone.shape[0]] - alone).abs().max() < 5e-6


@pytest.mark.parametrize("size", SHAPES)
def test_layer_outputs(size):
    model = mini(size)
    wave_BS = torch.randn(2, 8000)
    layers = model.encoder.all_layers(wave_BS)
    assert len(layers) == 4
    for index, hidden_BTD in enumerate(layers):
        assert torch.equal(hidden_BTD, model.encoder.features(wave_BS, index))
    last = model.encoder.norm(layers[-1]) if size.norm_first else layers[-1]
    assert torch.equal(model.encoder.features(wave_BS), last)
    assert torch.allclose(
        model.encoder.features(wave_BS), model(wave_BS, torch.zeros(2, 24, dtype=torch.bool)).hidden_BTD
    )


def test_masked_frames_are_replaced_by_one_vector():
    """With all frames masked the waveform cannot matter; with some masked, what is under the mask cannot."""
    model = mini()
    one, two = torch.randn(1, 8000), torch.randn(1, 8000)
    everything = torch.ones(1, 24, dtype=torch.bool)
    assert torch.equal(model(one, everything).hidden_BTD, model(two, everything).hidden_BTD)
    conv_BTC = model.encoder.conv_features(one)
    changed_BTC = conv_BTC.clone()
    changed_BTC[:, 5:9] = 1.0
    mask_BT = torch.zeros(1, 24, dtype=torch.bool)
    mask_BT[:, 5:9] = True
    assert torch.equal(
        model.encoder.embed(conv_BTC, mask_BT=mask_BT), model.encoder.embed(changed_BTC, mask_BT=mask_BT)
    )
    assert not torch.equal(model.encoder.embed(conv_BTC), model.encoder.embed(changed_BTC))


def test_conv_gradient_is_scaled_and_zero_means_none():
    wave_BS, mask_BT = torch.randn(1, 8000), torch.zeros(1, 24, dtype=torch.bool)
    grads = []
    for scale in (1.0, 0.1, 0.0):
        model = mini(msgspec.structs.replace(MINI, conv_grad_scale=scale))
        output = model(wave_BS, mask_BT)
        (output.hidden_BTD.square().mean() + output.feature_penalty).backward()
        grads.append((model.encoder.conv.layers[3].weight.grad, model.encoder.projection.weight.grad))
    assert torch.allclose(grads[1][0], 0.1 * grads[0][0], rtol=1e-4)
    assert grads[2][0] is None
    assert torch.equal(grads[0][1], grads[1][1])


def test_feature_penalty_is_the_mean_square_of_the_conv_output():
    model = mini()
    wave_BS = torch.randn(2, 8000)
    penalty = model(wave_BS, torch.ones(2, 24, dtype=torch.bool)).feature_penalty
    assert penalty.item() == pytest.approx(model.encoder.conv(wave_BS).square().mean().item(), rel=1e-6)


def test_layer_drop_is_one_draw_of_the_seed():
    model = mini(msgspec.structs.replace(MINI, layer_drop=0.5))
    assert model.encoder.draw_kept_layers() == [True] * 3  # eval: nothing is dropped
    model.train()
    wave_BS, mask_BT = torch.randn(1, 8000), torch.zeros(1, 24, dtype=torch.bool)
    drawn = []
    for seed in range(40):
        torch.manual_seed(seed)
        drawn.append(model.encoder.draw_kept_layers())
        if seed >= 4:
            continue
        torch.manual_seed(seed)
        expected = model(wave_BS, mask_BT, kept_layers=drawn[-1]).hidden_BTD
        assert torch.equal(model(wave_BS, mask_BT).hidden_BTD, expected)
    assert 0.3 < sum(map(sum, drawn)) / 120 < 0.7
    with torch.no_grad():
        none = model(wave_BS, mask_BT, kept_layers=[False] * 3).hidden_BTD
        assert torch.equal(none, model.eval().encoder.features(wave_BS, 0))


def test_dropout_only_when_training():
    size = msgspec.structs.replace(MINI, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3, input_dropout=0.3)
    model, wave_BS, mask_BT = mini(size), torch.randn(1, 8000), torch.zeros(1, 24, dtype=torch.bool)
    assert torch.equal(model(wave_BS, mask_BT).hidden_BTD, model(wave_BS, mask_BT).hidden_BTD)
    model.train()
    assert not torch.equal(model(wave_BS, mask_BT).hidden_BTD, model(wave_BS, mask_BT).hidden_BTD)


def test_recomputing_blocks_changes_no_gradient():
    wave_BS, mask_BT = torch.randn(1, 8000), torch.zeros(1, 24, dtype=torch.bool)
    grads = []
    for recompute in (False, True):
        model = mini().train()
        model.encoder.recompute_layers = recompute
        model(wave_BS, mask_BT).hidden_BTD.square().mean().backward()
        grads.append([parameter.grad for parameter in model.encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)


def test_wrong_input_is_refused():
    model = mini()
    with pytest.raises(InputError, match="at least 400"):
        model.encoder.features(torch.randn(1, 399))
    with pytest.raises(InputError, match="expected 0 to 3"):
        model.encoder.features(torch.randn(1, 8000), 4)
    with pytest.raises(InputError, match=r"expected \(1, 24\)"):
        model(torch.randn(1, 8000), torch.zeros(1, 25, dtype=torch.bool))
    with pytest.raises(InputError, match="row of 399"):
        model.encoder.features(torch.randn(2, 8000), None, torch.tensor([8000, 399]))
    with pytest.raises(InputError, match=r"model\.eval"):
        model.train().encoder.features(torch.randn(1, 8000))
    with pytest.raises(InputError, match="at least 2"):
        Hubert(MINI, ())
