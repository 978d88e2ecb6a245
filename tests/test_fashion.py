"The clothes that ship with the package: whole, apart, named as published, and made again by their script."
import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import ENVIRONMENT
from PIL import Image

import dinov3_nb
from dinov3_nb import sources
from dinov3_nb.core import DataArguments, UserError
from dinov3_nb.data import dataset_in_full, load_and_prepare_dataset
from dinov3_nb.sources import load_fashion_dataset, read_dataset

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(dinov3_nb.__file__).parent / "fashion"
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def test_every_class_has_its_images_and_its_published_name():
    fashion = load_fashion_dataset()
    for name, each in (("train", 200), ("validation", 100)):
        assert fashion[name].features["label"].names == NAMES
        assert np.bincount(fashion[name]["label"]).tolist() == 10 * [each]


def test_images_are_8_bit_grey_and_in_one_split_only():
    fashion = load_fashion_dataset()
    kept = {name: [row["image"] for row in fashion[name]] for name in fashion}
    assert {(image.mode, image.size) for images in kept.values() for image in images} == {("L", (28, 28))}
    train = {image.tobytes() for image in kept["train"]}
    assert len(train) == 2000
    assert not any(image.tobytes() in train for image in kept["validation"])


def test_classes_look_like_their_names():
    "Trousers are narrow, and boots have their pixels at the bottom right more than at the top left."
    fashion = load_fashion_dataset()["train"]
    pixels, labels = np.stack([np.asarray(row["image"]) for row in fashion]) / 255, np.array(fashion["label"])
    width = {name: (pixels[labels == k].mean(axis=(0, 1)) > 0.1).sum() for k, name in enumerate(NAMES)}
    assert min(width, key=width.get) == "Trouser"
    boots = pixels[labels == NAMES.index("Ankle boot")].mean(axis=0)
    assert boots[14:, 14:].mean() > 1.5 * boots[:14, :14].mean()


def test_it_ships_small_and_with_its_licence():
    files = sorted(FOLDER.glob("*"))
    assert [file.name for file in files] == ["train.parquet", "validation.parquet"]
    assert sum(file.stat().st_size for file in files) <= 1.6e6
    assert '"fashion/*"' in (ROOT / "setup.py").read_text()
    notice = (ROOT / "NOTICE").read_text()
    assert all(words in notice for words in ("dinov3_nb/fashion/", "Zalando SE", "1708.07747", "permission notice"))


def test_a_folder_of_that_name_does_not_take_its_place(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "fashion" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "fashion" / name / "0.png")
    monkeypatch.chdir(tmp_path)
    assert {name: len(rows) for name, rows in read_dataset(DataArguments(dataset="fashion"), []).items()} == {"train": 2000, "validation": 1000}
    assert len(read_dataset(DataArguments(dataset="./fashion"), [])["train"]) == 2
    assert dataset_in_full("fashion") == "fashion" and dataset_in_full("./fashion") == str(tmp_path / "fashion")


def test_prepared_whole_whatever_the_seed():
    found = [load_and_prepare_dataset(DataArguments(dataset="fashion"), seed) for seed in (0, 1)]
    assert found[0].class_names == NAMES
    for name, count in (("train", 2000), ("validation", 1000)):
        assert len(found[0].rows(name)) == count
        assert np.array_equal(found[0].labels[name], found[1].labels[name])


@pytest.mark.parametrize("state", ["is damaged, or was changed", "is missing"])
def test_a_damaged_file_is_an_error(tmp_path, monkeypatch, state):
    shutil.copytree(FOLDER, tmp_path / "fashion")
    file = tmp_path / "fashion" / "validation.parquet"
    if state == "is missing": file.unlink()
    else: file.write_bytes(file.read_bytes().replace(b"Sneaker", b"Sandals"))
    monkeypatch.setattr(sources, "_FASHION_FOLDER", tmp_path / "fashion")
    with pytest.raises(UserError, match=f"validation.parquet {state}: install the package again"): load_fashion_dataset()


def test_names_that_lead_nowhere_name_the_sets_that_ship(tmp_path):
    for wrong in (str(tmp_path / "none.csv"), "./nowhere"):
        with pytest.raises(UserError, match="'digits' or 'fashion'"): read_dataset(DataArguments(dataset=wrong), [])
    with pytest.raises(UserError, match="'digits' or 'fashion'"): DataArguments(dataset="")
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="is a file, but not a csv"): read_dataset(DataArguments(dataset=str(tmp_path / "a.txt")), [])


def write_idx(path, values):
    "Bytes as an idx file."
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


def test_the_script_draws_the_same_number_of_each_class_and_keeps_the_pixels(tmp_path):
    generator = np.random.default_rng(0)
    written = {}
    for start, each in (("train", 230), ("t10k", 110)):
        labels = generator.permutation(np.repeat(np.arange(10), each))
        images = generator.integers(0, 256, (len(labels), 4, 4), dtype=np.uint8)
        images[:, 0, 0] = labels
        written[start] = {image.tobytes(): row for row, image in enumerate(images)}
        write_idx(tmp_path / f"{start}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{start}-labels-idx1-ubyte.gz", labels)
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_fashion.py", tmp_path, "--target", tmp_path / "made"],
                          capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    for split, start, each in (("train", "train", 200), ("validation", "t10k", 100)):
        made = datasets.Dataset(sources.pq.read_table(tmp_path / "made" / f"{split}.parquet"))
        assert np.bincount(made["label"]).tolist() == 10 * [each]
        rows = [written[start][row["image"].tobytes()] for row in made]
        assert rows == sorted(set(rows))
        assert [np.asarray(row["image"])[0, 0] for row in made] == made["label"][:]


def test_the_script_refuses_what_is_no_idx_file(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"no idx"))
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_fashion.py", tmp_path, "--target", tmp_path / "made"],
                          capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode and "is no idx file of bytes" in done.stderr


def test_a_slash_in_a_class_name_travels_through_everything(tmp_path):
    "A head, its checkpoint, an exported folder, answers and scores all name the class as it was published."
    from dinov3_nb import evaluate, load_classifier, probe
    given = dict(dataset="fashion", model_name="tiny", mixed_precision="no", train_split_ratio=0.05, val_split_ratio=0.05)
    probe(**given, checkpoint_dir=tmp_path / "mine", cache_dir=str(tmp_path / "cache"), log=lambda line: None)
    shirts = [row["image"] for row in load_fashion_dataset()["train"] if row["label"] == 0][:40]
    classifier = load_classifier(tmp_path / "mine")
    classifier.save_pretrained(tmp_path / "exported")
    exported = load_classifier(tmp_path / "exported")
    assert classifier.class_names == exported.class_names == NAMES
    for found in (classifier, exported): assert "T-shirt/top" in {answer.labels[0][0] for answer in found.predict(shirts)}
    found = evaluate(tmp_path / "mine", dataset="fashion", split="validation")
    assert found.class_names[0] == "T-shirt/top" and found.scores.recall[0] > 0.2
