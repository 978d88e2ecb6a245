"Where it looks, in each family and with each head: sums, shapes, and a backbone that is left as it was."
import importlib.util

import numpy as np
import pytest
import torch
from helpers import save_convnext, save_timm, save_vits16
from PIL import Image
from torch import nn

from dinov3_nb.core import ModelArguments, QuantizationArguments
from dinov3_nb.looks import Look, class_attention, draw_looks, look, overlay, patch_colours, patch_grid, seen_images
from dinov3_nb.model import build_classifier
from dinov3_nb.quantization import quantization_config

FAMILIES = {"vit": save_vits16, "convnext": save_convnext}
if importlib.util.find_spec("timm"): FAMILIES["timm"] = save_timm
LANDSCAPE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / request.param
    FAMILIES[request.param](folder)
    return folder


def classifier(folder, pool="mean", head="linear", four_bits=False):
    torch.manual_seed(0)
    bits = QuantizationArguments(use_4bit=four_bits, bnb_4bit_compute_dtype="float32")
    arguments = ModelArguments(model_name=str(folder), pool=pool, head=head)
    model = build_classifier(arguments, ["a", "b", "c"], quantization_config(bits)).eval()
    with torch.no_grad():
        for parameter in model.head.parameters(): parameter.normal_()
    return model


def settings(model):
    "What attention a backbone computes, and how."
    blocks = getattr(getattr(model.backbone, "timm_model", None), "blocks", [])
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    return model.backbone.config._attn_implementation, [block.attn.fused_attn for block in blocks], model.training, hooks


@pytest.mark.parametrize("pool, four_bits", [("mean", False), ("cls_mean", False), ("mean", True)], ids=["mean", "both", "4bit"])
def test_evidence_sums_to_the_logit(folder, pool, four_bits):
    model = classifier(folder, pool, four_bits=four_bits)
    before = settings(model)
    looks, missing = look(model, LANDSCAPE, [2, 0])
    assert settings(model) == before
    with torch.no_grad(): logits = model(LANDSCAPE).logits
    grid = (2, 3) if folder.name == "convnext" else (4, 6)
    for found, logit in zip(looks, (logits[0, 2], logits[1, 0])):
        assert abs(found.evidence.sum() + found.rest - logit.item()) < 1e-4
        assert found.evidence.shape == grid and found.colours.shape == (*grid, 3)
        assert 0 <= found.colours.min() and found.colours.max() <= 1
        assert (found.rest == 0) is (pool == "mean")
    assert len(missing) == (folder.name == "convnext")


def test_attention_is_what_the_last_layer_did(folder):
    model = classifier(folder)
    looks, missing = look(model, LANDSCAPE, [0, 0])
    if folder.name == "convnext":
        assert all(found.attention is None for found in looks)
        assert missing == ["A ConvNeXt has no class token that attends to patches, so there is no picture of attention."]
        return
    shares = np.stack([found.attention.ravel() for found in looks])
    assert (shares > 0).all() and (shares.sum(1) < 1).all() and not missing
    if folder.name == "vit":
        model.backbone.set_attn_implementation("eager")
        with torch.no_grad(): layers = model.backbone(LANDSCAPE, output_attentions=True).attentions
        by_hand = layers[-1].mean(1)[:, 0, 5:]
    else: by_hand = timm_attention(model.backbone.timm_model)
    assert np.abs(shares - by_hand.numpy()).max() < 1e-5


@torch.no_grad()
def timm_attention(network):
    "The weights of the last block, worked out from what goes into it."
    from timm.layers import apply_rot_embed_cat
    given, layer = [], network.blocks[-1].attn
    hook = layer.register_forward_pre_hook(lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    network(LANDSCAPE)
    hook.remove()
    (x, *_), kwargs = given[0]
    qkv = layer.qkv(x) if layer.qkv.bias is not None or getattr(layer, "q_bias", None) is None else layer.qkv(x) + torch.cat(
        [layer.q_bias, layer.k_bias, layer.v_bias])
    q, k, _ = qkv.reshape(*x.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q), layer.k_norm(k)
    half = getattr(layer, "rotate_half", False)
    q, k = (torch.cat([part[:, :, :5], apply_rot_embed_cat(part[:, :, 5:], kwargs["rope"], half=half)], 2) for part in (q, k))
    return (q @ k.transpose(2, 3) * layer.scale).softmax(-1)[:, :, 0, 5:].mean(1)


def test_heads_without_parts_say_so(folder):
    for pool, head, sentence in (("cls", "linear", "The head sees the class token alone"), ("mean", "mlp", "A head of two layers")):
        looks, missing = look(classifier(folder, pool, head), LANDSCAPE, [0, 1])
        assert all(found.evidence is None and found.rest is None for found in looks)
        assert any(said.startswith(sentence) for said in missing)
    told = [said for said in look(classifier(folder, "cls"), LANDSCAPE, [0, 1])[1] if said.startswith("The head sees")]
    assert ("the picture of attention shows" in told[0]) is (folder.name != "convnext")


def test_a_pass_that_fails_leaves_no_trace(folder):
    model = classifier(folder).train()
    before = settings(model)
    with pytest.raises((RuntimeError, ValueError, AssertionError)): look(model, torch.randn(1, 5, 64, 64), [0])
    assert settings(model) == before and model.training


def test_many_images_go_through_in_parts(folder, monkeypatch):
    model = classifier(folder)
    once = look(model, LANDSCAPE, [0, 1])[0]
    monkeypatch.setattr("dinov3_nb.looks._AT_ONCE", 1)
    for a, b in zip(once, look(model, LANDSCAPE, [0, 1])[0]):
        assert np.abs(a.evidence - b.evidence).max() < 1e-4 and np.abs(a.colours - b.colours).max() < 1e-2


def test_colours_do_not_depend_on_the_order():
    patches = torch.randn(5, 12, 40, generator=torch.Generator().manual_seed(0))
    colours, order = patch_colours(patches), [3, 0, 4, 1, 2]
    assert np.abs(patch_colours(patches[order]) - colours[order]).max() < 1e-3
    assert np.abs(patch_colours(patches) - colours).max() == 0
    twice = patch_colours(torch.cat([patches[:1], patches]))
    assert np.abs(twice[0] - twice[1]).max() < 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 8), (3, 4, 2)])
def test_few_patches_and_equal_ones_have_colours(shape):
    assert np.isfinite(patch_colours(torch.randn(shape))).all()
    assert (patch_colours(torch.ones(shape)) == 0.5).all()


def test_class_attention_by_hand():
    weights = torch.zeros(1, 2, 4, 4)  # class token, a register, two patches
    weights[0, 0, 0], weights[0, 1, 0] = torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.tensor([0.5, 0.1, 0.4, 0.0])
    assert torch.allclose(class_attention(weights, 1), torch.tensor([[0.3, 0.2]]))


@pytest.mark.parametrize("kind", ["colours", "attention", "evidence"])
@pytest.mark.parametrize("size", [(8, 8), (300, 200), (1, 500)])
def test_overlays_are_small_and_of_the_images_shape(kind, size):
    values = np.zeros((2, 3, 3) if kind == "colours" else (2, 3))
    found = overlay(Image.new("RGB", size, "white"), values, kind)
    assert found.mode == "RGB" and max(found.size) == 160 and min(found.size) == max(1, round(160 * min(size) / max(size)))


def test_evidence_is_red_for_and_blue_against():
    found = np.asarray(overlay(Image.new("RGB", (20, 10), "white"), np.array([[1.0, -1.0]]), "evidence"), int)
    (red, _, blue), (other_red, _, other_blue) = found[5, 10], found[5, 150]
    assert red > blue + 40 and other_blue > other_red + 40
    assert (found[:, :79] == found[5, 10]).all() and (found[:, 81:] == found[5, 150]).all()  # no smoothing


def test_hostile_titles_and_missing_pictures_can_be_drawn(tmp_path):
    looks = [Look(np.random.rand(2, 3, 3), None, None, None)] * 3
    titles = ["$x^{", "<script>alert(1)</script> " + "long " * 80, ""]
    figure = draw_looks([Image.new("RGB", (30, 20))] * 3, looks, titles)
    figure.savefig(tmp_path / "figure.svg")
    assert len(figure.axes) == 6  # image and colours, no bars


def test_seen_images_are_those_that_went_in():
    class Processor: image_mean, image_std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    pixels = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (Processor.image_mean, Processor.image_std))
    seen = seen_images((pixels / 255 - mean) / std, Processor)
    assert [(np.asarray(image) == one.permute(1, 2, 0).numpy()).all() for image, one in zip(seen, pixels)] == [True, True]


def test_the_grid_is_the_number_of_patches(folder):
    model = classifier(folder)
    with torch.no_grad():
        for height, width in ((64, 96), (96, 64)):
            looks, _ = look(model, torch.randn(1, 3, height, width), [0])
            assert looks[0].colours.shape[:2] == patch_grid(model.backbone, height, width)
    assert isinstance(model.head, nn.Linear)
