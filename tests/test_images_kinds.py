"Pictures, folders and scripts as other people have them: damaged metadata, wide numbers, links, HEIC, read errors."
import builtins
import errno
import hashlib
import io
import multiprocessing
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DINOv3ViTImageProcessor

import dinov3_nb.decoding as decoding
import dinov3_nb.images as images
import dinov3_nb.pictures as pictures
from dinov3_nb.core import UserError
from dinov3_nb.decoding import FastProcessor, PassCollator, decode_image, describe_ranges
from dinov3_nb.images import Collator, EpochSampler, ImageRows, _content_id, image_ids, make_loader
from dinov3_nb.pictures import (BadImage, ReadError, describe_left_out, _find_white, list_image_files, open_image,
                                _scale_to_8_bits)
import forks
from helpers import ENVIRONMENT

PROCESSOR = DINOv3ViTImageProcessor(size={"height": 32, "width": 32})
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------- what stands in the metadata

PNG, JPEG = encode(Image.fromarray(PIXELS), "PNG"), encode(Image.fromarray(PIXELS), "JPEG", quality=95)


def chunk(kind, content, checksum=None):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) if checksum is None else checksum)


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


LONG = b"comment\0\0" + zlib.compress(b" " * 5_000_000)
EXIF = b"Exif\0\0II*\0\x08\0\0\0"
PNG_KINDS = {
    "wrong checksum": chunk(b"tEXt", b"a\0b", 5), "five megabytes of text": chunk(b"zTXt", LONG), "a huge profile": chunk(b"iCCP", LONG),
    "a short pHYs": chunk(b"pHYs", b"a"), "an empty gAMA": chunk(b"gAMA", b""), "an empty sRGB": chunk(b"sRGB", b""),
    "EXIF that is none": chunk(b"eXIf", b"II*\0garbage"), "animation without frames": chunk(b"acTL", b""), "half a tRNS": chunk(b"tRNS", b"a"),
}
JPEG_KINDS = {
    "EXIF that is none": segment(0xE1, b"Exif\0\0garbage"), "an orientation that is text": segment(0xE1, EXIF + b"\1\0\x12\1\2\0\5\0\0\0\x1a\0\0\0"),
    "orientation 0": segment(0xE1, EXIF + b"\1\0\x12\1\3\0\1\0\0\0\0\0\0\0\0\0\0\0"), "orientation 99": segment(0xE1, EXIF + b"\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0"),
    "half a profile": segment(0xE2, b"ICC_PROFILE\0\1"), "broken MPF": segment(0xE2, b"MPF\0garbage"), "a short JFIF": segment(0xE0, b"JFIF"),
    "a short Adobe": segment(0xEE, b"Adobe"), "rubbish between segments": b"abcdef", "a comment of 0xFF": segment(0xFE, b"\xff" * 100),
}
DAMAGED = {**{f"PNG, {name}": PNG[:33] + part + PNG[33:] for name, part in PNG_KINDS.items()},
           **{f"JPEG, {name}": JPEG[:20] + part + JPEG[20:] for name, part in JPEG_KINDS.items()},
           "PNG, text after the pixels": PNG[:-12] + chunk(b"zTXt", LONG) + PNG[-12:], "PNG, text cut off": PNG[:-12] + struct.pack(">I", 5000) + b"tEXtabc"}


WEBP = encode(Image.fromarray(PIXELS), "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(40))
DAMAGED |= {"TIFF, a pointer to nowhere": encode(Image.fromarray(PIXELS), "TIFF", tiffinfo={40965: 5}), "WebP, EXIF cut off": WEBP[:-9],
            "WebP, a size that is not its own": WEBP[:4] + b"\xff\xff\0\0" + WEBP[8:]}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", DAMAGED)
def test_metadata_does_not_decide(kind, strict):
    plain = np.asarray(Image.open(io.BytesIO(JPEG)).convert("RGB")) if kind.startswith("JPEG") else PIXELS
    with warnings.catch_warnings():
        if strict: warnings.simplefilter("error")
        assert (np.asarray(open_image(DAMAGED[kind], 0)) == plain).all()
        assert (decode_image({"bytes": DAMAGED[kind], "path": None}, 0).permute(1, 2, 0).numpy() == plain).all()


def test_a_turn_survives_a_damaged_neighbour():
    smooth = np.linspace(0, 255, 40 * 50).reshape(40, 50).astype(np.uint8)
    upside_down, exif = Image.fromarray(smooth[::-1, ::-1].copy()), Image.Exif()
    exif[0x0112] = 3
    for data, part, at in ((encode(upside_down, "PNG", exif=exif), PNG_KINDS["wrong checksum"], 33),
                           (encode(upside_down, "JPEG", exif=exif), JPEG_KINDS["half a profile"], 2)):
        assert np.abs(np.asarray(open_image(data[:at] + part + data[at:], 0))[..., 0] - smooth.astype(int)).max() < 20


def test_a_file_cut_off_is_still_bad():
    for data in (PNG[:len(PNG) // 2], JPEG[:len(JPEG) // 2], WEBP[:len(WEBP) // 2], DAMAGED["PNG, wrong checksum"][:2000], DAMAGED["JPEG, broken MPF"][:900]):
        with pytest.raises(BadImage, match="row 4 cannot be decoded"): open_image(data, 4)


def test_large_pictures(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 2,000 pixels are four times as many
    assert (np.asarray(open_image(PNG, 0)) == PIXELS).all() and decode_image({"bytes": JPEG}, 0).shape == (3, 40, 50)
    assert Image.MAX_IMAGE_PIXELS == 500
    monkeypatch.setattr(pictures, "_LARGE_PIXELS", 100 ** 2)
    smooth = Image.fromarray(np.linspace(0, 255, 8300 * 60).reshape(60, 8300).astype(np.uint8))
    assert open_image(encode(smooth, "JPEG"), 0).size == (8300, 60)  # one side is short: nothing is thrown away
    header = PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    bomb = header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    for number, read in enumerate((open_image, decode_image)):
        with pytest.raises(BadImage, match="claims 100,000 x 100,000 pixels"): read({"bytes": bomb, "path": "a.png"}, number)


def test_a_jpeg_beyond_the_limit_is_decoded_smaller(monkeypatch):
    monkeypatch.setattr(pictures, "_LARGE_PIXELS", 10 ** 6)
    assert open_image(encode(Image.new("L", (8200, 8200), 77), "JPEG"), 0).size == (4100, 4100)


@pytest.mark.parametrize("error", [Image.DecompressionBombError("large"), struct.error("unpack"), KeyError(3), AssertionError(), RecursionError()])
def test_an_error_of_any_class_falls_back(monkeypatch, error):
    def fail(*arguments, **options): raise error
    plain = np.asarray(open_image(JPEG, 0))
    for name in ("_is_plain_jpeg", "decode_jpeg"):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, name, fail)
            assert (decode_image({"bytes": JPEG, "path": "a.jpg"}, 0).permute(1, 2, 0).numpy() == plain).all()


@pytest.mark.parametrize("data", [b"\xff\xd8\xff\xe1" + bytes(50), b"\xff\xd8" + JPEG[20:300], b"GIF89a" + bytes(9), b"\0\0\0\x18ftypavif" + bytes(99)])
def test_skipping_in_both_paths(data):
    good, bad = ({"image": {"bytes": content, "path": "b.jpg"}, "label": 1, "row": row} for row, content in ((4, JPEG), (5, data)))
    for processor in (PROCESSOR, FastProcessor(PROCESSOR)):
        batch = PassCollator(processor)([good, bad, good])
        assert batch["read"] == [0, 2] and "row 5 (b.jpg) cannot be decoded" in str(batch["unread"][5])
    batch = Collator(PROCESSOR, on_bad_image="skip")([good, bad, good])
    assert len(batch["pixel_values"]) == 2 and "row 5 (b.jpg) cannot be decoded" in batch["skipped"][0]


# ---------------------------------------------------------------- wide greyscale

@pytest.mark.parametrize("floats", [False, True])
def test_white_never_jumps(floats):
    largest = np.geomspace(0.01, 1e6, 20_000)
    white = np.array([_find_white(value, floats) for value in largest])
    assert (white >= largest).all() and (np.diff(white) >= 0).all()
    assert (np.diff(np.log(white)) / np.diff(np.log(largest))).max() < 2.01  # 1 % more never means over 2 % darker
    seen = (largest / white)[largest > (64 if floats else 255)]
    assert seen.min() > 0.24 if floats else seen.min() > 0.49


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


@pytest.mark.parametrize("largest,kind", [(255, "u2"), (256, "u2"), (1023, "u2"), (4095, "u2"), (4096, "u2"), (16383, "u2"), (65535, "u2"),
                                          (255, "i4"), (256, "i4"), (4095, "i4"), (70_000, "i4"), (1, "f4"), (1.0001, "f4"), (1.5, "f4"), (255.5, "f4"), (4095, "f4")])
def test_every_usual_range_is_bright(largest, kind):
    a, b = ((RAMP * top).astype(kind) for top in (largest, largest * 0.999))
    found = [np.asarray(open_image(encode(Image.fromarray(array), "TIFF"), 0)).astype(int) for array in (a, b)]
    assert found[0].max() >= 250 and len(np.unique(found[0])) > 60 and np.abs(found[0] - found[1]).max() <= 3
    assert (np.asarray(open_image(a, 0)) == found[0]).all()  # as an array


def test_negative_and_odd_values():
    scan = (RAMP * 3000 - 1000).astype(np.int16)
    found = _scale_to_8_bits(scan)
    assert found.min() == 0 and found.max() > 180 and (np.diff(found[0].astype(int)) >= 0).all()
    assert _scale_to_8_bits(np.array([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]
    assert _scale_to_8_bits(np.array([0.0, np.inf, np.nan, 1.0])).tolist() == [0, 255, 0, 255]
    assert _scale_to_8_bits(np.full(3, np.nan)).tolist() == [0, 0, 0]


def test_the_range_is_told():
    values = [{"image": (RAMP * top).astype(np.uint16), "label": 0, "row": row} for row, top in enumerate((4095, 1023))]
    assert Collator(PROCESSOR).ranges.note() is None
    told = "Wide greyscale images: 0 taken as black and 1,023 to 4,095, picture by picture, as white."
    collator = Collator(PROCESSOR)
    collator(values)
    assert collator.ranges.note() == told == describe_ranges(PassCollator(PROCESSOR)(values)["ranges"])
    assert describe_ranges(PassCollator(PROCESSOR)([{"image": PIXELS, "label": 0, "row": 0}])["ranges"]) is None


# ---------------------------------------------------------------- one listing

def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root): return [str(path.relative_to(root)) for path in list_image_files(root)[0]]


def test_hidden_links_and_order(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root, "b/2.png", "b/10.JPG", "b/a/1.png", "z.png", ".hidden/1.png", "b/.thumbs/1.png", "b/._2.png", "b/notes.txt", "b/raw", ".DS_Store")
    touch(elsewhere, "1.png", "deep/2.webp", ".git/3.png")
    (root / "a").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)         # a second link to the same folder
    (elsewhere / "deep" / "round").symlink_to(root)  # and a way back
    (root / "up").symlink_to(tmp_path)
    (root / "c.png").symlink_to(elsewhere / "1.png")  # a linked file
    assert names(root) == ["c.png", "z.png", "a/1.png", "a/deep/2.webp", "b/10.JPG", "b/2.png", "b/a/1.png"]
    assert list_image_files(root)[1] == Counter({".txt": 1, "no ending": 1})
    assert names(root) == names(root)


def test_a_folder_keeps_its_own_path(tmp_path):
    touch(tmp_path, "dogs/1.png")
    (tmp_path / "cats").symlink_to(tmp_path / "dogs")  # sorted first, and yet a link
    assert names(tmp_path) == ["dogs/1.png"]


def test_a_folder_that_fails_is_told(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir
    def failing(number):
        def scan(place):
            if str(place).endswith("b"): raise OSError(number, os.strerror(number))
            return scandir(place)
        return scan
    monkeypatch.setattr(os, "scandir", failing(errno.EACCES))
    assert names(tmp_path) == ["a/1.png"] and list_image_files(tmp_path)[1].total() == 1
    monkeypatch.setattr(os, "scandir", failing(errno.EIO))
    with pytest.raises(ReadError, match="b could not be read just now"): list_image_files(tmp_path)


def test_heic_with_and_without_its_decoder(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    touch(tmp_path, "a.HEIC", "b.heif", "c.png", "d.txt")
    file = pillow_heif.from_pillow(Image.fromarray(PIXELS))
    file.save(tmp_path / "a.HEIC", quality=90)
    assert names(tmp_path) == ["a.HEIC", "b.heif", "c.png"] and open_image(tmp_path / "a.HEIC", 0).size == (50, 40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    found, others = list_image_files(tmp_path)
    assert [path.name for path in found] == ["c.png"]
    said = describe_left_out(others)
    assert said.startswith("3 files left out") and ".heic" in said and "install pillow-heif" in said
    with pytest.raises(BadImage, match="HEIC.*pip install pillow-heif"): open_image(tmp_path / "a.HEIC", 0)
    assert describe_left_out(Counter()) == "" and describe_left_out(Counter({".txt": 1})).startswith("1 file left out because its")


# ---------------------------------------------------------------- whatever is handed over

def test_the_same_picture_in_every_form(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    file = open(path, "rb"); file.read(10)  # somebody has looked at it before
    tensor = torch.from_numpy(PIXELS.copy())
    forms = [path, str(path), PNG, bytearray(PNG), memoryview(PNG), io.BytesIO(PNG), file, {"bytes": PNG, "path": None}, {"bytes": None, "path": str(path)},
             Image.open(path), PIXELS, PIXELS.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1) / 255, np.asfortranarray(PIXELS),
             np.dstack([PIXELS, np.full((40, 50), 255, np.uint8)]), PIXELS.astype(np.float64) / 255, PIXELS.astype(np.int64), PIXELS.astype(np.uint16) * 257]
    for number, form in enumerate(forms):
        assert (np.asarray(open_image(form, 0)) == PIXELS).all(), number
        assert (decode_image(form, 0).permute(1, 2, 0).numpy() == PIXELS).all(), number
    file.close()
    grey = PIXELS[..., 0]
    for number, form in enumerate([grey, grey[..., None], torch.from_numpy(grey.copy())[None], grey / 255, grey > 127]):
        assert (np.asarray(open_image(form, 0))[..., 1] == ((grey > 127) * 255 if number == 4 else grey)).all(), number


@pytest.mark.parametrize("value", [None, 5, {}, {"a": 1}, [1, 2], object(), "", b"", np.zeros((2, 3, 4, 5)), np.zeros((0, 3)), np.array(["a"]), np.array(3),
                                   io.StringIO("a"), "a\0b", 3.5, np.zeros((4, 4, 2), complex)])
def test_anything_else_is_one_sentence(value):
    with pytest.raises(BadImage, match="^row 3 .*cannot be decoded: .") as caught: open_image(value, 3)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- errors that pass

def failing_open(number, monkeypatch):
    real = builtins.open
    def fail(path, *arguments, **options):
        if str(path).endswith("a.png"): raise number if isinstance(number, BaseException) else OSError(number, os.strerror(number))
        return real(path, *arguments, **options)
    monkeypatch.setattr(builtins, "open", fail)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ESTALE, errno.EACCES, errno.EINTR, MemoryError(), TimeoutError()])
def test_a_passing_error_is_not_a_bad_image(number, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    failing_open(number, monkeypatch)
    item = {"image": {"bytes": None, "path": str(tmp_path / "a.png")}, "label": 0, "row": 3}
    with pytest.raises(ReadError, match=r"row 3 \(.*a.png\) could not be read just now .*try again$"): open_image(item["image"], 3)
    with pytest.raises(ReadError, match="try again, or pass --on_bad_image skip"): Collator(PROCESSOR)([item])
    assert "just now" in Collator(PROCESSOR, "skip")([item])["skipped"][0]
    assert isinstance(PassCollator(PROCESSOR)([item])["unread"][3], ReadError)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_lasting_error_is(number, monkeypatch):
    failing_open(number, monkeypatch)
    with pytest.raises(BadImage): open_image("a.png", 3)


def test_memory_that_runs_out_while_decoding(monkeypatch):
    def fail(*arguments): raise MemoryError
    monkeypatch.setattr(pictures, "to_rgb", fail)
    with pytest.raises(ReadError, match="could not be read just now"): open_image(PNG, 3)


def test_a_passing_error_comes_out_of_a_worker():
    error = ReadError("Caught ReadError in DataLoader worker process 0.\nTraceback ...\ndinov3_nb.pictures.ReadError: row 3 could not be read")
    assert str(error) == "row 3 could not be read"


# ---------------------------------------------------------------- rows and identities

def split_of(values):
    decoded = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    return datasets.Dataset.from_dict({"image": values, "label": list(range(len(values)))}, features=decoded)


def test_rows_without_transform_or_format():
    plain = split_of([{"bytes": PNG, "path": None}] * 3)
    def spoil(batch): return {"image": [0] * len(batch["image"])}
    for split in (plain, plain.with_transform(spoil), plain.with_format("numpy"), plain.with_format("torch", columns=["label"]), plain.shuffle(seed=1)):
        rows = ImageRows(split, labels=np.array([5, 6, 7]))
        assert rows[1] == {"image": {"bytes": PNG, "path": None}, "label": 6, "row": 1} and len(rows) == 3
    assert ImageRows(plain)[2]["label"] == -1
    with pytest.raises(ValueError, match="2 labels for 3 images"): ImageRows(plain, labels=np.zeros(2))


def test_validation_keeps_the_order_of_its_rows():
    sampler = EpochSampler(4, seed=0, shuffle=False)
    assert list(sampler) == [0, 1, 2, 3]
    sampler.epoch, sampler.start = 5, 1
    assert list(sampler) == [1, 2, 3] and len(sampler) == 3


def test_identities_are_of_the_content(tmp_path):
    large = encode(Image.fromarray(np.random.default_rng(1).integers(0, 255, (300, 300, 3), dtype=np.uint8)), "PNG")
    (tmp_path / "a.png").write_bytes(large); (tmp_path / "moved.png").write_bytes(large); (tmp_path / "b.png").write_bytes(large[:-1] + b"?")
    values = [{"bytes": large, "path": "x"}, *({"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "moved.png", "b.png", "gone.png", "gone too.png")),
              {"bytes": PNG, "path": None}]
    ids = image_ids(ImageRows(split_of(values)))
    assert ids.dtype == np.int64 and len(large) > 65536 and len(set(ids[:3].tolist())) == 1 and len(set(ids[2:].tolist())) == 5
    reads = []
    def read(start, count):
        reads.append(count)
        return bytes(count)
    _content_id(read, 10 ** 6)
    assert reads == [4096] * 16


def plain_id(content):
    "An identity as checkpoints have held it from the start."
    digest, size, block = hashlib.blake2b(digest_size=8), len(content), 4096
    if size <= 16 * block: digest.update(content)
    else:
        digest.update(str(size).encode())
        for i in range(16): digest.update(content[i * (size - block) // 15:][:block])
    return int.from_bytes(digest.digest(), "big", signed=True)


def test_identities_are_those_that_checkpoints_hold(tmp_path):
    generator, values, expected = np.random.default_rng(0), [], []
    for number, size in enumerate((0, 1, 4095, 65535, 65536, 65537, 65552, 200_000)):
        content, file = generator.bytes(size), tmp_path / f"{number}.png"
        file.write_bytes(content)
        values += [{"bytes": content, "path": None}, {"bytes": None, "path": str(file)}, {"bytes": content, "path": "elsewhere.png"}]
        expected += [plain_id(content)] * 3
    values += [None, {"bytes": None, "path": "gone.png"}, {"bytes": None, "path": str(tmp_path)}]
    expected += [plain_id(name) for name in (b"path None", b"path gone.png", b"path " + str(tmp_path).encode())]
    split, order = split_of(values), generator.permutation(len(values))
    assert image_ids(ImageRows(split)).tolist() == expected
    assert image_ids(ImageRows(split.select(order))).tolist() == [expected[row] for row in order]
    only_files = split_of([value for value in values if value and value["bytes"] is None])
    assert image_ids(ImageRows(only_files)).tolist() == [one for one, value in zip(expected, values) if value and value["bytes"] is None]


def test_identities_keep_their_order_over_many_batches():
    values = [b"%d" % number for number in range(6000)]
    split = split_of([{"bytes": value, "path": None} for value in values])
    assert image_ids(ImageRows(split)).tolist() == list(map(plain_id, values))
    assert len(image_ids(ImageRows(split.select([])))) == 0 and image_ids(ImageRows(split.select([]))).dtype == np.int64


def test_a_batch_of_rows_is_its_rows():
    split = split_of([{"bytes": b"%d" % number, "path": None} for number in range(9)])
    for rows in (ImageRows(split, labels=np.arange(9)), ImageRows(split.select([8, 1, 1, 5]), labels=np.array([3, 1, 4, 1]))):
        for wanted in ([0], [3, 0, 3], list(np.array([2, 1]))):
            found = rows.__getitems__(wanted)
            assert found == [rows[row] for row in wanted] and all(type(item["row"]) is type(item["label"]) is int for item in found)


# ---------------------------------------------------------------- scripts that start processes

GUARDED = "if __name__ == '__main__': run()"


@pytest.mark.parametrize("source,fine", [("run()", False), ("log = getLogger(__name__)\nrun()", False), (GUARDED, True), ("if '__main__' == __name__: run()", True),
                                         ("import multiprocessing as m\nif m.parent_process() is None: run()", True)])
def test_a_missing_guard_is_seen_before_processes_start(source, fine, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(source)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    images._refuse_missing_guard("fork")
    for context in ("spawn", "forkserver", multiprocessing.get_context("spawn")):
        if fine: images._refuse_missing_guard(context); continue
        with pytest.raises(UserError, match="if __name__ == \"__main__\""): images._refuse_missing_guard(context)


def test_a_process_that_is_being_set_up(monkeypatch):
    images.refuse_in_spawned_import()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="if __name__"): images.refuse_in_spawned_import()


SCRIPT = """
import multiprocessing, sys
multiprocessing.set_start_method({method!r}, force=True)
{line}
from dinov3_nb.images import Collator, make_loader, refuse_in_spawned_import
refuse_in_spawned_import()
class Rows:
    def __len__(self): return 2
    def __getitem__(self, row): return row
print(list(make_loader(Rows(), list, 1, num_workers=1)))
"""


@pytest.mark.parametrize("method,line", [("spawn", ""), ("spawn", "parent_process = None  # as if there were a guard")])
def test_a_script_without_a_guard_ends_in_a_sentence(method, line, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(method=method, line=line))
    words = [sys.executable, str(tmp_path / "script.py")]
    if line: run = forks.run(words, tmp_path, ENVIRONMENT, timeout=120)
    else: run = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "if __name__ == \"__main__\"" in run.stderr.strip().split("\n")[-1], run.stderr
    if not line: assert run.stderr.count("\n") == 1, run.stderr


def test_a_turned_photograph_is_read_once(tmp_path, monkeypatch):
    "It is no case for the fast path, which hands on what it has read."
    exif = Image.Exif(); exif[0x0112] = 6
    Image.effect_noise((40, 24), 60).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    opened, usual = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *given, **named: opened.append(str(file)) or usual(file, *given, **named))
    pixels = decode_image({"bytes": None, "path": str(tmp_path / "a.jpg")}, 0)
    assert opened.count(str(tmp_path / "a.jpg")) == 1 and pixels.shape == (3, 40, 24)
