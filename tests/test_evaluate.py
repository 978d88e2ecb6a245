"Which images `evaluate` scores: never fewer than there are, and never what was trained on without a word."
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

import dinov3_nb
from dinov3_nb import DataArguments, UserError, load_classifier, train
from dinov3_nb.cli import main
from dinov3_nb.data import load_labelled_splits
from dinov3_nb.evaluation import _match_labels, choose_rows
from dinov3_nb.images import image_ids

COUNTS = {"train": 10, "val": 4, "test": 30}


def save_picture(path, seed, kind):
    pixels = np.full((24, 32, 3), (200, 30, 30) if kind == "a" else (30, 60, 200)) + np.random.default_rng(seed).normal(0, 20, (24, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def run_on(folder, checkpoint_dir):
    train(dataset=folder, model_name="tiny", epochs=2, learning_rate=0.02, mixed_precision="no", no_tracking=True,
          checkpoint_dir=checkpoint_dir, log=lambda line: None)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    "A dataset of three splits and a run on it."
    root, seed = tmp_path_factory.mktemp("three"), 0
    for split, count in COUNTS.items():
        for kind in "ab":
            for i in range(count): seed += 1; save_picture(root / "data" / split / kind / f"{i:02}.png", seed, kind)
    run_on(root / "data", root / "run")
    return root


@pytest.fixture
def cut(tmp_path):
    "A dataset without splits, and a run that cut its validation images from it."
    for seed in range(40): save_picture(tmp_path / "data" / "ab"[seed % 2] / f"{seed:02}.png", 1000 + seed, "ab"[seed % 2])
    run_on(tmp_path / "data", tmp_path / "run")
    return tmp_path


def evaluate(capsys, checkpoint, *flags):
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--json", *map(str, flags)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_folder_kept_apart_is_scored_whole(three, tmp_path, capsys):
    test = three / "data" / "test"
    shutil.copytree(test, tmp_path / "only_test" / "test")
    shutil.copytree(test / "a", tmp_path / "one_class" / "a")
    for kind in "ab": save_picture(tmp_path / "one_each" / kind / "0.png", 5000, kind)
    for folder, count in ((test, 60), (tmp_path / "only_test", 60), (tmp_path / "one_class", 30), (tmp_path / "one_each", 2)):
        found = evaluate(capsys, three / "run", "--dataset", folder)
        assert (found["images"], found["trained_on"], found["skipped"]) == (count, 0, []), folder
    assert evaluate(capsys, three / "run", "--dataset", tmp_path / "one_class")["recall"]["b"] is None


def test_the_runs_own_dataset_by_any_name(three, capsys, monkeypatch):
    monkeypatch.chdir(three / "data" / "val")
    for flags in ((), ("--dataset", three / "data"), ("--dataset", ".."), ("--split", "val"), ("--split", "VAL")):
        found = evaluate(capsys, three / "run", *flags)
        assert (found["splits"], found["trained_on"]) == ({"val": 8}, 0), flags
    assert evaluate(capsys, three / "run", "--split", "test")["splits"] == {"test": 60}
    learned = evaluate(capsys, three / "run", "--split", "train")
    assert learned["trained_on"] == learned["images"] == 20 and "20 of the 20 images scored were trained on" in learned["notes"][-1]


def test_a_copy_elsewhere_is_scored_whole_and_says_what_was_trained_on(three, tmp_path, capsys):
    shutil.copytree(three / "data", tmp_path / "copy")
    for file in sorted((tmp_path / "copy").rglob("*.png")): file.rename(file.with_name(f"renamed_{file.name}"))
    found = evaluate(capsys, three / "run", "--dataset", tmp_path / "copy")
    assert found["splits"] == {"train": 20, "val": 8, "test": 60} and found["trained_on"] == 20


def test_a_split_that_does_not_exist(three, capsys):
    assert main(["evaluate", "--checkpoint", str(three / "run"), "--split", "holdout"]) == 2
    said = capsys.readouterr().err
    assert "'holdout' is not there" in said and all(name in said for name in COUNTS), said


def test_a_share_is_drawn_only_if_asked_for(three, capsys):
    found = evaluate(capsys, three / "run", "--split", "test", "--val_split_ratio", "0.5")
    assert found["images"] == 30 and main(["evaluate", "--checkpoint", str(three / "run"), "--val_split_ratio", "0"]) == 2


def own_rows(folder):
    "What would be scored without --split, as identities, and the notes."
    classifier = load_classifier(folder / "run", "cpu")
    splits = load_labelled_splits(DataArguments(str(folder / "data")), [])
    chosen = choose_rows(classifier, splits, True)
    ids = [image_ids(splits[name].rows(rows)) for name, rows in chosen.rows.items()]
    return sorted(np.concatenate(ids).tolist()), chosen, sorted(classifier.held_out["images"].tolist())


def test_images_added_removed_and_renamed_since(cut, capsys):
    scored, chosen, held_out = own_rows(cut)
    assert scored == held_out and len(scored) == 4 and chosen.trained_on == 0
    for kind in "ab": save_picture(cut / "data" / kind / "00_before_all.png", 2000, kind)
    scored, chosen, _ = own_rows(cut)
    assert scored == held_out and chosen.trained_on == 0
    for file in sorted((cut / "data").rglob("*.png"))[::2]: file.rename(file.with_name(f"x{file.name}"))
    assert own_rows(cut)[0] == held_out
    splits = load_labelled_splits(DataArguments(str(cut / "data")), [])
    rows = own_rows(cut)[1].rows["train"]
    paths = [splits["train"].rows(rows)[i]["image"]["path"] for i in range(4)]
    os.remove(paths[0])
    scored, chosen, _ = own_rows(cut)
    assert len(scored) == 3 and set(scored) < set(held_out) and any("1 of the run's 4 validation images" in note for note in chosen.notes)
    for path in paths[1:]: os.remove(path)
    with pytest.raises(UserError, match="None of the run's 4 validation images"): own_rows(cut)


def test_copies_of_one_picture_count_as_often_as_the_run_held_them_out(three, tmp_path):
    classifier = load_classifier(three / "run", "cpu")
    splits = load_labelled_splits(DataArguments(str(three / "data")), [])
    twice = Dataset.from_dict({"image": [r for r in splits["val"].images["image"][:] for _ in (0, 1)]}, Features(image=ImageFeature(decode=False)))
    splits["val"] = replace(splits["val"], images=twice, labels=np.repeat(splits["val"].labels, 2))
    assert len(choose_rows(classifier, splits, True)) == 8
    leaked = replace(classifier, trained_on=torch.cat([classifier.trained_on, classifier.held_out["images"][:3]]))
    assert choose_rows(leaked, splits, True).trained_on == 3


def test_what_says_nothing_about_its_run_is_scored_whole_with_a_note(three, tmp_path, capsys):
    load_classifier(three / "run", "cpu").save_pretrained(tmp_path / "exported")
    found = evaluate(capsys, tmp_path / "exported", "--dataset", three / "data")
    assert found["images"] == 88 and found["trained_on"] is None and any("does not say which images" in note for note in found["notes"])
    assert main(["evaluate", "--checkpoint", str(tmp_path / "exported")]) == 2
    assert "give --dataset" in capsys.readouterr().err
    old = torch.load(three / "run" / "best.pt", weights_only=True)
    torch.save({key: old[key] for key in ("model_state_dict", "config", "class_names")}, tmp_path / "old.pt")
    assert evaluate(capsys, tmp_path / "old.pt")["splits"] == {"train": 20, "val": 8, "test": 60}


def test_images_without_a_label_are_left_out(three):
    features = Features(image=ImageFeature(), label=ClassLabel(names=["b", "a"]))
    files = sorted((three / "data" / "test").rglob("*.png"))[:4]
    dataset = Dataset.from_dict({"image": [str(f) for f in files], "label": [1, None, 1, -1]}, features)
    splits = load_labelled_splits(DataArguments(), [], dataset)
    assert [len(rows) for rows in choose_rows(load_classifier(three / "run", "cpu"), splits, False).rows.values()] == [2]


def test_classes_are_matched_by_name_and_only_those_that_occur():
    assert _match_labels(["a", "b"], ["c", "b", "a"], np.array([1, 2, 2])).tolist() == [1, 0, 0]
    assert _match_labels(["cafe\u0301"], ["caf\u00e9"], np.array([0])).tolist() == [0]  # one letter, or two
    with pytest.raises(UserError, match="does not know the class 'c'"): _match_labels(["a", "b"], ["c", "b"], np.array([0, 1]))


def test_in_python_as_at_the_command_line(three, capsys):
    "A path as text or as `Path`, a checkpoint or a classifier: the same images and figures."
    run, data = three / "run", three / "data"
    typed = evaluate(capsys, run, "--split", "test")
    for checkpoint in (run, str(run), load_classifier(run, "cpu")):
        for dataset in (None, data, str(data)):
            found = dinov3_nb.evaluate(checkpoint, dataset=dataset, split="test")
            assert (found.scores.accuracy, found.notes) == (typed["top1"], typed["notes"]), (checkpoint, dataset)
    for name, nearest in (("datset", "dataset"), ("spilt", "split"), ("modelname", "model_name"), ("on_bad_images", "on_bad_image")):
        with pytest.raises(UserError, match=f"'{name}' is not a setting of evaluate: did you mean '{nearest}'"):
            dinov3_nb.evaluate(run, **{name: "x"})
    with pytest.raises(UserError, match="'epochs' is not a setting of evaluate"): dinov3_nb.evaluate(run, epochs=2)
    with pytest.raises(UserError, match="a datasets.Dataset is needed"): dinov3_nb.evaluate(run, dataset=7)


def test_a_dataset_of_your_own(three, tmp_path):
    "It has no name to compare; after a run on such an object, the images that it held out are looked for."
    own = load_dataset("imagefolder", data_dir=str(three / "data"))
    run_on(own, tmp_path / "run")
    held_out = dinov3_nb.evaluate(tmp_path / "run", dataset=own)
    assert held_out.chosen.trained_on == 0 and "own validation images" in held_out.notes[-2]
    other = dinov3_nb.evaluate(tmp_path / "run", dataset=own["test"])
    assert other.scores.num_images == 60 and other.chosen.trained_on == 0 and "own validation images" not in str(other.notes)
    assert dinov3_nb.evaluate(tmp_path / "run", dataset=own, split="train").chosen.trained_on == 20
    with pytest.raises(UserError, match="give --dataset"): dinov3_nb.evaluate(tmp_path / "run")
    named = dinov3_nb.evaluate(three / "run", dataset=DatasetDict(mine=own["train"]))  # a run on a folder knows it by its images
    assert named.scores.num_images == named.chosen.trained_on == 20
