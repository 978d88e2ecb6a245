"""Time and memory of each probe against images x width x classes, and the plain way beside it.

    python benchmarks/probes.py

Features are made up: a mean for each class, noise around it, and directions of very different length that are
mixed, as a backbone mixes them. Each measurement is a process of its own. "plain" is scikit-learn's
LogisticRegression, 200 iterations for each of five C and once more on all images: what a probe replaces. Larger
sizes are computed: the operations that a method makes, over the rate that it reached at the largest size measured.
"""
import json
import sys
import time
import warnings
from pathlib import Path

from common import command_line, describe_machine, in_own_process, peak_megabytes, write_json

SIZES = ((10_000, 256, 10), (100_000, 256, 10), (10_000, 1280, 100))
COMPUTED = ((1_280_000, 256, 10), (1_280_000, 1280, 1000))
SMALL = ((600, 16, 3), (1200, 16, 3))
KINDS = "neighbours", "ridge", "logistic", "bank", "plain"
LOOKS, BANK_STEPS = 200, 1000  # looks of a whole sweep over C, about; steps of the bank at most


def make_features(images, width, classes):
    "Training and validation features, one validation image for six of training, with their labels."
    import torch
    torch.manual_seed(0)
    validation = images // 6
    labels = torch.arange(images + validation) % classes
    centres = torch.randn(classes, width) / 32**0.5
    latent = centres[labels] + torch.randn(images + validation, width)
    features = (latent * torch.logspace(0, -1.5, width)) @ torch.randn(width, width) / width**0.5
    return (features[:images], labels[:images]), (features[images:], labels[images:])


def forget_peak():
    "Let the process's peak memory begin anew, where the system can (Linux)."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass


def fit_plainly(train, validation, task):
    "Five C on four fifths, the best on all, with scikit-learn."
    from dinov3_nb.probe import _hold_out
    from sklearn.linear_model import LogisticRegression
    (x, y), (queries, truth) = train, validation
    rows, held = _hold_out(y)
    mean, std = x.mean(0), x.std(0)
    x, queries, right = (x - mean) / std, (queries - mean) / std, {}
    def fit(c, rows):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LogisticRegression(C=c, max_iter=200).fit(x[rows].numpy(), y[rows].numpy())
    for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0): right[c] = fit(c, rows).score(x[held].numpy(), y[held].numpy())
    best = max(right, key=right.get)
    return best, fit(best, slice(None)).score(queries.numpy(), truth.numpy()), None


def measure(kind, images, width, classes):
    "Seconds, accuracy and memory of one method, in this process."
    import torch
    from dinov3_nb import heads
    from dinov3_nb.probe import METHODS, _find_device, _Task
    methods = dict(zip(KINDS, [method for *_, method in METHODS])) | {"plain": fit_plainly}
    train, validation = make_features(images, width, classes)
    forget_peak()
    task, before, looks = _Task(classes, 42, _find_device()), peak_megabytes(), [0]
    look = heads._cross_entropy
    def counted(features, *rest):
        looks[0] += len(features)
        return look(features, *rest)
    heads._cross_entropy = counted
    began = time.perf_counter()
    setting, accuracy, _ = methods[kind](train, validation, task)
    return {"kind": kind, "images": images, "width": width, "classes": classes, "setting": setting,
            "accuracy": accuracy, "seconds": time.perf_counter() - began, "looks": looks[0] / images,
            "megabytes": peak_megabytes() - before, "features_megabytes": train[0].nbytes / 1e6,
            "threads": torch.get_num_threads()}


def operations(kind, images, width, classes, looks=LOOKS):
    "Multiplications and additions of a method with its choice on held-out images; None: not known."
    held = min(images // 5, 50_000)
    fitted, queries, bank = images - held, images // 6, min(images - held, 100_000)
    if kind == "neighbours": return 2 * width * (fitted * held + images * queries)
    if kind == "ridge": return 2 * width**2 * (fitted + images) + 2 * 20 * width**3
    if kind == "logistic": return 4 * width * classes * images * looks + 4 * width**2 * images
    if kind == "bank": return 4 * width * classes * 5 * (19 * bank + images)
    return None


def megabytes(kind, images, width, classes):
    "What a method holds besides the features: a copy of four fifths, and what it works with."
    held = min(images // 5, 50_000)
    own = {"neighbours": 4 * (2**16 * (2 * width + 512) + 200 * 3 * held + width * max(held, images // 6)),
           "ridge": 8 * (4 * width**2 + 2**13 * width + 2 * classes * width),
           "logistic": 4 * (44 * width * classes + 6 * width**2 + 2**13 * (2 * classes + width)),
           "bank": 4 * 13 * (4 * width * classes + max(256, images // 200) * classes)}[kind]
    copy = min(images - held, 100_000) if kind == "bank" else images - held
    return (own + 4 * width * (copy + held)) / 1e6


def compute(measured, sizes):
    "The larger sizes, from the rate at the largest that was measured."
    found = []
    for kind in KINDS[:-1]:
        known = [m for m in measured if m["kind"] == kind]
        if not known: continue
        base = max(known, key=lambda m: m["images"] * m["width"] * m["classes"])
        shape = base["images"], base["width"], base["classes"]
        rate = operations(kind, *shape, base["looks"]) / base["seconds"]
        for size in sizes:
            work = operations(kind, *size, base["looks"])
            found.append({"kind": kind, **dict(zip(("images", "width", "classes"), size)), "operations": work,
                          "gflops": rate / 1e9, "seconds": work / rate, "megabytes": megabytes(kind, *size)})
    return found


def main():
    parser = command_line(__doc__)
    parser.add_argument("--largest", type=int, default=10**8, help="images x width x classes above which the plain way is left out")
    parser.add_argument("--dry_run", action="store_true", help="every line, on very little")
    parser.add_argument("--one", nargs=4, help="kind, images, width, classes: measure this in this process")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], *map(int, given.one[1:]))))
        return 0
    measured, ratios = [], {}
    for size in SMALL if given.dry_run else SIZES:
        row = {}
        for kind in KINDS:
            if kind == "plain" and size[0] * size[1] * size[2] > given.largest: continue
            found = in_own_process(__file__, "--one", kind, *size)
            row[kind] = found
            measured.append(found)
            print(f"{kind:<11}{size[0]:>9,} x {size[1]:>5,} x {size[2]:>5,}{found['seconds']:9.2f} s"
                  f"{found['megabytes']:9,.0f} MB{found['accuracy']:9.2%}", flush=True)
        if "plain" in row:
            ratios["x".join(map(str, size))] = ratio = row["plain"]["seconds"] / row["logistic"]["seconds"]
            print(f"logistic regression is {ratio:.1f} times as fast as the plain way", flush=True)
    computed = compute(measured, COMPUTED)
    for c in computed:
        print(f"{c['kind']:<11}{c['images']:>9,} x {c['width']:>5,} x {c['classes']:>5,}{c['seconds']:9,.0f} s"
              f"{c['megabytes']:9,.0f} MB  computed")
    write_json(given.json, {"benchmark": "probes", "machine": describe_machine(),
                            "arguments": {"largest": given.largest, "dry_run": given.dry_run},
                            "measured": measured, "computed": computed, "ratio": ratios})
    return 0


if __name__ == "__main__": sys.exit(main())
