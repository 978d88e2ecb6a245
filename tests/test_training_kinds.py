"Faults of the loop, each as a kind: steps that a gradient scaler skips, intervals between validations, jobs that are started again."
import copy
import itertools
import math
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_image_folder
from PIL import Image
from transformers.modeling_outputs import ImageClassifierOutput

from dinov3_nb import DataArguments, ModelArguments, TrainArguments, UserError, train, training
from dinov3_nb.cli import main
from dinov3_nb.core import FeatureArguments
from dinov3_nb.features import Features, _WholeBatch, feature_loader
from dinov3_nb.images import EpochSampler
from dinov3_nb.losses import Learning, make_mix
from dinov3_nb.optimizer import make_accelerator
from dinov3_nb.training import TrainingState, _restore, fit

IMAGES = 64


class Head(torch.nn.Module):
    "One linear layer on features, with large gradients."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 3)

    def forward(self, features, labels=None):
        logits = self.layer(features)
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def loaders(batch_size=8):
    values = torch.randn(IMAGES, 8, generator=torch.Generator().manual_seed(0)) * 100
    features, labels = Features([torch.stack([values, values], 1)], torch.arange(IMAGES)), torch.arange(IMAGES) % 3
    return (feature_loader(features, labels, "cls", batch_size, EpochSampler(IMAGES, 0)), feature_loader(features, labels, "cls", 32))


def arguments(**changes):
    return TrainArguments(**{**dict(epochs=2, eval_every_steps=1, learning_rate=1e-2, mixed_precision="no"), **changes})


def scaled_accelerator(given, scale):
    "An accelerator as fp16 on a GPU has it: with a gradient scaler, here on the CPU."
    accelerator = make_accelerator(given)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


OVERFLOWS = 2.0 ** 127  # times a gradient of tens: more than float32 can hold


@pytest.mark.parametrize("fused", [True, False])
def test_no_schedule_step_where_the_gradient_scaler_skips(fused, monkeypatch):
    "accelerate's own sign of a skipped step is silent where the optimizer is fused."
    monkeypatch.setattr(training, "make_optimizer", lambda model, given: torch.optim.AdamW(model.parameters(), lr=given.learning_rate, fused=fused))
    given, weights, schedule = arguments(), [Head().layer.weight], []

    def save(state, is_best):
        weights.append(state.model.layer.weight.detach().clone())
        schedule.append(state.scheduler.last_epoch)
    accelerator = scaled_accelerator(given, OVERFLOWS)
    state = fit(Head(), *loaders(), given, accelerator, save=save, log=lambda line: None)
    moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert 0 < moved.count(False) == math.log2(OVERFLOWS / accelerator.scaler.get_scale()) < 16
    assert schedule == list(itertools.accumulate(map(int, moved)))
    assert state.step == state.total_steps == 16 and len(state.history) == 16


def test_a_step_that_accelerate_calls_skipped(monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer
    answers = iter([True, False] * 8)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: next(answers)))
    given = arguments()
    state = fit(Head(), *loaders(), given, make_accelerator(given), log=lambda line: None)
    assert (state.step, state.scheduler.last_epoch) == (16, 8)


def test_a_checkpoint_holds_the_gradient_scaler():
    from dinov3_nb.checkpoint import _make_checkpoint
    from dinov3_nb.model import build_classifier
    model, given = build_classifier(ModelArguments(model_name="tiny"), ["a", "b"]), arguments()
    state = training.begin_run(model, given, 10, scaled_accelerator(given, 8.0))
    assert _make_checkpoint(state, {})["scaler_state_dict"]["scale"] == 8.0


class Cut(Exception): pass


@pytest.mark.parametrize("stop_at", [2, 11])  # among the skipped steps, and after them
def test_a_run_with_skipped_steps_resumes_to_the_bit(stop_at):
    def run(accelerator, start=None, save=None):
        model = Head()
        if start: model.load_state_dict(start["model_state_dict"])
        return fit(model, *loaders(), arguments(), accelerator, start, save, log=lambda line: None)

    kept = {}

    def save(state, is_best):
        if state.step != stop_at: return
        kept.update(copy.deepcopy(dict(
            model_state_dict=state.model.state_dict(), optimizer_state_dict=state.optimizer.state_dict(),
            scheduler_state_dict=state.scheduler.state_dict(), scaler_state_dict=state.scaler.state_dict(),
            step=state.step, epoch=state.epoch, best_acc=state.best_acc, history=state.history)))
        raise Cut
    whole = run(scaled_accelerator(arguments(), OVERFLOWS))
    with pytest.raises(Cut): run(scaled_accelerator(arguments(), OVERFLOWS), save=save)
    resumed = run(scaled_accelerator(arguments(), 2.0 ** 16), kept)  # as a new process builds it
    assert torch.equal(whole.model.layer.weight, resumed.model.layer.weight)
    assert whole.scaler.state_dict() == resumed.scaler.state_dict()
    assert whole.scheduler.state_dict() == resumed.scheduler.state_dict()
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert all(a[name] == b[name] for name in a if name != "images_per_second")


def test_the_gradient_scaler_is_restored():
    class Parts:
        def __init__(self): self.loaded = None
        def load_state_dict(self, state): self.loaded = state
    state = TrainingState(Head(), Parts(), Parts(), scaler=Parts())
    start = dict(optimizer_state_dict={"o": 1}, scheduler_state_dict={"s": 2}, scaler_state_dict={"scale": 3.0},
                 step=5, epoch=1, best_acc=0.5, history=[])
    _restore(state, start)
    assert (state.optimizer.loaded, state.scheduler.loaded, state.scaler.loaded) == ({"o": 1}, {"s": 2}, {"scale": 3.0})
    without = TrainingState(Head(), Parts(), Parts())  # bf16 goes on without one
    _restore(without, start)
    assert without.step == 5


@pytest.mark.parametrize("changes, steps", [
    ({"eval_every_steps": "epoch"}, [8, 16, 24]),
    ({"eval_every_steps": "epoch", "gradient_accumulation_steps": 3}, [3, 6, 9]),
    ({"eval_every_steps": 5}, [5, 8, 10, 15, 16, 20, 24]),
])
def test_when_a_run_validates(changes, steps):
    given = arguments(epochs=3, **changes)
    assert [h["step"] for h in fit(Head(), *loaders(), given, log=lambda line: None).history] == steps


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "epochs", "100", None])
def test_bad_intervals_get_a_sentence(value):
    with pytest.raises(UserError, match="--eval_every_steps .* is not known: give a whole number"): TrainArguments(eval_every_steps=value)


@pytest.mark.parametrize("typed", ["0", "-3", "2.5", "epochs", "Epoch", ""])
def test_bad_intervals_on_the_command_line_get_a_sentence(typed, capsys):
    assert main(["train", "--dataset", "digits", "--model_name", "tiny", "--eval_every_steps", typed]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dinov3-nb: ") and said.count("\n") == 1 and "epoch" in said and "whole number" in said


def lines_of(monkeypatch, seconds_per_validation, **changes):
    "The log of a run by a clock on which a step takes a second."
    now = [0.0]
    step, collect = training.train_step, training.collect_logits

    def slow(function, seconds):
        def call(*given): now[0] += seconds; return function(*given)
        return call
    monkeypatch.setattr(training, "train_step", slow(step, 1.0))
    monkeypatch.setattr(training, "collect_logits", slow(collect, seconds_per_validation))
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    lines = []
    fit(Head(), *loaders(), arguments(**changes), log=lines.append)
    return [line for line in lines if "--eval_every_steps" in line]


def test_validations_that_cost_more_than_training_are_named_once(monkeypatch):
    said = lines_of(monkeypatch, 9.0, eval_every_steps=2)
    assert said == ["Validation took 9.0 s so far, training 2.0 s: for less of it, give an --eval_every_steps above 2, or --eval_every_steps epoch."]


@pytest.mark.parametrize("seconds, interval", [(1.5, 2), (9.0, "epoch"), (9.0, 8), (9.0, 100)])
def test_no_advice_where_it_would_not_help(seconds, interval, monkeypatch):
    assert lines_of(monkeypatch, seconds, eval_every_steps=interval) == []


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "A job script: the same command at each start. Returns the exit code and what it said."
    folder = tmp_path_factory.mktemp("job")
    make_image_folder(folder / "images", per_class=4)

    def start(capsys, *changes, name="run"):
        capsys.readouterr()
        code = main(["train", "--dataset", str(folder / "images"), "--model_name", "tiny", "--epochs", "2", "--batch_size", "4", "--no_tracking",
                     "--mixed_precision", "no", "--cache_dir", str(folder / "kept"), "--checkpoint_dir", str(folder / name), "--resume", *changes])
        return code, "".join(capsys.readouterr())
    start.folder = folder
    return start


def content(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_restarted_job_just_works(job, capsys, monkeypatch):
    score, calls = training.score, []

    def stop(*parts):
        calls.append(parts)
        if len(calls) == 2: raise KeyboardInterrupt
        return score(*parts)
    monkeypatch.setattr(training, "score", stop)
    code, said = job(capsys)  # the first start, stopped in its second validation
    assert code == 130 and f"--resume found nothing to go on from in {job.folder / 'run'}: starting afresh" in said
    monkeypatch.undo()
    code, said = job(capsys)
    assert code == 0 and "Going on from step 3" in said and "Done: best accuracy" in said
    before = content(job.folder / "run")
    code, said = job(capsys)
    assert code == 0 and "is complete (6 steps): nothing to do. To train longer" in said and "[epoch" not in said
    assert content(job.folder / "run") == before


@pytest.mark.parametrize("changes, sentence", [
    (("--epochs", "3"), "epochs was 2, now 3"), (("--seed", "7"), "seed was 42, now 7"),
    (("--eval_every_steps", "epoch"), "eval_every_steps was 100, now epoch")])
def test_a_finished_run_with_other_settings_is_still_refused(job, changes, sentence, capsys):
    assert job(capsys, name="finished")[0] == 0
    before = content(job.folder / "finished")
    code, said = job(capsys, *changes, name="finished")
    assert code == 2 and sentence in said and content(job.folder / "finished") == before


def test_what_a_folder_holds_decides_where_a_job_starts(job, capsys):
    (job.folder / "empty").mkdir()
    assert "starting afresh" in job(capsys, name="empty")[1]
    (job.folder / "empty" / "last.pt").unlink()  # as after a kill between the two files
    code, said = job(capsys, name="empty")
    assert code == 0 and ("Going on from step" in said or "is complete" in said)
    (job.folder / "file").write_text("not a folder")
    code, said = job(capsys, name="file")
    assert code == 2 and "is a file: name a folder" in said


def test_a_finished_run_comes_back_with_its_weights_and_curves(tmp_path):
    "Also with a rate that was looked for."
    def run(**changes):
        return train(DataArguments(dataset=str(tmp_path / "images")), ModelArguments(model_name="tiny"), log=lines.append,
                     training=arguments(learning_rate="auto", eval_every_steps="epoch", no_tracking=True, checkpoint_dir=str(tmp_path / "run"), **changes),
                     features=FeatureArguments(cache_dir=str(tmp_path / "kept")))
    make_image_folder(tmp_path / "images", per_class=4)
    lines, first = [], None
    first, again = run(), run(resume=True)
    assert lines[-1].startswith(f"The run in {tmp_path / 'run'} is complete")
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values()))
    assert (first.step, first.epoch, first.best_acc, first.history) == (again.step, again.epoch, again.best_acc, again.history)
    assert first.scheduler.state_dict() == again.scheduler.state_dict()


def test_a_script_that_a_worker_imports_stops_at_once(tmp_path, monkeypatch):
    "Where processes are spawned, each reads the script again; nothing is loaded or written then."
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    with pytest.raises(UserError, match='if __name__ == "__main__":'):
        train(DataArguments(dataset="digits"), ModelArguments(model_name="tiny"), training=arguments(checkpoint_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_greyscale_ranges_are_named_once(tmp_path):
    "Where the loop decodes the pictures itself."
    for split in ("train", "val"):
        for name, low in (("dark", 0), ("light", 3000)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3): Image.fromarray(np.full((32, 32), low + i * 500, np.uint16)).save(tmp_path / split / name / f"{i}.png")
    lines = []
    train(DataArguments(dataset=str(tmp_path), augment="crop_flip"), ModelArguments(model_name="tiny"), log=lines.append,
          training=arguments(eval_every_steps="epoch", no_tracking=True, checkpoint_dir=str(tmp_path / "run")))
    assert len([line for line in lines if line.startswith("Wide greyscale images: ")]) == 1, lines


class Lost(torch.utils.data.Dataset):
    "Rows whose reader ends as if it had run out of memory, or by a fault of its own."
    def __init__(self, how): self.how = how
    def __len__(self): return IMAGES
    def __getitem__(self, row): os.kill(os.getpid(), signal.SIGKILL) if self.how == "killed" else os._exit(3)


@pytest.mark.parametrize("how, remedy", [("killed", "was killed, mostly because memory ran out: pass a smaller"), ("ended", "ended before its work was done")])
def test_a_lost_worker_ends_training_with_a_sentence(how, remedy):
    "accelerate puts a loader of its own in the place of ours."
    lost = torch.utils.data.DataLoader(Lost(how), 8, sampler=EpochSampler(IMAGES, 0), num_workers=1, multiprocessing_context="fork", collate_fn=_WholeBatch())
    with pytest.raises(UserError, match=remedy): fit(Head(), lost, loaders()[1], arguments(), log=lambda line: None)


def quietly(model, given, **learning):
    return fit(model, *loaders(), given, make_accelerator(given), log=lambda line: None, how=Learning(**learning))


def test_an_average_moves_only_where_the_weights_do(monkeypatch):
    "A step that the gradient scaler skips is none."
    given, moved, weights = arguments(ema_decay=0.9), [], [Head().layer.weight.detach()]

    def save(state, is_best):
        weights.append(state.average.state_dict()["weights"]["layer.weight"].clone())
        moved.append(not torch.equal(*weights[-2:]))
    state = fit(Head(), *loaders(), given, scaled_accelerator(given, OVERFLOWS), save=save, log=lambda line: None)
    assert 0 < moved.count(True) < 16 and state.average.updates == moved.count(True)


def test_a_loss_of_ones_own_gets_float32_and_no_autocast():
    seen = []

    def loss(logits, labels):
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu"), len(labels)))
        return F.cross_entropy(logits, labels)
    quietly(Head(), arguments(epochs=1, mixed_precision="bf16"), loss=loss)
    assert set(seen) == {(torch.float32, False, 8)}
    own, plain = (quietly(Head(), arguments(), **how).model.layer.weight for how in (dict(loss=F.cross_entropy), {}))
    assert torch.equal(own, plain)


def test_an_optimizer_of_ones_own_and_gradients_of_a_length():
    "A step of plain gradient descent is as long as the gradient, times the rate."
    def descent(model): return torch.optim.SGD(model.parameters(), lr=1.0)
    for longest in (1e-3, 0.1):
        given = arguments(epochs=1, batch_size=8, warmup_ratio=0.0)
        before, after = Head(), []

        def save(state, is_best): after.append(torch.cat([p.detach().flatten().clone() for p in state.model.parameters()]))
        fit(before, *loaders(), given, save=save, log=lambda line: None, how=Learning(optimizer=descent, max_grad_norm=longest))
        start = torch.cat([p.detach().flatten() for p in Head().parameters()])
        assert (after[0] - start).norm().item() == pytest.approx(longest, rel=1e-3)


def test_kept_features_are_not_mixed():
    with pytest.raises(UserError, match="--mixup and --cutmix mix images, and these batches hold features: give loaders of images"):
        quietly(Head(), arguments(), mix=make_mix(arguments(mixup=0.2), 3))


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "balanced_accuracy"])
def test_the_metric_says_what_is_best(metric, monkeypatch):
    "The three figures of five validations, each with its best in another place."
    figures = {"accuracy": [0.5, 0.9, 0.3, 0.3, 0.3], "macro_f1": [0.5, 0.4, 0.8, 0.3, 0.8], "balanced_accuracy": [0.1, 0.2, 0.3, 0.4, 0.3]}
    calls, best, lines = itertools.count(), [], []

    def made_up(*given):
        number = next(calls)
        return training.Scores(1.0, figures["accuracy"][number], 1.0, [], 64, [], figures["macro_f1"][number], figures["balanced_accuracy"][number])
    monkeypatch.setattr(training, "score", made_up)
    given = arguments(epochs=5, eval_every_steps="epoch", metric=metric)
    state = fit(Head(), *loaders(), given, save=lambda state, is_best: best.append(is_best), log=lines.append)
    values = figures[metric]
    assert best == [value > max(values[:i], default=-1) for i, value in enumerate(values)] and state.best_acc == max(values)
    assert [entry["val_acc"] for entry in state.history] == figures["accuracy"]
    told = [line for line in lines if line.startswith("[epoch")]
    assert all(line.endswith("%") and (metric == "accuracy" or f" {metric}={value:.2%}" in line) for line, value in zip(told, values, strict=True))
    assert metric == "accuracy" or all(line.count("=") == 4 for line in told)
    assert f"Saved new best model with {metric}: {max(values):.2%}" in lines


@pytest.mark.parametrize("values, patience, stops_after", [
    ([1, 2, 3, 4, 5], 1, 5), ([2, 1, 3, 3, 3], 1, 2), ([2, 1, 3, 3, 3], 2, 5), ([2, 2, 2, 2, 2], 3, 4), ([2, 1, 1, 3, 1], None, 5)])
def test_patience_counts_validations_without_a_better_one(values, patience, stops_after, monkeypatch):
    calls = iter(values)
    monkeypatch.setattr(training, "score", lambda *given: training.Scores(1.0, next(calls) / 10, 1.0, [], 64, [], 0.0, 0.0))
    lines = []
    state = fit(Head(), *loaders(), arguments(epochs=5, eval_every_steps="epoch", patience=patience), log=lines.append)
    assert len(state.history) == stops_after
    assert len([line for line in lines if line.startswith("Stopped at step ")]) == (patience is not None and stops_after - 1 - values[:stops_after].index(max(values[:stops_after])) >= patience)


def test_the_first_score_is_that_of_the_start():
    model, lines, tracked = Head(), [], []
    given = arguments(epochs=1, eval_every_steps="epoch")
    state = fit(model, *loaders(), given, track=lambda figures, step: tracked.append((step, figures)), log=lines.append, how=Learning(score_first=True))
    untouched = fit(Head(), *loaders(), given, log=lambda line: None)
    assert [entry["step"] for entry in state.history] == [0, 8] and lines[0].startswith("[epoch 0 | step 0] val_loss=")
    assert "train_loss" not in tracked[0][1] and "train_loss" in tracked[1][1] and tracked[0][0] == 0
    assert torch.equal(state.model.layer.weight, untouched.model.layer.weight)  # a look changes nothing
