"Duplicates: the search equals a plain comparison, odd pictures, samples, and how a threshold is chosen."
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_nb import duplicates
from dinov3_nb.duplicates import (
    CHANGES, Pair, Side, change_slightly, draw_threshold, find_duplicates, group_rows, look_alike, make_side,
    measure_threshold)
from dinov3_nb.images import ImageRows


def picture(row, side=40):
    pixels = np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def a_side(features, name=lambda row: row):
    return Side(features, lambda row: picture(name(row)), lambda row: str(name(row)).encode())


def copies_of(count, width=200, seed=0):
    "Random features, of which the last ten are near the first ten."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    x[-10:] = x[:10] + 0.05 * torch.randn(10, width, generator=generator)
    return x


@pytest.mark.parametrize("tile, block", [(2**14, 2**9), (64, 32)])
def test_candidates_equal_a_plain_comparison(tile, block, monkeypatch):
    monkeypatch.setattr(duplicates, "_TILE", tile)
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    x, held = copies_of(300).half(), copies_of(300)[-110:]
    asked, found = duplicates._find_candidates(a_side(x), None, 0.2, None)
    unit, other = (torch.nn.functional.normalize(f.float(), dim=1) for f in (x, held))
    before = (unit @ unit.T).tril(-1)
    plain = {i: [j for j in before[i].argsort(descending=True)[:5].tolist() if before[i, j] >= 0.2] for i in range(300)}
    assert asked == 300 and {i: [j for _, j in v] for i, v in found.items()} == {i: v for i, v in plain.items() if v}
    _, found = duplicates._find_candidates(a_side(held), a_side(x), 0.2, None)
    across = other @ unit.T
    plain = {i: [j for j in across[i].argsort(descending=True)[:5].tolist() if across[i, j] >= 0.2] for i in range(110)}
    assert {i: [j for _, j in v] for i, v in found.items()} == {i: v for i, v in plain.items() if v}


def test_a_sample_meets_each_of_its_pairs_once(monkeypatch):
    x, asked = copies_of(300), torch.tensor([0, 4, 250, 299])  # 9 is the copy of 299, 290 that of 0, 294 that of 4
    monkeypatch.setattr(duplicates, "draw_queries", lambda *_: asked)
    found = find_duplicates(a_side(x, lambda row: row - 290 if row >= 290 else row), 0.9)
    assert sorted((p.first, p.second) for p in found.pairs) == [(9, 299), (290, 0), (294, 4)]
    assert (found.asked, found.images, found.candidates) == (4, 300, 3)


def test_pictures_decide():
    x = copies_of(50)
    assert find_duplicates(a_side(x), 0.9).pairs == []  # near in features, other pictures
    found = find_duplicates(a_side(x, lambda row: row - 40 if row >= 45 else row), 0.9)
    assert sorted((p.first, p.second) for p in found.pairs) == [(row - 40, row) for row in range(45, 50)]
    assert found.candidates == 10


def test_exact_needs_equal_bytes():
    x = torch.eye(4)[[0, 1, 0, 1]]
    side = Side(x, lambda row: picture(row % 2), lambda row: b"same" if row in (0, 2) else b"%d" % row)
    assert find_duplicates(side, 0.9).pairs == [Pair(0, 2, 1.0, True), Pair(1, 3, 1.0, False)]


def test_looks_of_an_earlier_search_are_no_part_of_the_next():
    x = copies_of(50)
    train, held = a_side(x), a_side(x[:10])
    for row in range(50): duplicates._small(train, row)
    found = find_duplicates(Side(x[:10], held.open, lambda row: b"other"), 0.9, among=train, most_looks=20)
    assert found.unseen == 0 and len(found.pairs) == 10 and not any(p.exact for p in found.pairs)


def test_plain_pictures():
    white, grey, paper = (np.full(3072, v, np.uint8) for v in (255, 100, 252))
    assert look_alike(white, white) and look_alike(white, paper) and not look_alike(white, grey)
    photo = np.asarray(picture(1, 32)).reshape(-1)
    assert not look_alike(white, photo) and look_alike(photo, (photo * 0.9).astype(np.uint8))
    red, blue = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)
    red[8:24, 8:24, 0], blue[8:24, 8:24, 2] = 255, 255
    assert not look_alike(red.reshape(-1), blue.reshape(-1))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (640, 3), (300, 200)])
def test_changes_keep_the_size(size):
    image = picture(0).resize(size)
    for number in range(len(CHANGES)):
        changed = change_slightly(image, number)
        assert changed.size == size and changed.mode == "RGB"
        if min(size) >= 200 and number < 3: assert look_alike(*map(duplicates._shrink, (image, changed))), number


def test_threshold_where_copies_stand_apart():
    x = copies_of(400)
    sample = np.arange(100, 200)
    changed = x[sample] + 0.1 * torch.randn(100, 200, generator=torch.Generator().manual_seed(1))
    found = measure_threshold(a_side(x), sample, changed)
    assert found.found == 0.99 and found.also_above == 0 and found.others.max() < 0.5 < 0.98 < found.value
    assert len(draw_threshold(found).axes[0].patches) == 2 * 49


def test_threshold_where_most_images_are_copies_already():
    x = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    x = x.repeat(10, 1)  # each picture ten times: its neighbours look the same and say nothing
    found = measure_threshold(a_side(x, lambda row: row % 20), np.arange(50), x[:50])
    assert len(found.others) == 0 and found.value == pytest.approx(0.999) and found.also_above == 0
    pairs = find_duplicates(a_side(x, lambda row: row % 20), found.value).pairs
    assert sorted(map(len, group_rows(pairs))) == [10] * 20 and len(pairs) == 180
    draw_threshold(found)


def test_threshold_never_lets_half_the_set_through():
    x = torch.ones(100, 8) + 0.2 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    found = measure_threshold(a_side(x), np.arange(100), torch.randn(100, 8))
    assert found.also_above <= 0.06 and found.found < 0.2


def test_content_of_files_and_of_embedded_pictures(tmp_path):
    file = io.BytesIO()
    picture(3).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    images = [{"bytes": file.getvalue(), "path": "b.png"}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    split = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image(decode=False)}))
    side = make_side(torch.ones(2, 4), ImageRows(split))
    assert find_duplicates(side, 0.9).pairs == [Pair(0, 1, 1.0, True)]
