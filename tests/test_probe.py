"Probes: the seed and the number of processes reach the heads."
import importlib
from dataclasses import replace

import pytest
import torch

from dinov3_nb.core import TrainArguments
from dinov3_nb.probe import bank, find_learning_rate, probe_features

probe = importlib.import_module("dinov3_nb.probe")  # `dinov3_nb.probe` is the function


@pytest.fixture(scope="module")
def blobs():
    "Features of three hundred training and two hundred validation images in ten overlapping classes."
    torch.manual_seed(0)
    centres, labels = torch.randn(10, 32), torch.arange(500) % 10
    features = centres[labels] + 1.5 * torch.randn(500, 32)
    return features[:300], labels[:300], features[300:], labels[300:]


def test_the_seed_reaches_the_bank(blobs, monkeypatch):
    features, labels, queries, truth = blobs
    monkeypatch.setattr(probe, "METHODS", (("bank", bank, "rate", (1e-5,)),))  # one setting: nothing to choose
    answers = [probe_features({"cls": features}, labels, {"cls": queries}, truth, 10, seed)[0].accuracy for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2], answers


def test_the_seed_reaches_the_heads(blobs):
    features, labels, *_ = blobs
    first, second, other = (probe._train_bank(features, labels, 10, (1e-4,), TrainArguments(epochs=1, seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_processes_make_a_step_larger(blobs):
    features, labels, *_ = blobs
    few = TrainArguments(epochs=1, batch_size=32)
    four = find_learning_rate(features, labels, 10, few, num_processes=4)
    assert four == find_learning_rate(features, labels, 10, replace(few, batch_size=128))
    assert four != find_learning_rate(features, labels, 10, few)


def test_a_rate_that_diverged_cannot_win(blobs, monkeypatch):
    features, labels, *_ = blobs
    real = probe._train_bank
    def diverges(*arguments):
        weights, biases = real(*arguments)
        weights[5:] = torch.nan
        return weights, biases
    monkeypatch.setattr(probe, "_train_bank", diverges)
    assert find_learning_rate(features, labels, 10, TrainArguments(epochs=1))[0] in probe._RATES[:5]
