"Every way to say the same settings gives the same settings; what cannot be meant gets a sentence that names it."
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from dinov3_nb import (
    DataArguments, FeatureArguments, ModelArguments, QuantizationArguments, Settings, TrainArguments,
    UserError, evaluate, probe, train,
)
from dinov3_nb.core import make_settings

DATA, MODEL, TRAIN = DataArguments(dataset="digits"), ModelArguments(model_name="tiny"), TrainArguments(epochs=1)
WANTED = Settings(data=DATA, model=MODEL, training=TRAIN)
WAYS = {
    "by name": ((), dict(dataset="digits", model_name="tiny", epochs=1)),
    "parts in order": ((DATA, MODEL, TRAIN), {}),
    "parts in another order": ((TRAIN, DATA, MODEL), {}),
    "all five parts": ((DATA, MODEL, QuantizationArguments(), TRAIN, FeatureArguments()), {}),
    "parts by name": ((), dict(data=DATA, model=MODEL, training=TRAIN)),
    "parts by the names of their classes": ((DATA, MODEL), dict(train_arguments=TRAIN)),
    "a whole": ((WANTED,), {}),
    "a whole by name": ((), dict(settings=WANTED)),
    "a whole and a name": ((make_settings(WANTED, epochs=7),), dict(epochs=1)),
    "a part and a name": ((TrainArguments(epochs=7), DATA), dict(model_name="tiny", epochs=1)),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_says_the_same(way):
    parts, values = WAYS[way]
    assert make_settings(*parts, **values) == WANTED


def test_every_setting_has_one_home():
    names = [field.name for part in vars(Settings()).values() for field in fields(part)]
    assert len(names) == len(set(names)) == len(Settings().flat())


def test_a_path_is_a_name():
    made = make_settings(dataset=Path("some") / "folder", checkpoint_dir=Path("run"), cache_dir=Path("kept"))
    assert (made.data.dataset, made.training.checkpoint_dir, made.features.cache_dir) == (str(Path("some/folder")), "run", "kept")


WRONG = {
    "did you mean 'dataset'?": lambda: train(datset="digits"),
    "did you mean 'learning_rate'?": lambda: probe(learnign_rate=1.0),
    "did you mean 'split'?": lambda: evaluate("run", splt="test"),
    "as in dataset='digits'": lambda: train("digits"),
    "--dataset is empty": lambda: train(dataset=None),
    "'epochs' does nothing for a probe": lambda: probe(epochs=1),
    "--augment does nothing for a probe": lambda: probe(DataArguments(augment="crop_flip")),
    "it must be DataArguments(...)": lambda: Settings(TrainArguments()),
    "'training' is not a setting": lambda: train(training=3),
    "take no gradient steps": lambda: train(use_4bit=True, freeze_backbone=False),
    "needs kept features": lambda: train(learning_rate="auto", head="mlp"),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_cannot_be_meant(sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error: WRONG[sentence]()
    assert sentence in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("part", vars(Settings()).values(), ids=lambda part: type(part).__name__)
def test_settings_do_not_change(part):
    name = fields(part)[0].name
    with pytest.raises(FrozenInstanceError): setattr(part, name, getattr(part, name))


def test_a_dataset_of_your_own_is_trained_probed_and_scored(tmp_path):
    from dinov3_nb.sources import load_digits_dataset
    digits = load_digits_dataset()
    quick = dict(model_name="tiny", train_split_ratio=0.1, val_split_ratio=0.2, log=lambda line: None)
    state = train(dataset=digits, epochs=1, no_tracking=True, mixed_precision="no", checkpoint_dir=tmp_path / "run", **quick)
    found = evaluate(tmp_path / "run", dataset=digits)
    assert found.scores.accuracy == pytest.approx(state.best_acc, abs=1e-6) and found.chosen.trained_on == 0
    results = probe(dataset=digits, mixed_precision="no", **quick)
    assert len(results) == 8 and max(result.accuracy for result in results) > state.best_acc
