"The head that a probe saves is a classifier like any other; and the line with which a run points to it."
import importlib
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import command, make_image_folder
from PIL import Image

from dinov3_nb import Settings, TrainArguments, UserError, evaluate, load_classifier, probe, train
from dinov3_nb.best_head import _find_scale, _probe_call, probe_sides, suggest_probe
from dinov3_nb.core import make_settings
from dinov3_nb.data import OWN_DATASET
from dinov3_nb.features import Features
from dinov3_nb.files import read_checkpoint, save_atomically
from dinov3_nb.probe import best_linear
from dinov3_nb.sources import load_digits_dataset

TINY = dict(dataset="digits", model_name="tiny", mixed_precision="no")
SOME = dict(train_split_ratio=0.2, val_split_ratio=0.5)
QUICK = dict(epochs=1, batch_size=64, no_tracking=True)
QUIET = dict(log=lambda line: None)


def in_memory(vectors, unread=None):
    "Features whose class tokens and means are both these vectors."
    rows = torch.arange(len(vectors))
    for row in unread or {}: rows[row] = -1
    return Features([torch.stack([vectors, vectors], dim=1)], rows, unread or {})


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("probed") / "mine", []
    return SimpleNamespace(folder=folder, results=probe(**TINY, checkpoint_dir=folder, log=lines.append), lines=lines)


@pytest.fixture
def ridge_alone(monkeypatch):
    "A probe of one method, where it does not matter which; the bank takes seconds."
    module = importlib.import_module("dinov3_nb.probe")  # `dinov3_nb.probe` is the function
    monkeypatch.setattr(module, "METHODS", [method for method in module.METHODS if method[0] == "ridge regression"])


def test_the_file_scores_what_the_table_says(mine):
    best = best_linear(mine.results)
    found = evaluate(mine.folder)
    assert found.scores.accuracy == best.accuracy and found.chosen.trained_on == 0 and found.scores.num_images == 360
    assert mine.lines[-1] == (f"Saved {best.method} on {best.pool} ({best.setting}) with accuracy: {best.accuracy:.2%}, "
                              f"{mine.folder / 'best.pt'}")
    assert sum(line.endswith("<- best") for line in mine.lines) >= 1 and mine.lines[-10].startswith("method")


def test_the_file_says_what_it_is(mine):
    kept, best = read_checkpoint(mine.folder), best_linear(mine.results)
    assert kept["probe"] == {"method": best.method, "setting": best.setting, "accuracy": best.accuracy} and kept["best_acc"] == best.accuracy
    config = kept["config"]
    assert (config["head"], config["pool"], config["freeze_backbone"], config["use_4bit"]) == ("linear", best.pool, True, False)
    assert (config["num_classes"], config["num_train_images"], config["mixed_precision"]) == (10, 1437, "no")
    assert not {"epochs", "learning_rate", "batch_size", "checkpoint_dir"} & set(config)
    assert [p.name for p in mine.folder.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("method", ["ridge regression", "logistic regression", "bank of 13 heads"])
@pytest.mark.parametrize("pool", ["cls", "cls_mean"])
def test_each_line_could_be_the_one(method, pool, mine, tmp_path, monkeypatch):
    "Saved as it stands in the table, each head scores its figure through the whole classifier."
    from dinov3_nb import best_head, run
    chosen, = (result for result in mine.results if (result.method, result.pool) == (method, pool))
    monkeypatch.setattr(run, "probe_features", lambda *given, **named: mine.results)
    monkeypatch.setattr(best_head, "best_linear", lambda results: chosen)
    probe(**TINY, checkpoint_dir=tmp_path / "mine", **QUIET)
    assert evaluate(tmp_path / "mine").scores.accuracy == chosen.accuracy
    sure = [p.labels[0][1] for p in load_classifier(tmp_path / "mine").predict(load_digits_dataset()["validation"])]
    assert sum(sure) / len(sure) > 0.9  # it knows 99 % of them, and says so


def test_an_exported_folder(mine, tmp_path):
    rows = load_digits_dataset()["validation"]
    classifier = load_classifier(mine.folder)
    classifier.save_pretrained(tmp_path / "exported")
    one, two = (c.predict(rows, top_k=1) for c in (classifier, load_classifier(tmp_path / "exported")))
    assert sum(a.labels[0][0] == b.labels[0][0] for a, b in zip(one, two)) >= 358  # the folder computes in its own precision


@pytest.mark.parametrize("settings", [dict(use_4bit=True), dict(image_size=64), dict(preprocess="fast"), dict(mixed_precision="bf16"), SOME],
                         ids=lambda settings: next(iter(settings)))
def test_settings_reach_the_classifier(settings, ridge_alone, tmp_path):
    given = TINY | SOME | settings
    results = probe(**given, checkpoint_dir=tmp_path / "mine", **QUIET)
    found, best = evaluate(tmp_path / "mine").scores, best_linear(results)
    assert found.accuracy == pytest.approx(best.accuracy, abs=1.5 / found.num_images)  # bfloat16 rounds by the batch


def test_what_belongs_to_training_is_passed_over(ridge_alone, tmp_path):
    "Parts that are shared with a run: another head, a trained backbone, a folder of the run's own."
    run = make_settings(**TINY, **SOME, head="mlp", freeze_backbone=False, dropout=0.5, gradient_checkpointing=True,
                        checkpoint_dir=str(tmp_path / "run"), overwrite=True)
    probe(run, **QUIET)
    assert not (tmp_path / "run").exists()
    results = probe(run, checkpoint_dir=tmp_path / "mine", **QUIET)
    kept = read_checkpoint(tmp_path / "mine")
    assert (kept["config"]["head"], kept["config"]["dropout"]) == ("linear", 0.0) and kept["backbone_fingerprint"]
    assert evaluate(tmp_path / "mine").scores.accuracy == best_linear(results).accuracy


def test_a_dataset_of_your_own(ridge_alone, tmp_path):
    digits = load_digits_dataset()
    results = probe(**TINY | {"dataset": digits}, **SOME, checkpoint_dir=tmp_path / "mine", **QUIET)
    with pytest.raises(UserError, match="give --dataset"): evaluate(tmp_path / "mine")
    assert evaluate(tmp_path / "mine", dataset=digits).scores.accuracy == best_linear(results).accuracy


def test_images_that_cannot_be_read(ridge_alone, tmp_path):
    "They stop the probe before anything is written, or are in no figure: not in the table's, not in that of evaluate."
    images = make_image_folder(tmp_path / "images")
    for place in ("train/circle/0.png", "val/square/1.png"): (images / place).write_bytes(b"broken")
    given = dict(dataset=images, model_name="tiny", mixed_precision="no", num_workers=0)
    with pytest.raises(UserError, match="0.png"): probe(**given, checkpoint_dir=tmp_path / "mine", **QUIET)
    assert not (tmp_path / "mine" / "best.pt").exists()
    results = probe(**given, on_bad_image="skip", checkpoint_dir=tmp_path / "mine", **QUIET)  # the empty folder is no obstacle
    found = evaluate(tmp_path / "mine", on_bad_image="skip")
    assert found.scores.num_images == 23 and len(found.scores.unread) == 1
    assert found.scores.accuracy == best_linear(results).accuracy
    with pytest.raises(UserError, match="1.png"): evaluate(tmp_path / "mine")


@pytest.mark.parametrize("method", ["ridge regression", "logistic regression"])
def test_two_classes(method, tmp_path, monkeypatch):
    "Where scikit-learn keeps one row of weights for two classes."
    module = importlib.import_module("dinov3_nb.probe")
    monkeypatch.setattr(module, "METHODS", [entry for entry in module.METHODS if entry[0] == method])
    images = make_image_folder(tmp_path / "images", classes=("circle", "square"))
    results = probe(dataset=images, model_name="tiny", mixed_precision="no", checkpoint_dir=tmp_path / "mine", **QUIET)
    assert evaluate(tmp_path / "mine").scores.accuracy == best_linear(results).accuracy


def test_a_folder_that_holds_something(mine, ridge_alone, tmp_path):
    before = (mine.folder / "best.pt").read_bytes()
    with pytest.raises(UserError, match="mine holds a checkpoint already: give --overwrite"): probe(**TINY, checkpoint_dir=mine.folder)
    for given in (dict(), dict(resume=True)):
        with pytest.raises(UserError, match="mine holds the best head of a probe, not a run to go on with: give --overwrite without --resume"):
            train(**TINY, **QUICK, checkpoint_dir=mine.folder, **given)
    assert (mine.folder / "best.pt").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: name a folder"): probe(**TINY, checkpoint_dir=tmp_path / "file")
    with pytest.raises(UserError, match="cannot be used"): probe(**TINY, **SOME, checkpoint_dir=tmp_path / "file" / "x", **QUIET)
    with pytest.raises(UserError, match="--overwrite does nothing without --checkpoint_dir"): probe(**TINY, overwrite=True)


def test_run_and_probe_replace_each_other(ridge_alone, tmp_path):
    folder, given = tmp_path / "run", TINY | SOME
    train(**given, **QUICK, checkpoint_dir=folder, **QUIET)
    with pytest.raises(UserError, match="holds a checkpoint already"): probe(**given, checkpoint_dir=folder, **QUIET)
    probe(**given, checkpoint_dir=folder, overwrite=True, **QUIET)
    assert [p.name for p in folder.iterdir()] == ["best.pt"] and "probe" in read_checkpoint(folder)
    probe(**given, checkpoint_dir=folder, overwrite=True, **QUIET)
    train(**given, **QUICK, checkpoint_dir=folder, overwrite=True, **QUIET)
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "last.pt"] and "probe" not in read_checkpoint(folder)


def test_without_a_folder_nothing_is_written(ridge_alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    assert len(probe(**TINY, **SOME, log=lines.append)) == 2
    probe(Settings(), TrainArguments(checkpoint_dir="run"), **TINY, **SOME, **QUIET)
    assert not any(tmp_path.iterdir()) and not any(line.startswith(("Saved", "method")) for line in lines)


def test_the_command(tmp_path):
    words = "probe", "--dataset", "digits", "--model_name", "tiny", "--train_split_ratio", "0.2"
    plain = command(*words, cwd=tmp_path)
    assert plain.returncode == 0 and plain.stdout.count("\nbank of 13 heads") == 2 and not (tmp_path / "checkpoints_dinov3").exists(), plain.stderr
    saved = command(*words, "--checkpoint_dir", "mine", cwd=tmp_path)
    assert saved.returncode == 0 and saved.stdout.count("\nbank of 13 heads") == 2, saved.stderr
    last = saved.stdout.splitlines()[-1]
    scored = command("evaluate", "--checkpoint", "mine", cwd=tmp_path)
    assert last.startswith("Saved ") and last.endswith("mine/best.pt") and f"top-1 {last.split(': ')[1].split(',')[0]}" in scored.stdout
    again = command(*words, "--checkpoint_dir", "mine", cwd=tmp_path)
    assert again.returncode == 2 and "mine holds a checkpoint already" in again.stderr
    resumed = command("train", *words[1:], "--checkpoint_dir", "mine", "--resume", cwd=tmp_path)
    assert resumed.returncode == 2 and "not a run to go on with" in resumed.stderr and len(resumed.stderr.splitlines()) == 1


def lines_of(**given):
    lines = []
    train(**TINY | {"no_tracking": True} | given, log=lines.append)
    return lines


def test_a_run_below_the_probe_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = lines_of(checkpoint_dir="run")[-1]
    assert told.startswith("Ridge regression on the same features reaches 99.")
    pasted = shlex.split(told.split(": ", 1)[1])
    assert pasted == "dinov3-nb probe --dataset digits --model_name tiny --mixed_precision no --checkpoint_dir run_probe".split()
    done = command(*pasted[1:], cwd=tmp_path)
    assert done.returncode == 0 and "Saved " in done.stdout.splitlines()[-1], done.stderr


def test_a_run_on_a_dataset_of_your_own_names_the_call(ridge_alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = load_digits_dataset()
    told = lines_of(dataset=digits, checkpoint_dir="run")[-1]
    call = "probe(dataset=..., model_name='tiny', mixed_precision='no', checkpoint_dir='run_probe')"
    assert told.endswith(call)
    assert len(eval(call.replace("...", "digits"), {"probe": probe, "digits": digits})) == 2


@pytest.mark.parametrize("given", [dict(learning_rate="auto"), dict(cache_features="never", epochs=1), dict(augment="crop_flip", epochs=1),
                                   dict(freeze_backbone=False, epochs=1, batch_size=256)], ids=lambda given: next(iter(given)))
def test_other_runs_end_as_before(given, tmp_path):
    "One that is as good as the probe, and those without kept features."
    lines = lines_of(checkpoint_dir=str(tmp_path / "run"), **given)
    if lines[-1].startswith("No validation was better than the first"): lines.pop()  # the tuned one begins with a probe's head
    assert lines[-1].startswith("Done: ")


def test_a_small_validation_set_says_nothing():
    "Three points of 30 images are chance; three of 3,000 are not."
    torch.manual_seed(0)
    labels = (torch.arange(600) % 2).numpy()
    def split(count):
        hidden = torch.as_tensor(labels[:count])
        vectors = torch.randn(count, 4) + 6 * torch.nn.functional.one_hot(hidden, 4)
        return in_memory(vectors)
    settings = make_settings(**TINY)
    for count, wanted in ((30, False), (600, True)):
        data = SimpleNamespace(labels={"train": labels[:600], "validation": labels[:count]}, class_names=["a", "b"])
        told = suggest_probe(settings, {"train": split(600), "validation": split(count)}, data, 0.97)
        assert bool(told) == wanted, (count, told)


@pytest.mark.parametrize("changes", [dict(dataset="it's here; rm -rf"), dict(on_bad_image="skip", val_split_ratio=0.5), dict(seed=7, revision="v1"),
                                     dict(use_4bit=True, use_nested_quant=True), dict(compile=True, preprocess="fast", cache_dir="a b"),
                                     dict(image_size=64, num_workers=0, image_column="photo")], ids=lambda changes: next(iter(changes)))
def test_the_command_repeats_what_decides_the_features(changes):
    "Read by the parser of `probe`, it gives the settings of the run, and no other."
    from dinov3_nb.cli import _GROUPS, _add_probe_flags
    from dinov3_nb.flags import make_parser, parse
    run = make_settings(**TINY | changes, epochs=9, pool="mean", checkpoint_dir="my run")
    words = shlex.split(_probe_call(run))
    parser = make_parser("probe", "", [group for group in _GROUPS if group[0] not in ("Model", "Training")])
    _add_probe_flags(parser)
    *parts, others = parse(parser, words[2:])
    given = vars(others)
    assert words[:2] == ["dinov3-nb", "probe"] and given.pop("checkpoint_dir") == "my run_probe" and given.pop("overwrite") is False
    wanted = replace(run, model=make_settings(**TINY, **{k: v for k, v in changes.items() if k in ("revision", "image_size")}).model, training=make_settings(
        mixed_precision="no", seed=run.training.seed).training)
    assert make_settings(*parts, **given) == wanted


def test_a_scale_changes_no_decision():
    torch.manual_seed(0)
    outputs, labels = torch.randn(5000, 7) * 0.1, torch.randint(7, (5000,))
    outputs[range(4000), labels[:4000]] += 0.5
    head = SimpleNamespace(weight=torch.eye(7), bias=torch.zeros(7))
    scale = _find_scale(head, outputs, labels)
    assert scale > 1 and torch.equal((scale * outputs).argmax(1), outputs.argmax(1))
    assert _find_scale(head, outputs * 100, labels) == 1.0  # too sure already: left as it was fitted


def test_sides_leave_out_what_was_not_read():
    vectors = torch.arange(12.0).reshape(4, 3)
    features = {"train": in_memory(vectors, {0: "x", 2: "y"}), "validation": in_memory(vectors)}
    data = SimpleNamespace(labels={"train": torch.arange(4).numpy(), "validation": torch.arange(4).numpy()})
    train_side, labels, validation, truth = probe_sides(features, data)
    assert labels.tolist() == [1, 3] and truth.tolist() == [0, 1, 2, 3]
    assert torch.equal(train_side["cls"], vectors[[1, 3]]) and validation["cls_mean"].shape == (4, 6)


def test_a_part_of_many_images_has_all_classes_in_their_shares():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    vectors = torch.nn.functional.one_hot(labels, 3).float()
    features = {"train": in_memory(vectors, {5: "x"}), "validation": in_memory(vectors)}
    data = SimpleNamespace(labels={"train": labels.numpy(), "validation": labels.numpy()})
    train_side, part, _, truth = probe_sides(features, data, ("cls",), most=100)
    assert part.bincount().tolist() == [60, 30, 10] and len(truth) == 1000
    assert torch.equal(train_side["cls"].argmax(1), part)


def test_resuming_with_another_number_of_processes(tmp_path):
    folder, given = tmp_path / "run", dict(**TINY, **SOME, **QUICK, checkpoint_dir=str(tmp_path / "run"))
    train(**given, **QUIET)
    kept = read_checkpoint(folder / "last.pt")
    assert kept["config"]["num_processes"] == 1
    for then, many in ((2, "2 processes"), (16, "16 processes")):
        save_atomically(kept | {"config": kept["config"] | {"num_processes": then}}, folder / "last.pt")
        with pytest.raises(UserError, match=f"--resume would continue another run: it was started with {many}, now 1. "):
            train(**given, resume=True, **QUIET)
    old = {name: value for name, value in kept["config"].items() if name != "num_processes"}
    save_atomically(kept | {"config": old}, folder / "last.pt")  # of an earlier version
    assert train(**given, resume=True, **QUIET).step == kept["step"]


def test_a_resumed_run_hashes_images_and_weights_once(tmp_path, monkeypatch):
    from dinov3_nb import checkpoint
    given = dict(**TINY, **SOME, **QUICK | {"epochs": 2}, eval_every_steps=1, checkpoint_dir=str(tmp_path / "run"))
    def pull_the_plug(line):
        if "step 3" in line: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(**given, log=pull_the_plug)
    counts = {"_labels_digest": 0, "image_ids": 0, "backbone_fingerprint": 0}
    for name in counts:
        def counted(*given, name=name, call=getattr(checkpoint, name)): counts[name] += 1; return call(*given)
        monkeypatch.setattr(checkpoint, name, counted)
    train(**given, resume=True, **QUIET)
    assert counts == {"_labels_digest": 1, "image_ids": 2, "backbone_fingerprint": 1}  # training and validation images


@pytest.mark.parametrize("is_main", [True, False])
def test_one_process_finds_the_rate_and_tells_the_others(is_main, monkeypatch):
    from dinov3_nb import run
    told, lines = [], []
    def broadcast(objects):
        told.extend(objects)
        return objects if is_main else [(0.01, ["the other's line"])]
    monkeypatch.setattr(run, "broadcast_object_list", broadcast)
    monkeypatch.setattr(run, "find_learning_rate", lambda *given: (given[-2] / 10, ["our line"]))
    data = SimpleNamespace(labels={"train": torch.arange(4).numpy() % 2}, class_names=["a", "b"])
    accelerator = SimpleNamespace(is_main_process=is_main, num_processes=2, device="cpu")
    rate = run._find_rate(make_settings(**TINY), in_memory(torch.eye(4)), data, accelerator, lines.append)
    assert (rate, lines, told) == ((0.2, ["our line"], [(0.2, ["our line"])]) if is_main else (0.01, ["the other's line"], [None]))


def test_a_probe_of_images_that_nobody_can_read(tmp_path):
    for i in range(10):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "ab"[i % 2] / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="No train image could be read, so there is nothing to probe"):
        probe(dataset=tmp_path / "data", model_name="tiny", on_bad_image="skip", cache_dir=tmp_path / "kept", log=lambda line: None)
