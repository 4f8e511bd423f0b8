"""Losses and gradients of batches, and their comparison."""

import pytest
import torch

from rematch.train.loss import ReMatchLoss

SMALL = 150  # tokens: many mini-batches


def gradients(model, loss, batches, scale=1.0, seed=0):
    """Losses and gradients of some batches, accumulated, as a trainer does it."""
    model.zero_grad()
    loss.zero_grad()
    torch.manual_seed(seed)
    totals = []
    for batch in batches:
        total = torch.stack(list(loss([batch]).values())).sum()
        (total * scale / len(batches)).backward()
        totals.append(total.item())
    named = [
        *model.named_parameters(),
        *[(n, p) for n, p in loss.named_parameters() if not n.startswith("model.")],
    ]
    return totals, {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_equal(plain, cached, tolerance):
    assert cached[0] == pytest.approx(plain[0], rel=tolerance)
    assert cached[1].keys() == plain[1].keys()
    largest = max(gradient.norm() for gradient in plain[1].values())
    for name, gradient in plain[1].items():  # some are zero but for rounding: biases of keys
        assert (cached[1][name] - gradient).norm() <= tolerance * gradient.norm().clamp(
            min=1e-4 * largest
        ), name


def both(model, batches, scale=1.0, **options):
    return [
        gradients(model, ReMatchLoss(model, gradient_cache=c, **options), batches, scale)
        for c in (False, True)
    ]
