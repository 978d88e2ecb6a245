"Neighbours, mistakes and doubtful labels: odd sets, a table that can be read again, and cleanlab where it is installed."
import csv

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_nb.core import DataArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.neighbours import (
    Doubtful, Neighbours, doubtful_labels, draw_mistakes, draw_queries, file_paths, find_mistakes, find_neighbours,
    leave_one_out, mistaken_rows, vote_shares, write_doubtful)

CPU = torch.device("cpu")


def clusters(counts, width=16, noise=0.1, seed=0):
    "Features around one direction for each class, and their labels."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centres = torch.randn(len(counts), width, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), width, generator=generator), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neighbours_equal_a_plain_sort(dtype):
    x = torch.randn(700, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    asked = torch.tensor([699, 0, 13, 512])
    found = leave_one_out(x, 9, asked=asked)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    table = unit @ unit.T
    table.fill_diagonal_(-2)
    values, rows = table[asked].sort(dim=1, descending=True)
    assert torch.equal(found.rows, rows[:, :9]) and torch.equal(found.asked, asked)
    assert torch.allclose(found.similarities.double(), values[:, :9], atol=1e-6)
    across = find_neighbours(x[:600], x[600:], 9)
    values, rows = (unit[600:] @ unit[:600].T).sort(dim=1, descending=True)
    assert torch.equal(across.rows, rows[:, :9])


def test_own_row_is_left_out_among_many_copies():
    x = torch.ones(300, 8)  # each row's own may be anywhere among them, or not at all
    found = leave_one_out(x, 5)
    assert found.rows.shape == (300, 5) and not (found.rows == torch.arange(300)[:, None]).any()
    assert all(len(set(row)) == 5 for row in found.rows.tolist())


def test_more_neighbours_than_images():
    x = torch.randn(4, 8)
    assert leave_one_out(x, 50).rows.shape == (4, 3)
    assert find_neighbours(x, x[:2], 50).rows.shape == (2, 4)


def test_drawn_queries():
    assert torch.equal(draw_queries(50, 10, CPU), torch.arange(50))
    drawn = draw_queries(10**6, 10**4, CPU, seed=3)
    assert 0 < len(drawn) < 10**6 and len(drawn.unique()) == len(drawn) and (drawn.diff() > 0).all()
    assert torch.equal(drawn, draw_queries(10**6, 10**4, CPU, seed=3))
    assert not torch.equal(drawn, draw_queries(10**6, 10**4, CPU, seed=4))


def test_votes_by_hand():
    near, classes = torch.tensor([[0.5, 0.43, 0.36]]), torch.tensor([[2, 0, 0]])
    e = np.e
    assert np.allclose(vote_shares(near, classes, 3)[0], np.array([1 / e + 1 / e**2, 0, 1]) / (1 + 1 / e + 1 / e**2), atol=1e-5)
    assert np.allclose(vote_shares(near, classes, 3, torch.tensor([1]))[0], [0, 0, 1])


def test_mistakes_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    labels, train_labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1])
    neighbours = Neighbours(torch.tensor([[0.9, 0.5, 0.4]] * 4), torch.tensor([[0, 1, 2]] * 4), torch.arange(4))
    worst, other = find_mistakes(logits, labels, neighbours, train_labels, shown=2)
    assert (worst.row, worst.true, worst.said, worst.neighbours, worst.classes) == (2, 1, 0, [0, 1], [0, 1])
    assert worst.loss == pytest.approx(np.log(1 + np.exp(3))) and worst.sure == pytest.approx(1 / (1 + np.exp(-3)))
    assert not worst.knew and other.row == 1 and other.knew  # the near one is of class 0
    assert mistaken_rows(logits, labels).tolist() == [2, 1]


def test_only_those_asked_about():
    logits, labels = torch.zeros(3, 2), torch.tensor([1, 1, 1])
    neighbours = Neighbours(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.tensor([2]))
    assert [m.row for m in find_mistakes(logits, labels, neighbours, labels)] == [2]


def test_figure_of_hostile_names():
    logits, labels = torch.tensor([[0.0, 1.0]] * 3), torch.tensor([0, 0, 0])
    neighbours = Neighbours(torch.ones(3, 2), torch.zeros(3, 2).long(), torch.arange(3))
    mistakes = find_mistakes(logits, labels, neighbours, labels)
    picture = Image.new("RGB", (8, 8))
    figure = draw_mistakes(mistakes, lambda row: picture, lambda row: picture, ["$\\frac{", "<script>" * 40], most=2)
    figure.canvas.draw()
    assert len(figure.axes) == 2 * 3 and "$\\frac{" in figure.axes[0].get_title()
    assert len(figure.axes[0].get_title()) < 60


def test_a_rare_class_and_a_class_of_one():
    x, y = clusters([400, 12, 1])
    found = doubtful_labels(leave_one_out(x), y, 3)
    assert (found.scores[400:412] > 0.99).all() and (found.suggested[:412] == y[:412]).all()
    assert found.rows[0] == 412 and found.scores[412] == 0  # nobody agrees


def test_wrong_labels_come_first_and_unasked_ones_are_known(monkeypatch):
    monkeypatch.setattr("dinov3_nb.neighbours._find_cleanlab", lambda: None)
    x, y = clusters([60, 60, 60])
    y[[5, 70, 130]] = torch.tensor([1, 2, 0])
    everything = doubtful_labels(leave_one_out(x), y, 3)
    assert set(everything.rows[:3].tolist()) == {5, 70, 130} and everything.suggested[[5, 70, 130]].tolist() == [0, 1, 2]
    asked = torch.tensor([70, 100, 5])
    part = doubtful_labels(leave_one_out(x, asked=asked), y, 3)
    assert sorted(part.rows.tolist()) == [5, 70, 100] and part.rows[2] == 100
    assert part.scores.isnan().sum() == 177 and (part.suggested == -1).sum() == 177
    assert part.issues.nonzero().flatten().tolist() == [5, 70]
    assert everything.method == "votes of the 50 nearest other images"
    assert part.method == "votes of the 50 nearest other images; 3 of 180 labels were asked about"


def test_cleanlab_filters():
    pytest.importorskip("cleanlab.filter")
    x, y = clusters([60, 60, 60])
    y[[5, 70, 130]] = torch.tensor([1, 2, 0])
    found = doubtful_labels(leave_one_out(x), y, 4)  # a class without images
    assert found.issues.nonzero().flatten().tolist() == [5, 70, 130] and "cleanlab" in found.method


def saved_digits(folder, count=60):
    "Pictures as files, with a table of them."
    rows = load_and_prepare_dataset(DataArguments(dataset="digits")).rows("train")
    (folder / "à b").mkdir()
    for i in range(count): (folder / "à b" / f"{i}, {i}.png").write_bytes(rows[i]["image"]["bytes"])
    with open(folder / "all.csv", "w", newline="", encoding="utf-8") as file:
        names = ["cat", 'the "dog", a $ <b>']
        csv.writer(file).writerows([["path", "label"], *([f"à b/{i}, {i}.png", names[i % 2]] for i in range(count))])
    return folder / "all.csv"


def test_table_can_be_fed_back(tmp_path):
    data = load_and_prepare_dataset(DataArguments(dataset=str(saved_digits(tmp_path))))
    paths = file_paths(data.rows("train")) + file_paths(data.rows("validation"))
    labels = torch.from_numpy(np.concatenate([data.labels["train"], data.labels["validation"]]))
    splits = ["train"] * len(data.train) + ["validation"] * len(data.validation)
    suggested, scores = labels.clone(), torch.linspace(0.5, 1, 60)
    suggested[7], scores[7], suggested[9], scores[9] = 1 - labels[7], 0.125, -1, torch.nan
    rows = torch.tensor([7, *(i for i in range(60) if i not in (7, 9))])
    said = write_doubtful(tmp_path / "labels.csv", Doubtful(scores, suggested, suggested != labels, rows, ""),
                          labels, data.class_names, paths, splits)
    assert said == (f"{tmp_path}/labels.csv: 60 labels, the most doubtful first; correct the column 'label' and pass it "
                    f"to --dataset.")
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8-sig") as file: lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["path", "split", "label", "suggested", "doubt"] and len(lines) == 60
    assert lines[0] == {"path": paths[7], "split": "train", "label": data.class_names[labels[7]],
                        "suggested": data.class_names[1 - labels[7]], "doubt": "0.875"}
    assert lines[-1]["path"] == paths[9] and lines[-1]["doubt"] == lines[-1]["suggested"] == lines[1]["suggested"] == ""
    again = load_and_prepare_dataset(DataArguments(dataset=str(tmp_path / "labels.csv")))
    assert again.class_names == data.class_names and len(again.train) + len(again.validation) == 60
    before = dict(zip(paths, labels.tolist()))
    for name in ("train", "validation"):
        assert [before[path] for path in file_paths(again.rows(name))] == again.labels[name].tolist()


def test_table_of_pictures_that_are_no_files(tmp_path):
    data = load_and_prepare_dataset(DataArguments(dataset="digits"))
    assert set(file_paths(data.rows("validation"))) == {None}
    labels = torch.tensor([0, 1, 1])
    doubtful = Doubtful(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 1, 0]), labels == 2, torch.tensor([2, 1, 0]), "")
    said = write_doubtful(tmp_path / "labels.csv", doubtful, labels, ["a", "b"], [None, "x.png", None],
                          ["train", "train", "validation"])
    assert said.endswith("it names rows and cannot be passed to --dataset, because the pictures are not files of their own.")
    lines = (tmp_path / "labels.csv").read_text("utf-8-sig").splitlines()
    assert lines == ["row,split,label,suggested,doubt", "0,validation,b,a,1.000", "1,train,b,,0.500", "0,train,a,,0.000"]


def test_paths_of_files_and_of_embedded_ones(tmp_path):
    from dinov3_nb.images import ImageRows
    images = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "/b.png"}]
    split = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image(decode=False)}))
    assert file_paths(ImageRows(split)) == [None, "/b.png"]
    assert file_paths(ImageRows(split.select([1, 0, 1]))) == ["/b.png", None, "/b.png"]
