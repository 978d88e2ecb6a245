"The last blocks from kept tokens: the same numbers and the same weights as through the whole model, in every family."
import copy
import hashlib
import importlib.util
import io
import json
import shutil
from contextlib import suppress
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

from dinov3_nb import ModelArguments, UserError, blocks as room, train as run
from dinov3_nb.backbone import backbone_tokens, load_backbone, load_processor
from dinov3_nb.blocks import (
    entry_tokens, finish_tokens, kept_tokens, last_modules, last_parameters, make_token_loaders, open_entry,
)
from dinov3_nb.cache import kept_features
from dinov3_nb.core import DataArguments, TrainArguments, TuneArguments
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.features import PassOptions
from dinov3_nb.images import ImageRows
from dinov3_nb.model import build_classifier
from dinov3_nb.pictures import DECODING_VERSION
from dinov3_nb.recipe import describe_backbone, make_recipe, recipe_key
from dinov3_nb.records import clear_entries, list_entries
from dinov3_nb.store import RECORD, verify_entries
from dinov3_nb.optimizer import make_accelerator
from dinov3_nb.training import fit, make_loaders
from dinov3_nb.tune import choose_parameters

SQUARE = DINOv3ViTImageProcessor(size={"height": 64, "width": 64})


def vit():
    return DINOv3ViTModel(DINOv3ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                                          num_register_tokens=4, key_bias=False))


def gated_vit():
    return DINOv3ViTModel(DINOv3ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                                          num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"))


def convnext(): return DINOv3ConvNextModel(DINOv3ConvNextConfig(depths=[1, 1, 2, 3], hidden_sizes=[8, 16, 24, 32]))


def timm_twin(architecture, **model_args):
    from transformers import TimmWrapperConfig, TimmWrapperModel
    config = TimmWrapperConfig(architecture=architecture, model_args=model_args, do_pooling=False)
    return TimmWrapperModel(config)


def timm_vit(): return timm_twin("vit_small_patch16_dinov3", depth=4, embed_dim=32, num_heads=2)
def timm_convnext(): return timm_twin("convnext_tiny", depths=[1, 1, 2, 3], dims=[8, 16, 24, 32])


FAMILIES = [vit, gated_vit, convnext]
if importlib.util.find_spec("timm"): FAMILIES += [timm_vit, timm_convnext]


def of_family(family):
    "A backbone in which every parameter counts."
    torch.manual_seed(0)
    backbone = family().eval().requires_grad_(False)
    for parameter in backbone.parameters(): parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def backbone(request): return of_family(request.param)


def pixels(height=64, width=64, count=4): return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def put_last_in_training(backbone, blocks):
    for parameter in last_parameters(backbone, blocks): parameter.requires_grad_(True)
    for module in last_modules(backbone, blocks): module.train()


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_same_numbers(backbone, blocks, size):
    batch = pixels(*size)
    hidden, whole = entry_tokens(backbone, batch, blocks), backbone_tokens(backbone, batch)
    assert torch.equal(finish_tokens(backbone, hidden, blocks, size), whole)
    assert not torch.equal(finish_tokens(backbone, hidden + 1e-3, blocks, size), whole)


def test_positions_are_those_of_the_size():
    backbone, batch = of_family(vit), pixels(32, 128)
    hidden, whole = entry_tokens(backbone, batch, 2), backbone_tokens(backbone, batch)
    assert torch.equal(finish_tokens(backbone, hidden, 2, (32, 128)), whole)
    assert not torch.allclose(finish_tokens(backbone, hidden, 2, (64, 64)), whole, atol=1e-3)  # as many patches


def train(backbone, tokens_of, batches, blocks=2):
    "Five steps; the gradients of the first, the weights after the last."
    model = copy.deepcopy(backbone)
    put_last_in_training(model, blocks)
    learning = last_parameters(model, blocks)
    optimizer, gradients = torch.optim.AdamW(learning, lr=1e-2), None
    torch.manual_seed(3)
    for step in range(5):
        tokens = tokens_of(model, batches[step % len(batches)])
        F.cross_entropy(tokens.mean(1), torch.arange(len(tokens))).backward()
        gradients = gradients or [parameter.grad.clone() for parameter in learning]
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return gradients, [parameter.detach() for parameter in model.parameters()]


def both_ways(backbone):
    batches = [pixels(count=4), pixels(count=3)]
    hidden = [entry_tokens(backbone, batch, 2) for batch in batches]
    return (train(backbone, backbone_tokens, batches),
            train(backbone, lambda model, batch: finish_tokens(model, batch, 2, (64, 64)), hidden))


def all_equal(first, second): return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_same_gradients_and_weights(backbone):
    (whole_gradients, whole), (gradients, weights) = both_ways(backbone)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert all_equal(whole_gradients, gradients) and all_equal(whole, weights)
    assert sum(not torch.equal(*pair) for pair in zip(backbone.parameters(), weights)) == len(gradients)


@pytest.mark.parametrize("family", FAMILIES[::2], ids=lambda family: family.__name__)
def test_with_drop_path(family):
    from dinov3_nb.tune import set_drop_path
    backbone = of_family(family)
    plain = both_ways(backbone)[0][1]
    set_drop_path(backbone, 0.5)
    (_, whole), (_, weights) = both_ways(backbone.eval())
    assert all_equal(whole, weights) and not all_equal(plain, weights)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_each_attention(attention):
    backbone = of_family(vit)
    backbone.set_attn_implementation(attention)
    (_, whole), (_, weights) = both_ways(backbone)
    assert all_equal(whole, weights)


def test_with_gradient_checkpointing():
    backbone = of_family(vit)
    (_, plain), _ = both_ways(backbone)
    getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)()
    (_, whole), (_, weights) = both_ways(backbone)
    assert all_equal(plain, whole) and all_equal(plain, weights)


def test_in_bfloat16_arithmetic(backbone):
    entry = open_entry(backbone, SQUARE, 2)
    with torch.autocast("cpu", torch.bfloat16):
        whole = backbone_tokens(backbone, pixels())
        found = entry.finish(backbone, entry.compute(backbone, pixels(), "bf16"))
    assert torch.equal(found, whole) and found.dtype == whole.dtype


@pytest.mark.parametrize("blocks", [-1, 0, 5])
def test_no_more_blocks_than_there_are(backbone, blocks):
    depth = len(room.split_backbone(backbone).blocks)
    where = " of the last stage" if "stages" in str(backbone) else ""
    sentence = f"^--last_blocks {blocks} is out of range: this backbone has {depth} blocks{where}\\.$"
    for ask in (lambda: entry_tokens(backbone, pixels(), blocks), lambda: last_parameters(backbone, blocks),
                lambda: open_entry(backbone, SQUARE, blocks), lambda: finish_tokens(backbone, torch.zeros(1), blocks, (64, 64))):
        with pytest.raises(UserError, match=sentence): ask()


def test_what_learns_is_what_the_tokens_do_not_see(backbone):
    "A change of any parameter shows on one side of the cut, and only there."
    hidden, learning = entry_tokens(backbone, pixels(), 2), {id(p) for p in last_parameters(backbone, 2)}
    for name, parameter in backbone.named_parameters():
        if name.endswith("mask_token"): continue
        kept = parameter.data.clone()
        parameter.data.add_(torch.randn_like(kept))
        changed = not torch.equal(entry_tokens(backbone, pixels(), 2), hidden)
        parameter.data.copy_(kept)
        assert changed is (id(parameter) not in learning), name


def test_entries(backbone):
    entry = open_entry(backbone, SQUARE, 2)
    assert entry.image_size == (64, 64) and entry.shape == entry_tokens(backbone, pixels(), 2).shape[1:]
    assert torch.equal(entry.finish(backbone, entry.compute(backbone, pixels())), backbone_tokens(backbone, pixels()))
    cropping = DINOv3ViTImageProcessor(size={"shortest_edge": 80}, do_center_crop=True, crop_size={"height": 32, "width": 64})
    assert open_entry(backbone, cropping, 1).image_size == (32, 64)
    with pytest.raises(ValueError, match="tokens of shape"): entry.compute(backbone, pixels(96, 96))


# Kept

@pytest.fixture(scope="module")
def data(): return load_and_prepare_dataset(DataArguments(dataset="digits", train_split_ratio=0.03, val_split_ratio=0.05))


@pytest.fixture(scope="module")
def tiny(): return load_backbone("tiny").requires_grad_(False), load_processor("tiny")


def keep(tiny, data, folder, blocks=2, said=None, limit=None, options=PassOptions(batch_size=8)):
    "Tokens of both splits; what was logged goes to `said`."
    log = (lambda line: None) if said is None else said.append
    options = replace(options, entry=open_entry(*tiny, blocks))
    splits = {name: data.rows(name) for name in ("train", "validation")}
    return kept_tokens(tiny[0], splits, tiny[1], options, folder, log, limit)


@pytest.fixture
def counted(tiny):
    "Images that went through the first block."
    count = [0]
    def add(module, inputs): count[0] += len(inputs[0])
    hook = tiny[0].model.layer[0].register_forward_pre_hook(add)
    yield count
    hook.remove()


def all_pixels(tiny, data, name="train"):
    rows = data.rows(name)
    images = [Image.open(io.BytesIO(rows[i]["image"]["bytes"])).convert("RGB") for i in range(len(rows))]
    return tiny[1](images=images, return_tensors="pt")["pixel_values"]


def expected(tiny, data, name="train", blocks=2): return entry_tokens(tiny[0], all_pixels(tiny, data, name), blocks)


def everything(kept): return kept.take(torch.arange(len(kept)))


def test_kept_as_they_are(tiny, data, tmp_path, counted):
    said, images = [], len(data.train) + len(data.validation)
    kept = keep(tiny, data, tmp_path / "cache", said=said)
    assert counted[0] == images
    for name in kept: assert torch.equal(everything(kept[name]), expected(tiny, data, name))
    counted[0] = 0
    again = keep(tiny, data, tmp_path / "cache", said=said)
    assert counted[0] == 0 and torch.equal(everything(again["train"]), everything(kept["train"]))
    place, = (entry.place for entry in list_entries(tmp_path / "cache") if entry.key != "contents")
    each, taken = 21 * 128 * 4 + RECORD.itemsize, sum(file.stat().st_size for file in place.glob("00.*") if file.suffix != ".lock")
    assert taken == images * each
    assert said[0] == (f"Tokens that enter the last 2 of 4 blocks: {images:,} images x 10.8 kB = {taken / 1e3:,.0f} kB, "
                       f"kept in {place}")
    assert [line.split(":")[0] for line in said[1:]] == ["Tokens (train)", "Tokens (validation)"] * 2
    assert "through the backbone" in said[1] and "kept before as" in said[3]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_kept_in_16_bits(tiny, data, tmp_path, kind):
    said, options = [], PassOptions(batch_size=8, kept_as=kind)
    kept = keep(tiny, data, tmp_path / "cache", said=said, options=options)["train"]
    plain = expected(tiny, data)
    assert kept.take(torch.arange(2)).dtype == torch.float32
    assert torch.equal(everything(kept), plain.to(getattr(torch, kind)).float())
    assert "5.42 kB" in said[0]
    keep(tiny, data, tmp_path / "cache")
    assert len(list_entries(tmp_path / "cache")) == 2 + (tmp_path / "cache" / "contents").exists()


def test_numbers_beyond_float16_stop_the_pass(tiny, data, tmp_path):
    huge = copy.deepcopy(tiny[0])
    huge.embeddings.cls_token.data[..., 0] = 1e5
    with pytest.raises(UserError, match="float16 cannot hold these features: the largest is [0-9,]+; take bfloat16"):
        keep((huge, tiny[1]), data, tmp_path, options=PassOptions(kept_as="float16"))


def test_each_cut_and_the_features_have_stores_of_their_own(tiny, data, tmp_path, counted):
    splits, images = {"train": data.rows("train")}, len(data.train) + len(data.validation)
    features = kept_features(*tiny[:1], splits, tiny[1], PassOptions(batch_size=8), tmp_path, lambda line: None)
    assert counted[0] == len(data.train)
    kept = {blocks: keep(tiny, data, tmp_path, blocks)["train"] for blocks in (1, 2)}
    assert counted[0] == len(data.train) + 2 * images  # nothing was taken from another store
    assert not torch.equal(everything(kept[1]), everything(kept[2]))
    again = kept_features(*tiny[:1], splits, tiny[1], PassOptions(batch_size=8), tmp_path, lambda line: None)
    assert torch.equal(again["train"].cls, features["train"].cls) and counted[0] == len(data.train) + 2 * images
    for blocks, rows in kept.items(): assert torch.equal(everything(rows), expected(tiny, data, blocks=blocks))
    assert len([entry for entry in list_entries(tmp_path) if entry.key != "contents"]) == 3
    assert all(damaged == 0 for _, _, damaged in verify_entries(tmp_path))


def test_a_damaged_row_is_noticed(tiny, data, tmp_path, counted):
    before = everything(keep(tiny, data, tmp_path)["train"])
    place, = tmp_path.glob("?" * 32 + "/00.rows")
    content = bytearray(place.read_bytes())
    content[5 * 21 * 128 * 4 + 999] ^= 16  # of the sixth image
    place.write_bytes(content)
    said, counted[0] = [], 0
    kept = keep(tiny, data, tmp_path, said=said)["train"]
    assert counted[0] == 1 and torch.equal(everything(kept), before)
    assert "Tokens (train): 1 kept ones are damaged and are computed again" in said
    assert any(": 1 images x 10.8 kB = 10.8 kB, kept in" in line for line in said)


def test_what_is_there_needs_no_room(tiny, data, tmp_path):
    few, said = replace(data, train=data.train.select(range(10)), labels=data.labels | {"train": data.labels["train"][:10]}), []
    keep(tiny, few, tmp_path)
    keep(tiny, data, tmp_path, said=said)
    assert f": {len(data.train) - 10} images x" in said[0]


def test_a_disk_without_room(tiny, data, tmp_path, counted, monkeypatch):
    usage, count = shutil.disk_usage, len(data.train) + len(data.validation)
    each = 21 * 128 * 4 + RECORD.itemsize
    def with_free(free): monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(place)._replace(free=free))
    with_free(count * each - 1)
    with pytest.raises(UserError) as caught: keep(tiny, data, tmp_path / "new" / "cache")
    size = f"{count * each / 1e3:,.0f} kB"
    assert str(caught.value) == (
        f"The tokens take {size} and {size} are free in {tmp_path / 'new' / 'cache'}: choose another --cache_dir, --feature_dtype "
        "bfloat16 for half of it, or pass --cache_features never to go through the images in each epoch.")
    assert counted[0] == 0 and not (tmp_path / "new").exists()
    half = PassOptions(batch_size=8, kept_as="bfloat16")
    keep(tiny, data, tmp_path / "new" / "cache", options=half)
    with_free(1000)
    with pytest.raises(UserError, match="choose another --cache_dir, or pass"): keep(tiny, data, tmp_path / "x", 1, options=half)
    keep(tiny, data, tmp_path / "new" / "cache", options=half)  # needs none


def test_an_interrupted_pass_continues(tiny, data, tmp_path, counted):
    def give_up(module, inputs):
        if counted[0] > 24: raise KeyboardInterrupt
    hook = tiny[0].model.layer[0].register_forward_pre_hook(give_up)
    with suppress(KeyboardInterrupt): keep(tiny, data, tmp_path)
    hook.remove()
    done, said = 24, []
    counted[0] = 0
    kept = keep(tiny, data, tmp_path, said=said)["train"]
    left = len(data.train) + len(data.validation) - done
    assert counted[0] == left and said[0].split(": ")[1].startswith(f"{left} images x")
    assert torch.equal(everything(kept), expected(tiny, data))


def test_cleared_and_limited(tiny, data, tmp_path):
    kept_features(tiny[0], {"": data.rows("train")}, tiny[1], PassOptions(), tmp_path, lambda line: None)
    said = []
    keep(tiny, data, tmp_path, said=said, limit=1e-6)
    assert any(line.endswith("removed: --cache_limit 1e-06 GB") for line in said)  # the features, not the tokens in use
    entry, = (entry for entry in list_entries(tmp_path) if entry.key != "contents")
    assert entry.record["shape"] == [21, 128] and "tiny" in entry.line()
    clear_entries(tmp_path)
    assert not [entry for entry in list_entries(tmp_path) if entry.key != "contents"]


def test_files_may_turn_out_to_be_the_same_picture(tiny, tmp_path, counted):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files): Image.fromarray(np.full((9, 9, 3), 60 * (i % 3), np.uint8)).save(file)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    feature = datasets.Features(image=datasets.Image(decode=False))
    named = [{"bytes": None, "path": str(file)} for file in [*files, tmp_path / "broken.png"]]
    rows, said = ImageRows(datasets.Dataset.from_dict({"image": named}, features=feature)), []
    options = PassOptions(on_bad_image="skip", num_workers=0, entry=open_entry(*tiny, 2))
    kept = kept_tokens(tiny[0], {"train": rows}, tiny[1], options, tmp_path / "cache", said.append)["train"]
    assert "up to 5 images x" in said[0] and counted[0] == 3
    assert kept.read.tolist() == [0, 1, 2, 3] and list(kept.unread) == [4]
    assert torch.equal(kept.take(torch.tensor([0])), kept.take(torch.tensor([3])))
    assert kept.take(torch.tensor([4, 0]))[0].abs().max() == 0


# Keys

def test_features_keep_their_key(tiny):
    "Word for word the recipe that stores of features were named by before there were tokens."
    prepared = json.loads(tiny[1].to_json_string())
    written = {"format": 3, "decoding": DECODING_VERSION, **describe_backbone(tiny[0]), "processor": prepared,
               "image_size": prepared.get("size"), "preprocess": "processor", "precision": "no", "compile": False, "kept_as": "float32"}
    key = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:32]
    assert recipe_key(make_recipe(describe_backbone(tiny[0]), tiny[1], PassOptions())) == key
    assert set(describe_backbone(tiny[0])) == {"weights", "config", "quantization", "versions"}
    assert {"drop_path_rate", "pos_embed_rescale"} < set(written["config"])


def test_only_what_decides_tokens_decides_their_key(backbone):
    def key(blocks=2):
        entry = open_entry(backbone, SQUARE, blocks)
        return recipe_key(make_recipe(describe_backbone(backbone, entry), SQUARE, PassOptions(entry=entry)))
    first, learning = key(), {id(p) for p in last_parameters(backbone, 2)}
    assert key(1) != first
    for name, parameter in backbone.named_parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[0] += 1
        assert (key() == first) is (id(parameter) in learning), name
        parameter.data.copy_(kept)
    assert key() == first
    backbone.config.drop_path_rate = 0.3
    assert key() == first


# Runs

def test_loaders_and_a_classifier(tiny, data, tmp_path):
    "A few steps of a classifier with `--tune last`, from images and from tokens: the same weights."
    kept = keep(tiny, data, tmp_path)
    train_loader, validation_loader = make_token_loaders(data, kept, TrainArguments(batch_size=8, seed=1))
    ends, pictures = [], all_pixels(tiny, data)
    for way in ("tokens", "pixel_values"):
        torch.manual_seed(0)
        model = build_classifier(ModelArguments(model_name="tiny", pool="cls_mean"), data.class_names)
        choose_parameters(model, TuneArguments(tune="last"))
        model.entry = open_entry(model.backbone, tiny[1], 2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for epoch in range(2):
            train_loader.sampler.epoch = epoch
            order = list(train_loader.sampler)
            for batch, rows in zip(train_loader, torch.tensor(order).split(8)):
                given = {"tokens": batch["tokens"]}
                if way == "pixel_values": given = {way: pictures[rows]}
                assert batch["skipped"] == [] and torch.equal(batch["labels"], torch.from_numpy(data.labels["train"])[rows])
                model.train()(**given, labels=batch["labels"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(dict(model.named_parameters()))
    assert all_equal(ends[0].values(), ends[1].values())
    moved = [name for name, p in ends[0].items() if name.startswith("backbone.") and not torch.equal(p, tiny[0].get_parameter(name[9:]))]
    assert len(moved) == len(last_parameters(tiny[0], 2))
    assert [len(batch["labels"]) for batch in validation_loader] == [len(part) for part in torch.arange(len(data.validation)).split(32)]


def test_fit_from_tokens_is_fit_from_images(tiny, data, tmp_path):
    arguments = TrainArguments(batch_size=8, epochs=2, learning_rate=1e-2, mixed_precision="no", no_tracking=True)
    ends = []
    for way in ("tokens", "images"):
        torch.manual_seed(0)
        model = build_classifier(ModelArguments(model_name="tiny"), data.class_names)
        choose_parameters(model, TuneArguments(tune="last"))
        loaders = make_loaders(data, tiny[1], DataArguments(num_workers=0), arguments, "processor")
        if way == "tokens":
            model.entry, loaders = open_entry(model.backbone, tiny[1], 2), make_token_loaders(data, keep(tiny, data, tmp_path), arguments)
        state = fit(model, *loaders, arguments, make_accelerator(arguments), log=lambda line: None)
        curve = [{name: value for name, value in point.items() if name != "images_per_second"} for point in state.history]
        ends.append((curve, list(model.parameters())))
    assert all_equal(ends[0][1], ends[1][1])
    assert ends[0][0] == ends[1][0]


def test_tokens_through_a_wrapped_model(tiny, data, tmp_path):
    from torch import distributed
    batch = pixels(32, 32)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = build_classifier(ModelArguments(model_name="tiny"), data.class_names)
        choose_parameters(model, TuneArguments(tune="last"))
        model.entry = open_entry(model.backbone, tiny[1], 2)
        wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
        tokens = model.entry.compute(model.backbone, batch)
        found = wrapped(tokens=tokens, labels=torch.arange(4))
        found.loss.backward()
        assert all((p.grad is not None) is p.requires_grad for p in model.parameters())
        assert torch.equal(found.logits, model(batch).logits)
    finally: distributed.destroy_process_group()


def run_last(folder, **given):
    said = []
    settings = dict(dataset="digits", train_split_ratio=0.03, val_split_ratio=0.05, model_name="tiny", tune="last", epochs=2,
                    batch_size=8, learning_rate=1e-3, backbone_learning_rate=1e-3, mixed_precision="no", no_tracking=True)
    state = run(**settings | given, cache_dir=folder / "cache", checkpoint_dir=folder / "run", log=said.append)
    return state, said


def weights_of(state): return list(state.model.parameters())


def test_a_whole_run_both_ways_and_the_same_store_for_the_next(tmp_path):
    tokens, said = run_last(tmp_path / "tokens")
    images, _ = run_last(tmp_path / "images", cache_features="never")
    assert all_equal(weights_of(tokens), weights_of(images))
    assert any(line.startswith("Tokens that enter the last 2 of 4 blocks: 61 images x 10.8 kB") for line in said)
    assert tokens.model.entry is not None and images.model.entry is None
    _, again = run_last(tmp_path / "tokens", overwrite=True, drop_path=0.2, learning_rate=1e-2)
    assert sum(line.startswith("Tokens (") and "kept before as" in line for line in again) == 2


def test_a_resumed_run_finds_its_tokens_though_its_blocks_have_moved(tmp_path, monkeypatch):
    whole, _ = run_last(tmp_path / "whole", eval_every_steps="epoch")
    class Killed(Exception): pass
    real, steps = torch.optim.AdamW.step, [0]
    def step(self, *given, **named):
        steps[0] += 1
        if steps[0] > 8: raise Killed
        return real(self, *given, **named)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(Killed): run_last(tmp_path / "cut", eval_every_steps="epoch")
    monkeypatch.setattr(torch.optim.AdamW, "step", real)
    resumed, said = run_last(tmp_path / "cut", eval_every_steps="epoch", resume=True)
    assert any(line.startswith("Going on from step 6") for line in said)
    assert all_equal(weights_of(whole), weights_of(resumed))
    assert sum(line.startswith("Tokens (") and "kept before as" in line for line in said) == 2
