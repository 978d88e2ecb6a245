"The command line as a process: help, flags, bad input, a killed run."
import json
import signal
import subprocess
import time

import pytest
import torch
from helpers import ENVIRONMENT, SCRIPT, command, make_image_folder
from PIL import Image

TRAIN = ("train", "--dataset", "digits", "--model_name", "tiny")
QUICK = (*TRAIN, "--epochs", "1", "--batch_size", "64", "--no_tracking", "--mixed_precision", "no")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = command(*QUICK, "--learning_rate", "5e-3", cwd=folder, real=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_train_help_shows_groups_and_every_flag(tmp_path):
    done = command("train", "--help", cwd=tmp_path)
    assert done.returncode == 0
    from dataclasses import fields
    from dinov3_nb.cli import _GROUPS
    for title, group in _GROUPS:
        assert f"\n{title}:" in done.stdout
        for f in fields(group): assert f"--{f.name}" in done.stdout


def test_the_log(finished):
    folder, log = finished
    for start in ("Device:", "Dataset: digits, 10 classes", "Model: tiny", "Parameters:", "Samples: 1,437 training, 360 validation",
                  "Total steps: 23", "[epoch 1 | step 23] train_loss=", "Saved new best model with accuracy: "):
        assert any(line.startswith(start) for line in log.splitlines()), (start, log)
    assert sorted(p.name for p in (folder / "checkpoints_dinov3").iterdir()) == ["best.pt", "last.pt"]


def test_predict_names_a_digit(finished, tmp_path):
    from dinov3_nb.sources import load_digits_dataset
    rows = load_digits_dataset()["validation"]
    for i in range(20): rows[i]["image"].save(tmp_path / f"{i:02}.png")
    done = command("predict", "--checkpoint", finished[0] / "checkpoints_dinov3", "--json", tmp_path, cwd=tmp_path, real=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    named = [answer["labels"][0]["name"] for answer in map(json.loads, done.stdout.splitlines())]
    right = sum(name == str(rows[i]["label"]) for i, name in enumerate(named))
    assert right >= 15, named
    table = command("predict", "--checkpoint", finished[0] / "checkpoints_dinov3", "--top_k", "1", tmp_path / "00.png", cwd=tmp_path)
    assert named[0] in table.stdout and "%" in table.stdout


def test_evaluate_agrees_with_the_log(finished):
    folder, log = finished
    done = command("evaluate", "--checkpoint", "checkpoints_dinov3", "--dataset", "digits", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"val_acc={json.loads(done.stdout)['top1']:.2%}" in log


def test_predict_and_evaluate_say_where_features_are_kept(finished, tmp_path):
    "In the folder that is named, or nowhere; the answers are the same."
    from dinov3_nb.sources import load_digits_dataset
    (tmp_path / "pictures").mkdir()
    for i, row in enumerate(load_digits_dataset()["validation"].select(range(8))): row["image"].save(tmp_path / "pictures" / f"{i}.png")
    run = finished[0] / "checkpoints_dinov3"
    for words in (("predict", "--checkpoint", run, "--json", "pictures"), ("evaluate", "--checkpoint", run, "--json", "--val_split_ratio", "0.1")):
        kept = command(*words, "--cache_dir", words[0], cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
        never = command(*words, "--cache_dir", "nowhere", "--cache_features", "never", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
        assert kept.returncode == never.returncode == 0, (kept.stderr, never.stderr)
        if words[0] == "evaluate": first, second = (json.loads(done.stdout)["top1"] for done in (kept, never))
        else: first, second = ([json.loads(line)["labels"][0]["name"] for line in done.stdout.splitlines()] for done in (kept, never))
        assert first == second
        assert list((tmp_path / words[0]).rglob("*.index")) and not (tmp_path / "nowhere").exists()
    wrong = command("predict", "--checkpoint", run, "--cache_features", "often", "pictures", cwd=tmp_path)
    assert wrong.returncode == 2 and "invalid choice: 'often'" in wrong.stderr


def test_a_relative_dataset_is_found_from_another_folder(images, tmp_path):
    "What the checkpoint remembers is the full path, however it was typed."
    base = ("--model_name", "tiny", "--batch_size", "4", "--no_tracking", "--num_workers", "0", "--mixed_precision", "no")
    trained = command("train", "--dataset", images.name, *base, "--epochs", "1", "--checkpoint_dir", tmp_path / "run", cwd=images.parent)
    assert trained.returncode == 0, trained.stderr
    (tmp_path / "elsewhere").mkdir()
    scored = command("evaluate", "--checkpoint", tmp_path / "run", "--json", cwd=tmp_path / "elsewhere")
    assert scored.returncode == 0, scored.stderr
    assert f"val_acc={json.loads(scored.stdout)['top1']:.2%}" in trained.stdout
    absolute = command("train", "--dataset", images, *base, "--epochs", "1", "--checkpoint_dir", tmp_path / "run", "--resume", cwd=tmp_path)
    assert absolute.returncode == 0 and "is complete" in absolute.stdout, absolute.stderr  # the same run, then, not another one


def test_digits_are_always_those_of_the_package(tmp_path):
    make_image_folder(tmp_path / "digits", per_class=2)
    done = command(*QUICK, cwd=tmp_path)
    assert done.returncode == 0 and "Samples: 1,437 training" in done.stdout, done.stderr
    kept = torch.load(tmp_path / "checkpoints_dinov3" / "best.pt", weights_only=True)
    assert kept["config"]["dataset"] == "digits"


def test_a_folder_with_files_of_other_names_lists_them(tmp_path):
    "The origin notebook named its files after their accuracy."
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "best_acc_0.8123.pt").touch()
    done = command("predict", "--checkpoint", "old", "picture.png", cwd=tmp_path)
    assert done.returncode == 2 and "but the folder holds best_acc_0.8123.pt: name one file" in done.stderr, done.stderr


def test_a_file_of_the_origin(images, tmp_path):
    "Seven settings, None where quantization was off; the whole model; no class names."
    from dinov3_nb import ModelArguments, load_classifier
    from dinov3_nb.model import build_classifier
    from helpers import save_vits16
    model = build_classifier(ModelArguments(model_name=str(save_vits16(tmp_path / "vits16"))), ["circle", "square", "stripes"])
    config = {"model_name": str(tmp_path / "vits16"), "num_classes": 3, "freeze_backbone": True, "use_4bit": False,
              "bnb_4bit_compute_dtype": None, "bnb_4bit_quant_type": None, "use_nested_quant": None}
    torch.save({"model_state_dict": model.state_dict(), "config": config, "best_acc": 0.8123}, tmp_path / "best_acc_0.8123.pt")
    picture = images / "val" / "circle" / "0.png"
    answer, = load_classifier(tmp_path / "best_acc_0.8123.pt").predict(picture)
    assert sorted(name for name, _ in answer.labels) == ["0", "1", "2"]


def test_models(tmp_path):
    done = command("models", cwd=tmp_path)
    assert done.returncode == 0 and "facebook/dinov3-vith16plus-pretrain-lvd1689m" in done.stdout


def bad_input(images, tmp_path):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "notes.pt").write_bytes(b"not a checkpoint")
    for i in range(3):
        (tmp_path / "single" / "only").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "single" / "only" / f"{i}.png")
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / split / "0.png")
    return {
        "unknown dataset": ("train", "--dataset", "nobody/nothing", "--model_name", "tiny"),
        "no such folder": ("train", "--dataset", "./missing", "--model_name", "tiny"),
        "empty folder": ("train", "--dataset", "empty", "--model_name", "tiny"),
        "one class": ("train", "--dataset", "single", "--model_name", "tiny"),
        "missing column": (*TRAIN, "--label_column", "colour"),
        "missing image column": (*TRAIN, "--image_column", "photo"),
        "ratio 0": (*TRAIN, "--train_split_ratio", "0"),
        "ratio 2": (*TRAIN, "--val_split_ratio", "2"),
        "batch 0": (*TRAIN, "--batch_size", "0"),
        "misspelt flag": (*TRAIN, "--learnign_rate", "1"),
        "wrong type": (*TRAIN, "--epochs", "many"),
        "wrong choice": (*TRAIN, "--pool", "max"),
        "4-bit unfrozen": (*TRAIN, "--use_4bit", "--freeze_backbone", "False"),
        "image size": (*TRAIN, "--image_size", "33"),
        "no network": ("train", "--dataset", "digits"),
        "unknown model": ("train", "--dataset", "digits", "--model_name", "./no_model"),
        "fp16 on a CPU": (*TRAIN, "--mixed_precision", "fp16"),
        "unreadable checkpoint": ("predict", "--checkpoint", "notes.pt", "picture.png"),
        "missing checkpoint": ("predict", "--checkpoint", "none.pt", "picture.png"),
        "no checkpoint flag": ("predict", "picture.png"),
        "checkpoint_dir is a file": (*TRAIN, "--checkpoint_dir", "picture.png"),
        "nested without 4-bit": (*TRAIN, "--use_nested_quant"),
        "images directly in train": ("train", "--dataset", "flat", "--model_name", "tiny"),
        "unknown command": ("tarin",),
    }


def test_bad_input_gets_one_sentence_and_exit_code_2(images, tmp_path):
    wrong = []
    for name, arguments in bad_input(images, tmp_path).items():
        done = command(*arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
        said = [line for line in done.stderr.splitlines() if line.startswith("dinov3-nb: ")]
        if done.returncode != 2 or len(said) != 1 or "Traceback" in done.stderr or len(done.stderr.splitlines()) > 1:
            wrong.append((name, done.returncode, done.stderr[-600:]))
    assert not wrong, wrong


def test_bad_image_stops_or_is_skipped(tmp_path):
    images = make_image_folder(tmp_path / "images")
    (images / "train" / "circle" / "0.png").write_bytes(b"broken")
    base = ("train", "--dataset", "images", "--model_name", "tiny", "--epochs", "1", "--no_tracking", "--num_workers", "0")
    stopped = command(*base, "--checkpoint_dir", "a", cwd=tmp_path)
    assert stopped.returncode == 2 and "0.png" in stopped.stderr and "Traceback" not in stopped.stderr, stopped.stderr
    skipped = command(*base, "--checkpoint_dir", "b", "--on_bad_image", "skip", cwd=tmp_path)
    assert skipped.returncode == 0, skipped.stderr
    lines = skipped.stdout.splitlines()
    assert sum(line.startswith("skipped (train): ") for line in lines) == 1 and "Images skipped in all: 1" in lines, lines


def test_overwrite_loses_nothing_before_the_first_new_checkpoint(tmp_path):
    base = ("train", "--model_name", "tiny", "--batch_size", "4", "--no_tracking", "--num_workers", "0", "--mixed_precision", "no",
            "--checkpoint_dir", "run")
    first = command(*base, "--dataset", make_image_folder(tmp_path / "good"), "--epochs", "3", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert sorted(before) == ["best.pt", "last.pt"]
    broken = make_image_folder(tmp_path / "broken")
    (broken / "train" / "circle" / "0.png").write_bytes(b"broken")
    stopped = command(*base, "--dataset", broken, "--epochs", "1", "--overwrite", cwd=tmp_path)
    assert stopped.returncode == 2 and "0.png" in stopped.stderr, stopped.stderr
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    replaced = command(*base, "--dataset", broken, "--epochs", "1", "--overwrite", "--on_bad_image", "skip", cwd=tmp_path)
    assert replaced.returncode == 0, replaced.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.pt", "last.pt"]
    for name in before:
        kept = torch.load(tmp_path / "run" / name, weights_only=True)
        assert kept["config"]["dataset"] == str(broken) and kept["total_steps"] == 6, name


# Each pair differs in one flag; if the flag did nothing, the two runs would leave the same trace.
FLAGS = {
    "train_split_ratio": ("0.5",), "val_split_ratio": ("0.5",), "use_4bit": (), "epochs": ("2",), "batch_size": ("32",),
    "learning_rate": ("0.01",), "weight_decay": ("0.9",), "warmup_ratio": ("0.5",), "eval_every_steps": ("4",), "seed": ("7",),
    "head": ("mlp",), "dropout": ("0.5",), "pool": ("mean",), "image_size": ("64",), "gradient_accumulation_steps": ("2",),
    "freeze_backbone": ("False",), "augment": ("crop_flip",), "mixed_precision": ("bf16",), "mixup": ("0.4",), "cutmix": ("1.0",),
    "label_smoothing": ("0.1",), "ema_decay": ("0.9",), "class_weights": ("balanced",), "logit_adjustment": ("1.0",),
    "head_start": ("probe",),
}

# The same beside a rung on which each does something.
TUNING = {
    "tune": ("last", "all"), "head_start": ("last", "random"), "last_blocks": ("last", "1"), "layer_decay": ("last", "0.4"),
    "backbone_learning_rate": ("last", "1e-3"), "backbone_weight_decay": ("last", "100"), "backbone_warmup_ratio": ("last", "0.9"),
    "max_grad_norm": ("last", "1e-3"), "drop_path": ("last", "0.5"), "lora_rank": ("lora", "2"), "lora_alpha": ("lora", "64"),
    "lora_dropout": ("lora", "0.5"), "dora": ("lora", "True"), "no_rope_rescale": ("all", "True"), "wise_ft": ("all", "True"),
}


def trace(folder):
    kept = torch.load(folder / "last.pt", weights_only=True)
    return kept["history"][-1]["train_loss"], kept["history"][-1]["val_loss"], kept["step"], len(kept["history"])


def small_run(folder, flag=None, values=()):
    from dinov3_nb.cli import _run_train
    flags = {"--epochs": ["1"], "--batch_size": ["64"], "--no_tracking": [], "--mixed_precision": ["no"], "--learning_rate": ["1e-3"],
             "--train_split_ratio": ["0.2"], "--val_split_ratio": ["0.3"], "--checkpoint_dir": [str(folder)], "--dataset": ["digits"], "--model_name": ["tiny"]}
    if flag: flags[f"--{flag}"] = list(values)
    _run_train([part for name, given in flags.items() for part in (name, *given)])
    return trace(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_changes_the_run(flag, plain, tmp_path):
    assert small_run(tmp_path / "run", flag, FLAGS[flag]) != plain


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "rung -> what a run on it leaves, with its defaults."
    folder = tmp_path_factory.mktemp("tuned")
    return {rung: small_run(folder / rung, "tune", (rung, "--train_split_ratio", "0.1")) for rung in ("last", "lora", "all")}


@pytest.mark.parametrize("flag", TUNING)
def test_flag_of_tuning_changes_the_run(flag, tuned, tmp_path):
    rung, value = TUNING[flag]
    words = (value,) if flag == "tune" else (rung, f"--{flag}", value)
    assert small_run(tmp_path / "run", "tune", (*words, "--train_split_ratio", "0.1")) != tuned[rung]


def test_a_ladder_as_json(tmp_path):
    "Standard output holds JSON and nothing else; the log and the table go to the error output."
    words = ("ladder", *TRAIN[1:], "--train_split_ratio", "0.1", "--epochs", "1", "--batch_size", "64", "--no_tracking", "--mixed_precision", "no",
             "--checkpoint_dir", "rungs", "--rungs", "last", "--cache_dir", "cache")
    done = command(*words, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [rung["name"] for rung in shown["rungs"]] == ["probe", "last"] and shown["advice"] in done.stderr
    assert json.loads((tmp_path / "rungs" / "ladder.json").read_text())["rungs"] == shown["rungs"]
    again = command(*words, "--resume", cwd=tmp_path)
    assert again.returncode == 0 and "is complete" in again.stdout and again.stdout.splitlines()[-1] == shown["advice"]
    held = command(*words, cwd=tmp_path)
    assert held.returncode == 2 and held.stderr.count("\n") == 1 and "holds a ladder already" in held.stderr


@pytest.mark.parametrize("flag, value", [("bnb_4bit_quant_type", "fp4"), ("use_nested_quant", ""), ("bnb_4bit_compute_dtype", "float32")])
def test_quantization_flag_changes_the_run(flag, value, tmp_path):
    from dinov3_nb.cli import _run_train
    base = ["--epochs", "1", "--batch_size", "64", "--no_tracking", "--train_split_ratio", "0.2", "--dataset", "digits",
            "--model_name", "tiny", "--use_4bit"]
    _run_train([*base, "--checkpoint_dir", str(tmp_path / "a")])
    _run_train([*base, "--checkpoint_dir", str(tmp_path / "b"), f"--{flag}", *([value] if value else [])])
    assert trace(tmp_path / "a") != trace(tmp_path / "b")


def test_tracking_and_project_name(tmp_path):
    base = (*TRAIN, "--epochs", "1", "--batch_size", "64", "--train_split_ratio", "0.2")
    assert command(*base, "--project_name", "mine", cwd=tmp_path).returncode == 0
    assert list((tmp_path / "trackio").glob("mine*")), list((tmp_path / "trackio").iterdir())
    (tmp_path / "quiet").mkdir()
    assert command(*base, "--no_tracking", cwd=tmp_path / "quiet").returncode == 0
    assert not (tmp_path / "quiet" / "trackio").exists()


def test_killed_and_resumed_is_bit_identical(tmp_path):
    base = (*TRAIN, "--epochs", "3", "--batch_size", "16", "--dropout", "0.2", "--eval_every_steps", "20", "--no_tracking", "--num_workers", "0")
    whole = command(*base, "--checkpoint_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    running = subprocess.Popen([str(SCRIPT), *base, "--checkpoint_dir", "cut"], cwd=tmp_path, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline:  # until the second checkpoint is there, then pull the plug
        last = tmp_path / "cut" / "last.pt"
        if last.exists() and torch.load(last, weights_only=True)["step"] >= 40: break
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    stopped_at = torch.load(last, weights_only=True)["step"]
    assert 40 <= stopped_at < 270, "the run was over before it was killed"
    resumed = command(*base, "--checkpoint_dir", "cut", "--resume", cwd=tmp_path, real=True)
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 270
    for key, value in a["model_state_dict"].items(): assert torch.equal(value, b["model_state_dict"][key]), key
    differ = command(*base, "--checkpoint_dir", "cut", "--resume", "--learning_rate", "1", cwd=tmp_path)
    assert differ.returncode == 2 and "learning_rate was 0.0005, now 1.0" in differ.stderr
    over = command(*base, "--checkpoint_dir", "cut", "--resume", cwd=tmp_path)
    assert over.returncode == 0 and "is complete (270 steps)" in over.stdout
    again = command(*base, "--checkpoint_dir", "cut", cwd=tmp_path)
    assert again.returncode == 2 and "holds a run already" in again.stderr


def test_features_are_listed_checked_and_cleared(tmp_path):
    "A damaged row is found by `verify`, which forgets it, and by nobody else's fault: the next run computes it anew."
    cache = tmp_path / "cache"
    def features(*words): return command("features", *words, "--cache_dir", cache, cwd=tmp_path)
    probed = *TRAIN[1:], "--mixed_precision", "no", "--cache_dir", cache, "--train_split_ratio", "0.2"
    first = command("probe", *probed, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    whole = features("verify")
    assert whole.returncode == 0 and ", all whole, in" in whole.stdout.splitlines()[-1], whole
    largest = max(cache.rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    damaged = features("verify")
    assert damaged.returncode == 2 and damaged.stderr.startswith("dinov3-nb: 1 of ") and "kept rows were damaged" in damaged.stderr, damaged
    again = features("verify")
    assert again.returncode == 0 and "damaged" not in again.stdout, again
    second = command("probe", *probed, cwd=tmp_path)
    figures = [[line[:76] for line in done.stdout.splitlines() if "regression" in line] for done in (first, second)]
    assert figures[0] == figures[1] and len(figures[0]) == 4, figures
    assert "0 entries" in features("clear", "--older_than", "1").stdout and "removed from" in features("clear").stdout
    assert "0 entries, 0.0 MB" in features("list").stdout and not any(cache.rglob("*.index"))
