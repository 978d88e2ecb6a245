"Probes: the seed and the number of processes reach the heads, and a head says what the table says."
import importlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov3_nb.bank import bank
from dinov3_nb.core import TrainArguments
from dinov3_nb.heads import LinearHead, logistic, ridge
from dinov3_nb.probe import (
    METHODS, Grid, ProbeResult, best_linear, clearly_below, find_learning_rate, knn, probe_features, ridge_accuracy,
)

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
    only = partial(probe._probe_linear, bank, Grid((1e-5,)))  # one setting: nothing to choose
    monkeypatch.setattr(probe, "METHODS", (("bank", "rate", only),))
    answers = [probe_features({"cls": features}, labels, {"cls": queries}, truth, 10, seed)[0].accuracy for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2], answers


def test_the_seed_reaches_the_heads(blobs):
    features, labels, *_ = blobs
    first, second, other = (probe.train_bank(features, labels, 10, (1e-4,), TrainArguments(epochs=1, seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_processes_make_a_step_larger(blobs):
    features, labels, *_ = blobs
    few = TrainArguments(epochs=1, batch_size=32)
    four = find_learning_rate(features, labels, 10, few, num_processes=4)
    assert four == find_learning_rate(features, labels, 10, replace(few, batch_size=128))
    assert four != find_learning_rate(features, labels, 10, few)


def test_a_rate_that_diverged_cannot_win(blobs, monkeypatch):
    features, labels, *_ = blobs
    real = probe.train_bank
    def diverges(*arguments):
        weights, biases = real(*arguments)
        weights[5:] = torch.nan
        return weights, biases
    monkeypatch.setattr(probe, "train_bank", diverges)
    assert find_learning_rate(features, labels, 10, TrainArguments(epochs=1))[0] in probe.RATES[:5]


def test_the_table_says_what_its_heads_do(blobs):
    features, labels, queries, truth = blobs
    results = probe_features({"cls": features}, labels, {"cls": queries}, truth, 10, device=torch.device("cpu"))
    assert [r.method for r in results] == [name for name, *_ in METHODS]
    for result in results[1:]:
        logits = queries.float() @ result.head.weight.T + result.head.bias
        assert (logits.argmax(1) == truth).float().mean().item() == result.accuracy
    assert results[0].head is None and best_linear(results).accuracy == max(r.accuracy for r in results[1:])
    assert "head" not in repr(results[1])


def test_of_equal_lines_the_first_is_the_best():
    head = LinearHead(torch.zeros(2, 3), torch.zeros(2))
    lines = [ProbeResult(name, "cls", "", accuracy, 0.0, head if name != "neighbours" else None)
             for name, accuracy in (("neighbours", 1.0), ("ridge", 0.5), ("logistic", 0.9), ("bank", 0.9))]
    assert best_linear(lines).method == "logistic"


@pytest.mark.parametrize("tried, grid, asked", [
    ({2: 1, 3: 1}, Grid((2, 3), ((1,),), ((4,),)), [2, 3, 1]),                            # of equal ones the first, no further
    ({1: 1, 2: 2, 3: 3, 4: 4, 5: 3}, Grid((1, 2), (), ((3,), (4,), (5,), (6,))), [1, 2, 3, 4, 5]),
    ({4: 1, 3: 2, 2: 2, 1: 9}, Grid((3, 4), ((2,), (1,))), [3, 4, 2]),                    # not better than the edge
    ({1: 1, 2: 3, 3: 2}, Grid((1, 2, 3), ((0,),), ((4,),)), [1, 2, 3]),                   # wins inside
    ({1: 1, 2: 2, 3: 3, 4: 4}, Grid((1, 2), (), ((3, 4),)), [1, 2, 3, 4]),                # the list ends
])
def test_an_edge_that_wins_is_extended(tried, grid, asked):
    found = []
    def score(settings):
        found.extend(settings)
        return {s: tried.get(s, 0) for s in settings}
    best = probe._choose(score, grid)
    assert found == asked and tried[best] == max(tried.get(s, 0) for s in found)


def test_ridge_goes_on_below_its_grid(blobs):
    features, labels, queries, truth = blobs
    task = probe._Task(10, 42, torch.device("cpu"))
    strong = Grid((1e6, 1e7, 1e8), below=((1e4,), (1e2,), (1.0,)))
    tried = []
    def remembering(*arguments):
        fit = ridge(*arguments)
        def remember(strengths, start=None):
            tried.extend(strengths)
            return fit(strengths, start)
        return remember
    probe._probe_linear(remembering, strong, (features, labels), (queries, truth), task)
    assert tried[:3] == [1e6, 1e7, 1e8] and set(tried[3:]) <= {1e4, 1e2, 1.0, 1e6}


def test_neighbours_in_tiles_are_those_of_one_search(blobs, monkeypatch):
    features, labels, queries, _ = blobs
    whole = probe.find_nearest(features, queries, 20, features.device)
    monkeypatch.setattr(probe, "_TILE", 64)
    monkeypatch.setattr(probe, "_QUERIES", 33)
    values, rows = probe.find_nearest(features, queries, 20, features.device)
    assert torch.equal(rows, whole[1]) and torch.allclose(values, whole[0], atol=1e-6)
    direct = torch.cosine_similarity(queries[:, None], features[None], dim=2).topk(20)
    assert torch.equal(rows, direct.indices)
    assert knn(features[:5], labels[:5], queries[:3], 10)[200].shape == (3,)


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_logistic_regression_is_that_of_scikit_learn(blobs, strength):
    features, labels, queries, _ = (v.double().numpy() if v.is_floating_point() else v for v in blobs)
    mean, std = features.mean(0), features.std(0)
    theirs = LogisticRegression(C=strength, max_iter=5000, tol=1e-10).fit((features - mean) / std, labels.numpy())
    chances = theirs.predict_proba((queries - mean) / std)
    head = logistic(blobs[0], blobs[1], 10, tolerance=0)((strength,))[strength]
    assert np.abs(head.logits(blobs[2]).softmax(1).numpy() - chances).max() < 2e-3
    usual = logistic(blobs[0], blobs[1], 10)((strength,))[strength]
    assert (usual.predict(blobs[2]).numpy() == chances.argmax(1)).mean() > 0.97


def test_a_warm_start_ends_at_the_same_head(blobs):
    features, labels, queries, _ = blobs
    fit = logistic(features, labels, 10, tolerance=0)
    swept = fit((1e-2, 1e-1, 1.0))[1.0]
    cold = logistic(features, labels, 10, tolerance=0)((1.0,))[1.0]
    begun = logistic(features, labels, 10, tolerance=0)((1.0,), ridge(features, labels, 10)((1.0,))[1.0])[1.0]
    for other in (cold, begun):
        assert (swept.logits(queries).softmax(1) - other.logits(queries).softmax(1)).abs().max() < 2e-3


@pytest.mark.parametrize("method, setting", [(ridge, 0.1), (logistic, 0.1), (bank, 1e-2)])
def test_many_parts_are_one_whole(blobs, monkeypatch, method, setting):
    features, labels, queries, _ = blobs
    heads = importlib.import_module("dinov3_nb.heads")
    whole = method(features, labels, 10)((setting,))[setting]
    monkeypatch.setattr(heads, "_ROWS", 37)
    if method is not logistic:  # where the search begins is measured on a part
        parts = method(features, labels, 10)((setting,))[setting]
        assert torch.allclose(parts.weight, whole.weight, atol=1e-5)
    assert torch.equal(whole.predict(queries), whole.logits(queries).argmax(1))


def test_large_offsets_and_half_precision(blobs):
    features, labels, queries, truth = blobs
    far = features + 20
    for method, setting in ((ridge, 0.1), (logistic, 0.1)):
        near = method(features, labels, 10)((setting,))[setting].predict(queries)
        assert (method(far, labels, 10)((setting,))[setting].predict(queries + 20) == near).float().mean() > 0.99
        assert (method(features.half(), labels, 10)((setting,))[setting].predict(queries) == near).float().mean() > 0.97


def test_at_most_so_many_are_held_out_or_compared(monkeypatch):
    labels = torch.arange(1000) % 10
    monkeypatch.setattr(probe, "_MOST_HELD_OUT", 50)
    fit, choose = probe._hold_out(labels)
    assert len(choose) == 50 and len(fit) == 950 and torch.bincount(labels[choose]).tolist() == [5] * 10
    part = probe._take_part(labels, 100, seed=1)
    assert torch.bincount(labels[part]).tolist() == [10] * 10
    assert len(probe._take_part(labels, 1000, seed=1)) == 1000


def test_a_quick_figure(blobs, monkeypatch):
    features, labels, queries, truth = blobs
    whole = ridge_accuracy(*blobs, 10)
    line = probe_features({"cls": features}, labels, {"cls": queries}, truth, 10)[1]
    assert whole == line.accuracy
    monkeypatch.setattr(probe, "_MOST_FOR_FIGURE", 60)
    assert 0.2 < ridge_accuracy(*blobs, 10) < whole


def test_clearly_below():
    assert clearly_below(0.80, 0.90, 1000) and not clearly_below(0.80, 0.81, 1000)
    assert clearly_below(0.80, 0.81, 100_000)
    assert not clearly_below(0.90, 0.80, 1000) and not clearly_below(1.0, 1.0, 10)
