"What the benchmarks share: images, models with random weights, the machine's own speed, and processes."
import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = {  # width, layers, attention heads, MLP width, gated MLP: as published, and one for tests
    "vits16": (384, 12, 6, 1536, False), "vitb16": (768, 12, 12, 3072, False),
    "vitl16": (1024, 24, 16, 4096, False), "vith16plus": (1280, 32, 20, 5120, True),
    "toy": (64, 2, 2, 128, True)}


def gflop(size, side=224):
    "10^9 floating-point operations of one image; a multiplication and an addition are two."
    width, layers, _, mlp, gated = SHAPES[size]
    patches = (side // 16) ** 2
    tokens = patches + 5  # the class token and four registers
    weights = 4 * width**2 + (3 if gated else 2) * width * mlp
    attention = 2 * tokens * width  # scores, and the values that they weigh
    return 2 * (layers * tokens * (weights + attention) + patches * 3 * 16**2 * width) / 1e9


def photograph(generator, kind, num_kinds, height, width):
    "A JPEG of about 45 kB: fields of colour, a texture that belongs to its kind, and grain."
    y, x = np.mgrid[:height, :width] / 512
    angle, waves = np.pi * kind / num_kinds, 12 + 6 * (kind % 3)
    along = x * np.cos(angle) + y * np.sin(angle)
    texture = np.sin(2 * np.pi * waves * along + generator.uniform(0, 6))
    fields = Image.fromarray(generator.integers(40, 216, (6, 8, 3), dtype=np.uint8))
    colours = np.asarray(fields.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = colours + 28 * texture[..., None] + generator.normal(0, 5.5, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def make_photographs(folder, train=376, validation=125, num_kinds=10, seed=0):
    "Class folders of JPEGs in train/ and val/, the same for the same seed."
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", validation)):
        for i in range(count):
            kind, height = i % num_kinds, int(generator.choice([384, 512]))
            place = Path(folder) / split / f"kind{kind}" / f"{i:05}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(photograph(generator, kind, num_kinds, height, 512))
    return Path(folder)


def make_backbone(size, device="cpu"):
    "Random weights in a published configuration."
    import torch
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    width, layers, heads, mlp, gated = SHAPES[size]
    config = DINOv3ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=mlp,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", num_register_tokens=4, key_bias=False)
    torch.manual_seed(0)
    with torch.device(device): return DINOv3ViTModel(config).eval()


def save_backbone(folder, size="vits16", device="cpu"):
    "The same as a folder that `--model_name` takes, with the image processor."
    from transformers import DINOv3ViTImageProcessor
    from transformers.utils import logging
    logging.disable_progress_bar()
    make_backbone(size, device).save_pretrained(folder)
    DINOv3ViTImageProcessor().save_pretrained(folder)
    return Path(folder)


def matmul_rate(dtype, device="cpu", side=2048, seconds=2.0):
    "GFLOP a second of a large matrix product: the best of many."
    import torch
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if device != "cpu": torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device != "cpu": torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e9


def cpu_seconds():
    "User and system time of this process and of its finished children."
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(p.ru_utime + p.ru_stime for p in parts)


def peak_megabytes():
    "The most memory that this process has held."
    status = Path("/proc/self/status")  # ru_maxrss is inherited from the parent on Linux
    if status.exists():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if found: return int(found[0]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def describe_machine():
    "What a figure has to be read with."
    import torch
    model, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    packages = ("torch", "torchvision", "transformers", "bitsandbytes", "dinov3_nb")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": gpu, "cuda": torch.version.cuda if gpu else None,
            "python": platform.python_version(), **{name: version(name) for name in packages}}


def command_line(text):
    "A parser whose help opens with a script's own text."
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the results")
    return parser


def write_json(file, results):
    "Write the results, if a file was named; its folder is made if missing."
    if not file: return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(results, indent=1) + "\n")


def in_own_process(script, *arguments):
    "Run a script that ends by printing one line of JSON, and return that."
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode: raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])
