"""Time and memory of the report's parts on a large set, without a backbone.

    python benchmarks/report.py

Features are made up: a mean for each class and noise around it, a few labels wrong, a few images twice. Pictures are
made up from the row number. Everything runs in one process, so that the peak memory is that of a whole report.
"""
import io
import time
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
from common import command_line, describe_machine, peak_megabytes, write_json
from PIL import Image

CLASSES, SPOILT, TWICE = 100, 0.05, 20  # wrong labels; images that occur twice, of each kind
PARTS = "_near_mistakes find_mistakes leave_one_out doubtful_labels find_copies _find_trust _calibrate _draw_up_map".split()
SHAPE, SMALL = (50_000, 10_000, 768), (600, 120, 16)  # training images, validation images, width


def make_set(train, validation, width, seed=0):
    "Features and labels of both splits; of the first rows of each a copy is at its end, and in the other split."
    import torch
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (train + validation,), generator=generator)
    centres = torch.randn(CLASSES, width, generator=generator)
    lengths = torch.logspace(0, -1, width)  # some directions matter more, as in a backbone's features
    features = centres[labels]
    features += torch.randn(train + validation, width, generator=generator)
    features *= lengths
    for first, last in ((0, train), (train, train + validation)):
        features[last - TWICE:last] = features[first:first + TWICE]
        labels[last - TWICE:last] = labels[first:first + TWICE]
    features[train + TWICE:train + 2 * TWICE] = features[TWICE:2 * TWICE]
    labels[train + TWICE:train + 2 * TWICE] = labels[TWICE:2 * TWICE]
    return (features[:train], labels[:train]), (features[train:], labels[train:])


def make_logits(features, labels, num_classes):
    "Those of the classes' means; about one image in ten is moved to another class."
    import torch
    means = torch.stack([features[labels == c].mean(0) for c in range(num_classes)]).nan_to_num()
    logits = 20 * torch.nn.functional.normalize(features, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    generator = torch.Generator().manual_seed(1)
    moved = torch.rand(len(labels), generator=generator) < 0.1
    logits[moved] = logits[moved].roll(1, 1)
    return logits


def picture(row):
    "A picture of 64 x 64 pixels, another for each row."
    pixels = np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


def content(row):
    file = io.BytesIO()
    picture(row).save(file, "PNG")
    return file.getvalue()


class Rows:
    "Stands for the undecoded images of a split: pictures that are drawn when they are asked for."
    def __init__(self, names, labels): self.names, self.labels = names, labels
    def __len__(self): return len(self.names)
    def __getitem__(self, row):
        return {"image": {"bytes": content(int(self.names[row])), "path": None}, "label": int(self.labels[row]), "row": row}


def names_of(train, validation):
    "Which picture each row has: copies have their original's."
    names = np.arange(train + validation)
    for first, last in ((0, train), (train, train + validation)): names[last - TWICE:last] = names[first:first + TWICE]
    names[train + TWICE:train + 2 * TWICE] = names[TWICE:2 * TWICE]
    return names[:train], names[train:]


def make_classifier(width, processor):
    "A head on a backbone of this width and one layer, for the pictures that go through it."
    import torch
    from dinov3_nb.inference import Classifier
    from dinov3_nb.model import DinoV3Config, DinoV3Linear
    from transformers import DINOv3ViTConfig
    torch.manual_seed(0)
    backbone = DINOv3ViTConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=width // 8, image_size=64,
                               intermediate_size=width)
    model = DinoV3Linear(DinoV3Config(backbone, "made up", num_labels=CLASSES)).eval()
    return Classifier(model, processor, [f"class {c}" for c in range(CLASSES)], {"mixed_precision": "no"})


def make_gathered(train_images, validation_images, width):
    "What `gather` would return of such a set; the indices of the labels that are wrong."
    import torch
    from dinov3_nb.core import Settings
    from dinov3_nb.evaluation import Asked, Chosen
    from dinov3_nb.gather import Gathered, Part, Pictures
    from transformers import DINOv3ViTImageProcessor
    (x, y), (held_x, held_y) = make_set(train_images, validation_images, width)
    bad = torch.rand(len(y), generator=torch.Generator().manual_seed(2)) < SPOILT
    bad[:2 * TWICE] = bad[-TWICE:] = False
    spoilt = torch.where(bad, (y + 1) % CLASSES, y)
    sides, names = [], names_of(train_images, validation_images)
    for use, name, features, labels, truth in (("training", names[0], x, spoilt, y), ("validation", names[1], held_x, held_y, held_y)):
        rows = np.arange(len(features))
        sides.append(Pictures([Part(use, use, Rows(name, labels.numpy()), rows)], rows, features,
                              make_logits(features, truth, CLASSES)))
    classifier = make_classifier(width, DINOv3ViTImageProcessor(size={"height": 64, "width": 64}))
    asked = Asked(classifier, {}, Chosen({"validation": np.arange(validation_images)}, [], 0, True), Settings(), True, [])
    return Gathered(asked, sides[1], sides[0], []), bad


class Clock:
    "Seconds and memory of each part, printed as it ends."
    def __init__(self): self.parts = []

    def watch(self, module, name):
        "A context in which a function of a module is measured whenever it is called."
        function = getattr(module, name)
        def measured(*given, **named):
            began = time.perf_counter()
            value = function(*given, **named)
            self.note(name.strip("_"), time.perf_counter() - began)
            return value
        return patch.object(module, name, measured)

    def note(self, name, seconds):
        self.parts.append({"part": name, "seconds": seconds, "peak_megabytes": peak_megabytes()})
        print(f"{name:<20}{seconds:8.1f} s{peak_megabytes():8,.0f} MB", flush=True)


def run(train_images, validation_images, width):
    "The report of such a set, from the features to the page; what was planted has to be found."
    import importlib
    import torch
    assemble, findings, page, copies = (importlib.import_module(f"dinov3_nb.{name}") for name in ("assemble", "findings", "page", "copies"))
    gathered, bad = make_gathered(train_images, validation_images, width)
    clock = Clock()
    rows = []  # the pictures that are changed slightly have features a little beside their own
    change = copies._change_some
    def keep(*given):
        rows.append(change(*given))
        return rows[-1]
    def beside(classifier, images):
        features = torch.cat([gathered.known.features, gathered.scored.features])[rows[-1][0]]
        return features + 0.02 * features.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(torch.randn(features.shape), dim=1)
    said = []
    with ExitStack() as stack:
        for name in PARTS: stack.enter_context(clock.watch(findings, name))
        stack.enter_context(patch.object(copies, "_change_some", keep))
        stack.enter_context(patch.object(copies, "features_of", beside))
        found = findings.examine(gathered, said.append)
    began = time.perf_counter()
    html = page.render_page(assemble.assemble(found, "A large set"))
    clock.note("page", time.perf_counter() - began)
    for line in [*said, *found.lines()]: print(line)
    pairs = [{i, train_images - TWICE + i} for i in range(TWICE)] + [{TWICE + i, train_images + TWICE + i} for i in range(TWICE)]
    groups = [set(group.rows) for group in found.copies.groups]
    planted = sum(any(pair <= group for group in groups) for pair in pairs)
    asked = found.doubtful.rows[found.doubtful.rows < train_images]
    first = asked[:int(bad[asked].sum())]
    print(f"{planted} of {len(pairs)} pictures that occur twice were found; of the first {len(first):,} doubtful labels "
          f"{bad[first].float().mean():.1%} are wrong; the page has {len(html) / 1e6:.1f} MB")
    return clock.parts, {"ratio": compare(found), "copies": planted, "planted": len(pairs), "doubtful": bad[first].float().mean().item(), "page_bytes": len(html)}


def compare(found, most=512):
    "How many times as fast neighbours are as a table of all similarities, sorted; for some images."
    import torch
    from dinov3_nb.neighbours import leave_one_out
    x, asked = found.every.features, found.neighbours.asked[:most]
    began = time.perf_counter()
    unit = torch.nn.functional.normalize(x, dim=1)
    similarity = unit[asked] @ unit.T
    similarity[torch.arange(len(asked)), asked] = -2
    plain = similarity.sort(1, descending=True).values[:, :50]
    between = time.perf_counter()
    ours = leave_one_out(x, 50, asked=asked).similarities
    ended = time.perf_counter()
    ratio, largest = (between - began) / (ended - between), (plain - ours).abs().max().item()
    print(f"neighbours of {len(asked):,} images: {between - began:.2f} s sorted, {ended - between:.2f} s ours, {ratio:.1f} times "
          f"as fast; largest difference {largest:.1e}")
    return ratio


def main():
    parser = command_line(__doc__)
    parser.add_argument("--dry_run", action="store_true", help="every line, on very little")
    given = parser.parse_args()
    shape = SMALL if given.dry_run else SHAPE
    parts, found = run(*shape)
    seconds, memory = sum(part["seconds"] for part in parts), peak_megabytes()
    print(f"{'together':<20}{seconds:8.1f} s{memory:8,.0f} MB")
    write_json(given.json, {"benchmark": "report", "machine": describe_machine(), "arguments": {"dry_run": given.dry_run}, "shape": shape, "parts": parts, "found": found,
                            "seconds": seconds, "peak_megabytes": memory})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
