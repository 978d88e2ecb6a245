"""Features on a GPU: images a second against the ceiling, peak memory, the frozen run against the plain loop.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json  # one CUDA device, eight minutes at most
    python benchmarks/gpu.py --dry_run                           # every line of it on a CPU, toy sizes

The compiled backbones come last and are left out where time runs out; `skipped` in the results names them.
"""
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DINOv3ViTImageProcessor

from common import (SHAPES, command_line, describe_machine, gflop, make_backbone, make_photographs,
                    matmul_rate, save_backbone, write_json)
from dinov3_nb.core import DataArguments, QuantizationArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.images import ImageRows
from dinov3_nb.features import InPieces, PassOptions, both_pools, extract_features
from dinov3_nb.backbone import load_backbone
from dinov3_nb.quantization import held_bytes, quantization_config
from forward import preprocessing

STORAGE = {  # kind of weights: how they are loaded, autocast of the forward pass
    "float32": ({}, "no"), "float32, bfloat16 autocast": ({}, "bf16"), "nf4": ({"use_4bit": True}, "no"),
    "nf4, nested": ({"use_4bit": True, "use_nested_quant": True}, "no")}
COMPILE_SECONDS = 100  # time that one compiled backbone may need


def clean(device):
    "Give back the memory of what was deleted."
    gc.collect()
    if device == "cuda": torch.cuda.empty_cache()


def peak_since_last(device):
    "Peak memory of tensors in bytes since the last call, on CUDA."
    if device != "cuda": return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def images_per_second(backbone, device, precision, size, seconds):
    "Speed of the forward pass alone, and the batch size that fitted."
    pixels = torch.randn(size, 3, 224, 224, device=device)
    forward = InPieces(lambda part: both_pools(backbone, part, precision), size)
    for _ in range(2): forward(pixels).cpu()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        forward(pixels).cpu()  # the copy waits for the device
        calls += 1
    return calls * size / (time.perf_counter() - began), forward.size


def speed_row(given, name, backbone, device, precision, compiled, results):
    "One speed beside what the matrix-multiply rate allows."
    speed, size = images_per_second(backbone, device, precision, given.batch_size, given.seconds)
    ceiling = results["matmul_gflops"][precision] / gflop(name)
    results["forward"].append(dict(model=name, precision=precision, compiled=compiled, batch_size=size,
                                   images_per_second=speed, ceiling=ceiling, share=speed / ceiling))
    print(f"{name:<11} {precision:<5} {'compiled' if compiled else 'eager':<9} batch {size:>3}: "
          f"{speed:9,.0f} images/s, {speed / ceiling:4.0%} of {ceiling:,.0f}", flush=True)


def eager_speeds(given, device, results):
    "The backbones as they are, in both precisions."
    for name in given.models:
        backbone = make_backbone(name, device)
        for precision in ("no", "bf16"): speed_row(given, name, backbone, device, precision, False, results)
        del backbone
        clean(device)


def compiled_speeds(given, device, results, end):
    "The same through torch.compile, in bfloat16, while there is time."
    for name in given.models if given.compile else []:
        if time.perf_counter() > end - COMPILE_SECONDS:
            results["skipped"].append(f"{name} compiled")
            print(f"{name:<11} compiled: no time left for it", flush=True)
            continue
        backbone, began = torch.compile(make_backbone(name, device), dynamic=True), time.perf_counter()
        speed_row(given, name, backbone, device, "bf16", True, results)
        results["forward"][-1]["seconds_with_compilation"] = time.perf_counter() - began
        del backbone
        torch._dynamo.reset()
        clean(device)


def passes(given, device, folder, results):
    "The whole pass from JPEG files, by preprocessing; few different files, each of them read several times."
    make_photographs(folder, min(given.images, 512), 10)
    split = load_and_prepare_dataset(DataArguments(dataset=str(folder))).train
    processor = DINOv3ViTImageProcessor()
    preprocessing(ImageRows(split), processor, results, repeats=2)
    rows = ImageRows(split.select([i % len(split) for i in range(given.images)]))
    for name in given.models:
        backbone = make_backbone(name, device)
        for preprocess in ("processor", "fast"):
            options = PassOptions(preprocess, "bf16", num_workers=given.num_workers)
            notes, began = [], time.perf_counter()
            extract_features(backbone, rows, processor, options, log=notes.append)
            speed = len(rows) / (time.perf_counter() - began)
            results["pass"].append(dict(model=name, preprocess=preprocess, num_workers=given.num_workers,
                                        images=len(rows), images_per_second=speed, notes=notes))
            print(f"{name:<11} from files, {preprocess:<10}: {speed:9,.0f} images/s", *notes, flush=True)
        del backbone
        clean(device)


def memory_row(given, name, folder, kind, device, results):
    "Weights held, peak while loading, and peak of a forward pass, in bytes."
    options, precision = STORAGE[kind]
    peak_since_last(device)
    quantization = quantization_config(QuantizationArguments(**options))
    backbone = load_backbone(str(folder), quantization_config=quantization).to(device)
    loading = peak_since_last(device)
    both_pools(backbone, torch.randn(given.memory_batch, 3, 224, 224, device=device), precision)
    row = dict(model=name, kind=kind, held=held_bytes(backbone), peak_loading=loading,
               peak=peak_since_last(device), batch_size=given.memory_batch)
    results["memory"].append(row)
    peak = f", peak {row['peak'] / 1e6:9,.1f} MB" if row["peak"] else ""
    print(f"{name:<11} {kind:<27} held {row['held'] / 1e6:9,.1f} MB{peak}", flush=True)


def memory(given, device, results):
    "Every model in every kind of storage."
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(folder, name, device)
            for kind in STORAGE:
                clean(device)
                memory_row(given, name, folder, kind, device, results)
        clean(device)


def frozen_run(given, folder, results):
    "frozen_run.py once; its own process uses the GPU too."
    target = Path(folder) / "frozen.json"
    toy = "--model toy --train 20 --validation 10 --epochs 2 --eval_every_steps 2"
    sizes = toy.split() if given.dry_run else []
    command = [sys.executable, str(Path(__file__).with_name("frozen_run.py")), "--repeats", "1",
               "--num_workers", "0" if given.dry_run else "4", "--json", str(target), *sizes]
    run = subprocess.run(command, capture_output=True, text=True)
    print(run.stdout, flush=True)
    if target.exists(): results["frozen_run"] = json.loads(target.read_text())
    else: results["skipped"].append(f"frozen_run.py: {run.stderr[-500:]}")


def parse_arguments():
    parser = command_line(__doc__)
    sizes = [name for name in SHAPES if name != "toy"]
    parser.add_argument("--models", nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--batch_size", type=int, default=256, help="halved where memory runs out")
    parser.add_argument("--memory_batch", type=int, default=32, help="images when memory is measured")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each speed")
    parser.add_argument("--images", type=int, default=8192, help="images of the whole pass")
    parser.add_argument("--num_workers", type=int, help="processes that decode (default: as in a run)")
    parser.add_argument("--no_compile", dest="compile", action="store_false")
    parser.add_argument("--minutes", type=float, default=8.0, help="no compilation that may end later")
    parser.add_argument("--dry_run", action="store_true", help="toy sizes on a CPU")
    given = parser.parse_args()
    if given.dry_run:
        toy = dict(models=["toy"], batch_size=2, memory_batch=1, seconds=0.1, images=12, num_workers=0)
        for name, value in toy.items(): setattr(given, name, value)
    return given


def main():
    given = parse_arguments()
    if not given.dry_run and not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device here; --dry_run runs every line on the CPU.", file=sys.stderr)
        return 2
    device, side = ("cpu", 256) if given.dry_run else ("cuda", 8192)
    began = time.perf_counter()
    rates = {precision: matmul_rate(dtype, device, side, given.seconds)
             for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16))}
    print(f"matrix product: float32 {rates['no']:,.0f}, bfloat16 {rates['bf16']:,.0f} GFLOP/s")
    results = {"benchmark": "gpu", "machine": describe_machine(), "arguments": vars(given),
               "matmul_gflops": rates, "forward": [], "preprocess_ms": {}, "pass": [], "memory": [],
               "frozen_run": None, "skipped": []}
    eager_speeds(given, device, results)
    memory(given, device, results)
    with tempfile.TemporaryDirectory() as folder:
        passes(given, device, Path(folder) / "images", results)
        frozen_run(given, folder, results)
    compiled_speeds(given, device, results, began + 60 * given.minutes)
    results["seconds"] = time.perf_counter() - began
    write_json(given.json, results)
    return 0


if __name__ == "__main__": sys.exit(main())
