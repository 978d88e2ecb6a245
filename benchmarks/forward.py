"""How much of the machine the backbone uses, and how much of a pass is backbone and preprocessing.

    python benchmarks/forward.py            # ViT-S/16 with random weights, about four minutes on two cores
    python benchmarks/forward.py --compile  # with torch.compile too
"""
import sys
import tempfile
import time
from contextlib import contextmanager

import torch

from common import (SHAPES, command_line, cpu_seconds, describe_machine, gflop, make_backbone,
                    make_photographs, matmul_rate, write_json)
from dinov3_nb.core import DataArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.images import Collator, ImageRows
from dinov3_nb.decoding import FastProcessor, PassCollator, decode_image
from dinov3_nb.features import PassOptions, both_pools, extract_features

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


def best_of(function, repeats=3):
    "The least wall seconds and the least CPU seconds of a few calls."
    times = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), cpu_seconds()
        function()
        times.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return [min(kind) for kind in zip(*times)]


@contextmanager
def one_thread():
    "PyTorch on one core."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(threads)


def forward_share(model, precision, size, given, rate):
    "Images a second at one batch size, and the share of the matrix-multiply rate that this is."
    pixels, calls = torch.randn(size, 3, 224, 224), max(1, given.images // size)
    both_pools(model, pixels, precision)
    wall, cpu = best_of(lambda: [both_pools(model, pixels, precision) for _ in range(calls)])
    speed = calls * size / wall
    return dict(precision=precision, batch_size=size, images_per_second=speed,
                share=speed * gflop(given.model) / rate, cpu_ms=1e3 * cpu / (calls * size))


def forward_shares(given, backbone, results):
    "The same for every precision and batch size, compiled or not."
    models = {"eager": backbone}
    if given.compile: models["compiled"] = torch.compile(backbone, dynamic=True)
    for precision, dtype in PRECISIONS.items():
        rate = results["matmul_gflops"][precision] = matmul_rate(dtype)
        print(f"\n{str(dtype)[6:]}: matrix product {rate:,.0f} GFLOP/s")
        for kind, model in models.items():
            for size in given.batch_sizes:
                row = {"kind": kind, **forward_share(model, precision, size, given, rate)}
                results["forward"].append(row)
                print(f"  {kind:<9} batch {size:>3}: {row['images_per_second']:7.1f} images/s, "
                      f"{row['share']:4.0%} of the matrix product", flush=True)


def preprocessing(rows, processor, results, repeats=5):
    "CPU milliseconds an image on one core, by path."
    items = [rows[i] for i in range(min(96, len(rows)))]
    batches = [items[i:i + 16] for i in range(0, len(items), 16)]
    paths = {"decode only": lambda batch: [decode_image(item["image"], item["row"]) for item in batch],
             "processor, PIL decoder": Collator(processor), "processor": PassCollator(processor),
             "fast": PassCollator(FastProcessor(processor))}
    print("\npreprocessing, one core:")
    with one_thread():
        for name, path in paths.items():
            seconds = best_of(lambda: [path(batch) for batch in batches], repeats)[1]
            milliseconds = results["preprocess_ms"][name] = 1e3 * seconds / len(items)
            print(f"  {name:<24}{milliseconds:6.2f} ms an image, {1e3 / milliseconds:6.0f} images/s")
    found = results["preprocess_ms"]
    for slow in ("processor, PIL decoder", "processor"):
        print(f"  fast takes {found['fast'] / found[slow]:.2f} of the time of: {slow}")


def whole_pass(given, backbone, rows, processor, results):
    "CPU time of the pass against that of its two parts alone, on the same images."
    starts, collator = range(0, len(rows), 16), PassCollator(processor)
    def prepare(start): return collator([rows[i] for i in range(start, min(start + 16, len(rows)))])
    pixels = [prepare(start)["pixel_values"] for start in starts]
    _, forward = best_of(lambda: [both_pools(backbone, batch) for batch in pixels], given.repeats)
    with one_thread(): _, alone = best_of(lambda: [prepare(start) for start in starts], given.repeats)
    print(f"\nthe pass over {len(rows)} images, float32: forward alone {forward:.1f} CPU s, "
          f"preprocessing alone {alone:.1f} CPU s")
    for workers in (None, 0, 1, 2):
        options = PassOptions(num_workers=workers)
        wall, cpu = best_of(lambda: extract_features(backbone, rows, processor, options), given.repeats)
        results["pass"].append(dict(num_workers=workers, wall=wall, cpu=cpu, forward_cpu=forward,
                                    preprocess_cpu=alone, ratio=cpu / (forward + alone)))
        name, share = "default" if workers is None else workers, cpu / (forward + alone)
        print(f"  {name!s:>7} workers: {wall:5.1f} s, {cpu:5.1f} CPU s, {share:.3f} of the parts", flush=True)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (a minute or more)")
    parser.add_argument("--model", choices=list(SHAPES), default="vits16", help="shape of the random weights")
    parser.add_argument("--images", type=int, default=64, help="images for each forward measurement")
    parser.add_argument("--pass_images", type=int, default=320, help="images of the whole pass")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    from transformers import DINOv3ViTImageProcessor
    backbone, processor = make_backbone(given.model), DINOv3ViTImageProcessor()
    results = {"benchmark": "forward", "machine": describe_machine(), "arguments": vars(given),
               "matmul_gflops": {}, "forward": [], "preprocess_ms": {}, "pass": []}
    forward_shares(given, backbone, results)
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(folder, given.pass_images, 10)
        rows = ImageRows(load_and_prepare_dataset(DataArguments(dataset=folder)).train)
        preprocessing(rows, processor, results)
        whole_pass(given, backbone, rows, processor, results)
    write_json(given.json, results)
    return 0


if __name__ == "__main__": sys.exit(main())
