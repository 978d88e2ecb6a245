"Kept features and errors that pass: not remembered, tried again; and files that were put in another's place."
import builtins
import errno
import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import dinov3_nb.cache as cache
from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.features import PassOptions, extract_features
from dinov3_nb.images import ImageRows
from dinov3_nb.pictures import BadImage, ReadError
from dinov3_nb.records import read_record

SKIP = PassOptions(on_bad_image="skip", batch_size=4, num_workers=0)
FEATURE = datasets.Features(image=datasets.Image(decode=False))


@pytest.fixture(scope="module")
def parts(): return load_backbone("tiny"), load_processor("tiny")


@pytest.fixture
def pictures(tmp_path):
    "Eleven pictures as files."
    chance, files = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(11)]
    for file in files: Image.fromarray(chance.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(file)
    return files


def rows_of(files): return ImageRows(datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(file)} for file in files]}, features=FEATURE))


def keep(parts, files, folder, options=SKIP):
    said = []
    kept = cache.kept_features(parts[0], {"train": rows_of(files)}, parts[1], options, folder, said.append)["train"]
    return kept, said


def away(monkeypatch, files, number=errno.EIO):
    "A drive on which these files are."
    real, gone, opened = builtins.open, {str(file) for file in files}, []
    def fail(path, *arguments, **options):
        if str(path).endswith(".png"): opened.append(os.path.basename(path))
        if str(path) in gone: raise OSError(number, os.strerror(number))
        return real(path, *arguments, **options)
    monkeypatch.setattr(builtins, "open", fail)
    return opened


def record_of(folder):
    place, = (place for place in folder.iterdir() if not place.name.startswith("."))
    return place, read_record(place)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM])
def test_a_passing_error_is_tried_again(number, parts, pictures, tmp_path, monkeypatch):
    whole = extract_features(*parts[:1], rows_of(pictures), parts[1], SKIP)
    with monkeypatch.context() as patch:
        away(patch, [pictures[2], pictures[7]], number)
        kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert sorted(kept.unread) == [2, 7] and "just now" in kept.unread[2] and kept.cls[[2, 7]].abs().max() == 0
    assert record_of(tmp_path / "kept")[1]["unread"] == {}  # nothing about it is remembered as bad
    with monkeypatch.context() as patch:
        away(patch, [pictures[7]], number)
        kept, said = keep(parts, pictures, tmp_path / "kept")  # one of two is back
    assert sorted(kept.unread) == [7] and any("1 of 2 images" in line for line in said), said
    opened = away(monkeypatch, [])
    kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert kept.unread == {} and opened == ["7.png"]  # only what was missing is read
    for pool in ("cls", "mean"): assert torch.allclose(kept.pool(pool), whole.pool(pool), atol=1e-5)
    assert keep(parts, pictures, tmp_path / "kept")[0].unread == {} and opened == ["7.png"]


def test_a_bad_image_is_kept_as_such_and_a_decoder_may_come(parts, pictures, tmp_path, monkeypatch):
    content = pictures[3].read_bytes()
    pictures[3].write_bytes(b"no image")
    kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert "cannot be decoded" in kept.unread[3] and list(record_of(tmp_path / "kept")[1]["unread"]) == ["3"]
    with pytest.raises(BadImage, match="mend it"): keep(parts, pictures, tmp_path / "kept", PassOptions(num_workers=0))
    real = cache.feature_batches  # stands in for a decoder that is installed later: the file is the same
    def decodes(backbone, rows, *rest):
        rows.rows.split = rows_of([pictures[0]] * 11).split
        return real(backbone, rows, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "feature_batches", decodes)
        kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert kept.unread == {} and torch.allclose(kept.cls[3], kept.cls[0], atol=1e-5)
    assert keep(parts, pictures, tmp_path / "kept")[0].unread == {}
    pictures[3].write_bytes(content)  # another file: another entry
    assert keep(parts, pictures, tmp_path / "other")[0].unread == {}


def test_a_passing_error_stops_with_its_own_words(parts, pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        away(patch, [pictures[9]])
        with pytest.raises(ReadError, match="row 9 .*could not be read just now .*try again, or pass --on_bad_image skip"):
            keep(parts, pictures, tmp_path / "kept", PassOptions(batch_size=4, num_workers=0))
    kept, said = keep(parts, pictures, tmp_path / "kept", PassOptions(batch_size=4, num_workers=0))
    assert kept.unread == {} and any("going on behind image 8" in line for line in said), said


def test_damage_to_rows_that_were_read_late(parts, pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        away(patch, [pictures[2]])
        keep(parts, pictures, tmp_path / "kept")
    right, _ = keep(parts, pictures, tmp_path / "kept")
    place, record = record_of(tmp_path / "kept")
    late = place / record["late"]["file"]
    for damage in (lambda: late.write_bytes(late.read_bytes()[:-1]), lambda: late.write_bytes(b"!" + late.read_bytes()[1:]), late.unlink):
        damage()
        kept, said = keep(parts, pictures, tmp_path / "kept")
        assert kept.unread == {} and torch.equal(kept.cls, right.cls) and any("1 of 1 images" in line for line in said)
        late = place / record_of(tmp_path / "kept")[1]["late"]["file"]
    assert len(list(place.glob("late-*"))) == 1


def test_another_file_of_the_same_size_and_time(pictures):
    before = cache._images_digest(rows_of(pictures))
    assert cache._images_digest(rows_of(pictures)) == before
    def changed(): return cache._images_digest(rows_of(pictures)) != before
    state = os.stat(pictures[0])
    content = bytearray(pictures[0].read_bytes()); content[-20] ^= 1
    pictures[0].write_bytes(content); os.utime(pictures[0], ns=(state.st_atime_ns, state.st_mtime_ns))  # in place
    assert os.stat(pictures[0]).st_mtime_ns == state.st_mtime_ns and changed()
    before = cache._images_digest(rows_of(pictures))
    shutil.copy2(pictures[1], pictures[1].with_suffix(".new")); os.replace(pictures[1].with_suffix(".new"), pictures[1])  # in its place
    assert changed()
    assert cache._images_digest(rows_of([*pictures[:-1], "gone.png"])) != cache._images_digest(rows_of([*pictures[:-1], "gone too.png"]))


def test_the_range_is_told_again(parts, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files): Image.fromarray(np.full((8, 8), 4095 - i, np.uint16)).save(file)
    for _ in range(2):
        said = keep(parts, files, tmp_path / "kept")[1]
        assert sum(line.startswith("Wide greyscale images: 0 taken as black and 4,095 as white") for line in said) == 1, said
