"A backbone that learns, as one writes it by hand with PyTorch and peft: the recipe of `--tune all` and `--tune lora`."
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from plain_loop import SEED, ImageFiles, ProcessBatch, make_head
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel

TOP_RATE, LORA_RATE, HEAD_RATE, LAYER_DECAY = 1e-4, 5e-4, 5e-4, 0.75
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def layer_groups(backbone):
    "For AdamW: a rate for each block, three quarters of that above it; vectors don't decay."
    top, groups = backbone.config.num_hidden_layers, {}
    for name, parameter in backbone.named_parameters():
        parts = name.split(".")
        if name.endswith("mask_token"): parameter.requires_grad_(False); continue
        if "layer" in parts: depth = int(parts[parts.index("layer") + 1]) + 1
        else: depth = 0 if parts[0] == "embeddings" else top
        decay = 0.05 if parameter.ndim >= 2 and not name.endswith(("token", "tokens")) else 0.0
        groups.setdefault((depth, decay), []).append(parameter)
    return [{"params": found, "lr": TOP_RATE * LAYER_DECAY ** (top - depth), "weight_decay": decay, "warmup": 0.1}
            for (depth, decay), found in groups.items()]


def adapter_groups(backbone):
    "Adapters on all linear layers; what there is to learn, and the backbone with them."
    import peft
    backbone = peft.get_peft_model(backbone, peft.LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS))
    learning = [p for p in backbone.parameters() if p.requires_grad]
    return [{"params": learning, "lr": LORA_RATE, "weight_decay": 0.05, "warmup": 0.1}], backbone


def cosine(warmup, steps):
    "A rise over the first steps, then half a cosine."
    first = int(warmup * steps)
    def share(step):
        if step < first: return step / first
        return 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))
    return share


def run(folder, model_name, given):
    "Seconds from the first image to the last line, and the losses of each epoch."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, validation = (ImageFiles(Path(folder) / name) for name in ("train", "val"))
    collate = ProcessBatch(AutoImageProcessor.from_pretrained(model_name))
    backbone = AutoModel.from_pretrained(model_name, dtype=torch.float32)
    head = make_head(backbone.config.hidden_size, len(train.classes), device)
    if given.part == "lora": groups, backbone = adapter_groups(backbone.requires_grad_(False))
    else: groups = layer_groups(backbone)
    backbone.to(device)
    groups = [{"params": [head.weight], "lr": HEAD_RATE, "weight_decay": 1e-4, "warmup": 0.05},
              {"params": [head.bias], "lr": HEAD_RATE, "weight_decay": 0.0, "warmup": 0.05}, *groups]
    optimizer = torch.optim.AdamW(groups, fused=True)
    learning = [p for group in groups for p in group["params"]]
    steps = given.epochs * math.ceil(len(train) / given.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [cosine(g["warmup"], steps) for g in groups])
    options, bfloat16 = dict(collate_fn=collate, num_workers=0), given.precision == "bf16"
    def loss_of(pixels, labels):
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            logits = head(backbone(pixel_values=pixels.to(device)).last_hidden_state[:, 0])
        return F.cross_entropy(logits.float(), labels.to(device))
    curve, began = [], time.perf_counter()
    for epoch in range(given.epochs):
        backbone.eval()  # DINOv3 has no dropout, and stretches positions in training, which is left out here
        order, total = np.random.default_rng([SEED, epoch]).permutation(len(train)).tolist(), 0.0
        for pixels, labels in DataLoader(train, given.batch_size, sampler=order, **options):
            loss = loss_of(pixels, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item() * len(labels)
        with torch.no_grad():
            held_out = sum(loss_of(*batch).item() * len(batch[1]) for batch in DataLoader(validation, 32, **options))
        curve.append([total / len(train), held_out / len(validation)])
        print(f"epoch {epoch + 1}: {curve[-1]}", file=sys.stderr)
    return {"seconds": time.perf_counter() - began, "curve": curve}
