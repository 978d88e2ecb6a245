"""Two processes with one thread each compute the features of the same photographs as one process with one thread.

    python benchmarks/shared_pass.py --json benchmarks/results/shared_pass.json

ViT-S/16 with random weights, 45 kB photographs. The processes are joined by gloo, as `torchrun` joins them; each
computes its share and appends it to a store that both read at the end. Time runs from the first image to the last
process's features; imports and the loading of weights are left out on both sides.
"""
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import command_line, describe_machine, make_photographs, save_backbone, write_json

from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.cache import kept_features
from dinov3_nb.core import DataArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.features import PassOptions


def one_pass(rank, world, port, model, images, folder, pipe):
    "What each process does."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    if world > 1: torch.distributed.init_process_group("gloo")
    data = load_and_prepare_dataset(DataArguments(dataset=str(images)))
    backbone, processor = load_backbone(str(model)), load_processor(str(model))
    calls = []
    backbone.register_forward_pre_hook(lambda module, inputs, named: calls.append(len(named["pixel_values"])), with_kwargs=True)
    if world > 1: torch.distributed.barrier()
    began = time.perf_counter()
    options = PassOptions(num_workers=0)
    features = kept_features(backbone, {"train": data.rows("train")}, processor, options, Path(folder), lambda line: None)
    pipe.send((time.perf_counter() - began, sum(calls), features["train"].cls.double().sum().item()))
    if world > 1: torch.distributed.destroy_process_group()


def timed(world, model, images):
    "Seconds of the slowest process, and how many images each of them computed."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, children = multiprocessing.get_context("fork"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=one_pass, args=(rank, world, port, model, images, folder, theirs))
            child.start()
            pipes.append(ours), children.append(child)
        found = [pipe.recv() for pipe in pipes]
        for child in children: child.join()
    seconds, computed, sums = zip(*found)
    assert max(sums) - min(sums) < 1e-3 * abs(sums[0]), sums
    return dict(seconds=max(seconds), computed=computed, sum=sums[0])


def main():
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="vits16")
    given = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked, and a thread would not come along
    runs = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        images = make_photographs(Path(folder) / "images", given.images, 10)
        model = save_backbone(Path(folder) / "model", given.model)
        for _ in range(given.repeats):
            for world in runs: runs[world].append(timed(world, model, images))
    one, two = (statistics.median(run["seconds"] for run in runs[world]) for world in runs)
    assert abs(runs[1][0]["sum"] - runs[2][0]["sum"]) < 1e-3 * abs(runs[1][0]["sum"])
    print(json.dumps(runs))
    print(f"one process {one:.2f} s, two {two:.2f} s: {two / one:.2f} of one process's time")
    write_json(given.json, dict(benchmark="shared_pass", machine=describe_machine(), arguments=vars(given),
                                runs={str(world): found for world, found in runs.items()}, ratio=two / one))
    return 0


if __name__ == "__main__": sys.exit(main())
