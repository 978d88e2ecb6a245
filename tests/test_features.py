"One pass: pixels by the quick way and by the usual one, batches that lack images, memory that runs out, notes, odd settings."
import hashlib
import io
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from transformers import DINOv3ViTImageProcessor

from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.core import DataArguments, FeatureArguments, UserError
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.decoding import FastProcessor, PassCollator, _is_plain_jpeg, decode_image
from dinov3_nb.features import (
    Features, InPieces, PassOptions, _FeatureRows, _finish_batch, _pass_size, _pass_workers, _waiting_note, _WholeBatch,
    both_pools, extract_features, feature_batches, feature_loader, refuse_unread,
)
from dinov3_nb.images import Collator, EpochSampler, make_loader
from dinov3_nb.pictures import DECODING_VERSION, BadImage, open_image

FOLDER = Path(sklearn.datasets.__file__).parent / "images"
CHINA, FLOWER = ((FOLDER / name).read_bytes() for name in ("china.jpg", "flower.jpg"))
BAD = {"image": {"bytes": b"no image", "path": "notes.jpg"}, "label": 0, "row": 9}


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PICTURE = open_image({"bytes": FLOWER}, 0)
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {  # whether torchvision may decode it
    "photograph": (CHINA, True), "progressive": (encode(PICTURE, progressive=True), True),
    "4:4:4": (encode(PICTURE, subsampling="4:4:4"), True), "greyscale": (encode(PICTURE.convert("L")), True),
    "turned": (encode(PICTURE, exif=TURNED), False), "CMYK": (encode(PICTURE.convert("CMYK")), False),
    "PNG": (encode(PICTURE, "PNG"), False)}


@pytest.fixture(scope="module")
def parts():
    "Backbone, rows, processor, labels, and the features to expect."
    data = load_and_prepare_dataset(DataArguments(dataset="digits"))
    backbone, rows, processor = load_backbone("tiny"), data.rows("train"), load_processor("tiny")
    return backbone, rows, processor, torch.from_numpy(data.labels["train"]), extract_features(backbone, rows, processor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pixels_to_the_bit(kind):
    data, plain = KINDS[kind]
    assert _is_plain_jpeg(data) is plain
    usual = np.array(open_image({"bytes": data}, 0))
    assert (decode_image({"bytes": data}, 0).permute(1, 2, 0).numpy() == usual).all()


def test_a_path_and_a_file_that_was_cut_off():
    assert torch.equal(decode_image(str(FOLDER / "china.jpg"), 0), decode_image({"bytes": CHINA}, 0))
    assert not _is_plain_jpeg(b"")
    with pytest.raises(BadImage, match=r"row 7 \(cat.jpg\) cannot be decoded: image file is truncated"):
        decode_image({"bytes": CHINA[:5000], "path": "cat.jpg"}, 7)


@pytest.mark.parametrize("changes", [
    {}, {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
    {"size": {"height": 96, "width": 128}}], ids=["stretched", "cropped", "oblong"])
def test_fast_is_at_most_one_step_off(changes):
    slow = DINOv3ViTImageProcessor(**changes)
    fast, photo = FastProcessor(slow), decode_image({"bytes": FLOWER}, 0)
    exact, quick = (p(images=[photo], return_tensors="pt")["pixel_values"] for p in (slow, fast))
    assert exact.shape == quick.shape and ((quick - exact) * fast.std * 255).abs().max() < 1.01
    assert torch.allclose(fast(images=[PICTURE])["pixel_values"], quick, atol=1e-6)  # a PIL image is as good


def test_the_pixels_of_the_training_loop(parts):
    _, rows, processor, _, _ = parts
    photos = [{"image": {"bytes": data}, "label": 0, "row": 0} for data in (CHINA, FLOWER)]
    for items, own in (([rows[i] for i in range(8)], processor), (photos, DINOv3ViTImageProcessor())):
        assert torch.equal(PassCollator(own)(items)["pixel_values"], Collator(own)(items)["pixel_values"])


def test_a_batch_can_lack_images(parts):
    backbone, rows, processor, _, features = parts
    def forward(pixels): return both_pools(backbone, pixels)
    for own in (processor, FastProcessor(processor)):
        batch = PassCollator(own)([rows[8], BAD, rows[10]])
        assert batch["read"] == [0, 2] and list(batch["unread"]) == [9]
        found = _finish_batch(forward, batch, own, backbone)
        assert found.values.shape == (2, 2, 128) and found.computed.tolist() == [0, 2] and found.rows.tolist() == [8, 9, 10]
        if own is processor: assert torch.allclose(found.values[:, 0], features.cls[[8, 10]], atol=1e-5)
    assert PassCollator(FastProcessor(processor))([rows[8]])["pixel_values"].dtype == torch.uint8
    empty = PassCollator(processor)([BAD])
    assert empty["pixel_values"] is None and _finish_batch(forward, empty, processor, backbone).values.shape == (0, 2, 128)


def test_memory_that_always_runs_out():
    def fail(images): raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError): InPieces(fail, 256)(torch.arange(5))


@pytest.mark.parametrize("waited, elapsed, preprocess, said", [
    (1, 3, "fast", None), (3, 20, "processor", None), (50, 100, "processor", "--preprocess fast prepares"),
    (50, 100, "fast", "more --num_workers would help")])
def test_waiting(waited, elapsed, preprocess, said):
    note = _waiting_note(waited, elapsed, preprocess)
    assert note is None if said is None else "for 50% of the pass: " + said in note


def test_workers_and_options(parts):
    assert [_pass_workers(options, parts[1], "cpu") for options in (PassOptions(), PassOptions(num_workers=3))] == [0, 3]
    with pytest.raises(FrozenInstanceError): PassOptions().precision = "bf16"


def test_what_cannot_be_read_is_skipped_or_refused():
    refuse_unread({3: "row 3 cannot be decoded"}, "skip")
    with pytest.raises(BadImage, match="row 3 cannot be decoded; mend it"):
        refuse_unread({3: "row 3 cannot be decoded", 5: "row 5"}, "stop")


@pytest.mark.parametrize("options", [PassOptions(batch_size=50), PassOptions(num_workers=2, batch_size=200)])
def test_the_same_features_however_they_are_made(parts, options):
    backbone, rows, processor, _, features = parts
    assert torch.allclose(extract_features(backbone, rows, processor, options).cls, features.cls, atol=1e-5)


def test_batches_in_order(parts):
    backbone, rows, processor, _, features = parts
    batches = list(feature_batches(backbone, torch.utils.data.Subset(rows, range(1400, 1437)), processor, PassOptions(batch_size=8)))
    assert [len(batch.values) for batch in batches] == [8, 8, 8, 8, 5]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(1400, 1437))
    assert torch.allclose(torch.cat([batch.values for batch in batches])[:, 0], features.cls[1400:], atol=1e-5)


def test_batches_by_tokens(parts):
    "On a CPU a batch has about as many tokens whatever the size of its images; named sizes win."
    backbone = parts[0]
    for size, expected in ((dict(height=32, width=32), 64), (dict(height=224, width=224), 2), (dict(height=32, width=3200), 1)):
        assert _pass_size(PassOptions(), backbone, DINOv3ViTImageProcessor(size=size)) == expected
    cropped = DINOv3ViTImageProcessor(size={"shortest_edge": 4000}, do_center_crop=True, crop_size={"height": 32, "width": 32})
    assert _pass_size(PassOptions(), backbone, cropped) == 64
    assert _pass_size(PassOptions(batch_size=7), backbone, cropped) == 7


def test_pools():
    features = Features([torch.stack([torch.zeros(3, 4), torch.ones(3, 4)], 1)], torch.arange(3))
    assert [tuple(features.pool(pool).shape) for pool in ("cls", "mean", "cls_mean")] == [(3, 4), (3, 4), (3, 8)]
    assert features.pool("cls_mean")[0].tolist() == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match="cls, mean, cls_mean"): features.pool("max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_from_several_tables(dtype):
    "Whatever tables rows lie in, and in whatever order: the same as from one."
    table = torch.randn(20, 2, 5).to(dtype)
    places = torch.tensor([3, 19, -1, 0, 7, 7, 12])
    whole, cut = (Features(tables, places, {2: "row 2 is bad"}) for tables in ([table], [table[:7], table[7:7], table[7:15], table[15:]]))
    for pool in ("cls", "mean", "cls_mean"):
        assert whole.pool(pool).dtype == torch.float32 and torch.equal(whole.pool(pool), cut.pool(pool))
        assert torch.equal(whole.take(torch.tensor([5, 1]), pool), whole.pool(pool)[[5, 1]]) and whole.pool(pool)[2].abs().max() == 0
    assert torch.equal(whole.cls[[0, 1, 3]], table[[3, 19, 0], 0].float()) and whole.read.tolist() == [0, 1, 3, 4, 5, 6]


def test_the_order_of_the_images(parts):
    _, rows, processor, labels, features = parts
    kept = feature_loader(features, labels, "cls_mean", 64, EpochSampler(len(rows), 42))
    plain = make_loader(rows, Collator(processor), 64, EpochSampler(len(rows), 42), 0)
    for step, (ours, theirs) in enumerate(zip(kept, plain)):
        assert torch.equal(ours["labels"], theirs["labels"])
        if step: continue
        expected = both_pools(parts[0], theirs["pixel_values"]).flatten(1)
        assert torch.allclose(ours["features"], expected, atol=1e-5)


def test_skipped_rows_are_left_out_of_a_batch():
    features = Features([torch.zeros(40, 2, 4)], torch.arange(40), {17: "row 17 is bad"})
    rows = _FeatureRows(features, torch.arange(40))
    batch = rows.__getitems__([16, 17, 18])
    assert batch["labels"].tolist() == [16, 18] and batch["skipped"] == ["row 17 is bad"] and len(rows) == 40
    assert _WholeBatch()(batch) is batch


def test_flags():
    with pytest.raises(UserError, match="processor, fast"): FeatureArguments(preprocess="quick")
    with pytest.raises(UserError, match="--cache_dir is empty"): FeatureArguments(cache_dir="")
    with pytest.raises(UserError, match="--cache_limit 0 is out of range"): FeatureArguments(cache_limit=0)
    with pytest.raises(UserError, match="float32, float16, bfloat16"): FeatureArguments(feature_dtype="int8")


def test_rules_of_decoding_have_a_version():
    "If this fails, some picture looks different from now on: raise DECODING_VERSION, and take over the new digest."
    ramp, digest = np.linspace(0, 1, 60 * 80).reshape(60, 80), hashlib.sha256()
    colours = np.dstack([ramp * 255, ramp[::-1] * 255, ramp[:, ::-1] * 255]).astype(np.uint8)
    picture = Image.fromarray(colours)
    clear = Image.fromarray(np.dstack([colours, (ramp * 255).astype(np.uint8)]))
    pictures = [picture, picture.convert("L"), picture.convert("P"), picture.convert("1"), clear, clear.convert("LA"), picture.convert("CMYK")]
    pictures += [(ramp * top).astype(np.uint16) for top in (255, 1023, 4095, 65535)] + [ramp, (ramp - 0.5).astype(np.float32), (ramp * 1000).astype(np.int32)]
    turned = [Image.Exif() for _ in range(8)]
    for turn, exif in enumerate(turned, 1): exif[0x0112] = turn
    files = [encode(picture, "PNG", exif=exif) for exif in turned] + [encode(picture, kind) for kind in ("TIFF", "BMP")]
    for value in pictures + files: digest.update(np.asarray(open_image(value, 0)).tobytes())
    assert (DECODING_VERSION, digest.hexdigest()[:16]) == (1, "2509aedcbdba7eab")
