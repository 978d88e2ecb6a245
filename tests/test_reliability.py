"Reliability: the figures of slow plain versions and of the libraries for them, and nothing breaks where there is nothing to say."
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov3_nb.reliability import (
    conformal_threshold, coverage_curve, describe_sets, draw_coverage, draw_reliability, expected_calibration_error, fit_temperature,
    measure_reliability, prediction_sets, summarize_sets,
)


def draw(images, classes, temperature=1.0, seed=0, scale=2.0):
    "Logits, and labels drawn from them at a temperature: the one to be found."
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------- bins

@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
@pytest.mark.parametrize("images,classes,scale", [(1, 3, 1), (500, 2, 1), (500, 10, 3), (300, 7, 100), (50, 1, 1)])
def test_the_error_is_that_of_torchmetrics(bins, images, classes, scale):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = draw(images, classes, seed=bins, scale=scale)  # at 100 many are exactly 1
    for chances in (logits.softmax(1), logits.double().softmax(1)):
        theirs = metrics.multiclass_calibration_error(chances, labels, max(classes, 2), bins, "l1", validate_args=False).item()
        assert expected_calibration_error(chances, labels, bins) == pytest.approx(theirs, abs=1e-6)
        assert expected_calibration_error(chances.numpy(), labels.numpy(), bins) == expected_calibration_error(chances, labels, bins)


def test_ties_and_edges_are_those_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    chances = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.6, 0.4], [0.8, 0.2]])
    for bins in (2, 5, 10, 15):
        theirs = metrics.multiclass_calibration_error(chances, torch.tensor([0, 1, 0, 0, 1, 0]), 2, bins, "l1").item()
        assert expected_calibration_error(chances, [0, 1, 0, 0, 1, 0], bins) == pytest.approx(theirs, abs=1e-6)
    half, whole = torch.tensor([[0.5, 0.5], [0.75, 0.25]]), torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    assert expected_calibration_error(half, [0, 1], 2) == pytest.approx(abs(1 - 1.25) / 2)       # 0.5 begins the upper bin
    assert expected_calibration_error(whole, [1, 0], 2) == pytest.approx(1 / 2 + 0.1 / 2)  # exactly 1 stands alone


def test_each_image_is_in_one_bin():
    logits, labels = draw(400, 5, scale=30)
    chances = logits.softmax(1)
    sure, said = chances.max(1)
    found = measure_reliability(chances, labels, 10)
    for i in range(10):
        inside = (sure >= i / 10) & ((sure < (i + 1) / 10) | (i == 9))
        assert found.counts[i] == inside.sum()
        if not inside.any(): assert np.isnan(found.accuracy[i]) and np.isnan(found.confidence[i]); continue
        assert found.accuracy[i] == pytest.approx((said == labels)[inside].float().mean().item())
        assert found.confidence[i] == pytest.approx(sure[inside].mean().item())
    order = torch.randperm(400)
    again = measure_reliability(chances[order], labels[order], 10)
    assert again.error == pytest.approx(found.error) and np.array_equal(again.counts, found.counts)


def test_a_classifier_that_keeps_its_word_is_hardly_off():
    logits, labels = draw(20_000, 4)
    assert expected_calibration_error(logits.softmax(1), labels) < 0.015
    assert expected_calibration_error((3 * logits).softmax(1), labels) > 0.15


# ---------------------------------------------------------------- temperature

@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5, 4.0])
def test_a_temperature_that_is_there_is_found_and_kept(temperature):
    found = fit_temperature(*draw(4_000, 5, temperature, seed=3))
    assert found.kept and found.value == found.fitted == pytest.approx(temperature, rel=0.1)
    assert found.gain > found.error > 0


def test_one_that_is_not_there_is_hardly_ever_kept():
    found = [fit_temperature(*draw(180, 5, 1.0, seed)) for seed in range(30)]
    assert sum(t.kept for t in found) <= 2 and all(t.value == (t.fitted if t.kept else 1) for t in found)


def test_the_fit_is_the_lowest_of_a_fine_grid():
    logits, labels = draw(300, 4, 2.5)
    grid = np.exp(np.linspace(math.log(0.1), math.log(50), 2_000))
    losses = [F.cross_entropy(logits.double() / t, labels).item() for t in grid]
    assert fit_temperature(logits, labels).fitted == pytest.approx(grid[np.argmin(losses)], rel=0.01)


def test_scale_and_shift_of_logits():
    logits, labels = draw(500, 4, 2.0)
    plain, scaled = fit_temperature(logits, labels), fit_temperature(3 * logits, labels)
    assert scaled.fitted == pytest.approx(3 * plain.fitted, rel=0.005)
    assert fit_temperature(logits + torch.randn(500, 1), labels).fitted == pytest.approx(plain.fitted, rel=0.005)


def test_the_gain_is_that_of_images_left_out():
    logits, labels = (part.numpy() for part in draw(23, 3, 3.0, seed=5))
    found, gains = fit_temperature(logits, labels, folds=4, seed=1), np.zeros(23)
    from sklearn.model_selection import KFold
    for rest, held in KFold(4, shuffle=True, random_state=1).split(labels):
        t = fit_temperature(logits[rest], labels[rest]).fitted
        def cost(s): return F.cross_entropy(torch.tensor(logits[held]).double() / s, torch.tensor(labels[held]), reduction="none").numpy()
        gains[held] = cost(1.0) - cost(t)
    assert found.gain == pytest.approx(gains.mean()) and found.error == pytest.approx(1.96 * gains.std(ddof=1) / 23**0.5)
    assert fit_temperature(logits, labels, seed=1) == fit_temperature(logits, labels, seed=1) != fit_temperature(logits, labels, seed=2)


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_a_perfect_classifier_keeps_its_logits(scale):
    logits = scale * torch.randn(200, 5)
    found = fit_temperature(logits, logits.argmax(1))
    assert not found.kept and found.value == 1.0 and found.fitted == 0.05 and math.isfinite(found.gain)


def test_one_mistake_among_the_sure_is_no_temperature():
    logits = 20 * F.one_hot(torch.arange(100) % 4).double()
    labels = torch.arange(100) % 4
    labels[17] = 3
    found = fit_temperature(logits, labels)
    assert found.fitted > 1 and math.isfinite(found.error) and not found.kept


def test_a_classifier_that_knows_nothing_is_told_to_be_unsure():
    logits, labels = 30 * torch.randn(500, 4), torch.randint(4, (500,))
    found = fit_temperature(logits, labels)
    assert found.kept and (logits / found.value).softmax(1).max() < 0.9


def test_nothing_to_fit():
    for images in (0, 1):
        found = fit_temperature(torch.randn(images, 3), torch.zeros(images, dtype=torch.int64))
        assert (found.value, found.kept, found.error) == (1.0, False, math.inf)
    for images in range(2, 8): assert math.isfinite(fit_temperature(*draw(images, 3)).value)
    assert fit_temperature(torch.randn(30, 1), torch.zeros(30)).value == 1.0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_images_without_finite_logits_are_left_out(bad):
    logits, labels = draw(100, 4, 3.0)
    broken, rest = logits.clone(), torch.arange(100) != 7
    broken[7, 2] = bad
    assert fit_temperature(broken, labels) == fit_temperature(logits[rest], labels[rest])
    assert fit_temperature(torch.full((9, 3), bad), torch.zeros(9)).value == 1.0


# ---------------------------------------------------------------- coverage

def test_coverage_equals_a_slow_one_in_any_order():
    chances = torch.tensor(np.random.default_rng(0).integers(1, 6, (60, 3)) / 6).softmax(1)  # few values, many ties
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(1))
    sure, said = chances.max(1)
    sure = sure.float()
    expected = [((sure >= s).float().mean().item(), (said == labels)[sure >= s].float().mean().item()) for s in sure.unique().flip(0)]
    for order in (torch.arange(60), torch.randperm(60)):
        found = coverage_curve(chances[order], labels[order])
        assert np.allclose(np.stack(found, 1), expected, atol=1e-6)
    assert found[0][-1] == 1.0


def test_coverage_of_nothing_and_of_one():
    assert [len(part) for part in coverage_curve(np.zeros((0, 3)), np.zeros(0))] == [0, 0]
    assert [part.tolist() for part in coverage_curve(np.array([[0.2, 0.8]]), np.array([1]))] == [[1.0], [1.0]]


# ---------------------------------------------------------------- sets

def test_the_threshold_by_hand():
    chances = torch.tensor([[p, 1 - p] for p in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)], dtype=torch.float64)
    labels = torch.zeros(9, dtype=torch.int64)
    assert conformal_threshold(chances, labels) == pytest.approx(0.55)             # 9 of 9 + 1
    assert conformal_threshold(chances, labels, 0.8) == pytest.approx(0.6)
    assert conformal_threshold(chances, labels, 0.7) == pytest.approx(0.65)
    assert conformal_threshold(chances, labels, 0.91) == conformal_threshold(chances[:8], labels[:8]) == 0.0
    many = torch.arange(1, 100).double()[:, None] / 100                            # and 0.55 * 100 is more than 55
    assert conformal_threshold(many, torch.zeros(99), 0.55) == pytest.approx(0.45)
    assert prediction_sets(chances, 0.55).tolist() == [[True, False]] * 9          # a tie with the threshold is in
    assert prediction_sets(chances, 0.45)[-1].tolist() == [True, True]


def test_the_promise_is_kept_on_average():
    kept = []
    for seed in range(300):
        logits, labels = draw(139, 5, seed=seed)
        chances = logits.softmax(1)
        sets = prediction_sets(chances[39:], conformal_threshold(chances[:39], labels[:39]))
        kept.append(sets[torch.arange(100), labels[39:]].float().mean().item())
    assert 0.895 < np.mean(kept) < 0.93  # between 0.9 and 0.9 + 1 / 40, and chance


@pytest.mark.parametrize("images,classes", [(11, 3), (50, 4), (99, 10), (200, 3), (1000, 7)])
@pytest.mark.parametrize("level", [0.9, 0.8])
def test_the_sets_are_those_of_mapie(images, classes, level):
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        "A classifier whose features are its probabilities."
        classes_, fitted_ = np.arange(classes), True
        def fit(self, x, y): return self
        def predict_proba(self, x): return x
        def predict(self, x): return x.argmax(1)
        def __sklearn_is_fitted__(self): return True

    logits, labels = draw(images, classes, seed=images)
    labels[:classes] = torch.arange(classes)  # it wants to see each
    chances, asked = logits.double().softmax(1).numpy(), draw(200, classes, seed=1)[0].double().softmax(1).numpy()
    theirs = mapie.SplitConformalClassifier(Given(), level, "lac", prefit=True).conformalize(chances, labels.numpy())
    expected = theirs.predict_set(asked)[1][:, :, 0]
    found = prediction_sets(asked, conformal_threshold(chances, labels, level))
    assert np.array_equal(found.numpy(), expected) and 0 < expected.mean() < 1


def test_a_summary_counts_each_image_once_with_a_threshold_that_has_not_seen_it():
    logits, labels = draw(57, 4, seed=2)
    chances, found = logits.softmax(1).double(), summarize_sets(logits.softmax(1), labels, 0.8, folds=5, seed=3)
    from sklearn.model_selection import KFold
    sets = torch.zeros(57, 4, dtype=torch.bool)
    for rest, held in KFold(5, shuffle=True, random_state=3).split(labels): sets[held] = prediction_sets(chances[held], conformal_threshold(chances[rest], labels[rest], 0.8))
    assert found.covered == sets[torch.arange(57), labels].sum() and found.total == 57 == sum(found.sizes)
    assert found.size == pytest.approx(sets.sum(1).float().mean().item()) and found.sizes == [(sets.sum(1) == n).sum() for n in range(5)]
    assert found.interval[0] < found.coverage == found.covered / 57 < found.interval[1]
    assert found.threshold == conformal_threshold(chances, labels, 0.8) and f"{found.coverage:.1%} of 57 images" in describe_sets(found)


def test_sets_of_nothing_and_of_nan():
    for images in (0, 1):
        found = summarize_sets(np.zeros((images, 3)), np.zeros(images, dtype=int))
        assert found.total == 0 and found.sizes == [0] * 4 and "too few images" in describe_sets(found)
    chances = draw(50, 3)[0].softmax(1)
    chances[4] = torch.nan
    labels = chances.nan_to_num().argmax(1)
    assert 0 < conformal_threshold(chances, labels) <= 1 and prediction_sets(chances, 0.9)[4].all()
    assert summarize_sets(chances, labels).total == 50


# ---------------------------------------------------------------- figures

def svg(figure):
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)  # as on the report's page
    return file.getvalue()


def test_figures_are_transparent_black_and_small():
    logits, labels = draw(50_000, 4)
    before, after = (measure_reliability((s * logits).softmax(1), labels) for s in (3, 1))
    for figure in (draw_reliability(before, after, 3.0), draw_reliability(before), draw_coverage(*coverage_curve(logits.softmax(1), labels))):
        text = svg(figure)
        assert len(text) < (80_000 if len(figure.axes) > 1 else 50_000) and "#ffffff" not in text and "gray" not in text


def test_figures_of_next_to_nothing():
    none = measure_reliability(torch.zeros(0, 3), torch.zeros(0))
    one = measure_reliability(torch.ones(1, 1), torch.zeros(1))
    for figure in (draw_reliability(none), draw_reliability(one, none), draw_coverage(np.zeros(0), np.zeros(0)), draw_coverage(np.ones(1), np.ones(1))): assert "<svg" in svg(figure)
    assert draw_reliability(none).axes[0].get_title() == "as it is: no images"
