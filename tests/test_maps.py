"Maps: each image has a place, whatever the features; samples keep what they must; colours and names say what they can."
import importlib.machinery
import io
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from dinov3_nb import maps
from dinov3_nb.core import UserError
from dinov3_nb.maps import class_colours, draw_map, lay_out


@pytest.fixture(scope="module")
def blobs():
    "Features of 150 images in five classes."
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 5
    return 3 * torch.randn(5, 32, generator=generator)[labels] + torch.randn(150, 32, generator=generator), labels


def check(layout, num_points):
    assert layout.positions.shape == (num_points, 2) and np.isfinite(layout.positions).all()
    assert num_points == 0 or 0 <= layout.positions.min() and layout.positions.max() <= 1
    assert (np.diff(layout.rows) > 0).all() and len(layout.rows) == num_points


@pytest.mark.parametrize("num_images, method", [
    (0, "all in one place"), (1, "all in one place"), (2, "principal components"), (3, "principal components"),
    (4, "principal components"), (5, "t-SNE"), (6, "t-SNE"), (60, "t-SNE"),
])
def test_any_number_of_images(blobs, num_images, method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout = lay_out(blobs[0][:num_images])
    check(layout, num_images)
    assert layout.method == method


@pytest.mark.parametrize("width", [1, 2, 3, 51, 4096])
def test_any_width(width):
    features = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(lay_out(features), 40)


@pytest.mark.parametrize("features", [
    torch.ones(30, 8), torch.zeros(30, 8), torch.ones(30, 1), torch.ones(3, 8), torch.arange(1, 31)[:, None] * torch.ones(8),
], ids=["ones", "zeros", "one number", "three images", "one direction"])
def test_images_that_are_all_alike(features):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout = lay_out(features)
    assert layout.method == "all in one place" and (layout.positions == 0.5).all()


def test_doubles_have_places_too(blobs):
    features = blobs[0][:2].repeat(40, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(lay_out(features), 80)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, "array"])
def test_any_precision(blobs, kind):
    features = blobs[0].numpy() if kind == "array" else blobs[0].to(kind)
    check(lay_out(features), 150)


def test_the_length_of_a_feature_does_not_count(blobs):
    longer = blobs[0] * 4.0 ** (torch.arange(150) % 3)[:, None]  # exact
    assert (lay_out(longer).positions == lay_out(blobs[0]).positions).all()


def test_a_seed_draws_the_same_map_with_any_number_of_threads(blobs):
    first = lay_out(blobs[0], most=100)
    with threadpool_limits(4): again = lay_out(blobs[0], most=100)
    assert (first.rows == again.rows).all() and (first.positions == again.positions).all()
    assert (lay_out(blobs[0], most=100, seed=1).rows != first.rows).any()


def test_one_thread_at_a_time(blobs, monkeypatch):
    "Several wait for each other, and for minutes where the machine has other things to do."
    used = []
    class Counting(maps.TSNE):
        def fit_transform(self, values):
            used.extend(pool["num_threads"] for pool in threadpool_info())
            return super().fit_transform(values)
    monkeypatch.setattr(maps, "TSNE", Counting)
    with threadpool_limits(2): lay_out(blobs[0])
    assert set(used) == {1}


def test_a_map_keeps_classes_together(blobs):
    features, labels = blobs
    places = torch.from_numpy(lay_out(features).positions)
    near = torch.cdist(places, places).topk(6, largest=False).indices[:, 1:]
    assert (labels[near] == labels[:, None]).float().mean() > 0.99


@pytest.mark.parametrize("always", [[], [149], torch.tensor([3, 1, 2]), np.array([7, 7, 8]), range(100, 120)])
def test_a_sample_has_what_it_must(blobs, always):
    layout = lay_out(blobs[0], most=20, always=always)
    check(layout, 20)
    assert set(map(int, always)) <= set(layout.rows.tolist())
    assert layout.method == "t-SNE, a sample of 20 of 150 images"


def test_of_too_many_that_must_be_there_the_first_are(blobs):
    assert lay_out(blobs[0], most=20, always=range(149, 0, -1)).rows.tolist() == list(range(130, 150))


def test_no_sample_where_all_fit(blobs):
    layout = lay_out(blobs[0], most=150, always=[5])
    assert layout.rows.tolist() == list(range(150)) and layout.method == "t-SNE"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_features_that_are_no_numbers(blobs, value):
    broken = blobs[0].clone()
    broken[[4, 9, 9], [1, 2, 3]] = value
    with pytest.raises(UserError) as error: lay_out(broken)
    assert str(error.value) == "The features of 2 of 150 images are not all finite: try --mixed_precision no."


class FakeUMAP:
    def __init__(self, **settings): self.settings = settings

    def fit_transform(self, values):
        assert self.settings["n_neighbors"] < len(values) and values.shape[1] <= 50
        return values[:, :2] * self.settings["random_state"]


def test_umap_is_used_where_it_is_installed(blobs, monkeypatch):
    module = types.ModuleType("umap")
    module.UMAP, module.__spec__ = FakeUMAP, importlib.machinery.ModuleSpec("umap", None)
    monkeypatch.setitem(sys.modules, "umap", module)
    for num_images in (5, 16, 150):
        layout = lay_out(blobs[0][:num_images])
        check(layout, num_images)
        assert layout.method == "UMAP"
    assert lay_out(blobs[0], most=20).method == "UMAP, a sample of 20 of 150 images"
    assert lay_out(blobs[0][:4]).method == "principal components"


def test_colours_are_shared_from_the_twenty_first_on():
    colours = class_colours(1000)
    assert len(colours) == 1000 and len(set(colours)) == len(set(colours[:20])) == 20
    assert colours[20:40] == colours[:20]
    assert class_colours(7) == colours[:7]  # a class has its colour, however many there are


@pytest.mark.parametrize("num_classes, names, title", [(5, 6, ""), (20, 21, ""), (21, 1, "21 classes\nshare 20 colours")])
def test_a_legend_where_it_says_something(blobs, num_classes, names, title):
    layout = lay_out(blobs[0], most=100)
    figure = draw_map(layout, blobs[1], torch.zeros(150).bool(), [f"class {c}" for c in range(num_classes)])
    legend = figure.legends[0]
    assert len(legend.get_texts()) == names and legend.get_title().get_text() == title
    assert figure.axes[0].get_title() == layout.method
    figure.savefig(io.BytesIO(), format="svg")


def test_rings_are_around_what_is_wrong(blobs):
    wrong = torch.arange(150) % 7 == 0
    layout = lay_out(blobs[0], most=100)
    rings = draw_map(layout, blobs[1], wrong, list("abcde")).axes[0].collections[1]
    assert (np.asarray(rings.get_offsets()) == layout.positions[wrong.numpy()[layout.rows]]).all()


@pytest.mark.parametrize("names", [["$a_$", "$\\frac$", "_hidden", "", "x" * 300], ["<script>", "\"'&", "a\nb\x00", "\u05d0\u202e", "\ud800"]])
def test_any_name_can_be_drawn(blobs, names):
    layout = lay_out(blobs[0][:4])
    figure = draw_map(layout, torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, False, True]), names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(io.BytesIO(), format="svg")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(shown) == 6 and not any("\n" in text or len(text) > 24 for text in shown)
