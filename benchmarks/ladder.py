"""What an epoch costs on each rung of the ladder, with the shape of ViT-S/16 and random weights.

    python benchmarks/ladder.py --part last        # the last 2 blocks, from images and from kept tokens
    python benchmarks/ladder.py --part lora        # adapters: `train` against a loop by hand
    python benchmarks/ladder.py --part all         # everything: the same

Images are photographs of 224 pixels after preparation, opened and prepared anew in each epoch; `pixels` are
the same, prepared once and held in memory. All sides train the same parameters from the same start on the same
batches. The exit code is 1 if their losses differ. In the parts `lora` and `all`, each side is a process of its own,
the two take turns, and `train` also writes its checkpoints; the loop by hand is in plain_tuning.py.
"""
import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (SHAPES, command_line, describe_machine, in_own_process, make_photographs, peak_megabytes,
                    save_backbone, write_json)
from dinov3_nb.backbone import load_processor, pool_tokens
from dinov3_nb.blocks import kept_tokens, last_parameters, make_token_loaders, open_entry
from dinov3_nb.core import DataArguments, ModelArguments, TrainArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.features import PassOptions
from dinov3_nb.model import build_classifier
from dinov3_nb.training import make_loaders


def parse_arguments():
    parser = command_line(__doc__)
    parser.add_argument("--part", choices=list(PARTS), default="last", help="which rung")
    parser.add_argument("--model", choices=list(SHAPES), default="vits16", help="shape of the random weights")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3, help="timed, the sides take turns")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=2, help="last blocks that learn")
    parser.add_argument("--feature_dtype", choices=["float32", "bfloat16"], default="float32", help="of kept tokens")
    parser.add_argument("--repeats", type=int, default=2, help="of lora and all, whose sides take turns")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of lora and all; no: float32")
    for hidden in ("--side", "--folder"): parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_parts(given, folder):
    "Images, processor, a frozen classifier with a head of zeros, and the settings of the run."
    make_photographs(folder / "images", given.images, validation=10)
    save_backbone(folder / "model", given.model)
    data = load_and_prepare_dataset(
        DataArguments(dataset=str(folder / "images"), train_split_ratio=1.0, val_split_ratio=1.0))
    model = build_classifier(ModelArguments(model_name=str(folder / "model")), data.class_names)
    torch.nn.init.zeros_(model.head.weight)
    return data, load_processor(str(folder / "model")), model, TrainArguments(batch_size=given.batch_size)


class Side:
    "One way to train a copy of a model: seconds and mean loss of each epoch."
    def __init__(self, model, parameters, logits_of, batches):
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self.model, self.logits_of, self.batches = model, logits_of, batches
        self.seconds, self.losses = [], []

    def run_epoch(self, epoch):
        began, total, count = time.perf_counter(), 0.0, 0
        for batch in self.batches(epoch):
            loss = F.cross_entropy(self.logits_of(batch), batch["labels"])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total, count = total + loss.item() * len(batch["labels"]), count + len(batch["labels"])
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(total / count)


def take_turns(sides, epochs):
    "An epoch of each side, then the next one: a machine that slows down slows all of them."
    for epoch in range(epochs):
        for name, side in sides.items():
            side.run_epoch(epoch)
            print(f"epoch {epoch + 1}, {name}: {side.seconds[-1]:.2f} s, loss {side.losses[-1]:.6f}", flush=True)
    return {name: {"seconds": side.seconds, "losses": side.losses} for name, side in sides.items()}


def of_loader(loader):
    "Its batches in the order of an epoch."
    def batches(epoch):
        loader.sampler.epoch = epoch
        return iter(loader)
    return batches


def run_last(given, folder):
    "The last blocks, from images, from pixels in memory and from kept tokens."
    data, processor, model, arguments = load_parts(given, folder)
    entry = open_entry(model.backbone, processor, given.blocks)
    images, _ = make_loaders(data, processor, DataArguments(num_workers=0), arguments, "processor")
    pixels = [list(of_loader(images)(epoch)) for epoch in range(given.epochs)]  # in memory, an epoch each
    began = time.perf_counter()
    tokens = kept_tokens(
        model.backbone, {name: data.rows(name) for name in ("train", "validation")}, processor,
        PassOptions(num_workers=0, kept_as=given.feature_dtype, entry=entry), folder / "cache")
    once = time.perf_counter() - began
    kept, _ = make_token_loaders(data, tokens, arguments)
    sides = {"images": of_loader(images), "pixels": pixels.__getitem__, "tokens": of_loader(kept)}
    sides = {name: last_side(given, model, entry, batches) for name, batches in sides.items()}
    return {"once": once, "sides": take_turns(sides, given.epochs)}


def last_side(given, model, entry, batches):
    "One way into the last blocks, from the same start as the others."
    model = copy.deepcopy(model).eval()
    parameters = [*last_parameters(model.backbone, given.blocks), *model.head.parameters()]
    for parameter in parameters: parameter.requires_grad_(True)
    def logits_of(batch):
        if "tokens" in batch: tokens = entry.finish(model.backbone, batch["tokens"])
        else: tokens = model.backbone(pixel_values=batch["pixel_values"]).last_hidden_state
        return model.classify(pool_tokens(tokens))
    return Side(model, parameters, logits_of, batches)


def show_last(given, result):
    "The results as text, the ratios, and whether all sides learnt the same."
    sides = result["sides"]
    middle = {name: statistics.median(side["seconds"]) for name, side in sides.items()}
    print(f"\n{'':<10}{'seconds an epoch (median, range)':<36}{'times':>6}{'last loss':>12}")
    for name, side in sides.items():
        spread = f"{middle[name]:.2f} ({min(side['seconds']):.2f} to {max(side['seconds']):.2f})"
        print(f"{name:<10}{spread:<36}{middle[name] / middle['tokens']:>6.2f}{side['losses'][-1]:>12.6f}")
    print(f"the pass that keeps the tokens, once: {result['once']:.2f} s")
    result["ratio"] = middle["images"] / middle["tokens"]
    result["ratio_pixels"] = middle["pixels"] / middle["tokens"]
    largest = max(abs(a - b) for name in ("images", "pixels")
                  for a, b in zip(sides[name]["losses"], sides["tokens"]["losses"]))
    result["loss_difference"] = largest
    print(f"largest difference between the losses: {largest:.1e}")
    return largest <= (0 if given.feature_dtype == "float32" else 1e-2)


def train_side(given):
    "`dinov3-nb train`, from the first line of its log, which comes after the weights, to the last."
    from dinov3_nb import train
    stamps, folder = [], Path(given.folder)
    def log(line): stamps.append(time.perf_counter()); print(line, file=sys.stderr)
    own = {"no_rope_rescale": True} if given.part == "all" else {}
    state = train(
        dataset=str(folder / "images"), train_split_ratio=1.0, val_split_ratio=1.0, num_workers=0,
        model_name=str(folder / "model"), tune=given.part, head_start="random", epochs=given.epochs,
        batch_size=given.batch_size, eval_every_steps="epoch", mixed_precision=given.precision,
        checkpoint_dir=str(folder / "run"), overwrite=True, no_tracking=True, log=log, **own)
    curve = [[point["train_loss"], point["val_loss"]] for point in state.history]
    return {"seconds": stamps[-1] - stamps[0], "curve": curve}


def run_side(given):
    "One measurement, as one line of JSON."
    import plain_tuning
    if given.side == "train": result = train_side(given)
    else: result = plain_tuning.run(Path(given.folder) / "images", str(Path(given.folder) / "model"), given)
    cuda = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
    print(json.dumps({**result, "peak_mb": peak_megabytes(), "cuda_mb": cuda}))


def run_tuned(given, folder):
    "Both sides, `repeats` times, in turn."
    make_photographs(folder / "images", given.images, validation=10)
    save_backbone(folder / "model", given.model)
    flags, sides = ["--folder", folder], {"plain": [], "train": []}
    for name in ("part", "epochs", "batch_size", "precision"): flags += [f"--{name}", getattr(given, name)]
    for repeat in range(given.repeats):
        for name, runs in sides.items():
            runs.append(in_own_process(__file__, "--side", name, *flags))
            print(f"repeat {repeat + 1}, {name}: {runs[-1]['seconds']:.2f} s", flush=True)
    return {"sides": sides}


def show_tuned(given, result):
    "Images a second, memory, the ratio, and whether both sides learnt the same."
    seen, sides = given.images * given.epochs, result["sides"]
    result["images_per_second"] = {
        name: [seen / run["seconds"] for run in runs] for name, runs in sides.items()}
    print(f"\n{'':<7}{'images a second (median, range)':<34}{'peak MB':>9}{'CUDA MB':>9}{'last loss':>11}")
    for name, speeds in result["images_per_second"].items():
        spread = f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"
        cuda = sides[name][0]["cuda_mb"]
        print(f"{name:<7}{spread:<34}{max(run['peak_mb'] for run in sides[name]):>9,.0f}"
              f"{'' if cuda is None else format(cuda, ',.0f'):>9}{sides[name][0]['curve'][-1][0]:>11.5f}")
    middle = {name: statistics.median(speeds) for name, speeds in result["images_per_second"].items()}
    result["ratio"] = middle["train"] / middle["plain"]
    pairs = zip(sides["plain"][0]["curve"], sides["train"][0]["curve"], strict=True)
    result["loss_difference"] = max(abs(a - b) for p, t in pairs for a, b in zip(p, t))
    print(f"train / plain: {result['ratio']:.2f}; largest difference between their losses: "
          f"{result['loss_difference']:.1e}")
    exact = given.part == "all" and given.precision == "no"  # adapters start from other random numbers on each side
    return result["loss_difference"] <= (1e-3 if exact else 0.05)


PARTS = {  # each runs in a folder of its own, then shows what it found
    "last": (run_last, show_last), "lora": (run_tuned, show_tuned), "all": (run_tuned, show_tuned)}


def main():
    given = parse_arguments()
    if given.side: return run_side(given)
    run, show = PARTS[given.part]
    with tempfile.TemporaryDirectory() as folder: result = run(given, Path(folder))
    equal = show(given, result)
    write_json(given.json, {"benchmark": f"ladder_{given.part}", "machine": describe_machine(),
                            "arguments": vars(given), "equal": equal, **result})
    return 0 if equal else 1


if __name__ == "__main__": raise SystemExit(main())
