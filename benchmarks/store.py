"""What a store of features costs at a million rows, beside SQLite with the same rows.

    python benchmarks/store.py --json benchmarks/results/store.json

Random rows as wide as ViT-S's (class token and patch mean, 384 float32 each: 3 kB) are appended in batches, the
store is opened, all pictures are looked up, and 10,000 of them, drawn at random, are read and checked. The ratio is
SQLite's time over the store's for handing out all rows as one array, checked, which each run begins with.
"""
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash
from common import command_line, describe_machine, write_json

from dinov3_nb.store import FeatureStore, StoreWriter

BATCH = 1000


def batches(rows, row_bytes, seed=0):
    "Names and rows, a batch at a time, the same for the same seed."
    generator = np.random.default_rng(seed)
    block = generator.integers(0, 256, (BATCH, row_bytes), np.uint8)
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        keys = generator.integers(1, 2**63, (count, 2), np.uint64)
        block[:, :8] = generator.integers(0, 256, (BATCH, 8), np.uint8)  # no two rows alike
        yield keys, block[:count]


def timed(function):
    "Seconds, and what the function returns."
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def fill_store(folder, rows, row_bytes):
    "Append all rows; seconds for each quarter of them."
    quarters, began, done = [], time.perf_counter(), 0
    with StoreWriter(folder, row_bytes) as writer:
        for keys, block in batches(rows, row_bytes):
            writer.append(keys, block)
            done += len(keys)
            if done >= rows * (len(quarters) + 1) / 4:
                writer.save()
                quarters.append(time.perf_counter() - began)
                began = time.perf_counter()
    return quarters


def read_store(store, places, row_bytes):
    "Rows as one array, each compared with its checksum."
    assert store.intact(places).all()
    out = np.empty((len(places), row_bytes), np.uint8)
    for at in range(0, len(places), BATCH):  # as a run does it: whole blocks of the mapped file
        out[at:at + BATCH] = store.parts[0].rows[places[at:at + BATCH]]
    return out


def fill_sqlite(path, rows, row_bytes):
    "The same in SQLite: a table with the name as its key."
    base = sqlite3.connect(path)
    base.execute("pragma journal_mode=wal")
    base.execute("create table rows (key blob primary key, digest blob, row blob) without rowid")
    for keys, block in batches(rows, row_bytes):
        with base:
            base.executemany("insert into rows values (?, ?, ?)", (
                (key.tobytes(), xxhash.xxh3_128_digest(row), row.tobytes()) for key, row in zip(keys, block)))
    base.close()


def read_sqlite(base, keys, row_bytes):
    "Rows as one array, each compared with its checksum."
    out = np.empty((len(keys), row_bytes), np.uint8)
    for i, key in enumerate(keys):
        digest, row = base.execute("select digest, row from rows where key = ?", (key.tobytes(),)).fetchone()
        assert xxhash.xxh3_128_digest(row) == digest
        out[i] = np.frombuffer(row, np.uint8)
    return out


def main():
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row_bytes", type=int, default=2 * 384 * 4)
    parser.add_argument("--random_rows", type=int, default=10_000)
    given = parser.parse_args()
    rows, width = given.rows, given.row_bytes
    keys = np.concatenate([keys for keys, _ in batches(rows, width)])
    some = keys[np.random.default_rng(1).permutation(rows)[:given.random_rows]]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        place, base_file = Path(folder) / "store", Path(folder) / "rows.sqlite"
        quarters = fill_store(place, rows, width)
        opened, store = timed(lambda: FeatureStore(place, width))
        looked, places = timed(lambda: store.find(keys))
        assert (np.sort(places) == np.arange(rows)).all()
        chance, _ = timed(lambda: read_store(store, store.find(some), width))
        everything, ours = timed(lambda: read_store(store, places, width))
        size = sum(file.stat().st_size for file in place.iterdir())
        found["store"] = dict(append=sum(quarters), open=opened, find_all=looked, random=chance, all=everything,
                              megabytes=size / 1e6)
        del store
        appended, _ = timed(lambda: fill_sqlite(base_file, rows, width))
        opened, base = timed(lambda: sqlite3.connect(base_file))
        looked, _ = timed(lambda: [base.execute("select 1 from rows where key = ?", (key.tobytes(),)).fetchone()
                                   for key in keys])
        chance, _ = timed(lambda: read_sqlite(base, some, width))
        everything, theirs = timed(lambda: read_sqlite(base, keys, width))
        assert (ours[:1000] == theirs[:1000]).all() and (ours[-1000:] == theirs[-1000:]).all()
        found["SQLite"] = dict(append=appended, open=opened, find_all=looked, random=chance, all=everything,
                               megabytes=base_file.stat().st_size / 1e6)
        base.close()
    result = dict(benchmark="store", machine=describe_machine(), arguments=vars(given), sides=found, quarters=quarters,
                  ratio=found["SQLite"]["all"] / found["store"]["all"])
    for side, figures in found.items():
        print(f"{side:7}", "  ".join(f"{name} {value:,.3f}" for name, value in figures.items()), flush=True)
    print("appending, seconds for each quarter:", ", ".join(f"{seconds:.2f}" for seconds in quarters))
    print(f"all rows as one array: {result['ratio']:.1f} times as fast as SQLite")
    write_json(given.json, result)
    return 0


if __name__ == "__main__": sys.exit(main())
