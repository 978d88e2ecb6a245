"Faults of a kind in backbones and classifiers: what a folder predicts, damage on disk, sizes, accumulation, bars."
import importlib.util
import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import save_convnext, save_timm
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.utils import logging as transformers_logging

import dinov3_nb  # noqa: F401  registers the classifiers
from dinov3_nb import weights as weights_module
from dinov3_nb.backbone import _set_image_size, _timm_processor, load_backbone, load_processor, processor_from_settings
from dinov3_nb.core import ModelArguments, QuantizationArguments, UserError
from dinov3_nb.pictures import open_image
from dinov3_nb.inference import Classifier, load_classifier
from dinov3_nb.digests import check_digests
from dinov3_nb.model import build_classifier, export_classifier, rebuild_classifier
from dinov3_nb.quantization import quantization_config
from dinov3_nb.weights import _TINY_SHA256, TINY_FOLDER, _stored_tensors, _weight_files, weights_fingerprint

timm_only = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def scene(mode="RGB", size=(40, 30), seed=0):
    "A picture with a left and a right half, and noise."
    pixels = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3))
    pixels[:, size[0] // 2:] += 150
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def pictures(folder):
    "One file of each kind that is more than plain RGB."
    folder.mkdir(parents=True)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1)))
    cut_out = scene()
    cut_out.putalpha(alpha)
    cut_out.save(folder / "rgba.png")
    grey = Image.merge("LA", (scene("L"), alpha))
    grey.save(folder / "la.png")
    palette = scene().quantize(8)
    palette.save(folder / "palette.png", transparency=palette.getpixel((35, 5)))
    exif = Image.Exif()
    for turn in (3, 6, 7):
        exif[274] = turn
        scene().save(folder / f"turned{turn}.jpg", exif=exif, quality=95)
    Image.fromarray((np.asarray(scene("L")).astype(np.uint16) * 200)).save(folder / "wide.png")
    scene("L").save(folder / "grey.png")
    scene("CMYK").save(folder / "cmyk.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A classifier whose logits tell pictures apart, and its folder."
    torch.manual_seed(0)
    model = build_classifier(ModelArguments("tiny"), ["a", "b", "c"]).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    processor, folder = load_processor("tiny"), tmp_path_factory.mktemp("exported") / "folder"
    export_classifier(model, processor, folder)
    return Classifier(model, processor, ["a", "b", "c"], {"mixed_precision": "no"}), folder


def scores_of(answer): return {a["label"]: a["score"] for a in answer}


@pytest.mark.filterwarnings("ignore:.*Palette images with Transparency")
def test_the_exported_folder_predicts_what_predict_does(exported, tmp_path):
    "By pipeline from a path and from a picture, and by hand from a picture, an array and a path."
    classifier, folder = exported
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor, classify = AutoImageProcessor.from_pretrained(folder), pipeline("image-classification", model=str(folder), device="cpu")
    loaded = load_classifier(folder, device="cpu")
    loaded.config["mixed_precision"] = "no"

    @torch.no_grad()
    def by_hand(image):
        return dict(zip("abc", model(**processor(images=image, return_tensors="pt")).logits.softmax(1)[0].tolist()))

    for path in pictures(tmp_path / "kinds"):
        wanted = pytest.approx(dict(classifier.predict(path)[0].labels), abs=1e-5)
        assert scores_of(classify(str(path))) == wanted, path.name
        assert scores_of(classify(Image.open(path))) == wanted, path.name
        assert by_hand(Image.open(path)) == wanted and by_hand([Image.open(path)]) == wanted, path.name
        assert by_hand(str(path)) == wanted, path.name
        assert by_hand(open_image(path, 0)) == wanted, path.name  # what is upright is not turned again
        assert dict(loaded.predict(path)[0].labels) == pytest.approx(dict(classifier.predict(path)[0].labels), abs=1e-5), path.name
    cut_out = np.asarray(Image.open(tmp_path / "kinds" / "rgba.png"))
    assert by_hand(cut_out) == pytest.approx(dict(classifier.predict(Image.fromarray(cut_out))[0].labels), abs=1e-5)
    answers = classify([str(path) for path in sorted((tmp_path / "kinds").iterdir())], batch_size=4)
    assert len(answers) == 9 and all(abs(sum(scores_of(a).values()) - 1) < 1e-5 for a in answers)
    with pytest.raises(UserError, match="There is no image 'nowhere.png'"): classify("nowhere.png")


def test_other_models_keep_their_pipeline(tmp_path):
    "A model that is not ours sees what transformers would show it."
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    cut_out = scene("RGBA")
    cut_out.putalpha(0)
    assert scores_of(classify(cut_out)) == pytest.approx(scores_of(classify(cut_out.convert("RGB"))))
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__ == "ViTImageProcessor"


def test_every_flipped_bit_of_an_exported_folder_is_noticed(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)
    check_digests(folder)
    generator = random.Random(0)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "digests.json"):
        content = (folder / name).read_bytes()
        for _ in range(12):
            damaged, bit = bytearray(content), generator.randrange(8 * len(content))
            damaged[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(damaged)
            try: check_digests(folder)
            except UserError: continue
            assert name == "digests.json" and json.loads(damaged) == json.loads(content)  # white space
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks its model.safetensors"): check_digests(folder)
    model = build_classifier(ModelArguments("tiny"), ["a", "b"])
    model.save_pretrained(folder)  # transformers' own way writes no digests, and leaves no stale ones
    check_digests(folder)
    assert not (folder / "digests.json").exists()


def test_tiny_is_what_was_shipped(tmp_path, monkeypatch):
    assert set(_TINY_SHA256) == {p.name for p in TINY_FOLDER.iterdir() if p.name != "training_log.json"}
    load_backbone("tiny"), load_processor("tiny")
    for name in _TINY_SHA256:
        folder = tmp_path / name
        shutil.copytree(TINY_FOLDER, folder)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
        monkeypatch.setattr(weights_module, "TINY_FOLDER", folder)
        for load in (load_backbone, load_processor):
            with pytest.raises(UserError, match=f"{name} is damaged, or was changed: install the package again"): load("tiny")


def test_the_fingerprint_sees_every_weight_and_nothing_else(tmp_path):
    "Matrices too; the same in 4 bits, sharded, under other names and in another type."
    tiny = load_backbone("tiny")
    wanted = weights_fingerprint(tiny.state_dict().values())
    for name, p in tiny.named_parameters():
        p.data.view(-1)[-1] += 1e-3
        assert weights_fingerprint(tiny.state_dict().values()) != wanted, name
        p.data.view(-1)[-1] = load_backbone("tiny").get_parameter(name).view(-1)[-1]
    tiny.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    assert len(_weight_files(str(tmp_path / "parts"))) > 1
    assert weights_fingerprint(_stored_tensors(_weight_files(str(tmp_path / "parts")))) == wanted
    for compute, nested in (("float32", False), ("bfloat16", True)):
        how = quantization_config(QuantizationArguments(use_4bit=True, bnb_4bit_compute_dtype=compute, use_nested_quant=nested))
        packed = load_backbone(str(tmp_path / "parts"), quantization_config=how)
        with torch.no_grad(): packed(torch.zeros(1, 3, 32, 32))
        assert packed.stored_fingerprint == wanted


def test_rebuilt_without_its_folder(tmp_path):
    saves = {"convnext": save_convnext} | ({"timm": save_timm} if importlib.util.find_spec("timm") else {})
    pixels = torch.randn(2, 3, 64, 64)
    for name, save in saves.items():
        save(tmp_path / name)
        arguments = ModelArguments(str(tmp_path / name), freeze_backbone=False, head="mlp", pool="cls_mean")
        model = build_classifier(arguments, ["x", "y"]).eval()
        stored = json.loads(model.backbone.config.to_json_string(use_diff=False))
        kept = json.loads(load_processor(str(tmp_path / name)).to_json_string())
        shutil.rmtree(tmp_path / name)
        again = rebuild_classifier(stored, arguments, ["x", "y"]).eval()
        again.load_state_dict(model.state_dict())
        with torch.no_grad(): assert torch.equal(again(pixels).logits, model(pixels).logits)
        assert again.config.id2label == {0: "x", 1: "y"} and processor_from_settings(kept).size
    with pytest.raises(UserError, match="architecture bert"): rebuild_classifier({"model_type": "bert"}, arguments, ["x"])
    with pytest.raises(UserError, match="architecture None"): rebuild_classifier({}, arguments, ["x"])


@timm_only
def test_image_size_keeps_the_geometry_of_a_twin(tmp_path):
    "A crop stays a crop, of the same share; as timm's own transform at that size."
    import timm
    save_timm(tmp_path / "twin")
    for share in (1.0, 0.875):
        config = json.loads((tmp_path / "twin" / "config.json").read_text())
        config["pretrained_cfg"] |= {"crop_pct": share, "input_size": [3, 256, 256]}
        (tmp_path / "twin" / "config.json").write_text(json.dumps(config))
        ours = load_processor(str(tmp_path / "twin"), image_size=128)
        settings = timm.data.resolve_data_config({"input_size": (3, 128, 128), "crop_pct": share, "interpolation": "bicubic"})
        theirs = timm.data.create_transform(**settings)
        picture = Image.fromarray(np.add.outer(np.arange(300), np.arange(480)).astype(np.uint8)).convert("RGB").resize((480, 300))
        mine = ours(picture, return_tensors="pt")["pixel_values"][0]
        assert mine.shape == (3, 128, 128) and (mine - theirs(picture)).abs().mean() < 0.1, share
    stretched = load_processor("tiny", image_size=64)
    assert dict(stretched.size) == {"height": 64, "width": 64} and not stretched.do_center_crop
    again = _timm_processor({"input_size": [3, 224, 224], "crop_pct": 0.875})
    _set_image_size(again, 448)
    assert (dict(again.size), dict(again.crop_size)) == ({"shortest_edge": 512}, {"height": 448, "width": 448})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_with_the_trainer_of_transformers(tmp_path, smoothing):
    "One batch of eight and four of two: the same loss and gradient, also where `Trainer` computes the loss itself."
    from transformers import Trainer, TrainingArguments
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3} for i in range(8)]
    found = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = build_classifier(ModelArguments("tiny"), ["a", "b", "c"])
        arguments = TrainingArguments(
            str(tmp_path / str(size)), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1, use_cpu=True,
            report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, max_grad_norm=1e9, optim="sgd", learning_rate=1.0,
            lr_scheduler_type="constant", label_smoothing_factor=smoothing)
        before = model.head.weight.detach().clone()
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        found.append((log["loss"], log["grad_norm"], before - model.head.weight.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3) and found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-6, rtol=1e-4)


def test_small_models_draw_no_bars(tmp_path, capfd):
    "Loaded plainly, in 4 bits and exported; a caller's bars are there afterwards."
    transformers_logging.enable_progress_bar()
    try:
        four_bits = quantization_config(QuantizationArguments(use_4bit=True))
        model = build_classifier(ModelArguments("tiny"), ["a", "b"])
        build_classifier(ModelArguments("tiny"), ["a", "b"], four_bits)
        export_classifier(model, load_processor("tiny"), tmp_path)
        assert transformers_logging.is_progress_bar_enabled()
    finally: transformers_logging.disable_progress_bar()
    said = capfd.readouterr()
    assert "it/s" not in said.out + said.err and "Loading weights" not in said.out + said.err


def test_a_small_file_is_loaded_as_transformers_would(tmp_path, monkeypatch):
    "Straight, under today's names too, or by transformers: the same; a file that lacks weights is refused either way."
    from safetensors.torch import load_file, save_file
    pixels, weights = torch.randn(2, 3, 64, 64), load_file(TINY_FOLDER / "model.safetensors")
    shutil.copytree(TINY_FOLDER, tmp_path / "today")
    save_convnext(tmp_path / "convnext")
    save_file(load_backbone("tiny").state_dict(), tmp_path / "today" / "model.safetensors", {"format": "pt"})
    straight = [load_backbone(str(folder)) for folder in (TINY_FOLDER, tmp_path / "today", tmp_path / "convnext")]
    monkeypatch.setattr(weights_module, "_load_small", lambda *given: None)
    usual = [load_backbone(str(folder)) for folder in (TINY_FOLDER, TINY_FOLDER, tmp_path / "convnext")]
    for one, other in zip(straight, usual):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
        with torch.no_grad(): assert torch.equal(one(pixels).last_hidden_state, other(pixels).last_hidden_state)
        assert one.dtype == torch.float32 and not one.training
    assert straight[0].config.to_dict() == usual[0].config.to_dict()
    monkeypatch.undo()
    save_file({k: v for k, v in weights.items() if "mlp" not in k}, tmp_path / "today" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 16 of the weights that its config.json promises"): load_backbone(str(tmp_path / "today"))


def test_tiny_is_loaded_straight(monkeypatch):
    def fail(*given): raise AssertionError("transformers was asked to load it")
    monkeypatch.setattr(weights_module, "_load_with_transformers", fail)
    load_backbone("tiny")
