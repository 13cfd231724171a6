"""Is the loss fairseq's, summed over frames and streams, and blind to how frames are dealt to workers?"""

import math

import pytest
import torch

from hubert_ray.config.recipe import Pretrain
from hubert_ray.config.sizes import ModelSize
from hubert_ray.errors import LabelError
from hubert_ray.model.hubert import Hubert, PretrainOutput
from hubert_ray.model.loss import ctc_loss_sum, pretrain_loss
from tests.reference import positive_first_nats

MINI = ModelSize(
    conv_channels=8,
    conv_norm="group",
    layers=1,
    dim=32,
    ffn_dim=32,
    heads=2,
    norm_first=True,
    codeword_dim=16,
    normalize_waveform=False,
    conv_grad_scale=1.0,
    dropout=0.0,
    attention_dropout=0.0,
    input_dropout=0.0,
    layer_drop=0.0,
)
SETTINGS = Pretrain(steps=1, peak_lr=1.0)


def setting(classes=(7,), rows=3, frames=20, seed=0):
    torch.manual_seed(seed)
    model = Hubert(MINI, classes)
    output = PretrainOutput(torch.randn(rows, frames, 32, requires_grad=True), torch.tensor(0.3))
    labels_BTK = torch.stack([torch.randint(0, count, (rows, frames)) for count in classes], dim=2)
    return model, output, labels_BTK, torch.rand(rows, frames) < 0.5


def slow_nats(model, output, labels_BTK, where_BT):
    hidden_ND, labels_NK = output.hidden_BTD[where_BT], labels_BTK[where_BT]
    projected = model.head.projection(hidden_ND).chunk(labels_NK.shape[1], dim=1)
    tables = model.head.codewords.split(model.head.classes)
    return sum(
        positive_first_nats(p, t, labels_NK[:, k]) for k, (p, t) in enumerate(zip(projected, tables, strict=True))
    )


@pytest.mark.parametrize("classes", [(7,), (5, 11, 3)])
def test_equals_fairseqs_form(classes):
    model, output, labels_BTK, mask_BT = setting(classes)
    settings = Pretrain(steps=1, peak_lr=1.0, masked_weight=0.7, unmasked_weight=0.2, feature_penalty=10.0)
    parts = pretrain_loss(model, output, labels_BTK, mask_BT, settings)
    masked, unmasked = (slow_nats(model, output, labels_BTK, where) for where in (mask_BT, ~mask_BT))
    assert parts.masked_nats.item() == pytest.approx(masked.item(), rel=1e-5)
    assert parts.unmasked_nats.item() == pytest.approx(unmasked.item(), rel=1e-5)
    assert parts.frames == mask_BT.numel()
    assert parts.masked_frames == mask_BT.sum()
    expected = 0.7 * masked + 0.2 * unmasked + 10.0 * 0.3 * mask_BT.numel()
    assert parts.total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_two_streams_is_the_sum_of_theirs():
    """Heads of one stream each with the same weights: the same nats, the same correct frames, the same gradient."""
    model, output, labels_BTK, mask_BT = setting((5, 11))
    both = pretrain_loss(model, output, labels_BTK, mask_BT, SETTINGS)
    (together,) = torch.autograd.grad(both.total, output.hidden_BTD)
    nats, correct, apart = 0.0, 0, torch.zeros_like(together)
    for stream, classes in enumerate((5, 11)):
        alone = Hubert(MINI, (classes,))
        rows = slice(16 * stream, 16 * stream + 16)
        alone.head.load_state_dict(
            {
                "projection.weight": model.head.projection.weight[rows],
                "projection.bias": model.head.projection.bias[rows],
                "codewords": model.head.codewords.split((5, 11))[stream],
            }
        )
        part = pretrain_loss(alone, output, labels_BTK[..., stream], mask_BT, SETTINGS)
        nats, correct = nats + part.masked_nats.item(), correct + part.masked_correct
        apart += torch.autograd.grad(part.total, output.hidden_BTD)[0]
    assert both.masked_nats.item() == pytest.approx(nats, rel=1e-6)
    assert both.masked_correct == correct
    assert both.masked_total == 2 * mask_BT.sum()
    torch.testing.assert_close(together, apart)


def test_the_default_learns_from_masked_frames_only():
    model, output, labels_BTK, mask_BT = setting()
    parts = pretrain_loss(model, output, labels_BTK[..., 0], mask_BT, SETTINGS)
    assert parts.frames == parts.masked_frames == mask_BT.sum()
    assert parts.unmasked_nats == 0
    parts.total.backward()
    grad_BT = output.hidden_BTD.grad.abs().sum(2)
    assert (grad_BT[mask_BT] > 0).all()
    assert (grad_BT[~mask_BT] == 0).all()


def test_sums_do_not_depend_on_the_split_into_workers():
    model, output, labels_BTK, mask_BT = setting(rows=4)
    whole = pretrain_loss(model, output, labels_BTK, mask_BT, SETTINGS)
    halves = [
        pretrain_loss(
            model, PretrainOutput(output.hidden_BTD[s], output.feature_penalty), labels_BTK[s], mask_BT[s], SETTINGS
        )
        for s in (slice(0, 1), slice(1, 4))
    ]
    assert sum(part.total for part in halves).item() == pytest.approx(whole.total.item(), rel=1e-6)
    assert sum(part.frames for part in halves) == whole.frames
    assert sum(part.masked_correct for part in halves) == whole.masked_correct


def test_correct_counts_and_the_sample_of_unmasked_frames():
    model, output, _, mask_BT = setting(rows=8, frames=99)
    with torch.no_grad():
        best_BT = model.head.logits(output.hidden_BTD.flatten(0, 1)).argmax(1).view(8, 99)
    parts = pretrain_loss(model, output, best_BT, mask_BT, SETTINGS)
    assert parts.masked_correct == parts.masked_total == mask_BT.sum()
    assert parts.unmasked_correct == parts.unmasked_total == 128
    assert pretrain_loss(model, output, (best_BT + 1) % 7, mask_BT, SETTINGS).masked_correct == 0


def test_a_head_without_an_opinion_is_wrong():
    model, output, labels_BTK, mask_BT = setting()
    torch.nn.init.constant_(model.head.codewords, 1.0)
    assert pretrain_loss(model, output, torch.zeros_like(labels_BTK), mask_BT, SETTINGS).masked_correct == 0


@pytest.mark.parametrize(("classes", "bits"), [(100, 6.72), (500, 9.03)])
def test_first_loss_is_just_above_log2_of_classes(classes, bits):
    torch.manual_seed(0)
    model = Hubert(
        ModelSize(**{**{f: getattr(MINI, f) for f in MINI.__struct_fields__}, "codeword_dim": 256}), (classes,)
    )
    output = PretrainOutput(torch.randn(4, 200, 32), torch.tensor(0.0))
    labels_BT = torch.randint(0, classes, (4, 200))
    parts = pretrain_loss(model, output, labels_BT, torch.ones(4, 200, dtype=torch.bool), SETTINGS)
    assert parts.masked_nats.item() / parts.frames / math.log(2) == pytest.approx(bits, abs=0.08)


def test_head_computes_in_fp32_under_autocast():
    model, output, _, _ = setting()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.head(output.hidden_BTD[0])[0].dtype == torch.float32


def test_wrong_labels_are_refused():
    model, output, labels_BTK, mask_BT = setting()
    with pytest.raises(LabelError, match="expected"):
        pretrain_loss(model, output, labels_BTK[:, :-1], mask_BT, SETTINGS)


def test_no_masked_frame_is_a_loss_of_zero():
    model, output, labels_BTK, mask_BT = setting()
    parts = pretrain_loss(model, output, labels_BTK, torch.zeros_like(mask_BT), SETTINGS)
    assert parts.total == 0
    assert parts.frames == 0


def test_ctc_is_the_sum_over_alignments():
    """Two frames, one letter: the alignments of `a` are aa, a-, -a."""
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]])
    expected = -math.log(0.3 * 0.6 + 0.3 * 0.1 + 0.5 * 0.6)
    loss = ctc_loss_sum(p.log(), torch.tensor([2]), torch.tensor([[1]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_ctc_sums_utterances_and_ignores_padding_and_the_impossible():
    torch.manual_seed(0)
    log_probs = torch.randn(3, 12, 5).log_softmax(2)
    letters, lengths, frames = torch.randint(1, 5, (3, 4)), torch.tensor([4, 2, 4]), torch.tensor([12, 9, 12])
    total = ctc_loss_sum(log_probs, frames, letters, lengths)
    single = [
        ctc_loss_sum(
            log_probs[i : i + 1, : frames[i]], frames[i : i + 1], letters[i : i + 1, : lengths[i]], lengths[i : i + 1]
        )
        for i in range(3)
    ]
    assert total.item() == pytest.approx(sum(single).item(), rel=1e-5)
    short = ctc_loss_sum(log_probs[:1], torch.tensor([2]), letters[:1], lengths[:1])
    assert short == 0
