"""Does the recogniser ignore padding, start from the pretrained encoder, and freeze what it should?"""

import msgspec
import pytest
import torch

from hubert_ray.config.recipe import Finetune
from hubert_ray.model.ctc import HubertCtc, finetune_size
from hubert_ray.model.hubert import Hubert
from hubert_ray.model.loss import ctc_loss_sum
from tests.unit.test_hubert import MINI, SHAPES

QUIET = Finetune(activation_dropout=0.0, layer_drop=0.0)


def recogniser(size=MINI, settings=QUIET) -> HubertCtc:
    torch.manual_seed(0)
    return HubertCtc.from_pretrained(Hubert(size, (7,)).encoder, settings)


def step(model: HubertCtc) -> None:
    wave_BS, samples_B = torch.randn(2, 8000), torch.tensor([8000, 6000])
    log_probs_BTV, frames_B = model(wave_BS, samples_B)
    ctc_loss_sum(log_probs_BTV, frames_B, torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 2])).backward()


@pytest.mark.parametrize("size", SHAPES)
def test_padding_changes_nothing(size):
    model = recogniser(size).eval()
    samples_B = torch.tensor([9000, 4001, 7777])
    wave_BS = torch.randn(3, 9000)
    batched, frames_B = model(wave_BS, samples_B)
    assert batched.dtype == torch.float32
    assert batched.exp().sum(2).allclose(torch.ones(3, 27))
    for row, samples in enumerate(samples_B.tolist()):
        alone, frames = model(wave_BS[row : row + 1, :samples], samples_B[row : row + 1])
        assert frames == frames_B[row] == alone.shape[1]
        assert (batched[row, : int(frames)] - alone[0]).abs().max() < 5e-6


@pytest.mark.parametrize("size", SHAPES)
def test_starts_from_the_pretrained_encoder_output(size):
    torch.manual_seed(0)
    hubert = Hubert(size, (7,)).eval()
    model = HubertCtc.from_pretrained(hubert.encoder, QUIET).eval()
    wave_BS = torch.randn(1, 8000)
    expected = model.head(hubert.encoder.features(wave_BS)).log_softmax(2)
    assert torch.equal(model(wave_BS, torch.tensor([8000]))[0], expected)
    bound = (6 / (32 + 29)) ** 0.5
    assert model.head.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert not model.head.bias.any()


def test_conv_encoder_never_learns_but_its_projection_does():
    model = recogniser().train()
    step(model)
    assert all(parameter.grad is None for parameter in model.encoder.conv.parameters())
    assert model.encoder.projection.weight.grad.any()
    assert model.encoder.layers[0].qkv.weight.grad.any()


def test_only_the_head_learns_while_frozen():
    model = recogniser().train()
    model.set_step(9, freeze_steps=10)
    step(model)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "head.weight",
        "head.bias",
    ]
    model.set_step(10, freeze_steps=10)
    step(model)
    assert model.encoder.layers[0].qkv.weight.grad is not None


def test_the_control_from_scratch_trains_the_conv_encoder():
    model = HubertCtc(MINI, settings=QUIET, train_conv=True).train()
    step(model)
    assert all(parameter.grad is not None for parameter in model.encoder.conv.parameters())


def test_regularisation_is_fine_tunings():
    size = msgspec.structs.replace(MINI, dropout=0.1, attention_dropout=0.1, input_dropout=0.1, layer_drop=0.05)
    got = finetune_size(size, Finetune(activation_dropout=0.2, layer_drop=0.3))
    assert (got.dropout, got.attention_dropout, got.input_dropout) == (0, 0, 0)
    assert (got.activation_dropout, got.layer_drop, got.conv_grad_scale) == (0.2, 0.3, 0)


def test_masks_act():
    model = recogniser().eval()
    wave_BS, samples_B = torch.randn(1, 8000), torch.tensor([8000])
    plain = model(wave_BS, samples_B)[0]
    time_BT, channel_BD = torch.zeros(1, 24, dtype=torch.bool), torch.zeros(1, 32, dtype=torch.bool)
    assert torch.equal(model(wave_BS, samples_B, time_BT, channel_BD)[0], plain)
    time_BT[:, 3:13] = True
    assert not torch.equal(model(wave_BS, samples_B, time_BT)[0], plain)
    assert not torch.equal(model(wave_BS, samples_B, None, ~channel_BD)[0], plain)
    other = model(torch.randn(1, 8000), samples_B, None, ~channel_BD)[0]
    assert torch.equal(model(wave_BS, samples_B, None, ~channel_BD)[0], other)  # all channels off: the wave is gone
