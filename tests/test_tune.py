"Each parameter that is to learn gets a gradient: on each rung, in each family."
import pytest
import torch
from transformers import AutoModel, DINOv3ConvNextConfig, DINOv3ViTConfig

from dinov3_nb.core import TrainArguments, TuneArguments
from dinov3_nb.model import DinoV3Config, DinoV3Linear
from dinov3_nb.tune import choose_parameters, tuned_groups


def vit():
    return AutoModel.from_config(DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_register_tokens=4,
        use_gated_mlp=True))


def convnext(): return AutoModel.from_config(DINOv3ConvNextConfig(depths=[1, 1, 4, 3], hidden_sizes=[8, 16, 24, 32]))


def twin(name, **size):
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperModel
    return TimmWrapperModel(TimmWrapperConfig(architecture=name, model_args=size, do_pooling=False))


FAMILIES = {
    "vit": vit, "convnext": convnext,
    "timm": lambda: twin("vit_small_patch16_dinov3", depth=3, embed_dim=32, num_heads=2),
    "timm-plus": lambda: twin("vit_small_plus_patch16_dinov3", depth=3, embed_dim=32, num_heads=2),
    "timm-qkvb": lambda: twin("vit_small_patch16_dinov3_qkvb", depth=3, embed_dim=32, num_heads=2),
    "timm-convnext": lambda: twin("convnext_tiny", depths=[1, 1, 4, 3], dims=[8, 16, 24, 32]),
}


def build(family, tuning):
    torch.manual_seed(0)
    backbone = FAMILIES[family]()
    model = DinoV3Linear(DinoV3Config(backbone.config, num_labels=3), backbone)
    choose_parameters(model, tuning)
    return model


@pytest.mark.parametrize("tune", ["head", "last", "lora", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_learns_gets_gradients(family, tune):
    if tune == "lora": pytest.importorskip("peft")
    tuning = TuneArguments(tune=tune)
    model = build(family, tuning).train()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = tuned_groups(model, tuning, TrainArguments())
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, learning.values()))
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    for step in range(2):  # in the first step LoRA's A has a gradient of zero, since B is zero
        if step: optimizer.step()
        optimizer.zero_grad()
        model(images, labels).loss.backward()
    assert [name for name, p in learning.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_in_the_twin_with_biases(dora):
    pytest.importorskip("peft")
    from dinov3_nb.lora import merge_adapters
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    model = build("timm-qkvb", TuneArguments(tune="lora", lora_rank=4, dora=dora)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(): wanted, found = (m.eval()(images).logits for m in (model, merge_adapters(model)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
