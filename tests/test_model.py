"Heavier checks of backbones and classifiers: true sizes, timm's folders, 4 bits, saving and reloading."
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import save_convnext, save_timm, save_vits16
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

import dinov3_nb  # noqa: F401  registers the classifiers
from dinov3_nb.core import ModelArguments, QuantizationArguments, UserError
from dinov3_nb.backbone import (
    backbone_tokens, load_backbone, load_processor, pool_tokens, token_layout,
)
from dinov3_nb.catalogue import CHECKPOINTS, weight_bytes
from dinov3_nb.model import build_classifier, export_classifier
from dinov3_nb.quantization import count_parameters, held_bytes, quantization_config, quantized_layers

timm_only = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def save_timm_convnext(folder):
    "Random weights of timm's ConvNeXt-T in DINOv3's variant; its first stage is 96 wide, no multiple of 64."
    import timm
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("convnext_tiny.dinov3_lvd1689m", pretrained=False, num_classes=0), str(folder))
    return folder


def save_narrow_convnext(folder):
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel
    torch.manual_seed(0)
    DINOv3ConvNextModel(DINOv3ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[24, 40, 96, 100])).save_pretrained(folder)
    return folder


FAMILIES = {"vits16": save_vits16, "convnext": save_convnext, "convnext-narrow": save_narrow_convnext}
if importlib.util.find_spec("timm"): FAMILIES |= {"timm-vit": save_timm, "timm-convnext": save_timm_convnext}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "backbone"
    FAMILIES[request.param](folder)
    return str(folder)


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC)


def four_bits(kind="nf4", nested=False, compute="float32"):
    return quantization_config(QuantizationArguments(use_4bit=True, bnb_4bit_quant_type=kind, use_nested_quant=nested, bnb_4bit_compute_dtype=compute))


@pytest.mark.parametrize("head, pool, quantized", [("linear", "cls", False), ("mlp", "cls_mean", True)], ids=["linear-float32", "mlp-4bit"])
def test_exported_folder_is_whole(folder, picture, tmp_path, head, pool, quantized):
    "Every weight comes back to the bit, and the logits up to rounding: a matrix product may sum in another order."
    how = four_bits(nested=True) if quantized else None
    model = build_classifier(ModelArguments(model_name=folder, head=head, pool=pool), ["cat", "dog", "owl"], how).eval()
    processor = load_processor(folder, image_size=64)
    pixels = processor([picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad(): logits = model(pixels).logits
    export_classifier(model, processor, tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad(): torch.testing.assert_close(again(pixels).logits, logits, atol=1e-6, rtol=1e-6)
    assert quantized_layers(again) == quantized_layers(model) and bool(quantized_layers(model)) is quantized
    assert held_bytes(again) == held_bytes(model) and count_parameters(again) == count_parameters(model)
    assert not any(p.requires_grad for p in again.backbone.parameters()) and not again.backbone.training
    answer = pipeline("image-classification", model=str(tmp_path), device="cpu")(picture)
    expected = dict(zip(["cat", "dog", "owl"], logits.softmax(dim=1)[0].tolist()))
    assert {a["label"]: pytest.approx(a["score"], abs=1e-5) for a in answer} == expected


def test_4bit_on_cpu_in_every_kind(folder):
    "Each kind of 4 bits gives finite features near those of float32, twice the same."
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): reference = backbone_tokens(load_backbone(folder), pixels)[:, 0]
    for kind, nested, compute in (("nf4", False, "float32"), ("fp4", True, "bfloat16")):
        backbone = load_backbone(folder, quantization_config=four_bits(kind, nested, compute))
        linear = sum(isinstance(m, torch.nn.Linear) for m in backbone.modules())
        assert len(quantized_layers(backbone)) == linear > 0
        with torch.no_grad(): first, second = (backbone_tokens(backbone, pixels)[:, 0] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.nn.functional.cosine_similarity(first, reference).min() > 0.8


def test_table_agrees_with_a_real_vits16(tmp_path):
    save_vits16(tmp_path / "vits16")
    row = CHECKPOINTS[0]
    assert count_parameters(load_backbone(str(tmp_path / "vits16")))[0] == row.parameters
    held = held_bytes(load_backbone(str(tmp_path / "vits16"), quantization_config=four_bits()))
    levels, positions, layers = 64, 64, 72  # bytes of a table of sixteen float32 levels, and of one buffer; linear layers
    assert held == weight_bytes(row)["4 bits"] + layers * levels + positions


def test_frozen_and_unfrozen(folder):
    pixels, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    frozen = build_classifier(ModelArguments(model_name=folder), ["a", "b"]).train()
    before = {k: v.clone() for k, v in frozen.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in frozen.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3): frozen(pixels, labels).loss.backward(); optimizer.step(); optimizer.zero_grad()
    assert all(torch.equal(v, before[k]) for k, v in frozen.backbone.state_dict().items())  # batch statistics included
    assert not frozen.features(pixels).requires_grad and not frozen.backbone.training
    trainable = build_classifier(ModelArguments(model_name=folder, freeze_backbone=False), ["a", "b"]).train()
    trainable(pixels, labels).loss.backward()
    unused = [n for n, p in trainable.named_parameters() if p.grad is None]
    assert all("mask_token" in n for n in unused) and trainable.backbone.training


@timm_only
def test_gradient_checkpointing_through_timm(tmp_path):
    save_timm(tmp_path / "timm")
    pixels, labels, gradients = torch.randn(2, 3, 64, 64), torch.tensor([0, 1]), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_classifier(ModelArguments(model_name=str(tmp_path / "timm"), freeze_backbone=False, gradient_checkpointing=checkpointing), ["a", "b"]).train()
        assert model.backbone.timm_model.grad_checkpointing is checkpointing
        torch.manual_seed(1)
        model(pixels, labels).loss.backward()
        gradients.append(model.backbone.timm_model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


@timm_only
def test_timm_tokens_and_untouched_folder(tmp_path):
    pixels = torch.randn(1, 3, 64, 64)
    save_timm(tmp_path / "vit"), save_timm_convnext(tmp_path / "convnext")
    before = (tmp_path / "vit" / "config.json").read_bytes()
    vit, convnext = load_backbone(str(tmp_path / "vit")), load_backbone(str(tmp_path / "convnext"))
    assert (tmp_path / "vit" / "config.json").read_bytes() == before and b"model_args" in before
    assert (token_layout(vit), token_layout(convnext)) == ((4, 384), (0, 768))
    with torch.no_grad():
        output = vit(pixels)
        assert torch.equal(backbone_tokens(vit, pixels), vit.timm_model.forward_features(pixels))
        torch.testing.assert_close(output.pooler_output, pool_tokens(output.last_hidden_state, pool="mean"))
        tokens = backbone_tokens(convnext, pixels)
        assert tokens.shape == (1, 1 + 4, 768)
        torch.testing.assert_close(tokens[:, 0], convnext(pixels).pooler_output)


@timm_only
def test_timm_convnext_is_the_transformers_convnext(tmp_path):
    "The same weights under timm's and transformers' names give the same tokens, so both get the same classifier."
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel
    save_timm_convnext(tmp_path / "timm")
    twin = load_backbone(str(tmp_path / "timm"))
    ours = DINOv3ConvNextModel(DINOv3ConvNextConfig(depths=[3, 3, 9, 3])).eval()
    renames = (("stem.", "stages.0.downsample_layers."), ("downsample.", "downsample_layers."), ("blocks.", "layers."), ("conv_dw", "depthwise_conv"),
               ("mlp.fc1", "pointwise_conv1"), ("mlp.fc2", "pointwise_conv2"), (".norm.", ".layer_norm."), ("head.layer_norm", "layer_norm"))
    state = {}
    for key, value in twin.timm_model.state_dict().items():
        for old, new in renames: key = key.replace(old, new)
        state[key if key.startswith("layer_norm") else f"model.{key}"] = value
    ours.load_state_dict(state)
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad(): torch.testing.assert_close(backbone_tokens(twin, pixels), backbone_tokens(ours, pixels), atol=1e-4, rtol=1e-4)


@timm_only
def test_timm_processor_does_what_timm_does(tmp_path, picture):
    save_timm(tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["model_args"].pop("num_classes")
    shutil.copytree(tmp_path / "timm", tmp_path / "mended")
    (tmp_path / "mended" / "config.json").write_text(json.dumps(config))
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "mended")([picture])["pixel_values"]
    ours = load_processor(str(tmp_path / "timm"))([picture], return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (1, 3, 256, 256)
    assert (ours - theirs).abs().max() < 0.04  # 2 of 255 grey levels: they round to whole levels after resizing
    assert load_processor(str(tmp_path / "timm"), image_size=64)([picture], return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


@timm_only
def test_without_timm(tmp_path, monkeypatch):
    save_timm(tmp_path / "timm")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find_spec(name, *rest))
    with pytest.raises(UserError, match=r"The timm model .*timm needs the package timm.*pip install 'dinov3_nb\[timm\]'"): load_backbone(str(tmp_path / "timm"))


@timm_only
def test_a_timm_twin_saved_again_is_still_known(tmp_path):
    "transformers' own save_pretrained keeps the tag by which a ConvNeXt of DINOv3 is told from others."
    load_backbone(str(save_timm_convnext(tmp_path / "timm"))).save_pretrained(tmp_path / "again")
    assert token_layout(load_backbone(str(tmp_path / "again"))) == (0, 768)


@timm_only
def test_other_architectures_are_refused(tmp_path):
    import timm
    timm.models.save_for_hf(timm.create_model("resnet18", pretrained=False), str(tmp_path / "resnet"))
    with pytest.raises(UserError, match="architecture resnet18, not DINOv3"): load_backbone(str(tmp_path / "resnet"))
    timm.models.save_for_hf(timm.create_model("convnext_tiny.fb_in1k", pretrained=False), str(tmp_path / "convnext"))
    with pytest.raises(UserError, match="architecture convnext_tiny, not DINOv3"): load_backbone(str(tmp_path / "convnext"))
    from transformers import ViTConfig, ViTModel
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="architecture vit, not DINOv3"): load_backbone(str(tmp_path / "vit"))


def test_head_depends_on_the_seed_alone(tmp_path):
    save_vits16(tmp_path / "a"), save_vits16(tmp_path / "b")
    AutoModel.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).save_pretrained(tmp_path / "b")  # another type, another way of loading
    heads = []
    for name, how in (("a", None), ("b", None), ("a", four_bits())):
        torch.manual_seed(7)
        heads.append(build_classifier(ModelArguments(model_name=str(tmp_path / name)), ["a", "b"], how).head.weight)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])
