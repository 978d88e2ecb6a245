"Small things that several tests need: image folders, backbones with random weights, the command line as a process."
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
from forks import ENVIRONMENT
from PIL import Image

SCRIPT = Path(sys.executable).with_name("dinov3-nb")


def command(*arguments, cwd, timeout=300, real=False, **environment):
    "Run `dinov3-nb` as a person would, and return the finished process: forked (see forks.py), or a `real` one."
    words = [str(word) for word in (SCRIPT, *arguments)]
    environment = {**ENVIRONMENT, "TRACKIO_DIR": str(Path(cwd) / "trackio"), **environment}
    if not real: return forks.run(words, cwd, environment, timeout)
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def make_image_folder(root, per_class=8, size=48, classes=("circle", "square", "stripes")):
    "An ImageFolder of generated pictures: train/ and val/ with one folder per class."
    generator = np.random.default_rng(0)
    grid = np.linspace(-1, 1, size)
    shapes = {"circle": np.hypot(*np.meshgrid(grid, grid)) < 0.6, "square": np.maximum(*map(abs, np.meshgrid(grid, grid))) < 0.6,
              "stripes": np.sin(12 * np.meshgrid(grid, grid)[0]) > 0}
    for split in ("train", "val"):
        for name in classes:
            folder = Path(root) / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                colour = generator.integers(80, 255, 3)
                pixels = shapes[name][..., None] * colour + generator.integers(0, 40, (size, size, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return Path(root)


def save_vits16(folder):
    "Random weights in the true configuration of ViT-S/16, with its image processor."
    import torch
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel
    torch.manual_seed(0)
    config = DINOv3ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
                             num_register_tokens=4, key_bias=False)
    DINOv3ViTModel(config).save_pretrained(folder)
    DINOv3ViTImageProcessor().save_pretrained(folder)
    return folder


def save_convnext(folder):
    "Random weights in a ConvNeXt configuration of DINOv3, with its image processor."
    import torch
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTImageProcessor
    torch.manual_seed(0)
    DINOv3ConvNextModel(DINOv3ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[64, 128, 192, 256])).save_pretrained(folder)
    DINOv3ViTImageProcessor().save_pretrained(folder)
    return folder


def save_timm(folder):
    "Random weights of timm's ViT-S/16 twin, written by timm itself as for the Hub."
    import timm
    import torch
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0), str(folder))
    return folder
