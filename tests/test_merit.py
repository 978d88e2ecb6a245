"Figures of merit: they agree with counting by hand, an order suits its matrix, and any class name can be drawn."
import importlib
import io
import warnings

import numpy as np
import pytest
import torch

from dinov3_nb.core import UserError
from dinov3_nb.merit import draw_confusion, figures_of_merit, find_pairs, merit_lines, order_classes, short_name
from dinov3_nb.scores import interval, score


@pytest.fixture(scope="module")
def answers():
    "Labels and answers for 12 classes; 10 has no image, 11 has none and is never said."
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 600)
    predicted = np.where(generator.random(600) < 0.3, generator.integers(0, 11, 600), labels)
    return labels, predicted


def test_figures_are_those_of_counting(answers):
    labels, predicted = answers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merit = figures_of_merit(labels, predicted, 12)
    assert (merit.right, merit.total) == (sum(labels == predicted), 600)
    assert merit.accuracy == merit.right / 600 and merit.interval == interval(merit.right, 600)
    for c in range(12):
        said, true, both = sum(predicted == c), sum(labels == c), sum((predicted == c) & (labels == c))
        assert merit.support[c] == true
        assert merit.precision[c] == pytest.approx(both / said if said else np.nan, nan_ok=True)
        assert merit.recall[c] == pytest.approx(both / true if true else np.nan, nan_ok=True)
        assert merit.f1[c] == pytest.approx(2 * both / (said + true) if said + true else np.nan, nan_ok=True)
        assert merit.confusion[c].tolist() == [sum((labels == c) & (predicted == d)) for d in range(12)]


def test_means_are_those_of_scores(answers):
    labels, predicted = map(torch.from_numpy, answers)
    merit, scores = figures_of_merit(labels, predicted, 12), score(torch.eye(12)[predicted], labels)
    assert np.nanmean(merit.f1) == pytest.approx(scores.macro_f1)
    assert np.nanmean(merit.recall) == pytest.approx(scores.balanced_accuracy)


def test_tensors_and_arrays_give_the_same(answers):
    by_array = figures_of_merit(*answers, 12)
    by_tensor = figures_of_merit(*(torch.from_numpy(part).byte() for part in answers), 12)
    assert (by_array.confusion == by_tensor.confusion).all() and by_array.pairs == by_tensor.pairs


def test_pairs_hold_every_mistake_once(answers):
    merit = figures_of_merit(*answers, 12)
    counts = [count for *_, count in merit.pairs]
    assert sum(counts) == merit.total - merit.right and counts == sorted(counts, reverse=True)
    assert all(merit.confusion[true, said] == count and true != said for true, said, count in merit.pairs)
    assert find_pairs(np.eye(3, dtype=int)) == []


@pytest.mark.parametrize("confused", range(6))
def test_an_order_has_each_class_once(confused):
    "With no mistakes, with one pair, with three classes and so on; those without a mistake last, as they were."
    confusion = 5 * np.eye(8, dtype=int)
    for c in range(confused): confusion[7 - c, 6 - c] = c + 1
    order = order_classes(confusion)
    assert sorted(order.tolist()) == list(range(8))
    quiet = [c for c in range(8) if confusion[c].sum() == confusion[:, c].sum() == 5]
    assert order.tolist()[8 - len(quiet):] == quiet


def test_a_chain_of_confusions_is_laid_out_straight():
    chain = np.random.default_rng(0).permutation(300)
    confusion = 9 * np.eye(300, dtype=int)
    confusion[chain[:-1], chain[1:]] = 1
    place = np.argsort(order_classes(confusion))
    assert (abs(np.diff(place[chain])) == 1).all()


def test_of_too_many_classes_the_most_confused_are_ordered(monkeypatch):
    monkeypatch.setattr(importlib.import_module("dinov3_nb.merit"), "_MOST_ORDERED", 4)
    confusion = 9 * np.eye(12, dtype=int)
    for true, said, count in [(2, 9, 5), (4, 7, 5), (0, 11, 1), (3, 1, 1)]: confusion[true, said] = count
    order = order_classes(confusion).tolist()
    assert {frozenset(order[:2]), frozenset(order[2:4])} == {frozenset({2, 9}), frozenset({4, 7})}
    assert order[4:] == [0, 1, 3, 5, 6, 8, 10, 11]
    for said in range(1, 12): confusion[0, said] = 9  # four classes, of which only the first was confused with the others
    assert sorted(order_classes(confusion).tolist()) == list(range(12))


def test_a_thousand_classes_can_be_ordered_and_drawn():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 1000, 10_000)
    predicted = np.where(generator.random(10_000) < 0.5, generator.integers(0, 1000, 10_000), labels)
    merit = figures_of_merit(labels, predicted, 1000)
    assert sorted(merit.order.tolist()) == list(range(1000))
    figure = draw_confusion(merit, [f"class {c}" for c in range(1000)])
    assert figure.axes[0].get_title() == "The 40 most confused of 1,000 classes"
    assert len(figure.axes[0].get_yticks()) == 40
    figure.savefig(io.BytesIO(), format="svg")


@pytest.mark.parametrize("num_classes, title, cells", [
    (1, "", 1), (2, "", 4), (20, "", 400), (21, "", 0), (40, "", 0), (41, "The 40 most confused of 41 classes", 0),
])
def test_what_a_matrix_shows(num_classes, title, cells):
    "Counts up to 20 classes, names up to 40, beyond that the most confused."
    every = np.indices((num_classes, num_classes)).reshape(2, -1)
    labels, predicted = (np.concatenate([e, np.arange(num_classes)]) for e in every)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merit = figures_of_merit(labels, predicted, num_classes)
    axis = draw_confusion(merit, [f"class {c}" for c in range(num_classes)]).axes[0]
    assert axis.get_title() == title and len(axis.texts) == cells
    assert len(axis.get_yticklabels()) == min(num_classes, 40)


def test_the_most_confused_are_shown():
    confusion = np.diag(np.full(60, 20))
    confusion[50:59, 59] = 3
    labels, predicted = (np.repeat(i.ravel(), confusion.ravel()) for i in np.indices(confusion.shape))
    axis = draw_confusion(figures_of_merit(labels, predicted, 60), [str(c) for c in range(60)]).axes[0]
    assert {str(c) for c in range(50, 60)} <= {text.get_text() for text in axis.get_yticklabels()}


@pytest.mark.parametrize("names", [
    ["$a_$", "$\\frac$"], ["_hidden", ""], ["<script>alert(1)</script>", "\"'&"], ["x" * 300, "line\nend\ttab\x00\ud800"],
    ["\u05d0\u05d1\u05d2", "\u202eabc"],
])
def test_any_name_can_be_drawn_and_printed(names):
    merit = figures_of_merit(np.array([0, 1, 1]), np.array([0, 1, 0]), 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        draw_confusion(merit, names).savefig(io.BytesIO(), format="svg")
    lines = merit_lines(merit, names)
    assert len(lines) == 4 and not any("\n" in line or len(line) > 100 for line in lines)
    "\n".join(lines).encode()


def test_short_names_stay_as_they_are():
    assert [short_name(name, 5) for name in ("cat", "horse", "donkey", "a\nb")] == ["cat", "horse", "donk…", "a b"]


def test_lines_begin_with_the_worst(answers):
    merit = figures_of_merit(*answers, 12)
    order = [int(line.split()[1]) for line in merit_lines(merit, [f"class {c}" for c in range(12)])[2:]]
    assert order[-1] == 11  # no figure at all
    assert merit.f1[order[:-1]].tolist() == sorted(merit.f1[:-1].tolist())


@pytest.mark.parametrize("labels, predicted, message", [
    ([], [], "There is no image to judge."),
    ([0, 3], [0, 1], "The class 3 is not between 0 and 2."),
    ([0, 1], [-1, 1], "The class -1 is not between 0 and 2."),
])
def test_what_cannot_be_counted(labels, predicted, message):
    with pytest.raises(UserError) as error:
        figures_of_merit(np.array(labels, dtype=int), np.array(predicted, dtype=int), 3)
    assert str(error.value) == message
