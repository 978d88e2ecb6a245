"Kept features and errors that pass: not remembered, tried again; and files that were put in another's place."
import builtins
import errno
import os
import shutil
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import dinov3_nb.cache as cache
import dinov3_nb.contents as contents
import dinov3_nb.decoding as decoding
from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.features import PassOptions, extract_features
from dinov3_nb.images import ImageRows
from dinov3_nb.contents import UNKNOWN, file_state, name_images
from dinov3_nb.pictures import BadImage, ReadError

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


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM])
def test_a_passing_error_is_tried_again(number, parts, pictures, tmp_path, monkeypatch):
    whole = extract_features(*parts[:1], rows_of(pictures), parts[1], SKIP)
    with monkeypatch.context() as patch:
        away(patch, [pictures[2], pictures[7]], number)
        kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert sorted(kept.unread) == [2, 7] and "just now" in kept.unread[2] and kept.cls[[2, 7]].abs().max() == 0
    with monkeypatch.context() as patch:
        away(patch, [pictures[7]], number)
        kept, said = keep(parts, pictures, tmp_path / "kept")  # one of two is back
    assert sorted(kept.unread) == [7] and any("11 images, 1 of them through the backbone" in line for line in said), said
    time.sleep(0.06)
    opened = away(monkeypatch, [])
    kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert kept.unread == {} and "7.png" in opened
    for pool in ("cls", "mean"): assert torch.allclose(kept.pool(pool), whole.pool(pool), atol=1e-5)
    opened.clear()
    assert keep(parts, pictures, tmp_path / "kept")[0].unread == {} and set(opened) <= {"7.png"}  # known now, or a moment old


def test_a_bad_image_is_not_kept_and_a_decoder_may_come(parts, pictures, tmp_path, monkeypatch):
    content = pictures[3].read_bytes()
    pictures[3].write_bytes(b"no image")
    kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert "cannot be decoded" in kept.unread[3] and kept.cls[3].abs().max() == 0 and len(kept.read) == 10
    with pytest.raises(BadImage, match="mend it"): keep(parts, pictures, tmp_path / "kept", PassOptions(num_workers=0))
    real = decoding.open_image  # stands in for a decoder that is installed later: the file is the same
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "open_image", lambda value, row: real(value if b"no image" != value["bytes"] else str(pictures[0]), row))
        kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert kept.unread == {} and torch.allclose(kept.cls[3], kept.cls[0], atol=1e-5)
    assert keep(parts, pictures, tmp_path / "kept")[0].unread == {}
    pictures[3].write_bytes(content)  # another picture
    kept, _ = keep(parts, pictures, tmp_path / "kept")
    assert kept.unread == {} and not torch.allclose(kept.cls[3], kept.cls[0], atol=1e-2)


def test_a_passing_error_stops_with_its_own_words(parts, pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        away(patch, [pictures[9]])
        with pytest.raises(ReadError, match="row 9 .*could not be read just now .*try again, or pass --on_bad_image skip"):
            keep(parts, pictures, tmp_path / "kept", PassOptions(batch_size=4, num_workers=0))
    kept, said = keep(parts, pictures, tmp_path / "kept", PassOptions(batch_size=4, num_workers=0))
    assert kept.unread == {} and "11 images, 3 of them through the backbone" in said[0], said


def state_of(files): return name_images(rows_of(files).split, "image").keys.tolist()


def test_another_file_of_the_same_size_and_time(pictures):
    before = state_of(pictures)
    assert state_of(pictures) == before
    state = os.stat(pictures[0])
    content = bytearray(pictures[0].read_bytes()); content[-20] ^= 1
    pictures[0].write_bytes(content); os.utime(pictures[0], ns=(state.st_atime_ns, state.st_mtime_ns))  # in place
    assert os.stat(pictures[0]).st_mtime_ns == state.st_mtime_ns and state_of(pictures)[0] != before[0]
    shutil.copy2(pictures[1], pictures[1].with_suffix(".new")); os.replace(pictures[1].with_suffix(".new"), pictures[1])  # in its place
    assert state_of(pictures)[1] != before[1] and state_of(pictures)[2:] == before[2:]
    assert file_state("gone.png") == UNKNOWN


def test_a_replaced_picture_is_never_stale(parts, pictures, tmp_path):
    "Also one that was written a moment ago, and one of the same size and time."
    for change in range(3):
        Image.fromarray(np.full((9, 9, 3), 80 * change, np.uint8)).save(pictures[4])
        os.utime(pictures[4], ns=(10 ** 18, 10 ** 18))
        kept, _ = keep(parts, pictures, tmp_path / "kept")
        assert torch.allclose(kept.cls[4], extract_features(parts[0], rows_of(pictures[4:5]), parts[1]).cls[0], atol=1e-5), change


def test_a_file_that_changes_while_it_is_read(parts, pictures, tmp_path, monkeypatch):
    "The contents that were read are kept under their own name, and the file's state is not trusted."
    time.sleep(0.06)
    real, other = contents.os.fstat, Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    seen = []
    def fstat(number):
        found = real(number)
        seen.append(found.st_size)
        if len(seen) == 2: other.save(pictures[0])
        return real(number)
    with monkeypatch.context() as patch:
        patch.setattr(contents.os, "fstat", fstat)
        keep(parts, pictures[:1], tmp_path / "kept")
    kept, _ = keep(parts, pictures[:1], tmp_path / "kept")
    assert torch.allclose(kept.cls, extract_features(parts[0], rows_of(pictures[:1]), parts[1]).cls, atol=1e-5)


def test_two_pictures_change_places(parts, pictures, tmp_path):
    first, _ = keep(parts, pictures, tmp_path / "kept")
    a, b = pictures[0].read_bytes(), pictures[1].read_bytes()
    pictures[0].write_bytes(b); pictures[1].write_bytes(a)
    kept, said = keep(parts, pictures, tmp_path / "kept")
    assert torch.equal(kept.cls[[1, 0]], first.cls[:2]) and torch.equal(kept.cls[2:], first.cls[2:]) and "kept before" in said[0], said


def test_the_range_is_told_again(parts, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files): Image.fromarray(np.full((8, 8), 4095 - i, np.uint16)).save(file)
    for _ in range(2):
        said = keep(parts, files, tmp_path / "kept")[1]
        assert sum(line.startswith("Wide greyscale images: 0 taken as black and 4,095 as white") for line in said) == 1, said


def test_several_broken_images_with_the_same_contents(parts, tmp_path):
    "Three empty files: one picture, three rows, and each of them is tried in each run."
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file in files: file.write_bytes(b"")
    for file in files[3:]: Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(file)
    for wait in (0.06, 0, 0):
        time.sleep(wait)
        kept, said = keep(parts, files, tmp_path / "kept")
        assert sorted(kept.unread) == [0, 1, 2] and kept.read.tolist() == [3, 4], said
    assert "5 images, 2 of them kept before" in said[0]
    inside = ImageRows(datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * 4}, features=FEATURE))
    found = cache.kept_features(*parts[:1], {"": inside}, parts[1], SKIP, tmp_path / "kept", lambda line: None)[""]
    assert sorted(found.unread) == [0, 1, 2, 3]


def test_both_rows_of_a_picture_are_damaged(parts, pictures, tmp_path):
    "Two runs computed the same picture; the disk damaged both rows. Neither is used."
    right = keep(parts, pictures[:1], tmp_path / "kept")[0].cls
    place, = (place for place in (tmp_path / "kept").iterdir() if len(place.name) == 32)
    for ending in ("rows", "index"):
        file = place / f"00.{ending}"
        file.write_bytes(file.read_bytes() * 2)
    damaged = bytearray((place / "00.rows").read_bytes())
    for row in range(2): damaged[row * len(damaged) // 2 + 3] ^= 0x40
    (place / "00.rows").write_bytes(damaged)
    kept, said = keep(parts, pictures[:1], tmp_path / "kept")
    assert torch.allclose(kept.cls, right, atol=1e-5) and any("damaged" in line for line in said), said


def test_damage_where_we_may_not_write(parts, pictures, tmp_path, monkeypatch):
    "A damaged row that cannot be forgotten on disk is not used either."
    right = keep(parts, pictures, tmp_path / "kept")[0].cls
    place, = (place for place in (tmp_path / "kept").iterdir() if len(place.name) == 32)
    damaged = bytearray((place / "00.rows").read_bytes())
    damaged[3] ^= 0x40
    (place / "00.rows").write_bytes(damaged)
    real = builtins.open
    def refuse(path, mode="r", *arguments, **options):
        if mode == "r+b": raise PermissionError(13, "Permission denied")
        return real(path, mode, *arguments, **options)
    monkeypatch.setattr(builtins, "open", refuse)
    for _ in range(2):
        kept, _ = keep(parts, pictures, tmp_path / "kept")
        assert torch.allclose(kept.cls, right, atol=1e-5)


def test_one_number_that_is_none_hides_no_overflow(tmp_path):
    from dinov3_nb.core import UserError
    from dinov3_nb.features import PassBatch
    values = torch.tensor([[[float("nan"), 1.0]] * 2, [[1e5, 1.0]] * 2])
    keys = np.array([[1, 1], [2, 2]], "<u8")
    batch = PassBatch(np.arange(2), keys, keys, np.arange(2), values, np.full((2, 2), np.nan), {})
    with pytest.raises(UserError, match="the largest is 100,000"): cache.append_batch(batch, torch.float16, None, None)
