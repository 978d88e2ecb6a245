"Faults of a kind in checkpoints: flipped bits, weights that changed, files that are gone, what a file need not hold."
import random
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import make_image_folder, save_convnext
from PIL import Image

from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.weights import TINY_FOLDER
from dinov3_nb.checkpoint import check_same_run, checkpoint_saver, find_start, is_complete
from dinov3_nb.core import DataArguments, ModelArguments, QuantizationArguments, TrainArguments, UserError, make_settings
from dinov3_nb.data import load_and_prepare_dataset
from dinov3_nb.files import _content_digest, _list_content, read_checkpoint, save_atomically
from dinov3_nb.model import build_classifier
from dinov3_nb.optimizer import make_optimizer, make_scheduler
from dinov3_nb.quantization import quantization_config
from dinov3_nb.training import TrainingState


@pytest.fixture(scope="module")
def images(tmp_path_factory): return make_image_folder(tmp_path_factory.mktemp("checkpoint_images"), per_class=4)


class Run:
    "What a training run saves, without the training: one step with gradients of ones."
    def __init__(self, images, folder, model_name="tiny", four_bits=False, seed=0, **changes):
        self.folder, self.model_arguments = folder, ModelArguments(model_name, **changes)
        self.quantization = QuantizationArguments(use_4bit=four_bits)
        self.arguments = TrainArguments(checkpoint_dir=str(folder))
        groups = DataArguments(str(images)), self.model_arguments, self.quantization, self.arguments
        self.data, self.processor, self.config = load_and_prepare_dataset(groups[0]), load_processor(model_name), make_settings(*groups).flat()
        self.model = self.build(seed)
        self.save = checkpoint_saver(folder, self.config, self.data, self.processor)

    def build(self, seed=0):
        torch.manual_seed(seed)
        return build_classifier(self.model_arguments, self.data.class_names, quantization_config(self.quantization))

    def step(self, is_best=True, count=1):
        optimizer = make_optimizer(self.model, self.arguments)
        for p in self.model.parameters():
            if p.requires_grad: p.grad = torch.ones_like(p)
        optimizer.step()
        history = [{"step": n, "val_acc": 0.5} for n in range(count)]
        self.save(TrainingState(self.model, optimizer, make_scheduler(optimizer, 90, 0.05), step=20, total_steps=90, history=history), is_best)


@pytest.fixture(scope="module")
def saved(images, tmp_path_factory):
    run = Run(images, tmp_path_factory.mktemp("run") / "run")
    run.step()
    return run


def flip(content, bit):
    "The same with one bit changed."
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def check_flips(path, bits, tmp_path):
    "How many of the flipped bits were refused; the others changed nothing that was saved."
    content, wanted, refused = path.read_bytes(), _content_digest(read_checkpoint(path)), 0
    for bit in bits:
        (tmp_path / "flipped.pt").write_bytes(flip(content, bit))
        try: found = read_checkpoint(tmp_path / "flipped.pt")
        except UserError: refused += 1; continue
        assert _content_digest(found) == wanted, bit
    return refused


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
def test_no_flipped_bit_changes_a_checkpoint_without_a_word(saved, tmp_path):
    "Anywhere in the file, and many in the first kilobyte, where the pickle begins."
    path = saved.folder / "best.pt"
    bits = random.Random(0).sample(range(8 * path.stat().st_size), 300)
    assert check_flips(path, bits, tmp_path) > 100
    assert check_flips(path, range(0, 8 * 1024, 41), tmp_path) > 50


def test_the_digest_sees_what_a_comparison_does_not():
    "Types, order, shapes and the last bit, in every place where a value can stand."
    values = [1, True, 1.0, "1", "1.0", None, [1], (1,), {"1": 1}, {1: 1}, {}, [], float("nan"), float("inf"), 0.0, -0.0, 0.1, 0.1 + 2e-17,
              [[1], 2], [[1, 2]], [1, [2]], {"a": 1, "b": 2}, {"b": 2, "a": 1}, "a\nb", ["a", "b"], torch.zeros(2), torch.zeros(2, 1),
              torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, -0.0]), torch.zeros(2, dtype=torch.bool), torch.zeros(0), torch.tensor(0.0)]
    values[17] = 0.1 + 1.4e-17  # the next number after 0.1
    assert len({_content_digest({"x": value}) for value in values}) == len(values)
    weights = torch.arange(12.0).reshape(3, 4)
    assert _content_digest(weights.T) == _content_digest(weights.T.contiguous()) != _content_digest(weights)
    assert _content_digest(weights.bfloat16()) != _content_digest(weights.half()) and next(_list_content(weights)) is weights


def test_a_digest_that_is_gone_is_damage_and_the_origin_has_none(saved, tmp_path):
    kept = torch.load(saved.folder / "best.pt", weights_only=True)
    told = "is damaged: its content is not what was written"
    for name, sentence in (("digest", "carries no digest of its content"), ("versions", told), ("history", told)):
        torch.save({key: value for key, value in kept.items() if key != name}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=sentence): read_checkpoint(tmp_path / "x.pt")
    torch.save({"model_state_dict": kept["model_state_dict"], "config": {}, "best_acc": 0.8}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt")["best_acc"] == 0.8
    torch.save(kept["model_state_dict"], tmp_path / "x.pt")
    assert set(read_checkpoint(tmp_path / "x.pt")) == {"model_state_dict", "config"}
    save_atomically(kept | {"step": 21}, tmp_path / "x.pt")  # changed on purpose: written with a new digest
    assert read_checkpoint(tmp_path / "x.pt")["step"] == 21


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), EOFError(), KeyError("x"), OverflowError(), AssertionError(), OSError(5, "x")])
def test_whatever_loading_raises_is_one_sentence(saved, monkeypatch, error):
    def fail(*given, **named): raise error
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="is damaged or no checkpoint: it cannot be read"): read_checkpoint(saved.folder)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(saved, tmp_path, monkeypatch):
    import builtins
    def fail(*given, **named): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(builtins, "open", fail)
    with pytest.raises(UserError, match="best.pt cannot be read .Permission denied"): read_checkpoint(saved.folder)


def test_what_a_checkpoint_says_about_its_run(saved):
    kept, data = read_checkpoint(saved.folder), saved.data
    assert kept["held_out"]["split"] == data.held_out.split and kept["held_out"]["rows"].tolist() == list(data.held_out.rows)
    assert len(kept["trained_on"]) == len(data.train) and len(kept["held_out"]["images"]) == len(data.validation)
    assert not set(kept["trained_on"].tolist()) & set(kept["held_out"]["images"].tolist())
    assert kept["backbone_config"]["model_type"] == "dinov3_vit" and kept["backbone_config"]["hidden_size"] == 128


def test_the_run_is_described_once(images, tmp_path, monkeypatch):
    from dinov3_nb import checkpoint as module
    counts = {"_labels_digest": 0, "image_ids": 0, "backbone_fingerprint": 0}
    for name in counts:
        def counted(*given, name=name, call=getattr(module, name)): counts[name] += 1; return call(*given)
        monkeypatch.setattr(module, name, counted)
    run = Run(images, tmp_path / "run")
    for count in (1, 2, 3): run.step(count=count)
    assert counts == {"_labels_digest": 1, "image_ids": 2, "backbone_fingerprint": 1}  # images that were learnt from, and that were held out


def test_best_of_a_trained_backbone_leaves_out_the_averages(images, tmp_path):
    "It predicts, but is not resumed from; of a frozen run both files hold everything."
    run = Run(images, tmp_path / "trained", freeze_backbone=False)
    run.step()
    best, last = (read_checkpoint(run.folder / name) for name in ("best.pt", "last.pt"))
    assert best["optimizer_state_dict"] == {} and last["optimizer_state_dict"]["state"]
    assert (run.folder / "best.pt").stat().st_size < (run.folder / "last.pt").stat().st_size / 2.5
    again = replace(run.arguments, resume=True)
    assert find_start(again, run.config)["step"] == 20
    shutil.copy(run.folder / "best.pt", run.folder / "last.pt")
    with pytest.raises(UserError, match="leaves out the optimizer's state: --resume needs that run's last.pt"): find_start(again, run.config)
    run.step(count=1)  # a new run in the place of the old one
    assert read_checkpoint(run.folder / "best.pt")["optimizer_state_dict"] == {}
    frozen = Run(images, tmp_path / "frozen")
    frozen.step()
    assert read_checkpoint(frozen.folder / "best.pt")["optimizer_state_dict"]["state"]


def test_resume_starts_where_there_is_nothing_and_ends_where_all_is_done(images, tmp_path):
    run = Run(images, tmp_path / "run")
    again = replace(run.arguments, resume=True)
    assert find_start(again, run.config) is None
    run.step()
    assert not is_complete(find_start(again, run.config))
    (run.folder / "last.pt").unlink()  # killed while it replaced an older run
    assert find_start(again, run.config)["step"] == 20
    save_atomically(read_checkpoint(run.folder) | {"step": 90}, run.folder / "last.pt")
    assert is_complete(find_start(again, run.config))
    with pytest.raises(UserError, match="is a file: name a folder"): find_start(replace(again, checkpoint_dir=str(run.folder / "last.pt")), run.config)


def test_a_best_pt_that_cannot_be_read_counts_as_a_run(images, tmp_path):
    "Only what says that a probe wrote it gets the sentence for a probe; without --resume nothing else is read."
    run = Run(images, tmp_path / "run")
    run.step()
    kept = read_checkpoint(run.folder)
    with pytest.raises(UserError, match="holds a run already: add --resume"): find_start(run.arguments, run.config)
    (run.folder / "last.pt").unlink()
    for content, sentence in ((kept, "holds a run already"), (kept | {"probe": {}}, "holds the best head of a probe")):
        save_atomically(content, run.folder / "best.pt")
        with pytest.raises(UserError, match=sentence): find_start(run.arguments, run.config)
    (run.folder / "best.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="holds a run already"): find_start(run.arguments, run.config)
    assert find_start(replace(run.arguments, overwrite=True), run.config) is None


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_4bit_fingerprint_is_that_of_the_weights_as_loaded(images, tmp_path, compute):
    "Before and after a pass, whatever type it computes in, for training and resuming; other weights are noticed."
    run = Run(images, tmp_path / compute, four_bits=True)
    run.quantization = QuantizationArguments(use_4bit=True, bnb_4bit_compute_dtype=compute)
    run.model = run.build()
    with torch.no_grad(): run.model(pixel_values=torch.zeros(1, 3, 32, 32))
    run.step()
    kept = read_checkpoint(run.folder)
    check_same_run(kept, run.data, run.build())
    check_same_run(kept, run.data, run.model)
    save_convnext(tmp_path / "other")
    run.model_arguments = ModelArguments(str(tmp_path / "other"))
    with pytest.raises(UserError, match="the backbone's weights changed"): check_same_run(kept, run.data, run.build())


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kind", ["matrices", "norms", "one number"])
def test_changed_weights_in_a_folder_are_noticed(images, tmp_path, kind, four_bits):
    "Each kind of parameter alone; a folder that only moved, or was saved again, is the same."
    backbone = load_backbone("tiny")
    backbone.save_pretrained(tmp_path / "then")
    shutil.copy(TINY_FOLDER / "preprocessor_config.json", tmp_path / "then")
    run = Run(images, tmp_path / "run", model_name=str(tmp_path / "then"), four_bits=four_bits)
    run.step()
    kept = read_checkpoint(run.folder)
    shutil.move(tmp_path / "then", tmp_path / "moved")
    run.model_arguments = ModelArguments(str(tmp_path / "moved"))
    check_same_run(kept, run.data, run.build())
    chosen = [p for p in backbone.parameters() if (p.ndim >= 2) == (kind == "matrices")]
    for p in chosen[:1] if kind == "one number" else chosen:
        if kind == "one number": p.data.view(-1)[3] *= 1 + 2e-7
        else: p.data *= 1.01
    backbone.save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="the backbone's weights changed"): check_same_run(kept, run.data, run.build())


def test_a_picture_exchanged_for_another_is_noticed(tmp_path):
    "Of the same class and name, so the labels stay as they were; a folder that was moved is the same run."
    make_image_folder(tmp_path / "images", per_class=4)
    run = Run(tmp_path / "images", tmp_path / "run")
    run.step()
    kept = read_checkpoint(run.folder)
    shutil.move(tmp_path / "images", tmp_path / "moved")
    moved = load_and_prepare_dataset(DataArguments(str(tmp_path / "moved")))
    check_same_run(kept, moved, run.model)
    Image.new("RGB", (48, 48), "red").save(tmp_path / "moved" / "train" / "circle" / "2.png")
    with pytest.raises(UserError, match="the training images changed"):
        check_same_run(kept, load_and_prepare_dataset(DataArguments(str(tmp_path / "moved"))), run.model)


def test_a_checkpoint_of_some_blocks_holds_those_and_the_head(images, tmp_path):
    "Its fingerprint is of the rest: that may not change, while what learns does."
    run = Run(images, tmp_path / "some")
    norm = run.model.backbone.norm
    norm.requires_grad_(True)
    run.step()
    best, last = (read_checkpoint(run.folder / name) for name in ("best.pt", "last.pt"))
    assert set(last["model_state_dict"]) == {"head.weight", "head.bias", "backbone.norm.weight", "backbone.norm.bias"}
    assert best["optimizer_state_dict"] == {} and last["optimizer_state_dict"]["state"]
    check_same_run(last, run.data, run.model)
    norm.weight.data += 1
    check_same_run(last, run.data, run.model)
    assert last["backbone_fingerprint"] not in (None, read_checkpoint_of_frozen(images, tmp_path)["backbone_fingerprint"])
    run.model.backbone.embeddings.cls_token.data += 1
    with pytest.raises(UserError, match="the backbone's weights changed"): check_same_run(last, run.data, run.model)


def read_checkpoint_of_frozen(images, tmp_path):
    run = Run(images, tmp_path / "frozen")
    run.step()
    return read_checkpoint(run.folder)


def test_a_run_of_the_old_recipe_is_not_resumed(images, tmp_path):
    "One rate for all layers: its optimizer does not fit the groups of today."
    run = Run(images, tmp_path / "old", freeze_backbone=False)
    run.step()
    for name in ("best.pt", "last.pt"):
        kept = read_checkpoint(run.folder / name)
        kept["config"] = {key: value for key, value in kept["config"].items() if key != "tune"}
        save_atomically(kept, run.folder / name)
    with pytest.raises(UserError, match="trained with one rate for all layers, and cannot be resumed; predict can still use it"):
        find_start(replace(run.arguments, resume=True), run.config | {"tune": "all"})


def test_an_interrupt_while_a_checkpoint_is_written_stays_one(tmp_path):
    import pytest
    from dinov3_nb.files import save_atomically

    class Writer:  # as torch's, which fails when it closes a file that is not whole
        def __reduce__(self):
            try: raise KeyboardInterrupt
            finally: raise RuntimeError("unexpected pos")

    with pytest.raises(KeyboardInterrupt): save_atomically({"x": Writer()}, tmp_path / "cut.pt")
    assert not list(tmp_path.iterdir())
