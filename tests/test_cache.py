"Kept features under bad luck: kills, damage, two runs at once, a full disk; and the runs that use them."
import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import forks
import pytest
import torch

from dinov3_nb import DataArguments, ModelArguments, TrainArguments, TuneArguments, UserError, load_backbone, store, train
from dinov3_nb.cache import kept_features
from dinov3_nb.core import FeatureArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.images import ImageRows
from dinov3_nb.features import PassOptions, extract_features
from dinov3_nb.backbone import load_processor
from dinov3_nb.records import clear_entries, list_entries
from dinov3_nb.store import FeatureStore, hold_lock
from helpers import ENVIRONMENT, command, make_image_folder

FORK = multiprocessing.get_context("fork")
OPTIONS = PassOptions(batch_size=8)
ROW = 2 * 128 * 4  # bytes of tiny's features


def load_parts(share):
    "Backbone, images, processor, and the features to expect."
    torch.set_num_threads(1)  # children are forked
    data = load_and_prepare_dataset(DataArguments(dataset="digits", train_split_ratio=share))
    backbone, processor, rows = load_backbone("tiny"), load_processor("tiny"), ImageRows(data.train)
    return backbone, rows, processor, extract_features(backbone, rows, processor, OPTIONS)


@pytest.fixture(scope="module")
def parts(): return load_parts(1.0)


@pytest.fixture(scope="module")
def few(): return load_parts(0.07)  # 101 images: each fault costs a pass over all of them


def keep(parts, folder, log=lambda line: None):
    backbone, rows, processor, _ = parts
    return kept_features(backbone, {"train": rows}, processor, OPTIONS, folder, log)["train"]


def same(parts, found):
    "Equal up to the last digits: which images share a batch may differ."
    return all(torch.allclose(found.pool(pool), parts[3].pool(pool), atol=1e-5) for pool in ("cls", "mean"))


def place_of(folder):
    place, = (place for place in folder.iterdir() if len(place.name) == 32)
    return place


def slow_down(backbone, seconds, calls=None):
    def wait(module, inputs):
        time.sleep(seconds)
        if calls is not None: calls.append(1)
    return backbone.register_forward_pre_hook(wait)


def make_slowly(parts, folder):
    store._SAVE_SECONDS = 0.05
    slow_down(parts[0], 0.012)
    keep(parts, folder)


def some(parts, count): return (parts[0], ImageRows(parts[1].split.select(range(count))), *parts[2:])


@pytest.mark.parametrize("there", [0, 300], ids=["from nothing", "into a store"])
def test_killed_ten_times(parts, tmp_path, there):
    chance, saved = random.Random(0), []
    if there: keep(some(parts, there), tmp_path)
    for _ in range(10):
        child = FORK.Process(target=make_slowly, args=(parts, tmp_path))
        child.start()
        time.sleep(chance.uniform(0.02, 0.4))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        saved.append(sum(len(FeatureStore(place, ROW)) for place in tmp_path.iterdir() if len(place.name) == 32))
    assert saved == sorted(saved) and there < saved[-1] < 1437, saved  # never back, and not by luck finished
    found = FeatureStore(place_of(tmp_path), ROW)
    assert found.intact(range_of(found)).all()  # what a kill leaves is right, or not there
    calls = []
    hook = slow_down(parts[0], 0, calls)
    assert same(parts, keep(parts, tmp_path))
    hook.remove()
    assert len(calls) <= (1437 - saved[-1]) / 8 + 1, (len(calls), saved)  # it went on, it did not start again


def range_of(found): return torch.arange(len(found)).numpy()


def test_any_damage_is_noticed(few, tmp_path):
    "Whatever happens to a file: the features are right, and only what was damaged is computed again."
    keep(few, tmp_path)
    place, chance = place_of(tmp_path), random.Random(0)
    for file in ("00.rows", "00.index", "store.json"):
        for position in [0, -1, *(chance.randrange(1000) for _ in range(2))]:
            damaged = bytearray((place / file).read_bytes())
            damaged[position] ^= 1 << chance.randrange(8)
            (place / file).write_bytes(damaged)
            calls = []
            hook = slow_down(few[0], 0, calls)
            assert same(few, keep(few, tmp_path)), (file, position)
            hook.remove()
            assert len(calls) <= 1, (file, position)
        whole = (place / file).read_bytes()
        (place / file).write_bytes(whole[:len(whole) // 2])
        assert same(few, keep(few, tmp_path)), file
        (place / file).unlink()
        assert same(few, keep(few, tmp_path)), file
    assert list_entries(tmp_path)[0].record["embed_dim"] == 128  # the record is written anew


def test_damage_while_another_run_appends(few, parts, tmp_path):
    "A damaged row in the files of a run that is alive is computed again, into other files."
    keep(few, tmp_path)
    with store.StoreWriter(place_of(tmp_path), ROW) as writer:
        writer._open()  # holds 00
        damaged = bytearray((place_of(tmp_path) / "00.rows").read_bytes())
        damaged[5] ^= 1
        (place_of(tmp_path) / "00.rows").write_bytes(damaged)
        assert same(few, keep(few, tmp_path))
    assert (place_of(tmp_path) / "01.rows").stat().st_size == ROW
    said = []
    assert same(few, keep(few, tmp_path, said.append)) and "kept before" in said[0], said


def keep_together(parts, folder, barrier, answers):
    calls, said = [], []
    slow_down(parts[0], 0.005, calls)
    barrier.wait()
    answers.put((same(parts, keep(parts, folder, said.append)), len(calls), any("waiting" in line for line in said)))


def test_two_at_once(parts, tmp_path):
    barrier, answers = FORK.Barrier(2), FORK.Queue()
    children = [FORK.Process(target=keep_together, args=(parts, tmp_path, barrier, answers)) for _ in range(2)]
    for child in children: child.start()
    found = [answers.get(timeout=120) for _ in children]
    for child in children: child.join()
    assert all(right for right, _, _ in found), found
    assert sorted(calls for _, calls, _ in found) == [0, 180], found   # one computed all of it
    assert sum(waited for _, _, waited in found) == 1, found          # the other waited


def keep_half(parts, folder, first, barrier, answers):
    "Two runs whose images overlap: neither waits for the other."
    rows = ImageRows(parts[1].split.select(range(*first)))
    slow_down(parts[0], 0.005)
    barrier.wait()
    found = keep((parts[0], rows, *parts[2:]), folder)
    answers.put(torch.allclose(found.cls, parts[3].cls[first[0]:first[1]], atol=1e-5))


def test_two_different_ones_at_once(parts, tmp_path):
    barrier, answers = FORK.Barrier(2), FORK.Queue()
    children = [FORK.Process(target=keep_half, args=(parts, tmp_path, first, barrier, answers)) for first in ((0, 700), (400, 1437))]
    for child in children: child.start()
    assert all(answers.get(timeout=60) for _ in children)
    for child in children: child.join()
    calls = []
    hook = slow_down(parts[0], 0, calls)
    assert same(parts, keep(parts, tmp_path)) and not calls  # each wrote files of its own, and both are there
    hook.remove()


def test_a_lock_dies_with_its_process(parts, tmp_path):
    child = FORK.Process(target=make_slowly, args=(parts, tmp_path))
    child.start()
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    said = []
    assert same(parts, keep(parts, tmp_path, said.append))
    assert not any("waiting" in line for line in said)


def test_write_error_in_the_middle(parts, tmp_path, monkeypatch):
    "A limit on the size of files stands in for a disk that fills up during the pass."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(store, "_SAVE_SECONDS", 0.0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        with pytest.raises(UserError, match="cannot be written .*: choose another --cache_dir"): keep(parts, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    said = []
    assert same(parts, keep(parts, tmp_path, said.append))
    assert "of them through the backbone" in said[0], said  # what was written before is there


def test_write_error_in_a_store_that_is_used(parts, tmp_path, monkeypatch):
    keep(some(parts, 200), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(store, "_SAVE_SECONDS", 0.0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 * ROW + 100, limits[1]))
        with pytest.raises(UserError, match="cannot be written .*: choose another --cache_dir"): keep(parts, tmp_path)
        assert len(keep(some(parts, 200), tmp_path)) == 200  # what is there can be used on a full disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    found = FeatureStore(place_of(tmp_path), ROW)
    assert 200 < len(found) <= 300 and found.intact(range_of(found)).all()
    assert same(parts, keep(parts, tmp_path))


ON_A_SMALL_DISK = """
import ctypes, os, subprocess, sys
from pathlib import Path
size, place, *sys.argv = sys.argv[1:]
users = os.getuid(), os.getgid()
if ctypes.CDLL(None).unshare(0x10020000): sys.exit("unshare: not here")  # a user and a mount namespace, as of `unshare -rm`
for name, line in (("setgroups", "deny"), ("uid_map", f"0 {users[0]} 1"), ("gid_map", f"0 {users[1]} 1")):
    Path("/proc/self", name).write_text(line)
if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]).returncode: sys.exit("mount: not here")
from dinov3_nb.cli import main
sys.exit(main())
"""


def on_small_disk(tmp_path, size):
    place = tmp_path / "disk"
    place.mkdir()
    arguments = "train", "--dataset", "digits", "--model_name", "tiny", "--no_tracking", "--epochs", "1", "--cache_dir", place
    run = forks.run([sys.executable, "-c", ON_A_SMALL_DISK, size, place, "dinov3-nb", *arguments], tmp_path, ENVIRONMENT)
    if "mount:" in run.stderr or "unshare:" in run.stderr: pytest.skip(f"no mounting here: {run.stderr.strip()}")
    return run


def test_full_disk(tmp_path):
    run = on_small_disk(tmp_path, "1m")
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("dinov3-nb: The features need 1.5 MB and ") and run.stderr.count("\n") == 1, run.stderr
    assert "choose another --cache_dir" in run.stderr


def test_large_enough_disk(tmp_path):
    run = on_small_disk(tmp_path, "4m")
    assert run.returncode == 0, run.stderr


def test_unusable_folder(parts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --cache_dir"): keep(parts, tmp_path / "file")


def run(tmp_path, name, dataset="digits", cache_features="auto", share=1.0, **training):
    lines, skip = [], {"on_bad_image": "skip"} if dataset != "digits" else {"train_split_ratio": share, "val_split_ratio": share}
    arguments = TrainArguments(**{**dict(checkpoint_dir=str(tmp_path / name), no_tracking=True, epochs=2, mixed_precision="no",
                                         batch_size=32, eval_every_steps=20), **training})
    state = train(DataArguments(dataset=dataset, **skip), ModelArguments(model_name="tiny", dropout=0.1), training=arguments,
                  features=FeatureArguments(cache_features=cache_features, cache_dir=str(tmp_path / "kept")), log=lines.append)
    return state, [line for line in lines if not line.startswith(("Features", "Done", "Ridge"))]


def test_same_run_with_and_without(tmp_path):
    (plain, said), (kept, kept_said) = run(tmp_path, "plain", cache_features="never", share=0.4), run(tmp_path, "kept", share=0.4)
    assert said == kept_said
    for a, b in zip(plain.history, kept.history):
        assert all(abs(a[key] - b[key]) < 1e-4 for key in ("train_loss", "val_loss", "val_acc", "learning_rate"))
    old, new = (torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("plain", "kept"))
    assert old.keys() == new.keys()
    for key, value in old["model_state_dict"].items(): assert torch.allclose(value, new["model_state_dict"][key], atol=1e-4)


def test_bad_images_with_and_without(tmp_path):
    folder = make_image_folder(tmp_path / "images")
    next((folder / "train").rglob("*.png")).write_bytes(b"no image")
    next((folder / "val").rglob("*.png")).write_bytes(b"no image")
    _, said = run(tmp_path, "plain", str(folder), "never")
    for name in ("made", "kept"):
        _, kept_said = run(tmp_path, name, str(folder))
        assert said == kept_said and sum("skipped (" in line for line in said) == 2
    with pytest.raises(UserError, match="cannot be decoded.*mend it"):
        train(DataArguments(dataset=str(folder)), ModelArguments(model_name="tiny"), training=TrainArguments(
            checkpoint_dir=str(tmp_path / "stopped"), no_tracking=True, mixed_precision="no"),
            features=FeatureArguments(cache_dir=str(tmp_path / "kept")))


def test_nothing_kept_where_features_change(tmp_path):
    for name, data, tuning in (("augmented", {"augment": "crop_flip"}, {}), ("unfrozen", {}, {"tune": "all", "head_start": "random"})):
        train(DataArguments(dataset="digits", train_split_ratio=0.05, val_split_ratio=0.05, **data), ModelArguments(model_name="tiny"), TuneArguments(**tuning),
              training=TrainArguments(checkpoint_dir=str(tmp_path / name), no_tracking=True, epochs=1, mixed_precision="no"),
              features=FeatureArguments(cache_dir=str(tmp_path / "kept")), log=lambda line: None)
    assert list_entries(tmp_path / "kept") == []


def test_automatic_rate_survives_a_resume(tmp_path):
    whole, said = run(tmp_path, "whole", learning_rate="auto")
    assert any("learning rate" in line.lower() for line in said), said

    class Stop(Exception): pass

    def stop(line):
        if "step 60" in line: raise Stop
    common = dict(no_tracking=True, epochs=2, mixed_precision="no", batch_size=32, eval_every_steps=20, learning_rate="auto")
    rest = dict(features=FeatureArguments(cache_dir=str(tmp_path / "kept")))
    with pytest.raises(Stop):
        train(DataArguments(dataset="digits"), ModelArguments(model_name="tiny", dropout=0.1),
              training=TrainArguments(checkpoint_dir=str(tmp_path / "halved"), **common), log=stop, **rest)
    resumed = train(DataArguments(dataset="digits"), ModelArguments(model_name="tiny", dropout=0.1),
                    training=TrainArguments(checkpoint_dir=str(tmp_path / "halved"), resume=True, **common), **rest)
    assert torch.equal(whole.model.head.weight, resumed.model.head.weight)
    found = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "halved")]
    for kept in found:  # what was asked for, and what came of it
        assert kept["config"]["learning_rate"] == "auto"
        assert kept["config"]["found_learning_rate"] == kept["scheduler_state_dict"]["base_lrs"][0]
    assert found[0]["config"]["found_learning_rate"] == found[1]["config"]["found_learning_rate"]


def test_clearing_leaves_what_a_run_is_computing(few, tmp_path):
    keep(few, tmp_path)
    entry, = list_entries(tmp_path)
    assert entry.rows == len(few[1]) and entry.size > entry.rows * ROW
    with hold_lock(entry.place / "pass-3.lock", print): assert clear_entries(tmp_path, [entry.key[:6]]) == []
    assert [e.key for e in clear_entries(tmp_path, [entry.key[:6]])] == [entry.key] and list_entries(tmp_path) == []


def test_features_command(tmp_path):
    shown = command("features", "list", "--cache_dir", str(tmp_path), cwd=tmp_path)
    assert shown.returncode == 0 and "0 entries" in shown.stdout, shown
    wrong = command("features", "clear", "abc", "--cache_dir", str(tmp_path), cwd=tmp_path)
    assert wrong.returncode == 2 and "begin with 'abc'" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_fast_preprocessing_in_every_kind_of_run(tmp_path):
    for name, model in (("frozen", {}), ("unfrozen", {"freeze_backbone": False})):
        losses = []
        for preprocess in ("processor", "fast"):
            state = train(DataArguments(dataset=str(tmp_path / "images") if (tmp_path / "images").exists() else str(make_image_folder(tmp_path / "images"))),
                          ModelArguments(model_name="tiny", **model),
                          training=TrainArguments(checkpoint_dir=str(tmp_path / name / preprocess), no_tracking=True, epochs=1, mixed_precision="no"),
                          features=FeatureArguments(preprocess=preprocess, cache_dir=str(tmp_path / "kept")), log=lambda line: None)
            losses.append(state.history[-1]["val_loss"])
        assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02, (name, losses)
    kept = list_entries(tmp_path / "kept")
    assert [entry.rows for entry in kept if entry.key != "contents"] == [48, 48]  # prepared in two ways


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_space(few, tmp_path, dtype):
    backbone, rows, processor, expected = few
    options = PassOptions(kept_as=dtype)
    found = kept_features(backbone, {"train": rows}, processor, options, tmp_path, lambda line: None)["train"]
    assert torch.allclose(found.cls, expected.cls.to(getattr(torch, dtype)).float(), atol=1e-2) and found.cls.dtype == torch.float32
    assert (place_of(tmp_path) / "00.rows").stat().st_size == len(few[1]) * ROW // 2
