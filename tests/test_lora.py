"Adapters in each family, in float32 and in 4 bits: all of them learn, come back to the bit, and are merged without a trace."
import json
import sys

import pytest
import torch
from helpers import make_image_folder
from transformers import AutoModelForImageClassification

from dinov3_nb import UserError, evaluate, load_classifier, train
from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.checkpoint import backbone_fingerprint, check_same_run, checkpoint_saver
from dinov3_nb.core import (
    DataArguments, ModelArguments, QuantizationArguments, TrainArguments, TuneArguments, features_are_fixed, make_settings,
)
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.files import load_weights, read_checkpoint
from dinov3_nb.inference import Classifier
from dinov3_nb.lora import add_adapters, has_adapters, linear_layers, merge_adapters, save_adapters
from dinov3_nb.model import build_classifier, checkpoint_activations
from dinov3_nb.optimizer import make_optimizer
from dinov3_nb.quantization import quantization_config, quantized_layers
from dinov3_nb.training import fit, make_loaders

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def save_vit(folder):
    "A small ViT whose layers count in full, with a gated MLP as in the largest checkpoints."
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_register_tokens=4,
        key_bias=False, use_gated_mlp=True, layerscale_value=1.0)).save_pretrained(folder)


def save_convnext(folder):
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel
    DINOv3ConvNextModel(DINOv3ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], layer_scale_init_value=1.0)).save_pretrained(folder)


def save_twin(name, folder, **size):
    "A small network of timm, with layer scales of 1 where trained ones are not tiny any more."
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, pretrained=False, num_classes=0, **size)
    for label, p in network.named_parameters():
        if "gamma" in label: torch.nn.init.ones_(p)
    timm.models.save_for_hf(network, str(folder), model_args=size)


FAMILIES = {
    "vit": save_vit, "convnext": save_convnext,
    "timm": lambda folder: save_twin("vit_small_patch16_dinov3", folder, depth=2, embed_dim=64, num_heads=2),
    "timm-convnext": lambda folder: save_twin("convnext_tiny.dinov3_lvd1689m", folder, depths=(1, 1, 1, 1), dims=(16, 32, 48, 64)),
}
BITS = {"float32": None, "4bit": quantization_config(QuantizationArguments(use_4bit=True, bnb_4bit_compute_dtype="float32"))}
NAMES = ["circle", "square", "stripes"]


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory):
    from transformers import DINOv3ViTImageProcessor
    folder = tmp_path_factory.mktemp(request.param) / "backbone"
    folder.mkdir()
    torch.manual_seed(0)
    FAMILIES[request.param](folder)
    if "timm" not in request.param: DINOv3ViTImageProcessor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=BITS)
def bits(request): return BITS[request.param]


@pytest.fixture(scope="module")
def pictures(): return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def build(backbone, bits=None, head="linear", **changes):
    "A classifier with adapters of rank 4."
    torch.manual_seed(0)
    model = build_classifier(ModelArguments(backbone, image_size=64, head=head), NAMES, bits)
    add_adapters(model, TuneArguments(tune="lora", lora_rank=4, **changes))
    return model


def tune(model, pictures, steps=4):
    "Losses of some large steps, with the optimizer that a run would take."
    optimizer, losses = make_optimizer(model, TrainArguments(learning_rate=0.01)), []
    for _ in range(steps):
        loss = model.train()(pictures, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model, pictures): return model.eval()(pictures).logits


def close(found, wanted):
    "Within a millionth of the largest logit, or of 1: float32 itself rounds to half of that a dozen times on the way."
    return (found - wanted).abs().max().item() <= 1e-6 * max(1.0, wanted.abs().max().item())


def test_all_linear_layers_learn_and_nothing_else_moves(backbone, bits, pictures):
    plain = build_classifier(ModelArguments(backbone), NAMES, bits)
    linear = [name for name, module in plain.backbone.named_modules() if isinstance(module, torch.nn.Linear)]
    model = build(backbone, bits)
    adapted = [name for name, module in model.backbone.named_modules() if hasattr(module, "lora_A")]
    assert adapted == linear and len(quantized_layers(model)) == (len(linear) if bits else 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name in before if "lora_" in name or name.startswith("head.")}
    losses = tune(model, pictures, steps=6)
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == learning  # zero of them silently frozen


def test_the_optimizer_of_4_bits(backbone):
    assert type(make_optimizer(build(backbone, BITS["4bit"]), TrainArguments())).__name__ == "AdamW8bit"
    assert type(make_optimizer(build(backbone), TrainArguments())).__name__ == "AdamW"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_and_exported(backbone, bits, dora, pictures, tmp_path):
    model = build(backbone, bits, dora=dora)
    untuned = logits(model, pictures)
    tune(model, pictures)
    wanted, layers = logits(model, pictures), len(quantized_layers(model))
    assert (wanted - untuned).abs().max() > 0.1
    Classifier(model, load_processor(backbone, image_size=64), NAMES, {}).save_pretrained(tmp_path / "exported")
    assert has_adapters(model) and len(quantized_layers(model)) == layers and torch.equal(logits(model, pictures), wanted)
    exported = load_classifier(tmp_path / "exported", "cpu").model
    assert not has_adapters(exported) and not any("lora" in name for name, _ in exported.named_parameters())
    assert {p.dtype for p in exported.parameters()} == {torch.float32} and "quantization" not in str(exported.config)
    assert close(logits(exported, pictures), wanted) and close(logits(merge_adapters(model), pictures), wanted)
    shares = (logits(exported, pictures).softmax(1) - wanted.softmax(1)).abs().max()
    assert shares < 1e-6


@pytest.mark.parametrize("head, dora", [("linear", False), ("mlp", True)])
def test_adapter_folder(backbone, bits, head, dora, pictures, tmp_path):
    from peft import PeftModel
    model = build(backbone, bits, head, dora=dora)
    untuned = logits(model, pictures)
    tune(model, pictures)
    wanted = logits(model, pictures)
    Classifier(model, load_processor(backbone, image_size=64), NAMES, {}).save_adapters(tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "adapters/base") and config["modules_to_save"] == ["head"]
    by_name = AutoModelForImageClassification.from_pretrained(tmp_path / "adapters")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "adapters/base")
    by_peft = PeftModel.from_pretrained(base, tmp_path / "adapters")
    found = [logits(by_name, pictures), logits(by_peft, pictures)]
    assert torch.equal(*found) and close(found[0], wanted) and (bits or torch.equal(found[0], wanted))
    assert (wanted - untuned).abs().max() > 0.1


def test_a_base_of_your_own(backbone, pictures, tmp_path):
    model = build(backbone)
    save_adapters(model, load_processor(backbone), tmp_path / "adapters", base="me/base-classifier")
    assert "me/base-classifier" in (tmp_path / "adapters/adapter_config.json").read_text(encoding="utf-8")
    assert not (tmp_path / "adapters/base").exists()


def test_gradient_checkpointing(backbone, bits, pictures):
    gradients = []
    for checkpointing in (False, True):
        model = build(backbone, bits)
        tune(model, pictures, steps=1)
        if checkpointing and model.backbone.config.model_type == "dinov3_convnext":
            with pytest.raises(UserError, match="is not available for dinov3_convnext"): checkpoint_activations(model)
            return
        if checkpointing: checkpoint_activations(model)
        model.train()(pictures, labels=LABELS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.abs().max() > 0 for g in gradients[1].values())
    assert all(torch.equal(g, gradients[0][name]) for name, g in gradients[1].items())


def test_the_fingerprint_is_that_of_the_frozen_backbone(backbone, bits, pictures):
    plain = build_classifier(ModelArguments(backbone), NAMES, bits)
    model = build(backbone, bits)
    tune(model, pictures, steps=1)
    assert backbone_fingerprint(model) == backbone_fingerprint(plain)


# --- runs on disk

@pytest.fixture(scope="module")
def images(tmp_path_factory): return make_image_folder(tmp_path_factory.mktemp("images"), per_class=4)


class Stopped(Exception): "A run that is killed."


def run(images, backbone, folder, four_bits=False, start=None, stop_after=None, **tuning):
    "A run with adapters: built, tuned and saved as `train` does it."
    settings = make_settings(
        DataArguments(str(images), num_workers=0), ModelArguments(backbone, image_size=64),
        QuantizationArguments(use_4bit=four_bits, bnb_4bit_compute_dtype="float32"),
        TrainArguments(epochs=2, batch_size=4, learning_rate=0.01, mixed_precision="no", no_tracking=True, checkpoint_dir=str(folder)),
        TuneArguments(tune="lora", **{"lora_rank": 4, "lora_dropout": 0.1, **tuning}))
    assert not features_are_fixed(settings)
    data, processor = load_and_prepare_dataset(settings.data), load_processor(backbone, image_size=64)
    torch.manual_seed(0)
    bits = quantization_config(settings.quantization)
    model = build_classifier(ModelArguments(backbone, image_size=64), data.class_names, bits)
    add_adapters(model, settings.tuning)
    if start:
        check_same_run(start, data, model)
        load_weights(model, start["model_state_dict"])
    save = checkpoint_saver(folder, settings.flat(), data, processor)

    def save_and_stop(state, is_best):
        save(state, is_best)
        if state.step == stop_after: raise Stopped

    loaders = make_loaders(data, processor, settings.data, settings.training)
    return fit(model, *loaders, settings.training, None, start, save_and_stop, log=lambda line: None)


@pytest.mark.parametrize("four_bits", [False, True], ids=["float32", "4bit"])
def test_reload_is_exact(images, backbone, four_bits, pictures, tmp_path):
    state = run(images, backbone, tmp_path, four_bits)
    kept = read_checkpoint(tmp_path / "last.pt")
    assert {name.split(".")[0] for name in kept["model_state_dict"]} == {"head", "backbone"}
    assert all("lora_" in name for name in kept["model_state_dict"] if name.startswith("backbone."))
    again = load_classifier(tmp_path / "last.pt", "cpu").model
    assert torch.equal(logits(again, pictures), logits(state.model, pictures)) and has_adapters(again)
    assert not again.training and len(quantized_layers(again)) == len(quantized_layers(state.model))


@pytest.mark.parametrize("four_bits", [False, True], ids=["float32", "4bit"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_killed_run_ends_bit_identical(images, four_bits, dora, tmp_path):
    whole = run(images, "tiny", tmp_path / "whole", four_bits, dora=dora)
    with pytest.raises(Stopped): run(images, "tiny", tmp_path / "killed", four_bits, stop_after=3, dora=dora)
    start = read_checkpoint(tmp_path / "killed" / "last.pt")
    resumed = run(images, "tiny", tmp_path / "killed", four_bits, start, dora=dora)
    assert start["step"] == 3 and whole.step == resumed.step == 6
    wanted = whole.model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.model.state_dict().items())
    ends = [read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed")]
    for name, tensor in ends[0]["model_state_dict"].items(): assert torch.equal(tensor, ends[1]["model_state_dict"][name])


def test_a_checkpoint_of_tiny_is_small(images, tmp_path):
    run(images, "tiny", tmp_path)
    weights = read_checkpoint(tmp_path / "best.pt")["model_state_dict"]
    held = sum(tensor.nbytes for tensor in weights.values())
    assert held == 4 * (4 * 4 * (4 * 256 + 2 * 640) + 3 * 129)  # rank 4, six layers in each of four blocks; the head
    assert held < (tmp_path / "best.pt").stat().st_size < 200_000


def test_evaluate_and_predict(images, tmp_path):
    state = run(images, "tiny", tmp_path)
    assert evaluate(tmp_path, num_workers=0).scores.accuracy == pytest.approx(state.best_acc)
    picture = next((images / "val").rglob("*.png"))
    assert {name for name, _ in load_classifier(tmp_path, "cpu").predict(picture)[0].labels} == set(NAMES)


def test_what_does_not_fit_is_named(images, tmp_path, monkeypatch):
    run(images, "tiny", tmp_path)
    weights = read_checkpoint(tmp_path / "best.pt")["model_state_dict"]
    with pytest.raises(UserError, match="unknown .'backbone.model.layer.0.attention.k_proj.lora_A"):
        load_weights(build_classifier(ModelArguments("tiny"), NAMES), weights)
    with pytest.raises(UserError, match="missing .'backbone.model.layer.0.attention.k_proj.lora_A"):
        load_weights(build("tiny"), {name: w for name, w in weights.items() if name.startswith("head.")})
    wider = build_classifier(ModelArguments("tiny"), NAMES)
    add_adapters(wider, TuneArguments(tune="lora", lora_rank=8))
    with pytest.raises(UserError, match=r"lora_A.default.weight is \(4, 128\) in the checkpoint and \(8, 128\) in the model"):
        load_weights(wider, weights)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install 'dinov3_nb\[lora\]'`"): load_classifier(tmp_path)


def train_with_adapters(images, folder, **changes):
    lines = []
    state = train(dataset=str(images), num_workers=0, model_name="tiny", tune="lora", lora_rank=4, epochs=2, batch_size=4, seed=1,
                  mixed_precision="no", no_tracking=True, checkpoint_dir=str(folder), log=lines.append, **changes)
    return state, "\n".join(lines)


@pytest.mark.parametrize("changes", [
    dict(), dict(use_4bit=True, bnb_4bit_compute_dtype="float32", lora_dropout=0.1), dict(dora=True, gradient_checkpointing=True)],
    ids=["plain", "4bit", "dora-checkpointing"])
def test_train_from_the_probe_and_back(images, changes, pictures, tmp_path):
    state, lines = train_with_adapters(images, tmp_path, **changes)
    learning = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    assert f"{learning:,} trainable" in lines and 37_000 < learning < 43_000
    moved = [name for name, p in state.model.named_parameters() if name.endswith("lora_B.default.weight") and p.abs().max() > 0]
    assert len(moved) == 24
    assert torch.equal(logits(load_classifier(tmp_path / "last.pt", "cpu").model, pictures), logits(state.model, pictures))


def test_train_killed_and_resumed(images, tmp_path, monkeypatch):
    whole, _ = train_with_adapters(images, tmp_path / "whole", eval_every_steps=1, lora_dropout=0.1)

    def stopping(*arguments):
        save = checkpoint_saver(*arguments)

        def save_and_stop(state, is_best):
            save(state, is_best)
            if state.step == 4: raise Stopped
        return save_and_stop

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("dinov3_nb.run.checkpoint_saver", stopping)
        train_with_adapters(images, tmp_path / "killed", eval_every_steps=1, lora_dropout=0.1)
    resumed, _ = train_with_adapters(images, tmp_path / "killed", eval_every_steps=1, lora_dropout=0.1, resume=True)
    wanted = whole.model.state_dict()
    assert whole.step == resumed.step == 6
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.model.state_dict().items())


def test_names_are_the_models_own():
    assert linear_layers(load_backbone("tiny")) == [
        "attention.k_proj", "attention.o_proj", "attention.q_proj", "attention.v_proj", "mlp.down_proj", "mlp.up_proj"]
