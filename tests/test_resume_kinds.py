"A run that is killed and taken up again ends like one that was not, to the bit, with each way to train it."
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import DatasetDict

from dinov3_nb.backbone import load_processor
from dinov3_nb.checkpoint import check_same_run, checkpoint_saver, find_start, is_complete
from dinov3_nb.core import make_settings
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.features import extract_features
from dinov3_nb.files import load_weights, read_checkpoint
from dinov3_nb.losses import choose_learning
from dinov3_nb.model import build_classifier
from dinov3_nb.optimizer import make_accelerator
from dinov3_nb.sources import load_digits_dataset
from dinov3_nb.training import begin_run, finish_run, fit, make_feature_loaders, make_loaders

GIVEN = dict(dataset="mine", model_name="tiny", freeze_backbone=False, epochs=2, batch_size=9, learning_rate=1e-3, eval_every_steps=4, num_workers=0,
             mixed_precision="no", no_tracking=True)  # 54 images: six steps an epoch, validations after 4, 6, 8, 10 and 12
ALL = dict(mixup=0.4, cutmix=1.0, label_smoothing=0.1, ema_decay=0.9, patience=4, class_weights="balanced", logit_adjustment=1.0, metric="macro_f1",
           augment="trivial")
KINDS = {
    "mixup": dict(mixup=0.4), "cutmix": dict(cutmix=1.0), "smoothing": dict(label_smoothing=0.1),
    "average": dict(ema_decay=0.9), "class weights": dict(class_weights="balanced"), "adjustment": dict(logit_adjustment=1.0),
    "trivial": dict(augment="trivial"), "all together": ALL,
    "all together, accumulated": dict(ALL, batch_size=3, gradient_accumulation_steps=3),
    "a frozen backbone": dict(ALL, freeze_backbone=True, dropout=0.1), "kept features": dict(
        label_smoothing=0.1, ema_decay=0.9, class_weights="balanced", freeze_backbone=True, dropout=0.1),
}


class Cut(Exception): pass


@pytest.fixture(scope="module")
def data():
    digits = load_digits_dataset()
    few = DatasetDict(train=digits["train"].select(range(54)), validation=digits["validation"].select(range(40)))
    return load_and_prepare_dataset(make_settings(**GIVEN).data, 42, few)


def loaders_of(settings, data, model, processor):
    training, fixed = settings.training, settings.data.augment == "none" and settings.model.freeze_backbone
    if not fixed: return make_loaders(data, processor, settings.data, training)
    features = {name: extract_features(model.backbone, data.rows(name), processor) for name in ("train", "validation")}
    return make_feature_loaders(data, features, "cls", training)


def stop(): raise Cut


def run(data, folder, stop_at=None, end=stop, log=lambda line: None, learning={}, **changes):
    "What `train` does, with whatever is in the folder; `end` is called after the checkpoint of step `stop_at`."
    settings = make_settings(**{**GIVEN, **changes}, checkpoint_dir=str(folder), resume=True)
    training, config = settings.training, settings.flat()
    start, known, processor = find_start(training, config), None, load_processor("tiny")
    torch.manual_seed(training.seed)
    model = build_classifier(settings.model, data.class_names)
    if start:
        known = check_same_run(start, data, model)
        load_weights(model, start["model_state_dict"])
    torch.manual_seed(len(folder.parts) if start else 1)  # whatever a new process begins with
    accelerator = make_accelerator(training)
    if start and is_complete(start): return finish_run(begin_run(model, training, start["total_steps"], accelerator, start))
    save = checkpoint_saver(folder, config, data, processor, known)

    def save_and_stop(state, is_best):
        save(state, is_best)
        if state.step == stop_at: end()
    how = replace(choose_learning(training, data.labels["train"], 10), **learning)
    return fit(model, *loaders_of(settings, data, model, processor), training, accelerator, start, save_and_stop, log=log, how=how)


def content(state):
    "All that a run ends with."
    curves = [{name: value for name, value in entry.items() if name != "images_per_second"} for entry in state.history]
    average = state.average.state_dict() if state.average else {"mean": {}, "weights": {}, "updates": 0}
    tensors = {**state.model.state_dict(), **{("mean", name): t for name, t in average["mean"].items()}, **{("last", name): t for name, t in average["weights"].items()}}
    for number, values in state.optimizer.state_dict()["state"].items(): tensors |= {(number, name): value for name, value in values.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, (curves, state.step, state.epoch, state.best_acc, average["updates"])


def assert_same(one, two):
    (tensors, plain), (others, other_plain) = content(one), content(two)
    assert plain == other_plain
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items(): assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("name", KINDS)
def test_cut_off_and_resumed(name, data, tmp_path):
    "In the middle of the second epoch."
    changes, learning = KINDS[name], dict(max_grad_norm=0.5) if "all" in name else {}
    whole = run(data, tmp_path / "whole", learning=learning, **changes)
    with pytest.raises(Cut): run(data, tmp_path / "cut", stop_at=8, learning=learning, **changes)
    assert_same(run(data, tmp_path / "cut", learning=learning, **changes), whole)
    best, last = ({name: read_checkpoint(tmp_path / folder / name) for name in ("best.pt", "last.pt")} for folder in ("whole", "cut"))
    for file in best:
        assert best[file]["step"] == last[file]["step"]
        assert all(torch.equal(tensor, last[file]["model_state_dict"][name]) for name, tensor in best[file]["model_state_dict"].items())
    assert_same(run(data, tmp_path / "cut", learning=learning, **changes), whole)  # complete: what it ended with


def test_each_kind_changes_the_run(data, tmp_path):
    "Otherwise the tests above would show nothing."
    names = "mixup", "cutmix", "smoothing", "average", "class weights", "adjustment", "trivial", "all together"
    kinds = {"plain": {}, **{name: KINDS[name] for name in names}}
    found = [run(data, tmp_path / name, **changes, epochs=1).model.head.weight.detach() for name, changes in kinds.items()]
    for i, one in enumerate(found):
        for two in found[:i]: assert not torch.equal(one, two), i


def test_a_run_that_lost_patience_is_complete(data, tmp_path):
    "At a rate of next to nothing the second validation brings nothing better; what was killed in between stops there too."
    given, lines = dict(learning_rate=1e-9, patience=2, ema_decay=0.9, freeze_backbone=True), []
    whole = run(data, tmp_path / "whole", log=lines.append, **given)
    assert (whole.step, len(whole.history), whole.total_steps) == (8, 3, 12)
    assert lines[-1].startswith("Stopped at step 8 of 12: no better accuracy than ") and lines[-1].endswith("at step 4 in 2 validations (--patience).")
    with pytest.raises(Cut): run(data, tmp_path / "cut", stop_at=6, **given)
    assert not is_complete(read_checkpoint(tmp_path / "cut" / "last.pt"))
    assert_same(run(data, tmp_path / "cut", **given), whole)
    assert is_complete(read_checkpoint(tmp_path / "cut" / "last.pt"))
    assert_same(run(data, tmp_path / "cut", **given), whole)
    with pytest.raises(Cut): run(data, tmp_path / "late", stop_at=8, **given)  # killed after the last one was saved
    assert is_complete(read_checkpoint(tmp_path / "late" / "last.pt"))


def test_a_run_that_is_scored_first_resumes_from_there(data, tmp_path):
    given = dict(learning=dict(score_first=True), ema_decay=0.9, freeze_backbone=True)
    whole = run(data, tmp_path / "whole", **given)
    assert [entry["step"] for entry in whole.history] == [0, 4, 6, 8, 12] and whole.history[0]["train_loss"] is None
    with pytest.raises(Cut): run(data, tmp_path / "cut", stop_at=0, **given)
    assert {name: read_checkpoint(tmp_path / "cut" / name)["step"] for name in ("best.pt", "last.pt")} == {"best.pt": 0, "last.pt": 0}
    assert_same(run(data, tmp_path / "cut", **given), whole)


def test_what_an_average_leaves_on_disk(data, tmp_path):
    "The average is what is used, the weights of the last step what the run goes on from; best.pt of a trained backbone has the average alone."
    state = run(data, tmp_path / "run", ema_decay=0.9)
    best, last = (read_checkpoint(tmp_path / "run" / f"{name}.pt") for name in ("best", "last"))
    own = dict(state.model.named_parameters())
    assert set(last["training_state_dict"]) == {name for name, p in own.items() if p.requires_grad} and last["average_updates"] == 12
    for name, tensor in last["training_state_dict"].items():
        assert torch.equal(last["model_state_dict"][name], own[name].detach())
    assert any(not torch.equal(tensor, own[name]) for name, tensor in last["training_state_dict"].items())
    assert best["training_state_dict"] is None and best["optimizer_state_dict"] == {}


def killed(data, folder, changes):
    torch.set_num_threads(1)
    run(data, folder, stop_at=8, end=lambda: os.kill(os.getpid(), signal.SIGKILL), **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_killed_by_the_system_and_resumed(data, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        process = multiprocessing.get_context("fork").Process(target=killed, args=(data, tmp_path / "cut", ALL))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert read_checkpoint(tmp_path / "cut" / "last.pt")["step"] == 8
        assert_same(run(data, tmp_path / "cut", **ALL), run(data, tmp_path / "whole", **ALL))
    finally: torch.set_num_threads(threads)


def test_a_setting_that_came_later_was_its_default(data, tmp_path):
    "A checkpoint of an earlier version goes on with the defaults, and with nothing else."
    from dinov3_nb.core import UserError
    from dinov3_nb.files import save_atomically
    given = dict(freeze_backbone=True)
    whole = run(data, tmp_path / "whole", **given)
    with pytest.raises(Cut): run(data, tmp_path / "cut", stop_at=8, **given)
    start = read_checkpoint(tmp_path / "cut" / "last.pt")
    new = {"mixup", "cutmix", "label_smoothing", "ema_decay", "class_weights", "logit_adjustment", "metric", "patience", "tune", "head_start"}
    start["config"] = {name: value for name, value in start["config"].items() if name not in new}
    for key in ("training_state_dict", "average_updates"): del start[key]
    for entry in start["history"]: del entry["macro_f1"], entry["balanced_accuracy"]
    save_atomically(start, tmp_path / "cut" / "last.pt")
    with pytest.raises(UserError, match="label_smoothing was 0.0, now 0.1"): run(data, tmp_path / "cut", label_smoothing=0.1, **given)
    assert torch.equal(run(data, tmp_path / "cut", **given).model.head.weight, whole.model.head.weight)
