"""A frozen run the plain way, with the backbone in every step, against `dinov3-nb train`, which asks it once.

    python benchmarks/frozen_run.py                # photographs, ViT-S/16 with random weights
    python benchmarks/frozen_run.py --pair         # the embedded pair: digits and tiny

Every measurement is a process of its own, one after the other. Time runs from the first image to the last
line of the log; imports and the loading of weights are left out on both sides. The exit code is 1 if the
accuracies differ.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import (SHAPES, command_line, describe_machine, in_own_process, make_photographs,
                    peak_megabytes, save_backbone, write_json)

SECOND_RATE = 1e-3  # of the run that finds its features kept


def parse_arguments():
    parser = command_line(__doc__)
    parser.add_argument("--pair", action="store_true", help="digits and tiny, validation every 100 steps")
    parser.add_argument("--model", choices=list(SHAPES), default="vits16", help="shape of the random weights")
    parser.add_argument("--train", type=int, default=376, help="training photographs")
    parser.add_argument("--validation", type=int, default=125, help="validation photographs")
    parser.add_argument("--eval_every_steps", type=int, help="default: 5, or 100 with --pair")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="no: float32")
    parser.add_argument("--num_workers", type=int, default=0, help="of the plain loop's DataLoader")
    parser.add_argument("--repeats", type=int, default=3)
    for hidden in ("--side", "--folder", "--cache_dir"): parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    given = parser.parse_args()
    if given.eval_every_steps is None: given.eval_every_steps = 100 if given.pair else 5
    return given


def model_name(given):
    "The folder of the weights."
    if not given.pair: return str(Path(given.folder) / "model")
    from dinov3_nb.weights import TINY_FOLDER
    return str(TINY_FOLDER)


def run_plain(given):
    "The loop of plain_loop.py."
    import plain_loop
    if given.pair:
        from dinov3_nb.sources import load_digits_dataset
        splits = load_digits_dataset()
        data = [plain_loop.DatasetRows(splits[name]) for name in ("train", "validation")]
    else: data = [plain_loop.ImageFiles(Path(given.folder) / "images" / name) for name in ("train", "val")]
    return plain_loop.run(*data, model_name(given), given)


def run_train(given):
    "The same job for `dinov3_nb`; the first line of its log comes after the weights and before the images."
    from dinov3_nb import train
    stamps = []
    def log(line): stamps.append(time.perf_counter()); print(line, file=sys.stderr)
    dataset = "digits" if given.pair else str(Path(given.folder) / "images")
    with tempfile.TemporaryDirectory() as checkpoints:
        state = train(
            dataset=dataset, train_split_ratio=1.0, val_split_ratio=1.0, model_name=model_name(given),
            epochs=given.epochs, batch_size=given.batch_size, eval_every_steps=given.eval_every_steps,
            mixed_precision=given.precision, learning_rate=given.learning_rate, cache_dir=given.cache_dir,
            checkpoint_dir=checkpoints, overwrite=True, no_tracking=True, log=log)
    curve = [[h[name] for name in ("step", "train_loss", "val_loss", "val_acc")] for h in state.history]
    return {"seconds": stamps[-1] - stamps[0], "curve": curve}


def run_side(given):
    "One measurement, as one line of JSON."
    result = run_plain(given) if given.side == "plain" else run_train(given)
    last = result["curve"][-1]
    best = max(point[3] for point in result["curve"])
    print(json.dumps({**result, "loss": last[2], "accuracy": best, "last_accuracy": last[3],
                      "peak_mb": peak_megabytes()}))


def run_all(given, folder):
    "Every side, `repeats` times, in turn."
    if not given.pair:
        make_photographs(Path(folder) / "images", given.train, given.validation)
        save_backbone(Path(folder) / "model", given.model)
    shared = ["--folder", folder, *(["--pair"] if given.pair else [])]
    for name in ("eval_every_steps", "epochs", "batch_size", "precision", "num_workers"):
        shared += [f"--{name}", getattr(given, name)]
    sides = {"plain": [], "train": [], "train, another rate": []}
    for repeat in range(given.repeats):
        cache = ["--cache_dir", Path(folder) / f"cache{repeat}"]
        flags = {"plain": ["--side", "plain"], "train": ["--side", "train", *cache],
                 "train, another rate": ["--side", "train", *cache, "--learning_rate", SECOND_RATE]}
        for name, runs in sides.items():
            rate = [] if "another" in name else ["--learning_rate", given.learning_rate]
            runs.append(in_own_process(__file__, *flags[name], *rate, *shared))
            print(f"repeat {repeat + 1}, {name}: {runs[-1]['seconds']:.2f} s", flush=True)
    return sides


def largest_difference(plain, train):
    "Between the losses of two runs, over all points of their curves."
    pairs = list(zip(plain["curve"], train["curve"], strict=True))
    assert all(p[0] == t[0] for p, t in pairs), "the runs validated at different steps"
    return max(abs(a - b) for p, t in pairs for a, b in zip(p[1:3], t[1:3]))


def summarize(given, sides):
    "Ratios, the one to expect by images alone (ceiling), and whether both ways learnt the same."
    times = {name: [run["seconds"] for run in runs] for name, runs in sides.items()}
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {name: [p / t for p, t in zip(times["plain"], times[name])] for name in list(times)[1:]}
    pairs = list(zip(sides["plain"], sides["train"]))
    images, passes = 1797 if given.pair else given.train + given.validation, sides["plain"][0]["passes"]
    return {
        "images": images, "passes": passes, "ceiling": passes / images,
        "ratio": middle["plain"] / middle["train"], "ratios": ratios["train"],
        "ratio_second": middle["plain"] / middle["train, another rate"],
        "ratios_second": ratios["train, another rate"],
        "loss_difference": max(largest_difference(p, t) for p, t in pairs),
        "equal_accuracy": all(p[key] == t[key] for p, t in pairs for key in ("accuracy", "last_accuracy"))}


def show(sides, summary):
    "The results as text."
    print(f"\n{'':<22}{'seconds (median, all)':<36}{'best':>8}{'last':>8}{'last loss':>11}{'peak MB':>9}")
    for name, runs in sides.items():
        seconds = [run["seconds"] for run in runs]
        times = f"{statistics.median(seconds):.2f} ({', '.join(format(s, '.2f') for s in seconds)})"
        peak, first = max(run["peak_mb"] for run in runs), runs[0]
        print(f"{name:<22}{times:<36}{first['accuracy']:>8.2%}{first['last_accuracy']:>8.2%}"
              f"{first['loss']:>11.6f}{peak:>9,.0f}")
    for label, key in (("plain / train", "ratio"), ("plain / train, another rate", "ratio_second")):
        spread = summary[key.replace("ratio", "ratios")]
        print(f"{label}: {summary[key]:.1f} ({min(spread):.1f} to {max(spread):.1f})")
    print(f"by images alone: the plain loop sends {summary['passes']:,} images through the backbone where "
          f"{summary['images']:,} suffice, {summary['ceiling']:.2f} times as many")
    print(f"largest difference between the losses that plain and train log: {summary['loss_difference']:.1e}")
    print("the accuracies are equal" if summary["equal_accuracy"] else "THE ACCURACIES DIFFER")


def main():
    given = parse_arguments()
    if given.side: return run_side(given)
    with tempfile.TemporaryDirectory() as folder: sides = run_all(given, folder)
    summary = summarize(given, sides)
    show(sides, summary)
    write_json(given.json, {"benchmark": "frozen_run", "machine": describe_machine(),
                            "arguments": vars(given), "sides": sides, **summary})
    return 0 if summary["equal_accuracy"] else 1


if __name__ == "__main__": sys.exit(main())
