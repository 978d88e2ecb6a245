"Flags whose effect is not a number in the log: each test fails if the flag did nothing."
import json
from dataclasses import fields

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from dinov3_nb import DataArguments, ModelArguments, TrainArguments, UserError
from dinov3_nb.cli import _make_ladder_parser, _run_evaluate, _run_ladder, _run_probe, _run_train
from dinov3_nb.core import QuantizationArguments, TuneArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.flags import make_parser, parse
from dinov3_nb.backbone import load_processor
from dinov3_nb.model import build_classifier
from dinov3_nb.training import make_loaders


@pytest.fixture
def two_of_each(tmp_path):
    "A saved dataset with two image columns and two label columns."
    pictures = [Picture.fromarray(np.full((8, 8), i * 10, np.uint8)) for i in range(12)]
    features = Features({"photo": Image(), "sketch": Image(), "colour": ClassLabel(names=["red", "blue"]),
                         "shape": ClassLabel(names=["round", "square", "long"]), "note": Value("string")})
    split = Dataset.from_dict({"photo": pictures, "sketch": pictures[::-1], "colour": [i % 2 for i in range(12)],
                               "shape": [i % 3 for i in range(12)], "note": ["x"] * 12}, features=features)
    DatasetDict(train=split, validation=split).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize("column, names", [("colour", ["red", "blue"]), ("shape", ["round", "square", "long"])])
def test_label_column(two_of_each, column, names):
    data = load_and_prepare_dataset(DataArguments(dataset=two_of_each, image_column="photo", label_column=column))
    assert (data.label_column, data.class_names) == (column, names)


@pytest.mark.parametrize("column", ["photo", "sketch"])
def test_image_column(two_of_each, column):
    data = load_and_prepare_dataset(DataArguments(dataset=two_of_each, image_column=column, label_column="shape"))
    assert data.image_column == column


@pytest.mark.parametrize("workers", [0, 2])
def test_num_workers(workers):
    arguments = DataArguments(dataset="digits", num_workers=workers)
    loaders = make_loaders(load_and_prepare_dataset(arguments), load_processor("tiny"), arguments, TrainArguments())
    assert [loader.num_workers for loader in loaders] == [workers, workers]


def test_gradient_checkpointing():
    plain, saving = (build_classifier(ModelArguments(model_name="tiny", freeze_backbone=False, gradient_checkpointing=flag), ["a", "b"])
                     for flag in (False, True))
    def checkpointed(model): return [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]
    assert checkpointed(saving) and not checkpointed(plain)


def test_seed_changes_a_validation_cut(two_of_each):
    train_only = Dataset.from_dict({"image": [Picture.new("L", (4, 4), i) for i in range(40)], "label": [i % 2 for i in range(40)]})
    train_only = train_only.cast_column("image", Image()).cast_column("label", ClassLabel(names=["even", "odd"]))
    cuts = [load_and_prepare_dataset(DataArguments(), seed, train_only).validation["image"][:] for seed in (1, 1, 2)]
    assert [c["bytes"] for c in cuts[0]] == [c["bytes"] for c in cuts[1]] != [c["bytes"] for c in cuts[2]]


def test_words_and_bools_become_values():
    both = make_parser("demo", "", (("Model", ModelArguments), ("Training", TrainArguments)))
    typed = ["--pool", "mean", "--freeze_backbone", "False", "--epochs", "2", "--learning_rate", "auto", "--eval_every_steps", "7"]
    model, training = parse(both, typed)
    assert (model.pool, model.freeze_backbone, training.epochs, training.batch_size) == ("mean", False, 2, 8)
    assert (training.learning_rate, training.eval_every_steps) == ("auto", 7)
    training = parse(both, ["--learning_rate", "1e-3", "--eval_every_steps", "epoch"])[1]
    assert (training.learning_rate, training.eval_every_steps) == (1e-3, "epoch")


def test_a_wrong_flag_is_one_sentence():
    demo = make_parser("demo", "", (("Quantization", QuantizationArguments),))
    assert not parse(demo, ["--use_4bit", "False"])[0].use_4bit
    with pytest.raises(UserError, match="did you mean --use_4bit?"): parse(demo, ["--use_4bits"])
    with pytest.raises(UserError, match="expected one argument; see dinov3-nb demo --help."): parse(demo, ["--bnb_4bit_quant_type"])


TUNING = {"tune": "last", "head_start": "probe", "backbone_learning_rate": "2e-5", "backbone_weight_decay": "0.1", "backbone_warmup_ratio": "0.2",
          "layer_decay": "0.65", "max_grad_norm": "2", "last_blocks": "3", "drop_path": "0.1", "no_rope_rescale": "True", "lora_rank": "4",
          "lora_alpha": "8", "lora_dropout": "0.1", "dora": "True", "wise_ft": "True"}


@pytest.mark.parametrize("name", [f.name for f in fields(TuneArguments)])
def test_every_setting_of_tuning_is_a_flag_of_train(name):
    parser = make_parser("train", "", (("Tuning", TuneArguments),))
    tuning, = parse(parser, [f"--{name}", TUNING[name]])
    assert str(getattr(tuning, name)) != str(getattr(TuneArguments(), name))
    assert type(getattr(tuning, name))(TUNING[name]) == getattr(tuning, name)
    assert f"--{name}" in parser.format_help()


@pytest.mark.parametrize("name", [f.name for f in fields(TuneArguments)])
def test_a_probe_knows_no_tuning(name):
    with pytest.raises(UserError, match=f"--{name} is not known"): _run_probe(["--dataset", "digits", f"--{name}", TUNING[name]])


@pytest.mark.parametrize("words, said", [
    (["--tune", "lasts"], "invalid choice: 'lasts'"), (["--lora_rank", "8"], "--lora_rank 8 does nothing with --tune head"),
    (["--tune", "last", "--layer_decay", "0"], "--layer_decay 0"), (["--tune", "all", "--use_4bit"], "4-bit weights take no gradient")])
def test_tuning_that_cannot_be(words, said):
    with pytest.raises(UserError, match=said): _run_train(["--dataset", "digits", "--model_name", "tiny", *words])


def test_a_probe_refuses_what_does_nothing(tmp_path, capsys):
    tiny = ["--dataset", "digits", "--model_name", "tiny", "--mixed_precision", "no", "--train_split_ratio", "0.1"]
    for words, said in ((["--augment", "crop_flip"], "--augment does nothing"), (["--seed", "-1"], "--seed -1"),
                        (["--overwrite"], "--overwrite does nothing without --checkpoint_dir")):
        with pytest.raises(UserError, match=said): _run_probe([*tiny, *words])
    mine = ["--checkpoint_dir", str(tmp_path / "mine"), "--cache_dir", str(tmp_path / "cache")]
    _run_probe([*tiny, *mine])
    with pytest.raises(UserError, match="mine holds a checkpoint already"): _run_probe([*tiny, *mine])
    capsys.readouterr()
    _run_evaluate(["--checkpoint", str(tmp_path / "mine"), "--dataset", "digits", "--split", "validation", "--json"])
    shown = json.loads(capsys.readouterr().out)
    from dinov3_nb.files import read_checkpoint
    assert shown["splits"] == {"validation": 360} and shown["top1"] == read_checkpoint(tmp_path / "mine")["probe"]["accuracy"]
    with pytest.raises(UserError, match="--batch_size 0"): _run_evaluate(["--checkpoint", str(tmp_path / "mine"), "--batch_size", "0"])


def test_the_ladder_chooses_what_learns():
    for flag in ("--tune=last", "--head_start=random", "--freeze_backbone=False"):
        with pytest.raises(UserError, match=f"{flag.split('=')[0]} does nothing for a ladder"): _run_ladder(["--dataset", "digits", flag])
    with pytest.raises(UserError, match="'lst' is not a rung: did you mean 'last'?"): _run_ladder(["--rungs", "lst"])
    shown = _make_ladder_parser().format_help()
    for name in ("--lora_rank", "--rungs", "--json", "--layer_decay", "--resume"): assert name in shown
    for name in ("--tune {", "--head_start", "--freeze_backbone"): assert name not in shown
