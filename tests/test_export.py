"Every way out, for every kind of classifier: whole or not there, equal to the original, and with its licence."
import base64
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, command, make_image_folder
from huggingface_hub import ModelCard
from PIL import Image
from test_lora import FAMILIES
from transformers import ConvNextImageProcessor, DINOv3ViTImageProcessor

from dinov3_nb import UserError, evaluate, load_classifier, train
from dinov3_nb.calibration import calibration_file, save_calibration
from dinov3_nb.export import export
from dinov3_nb.files import read_checkpoint
from dinov3_nb.onnx_inference import load_onnx
from dinov3_nb.push import check_pushable
from dinov3_nb.report import report

QUIET = dict(log=lambda line: None)
LICENCE = "DINOv3 License\n\nLast Updated: August 19, 2025\n\nA stand-in for the text.\n"
KINDS = {
    "vit-linear": ("vit", {}), "vit-mlp-cls_mean": ("vit", dict(head="mlp", pool="cls_mean")),
    "vit-lora": ("vit", dict(tune="lora")), "vit-4bit": ("vit", dict(use_4bit=True, bnb_4bit_compute_dtype="float32")),
    "vit-4bit-lora": ("vit", dict(use_4bit=True, bnb_4bit_compute_dtype="float32", tune="lora")),
    "vit-last": ("vit", dict(tune="last")), "convnext-linear": ("convnext", {}), "convnext-mlp": ("convnext", dict(head="mlp")),
    "timm-cls_mean": ("timm", dict(pool="cls_mean")), "timm-4bit": ("timm", dict(use_4bit=True, bnb_4bit_compute_dtype="float32")),
    "timm-convnext": ("timm-convnext", {}),
}
BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "dinov3_nb": raise ImportError("dinov3_nb is not to be had here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
folder, pixels, picture, out = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
with torch.inference_mode(): logits = model(pixel_values=torch.load(pixels)).logits
said = pipeline("image-classification", folder, trust_remote_code=True, device="cpu")(picture, top_k=3)
assert not any(name.startswith("dinov3_nb") for name in sys.modules)
torch.save({"logits": logits, "said": said}, out)
"""


def save_family(name, folder, licence=True):
    "A backbone of random weights with its processor, and the licence that Meta's repositories hold."
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    FAMILIES[name](folder)
    if "timm" not in name: DINOv3ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    if licence: (folder / "LICENSE.md").write_text(LICENCE)
    return str(folder)


def make_run(root, kind, licence=True):
    family, settings = KINDS[kind]
    if "timm" in family: pytest.importorskip("timm")
    if settings.get("tune") == "lora": pytest.importorskip("peft")
    images = make_image_folder(root / "images", per_class=4)
    train(dataset=images, model_name=save_family(family, root / "backbone", licence), epochs=1, batch_size=6, learning_rate=1e-2,
          mixed_precision="no", no_tracking=True, checkpoint_dir=root / "run", **settings, **QUIET)
    return root / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_by_every_way(kind, tmp_path):
    "Folder 1e-6, ONNX 1e-4; the folder with its code in a process that has no dinov3_nb; a licence in each."
    run = make_run(tmp_path, kind)
    picture = str(next((tmp_path / "images" / "val" / "circle").iterdir()))
    ours = load_classifier(run, "cpu")
    wanted = dict(ours.predict(picture)[0].labels)
    hub = export(run, "hub", tmp_path / "hub", self_contained=True, **QUIET)
    again = load_classifier(tmp_path / "hub", "cpu")
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, *_size(ours.processor))
    with torch.inference_mode(): ours_say, copy_says = (c.model(pixel_values=pixels).logits for c in (ours.finished(), again))
    print(f"{kind}: folder {hub.difference:.1e}")
    assert hub.difference <= 1e-6 and (ours_say - copy_says).abs().max() <= 1e-6
    torch.save(pixels, tmp_path / "pixels.pt")
    environment = {**ENVIRONMENT, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", BLOCKED, str(tmp_path / "hub"), str(tmp_path / "pixels.pt"), picture, str(tmp_path / "said.pt")],
                          env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = torch.load(tmp_path / "said.pt")
    print(f"{kind}: self-contained {(alone['logits'] - ours_say).abs().max():.1e}")
    assert (alone["logits"] - ours_say).abs().max() <= 1e-6
    assert {a["label"]: a["score"] for a in alone["said"]} == pytest.approx(wanted, abs=1e-5)
    onnx = export(run, "onnx", tmp_path / "onnx", **QUIET)
    print(f"{kind}: ONNX {onnx.difference:.1e}")
    assert onnx.difference <= 1e-4
    assert dict(load_onnx(tmp_path / "onnx").predict(picture)[0].labels) == pytest.approx(wanted, abs=1e-4)
    for folder in (hub.folder, onnx.folder): assert (folder / "LICENSE.md").read_text() == LICENCE
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("preprocess", ["processor", "fast"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_copy_answers_as_its_run(preprocess, mixed_precision, tmp_path):
    "How pictures are prepared and computed is the run's decision, also where only the folder is left."
    images = make_image_folder(tmp_path / "images", per_class=4)
    train(dataset=images, model_name="tiny", epochs=1, batch_size=6, learning_rate=1e-2, image_size=64, no_tracking=True,
          mixed_precision=mixed_precision, preprocess=preprocess, checkpoint_dir=tmp_path / "run", **QUIET)
    ours = load_classifier(tmp_path / "run", "cpu")
    wide = Image.effect_noise((333, 501), 90).convert("RGB")
    def answer(classifier): return dict(classifier.predict(wide)[0].labels)
    ours.save_pretrained(tmp_path / "saved")
    export(ours, "hub", tmp_path / "whole", **QUIET)
    export(tmp_path / "whole", "hub", tmp_path / "again", **QUIET)
    export(ours, "hub", tmp_path / "head", head_only=True, **QUIET)
    for name in ("saved", "whole", "again", "head"): assert answer(load_classifier(tmp_path / name, "cpu")) == answer(ours), name
    others = [value for value in ("processor", "fast") if value != preprocess]
    assert answer(replace(ours, config={**ours.config, "preprocess": others[0]})) != answer(ours)


def _size(processor):
    size = processor.crop_size if processor.do_center_crop else processor.size
    return dict(size)["height"], dict(size)["width"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    train(dataset="digits", model_name="tiny", epochs=2, batch_size=32, learning_rate=5e-3, mixed_precision="no",
          no_tracking=True, checkpoint_dir=root / "run", **QUIET)
    return root / "run"


FORMATS = [("hub", {}), ("hub", dict(self_contained=True)), ("hub", dict(head_only=True)), ("onnx", {}), ("onnx", dict(int8=True)),
           ("web", {}), ("web", dict(int8=True)), ("space", {})]


@pytest.fixture(scope="module")
def metas(tmp_path_factory): return make_run(tmp_path_factory.mktemp("metas"), "vit-linear")


@pytest.fixture(scope="module")
def unlicensed(tmp_path_factory): return make_run(tmp_path_factory.mktemp("unlicensed"), "vit-linear", licence=False)


@pytest.mark.parametrize("format, options", FORMATS, ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain")
def test_what_holds_others_weights_holds_their_licence(format, options, metas, unlicensed, digits, tmp_path):
    "From the backbone's folder, or as it is given; where it cannot be had, one line says so; ours is Apache-2.0."
    export(metas, format, tmp_path / "found", **options, **QUIET)
    given, lines = tmp_path / "given.md", []
    given.write_text("DINOv3 License, as given")
    export(unlicensed, format, tmp_path / "given", licence_file=given, **options, **QUIET)
    export(unlicensed, format, tmp_path / "missing", log=lines.append, **options)
    export(digits, format, tmp_path / "ours", **options, **QUIET)
    texts = {name: (tmp_path / name / "LICENSE.md").read_text() for name in ("found", "given", "ours")}
    assert texts["found"] == LICENCE and texts["given"] == "DINOv3 License, as given" and "Apache License" in texts["ours"]
    assert not (tmp_path / "missing" / "LICENSE.md").exists()
    assert sum("has to go with these weights" in line for line in lines) == 1, lines


def test_the_figures_on_the_card_are_those_of_evaluate(digits, tmp_path):
    export(digits, "hub", tmp_path / "hub", **QUIET)
    scores, card = evaluate(digits).scores, ModelCard.load(tmp_path / "hub" / "README.md")
    said = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert said["accuracy"] == pytest.approx(scores.accuracy, abs=5e-5) and said["f1"] == pytest.approx(scores.macro_f1, abs=5e-5)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-classification"
    for name in ("more information needed", str(tmp_path), str(digits.parent)): assert name.lower() not in card.content.lower()


def test_a_head_alone_is_small_and_needs_its_backbone(metas, tmp_path):
    made = export(metas, "hub", tmp_path / "head", head_only=True, **QUIET)
    size = sum(path.stat().st_size for path in made.folder.rglob("*") if path.suffix != ".png")
    assert made.difference <= 1e-6 and size < 50_000
    config = json.loads((made.folder / "config.json").read_text())
    assert config["head_only"] and config["backbone_fingerprint"] and "backbone_revision" in config


def test_a_head_on_a_backbone_of_this_machine_stays_here(metas, tmp_path):
    "The export says so, and the push refuses it, with advice that leads out."
    lines = []
    export(metas, "hub", tmp_path / "head", head_only=True, log=lines.append)
    assert lines[-1].endswith(f"for this machine alone, since the backbone is in {metas.parent / 'backbone'}")
    with pytest.raises(UserError, match="export the whole classifier, without --head_only"): check_pushable(tmp_path / "head")


@pytest.mark.parametrize("format", ["hub", "space"])
def test_others_may_read_every_file(format, metas, tmp_path):
    "safetensors writes for its owner alone; a server is somebody else."
    before = os.umask(0o022)
    try: made = export(metas, format, tmp_path / "out", **QUIET)
    finally: os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in made.folder.rglob("*") if path.is_file()} == {0o644}


def test_an_exported_folder_is_exported_again(metas, tmp_path, monkeypatch):
    "Of its backbone and its training only what is known is told: no page of the Hub that does not exist."
    export(metas, "hub", tmp_path / "first", **QUIET)
    monkeypatch.chdir(tmp_path)
    export("first", "hub", "second", **QUIET)
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert card.data.base_model is None and "huggingface.co/backbone" not in card.content
    assert "a DINOv3 backbone (backbone). The backbone is as it was; only the head has learned. This folder" in card.content
    assert (tmp_path / "second" / "LICENSE.md").read_text() == LICENCE


def test_a_tuned_backbone_cannot_be_left_out(tmp_path):
    run = make_run(tmp_path, "vit-last")
    with pytest.raises(UserError, match="has learned, so nobody else has it"): export(run, "hub", tmp_path / "out", head_only=True, **QUIET)
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


BAD = [
    (["--format", "hub", "--out", "taken"], "taken is there already: name a new folder"),
    (["--format", "hub", "--out", "no/where"], "there is no folder no"),
    (["--format", "onnx", "--out", "new", "--opset", "3"], "--opset 3 is out of range"),
    (["--format", "onnx", "--out", "new", "--head_only"], "--head_only does nothing with --format onnx"),
    (["--format", "hub", "--out", "new", "--int8"], "--int8 does nothing with --format hub"),
    (["--format", "hub", "--out", "new", "--head_only", "--self_contained"], "do not go together"),
    (["--format", "tflite", "--out", "new"], "invalid choice: 'tflite'"),
    (["--format", "hub"], "required: --out"),
    (["--format", "hub", "--out", "new", "--licence_file", "nowhere.md"], "--licence_file nowhere.md is not there"),
    (["--format", "hub", "--out", "new", "--split", "tset"], "--split 'tset' is not there"),
    (["--format", "hub", "--out", "new", "--checkpoint", "foreign.pt"], "holds no classifier"),
    (["--format", "hub", "--out", "new", "--checkpoint", "foreign"], "holds no classifier that can be loaded"),
    (["--format", "hub", "--out", "new", "--checkpoint", "nowhere"], "There is no checkpoint at"),
]


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    "A folder with a run, a folder that is there already, and checkpoints of other packages."
    folder = tmp_path_factory.mktemp("place")
    (folder / "taken").mkdir()
    os.symlink(digits, folder / "run")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, folder / "foreign.pt")
    from transformers import ViTConfig, ViTForImageClassification
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    ViTForImageClassification(config).save_pretrained(folder / "foreign")
    return folder


@pytest.mark.parametrize("words, said", BAD, ids=[said for _, said in BAD])
def test_bad_input_gets_one_sentence_and_leaves_nothing(words, said, place):
    before = sorted(path.name for path in place.iterdir())
    if "--checkpoint" not in words: words = [*words, "--checkpoint", "run"]
    done = command("export", *words, cwd=place)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert sorted(path.name for path in place.iterdir()) == before and not list((place / "taken").iterdir())


def test_a_damaged_onnx_file_is_noticed(digits, tmp_path):
    "One flipped bit would be other answers without a word."
    folder = tmp_path / "onnx"
    export(digits, "onnx", folder, int8=True, **QUIET)
    for name in ("model.onnx", "model_int8.onnx"):
        whole = (folder / name).read_bytes()
        for place in (len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
            with pytest.raises(UserError, match=f"{name} is damaged, or was changed: take another copy"): load_onnx(folder / name)
        done = command("predict", "--checkpoint", folder / name, folder / "README.md", cwd=tmp_path)
        assert done.returncode == 2 and "is damaged" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        (folder / name).write_bytes(whole)
    (folder / "model_int8.onnx").unlink()
    assert load_onnx(folder).class_names == list("0123456789")  # what is not asked for may be gone


ASK = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "dinov3_nb": raise ImportError("dinov3_nb is not to be had here")
sys.meta_path.insert(0, Refuse())
import json
from transformers import pipeline
ask = pipeline("image-classification", sys.argv[1], trust_remote_code=True, device="cpu")
print(json.dumps([{a["label"]: a["score"] for a in ask(source, top_k=10)} for source in json.load(sys.stdin)]))
"""


def odd_pictures(folder):
    "Transparent, deep grey, turned by a note, and turned by a note of the wrong type."
    folder.mkdir()
    wave = np.add.outer(np.arange(48) * 900, np.arange(32) * 700)
    colours = np.stack([wave, wave.T.repeat(2, 0)[:48].repeat(2, 1)[:, :32], wave[::-1], wave * 2], 2) // 256 % 256
    Image.fromarray(colours.astype(np.uint8), "RGBA").save(folder / "clear.png")
    Image.fromarray(wave.astype(np.uint16)).save(folder / "deep.png")
    upright = Image.fromarray(colours[..., :3].astype(np.uint8))
    for turn in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        upright.save(folder / f"turn{turn}.png", exif=exif)
    as_text = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\x00\x00\x00\x026\x00\x00\x00\x00\x00\x00\x00"
    upright.save(folder / "text.jpg", exif=as_text)
    return sorted(folder.iterdir())


def test_code_that_travels_sees_what_predict_sees(digits, tmp_path):
    "By path, web address, base64 and data address, in a process that has no dinov3_nb."
    files = odd_pictures(tmp_path / "web")
    export(digits, "hub", tmp_path / "hub", self_contained=True, **QUIET)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    texts = [base64.b64encode(path.read_bytes()).decode() for path in files]
    sources = [[str(path) for path in files], [f"http://127.0.0.1:{server.server_port}/{path.name}" for path in files],
               texts, [f"data:image/png;base64,{text}" for text in texts]]
    environment = {**ENVIRONMENT, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", ASK, str(tmp_path / "hub")], input=json.dumps(sum(sources, [])), env=environment,
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    wanted = [dict(answer.labels) for answer in load_classifier(digits, "cpu").predict([str(path) for path in files], top_k=10)]
    assert wanted[0] != wanted[1]
    for source, theirs, ours in zip(sum(sources, []), said, wanted * 4): assert theirs == pytest.approx(ours, abs=1e-5), source[:60]


def test_a_processor_of_another_kind(tmp_path):
    "The code that travels has DINOv3's; so has the fast way of preparing pictures."
    backbone = save_family("vit", tmp_path / "backbone")
    ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.7).save_pretrained(backbone)
    settings = dict(dataset=make_image_folder(tmp_path / "images", per_class=4), model_name=backbone, epochs=1, no_tracking=True, **QUIET)
    train(**settings, checkpoint_dir=tmp_path / "run")
    with pytest.raises(UserError, match="a ConvNextImageProcessor, which prepares pictures in another way: leave out --self_contained"):
        export(tmp_path / "run", "hub", tmp_path / "out", self_contained=True, **QUIET)
    assert not (tmp_path / "out").exists()
    export(tmp_path / "run", "hub", tmp_path / "out", **QUIET)
    with pytest.raises(UserError, match="--preprocess fast cannot prepare pictures as a ConvNextImageProcessor does"):
        train(**settings, checkpoint_dir=tmp_path / "fast", preprocess="fast")


def test_a_copy_of_a_copy_says_the_same(digits, tmp_path, monkeypatch):
    "Also where the first is called as the backbone is: the licence, the temperature, and what is remembered."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, "run")
    report("run", **QUIET)
    temperature = 2.5  # as if the report had found it
    save_calibration(replace(load_classifier("run", "cpu").calibration, temperature=temperature), calibration_file(Path("run")))
    export("run", "hub", "tiny", **QUIET)
    export("tiny", "hub", "again", **QUIET)
    export("again", "onnx", "onnx", **QUIET)
    cards = [Path(name, "README.md").read_text("utf-8") for name in ("tiny", "again")]
    for card in cards:
        assert f"the logits are divided by {temperature:.3f} already" in card and "license: apache-2.0" in card
        assert "whoever has the picture can tell that it was among them" in card
    assert load_onnx("onnx").temperature == pytest.approx(temperature)
    assert [Path(name, "LICENSE.md").read_text() for name in ("again", "onnx")] == [Path("tiny", "LICENSE.md").read_text()] * 2
    assert json.loads(Path("again/config.json").read_text())["model_name"] == "tiny"
    train(dataset="digits", model_name="tiny", epochs=1, no_tracking=True, checkpoint_dir="new", **QUIET)  # it is still there


def test_a_figure_of_all_splits_is_no_result(digits, tmp_path):
    "Whoever names a dataset for a copy may score its training images; the Hub's table has no word for that."
    export(digits, "hub", tmp_path / "first", **QUIET)
    lines = []
    report(tmp_path / "first", dataset="digits", out=tmp_path / "page.html", log=lines.append)
    assert "predict takes nothing along from this: the checkpoint does not say which images it has learned from" in lines
    for split, there in ((None, False), ("validation", True)):
        out = tmp_path / f"of {split}"
        export(tmp_path / "first", "hub", out, dataset="digits", split=split, **QUIET)
        card = ModelCard.load(out / "README.md")
        assert bool(card.data.eval_results) == there and "macro F1" in card.content


def test_two_classifiers_do_not_share_a_folder(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "run")
    classifier = load_classifier(tmp_path / "run", "cpu")
    with pytest.raises(UserError, match="holds a run's checkpoints, which would not be found any more"):
        classifier.save_pretrained(tmp_path / "run")
    load_classifier(tmp_path / "run", "cpu")
    classifier.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "optimizer.pt").touch()  # as transformers' trainer leaves beside a model
    load_classifier(tmp_path / "saved", "cpu")
    shutil.copy(digits / "best.pt", tmp_path / "saved")
    with pytest.raises(UserError, match="holds a run's checkpoints and an exported classifier: name one of the .pt files"):
        load_classifier(tmp_path / "saved", "cpu")
    load_classifier(tmp_path / "saved" / "best.pt", "cpu")


@pytest.mark.parametrize("rate, words, fact", [(10.0, "The backbone is as it was; only the head has learned.", "tiny"),
                                               (1e-5, "The whole backbone has learned as well.", "tiny, all of it tuned")])
def test_nothing_is_said_to_have_learned_that_has_not(rate, words, fact, tmp_path):
    "Where no step was better than the start, `best.pt` holds the probe's head on the backbone as it was."
    train(dataset=make_image_folder(tmp_path / "images", per_class=4), model_name="tiny", tune="all", epochs=1, batch_size=6,
          backbone_learning_rate=rate, mixed_precision="no", no_tracking=True, checkpoint_dir=tmp_path / "run", **QUIET)
    file = "best" if rate == 10 else "last"
    start = read_checkpoint(tmp_path / "run" / f"{file}.pt")["step"] == 0
    assert start == (rate == 10), "the rates of this test do not do what they should"
    export(tmp_path / "run" / f"{file}.pt", "hub", tmp_path / "once", **QUIET)
    export(tmp_path / "once", "hub", tmp_path / "twice", **QUIET)  # a folder remembers
    for name in ("once", "twice"): assert words in (tmp_path / name / "README.md").read_text("utf-8"), name
    report(tmp_path / "run" / f"{file}.pt", out=tmp_path / "page.html", **QUIET)
    assert f">{fact}<" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(package, digits, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    for format in ("onnx", "web"):
        with pytest.raises(UserError, match=f"needs the package {package}, which is not installed: run `pip install 'dinov3_nb\\[onnx\\]'`"):
            export(digits, format, tmp_path / "new", **QUIET)
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_killed_leaves_no_folder_of_that_name(digits, tmp_path):
    "Interrupted: nothing is left. Killed: what is left has a hidden name, and the next export works."
    words = [str(Path(sys.executable).with_name("dinov3-nb")), "export", "--checkpoint", str(digits), "--format", "onnx", "--out", "new"]
    for how in (signal.SIGINT, signal.SIGKILL):
        running = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background job ignores it
        while not (hidden := [p for p in tmp_path.iterdir() if p.name.startswith(".new.")]) and running.poll() is None: time.sleep(0.02)
        assert hidden, running.communicate()
        running.send_signal(how)
        said = running.communicate(timeout=120)[1]
        assert running.returncode == (130 if how == signal.SIGINT else -9) and "Traceback" not in said, said
        assert not (tmp_path / "new").exists()
        if how == signal.SIGINT: assert not list(tmp_path.iterdir())
    export(digits, "onnx", tmp_path / "new", **QUIET)
    assert (tmp_path / "new" / "model.onnx").exists()


def test_predict_takes_an_onnx_file(digits, tmp_path):
    from dinov3_nb.sources import load_digits_dataset
    load_digits_dataset()["validation"][0]["image"].save(tmp_path / "digit.png")
    export(digits, "onnx", tmp_path / "out", **QUIET)
    answers = [json.loads(command("predict", "--checkpoint", place, "--json", "digit.png", cwd=tmp_path).stdout)
               for place in (digits, tmp_path / "out", tmp_path / "out" / "model.onnx")]
    first, *others = [{label["name"]: label["probability"] for label in answer["labels"]} for answer in answers]
    for other in others: assert other == pytest.approx(first, abs=1e-5)
