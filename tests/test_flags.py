"Flags whose effect is not a number in the log: each test fails if the flag did nothing."
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from dinov3_nb import DataArguments, ModelArguments, TrainArguments
from dinov3_nb.data import load_and_prepare_dataset
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
