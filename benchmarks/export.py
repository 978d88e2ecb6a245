"""What an ONNX file gains: PyTorch beside onnxruntime, in float32 and in 8 bits.

    python benchmarks/export.py  # ViT-S/16 and ConvNeXt-T with random weights, about two minutes on two cores
"""
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import SHAPES, command_line, describe_machine, gflop, make_backbone, matmul_rate, write_json
from dinov3_nb.core import ModelArguments
from dinov3_nb.inference import Classifier
from dinov3_nb.model import build_classifier
from dinov3_nb.onnx_export import write_int8, write_onnx

CONVNEXTS = {  # blocks of each stage, widths: as published, and one for tests
    "convnext-tiny": ([3, 3, 9, 3], [96, 192, 384, 768]), "toy-convnext": ([1, 1, 1, 1], [16, 32, 48, 64])}


def convnext_gflop(name, side):
    "10^9 floating-point operations of one image; a multiplication and an addition are two."
    depths, widths = CONVNEXTS[name]
    total, before = 0, 3
    for stage, (depth, width) in enumerate(zip(depths, widths)):
        pixels, taps = (side // 4 // 2**stage) ** 2, 16 if stage == 0 else 4
        total += pixels * (taps * before * width + depth * (49 * width + 8 * width**2))
        before = width
    return 2 * total / 1e9


def int8_rate(side=2048, seconds=2.0):
    "The same of a product of 8-bit integers, by onnxruntime: 10^9 operations a second."
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper
    shape, levels = [side, side], np.ones((side, side), np.int8)
    weight = helper.make_tensor("b", TensorProto.INT8, shape, levels.tobytes(), raw=True)  # known beforehand, as weights are
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])], "product", [helper.make_tensor_value_info("a", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("c", TensorProto.INT32, shape)], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    values, best, end = {"a": levels.astype(np.uint8)}, float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        session.run(None, values)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e9


def session_options():
    "onnxruntime on as many threads as PyTorch takes."
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def make_classifier(name, side, folder):
    "Ten classes on a backbone with random weights."
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTImageProcessor
    from transformers.utils import logging
    logging.disable_progress_bar()
    torch.manual_seed(0)
    if name in SHAPES: backbone = make_backbone(name)
    else:
        depths, widths = CONVNEXTS[name]
        backbone = DINOv3ConvNextModel(DINOv3ConvNextConfig(depths=depths, hidden_sizes=widths))
    backbone.save_pretrained(folder)
    processor = DINOv3ViTImageProcessor(size={"height": side, "width": side})
    processor.save_pretrained(folder)
    names = [f"kind{i}" for i in range(10)]
    model = build_classifier(ModelArguments(str(folder), image_size=side), names).eval()
    return Classifier(model, processor, names, {})


def ways_to_run(classifier, folder, pixels):
    "Functions of a batch, by name; the largest difference of a logit; the sizes of the files."
    import logging

    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    written = write_onnx(classifier, folder / "model.onnx", pixels)
    files = {"onnxruntime float32": written.path, "onnxruntime int8": write_int8(written.path, folder / "int8.onnx"),
             "onnxruntime int8, convolutions too": folder / "all.onnx"}
    logging.disable(logging.WARNING)
    quantize_dynamic(written.path, folder / "all.onnx", per_channel=True)
    logging.disable(logging.NOTSET)
    model = classifier.model

    def in_torch(dtype):
        @torch.inference_mode()
        def run(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"): return model(batch).logits
        return run

    def in_onnx(file):
        session = onnxruntime.InferenceSession(file, session_options(), providers=["CPUExecutionProvider"])
        return lambda batch: session.run(["logits"], {"pixel_values": batch.numpy()})
    ways = {f"PyTorch {dtype}": in_torch(dtype) for dtype in ("float32", "bfloat16")}
    ways |= {name: in_onnx(file) for name, file in files.items()}
    return ways, written.difference, {name: file.stat().st_size for name, file in files.items()}


def measure(ways, pixels, given):
    "Images a second of each way, in turn; the best of all turns."
    rows = []
    for size in given.batch_sizes:
        batch, best = pixels[:size], dict.fromkeys(ways, float("inf"))
        for turn in range(given.repeats + 1):  # the first is to warm up
            for name, run in ways.items():
                began = time.perf_counter()
                for _ in range(calls := max(1, given.images // size)): run(batch)
                if turn: best[name] = min(best[name], (time.perf_counter() - began) / calls)
        rows += [dict(way=name, batch_size=size, images_per_second=size / seconds) for name, seconds in best.items()]
    return rows


def main():
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, *CONVNEXTS], default=["vits16", "convnext-tiny"])
    parser.add_argument("--side", type=int, default=224, help="of an image, in pixels")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=16, help="images of one turn of a way")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the best counts")
    given = parser.parse_args()
    rates = {name: matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    rates["int8"] = int8_rate()
    print("matrix product, 10^9 operations a second: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    results = {"benchmark": "export", "machine": describe_machine(), "arguments": vars(given), "matmul_gflops": rates,
               "models": {}}
    results["machine"] |= {name: __import__(name).__version__ for name in ("onnx", "onnxruntime")}
    pixels = torch.randn(max(given.batch_sizes), 3, given.side, given.side, generator=torch.Generator().manual_seed(0))
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            ways, difference, sizes = ways_to_run(make_classifier(name, given.side, place / "backbone"), place, pixels)
            rows = measure(ways, pixels, given)
        cost = gflop(name, given.side) if name in SHAPES else convnext_gflop(name, given.side)
        plain = {row["batch_size"]: row["images_per_second"] for row in rows if row["way"] == "PyTorch float32"}
        print(f"\n{name}: {cost:.2f} GFLOP an image; logits differ by {difference:.0e}")
        for row in rows:
            row["ratio"] = row["images_per_second"] / plain[row["batch_size"]]
            kind = next(kind for kind in rates if kind in row["way"])
            row["share"] = row["images_per_second"] * cost / rates[kind]
            print(f"  batch {row['batch_size']:>2}  {row['way']:<36}{row['images_per_second']:7.1f} images/s{row['ratio']:6.2f} of PyTorch "
                  f"float32{row['share']:6.0%} of the {kind} product", flush=True)
        results["models"][name] = {"gflop": cost, "difference": difference, "bytes": sizes, "speeds": rows}
    write_json(given.json, results)
    return 0


if __name__ == "__main__": sys.exit(main())
