"A linear head on a frozen backbone as most people write it: every image through everything, at every step."
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel, get_cosine_schedule_with_warmup

SEED = 42


class ImageFiles(torch.utils.data.Dataset):
    "Class folders of JPEGs as (image, label), in the order of their names."
    def __init__(self, folder):
        self.files = sorted(Path(folder).glob("*/*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        file = self.files[i]
        return Image.open(file).convert("RGB"), self.classes.index(file.parent.name)


class DatasetRows(torch.utils.data.Dataset):
    "A split of a `datasets` dataset, the same way."
    def __init__(self, split): self.split, self.classes = split, split.features["label"].names

    def __len__(self): return len(self.split)

    def __getitem__(self, i):
        row = self.split[i]
        return row["image"].convert("RGB"), row["label"]


class ProcessBatch:
    "A `collate_fn`: the checkpoint's image processor on a whole batch."
    def __init__(self, processor): self.processor = processor

    def __call__(self, items):
        pixels = self.processor(images=[image for image, _ in items], return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor([label for _, label in items])


class Extractor:
    "The class tokens of a batch, without gradients."
    def __init__(self, backbone, device, precision):
        self.backbone, self.device, self.bfloat16, self.passes = backbone, device, precision == "bf16", 0

    def __call__(self, pixels):
        self.passes += len(pixels)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            tokens = self.backbone(pixel_values=pixels.to(self.device)).last_hidden_state
        return tokens[:, 0].float()


@torch.no_grad()
def validate(extract, head, loader):
    "Loss and accuracy over all validation images."
    logits, labels = [], []
    for pixels, truth in loader:
        logits.append(head(extract(pixels)).cpu())
        labels.append(truth)
    logits, labels = torch.cat(logits), torch.cat(labels)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def make_head(width, num_classes, device):
    "A linear layer with the first weights that `train` gives it."
    torch.manual_seed(SEED)
    head = torch.nn.Linear(width, num_classes)
    head.reset_parameters()  # transformers draws a new head's weights a second time
    return head.to(device)


def run(train, validation, model_name, given):
    "Train, validating as it goes; seconds run from the first image to the last line of the log."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoImageProcessor.from_pretrained(model_name)
    backbone = AutoModel.from_pretrained(model_name, dtype=torch.float32).to(device).eval()
    extract, collate = Extractor(backbone, device, given.precision), ProcessBatch(processor)
    head = make_head(backbone.config.hidden_size, len(train.classes), device)
    groups = [{"params": [head.weight], "weight_decay": 1e-4}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.learning_rate)
    per_epoch = math.ceil(len(train) / given.batch_size)
    steps = per_epoch * given.epochs
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(0.05 * steps), steps)
    options = dict(collate_fn=collate, num_workers=given.num_workers)
    held_out = DataLoader(validation, max(32, given.batch_size), **options)

    step, seen, loss_sum, curve, began = 0, 0, 0.0, [], time.perf_counter()
    for epoch in range(given.epochs):
        order = np.random.default_rng([SEED, epoch]).permutation(len(train)).tolist()
        for pixels, labels in DataLoader(train, given.batch_size, sampler=order, **options):
            loss = F.cross_entropy(head(extract(pixels)), labels.to(device))
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step, seen, loss_sum = step + 1, seen + len(labels), loss_sum + loss.item() * len(labels)
            if step % given.eval_every_steps and step % per_epoch: continue
            val_loss, accuracy = validate(extract, head, held_out)
            curve.append([step, loss_sum / seen, val_loss, accuracy])
            print(f"step {step}: loss {loss_sum / seen:.4f}, {val_loss:.4f}, {accuracy:.2%}", file=sys.stderr)
            seen, loss_sum = 0, 0.0
    return {"seconds": time.perf_counter() - began, "curve": curve, "passes": extract.passes}
