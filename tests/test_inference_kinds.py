"Whatever holds pictures can be handed to `predict`, one bad picture costs nothing, and any output can hold the answers."
import ast
import collections
import errno
import io
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image

from dinov3_nb import UserError, load_classifier, train
from dinov3_nb.cli import main
from dinov3_nb.core import TuneArguments
from dinov3_nb.files import read_checkpoint, save_atomically
from dinov3_nb.pictures import BadImage, ReadError, list_image_files

CLASSES = "Łódź", "日本"


def picture(seed, kind):
    generator = np.random.default_rng(seed)
    pixels = np.full((30, 40, 3), (200, 30, 30) if kind == 0 else (30, 60, 200)) + generator.normal(0, 20, (30, 40, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A folder with the images, `run` with the checkpoint."
    root = tmp_path_factory.mktemp("kinds")
    for kind, name in enumerate(CLASSES):
        (root / "images" / name).mkdir(parents=True)
        for i in range(6): picture(10 * kind + i, kind).save(root / "images" / name / f"{i}.png")
    train(dataset=root / "images", model_name="tiny", epochs=2, learning_rate=0.02, mixed_precision="no", no_tracking=True,
          checkpoint_dir=root / "run", log=lambda line: None)
    return root


@pytest.fixture(scope="module")
def classifier(run): return load_classifier(run / "run", "cpu")


@pytest.fixture(scope="module")
def files(run): return sorted((run / "images").rglob("*.png"))


class Rows:
    "A dataset as PyTorch knows it: a length and rows."
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


def as_dataset(files):
    features = Features(photo=ImageFeature(), label=ClassLabel(names=list(CLASSES)), note=Value("string"))
    return Dataset.from_dict({"photo": [str(f) for f in files], "label": [i % 2 for i in range(len(files))], "note": ["x"] * len(files)}, features)


def transformed(files):
    dataset = as_dataset(files)
    dataset.set_transform(lambda batch: {"photo": ["nothing"] * len(batch["photo"])})
    return dataset


def bits(file): return Path(file).read_bytes()
def opened(file): return Image.open(file)
def array(file): return np.asarray(Image.open(file))
def channels_first(file): return torch.from_numpy(array(file).copy()).permute(2, 0, 1)


def pandas_column(files):
    import pandas
    return pandas.Series([str(f) for f in files], index=[f"row {i}" for i in range(len(files))])


FORMS = {
    "strings": lambda f: [str(x) for x in f], "tuple of paths": tuple, "generator": lambda f: (x for x in f), "map": lambda f: map(opened, f),
    "nested": lambda f: [f[:1], (f[1],), iter(f[2:])], "deque": collections.deque, "dict values": lambda f: dict(enumerate(f)).values(),
    "array of strings": lambda f: np.array([str(x) for x in f]), "array of paths": lambda f: np.array(f, dtype=object), "series": pandas_column,
    "bytes": lambda f: [bits(x) for x in f], "bytearrays": lambda f: [bytearray(bits(x)) for x in f], "memory": lambda f: [memoryview(bits(x)) for x in f],
    "files": lambda f: [open(x, "rb") for x in f], "BytesIO": lambda f: (io.BytesIO(bits(x)) for x in f), "opened": lambda f: [opened(x) for x in f],
    "arrays": lambda f: [array(x) for x in f], "one stack": lambda f: np.stack([array(x) for x in f]),
    "tensors": lambda f: [channels_first(x) for x in f], "stack of tensors": lambda f: torch.stack([channels_first(x) for x in f]),
    "floats": lambda f: torch.stack([channels_first(x) for x in f]) / 255, "rows": lambda f: [{"image": opened(x), "label": 3} for x in f],
    "undecoded": lambda f: [{"bytes": bits(x), "path": None} for x in f], "torch dataset": lambda f: Rows([opened(x) for x in f]),
    "dataset": as_dataset, "column": lambda f: as_dataset(f)["photo"], "part of a column": lambda f: as_dataset(f)["photo"][:],
    "rows of a dataset": lambda f: list(as_dataset(f)), "with a format": lambda f: as_dataset(f).with_format("numpy"), "with a transform": transformed,
    "streamed": lambda f: as_dataset(f).to_iterable_dataset(), "streamed rows": lambda f: IterableDataset.from_generator(lambda: ({"im": opened(x)} for x in f)),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_the_same_pictures_gets_the_same_answers(form, classifier, files):
    given = files[:2] + files[-2:]
    expected, answers = classifier.predict(given), classifier.predict(FORMS[form](given))
    assert len(answers) == 4 and all(a.error is None for a in answers)
    for answer, right in zip(answers, expected):
        assert [name for name, _ in answer.labels] == [name for name, _ in right.labels]
        np.testing.assert_allclose([p for _, p in answer.labels], [p for _, p in right.labels], atol=1e-6)


def test_a_single_picture_is_one_picture(classifier, files):
    expected = classifier.predict(files[0])[0].labels
    for one in (str(files[0]), opened(files[0]), array(files[0]), channels_first(files[0]), bits(files[0]), open(files[0], "rb"),
                {"bytes": None, "path": str(files[0])}, np.array(str(files[0])), next(os.scandir(files[0].parent))):
        assert len(classifier.predict(one)) == 1
        if not isinstance(one, os.DirEntry): assert classifier.predict(one)[0].labels == expected
    assert len(classifier.predict(np.zeros((30, 40)))) == 1 and classifier.predict([]) == []


@pytest.mark.parametrize("wrong", [
    None, 7, 0.5, object(), np.zeros(3), torch.zeros(3), np.float32(1), {"a": 1}, "", "nowhere.png", "https://example.com/a.png", "x" * 5000, "a\0b", [None],
    DatasetDict(), {"train": []}, Dataset.from_dict({"label": [1, 2]}), Dataset.from_dict({"label": [1, 2]})["label"], Path, range(3), [True]], ids=lambda x: str(x)[:20])
def test_anything_else_gets_one_sentence(wrong, classifier):
    with pytest.raises(UserError) as caught: classifier.predict(wrong)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_paths_come_back(classifier, files):
    rows = Dataset.from_dict({"image": [str(f) for f in files[:2]]}, Features(image=ImageFeature()))
    for given in (files[:2], [open(f, "rb") for f in files[:2]], rows, rows["image"]):
        assert [p.path for p in classifier.predict(given)] == [str(f) for f in files[:2]]
    assert classifier.predict(opened(files[0]))[0].path is None


def test_answers_come_while_pictures_still_arrive(classifier, files):
    asked = []
    camera = (asked.append(f) or f for f in itertools.cycle(files))  # never ends
    first = list(itertools.islice(classifier.stream(camera, batch_size=3), 4))
    assert len(first) == 4 and len(asked) == 6


@pytest.mark.parametrize("workers", [None, 2])
def test_one_bad_picture(workers, classifier, files, tmp_path):
    (tmp_path / "empty.png").touch()
    given = [*files[:4], tmp_path / "empty.png", files[4], tmp_path / "missing.png", files[5]]
    answers = classifier.predict(given, on_bad_image="skip", batch_size=3, num_workers=workers)
    assert [bool(a.labels) for a in answers] == [a.error is None for a in answers] == [True] * 4 + [False, True, False, True]
    assert "empty.png" in answers[4].error and "no such file" in answers[6].error
    assert [a.labels for a in answers if a.labels] == [a.labels for a in classifier.predict(files[:6], batch_size=3)] or workers  # batches differ
    came = []
    with pytest.raises(BadImage, match="empty.png.*--on_bad_image skip"): came.extend(classifier.stream(given[:6], batch_size=3))
    assert len(came) == 4
    with pytest.raises(UserError, match="no file or folder .*missing.png"): classifier.predict(given)


def test_an_error_that_may_pass_is_named_as_one(classifier, files):
    class Drive(io.BytesIO):
        def read(self, *size): raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(ReadError, match="could not be read just now"): classifier.predict([files[0], Drive()])
    assert [a.error is None for a in classifier.predict([files[0], Drive()], on_bad_image="skip")] == [True, False]


def test_a_folder_is_listed_as_for_training(run, classifier, tmp_path):
    os.symlink(run / "images" / CLASSES[0], tmp_path / "linked")
    os.symlink(tmp_path, tmp_path / "linked_back")
    (tmp_path / ".hidden").mkdir()
    picture(0, 0).save(tmp_path / ".hidden" / "a.png")
    picture(0, 0).save(tmp_path / "b.PNG")
    (tmp_path / "._b.png").write_bytes(b"no picture")
    answers = classifier.predict(tmp_path)
    assert [a.path for a in answers] == [str(f) for f in list_image_files(tmp_path)[0]] and len(answers) == 7


def test_the_precision_of_the_run_where_the_hardware_has_it(classifier, files, monkeypatch):
    from dataclasses import replace

    from dinov3_nb import inference
    seen = []
    hook = classifier.model.head.register_forward_pre_hook(lambda *_: seen.append(None))
    backbone = classifier.model.backbone.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for fast, asked, expected in ((True, "auto", True), (False, "auto", False), (True, "no", False), (True, "bf16", True), (True, "fp16", False)):
        monkeypatch.setattr(inference, "cpu_has_bfloat16", lambda fast=fast: fast)
        seen.clear()
        replace(classifier, config={"mixed_precision": asked}).predict(files[0])
        assert seen[0] is expected, (fast, asked)
    hook.remove(); backbone.remove()


# The command line

def test_what_was_computed_before_a_bad_picture_is_printed(run, tmp_path, capsys):
    for i in range(40): picture(i, i % 2).save(tmp_path / f"{i:02}.png")
    (tmp_path / "39.png").write_bytes(b"")
    assert main(["predict", "--checkpoint", str(run / "run"), "--top_k", "1", str(tmp_path)]) == 2
    out, said = capsys.readouterr()
    assert len(out.splitlines()) == 39 and said.count("\n") == 1 and said.startswith("dinov3-nb: row 39 (")
    assert main(["predict", "--checkpoint", str(run / "run"), "--json", "--on_bad_image", "skip", str(tmp_path)]) == 0
    out, said = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 40 and answers[39]["labels"] == [] and "cannot be decoded" in answers[39]["error"] and "error" not in answers[0]
    assert said.splitlines()[-1] == "1 of 40 images skipped"
    assert main(["predict", "--checkpoint", str(run / "run"), "--on_bad_image", "skip", str(tmp_path / "39.png")]) == 2
    assert "None of the 1 images could be read" in capsys.readouterr().err


def test_files_that_are_left_out_are_counted(run, tmp_path, capsys, monkeypatch):
    from dinov3_nb import pictures
    monkeypatch.setattr(pictures, "_reads_heic", lambda: False)  # as without pillow-heif
    for name in ("a.heic", "b.HEIC", "c.txt"): (tmp_path / name).write_bytes(b"something")
    assert main(["predict", "--checkpoint", str(run / "run"), str(tmp_path)]) == 2
    assert "3 files left out" in (said := capsys.readouterr().err) and "install pillow-heif" in said, said
    picture(0, 0).save(tmp_path / "d.png")
    assert main(["predict", "--checkpoint", str(run / "run"), str(tmp_path)]) == 0
    assert "3 files left out" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_output_that_cannot_hold_a_name(encoding, run, files, tmp_path, monkeypatch):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    try: odd.write_bytes(bits(files[0]))
    except OSError: pytest.skip("this file system takes names in UTF-8 only")
    for command in (["predict", "--top_k", "2", str(odd)], ["predict", "--json", str(odd)], ["evaluate"], ["evaluate", "--json"]):
        narrow = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", narrow)
        assert main([command[0], "--checkpoint", str(run / "run"), *command[1:]]) == 0
        narrow.flush()
        text = narrow.buffer.getvalue().decode(encoding)
        if "--json" in command: assert CLASSES[0] in json.dumps(json.loads(text), ensure_ascii=False)
        else: assert (CLASSES[0] if encoding == "utf-8" else "\\u0141") in text


def test_output_that_nobody_reads_any_more(run, files, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    assert main(["predict", "--checkpoint", str(run / "run"), *map(str, files)]) == 0


RUNGS = {"head": {}, "last": {"last_blocks": 1, "drop_path": 0.1}, "lora": {"lora_rank": 2}, "all": {"drop_path": 0.1}}


@pytest.mark.parametrize("tune, older", [("head", False), ("last", False), ("lora", False), ("all", False), ("head", True), ("all", True)])
def test_what_each_rung_has_tuned_comes_back(run, tune, older, tmp_path):
    "Files from before there were rungs say only whether the backbone was frozen."
    start = {} if tune == "head" else {"head_start": "random"}
    state = train(dataset=run / "images", num_workers=0, model_name="tiny", tune=tune, epochs=1, mixed_precision="no",
                  no_tracking=True, checkpoint_dir=tmp_path, log=lambda line: None, **RUNGS[tune], **start)
    file = tmp_path / "last.pt"
    if older:
        kept, names = read_checkpoint(file), TuneArguments.__dataclass_fields__
        save_atomically({**kept, "config": {k: v for k, v in kept["config"].items() if k not in names}}, file)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = load_classifier(file, "cpu").model
    with torch.no_grad(): assert torch.equal(model(pixels).logits, state.model.eval()(pixels).logits)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, p in state.model.named_parameters() if p.requires_grad]
    assert not model.training


HEAVY = set("datasets sklearn scipy pandas pyarrow accelerate bitsandbytes matplotlib trackio timm peft".split())
LATER = set("data training probe sources tables run evaluation".split())


def top_imports(name):
    "What a module of the package imports at its top: other modules of the package, and libraries."
    import dinov3_nb
    tree = ast.parse((Path(dinov3_nb.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    places = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    places += [f"dinov3_nb.{node.module or ''}" if node.level else node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    own = {place.split(".")[1] for place in places if place.startswith("dinov3_nb.")} - {""}  # `from . import __version__`
    return own, {place.split(".")[0] for place in places} - {"dinov3_nb"}


def reached_by(*names):
    "Modules of the package that these import, and those that they import in turn."
    reached, waiting = set(), [*names]
    while waiting:
        name = waiting.pop()
        if name in reached: continue
        reached.add(name)
        waiting += top_imports(name)[0]
    return reached


def test_what_predict_needs_imports_nothing_large():
    "Modules that are imported whenever the package is; what only some commands need is imported by them."
    reached = reached_by("cli", "inference", "cache")
    assert {"core", "pictures", "images", "backbone", "model", "quantization", "checkpoint", "features"} <= reached
    assert {"inputs", "cache", "store", "contents", "recipe", "decoding", "records"} <= reached  # `predict` looks up what is kept
    assert not reached & LATER
    for name in reached: assert not top_imports(name)[1] & HEAVY, name
