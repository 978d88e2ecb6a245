"What the data notebook would be cluttered by: every image kind, folder layout, table and way to be wrong."
import io
import shutil
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import forks
import numpy as np
import pytest
import torch
from forks import ENVIRONMENT
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import DINOv3ViTImageProcessor

from dinov3_nb.core import DataArguments, UserError
from dinov3_nb.data import (
    load_and_prepare_dataset, _read_labels, stratified_rows, _translate_labels,
)
from dinov3_nb.tables import find_column
from dinov3_nb.images import (
    Collator, EpochSampler, find_num_workers, ImageRows, make_loader,
)
from dinov3_nb.sources import load_digits_dataset
from dinov3_nb.pictures import BadImage, open_image, _scale_to_8_bits

datasets.disable_progress_bars()
PROCESSOR = DINOv3ViTImageProcessor(size={"height": 32, "width": 32})


def scene(height=24, width=32):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 - 6 * x, 7 * y, 40 + 0 * x], axis=-1).clip(0, 255).astype(np.uint8))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def write_folder(root, **classes):
    for name, count in classes.items():
        (Path(root) / name).mkdir(parents=True, exist_ok=True)
        for i in range(count): scene(8 + i).save(Path(root) / name / f"{i}.png")
    return Path(root)


def prepare(name, seed=42, **options):
    return load_and_prepare_dataset(DataArguments(dataset=str(name), **options), seed)


def named_labels(data, split):
    return [data.class_names[k] for k in data.labels[split]]


def own(labels, column="label", image="image", feature=None, count=None):
    "A dataset of tiny pictures with these labels."
    features = {image: datasets.Image()}
    table = {image: [scene(4, 4)] * len(labels), column: labels}
    if feature is None: return datasets.Dataset.from_dict({column: labels}).add_column(
        image, [encode(scene(4, 4), "PNG")] * len(labels), feature=datasets.Image())
    return datasets.Dataset.from_dict(table, features=datasets.Features({**features, column: feature}))


# ---------------------------------------------------------------- digits

def test_digits_are_the_agreed_ones():
    raw, digits = load_digits(), load_digits_dataset()
    rows = train_test_split(np.arange(1797), test_size=360, stratify=raw.target, random_state=0)
    for name, expected in zip(("train", "validation"), map(np.sort, rows)):
        assert digits[name]["label"] == raw.target[expected].tolist()
        for i in (0, 7, -1):
            image = digits[name][i]["image"]
            assert (image.mode, image.format) == ("L", "PNG")
            assert (np.asarray(image) == np.round(raw.images[expected[i]] * 255 / 16).astype(np.uint8)).all()
    assert digits["train"].features["label"].names == list("0123456789")


def test_digits_do_not_depend_on_the_seed():
    one, two = prepare("digits", seed=1), prepare("digits", seed=2)
    assert one.train["image"] == two.train["image"] and (one.labels["validation"] == two.labels["validation"]).all()


# ---------------------------------------------------------------- one image

GREY = np.asarray(scene().convert("L"))
KINDS = {
    "L": encode(scene().convert("L"), "PNG"), "I;16": encode(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "I;16 tiff": encode(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "I;16B": encode(Image.fromarray((GREY.astype(">u2") * 257)), "TIFF"),
    "I": encode(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), "F 0..1": encode(Image.fromarray(GREY / np.float32(255)), "TIFF"),
    "F 0..255": encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_grey_kinds_keep_their_values(kind):
    image = open_image(KINDS[kind], 0)
    assert image.mode == "RGB" and (np.asarray(image) == GREY[..., None]).all()


@pytest.mark.parametrize("kind,options,off", [("PNG", {}, 0), ("BMP", {}, 0), ("WEBP", {"lossless": True}, 0), ("TIFF", {}, 0),
                                              ("PPM", {}, 0), ("GIF", {}, 6), ("JPEG", {"quality": 98, "subsampling": 0}, 2)])
def test_formats(kind, options, off):
    found = np.asarray(open_image(encode(scene(), kind, **options), 0)).astype(int)
    assert np.abs(found - np.asarray(scene())).mean() <= off


def test_cmyk_jpeg():
    found = np.asarray(open_image(encode(scene().convert("CMYK"), "JPEG", quality=98, subsampling=0), 0)).astype(int)
    assert np.abs(found - np.asarray(scene())).mean() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparent_is_white_and_opaque_unchanged(mode):
    image = scene().convert("P") if mode == "PA" else scene()
    image.putalpha(Image.fromarray(np.where(np.arange(24)[:, None] < 12, 0, 255).astype(np.uint8).repeat(32, 1)))
    image = image.convert(mode)
    expected = {"LA": scene().convert("L"), "PA": scene().convert("P")}.get(mode, scene()).convert("RGB")
    found = np.asarray(open_image(image, 0))
    assert found.shape == (24, 32, 3) and (found[:12] == 255).all()
    assert (found[12:] == np.asarray(expected)[12:]).all()


def test_half_transparent_is_half_way_to_white():
    assert np.asarray(open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), 0)).ravel().tolist() == [127] * 3


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1)); image.putpalette([10, 20, 30, 200, 100, 50]); image.putpixel((1, 0), 1)
    found = np.asarray(open_image(encode(image, "PNG", transparency=0), 0))
    assert found[0].tolist() == [[255, 255, 255], [200, 100, 50]]
    assert np.asarray(open_image(encode(image, "PNG"), 0))[0].tolist() == [[10, 20, 30], [200, 100, 50]]


TURNS = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("wide", [False, True])
def test_every_exif_orientation_is_undone(orientation, wide):
    upright = Image.fromarray(GREY.astype(np.uint16) * 257) if wide else scene()
    stored = upright if TURNS[orientation] is None else upright.transpose(TURNS[orientation])
    exif = Image.Exif(); exif[0x0112] = orientation
    found = np.asarray(open_image(encode(stored, "PNG", exif=exif), 0))
    assert (found == (GREY[..., None] if wide else np.asarray(scene()))).all()


def test_scaling_covers_the_whole_range():
    assert _scale_to_8_bits(np.arange(65536, dtype=np.uint16).reshape(256, 256)).mean() == pytest.approx(127.5, abs=0.1)
    assert _scale_to_8_bits(np.zeros((2, 2), np.float32)).max() == 0
    assert _scale_to_8_bits(np.array([[0, 2**31 - 1]], np.int32)).tolist() == [[0, 255]]


def test_opening_does_not_change_the_callers_image():
    image = scene(); exif = image.getexif(); exif[0x0112] = 6
    before = image.tobytes(); open_image(image, 0)
    assert image.tobytes() == before and image.getexif()[0x0112] == 6


JPEG = encode(scene(200, 200), "JPEG")["bytes"]


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not an image", JPEG[:100], JPEG[:len(JPEG) // 2], b"\x89PNG\r\n\x1a\n" + b"\0" * 50, None])
def test_bad_images_name_row_and_path(data):
    with pytest.raises(BadImage, match=r"row 12 \(a/b\.jpg\) cannot be decoded: "):
        open_image({"bytes": data, "path": "a/b.jpg"}, 12)
    with pytest.raises(BadImage, match="row 3 cannot be decoded: there is no image"): open_image(None, 3)


# ---------------------------------------------------------------- sources

def test_folder_of_class_folders(tmp_path):
    data = prepare(write_folder(tmp_path, cat=20, dog=20))
    assert data.class_names == ["cat", "dog"] and (len(data.train), len(data.validation)) == (36, 4)
    paths = [{x["path"] for x in split["image"]} for split in (data.train, data.validation)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 40
    for split in ("train", "validation"):
        for row, name in zip(getattr(data, split), named_labels(data, split)): assert Path(row["image"]["path"]).parent.name == name


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "Val"])
def test_folder_of_splits(tmp_path, name):
    write_folder(tmp_path / "train", cat=3, dog=3, owl=1); write_folder(tmp_path / name, dog=2, owl=1)
    data = prepare(tmp_path)
    assert (len(data.train), named_labels(data, "validation")) == (7, ["dog", "dog", "owl"])
    assert any("no images of 1 of 3 classes (cat)" in note for note in data.notes)


def test_validation_names_have_an_order(tmp_path):
    write_folder(tmp_path / "train", cat=3, dog=3)
    for count, name in enumerate(("test", "valid", "val", "validation"), start=1): write_folder(tmp_path / name, cat=count, dog=count)
    assert len(prepare(tmp_path).validation) == 8


@pytest.mark.parametrize("flat", ["train", "val"])
def test_a_split_folder_without_class_folders_is_refused(tmp_path, flat):
    for name in {"train", "val", flat}:
        if name == flat: write_folder(tmp_path, **{name: 3})
        else: write_folder(tmp_path / name, cat=3, dog=3)
    with pytest.raises(UserError, match=f"has images directly inside {flat}: each of these needs one folder per class"):
        prepare(tmp_path)


def test_an_empty_split_folder_is_noted(tmp_path):
    write_folder(tmp_path / "train", cat=10, dog=10)
    for name in ("val/cat", "test", ".cache"): (tmp_path / name).mkdir(parents=True)
    data = prepare(tmp_path)
    assert len(data.validation) == 2
    for name in ("val", "test"): assert f"{tmp_path.name}: the folder {name!r} holds no images and is not used" in data.notes
    (tmp_path / "val" / "notes.txt").touch()
    assert len(prepare(tmp_path).validation) == 2


def test_an_empty_train_folder_is_no_training_split(tmp_path):
    write_folder(tmp_path / "val", cat=3, dog=3); (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="the training split has no images"): prepare(tmp_path)
    shutil.rmtree(tmp_path / "val"); (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="holds no images in class folders"): prepare(tmp_path)


def test_a_misspelt_split_and_loose_images_are_noted(tmp_path):
    write_folder(tmp_path / "train", cat=10, dog=10); write_folder(tmp_path / "validaton", cat=1, dog=1)
    scene().save(tmp_path / "train" / "loose.png")
    notes = prepare(tmp_path).notes
    assert f"{tmp_path.name}: folders that are no split: validaton" in notes
    assert "train: images left out, in no class folder: 1" in notes


def test_parquet_files_in_split_folders(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        own(["b", "a"] * 3).to_parquet(tmp_path / name / "0000.parquet")
    data = prepare(tmp_path)
    assert (len(data.train), len(data.validation)) == (6, 6)


def test_nested_and_odd_files(tmp_path):
    write_folder(tmp_path / "cat", deep=2); write_folder(tmp_path, dog=3); scene().save(tmp_path / "dog" / "upper.JPG")
    for name in ("cat/photo.xcf", "dog/notes.txt", "dog/._0.png", "readme.md"): (tmp_path / name).touch()
    data = prepare(tmp_path)
    assert len(data.train) + len(data.validation) == 6
    assert any("3 files left out because their ending is not an image's" in note and ".xcf" in note for note in data.notes)


def test_misspelt_class_in_validation(tmp_path):
    write_folder(tmp_path / "train", cat=3, dog=3); write_folder(tmp_path / "val", cat=1, dgo=1)
    with pytest.raises(UserError, match="'val' has labels that the training split lacks: dgo"): prepare(tmp_path)


@pytest.mark.parametrize("ending,delimiter", [("csv", ","), ("tsv", "\t")])
def test_csv_paths_are_relative_to_the_csv(tmp_path, ending, delimiter, monkeypatch):
    write_folder(tmp_path / "photos", cat=4, dog=4)
    lines = [delimiter.join(("path", "label"))] + [delimiter.join((f"photos/{n}/{i}.png", n)) for n in ("dog", "cat") for i in range(4)]
    (tmp_path / f"list.{ending}").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir("/")
    data = prepare(tmp_path / f"list.{ending}")
    assert data.class_names == ["cat", "dog"] and (len(data.train), len(data.validation)) == (6, 2)
    assert open_image(data.train[0][data.image_column], 0).mode == "RGB"


def test_csv_columns_as_told(tmp_path):
    write_folder(tmp_path, cat=4, dog=4)
    lines = ["where,species,id"] + [f"{n}/{i}.png,{n},{i}" for n in ("cat", "dog") for i in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="--image_column from where .string., species"): prepare(tmp_path / "list.csv")
    with pytest.raises(UserError, match="--label_column from"): prepare(tmp_path / "list.csv", image_column="where")
    assert prepare(tmp_path / "list.csv", image_column="where", label_column="species").class_names == ["cat", "dog"]


@pytest.mark.parametrize("text", ["", "path,label\nx,1,2\n"])
def test_broken_csv(tmp_path, text):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match="cannot be read"): prepare(tmp_path / "list.csv")
    (tmp_path / "list.parquet").write_text("nonsense")
    with pytest.raises(UserError, match="cannot be read"): prepare(tmp_path / "list.parquet")


def test_parquet_with_and_without_feature_types(tmp_path):
    dataset = own(["b", "a"] * 10)
    dataset.to_parquet(tmp_path / "typed.parquet")
    bare = dataset.cast_column("image", datasets.Image(decode=False)).with_format("pandas")[:]
    bare["image"] = [x["bytes"] for x in bare["image"]]
    bare.to_parquet(tmp_path / "bare.parquet")
    for name in ("typed", "bare"):
        data = prepare(tmp_path / f"{name}.parquet")
        assert data.class_names == ["a", "b"] and open_image(data.train[0]["image"], 0).size == (4, 4)


def test_folder_of_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"): own(["b", "a"] * 3).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    data = prepare(tmp_path)
    assert (len(data.train), len(data.validation)) == (6, 6)


def test_saved_dataset_and_dict(tmp_path):
    dataset = own(["b", "a"] * 10)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, valid=dataset.select(range(4))).save_to_disk(tmp_path / "two")
    assert len(prepare(tmp_path / "one").validation) == 2 and len(prepare(tmp_path / "two").validation) == 4


# ---------------------------------------------------------------- layouts by feature type

IMAGENET = datasets.ClassLabel(names=["tench, Tinca tinca", "goldfish", "great white shark"])


@pytest.mark.parametrize("image,label", [("image", "label"), ("img", "label"), ("img", "fine_label"), ("jpg", "cls")])
def test_known_layouts(image, label):
    train = own([0, 1, 2] * 4, label, image, IMAGENET)
    data = load_and_prepare_dataset(DataArguments(), dataset={"train": train, "validation": train})
    assert (data.image_column, data.label_column, data.class_names) == (image, label, IMAGENET.names)
    assert data.labels["train"].tolist() == [0, 1, 2] * 4


def test_hidden_labels_are_never_used():
    train, hidden = own([0, 1, 2] * 10, feature=IMAGENET), own([-1] * 6, feature=IMAGENET)
    data = load_and_prepare_dataset(DataArguments(), dataset={"train": train, "test": hidden})
    assert len(data.validation) == 3 and data.labels["validation"].min() == 0
    assert any("'test' has no labels" in note for note in data.notes)
    some = own([0, 1, 2, -1] * 10, feature=IMAGENET)
    data = load_and_prepare_dataset(DataArguments(), dataset={"train": some, "validation": some})
    assert len(data.train) == 30 and any(note == "train: images left out because they have no label: 10" for note in data.notes)


def test_classes_declared_but_not_in_train():
    train, validation = own([0, 1] * 3, feature=IMAGENET), own([0, 1, 2], feature=IMAGENET)
    data = load_and_prepare_dataset(DataArguments(), dataset={"train": train, "validation": validation})
    assert len(data.class_names) == 3 and any(note.startswith("train: no images of 1 of 3") for note in data.notes)


@pytest.mark.parametrize("labels,names", [(["b", "a", None, ""], ["a", "b"]), ([7, 3, -1, None], ["3", "7"]), ([True, False], ["False", "True"])])
def test_labels_are_numbered(labels, names):
    data = load_and_prepare_dataset(DataArguments(), dataset={"train": own(labels * 2), "val": own(labels)})
    assert data.class_names == names
    assert named_labels(data, "train") == [str(x) for x in labels * 2 if x not in (None, "", -1)]


def test_splits_that_number_their_classes_differently():
    train = own([0, 1] * 3, feature=datasets.ClassLabel(names=["cat", "dog"]))
    validation = own([0, 1], feature=datasets.ClassLabel(names=["dog", "cat"]))
    data = load_and_prepare_dataset(DataArguments(), dataset={"train": train, "validation": validation})
    assert named_labels(data, "validation") == ["dog", "cat"]


def test_shuffled_dataset_of_ones_own():
    dataset = own([f"{k % 3}" for k in range(30)]).add_column("row", list(range(30))).shuffle(seed=0)
    data = load_and_prepare_dataset(DataArguments(), dataset=dataset)
    for name in ("train", "validation"): assert data.labels[name].tolist() == [row % 3 for row in getattr(data, name)["row"]]


def test_images_given_as_paths(tmp_path):
    write_folder(tmp_path, a=4)
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a" / f"{i}.png") for i in range(4)], "label": ["x", "y"] * 2})
    data = load_and_prepare_dataset(DataArguments(), dataset=dataset)
    assert open_image(data.train[0]["image"], 0).mode == "RGB"


def test_images_are_not_decoded_while_preparing():
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": b"broken", "path": None}] * 20, "label": ["a", "b"] * 10},
                                         features=datasets.Features(image=datasets.Image(), label=datasets.Value("string")))
    assert len(load_and_prepare_dataset(DataArguments(train_split_ratio=0.5), dataset=dataset).train) == 9


@pytest.mark.parametrize("labels,message", [(["a"] * 4, "only the class 'a'"), ([-1, -1], "no labels"), (["a", "b"], "no class has two images")])
def test_useless_labels(labels, message):
    with pytest.raises(UserError, match=message): load_and_prepare_dataset(DataArguments(), dataset=own(labels))


def test_missing_columns_and_splits():
    for options, message in (({"label_column": "labl"}, "'labl' is not there: the columns are"), ({"image_column": "label"}, "cannot be read as images")):
        with pytest.raises(UserError, match=message): load_and_prepare_dataset(DataArguments(**options), dataset=own([1, 2]))
    with pytest.raises(UserError, match="no split named 'train'"): load_and_prepare_dataset(DataArguments(), dataset={"a": own([1, 2]), "b": own([1, 2])})
    with pytest.raises(UserError, match="IterableDataset"): load_and_prepare_dataset(DataArguments(), dataset=own([1, 2]).to_iterable_dataset())
    with pytest.raises(UserError, match="no images"): load_and_prepare_dataset(DataArguments(), dataset=own([0, 1], feature=IMAGENET).select([]))
    with pytest.raises(UserError, match="2 columns hold labels"):
        find_column({"image": datasets.Image(), "one": IMAGENET, "two": IMAGENET}, "label")


# ---------------------------------------------------------------- names that lead nowhere

@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "none.csv", "~/no_such_thing_here", "bad name!"])
def test_missing_paths_are_not_sought_on_the_hub(name):
    with pytest.raises(UserError, match="does not exist"): prepare(name)


def test_folders_without_images(tmp_path):
    with pytest.raises(UserError, match="one folder per class"): prepare(tmp_path)
    scene().save(tmp_path / "loose.png")
    with pytest.raises(UserError, match="one folder per class"): prepare(tmp_path)
    with pytest.raises(UserError, match="not a csv, tsv or parquet"): prepare(tmp_path / "loose.png")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"): prepare(tmp_path)


HUB = """
import sys, time
from dinov3_nb.core import DataArguments, UserError
from dinov3_nb.data import load_and_prepare_dataset
for name in sys.argv[1:]:
    start = time.perf_counter()
    try: print("loaded:", load_and_prepare_dataset(DataArguments(dataset=name)).notes[-2])
    except UserError as error: print(error)
    assert time.perf_counter() - start < 5
"""


def ask_hub(folder, *names, **environment):
    "The lines printed by a fresh process that loads these names with these settings and an empty cache."
    home = {} if environment == {"HF_HUB_OFFLINE": "1"} else {"HF_HOME": folder}  # the tests' own cache is empty, too
    run = forks.run([sys.executable, "-c", HUB, *names], folder, {**ENVIRONMENT, **home, **environment}, timeout=120)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(names), run.stdout
    return lines


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
                         ids=["offline", "unreachable"])
def test_no_network(environment, tmp_path):
    names = ("ethz/food101", "no_such_dataset")
    for name, line in zip(names, ask_hub(tmp_path, *names, **environment)): assert "cannot be reached" in line and repr(name) in line


class Hub(BaseHTTPRequestHandler):
    "Answers as the Hub does: the status, and the reason in the header X-Error-Code."
    def do_GET(self):
        status, code = (403, "GatedRepo") if "gated" in self.path else (401 if "private" in self.path else 404, "RepoNotFound")
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("Content-Length", "0")): self.send_header(header, value)
        self.end_headers()
    do_HEAD = do_GET

    def log_message(self, *_): pass


def test_what_the_hub_says(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try: lines = ask_hub(tmp_path, "some/gated", "some/private", "some/misspelt", HF_HUB_OFFLINE="0",
                         HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally: server.shutdown(); server.server_close()
    for line, sentence in zip(lines, ("is gated: ask for access", "check the name", "check the name")): assert sentence in line


def test_an_earlier_download_works_without_network(tmp_path):
    "What `load_dataset` leaves in its cache, made here from a parquet file and put under a Hub name."
    own(["a", "b"] * 5).to_parquet(tmp_path / "train.parquet")
    datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "built"))
    made = next((tmp_path / "built").glob("parquet/*/*/*/dataset_info.json")).parent
    place = tmp_path / "home" / "datasets" / "some___data" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(made, place)
    for file in place.glob("*.arrow"): file.rename(file.with_name(file.name.replace("parquet", "data")))
    info = (place / "dataset_info.json").read_text().replace(made.parts[-3], "default").replace('"dataset_name": "parquet"', '"dataset_name": "data"')
    (place / "dataset_info.json").write_text(info)
    line, = ask_hub(tmp_path, "some/data", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9",
                    HF_HOME=str(tmp_path / "home"), HF_DATASETS_CACHE=str(tmp_path / "home" / "datasets"))
    assert line == "loaded: train: 8 of 8 images (100 %)"


# ---------------------------------------------------------------- shares

def test_stratified_rows_on_random_labels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels = rng.integers(-1, rng.integers(1, 9), rng.integers(20, 400)); share = rng.uniform(0.01, 1)
        rows, counts = stratified_rows(labels, share, 0), np.bincount(labels[labels >= 0])
        assert (np.diff(rows) > 0).all() and (labels[rows] >= 0).all()
        taken = np.bincount(labels[rows], minlength=len(counts))
        assert (taken[counts > 0] >= 1).all() and (np.abs(taken - counts * share) <= 1).all()
        left = np.setdiff1d(np.flatnonzero(labels >= 0), stratified_rows(labels, 0.1, 0, spare=1))
        assert set(labels[left]) == set(labels[labels >= 0])


def test_stratified_rows_are_fast_on_imagenet():
    labels = np.repeat(np.arange(1000), 1281)
    start = time.perf_counter()
    assert len(stratified_rows(labels, 0.1, 0)) == 128_100 and time.perf_counter() - start < 5


@pytest.mark.parametrize("options,sizes", [({}, (600, 600)), ({"train_split_ratio": 0.05}, (300, 600)), ({"val_split_ratio": 0.5}, (600, 3000))])
def test_default_shares(options, sizes):
    feature = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=3))
    big = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * 6000, "label": [0, 1, 2] * 2000}, features=feature)
    data = load_and_prepare_dataset(DataArguments(**options), dataset={"train": big, "validation": big})
    assert (len(data.train), len(data.validation)) == sizes
    assert np.ptp(np.bincount(data.labels["train"])) == 0
    assert data.notes[-2] == f"train: {sizes[0]:,} of 6,000 images ({sizes[0] / 60:.3g} %)"


def test_a_share_leaves_each_class_an_image(tmp_path):
    data = prepare(write_folder(tmp_path, cat=30, dog=20, owl=1), train_split_ratio=0.5)
    assert np.bincount(data.labels["train"]).tolist() == [14, 9, 1] and np.bincount(data.labels["validation"]).tolist() == [3, 2]
    assert data.notes[-2] == "train: 24 of 46 images (52.2 %)"  # 23, and the owl
    for item, name in zip(map(data.rows("train").__getitem__, range(24)), named_labels(data, "train")):
        assert Path(item["image"]["path"]).parent.name == name


@pytest.mark.parametrize("options,message", [
    ({"train_split_ratio": 0}, "--train_split_ratio 0 "), ({"train_split_ratio": "0.5"}, "--train_split_ratio '0.5' is not a number"),
    ({"val_split_ratio": 2}, "--val_split_ratio 2 "), ({"on_bad_image": "ignore"}, "stop, skip"), ({"dataset": ""}, "--dataset is empty"),
])
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message): DataArguments(**options)


def test_seed_changes_the_draw():
    drawn = [prepare("digits", seed=s, train_split_ratio=0.5).train["image"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_labels_are_read_and_translated_in_order():
    digits = load_digits_dataset()["validation"]
    names, labels = _read_labels(digits, "label")
    assert labels.tolist() == digits["label"] and (_translate_labels(labels, names, names[::-1], "v") == 9 - labels).all()


# ---------------------------------------------------------------- batches

@pytest.fixture(scope="module")
def rows():
    data = prepare("digits")
    return ImageRows(data.train.select(range(40)), data.image_column, data.labels["train"][:40])


def run_epochs(rows, num_workers, batch_size=16, **options):
    collator, sampler = Collator(PROCESSOR, augment="crop_flip"), EpochSampler(len(rows), seed=3)
    loader, epochs = make_loader(rows, collator, batch_size, sampler, num_workers, **options), []
    for epoch in (0, 1, 5):
        sampler.epoch = collator.epoch = epoch
        epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    return epochs


def test_batches_do_not_depend_on_workers_or_batch_size(rows):
    torch.manual_seed(0)
    plain = run_epochs(rows, 0)
    torch.manual_seed(1)
    for other in (run_epochs(rows, 2), run_epochs(rows, 1, multiprocessing_context="spawn"), run_epochs(rows, 0, batch_size=7)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other))
    assert not torch.equal(plain[0].sort(0).values, plain[1].sort(0).values)


def test_loading_leaves_the_global_generators_alone(rows):
    torch.manual_seed(0); np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Collator(PROCESSOR, augment="crop_flip")([rows[i] for i in range(4)]); list(EpochSampler(9, 0))
    assert torch.equal(before, torch.get_rng_state()) and (numpy_before == np.random.get_state()[1]).all()


def test_resumed_order_is_the_tail(rows):
    for start in (0, 1, 16, 39, 40):
        whole, tail = EpochSampler(40, 9), EpochSampler(40, 9)
        whole.epoch = tail.epoch = 4; tail.start = start
        assert list(tail) == list(whole)[start:] and len(tail) == 40 - start
    sampler = EpochSampler(40, 9); sampler.start = 16
    assert len(make_loader(rows, Collator(PROCESSOR), 8, sampler)) == 3


def broken_rows(count=9, bad=(4,)):
    images = [{"bytes": b"" if i in bad else encode(scene(), "PNG")["bytes"], "path": f"{i}.png"} for i in range(count)]
    features = datasets.Features(image=datasets.Image(decode=False))
    return ImageRows(datasets.Dataset.from_dict({"image": images}, features=features), labels=np.arange(count))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_image_stops_with_one_sentence_or_is_skipped(num_workers):
    with pytest.raises(BadImage) as caught: list(make_loader(broken_rows(), Collator(PROCESSOR), 3, num_workers=num_workers))
    assert str(caught.value).startswith("row 4 (4.png) cannot be decoded") and "\n" not in str(caught.value)
    loader = make_loader(broken_rows(bad=(3, 4, 5)), Collator(PROCESSOR, on_bad_image="skip"), 3, num_workers=num_workers)
    batches = list(loader)
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2], [], [6, 7, 8]]
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(3, 3, 32, 32), (0, 3, 32, 32), (3, 3, 32, 32)]
    assert [len(batch["skipped"]) for batch in batches] == [0, 3, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 5), (4, 900)])
def test_any_picture_size(size):
    batch = Collator(PROCESSOR)([{"image": Image.new("RGB", size), "label": 0, "row": 0}] * 2)
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32


def test_timm_processor():
    timm_wrapper = pytest.importorskip("transformers.models.timm_wrapper.image_processing_timm_wrapper")
    pytest.importorskip("timm")
    processor = timm_wrapper.TimmWrapperImageProcessor(pretrained_cfg={"input_size": (3, 48, 48), "interpolation": "bicubic",
                                                                       "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0})
    batch = Collator(processor)([{"image": scene(), "label": 1, "row": 0}] * 3)
    assert batch["pixel_values"].shape == (3, 3, 48, 48) and batch["labels"].tolist() == [1, 1, 1]


def test_workers_for_large_sets_only():
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    photos = ImageRows(datasets.Dataset.from_dict({"image": [{"bytes": b" " * 500_000, "path": None}] * 200, "label": [0] * 200}, features=features))
    assert [find_num_workers(photos, cores) for cores in (1, 2, 4, 64)] == [0, 2, 4, 8]
    assert find_num_workers(broken_rows(), 8) == 0
