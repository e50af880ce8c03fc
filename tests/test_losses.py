from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from safeopt.losses import reply_distributions, reply_kl, reply_nll

VOCABULARY = 50


def labels_of(n: int, t: int) -> torch.Tensor:
    labels = torch.randint(0, VOCABULARY, (n, t))
    labels[:, :2] = -100
    labels[0, 4:] = -100
    return labels


def test_nll_is_the_mean_over_each_reply() -> None:
    logits, labels = torch.randn(3, 7, VOCABULARY), labels_of(3, 7)
    expected = [
        F.cross_entropy(row[:-1], target[1:], ignore_index=-100)
        for row, target in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(reply_nll(logits, labels), torch.stack(expected))


def full_kl(aligned: torch.Tensor, current: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p, q = aligned.double().log_softmax(-1), current.double().log_softmax(-1)
    per_token = (p.exp() * (p - q)).sum(-1)[:, :-1]
    mask = (labels[:, 1:] != -100).double()
    return (per_token * mask).sum(1) / mask.sum(1)


def test_kl_equals_the_full_sum_when_every_token_is_kept() -> None:
    labels, aligned = labels_of(3, 7), torch.randn(3, 7, VOCABULARY)
    current = aligned + 0.5 * torch.randn_like(aligned)
    recorded = reply_distributions(aligned, labels, top=VOCABULARY - 1)
    kl = reply_kl(current, labels, recorded)
    torch.testing.assert_close(kl.double(), full_kl(aligned, current, labels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top", [1, 5, 20])
def test_coarsened_kl_never_exceeds_the_full_one(top: int) -> None:
    labels, aligned = labels_of(3, 7), 3 * torch.randn(3, 7, VOCABULARY)
    current = aligned + torch.randn_like(aligned)
    kl = reply_kl(current, labels, reply_distributions(aligned, labels, top))
    assert bool((kl.double() <= full_kl(aligned, current, labels) + 1e-6).all())
    assert bool((kl > 0).all())


def test_kl_is_zero_with_zero_gradient_at_the_aligned_model() -> None:
    labels = labels_of(2, 6)
    logits = torch.randn(2, 6, VOCABULARY, requires_grad=True)
    kl = reply_kl(logits, labels, reply_distributions(logits.detach(), labels))
    kl.sum().backward()
    assert float(kl.abs().max().detach()) < 1e-6
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6
