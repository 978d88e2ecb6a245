"""The clothes that ship with the package: 3,000 of Fashion-MNIST's 70,000 images as parquet.

    python tools/make_fashion.py FOLDER

FOLDER holds the four files that https://github.com/zalandoresearch/fashion-mnist publishes (Debian's package
dataset-fashion-mnist has the files, in usr/share/datasets/fashion-mnist). 200 images a class come from its training
part, 100 a class from its test part, drawn with a fixed seed and kept in their order.
"""
import argparse
import gzip
import hashlib
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
PARTS = {"train": ("train", 200), "validation": ("t10k", 100)}  # split -> its files, images a class
TARGET = Path(__file__).resolve().parents[1] / "dinov3_nb" / "fashion"


def read_idx(path: Path) -> np.ndarray:
    "An idx file of bytes: two zeros, 8 for bytes, the number of axes, each axis as four bytes, the values."
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08": raise SystemExit(f"{path} is no idx file of bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def draw_rows(labels: np.ndarray, per_class: int) -> np.ndarray:
    "The same number of rows of each class, sorted."
    order = np.random.default_rng(0).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == number][:per_class] for number in range(len(NAMES))]))


def encode_png(pixels: np.ndarray) -> bytes:
    "Grey pixels as PNG."
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_split(folder: Path, start: str, per_class: int) -> datasets.Dataset:
    "Images and named labels of one part."
    images = read_idx(folder / f"{start}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{start}-labels-idx1-ubyte.gz")
    rows = draw_rows(labels, per_class)
    table = {"image": [{"bytes": encode_png(images[row]), "path": None} for row in rows], "label": labels[rows].tolist()}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    return datasets.Dataset.from_dict(table, features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds the four idx files")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write to (default: the package's)")
    given = parser.parse_args()
    given.target.mkdir(parents=True, exist_ok=True)
    for split, (start, per_class) in PARTS.items():
        path = given.target / f"{split}.parquet"
        rows = make_split(given.folder, start, per_class)
        pq.write_table(rows.data.table, path, compression="zstd")
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__": main()
