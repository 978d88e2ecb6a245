"Which pictures go through the backbone: each content once, whatever happens to its file; and what `evaluate` and `predict` make of it."
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets, load_dataset
from PIL import Image

from dinov3_nb import FeatureArguments, UserError, evaluate, features, inference, load_classifier, model, probe, store, train
from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.cache import KeptSplit, kept_features
from dinov3_nb.features import PassOptions
from dinov3_nb.files import read_checkpoint, save_atomically
from dinov3_nb.images import ImageRows
from dinov3_nb.inference import open_kept
from dinov3_nb.inputs import name_pictures, picture_rows

QUICK = dict(model_name="tiny", epochs=2, learning_rate=0.02, mixed_precision="no", no_tracking=True)
NEVER = FeatureArguments(cache_features="never")
TOTAL = 32


def save_picture(path, seed, kind):
    pixels = np.full((24, 32, 3), (200, 30, 30) if kind == "a" else (30, 60, 200)) + np.random.default_rng(seed).normal(0, 60, (24, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def run_on(root, **settings):
    "Train on the pictures in a folder; features, checkpoint and all lie beside them."
    settings = {"dataset": root / "data", "checkpoint_dir": root / "run", "cache_dir": root / "cache", "log": lambda line: None, **QUICK, **settings}
    return train(overwrite=True, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    for seed in range(TOTAL): save_picture(root / "data" / "ab"[seed % 2] / f"{seed:02}.png", seed, "ab"[seed % 2])
    run_on(root)
    return root


@pytest.fixture
def root(trained, tmp_path):
    "A copy, to do with as one likes."
    root = tmp_path / "copy"
    shutil.copytree(trained, root)
    checkpoint = read_checkpoint(root / "run/best.pt")
    checkpoint["config"]["cache_dir"] = str(root / "cache")  # not that of all other tests
    save_atomically(checkpoint, root / "run/best.pt")
    return root


@pytest.fixture
def passes(monkeypatch):
    "The number of pictures in each forward pass of a backbone."
    seen = []
    for module in (features, model):
        def counted(backbone, pixel_values, tokens=module.backbone_tokens):
            seen.append(len(pixel_values))
            return tokens(backbone, pixel_values)
        monkeypatch.setattr(module, "backbone_tokens", counted)
    return seen


def files(root): return sorted((root / "data").rglob("*.png"))
def first(root): return files(root)[0]


def add(root): save_picture(root / "data/a/new.png", 1000, "a")
def add_twice(root): add(root); shutil.copy(root / "data/a/new.png", root / "data/a/new_too.png")
def copy_old(root): shutil.copy(first(root), root / "data/a/copy.png")
def replace_one(root): save_picture(first(root), 2000, "a")
def touch(root): os.utime(first(root))
def rename(root): [file.rename(file.with_name(f"x{file.name}")) for file in files(root)]
def nothing(root): pass


def sort_into_splits(root):
    for i, file in enumerate(files(root)):
        place = root / "data" / ("val" if i % 4 == 0 else "train") / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
    for name in "ab": (root / "data" / name).rmdir()


def move_to_validation(root):
    sort_into_splits(root)
    run_on(root)
    moved = next((root / "data/train/a").iterdir())
    moved.rename(root / "data/val/a" / moved.name)


def again(**settings): return lambda root: run_on(root, **settings)
def moved(root): (root / "data").rename(root / "elsewhere"); run_on(root, dataset=root / "elsewhere")
def as_dataset(root): return load_dataset("imagefolder", data_dir=str(root / "data"))["train"]
def shuffled(root): run_on(root, dataset=as_dataset(root).shuffle(seed=1))
def inside(root): run_on(root, dataset=as_dataset(root).map(lambda row: row, keep_in_memory=True))
def probed(root): probe(dataset=root / "data", model_name="tiny", mixed_precision="no", cache_dir=root / "cache")
def scored(root): evaluate(root / "run", dataset=root / "data", cache_dir=root / "cache")
def named(root): load_classifier(root / "run", "cpu").predict(root / "data", features=FeatureArguments(cache_dir=str(root / "cache")))
def scored_and_named(root): scored(root); named(root); probed(root); run_on(root)
def rows_named(root): load_classifier(root / "run", "cpu").predict(as_dataset(root), features=FeatureArguments(cache_dir=str(root / "cache")))


CASES = {
    "again": (nothing, again(), 0), "an image added": (add, again(), 1), "folder moved": (nothing, moved, 0), "files renamed": (rename, again(), 0),
    "another share": (nothing, again(train_split_ratio=0.5), 0), "another seed": (nothing, again(seed=7), 0), "another order": (nothing, shuffled, 0),
    "a copy of a file": (copy_old, again(), 0), "a new file twice": (add_twice, again(), 1), "sorted into splits": (sort_into_splits, again(), 0),
    "moved to validation": (move_to_validation, again(), 0), "a file replaced": (replace_one, again(), 1), "a file touched": (touch, again(), 0),
    "bytes in place of files": (nothing, inside, 0), "probe": (nothing, probed, 0), "evaluate": (nothing, scored, 0), "predict": (nothing, named, 0),
    "predict a dataset": (nothing, rows_named, 0), "predict: added": (add, named, 1), "predict: renamed": (rename, named, 0),
    "predict: touched": (touch, named, 0), "evaluate: replaced": (replace_one, scored, 1), "one after another": (add, lambda root: (named(root), scored_and_named(root)), 1),
    "never": (nothing, lambda root: load_classifier(root / "run", "cpu").predict(root / "data", features=NEVER), TOTAL),
}


@pytest.mark.parametrize("case", CASES)
def test_each_content_goes_through_once(case, root, passes):
    change, use, expected = CASES[case]
    change(root)
    passes.clear()
    use(root)
    assert sum(passes) == expected


def test_types_are_kept_apart(root, passes):
    backbone, processor = load_backbone("tiny"), load_processor("tiny")
    rows, found = {"train": ImageRows(as_dataset(root))}, {}
    for expected in (TOTAL, 0):
        for kind in ("float32", "float16", "bfloat16"):
            passes.clear()
            options = PassOptions(kept_as=kind)
            found[kind] = kept_features(backbone, rows, processor, options, root / "other", lambda line: None)["train"].cls
            assert sum(passes) == expected, kind
    for kind, tolerance in (("float16", 2e-3), ("bfloat16", 2e-2)):
        torch.testing.assert_close(found[kind], found["float32"], rtol=tolerance, atol=tolerance)
        assert not torch.equal(found[kind], found["float32"])


# evaluate

def test_the_best_figure_of_the_run_exactly(root, passes):
    best = run_on(root).best_acc
    passes.clear()
    assert evaluate(root / "run").scores.accuracy == best and not passes
    assert evaluate(root / "run", cache_features="never").scores.accuracy == pytest.approx(best) and sum(passes) == 3


@pytest.mark.parametrize("settings", [{"pool": "mean"}, {"pool": "cls_mean", "head": "mlp"}, {"preprocess": "fast"}, {"mixed_precision": "bf16"}])
def test_any_frozen_run(settings, root, passes):
    run_on(root, **settings)
    classifier = load_classifier(root / "run", "cpu")
    passes.clear()
    kept, scores = classifier.predict(root / "data"), evaluate(classifier).scores
    known = settings.get("mixed_precision") != "bf16" or inference.cpu_has_bfloat16()  # else training and prediction differ in arithmetic
    assert not passes or not known
    plain = classifier.predict(root / "data", features=NEVER)
    tolerance = 1e-5 if "preprocess" not in settings else 0.02
    for one, other in zip(kept, plain, strict=True):
        assert one.path == other.path and one.labels[0][0] == other.labels[0][0]
        assert dict(one.labels) == pytest.approx(dict(other.labels), abs=tolerance)
    assert scores.loss == pytest.approx(evaluate(classifier, cache_features="never").scores.loss, abs=tolerance)


def test_several_splits(root):
    sort_into_splits(root)
    kept, plain = (evaluate(root / "run", dataset=root / "data", **given) for given in ({}, {"cache_features": "never"}))
    assert kept.scores.num_images == plain.scores.num_images == TOTAL and kept.scores.accuracy == plain.scores.accuracy
    assert kept.scores.recall == plain.scores.recall and kept.scores.loss == pytest.approx(plain.scores.loss, abs=1e-5) and kept.notes == plain.notes


def test_bad_images_are_named_alike(root):
    sort_into_splits(root)
    for place in ("train/a/00_bad.png", "val/b/bad.png", "val/b/zz.png"): (root / "data" / place).write_bytes(b"nothing")
    found = [evaluate(root / "run", dataset=root / "data", on_bad_image="skip", **given).scores for given in ({}, {"cache_features": "never"}, {})]
    assert found[0].unread == found[1].unread == found[2].unread and len(found[0].unread) == 3 and found[0].num_images == TOTAL
    said = []
    for given in ({}, {"cache_features": "never"}):
        with pytest.raises(UserError, match="bad.png.*--on_bad_image skip") as caught: evaluate(root / "run", dataset=root / "data", **given)
        said.append(str(caught.value))
    assert said[0] == said[1]


# Caches that fail

def forbid(*given, **options): raise PermissionError(13, "Permission denied")


def occupy(root, monkeypatch): (root / "other").write_text("a file")
def refuse_writes(root, monkeypatch): monkeypatch.setattr(store, "_take_pair", forbid)
def refuse_reads(root, monkeypatch): shutil.copytree(root / "cache", root / "other"); monkeypatch.setattr(store, "_read_part", forbid)


def write_protect(root, monkeypatch):
    if os.geteuid() == 0: pytest.skip("root may write everywhere")
    (root / "other").mkdir(mode=0o500)


@pytest.mark.parametrize("spoil", [occupy, refuse_writes, refuse_reads, write_protect])
def test_a_cache_that_fails_stops_nothing(spoil, root, passes, monkeypatch):
    classifier, given = load_classifier(root / "run", "cpu"), FeatureArguments(cache_dir=str(root / "other"))
    expected, accuracy = classifier.predict(root / "data"), evaluate(classifier).scores.accuracy
    spoil(root, monkeypatch)
    passes.clear()
    found = classifier.predict(root / "data", features=given)
    assert sum(passes) == TOTAL and [a.labels[0][0] for a in found] == [a.labels[0][0] for a in expected]
    scored = evaluate(classifier, cache_dir=root / "other")
    assert scored.scores.accuracy == accuracy and scored.notes[-1].startswith("scored without kept features: ")


# Which features

def test_a_changed_backbone_finds_nothing_old(root):
    "Also one that was changed where PyTorch does not count it."
    classifier = load_classifier(root / "run", "cpu")
    before = classifier.predict(root / "data")
    for parameter in classifier.model.backbone.parameters(): parameter.data.mul_(1.3)
    kept, plain = classifier.predict(root / "data"), classifier.predict(root / "data", features=NEVER)
    for one, other in zip(kept, plain): assert dict(one.labels) == pytest.approx(dict(other.labels), abs=1e-5)
    assert [a.labels for a in kept] != [a.labels for a in before]


def test_a_compiled_run_is_looked_up_and_never_compiled(root, passes, monkeypatch):
    classifier = load_classifier(root / "run", "cpu")
    compiled = replace(classifier, config=classifier.config | {"compile": True})
    monkeypatch.setattr(torch, "compile", forbid)
    compiled.predict(root / "data")
    assert not passes  # what is kept without --compile will do
    monkeypatch.setattr(torch, "compile", lambda backbone, **options: backbone)
    rows = picture_rows(root / "data")
    cache = open_kept(compiled, PassOptions())
    KeptSplit(cache, rows, name_pictures(rows), log=lambda line: None).fill()  # as `train --compile` would
    assert sum(passes) == TOTAL and len(list(cache.folder.glob("*/store.json"))) == 2
    monkeypatch.setattr(torch, "compile", forbid)
    passes.clear()
    compiled.predict(root / "data")
    evaluate(compiled)
    assert not passes
    add(root)
    compiled.predict(root / "data")
    assert sum(passes) == 1  # all the others are kept without --compile, too


def test_where_nothing_is_kept(root, tmp_path):
    classifier = load_classifier(root / "run", "cpu")
    assert open_kept(classifier, PassOptions()).folder == root / "cache"
    for change in ({"freeze_backbone": False}, {"cache_features": "never"}, {"cache_features": None}):
        assert open_kept(replace(classifier, config=classifier.config | change), PassOptions()) is None
    assert open_kept(classifier, PassOptions(), NEVER) is None
    classifier.save_pretrained(tmp_path / "exported")
    assert open_kept(load_classifier(tmp_path / "exported", "cpu"), PassOptions()) is None


def test_which_folder(root, monkeypatch):
    "The one that is given, the run's own, the usual one."
    classifier, usual = load_classifier(root / "run", "cpu"), root / "usual"
    monkeypatch.setenv("DINOV3_NB_CACHE", str(usual))
    def folder(config, **given): return open_kept(replace(classifier, config=classifier.config | config), PassOptions(), FeatureArguments(**given)).folder
    own, gone = {"cache_dir": str(root / "cache")}, {"cache_dir": str(root / "gone")}
    assert folder(own) == root / "cache" and folder(gone) == folder({"cache_dir": None}) == usual
    assert folder(own, cache_dir=str(root / "mine")) == folder(gone, cache_dir=str(root / "mine")) == root / "mine"


def test_a_few_pictures_are_not_worth_a_look(root, passes, monkeypatch):
    "The weights would have to be hashed for it, which takes as long."
    classifier = load_classifier(root / "run", "cpu")
    monkeypatch.setattr(inference, "open_cache", forbid)
    for count in (0, 1, 3): classifier.predict(files(root)[:count])
    assert passes == [1, 3]
    answers = classifier.stream(files(root)[:4])  # nothing happens before the first answer is asked for
    with pytest.raises(PermissionError): next(answers)


def test_answers_come_batch_by_batch(root, passes):
    "Of new pictures, in the batches that were asked for."
    for seed in range(12): save_picture(root / "new" / f"{seed:02}.png", 3000 + seed, "a")
    answers = load_classifier(root / "run", "cpu").stream(root / "new", batch_size=4)
    next(answers)
    assert passes == [4]
    assert len(list(answers)) == 11 and passes == [4, 4, 4]


def test_no_other_dataset_is_taken_for_it(root, passes):
    "Rows of a dataset are named by what they hold, also where two of them hold the same."
    rows = as_dataset(root)
    twice = concatenate_datasets([rows, rows])
    answers = load_classifier(root / "run", "cpu").predict(twice)
    assert not passes and len(answers) == 2 * TOTAL and [a.labels for a in answers[:TOTAL]] == [a.labels for a in answers[TOTAL:]]


def test_fast_preprocessing_is_the_run_s_wherever_pixels_are_used(root):
    "One picture alone, in memory, in a folder, and without kept features: prepared as in training."
    large = root / "large.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (223, 301, 3), dtype=np.uint8)).save(large)
    for folder in ("data/a", "data/b"): shutil.copy(large, root / folder / "large.png")
    for freeze in (True, False):
        state = run_on(root, preprocess="fast", checkpoint_dir=root / f"fast {freeze}", freeze_backbone=freeze)
        classifier = load_classifier(root / f"fast {freeze}")
        given = large, Image.open(large), [large] * 5
        ways = [classifier.predict(images)[0].labels for images in given] + [classifier.predict([large] * 5, features=NEVER)[0].labels]
        for labels in ways: assert abs(dict(labels)["a"] - dict(ways[0])["a"]) < 1e-5, ways
        found = evaluate(root / f"fast {freeze}", cache_features="never").scores
        assert abs(found.loss - min(state.history, key=lambda h: -h["val_acc"])["val_loss"]) < 1e-5


def test_a_probe_without_a_cache(root):
    (root / "occupied").write_text("")
    results = probe(dataset=root / "data", model_name="tiny", mixed_precision="no", cache_features="never", cache_dir=root / "occupied",
                    log=lambda line: None)
    assert len(results) == 8 and (root / "occupied").read_text() == ""
