"Kinds of folders, tables and datasets that other people have: each case of a kind, and others like it."
import json
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from dinov3_nb.core import DataArguments, UserError
from dinov3_nb.data import _check_labels, _cut_validation, _keep_undecoded, _translate_labels, load_and_prepare_dataset, load_labelled_splits, _read_labels
from dinov3_nb.pictures import IMAGE_ENDINGS, describe_left_out, list_image_files, list_image_names, open_image
from dinov3_nb.sources import _note_unlisted, _read_class_folders, _split_by_folder, split_kinds, writable
from dinov3_nb.tables import Columns, _absolute_paths, _as_text, _column_as_text, anchor_paths, normalize_paths, path_dataset, shorten

datasets.disable_progress_bars()
PICTURE = Image.new("RGB", (4, 4), "orange")


def write_folder(root, **classes):
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count): PICTURE.save(root / name / f"{i}.png")
    return root


def prepare(name, **options):
    return load_and_prepare_dataset(DataArguments(dataset=str(name), **options))


def whole(name, dataset=None, **options):
    "{split: (class names, labels)} as `evaluate` sees them."
    splits = load_labelled_splits(DataArguments(dataset=str(name), **options), [], dataset)
    return {name: (split.class_names, split.labels.tolist()) for name, split in splits.items()}


def table(path, text, encoding="utf-8"):
    "The labels of a table, as names, in the order of its rows."
    path.write_bytes(text.encode(encoding))
    split, = load_labelled_splits(DataArguments(dataset=str(path)), []).values()
    return [split.class_names[k] if k >= 0 else None for k in split.labels]


def lines(heading, *labels, sign=","):
    return "\n".join([heading] + [f"{i}.png{sign}{label}" for i, label in enumerate(labels)]) + "\n"


def own(labels, feature=None):
    features = datasets.Features(image=datasets.Image(), label=feature or datasets.Value("string"))
    return datasets.Dataset.from_dict({"image": [PICTURE] * len(labels), "label": labels}, features)


# ---------------------------------------------------------------- names of splits

@pytest.mark.parametrize("names,expected", [
    (["training_set", "test_set"], "train test"), (["Training", "Testing"], "train test"), (["seg_train", "seg_test", "seg_pred"], "train test"),
    (["asl_alphabet_train", "asl_alphabet_test"], "train test"), (["train", "dev"], "train validation"), (["train", "eval"], "train validation"),
    (["TRAIN", "Valid", "Test"], "train validation test"), (["trainset", "valset", "testset"], "train validation test"),
    (["Training Data", "Validation-Data"], "train validation"), (["trainImages", "testImages"], "train test"),
    (["train2017", "val2017"], "train validation"), (["train_images", "validation_set"], "train validation"),
    (["train", "bus", "car"], "train"), (["train station", "test tube"], ""), (["dev_board", "train_ticket"], ""), (["invalid", "contest", "restrained"], ""),
])
def test_split_names(names, expected):
    assert " ".join(split_kinds(names).values()) == expected


@pytest.mark.parametrize("train,test", [("training_set", "test_set"), ("seg_train/seg_train", "seg_test/seg_test"), ("Training", "Testing"),
                                        ("train/images", "test/images"), ("archive/data/train", "archive/data/test")])
def test_folders_of_splits_are_no_classes(tmp_path, train, test):
    write_folder(tmp_path / train, cat=10, dog=10), write_folder(tmp_path / test, cat=2, dog=2)
    data = prepare(tmp_path)
    assert (data.class_names, len(data.train), len(data.validation)) == (["cat", "dog"], 18, 2)
    assert any("stays unseen" in note for note in data.notes)
    assert [len(labels) for names, labels in whole(tmp_path).values()] == [20, 4]


@pytest.mark.parametrize("name,size", [("dev", 4), ("eval", 4), ("validation_set", 4), ("testing", 2), ("extra", 2)])
def test_splits_of_ones_own_dataset(name, size):
    data = load_and_prepare_dataset(DataArguments(), dataset=datasets.DatasetDict({"train": own(["a", "b"] * 10), name: own(["a", "b"] * 2)}))
    assert len(data.validation) == size and (size == 4) != any(repr(name) in note for note in data.notes)


@pytest.mark.parametrize("names,sentence", [(("val", "test"), "no split named 'train': the dataset has val, test"),
                                            (("batch1", "batch2"), "batch1, batch2 that all hold cat, dog"), (("a", "b", "c"), "all hold cat, dog"),
                                            (("train_2021", "train_2022"), "several splits could be the one to learn from")])
def test_splits_by_other_names_are_refused(tmp_path, names, sentence):
    for name in names: write_folder(tmp_path / name, cat=3, dog=3)
    with pytest.raises(UserError, match=sentence): prepare(tmp_path)


def test_classes_with_one_folder_each_are_classes(tmp_path):
    for name in ("n01", "n02"): write_folder(tmp_path / name, images=5)
    write_folder(tmp_path / "n03", deep=2, deeper=2)
    assert prepare(tmp_path).class_names == ["n01", "n02", "n03"]


def test_class_folders_one_deeper_are_pointed_at(tmp_path):
    write_folder(tmp_path / "all", cat=3, dog=3)
    with pytest.raises(UserError, match="only the class 'all'.*which holds cat, dog: if these are the classes, give all as --dataset"): prepare(tmp_path)
    assert whole(tmp_path) == {"train": (["all"], [0] * 6)}


def test_the_log_names_the_first_classes(tmp_path):
    assert "with 12 classes (k00, k01, k02, k03, k04 ...)" in " ".join(prepare(write_folder(tmp_path, **{f"k{i:02}": 2 for i in range(12)})).notes)


@pytest.mark.parametrize("hidden", ["._0.png", ".DS_Store"])
def test_hidden_files_make_no_flat_split(tmp_path, hidden):
    write_folder(tmp_path / "train", a=10, b=10)
    (tmp_path / "val").mkdir(); (tmp_path / "val" / hidden).touch(); (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    data = prepare(tmp_path)
    assert len(data.validation) == 2 and not any("MACOSX" in note for note in data.notes)


def test_a_column_of_splits_in_a_table_is_said(tmp_path):
    (tmp_path / "list.csv").write_text(lines("file,label,Split", *["a,train", "b,test"] * 5))
    assert "list.csv: the column 'Split' is not looked at: all rows are one split" in prepare(tmp_path / "list.csv").notes


def test_a_test_folder_without_labels_is_left_out(tmp_path):
    for name in ("train", "val"): write_folder(tmp_path / name, a=4, b=4)
    write_folder(tmp_path, test_images=5)
    data = prepare(tmp_path)
    assert len(data.validation) == 8 and any("'test_images' holds images without labels" in note for note in data.notes)
    shutil.rmtree(tmp_path / "val")
    assert len(prepare(tmp_path).validation) == 2 and list(whole(tmp_path)) == ["train"]


def test_an_empty_class_folder_is_said(tmp_path):
    write_folder(tmp_path / "train", ant=0, bee=4, fly=4), write_folder(tmp_path / "val", bee=2, fly=2)
    data = prepare(tmp_path)
    assert (data.class_names, data.labels["validation"].tolist()) == (["bee", "fly"], [0, 0, 1, 1])
    assert "train: class folders without images: ant" in data.notes
    write_folder(tmp_path / "val", ant=1)
    with pytest.raises(UserError, match="lacks: ant.*train: class folders without images: ant"): prepare(tmp_path)
    assert whole(tmp_path)["val"] == (["ant", "bee", "fly"], [0, 1, 1, 2, 2])


# ---------------------------------------------------------------- what evaluate gets

def test_whole_splits_for_evaluate(tmp_path):
    for name, count in (("train", 10), ("val", 4), ("test", 30)): write_folder(tmp_path / name, a=count, b=count)
    assert {name: len(labels) for name, (_, labels) in whole(tmp_path).items()} == {"train": 20, "val": 8, "test": 60}
    assert whole(tmp_path / "test") == {"train": (["a", "b"], [0] * 30 + [1] * 30)}
    shutil.rmtree(tmp_path / "train"); shutil.rmtree(tmp_path / "val")
    assert list(whole(tmp_path)) == ["test"]
    shutil.rmtree(tmp_path / "test" / "a")
    assert whole(tmp_path) == {"test": (["b"], [0] * 30)} and whole(tmp_path / "test") == {"train": (["b"], [0] * 30)}


def test_large_splits_are_not_cut_and_rows_can_be_found_again():
    big = datasets.Dataset.from_dict({"image": [{"bytes": b"%d" % i, "path": None} for i in range(6000)], "label": [0, 1, 2] * 2000},
                                     datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=3)))
    data, split = load_and_prepare_dataset(DataArguments(), dataset=big), load_labelled_splits(DataArguments(), [], big)["train"]
    assert len(split.rows()) == 6000 and data.held_out.split == "train"
    for found in (split.rows(data.held_out.rows), data.rows("validation")):
        assert [found[i]["image"]["bytes"] for i in (0, 5, -1)] == [b"%d" % data.held_out.rows[i] for i in (0, 5, -1)]
        assert [found[i]["label"] for i in range(len(found))] == (data.held_out.rows % 3).tolist()
    assert not {x["bytes"] for x in data.train["image"]} & {x["bytes"] for x in data.validation["image"]}


def test_the_only_split_is_learned_from_whatever_its_name(tmp_path):
    write_folder(tmp_path / "test", a=5, b=5)
    assert "train: the split 'test', because there is no other" in prepare(tmp_path).notes


def test_labels_out_of_range_are_a_sentence():
    table = datasets.Dataset.from_dict({"image": [PICTURE] * 3, "label": [0, 1, 7]}, datasets.Features(image=datasets.Image(), label=datasets.Value("int64")))
    wrong = datasets.Dataset(table.data, datasets.DatasetInfo(features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))))
    with pytest.raises(UserError, match="holds the label 7, and has names for 2 classes"): whole("x", wrong)


def test_float_labels_of_a_typed_table_are_a_sentence(tmp_path):
    datasets.Dataset.from_dict({"path": ["a.png", "b.png"], "label": [1.0, None]}).to_parquet(tmp_path / "list.parquet")
    with pytest.raises(UserError, match="'label' holds fractions, and no whole numbers or text"): prepare(tmp_path / "list.parquet")


def test_no_labels_at_all_is_a_sentence():
    with pytest.raises(UserError, match="no image has a label"): whole("x", own(["", None, ""]))
    assert list(whole("x", {"a": own(["x"]), "b": own([""]), "c": own(["y"]).remove_columns("label")})) == ["a"]


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("labels", [["007", "042"], ["1", "01", "2"], ["0x1F", "0x20"], ["true", "false"], ["2021-05-01", "2022-05-01"], ["1E2", "3E5"],
                                    ["1.0", "2.0"], ["NA", "EU"], ["None", "nan", "null"], ["+1", "1"], ["12345678901234567890123", "1"], ["10:30", "1_000"], ["-0", "0"]])
def test_labels_stay_as_they_are_written(tmp_path, labels):
    assert table(tmp_path / "list.csv", lines("file,label", *labels * 2)) == labels * 2


def test_a_large_table_reads_like_a_small_one(tmp_path):
    written = ["5", "6"] * 50_000 + ["007", "true"]
    assert table(tmp_path / "list.csv", lines("file,label", *written)) == written


def test_whole_numbers_are_in_order_of_value(tmp_path):
    (tmp_path / "list.csv").write_text(lines("file,label", *"10 2 1 -1 10 2 1".split()))
    assert prepare(tmp_path / "list.csv").class_names == ["1", "2", "10"]


@pytest.mark.parametrize("heading,tail", [("file,label,,", ",,"), ("file,label,note,note", ",x,y"), ("file,label,", ","), ("file,label", ","), ("file,label,a b", ',"x\ny"')])
def test_other_columns_do_no_harm(tmp_path, heading, tail):
    assert table(tmp_path / "list.csv", lines(heading, "oak" + tail, "elm" + tail)) == ["oak", "elm"]


@pytest.mark.parametrize("text,encoding", [
    (lines("file;label", "oak", "élm", sign=";"), "utf-8"), (lines("file\tlabel", "oak", "élm", sign="\t"), "utf-16"), (lines("file,label", "oak", "élm"), "cp1252"),
    (lines("file, label", " oak", " élm "), "utf-8-sig"), (lines("file,label", "oak", "élm").replace("\n", "\r\n"), "utf-8"), (lines("file,label", "oak", "élm").replace("\n", "\r"), "utf-8"),
    ('"file","label"\n"0.png", "oak"\n"1.png", "élm"\n', "utf-8"), ("sep=;\n" + lines("file;label", "oak", "élm", sign=";"), "cp1252"),
    ("\n\nfile,label\n0.png,oak\n\n1.png,élm\n,\n,\n", "utf-8"), (",file,label\n0,0.png,oak\n1,1.png,élm", "utf-8")])
def test_tables_as_programs_write_them(tmp_path, text, encoding):
    assert table(tmp_path / "list.csv", text, encoding) == ["oak", "élm"]


@pytest.mark.parametrize("data,sentence", [
    (b"file,label\n", "headings but no rows"), (b"file,label,label\n0.png,a,b\n", "2 columns named 'label'"), (b"cat/0.png,cat\ncat/1.png,cat\n", "has no headings"),
    (b'file,label\n0.png,"oak\n1.png,elm\n', "a quote is not closed"), (b"file,label\n0.png,oak\n1.png\n", "row 3 has 1 columns and the headings are 2"),
    (b"file,label\n0.png,\x81\x8d\n", "not UTF-8"), ("file,label\n0.png,oak\n".encode("utf-16-le"), "not plain text"),
    (lines("file,label", *(i / 7 for i in range(40))).encode(), "holds measurements"), (b"file,label\n0.png,-1\n1.png,1\n", "only the class '1' .1 labels are None, empty or -1")])
def test_tables_that_cannot_be_read_say_why(tmp_path, data, sentence):
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(UserError, match=sentence): prepare(tmp_path / "list.csv")


def test_missing_labels_and_paths_of_a_table(tmp_path):
    assert table(tmp_path / "list.csv", lines("file,label", "oak", "-1", "", " ")) == ["oak", None, None, None]
    assert table(tmp_path / "list.csv", lines("file,label", "1.0", "nan", "", "-1.0")) == ["1.0", None, None, None]
    (tmp_path / "list.csv").write_text("file,label\n0.png,oak\n,oak\n" + "1.png,elm\n2.png,oak\n3.png,elm\n")
    data = prepare(tmp_path / "list.csv")
    assert len(data.train) + len(data.validation) == 4 and "list.csv: rows left out because they have no path: 1" in data.notes


@pytest.mark.parametrize("kind", ["string", "struct", "Image", "mixed"])
def test_paths_in_parquet_count_from_the_file(tmp_path, kind, monkeypatch):
    write_folder(tmp_path / "p", a=4)
    paths = [f"a/{i}.png" for i in range(4)]
    data = (tmp_path / "p/a/0.png").read_bytes()
    images = paths if kind == "string" else [{"bytes": data if kind == "mixed" and i else None, "path": path} for i, path in enumerate(paths)]
    feature = {"string": datasets.Value("string"), "struct": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}.get(kind, datasets.Image())
    made = datasets.Dataset.from_dict({"label": ["x", "y"] * 2, "image": images}, datasets.Features(label=datasets.Value("string"), image=feature))
    pyarrow.parquet.write_table(made.data.table, tmp_path / "p" / "list.parquet")
    monkeypatch.chdir("/")
    rows = load_labelled_splits(DataArguments(dataset=str(tmp_path / "p" / "list.parquet")), [])["train"].rows()
    assert [open_image(rows[i]["image"], i).size for i in range(4)] == [(4, 4)] * 4
    assert rows[0]["image"]["path"] == str(tmp_path / "p/a/0.png")


# ---------------------------------------------------------------- metadata beside pictures

def write_metadata(path, *rows):
    if path.suffix == ".csv": path.write_text("file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    else: path.write_text("".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in rows))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_metadata_holds_the_labels_and_folders_do_not(tmp_path, ending):
    write_folder(tmp_path, north=4, south=4)
    rows = [(f"{place}/{i}.png", ("007", "7")[i % 2]) for place in ("north", "south") for i in range(4)]
    write_metadata(tmp_path / f"metadata.{ending}", *rows)
    names, labels = whole(tmp_path)["train"]
    assert [names[k] for k in labels] == [label for _, label in rows]
    assert any("images left out, not listed in metadata" in note for note in prepare(write_folder(tmp_path, west=2)).notes)


@pytest.mark.parametrize("place", ["", "train", "train/images", "photos/2021/june"])
def test_metadata_beside_flat_pictures(tmp_path, place):
    write_folder(tmp_path, **{place or ".": 6})
    write_metadata(tmp_path / place / "metadata.csv", *((f"{i}.png", "ab"[i % 2]) for i in range(6)))
    assert whole(tmp_path) == {"train": (["a", "b"], [0, 1] * 3)}


def test_metadata_of_each_split_or_of_all(tmp_path):
    write_folder(tmp_path, train=6, test=2)
    rows = {"train": [(f"{i}.png", i % 2) for i in range(6)], "test": [(f"{i}.png", 1) for i in range(2)]}
    for name in rows: write_metadata(tmp_path / name / "metadata.jsonl", *rows[name])
    expected = {"train": (["0", "1"], [0, 1] * 3), "test": (["1"], [0, 0])}
    assert whole(tmp_path) == expected and len(prepare(tmp_path).train) == 4
    for name in rows: (tmp_path / name / "metadata.jsonl").unlink()
    write_metadata(tmp_path / "metadata.csv", *((f"{name}/{file}", label) for name in rows for file, label in rows[name]))
    assert whole(tmp_path) == expected


def test_metadata_without_labels_asks_and_of_another_kind_is_passed_over(tmp_path):
    write_folder(tmp_path, cat=4, dog=4)
    (tmp_path / "metadata.csv").write_text("file_name,text,kind\ncat/0.png,a cat,x\ncat/1.png,cats,y\n")
    with pytest.raises(UserError, match="choose one with --label_column from file_name .string., text"): prepare(tmp_path)
    assert whole(tmp_path, label_column="kind") == {"train": (["x", "y"], [0, 1])}
    (tmp_path / "metadata.csv").write_text("camera,year\nA,2021\n")
    data = prepare(tmp_path)
    assert data.class_names == ["cat", "dog"] and "metadata.csv is not used: it has no column file_name" in data.notes
    write_metadata(tmp_path / "metadata.csv", ("elsewhere/0.png", "x"), ("elsewhere/1.png", "y"))
    with pytest.raises(UserError, match="lists none of the pictures"): prepare(tmp_path)


# ---------------------------------------------------------------- Unicode and bytes in names

NFC = "caf\u00e9"
NFD = unicodedata.normalize("NFD", NFC)


def test_one_class_in_two_spellings(tmp_path):
    write_folder(tmp_path / "train", **{NFC: 3, "tea": 3}), write_folder(tmp_path / "val", **{NFD: 2, "tea": 2})
    data = prepare(tmp_path)
    assert data.class_names == [NFC, "tea"] and sorted(data.labels["validation"]) == [0, 0, 1, 1]
    write_folder(tmp_path / "train", **{NFD: 2})
    assert np.bincount(prepare(tmp_path).labels["train"]).tolist() == [5, 3]
    assert table(tmp_path / "list.csv", lines("file,label", NFC, NFD, "tea")) == [NFC, NFC, "tea"]
    names, labels = _read_labels(own([0, 1, 2, -1, None], datasets.ClassLabel(names=[NFD, "tea", NFC])), "label")
    assert (names, labels.tolist()) == ([NFC, "tea"], [0, 1, 0, -1, -1])


def test_a_table_may_spell_a_path_otherwise_than_the_disk(tmp_path):
    for folder, typed in ((NFD, NFC), ("deep/" + NFC, "deep\\" + NFD)):
        write_folder(tmp_path, **{folder: 2})
        (tmp_path / "list.csv").write_text(f"file,label\n{typed}/0.png,a\n{typed}/1.png,b\n")
        rows = load_labelled_splits(DataArguments(dataset=str(tmp_path / "list.csv")), [])["train"].rows()
        assert [open_image(rows[i]["image"], i).size for i in range(2)] == [(4, 4)] * 2


def test_names_that_are_not_utf_8(tmp_path):
    write_folder(tmp_path, a=4, b=4)
    odd = os.fsencode(tmp_path / "a") + b"/caf\xe9.png"
    try: shutil.copy(tmp_path / "a" / "0.png", odd)
    except OSError: pytest.skip("this file system holds UTF-8 names only")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff"); shutil.copy(odd, os.fsencode(tmp_path) + b"/\xff/0.png")
    data = prepare(tmp_path)
    assert data.class_names == ["a", "b"] and len(data.train) + len(data.validation) == 8
    note, = (note for note in data.notes if "not UTF-8: 2 (caf\\udce9.png" in note)
    "\n".join(data.notes).encode()
    with pytest.raises(UserError, match="names are not UTF-8") as caught: prepare(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).parent / "\udcff")
    str(caught.value).encode()


def test_files_left_out_are_counted_in_the_error(tmp_path):
    for name in ("cup/1.xcf", "cup/2.xcf", "plate/3"): (tmp_path / name).parent.mkdir(exist_ok=True); (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds no images in class folders.*3 files left out"): prepare(tmp_path)


# ---------------------------------------------------------------- datasets of one's own

def explode(*_, **__): raise AssertionError("the dataset is written out again")


@pytest.mark.parametrize("change", [lambda d: d.with_transform(lambda rows: {"pixel_values": [0] * len(rows["image"])}), lambda d: d.with_format("torch"),
                                    lambda d: d.with_format("numpy", columns=["label"]), lambda d: d.shuffle(seed=1), lambda d: d.select([5, 2, 9, 1] * 3)])
def test_transforms_are_taken_off_and_nothing_is_copied(change, monkeypatch):
    dataset = own([f"{k % 2}" for k in range(20)]).add_column("row", list(range(20)))
    for name in ("flatten_indices", "map", "decode_column"):
        monkeypatch.setattr(datasets.Dataset, name, explode, raising=False)
    changed = change(dataset)
    data = load_and_prepare_dataset(DataArguments(), dataset=datasets.DatasetDict(train=changed, dev=changed))
    for name in ("train", "validation"):
        assert data.labels[name].tolist() == [row % 2 for row in getattr(data, name)["row"]] and data.labels[name].dtype == np.int64
        item = data.rows(name)[3]
        assert open_image(item["image"], 3).size == (4, 4) and item["label"] == data.labels[name][3]
    buffers = [{chunk.field("bytes").buffers()[2].address for chunk in d.data["image"].chunks} for d in (dataset, data.train)]
    assert buffers[0] == buffers[1]


# ---------------------------------------------------------------- whole columns, against a slow plain way

NAMES = ("a.png", "B.PNG", "10.jpg", "2.jpg", "x.y.Jpeg", "caf\u00e9.png", "cafe\u0301.png", "\u7a7a.webp", "odd\udce9.png", "\udcff.jpg", ".hidden.png",
         "notes.txt", "raw", "ends.", "photo.xcf", "a b.tif", "i\u0307.GIF", "png", "Thumbs.db", "..two.png", "quote'\".bmp")
CLASSES = ("cat", "Dog", "\u00e9l\u00e9phant", "z 1", "bad\udce8", "10", "2", ".git")


def random_tree(root, generator):
    "Class folders, folders in them, loose files and everything that people leave there."
    for name in generator.choice(CLASSES, 5, replace=False):
        place = root / str(name)
        for deeper in range(generator.integers(0, 3)): place = generator.choice([place, place / f"{deeper} of {writable(name)}"])
        place.mkdir(parents=True, exist_ok=True)
        for file in generator.choice(NAMES, generator.integers(0, 9), replace=False): (place / str(file)).touch()
    for file in generator.choice(NAMES, generator.integers(0, 4), replace=False): (root / str(file)).touch()
    (root / "linked").mkdir()
    (root / "linked" / "one.png").symlink_to(root / "nothing.png")
    return root


def plain_class_folders(folder):
    "Paths, class names and notes, one file after the other."
    files, others = [], Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."): continue
            ending = Path(name).suffix.lower()
            if ending in IMAGE_ENDINGS: files.append(Path(place) / name)
            else: others[ending or "no ending"] += 1
    files.sort(key=lambda path: [*((1, part) for part in path.parts[:-1]), (0, path.name)])
    rows, loose, odd = [], 0, []
    for file in files:
        parts = file.relative_to(folder).parts
        if writable(file) != str(file): odd.append(file.name)
        elif len(parts) == 1: loose += 1
        else: rows.append((str(file), parts[0]))
    visible = sorted(place.name for place in folder.iterdir() if place.is_dir() and place.name[0] != ".")
    empty = [name for name in visible if name not in dict(map(reversed, rows))] if rows else []
    lines = [describe_left_out(others), f"images left out, in no class folder: {loose:,}" if loose else "",
             f"images left out because their names are not UTF-8: {len(odd):,} ({shorten(odd)})" if odd else "",
             f"class folders without images: {shorten(empty)}" if empty else ""]
    return files, rows, [writable(f"{folder.name}: {line}") for line in lines if line]


@pytest.mark.parametrize("seed", range(25))
def test_class_folders_as_one_file_after_the_other_gives_them(tmp_path, seed):
    root = tmp_path / ("photos" if seed % 5 else "\u7a7a photos")
    files, rows, expected = plain_class_folders(random_tree(root, np.random.default_rng(seed)))
    notes = []
    found = _read_class_folders(root, notes)
    assert list_image_files(root)[0] == files
    assert [(image["path"], label) for image, label in zip(found["image"], found["label"])] == rows
    assert all(image["bytes"] is None for image in found["image"])
    assert found.features == datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("string"))
    assert [note for note in notes if "all images are in" not in note] == expected


def test_a_folder_named_in_other_ways_has_the_same_paths(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets", cat=2, dog=1)
    monkeypatch.chdir(tmp_path / "pets")
    for name in (".", "../pets", "./"):
        found = _read_class_folders(Path(name), [])
        assert [image["path"] for image in found["image"]] == [str(Path(name) / path) for path in ("cat/0.png", "cat/1.png", "dog/0.png")]
        assert found["label"][:] == ["cat", "cat", "dog"]
    assert [str(path) for path in list_image_files("./")[0]] == ["cat/0.png", "cat/1.png", "dog/0.png"]


def test_nothing_but_names_that_are_no_utf8(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "\udce9.png").touch()
    notes = []
    assert len(_read_class_folders(tmp_path, notes)) == 0
    assert notes == [f"{tmp_path.name}: images left out because their names are not UTF-8: 1 (\\udce9.png)"]


def column(values): return pa.chunked_array([pa.array(values[:3], pa.string()), pa.array(values[3:], pa.string())])


def plain_absolute_paths(paths, folder):
    first = next((path for path in paths if path and "\\" in path), None)
    if first and not os.path.exists(os.path.join(folder, first)): paths = [path and path.replace("\\", "/") for path in paths]
    found = []
    for path in paths:
        full = path and os.path.join(folder, path)
        if path and not path.isascii() and not os.path.exists(full):
            spelled = [os.path.join(folder, unicodedata.normalize(form, path)) for form in ("NFC", "NFD")]
            full = next(filter(os.path.exists, spelled), full)
        found.append(full)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_absolute_paths_as_one_after_the_other_gives_them(tmp_path, seed):
    for name in ("cafe\u0301.png", "\u00e9t\u00e9.png", "a\\b.png"): (tmp_path / name).touch()
    known = [None, "", "a.png", "a/b.png", "/else/c.png", "a\\b.png", "x\\y.png", "caf\u00e9.png", "e\u0301te\u0301.png", "/\u00e9.png", "../up.png", " "]
    paths = [known[k] for k in np.random.default_rng(seed).integers(0, len(known), 12)]
    for folder in (tmp_path, Path("/")):
        assert _absolute_paths(column(paths), folder).to_pylist() == plain_absolute_paths(paths, folder)


def test_paths_in_one_spelling_as_the_library_spells_them():
    generator, parts = np.random.default_rng(0), ("", ".", "..", "a", "b.png", "...", ".x", "..y", "\u00e9.", "z..")
    paths = ["/" + "/".join(generator.choice(parts, generator.integers(1, 6))) for _ in range(2000)]
    assert normalize_paths(column(paths)).to_pylist() == [os.path.normpath(path) for path in paths]
    assert normalize_paths(column(["/a.png", None])).to_pylist() == ["/a.png", None]


def test_anchored_paths_beside_bytes(tmp_path):
    cells = [{"bytes": b"1", "path": "in.png"}, {"bytes": None, "path": "a.png"}, None, {"bytes": None, "path": "/b.png"}, {"bytes": b"", "path": None},
             {"bytes": None, "path": ""}]
    feature = datasets.Features(y=datasets.Value("int64"), image=datasets.Image(decode=False), z=datasets.Value("string"))
    split = datasets.Dataset.from_dict({"y": list(range(6)), "image": cells, "z": list("abcdef")}, feature)
    found = anchor_paths(split.select([5, 1, 0, 2, 3, 4]), "image", tmp_path)
    assert found.column_names == ["y", "image", "z"] and found["y"][:] == [5, 1, 0, 2, 3, 4] and found.features == feature
    as_stored = [cell or {"bytes": None, "path": None} for cell in cells]
    expected = {number: {**cell, "path": str(tmp_path / "a.png")} if cell["path"] == "a.png" else cell for number, cell in enumerate(as_stored)}
    assert {row["y"]: row["image"] or as_stored[2] for row in found} == expected
    rooted = split.select([0, 3, 4, 5])
    assert anchor_paths(rooted, "image", tmp_path) is rooted  # nothing to do
    text = datasets.Dataset.from_dict({"image": ["a.png", None, "/b.png"]})
    assert [image and image["path"] for image in anchor_paths(text, "image", tmp_path)["image"]] == [str(tmp_path / "a.png"), None, "/b.png"]
    plain = text.select([2])
    assert anchor_paths(plain, "image", tmp_path) is plain


@pytest.mark.parametrize("values", [pa.array([7, None, -1]), pa.array([200], pa.uint8()), pa.array(["007", None, "nan"]), pa.array(["a"], pa.large_string()),
                                    pa.array([True, None]), pa.array([1.0, 0.5, None]), pa.array([None, None]), pa.array(["x", "y", "x"]).dictionary_encode()])
def test_columns_of_parquet_as_text(values):
    assert _column_as_text(pa.chunked_array([values]), "label").to_pylist() == _as_text(values.to_pylist(), "label").to_pylist()


def test_a_metadata_parquet_of_no_rows_is_passed_over(tmp_path):
    write_folder(tmp_path, cat=10, dog=10)
    pyarrow.parquet.write_table(pa.table({"file_name": pa.array([], pa.string()), "label": pa.array([], pa.string())}), tmp_path / "metadata.parquet")
    assert any("metadata.parquet is not used: it has no column file_name" in note for note in prepare(tmp_path).notes)


def test_listed_pictures_by_split_and_what_is_not_listed(tmp_path, monkeypatch):
    for name in ("train", "val"): write_folder(tmp_path / name, cat=2)
    (tmp_path / "train" / "cat" / "odd\udce9.png").touch()
    written = [f"{tmp_path}/train/cat/0.png", f"{tmp_path}/train/../val/./cat/1.png", f"{tmp_path}/other/cat/1.png", f"{tmp_path}/val"]
    listed = path_dataset(pa.array(written), pa.array(["x", "y", "z", "w"]), Columns("file", "kind"))
    splits = _split_by_folder(listed, tmp_path, ["train", "val", "test"])
    assert {name: split["kind"][:] for name, split in splits.items()} == {"train": ["x"], "val": ["y", "w"]}
    said = _note_unlisted(tmp_path, column(written), "metadata.csv")
    assert said == [f"{tmp_path.name}: images left out, not listed in metadata.csv: 3"]
    monkeypatch.chdir(tmp_path)
    assert _note_unlisted(Path("train") / ".." / "val", column(written), "metadata.csv") == ["val: images left out, not listed in metadata.csv: 1"]
    with pytest.raises(UserError, match=r"lists none of the pictures in .*, but others, such as '/a/\.\./0\.png'"):
        _note_unlisted(tmp_path, column(["/a/../0.png"]), "metadata.csv")


@pytest.mark.parametrize("seed", range(10))
def test_labels_are_looked_at_as_sets_of_numbers(seed):
    generator = np.random.default_rng(seed)
    labels, names = generator.integers(-1, 9, generator.integers(20, 200)), [f"n{k}" for k in range(12)]
    learn, validate = _cut_validation(labels, seed)
    assert sorted([*learn, *validate]) == np.flatnonzero(labels >= 0).tolist() and not set(learn) & set(validate)
    assert (np.diff(learn) > 0).all()
    absent = [name for k, name in enumerate(names) if k not in labels]
    assert _check_labels("train", labels, names)[-1] == f"train: no images of {len(absent)} of 12 classes ({shorten(absent)})"
    assert (_translate_labels(labels, names, names[::-1], "val") == np.where(labels < 0, -1, 11 - labels)).all()


def test_class_names_that_stand_twice():
    split = own([0, 1, 2, 3], datasets.ClassLabel(names=["caf\u00e9", "dog", "cafe\u0301", "ant"]))
    names, numbers = _read_labels(split, "label")
    assert names == ["caf\u00e9", "dog", "ant"] and numbers.tolist() == [0, 1, 0, 2]


def test_rows_that_are_kept_are_the_rows_that_select_gives(tmp_path):
    write_folder(tmp_path, all=20)
    paths = pa.array([f"{tmp_path}/all/{number}.png" for number in range(20)])
    listed = path_dataset(paths, pa.array(list(range(20))), Columns("file", "kind"))
    embedded = own(list(range(20)), datasets.Value("int64"))
    wide = listed.add_column("note", list(range(20)))
    saved = tmp_path / "saved"
    listed.save_to_disk(saved)
    rows = np.array([1, 2, 7, 19])
    for split, image in ((listed, "file"), (listed.select(range(19, -1, -1)), "file"), (embedded, "image"), (wide, "file"), (datasets.load_from_disk(saved), "file")):
        undecoded = split.cast_column(image, datasets.Image(decode=False))
        for wanted in (rows, rows[:0], np.arange(20)):
            found, expected = _keep_undecoded(split, image, wanted), undecoded.select(wanted)
            assert found.features == expected.features and found.to_list() == expected.to_list()
