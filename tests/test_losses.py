"Losses as means over images, whatever the labels, and images that are mixed by the random numbers of their step."
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from dinov3_nb.core import TrainArguments, UserError
from dinov3_nb.losses import ClassLoss, Learning, balanced_weights, choose_learning, log_prior, make_loss, make_mix

CLASSES = 5


def slow_loss(loss, logits, labels):
    "The same, one image and one class at a time."
    total = 0.0
    for row, label in zip(logits, labels):
        shares = F.one_hot(label, CLASSES).float() if label.ndim == 0 else label
        if loss.shift is not None: row = row + loss.shift
        for c in range(CLASSES):
            share = (1 - loss.smoothing) * shares[c] + loss.smoothing / CLASSES
            weight = 1.0 if loss.weights is None else loss.weights[c]
            total -= weight * share * (row[c] - row.exp().sum().log())
    return total / len(logits)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_loss_is_what_a_slow_one_adds_up(soft, smoothing, weighed, shifted):
    torch.manual_seed(0)
    logits, labels = torch.randn(7, CLASSES), torch.randint(CLASSES, (7,))
    if soft: labels = torch.rand(7, CLASSES).softmax(1)
    counts = torch.tensor([50.0, 20, 20, 9, 1])
    loss = ClassLoss(smoothing, balanced_weights(counts) if weighed else None, log_prior(counts) if shifted else None)
    assert torch.allclose(loss(logits, labels), slow_loss(loss, logits, labels), atol=1e-5)
    parts = sum(loss(logits[rows], labels[rows]) * len(labels[rows]) / 7 for rows in (slice(4), slice(4, 7)))
    assert torch.allclose(parts, loss(logits, labels), atol=1e-5)


@pytest.mark.parametrize("counts", [[3, 3, 3], [90, 9, 1], [5, 0, 5], [1, 1000, 0]])
def test_balanced_weights_are_one_on_average_and_finite(counts):
    counts = torch.tensor(counts).float()
    weights = balanced_weights(counts)
    assert torch.isfinite(weights).all() and torch.isfinite(log_prior(counts)).all()
    assert (weights * counts).sum().item() == pytest.approx(counts.sum().item(), rel=1e-5)
    shares = (weights * counts)[counts > 0]
    assert torch.allclose(shares, shares[:1].expand_as(shares))


def test_a_class_without_images_gives_no_nan():
    how = choose_learning(TrainArguments(class_weights="balanced", logit_adjustment=2.0, label_smoothing=0.1), [0, 0, 1], 3)
    logits = torch.randn(3, 3, requires_grad=True)
    how.loss(logits, torch.tensor([0, 0, 1])).backward()
    assert torch.isfinite(logits.grad).all()


def test_nothing_asked_for_is_nothing_changed():
    assert choose_learning(TrainArguments(), [0, 1], 2) == Learning()
    assert make_loss(TrainArguments(), torch.ones(2)) is None and make_mix(TrainArguments(), 2) is None


def test_of_two_ways_to_mix_each_batch_takes_one():
    mix, found = make_mix(TrainArguments(mixup=1.0, cutmix=1.0), 4), Counter()
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    torch.manual_seed(0)
    for _ in range(60):
        images, soft = mix(pixels, torch.arange(4))
        assert torch.allclose(soft.sum(1), torch.ones(4)) and images.dtype == pixels.dtype
        assert torch.allclose(images.mean((1, 2, 3)), soft @ torch.arange(4.0), atol=1e-5)  # the label's share is that of the pixels
        found["mixup" if (images[1] == images[1, 0, 0, 0]).all() else "cutmix"] += 1
    assert min(found.values()) > 15, found


def test_mixing_follows_the_seed_and_leaves_the_batch_as_it_was():
    mix, pixels = make_mix(TrainArguments(mixup=0.4, cutmix=0.4), 4), torch.rand(4, 3, 8, 8)
    before, results = pixels.clone(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mix(pixels, torch.arange(4)))
    assert torch.equal(pixels, before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("changes, words", [
    (dict(mixup=-0.1), "--mixup -0.1 is out of range"), (dict(cutmix=float("nan")), "--cutmix nan"), (dict(label_smoothing=1.0), "--label_smoothing 1.0"),
    (dict(ema_decay=1.0), "--ema_decay 1.0"), (dict(ema_decay=-0.5), "--ema_decay -0.5"), (dict(patience=0), "--patience 0 is out of range"),
    (dict(metric="f1"), "--metric 'f1' is not known: choose from accuracy, macro_f1, balanced_accuracy"), (dict(class_weights="yes"), "--class_weights 'yes'"),
    (dict(logit_adjustment=-1.0), "--logit_adjustment -1.0"), (dict(mixup=0.2, batch_size=1), "give a --batch_size above 1"),
    (dict(cutmix="much"), "'much' is not a number")])
def test_bad_settings_get_a_sentence(changes, words):
    with pytest.raises(UserError) as raised: TrainArguments(**changes)
    assert words in str(raised.value)
