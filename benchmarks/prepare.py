"""How long data takes to prepare, from a folder of files to batches: the plain way, and ours, in one run.

    python benchmarks/prepare.py --json benchmarks/results/prepare.json

Makes a folder of `--rows` small files in `--classes` class folders (hard links to a few of them, so that it takes
seconds), a csv that lists them, and features of 128 numbers for each; all of it is removed afterwards. Both ways of a
step do the same work and must come to the same result.
"""
import csv
import hashlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from common import command_line, describe_machine, write_json
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from dinov3_nb.core import DataArguments
from dinov3_nb.data import _read_labels, load_and_prepare_dataset, stratified_rows
from dinov3_nb.features import feature_loader
from dinov3_nb.images import EpochSampler, ImageRows, image_ids
from dinov3_nb.pictures import IMAGE_ENDINGS, list_image_names
from dinov3_nb.tables import Columns, path_dataset

SEED, WIDTH = 42, 128
FEATURES = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("string"))


def make_files(folder, rows, classes):
    "Class folders of hard links, one new file in each; the folder of the pictures, and a csv that lists them."
    photos = Path(folder) / "photos"
    with open(Path(folder) / "list.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label"])
        for k in range(classes):
            name, count = f"n{k:08}", rows // classes + (k < rows % classes)
            (photos / name).mkdir(parents=True)
            first = photos / name / f"{name}_0.JPEG"
            first.write_bytes(b"%d" % k * 50)
            for i in range(1, count): os.link(first, photos / name / f"{name}_{i}.JPEG")
            table.writerows([f"photos/{name}/{name}_{i}.JPEG", name] for i in range(count))
    return photos, Path(folder) / "list.csv"


class InMemory:
    "Features as `feature_loader` asks for them."
    def __init__(self, table):
        self.cls = self.mean = table
        self.unread, self.read = {}, np.arange(len(table))

    def __len__(self): return len(self.cls)

    def pool(self, pool): return self.cls

    def take(self, rows, pool): return self.cls.index_select(0, torch.as_tensor(rows))


def plain_listing(folder):
    "The image files of a folder, in order."
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())


def plain_dataset(paths, labels):
    "Paths and labels as a dataset, and the class numbers."
    images = [{"bytes": None, "path": str(path)} for path in paths]
    names = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    return datasets.Dataset.from_dict({"image": images, "label": labels}, FEATURES), [numbers[x] for x in labels]


def ours_dataset(paths, labels):
    "The same, as whole columns."
    columns = [pa.array(values, pa.string()) for values in (map(str, paths), labels)]
    split = path_dataset(*columns, Columns("image", "label"))
    return split, _read_labels(split, "label")[1]


def plain_folder(folder):
    "A folder as training and validation rows: a tenth of each class is held out."
    paths = plain_listing(folder)
    dataset, labels = plain_dataset(paths, [path.parent.name for path in paths])
    rows = train_test_split(np.arange(len(labels)), test_size=round(0.1 * len(labels)), stratify=labels, random_state=SEED)
    return [dataset.select(np.sort(part)) for part in rows]


def plain_csv(file):
    "The same of a csv."
    with open(file, newline="") as lines: rows = list(csv.DictReader(lines))
    dataset, labels = plain_dataset([file.parent / row["path"] for row in rows], [row["label"] for row in rows])
    rows = train_test_split(np.arange(len(labels)), test_size=round(0.1 * len(labels)), stratify=labels, random_state=SEED)
    return [dataset.select(np.sort(part)) for part in rows]


def prepared(name):
    "Ours, of a folder or a csv."
    arguments = DataArguments(dataset=str(name), train_split_ratio=1.0, val_split_ratio=1.0)
    data = load_and_prepare_dataset(arguments, SEED)
    return [data.train, data.validation]


def plain_ids(dataset):
    "A hash of each file's content, one after the other."
    ids = []
    for image in dataset["image"]:
        content = Path(image["path"]).read_bytes()
        ids.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True))
    return np.array(ids)


def plain_epoch(table, labels, batch_size):
    "All rows in a random order, as most people load tensors; the sum of the labels."
    loader = DataLoader(TensorDataset(table, labels), batch_size, shuffle=True)
    return sum(int(batch.sum()) for _, batch in loader)


def ours_epoch(table, labels, batch_size):
    "The same through `feature_loader`."
    loader = feature_loader(InMemory(table), labels, "cls", batch_size, EpochSampler(len(labels), SEED))
    return sum(int(batch["labels"].sum()) for batch in loader)


def sizes(parts): return [len(part) for part in parts]


def make_steps(photos, table_file, rows, classes):
    "(name, plain way, our way, what both must agree in) of each step."
    def names(found): return [f"{place}/{name}" for place in found for name in found[place]]

    labels = torch.arange(rows) % classes
    table = torch.randn(rows, WIDTH)
    found = list_image_names(photos)[0]
    paths = names(found)
    words = [os.path.basename(place) for place in found for _ in found[place]]
    files = plain_dataset(paths, words)[0]
    return [
        ("list a folder", lambda: plain_listing(photos), lambda: list_image_names(photos)[0],
         lambda a, b: list(map(str, a)) == names(b)),
        ("paths and labels to a dataset", lambda: plain_dataset(paths, words), lambda: ours_dataset(paths, words),
         lambda a, b: a[0].data == b[0].data and a[1] == b[1].tolist()),
        ("folder to two splits", lambda: plain_folder(photos), lambda: prepared(photos),
         lambda a, b: sizes(a) == sizes(b)),
        ("csv to two splits", lambda: plain_csv(table_file), lambda: prepared(table_file),
         lambda a, b: sizes(a) == sizes(b)),
        ("a tenth of each class",
         lambda: train_test_split(np.arange(rows), test_size=round(0.1 * len(labels)), stratify=labels.numpy(), random_state=SEED)[1],
         lambda: stratified_rows(labels.numpy(), 0.1, SEED), lambda a, b: len(a) == len(b)),
        ("identities of the files", lambda: plain_ids(files), lambda: image_ids(ImageRows(files)), np.array_equal),
        *((f"an epoch of features, batch {size}", lambda size=size: plain_epoch(table, labels, size),
           lambda size=size: ours_epoch(table, labels, size), lambda a, b: a == b) for size in (256, 8)),
    ]


def measure(function):
    "The result, and wall-clock seconds."
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def main():
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        photos, table_file = make_files(folder, given.rows, given.classes)
        for name, plain, ours, agree in make_steps(photos, table_file, given.rows, given.classes):
            times = seconds[name] = {"plain": [], "ours": []}
            for _ in range(given.repeats):
                a, b = measure(plain), measure(ours)
                times["plain"].append(a[1])
                times["ours"].append(b[1])
                if not agree(a[0], b[0]): raise SystemExit(f"{name}: the two ways come to different results")
            a, b = (statistics.median(values) for values in times.values())
            print(f"{name:<34}{a:8.2f} s plain{b:8.2f} s ours{a / b:8.1f} times", flush=True)
    ratio = {name: statistics.median(v["plain"]) / statistics.median(v["ours"]) for name, v in seconds.items()}
    arguments = {name: value for name, value in vars(given).items() if name != "json"}
    write_json(given.json, {"benchmark": "prepare", "machine": describe_machine(), "arguments": arguments,
                            "seconds": seconds, "ratio": ratio})
    return 0


if __name__ == "__main__": sys.exit(main())
