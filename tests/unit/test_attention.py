"""Are our dropout, and attention with it, torch's: dropped as often as asked, the expectation kept, seeded by torch alone?"""

import math

import pytest
import torch
import torch.nn.functional as F

from hubert_ray.model import attention
from hubert_ray.model.attention import attend
from hubert_ray.model.dropout import dropout, random_numbers, threshold

SHAPE = (2, 3, 29, 16)


def parts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(3)]


def drop_mask(shape, probability):
    """The mask that is drawn at this state of torch's generator."""
    return torch.from_numpy(random_numbers(shape) < threshold(probability))


def slow(query, key, value, dropout):
    """By the definition, with the mask that `attend` draws at the same state of torch's generator."""
    batch, heads, frames, width = SHAPE
    weights = (query @ key.transpose(2, 3) / math.sqrt(width)).softmax(3)
    dropped = drop_mask((batch * heads, frames, frames), dropout).view(batch, heads, frames, frames)
    kept = 1 - round(dropout * 65536) / 65536
    return weights * (~dropped) / kept @ value


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("heads_at_once", [1, 4, 6])
def test_equal_to_the_definition_with_gradients(dropout, heads_at_once, monkeypatch):
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", heads_at_once * SHAPE[2] ** 2)
    mine, theirs = parts(), parts()
    results = []
    for function, inputs in ((attend, mine), (slow, theirs)):
        torch.manual_seed(5)
        mixed = function(*inputs, dropout=dropout)
        (mixed * torch.arange(mixed.numel()).view(SHAPE).sin()).sum().backward()
        results.append(mixed)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert (results[0] - F.scaled_dot_product_attention(*mine)).abs().max() > 1e-2


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.3, 0.75])
def test_weights_are_dropped_as_often_as_asked_and_nowhere_more(probability):
    torch.manual_seed(1)
    dropped = drop_mask((500, 40, 101), probability).float()
    deviation = math.sqrt(probability * (1 - probability))
    assert abs(dropped.mean() - probability) <= 5 * deviation / math.sqrt(dropped.numel())
    for dim in (0, 1, 2):  # no row, column or place in a group of four is dropped more often
        mean = dropped.mean([d for d in range(3) if d != dim])
        assert (mean - probability).abs().max() <= 6 * deviation / math.sqrt(dropped.numel() / len(mean))
    flat = dropped.flatten()[: 4 * (dropped.numel() // 4)].view(-1, 4)
    assert (flat.mean(0) - probability).abs().max() <= 6 * deviation / math.sqrt(len(flat))
    if probability:  # neighbours decide apart
        together = (flat[:, 0] * flat[:, 1]).mean()
        assert abs(together - probability**2) < 6 * probability / math.sqrt(len(flat))


def test_dropout_scales_what_it_keeps_and_its_gradient_alike():
    value = torch.full((300, 40), 2.0, requires_grad=True)
    torch.manual_seed(2)
    result = dropout(value, 0.25, training=True)
    result.sum().backward()
    kept = result != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    assert torch.allclose(result[kept], torch.tensor(2 / 0.75))
    assert torch.equal(value.grad, result.detach() / 2)
    assert dropout(value, 0.25, training=False) is value
    assert dropout(value, 0.0, training=True) is value


def test_only_torchs_seed_decides():
    torch.manual_seed(3)
    first, second = (attend(*parts(), dropout=0.3) for _ in range(2))
    torch.manual_seed(3)
    again = attend(*parts(), dropout=0.3)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_padding_and_no_dropout_are_torchs_own():
    query, key, value = parts()
    keys_B11T = (torch.arange(29) < torch.tensor([[29], [11]]))[:, None, None]
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=keys_B11T)
    assert torch.equal(attend(query, key, value, keys_B11T), wanted)
    torch.manual_seed(0)
    padded = attend(query, key, value, keys_B11T, dropout=0.5)
    torch.manual_seed(0)
    changed = value.detach().clone()
    changed[1, :, 11:] = 7.0  # what lies behind padding
    assert torch.equal(attend(query, key, changed, keys_B11T, dropout=0.5), padded)
