"An ONNX file of each kind of classifier agrees with PyTorch, or there is no file; and it answers without PyTorch's model."
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT
from PIL import Image
from test_lora import BITS, FAMILIES

from dinov3_nb import UserError, load_classifier, onnx_export, train
from dinov3_nb.backbone import load_processor
from dinov3_nb.calibration import Calibration, head_digest
from dinov3_nb.core import ModelArguments, TuneArguments
from dinov3_nb.inference import Classifier
from dinov3_nb.lora import add_adapters, has_adapters
from dinov3_nb.model import build_classifier
from dinov3_nb.onnx_export import logit_difference, score_int8, write_int8, write_onnx
from dinov3_nb.onnx_inference import load_onnx
from dinov3_nb.quantization import quantized_layers

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
NAMES = ["circle", "square", "stripes"]


def pictures(side=64, count=5):
    "Fields of colour, one of them black all over, as the backbone sees them."
    values = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    values[0] = 0
    return (torch.nn.functional.interpolate(values, (side, side), mode="bilinear") - 0.5) / 0.25


def rough(model):
    "The same model with a head, and adapters, that say something."
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("head") or "lora_B" in name: p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    from transformers import DINOv3ViTImageProcessor
    folder = tmp_path_factory.mktemp(request.param) / "backbone"
    folder.mkdir()
    torch.manual_seed(0)
    FAMILIES[request.param](folder)
    if "timm" not in request.param: DINOv3ViTImageProcessor().save_pretrained(folder)
    return str(folder)


def build(family, bits="float32", lora=False, **kind):
    torch.manual_seed(0)
    model = build_classifier(ModelArguments(family, image_size=64, **kind), NAMES, BITS[bits])
    if lora: add_adapters(model, TuneArguments(tune="lora", lora_rank=4))
    return Classifier(rough(model), load_processor(family, image_size=64), NAMES, {"mixed_precision": "no"})


def check(classifier, folder):
    "The file agrees with what the classifier computed before it was made plain, and the classifier stays what it was."
    pixels, adapted, levels = pictures(), has_adapters(classifier.model), quantized_layers(classifier.model)
    with torch.no_grad(): wanted = classifier.model(pixels).logits
    written = write_onnx(classifier, folder / "model.onnx", pixels)
    assert written.difference < 1e-5 and written.num_bytes == written.path.stat().st_size
    portable = load_onnx(folder)
    found = [portable.logits(pixels[:n]) for n in (1, 3, 5)]
    scale = max(1, wanted.abs().max().item())
    assert wanted.std() > 0.01 and all((f - wanted[:len(f)]).abs().max() < 1e-5 * scale for f in found)
    assert torch.equal(found[-1].argmax(1), wanted.argmax(1)) and portable.class_names == NAMES
    assert portable.processor.to_dict() == classifier.processor.to_dict()
    picture = np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8)  # timm's twins cut its sides off
    ours, theirs = (dict(c.predict(picture)[0].labels) for c in (portable, classifier))
    assert all(abs(ours[name] - theirs[name]) < 1e-5 for name in NAMES)
    assert has_adapters(classifier.model) == adapted and quantized_layers(classifier.model) == levels
    assert [p.name for p in folder.iterdir()] == ["model.onnx"]


def test_linear_head_and_int8(family, tmp_path):
    classifier, pixels = build(family, pool="cls_mean"), pictures()
    check(classifier, tmp_path)
    small = write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    kinds = [node.op_type for node in onnx.load(small).graph.node]
    assert "ConvInteger" not in kinds and kinds.count("MatMulInteger") > 4
    assert 1e-6 < logit_difference(classifier.model, small, pixels) < 0.5
    assert small.stat().st_size < 0.7 * (tmp_path / "model.onnx").stat().st_size
    assert load_onnx(small).processor.to_dict() == classifier.processor.to_dict()
    labels = load_onnx(tmp_path).logits(pixels).argmax(1)
    labels[0] = -1
    batches = [{"pixel_values": pixels[:3], "labels": labels[:3]}, {"pixel_values": pixels[3:], "labels": labels[3:]}]
    score = score_int8(tmp_path / "model.onnx", small, batches)
    assert (score.images, score.before) == (4, 1.0) and score.after == score.agreement and score.size_ratio < 0.7
    with pytest.raises(UserError, match="labelled images: there are none"):
        score_int8(tmp_path / "model.onnx", small, [{"pixel_values": pixels, "labels": labels * 0 - 1}])


def test_4_bits(family, tmp_path): check(build(family, bits="4bit"), tmp_path)


def test_mlp_head_and_adapters(family, tmp_path):
    pytest.importorskip("peft")
    bits = "4bit" if family.endswith("vit/backbone") else "float32"
    check(build(family, bits, lora=True, head="mlp", pool="mean"), tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    train(dataset="digits", model_name="tiny", epochs=2, learning_rate=5e-3, batch_size=32, mixed_precision="no",
          no_tracking=True, checkpoint_dir=place / "run", log=lambda line: None)
    classifier = load_classifier(place / "run", "cpu")
    written = write_onnx(classifier, place / "model.onnx", pictures(32))
    return classifier, written.path


@pytest.fixture(scope="module")
def program(trained): return onnx_export._trace(trained[0].model, pictures(32), None)


@pytest.fixture
def traced(program, monkeypatch):
    "The graph of the trained classifier, which need not be traced again."
    monkeypatch.setattr(onnx_export, "_trace", lambda *_: program)
    return program


@pytest.fixture
def odd(tmp_path):
    "Pictures as cameras, scanners and designers make them."
    folder = tmp_path / "odd"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    image, turned = Image.fromarray(values), Image.Exif()
    turned[0x0112] = 6
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "transparent.png")
    image.convert("P").save(folder / "palette.gif")
    image.save(folder / "turned.jpg", exif=turned)
    image.resize((900, 400)).save(folder / "large.jpg")
    Image.new("RGB", (1, 300), "red").save(folder / "thin.png")
    Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(folder / "wide.png")
    return folder


def table(model, images): return [dict(answer.labels) for answer in model.predict(images, top_k=10)]


@pytest.mark.parametrize("preprocess", ["processor", "fast"])
def test_the_same_answers(trained, traced, odd, tmp_path, preprocess):
    classifier = replace(trained[0], config={**trained[0].config, "preprocess": preprocess})
    if preprocess == "fast": write_onnx(classifier, tmp_path / "model.onnx", pictures(32))
    portable = load_onnx(trained[1] if preprocess == "processor" else tmp_path)
    assert portable.preprocess == preprocess
    ours, theirs = table(portable, odd), table(classifier, odd)
    assert len(ours) == 7
    assert all(abs(o[name] - t[name]) < 1e-5 for o, t in zip(ours, theirs) for name in t)


def test_streams_batches_and_orders(trained, odd):
    portable = load_onnx(trained[1])
    alone = table(portable, odd)
    answers = list(portable.stream(odd, top_k=10, batch_size=3, num_workers=0))
    assert [a.path for a in answers] == [str(p) for p in sorted(odd.iterdir())]
    assert all(abs(dict(a.labels)[name] - p) < 1e-6 for a, own in zip(answers, alone) for name, p in own.items())
    assert {a.familiar for a in answers} == {None} and len(portable.predict(odd / "grey.png", top_k=3)[0].labels) == 3
    for options in ({"top_k": 0}, {"batch_size": 0}, {"on_bad_image": "maybe"}):
        with pytest.raises(UserError): portable.predict(odd, **options)


def test_a_temperature_is_in_the_logits_and_an_old_opset_will_do(trained, tmp_path):
    plain = trained[0]
    bank = torch.nn.functional.normalize(torch.randn(8, 128), dim=1).half()
    warm = replace(plain, calibration=Calibration(2.0, bank, 1.0, 3, head_digest(plain.model)))
    pixels = pictures(32)
    assert write_onnx(warm, tmp_path / "model.onnx", pixels, opset=18).opset == 18
    portable = load_onnx(tmp_path)
    assert portable.temperature == 2.0
    assert (portable.logits(pixels) * 2 - load_onnx(trained[1]).logits(pixels)).abs().max() < 1e-5


def test_a_damaged_export_leaves_nothing(trained, traced, tmp_path, monkeypatch):
    "A graph that computes something else, one with numbers that are none, and a disk that is full."
    (tmp_path / "model.onnx").write_bytes(b"the file of yesterday")
    wrong = build_classifier(ModelArguments("tiny"), trained[0].class_names)
    nowhere = build_classifier(ModelArguments("tiny"), trained[0].class_names)
    with torch.no_grad(): nowhere.head.bias[0] = torch.nan
    for model, said in ((rough(wrong), r"differ from PyTorch's by \d"), (nowhere, "by nan, more than 1e-04")):
        with pytest.raises(UserError, match=said):
            write_onnx(replace(trained[0], model=model), tmp_path / "model.onnx", pictures(32))
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(traced, "save", full)
    with pytest.raises(UserError, match="could not be written .*No space left"):
        write_onnx(trained[0], tmp_path / "model.onnx", pictures(32))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"the file of yesterday"


def test_weights_beside_the_graph(trained, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MOST_BYTES", 100_000)
    written = write_onnx(trained[0], tmp_path / "model.onnx", pictures(32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert written.num_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(onnx_export, "_MOST_BYTES", 1_000_000)
    write_int8(written.path, tmp_path / "small/model.onnx")
    assert [p.name for p in (tmp_path / "small").iterdir()] == ["model.onnx"]
    monkeypatch.setattr(onnx_export, "_MOST_BYTES", 100_000)
    write_int8(written.path, tmp_path / "small/model.onnx")
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["model.onnx", "model.onnx.data"]
    whole = load_onnx(trained[1]).logits(pictures(32))
    assert (load_onnx(tmp_path).logits(pictures(32)) - whole).abs().max() < 1e-6
    assert (load_onnx(tmp_path / "small").logits(pictures(32)) - whole).abs().max() < 1
    monkeypatch.setattr(onnx_export, "_MOST_BYTES", 10**9)
    write_onnx(trained[0], tmp_path / "model.onnx", pictures(32))
    assert not (tmp_path / "model.onnx.data").exists()  # of the older file
    (tmp_path / "small/model.onnx.data").unlink()
    with pytest.raises(UserError, match="model.onnx.data, which is not beside it: copy both"): load_onnx(tmp_path / "small")


def test_other_opsets(trained, tmp_path):
    for opset in (7, 99, "20"):
        with pytest.raises(UserError, match="at least 18 and at most 25"):
            write_onnx(trained[0], tmp_path / "other.onnx", pictures(32), opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(trained, tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=rf"the package {package}, which is not installed: run `pip install 'dinov3_nb\[onnx\]'`"):
        write_onnx(trained[0], tmp_path / "model.onnx", pictures(32))
    if package == "onnxruntime":
        with pytest.raises(UserError, match="Running an ONNX file needs the package onnxruntime"): load_onnx(trained[1])
    else: load_onnx(trained[1])  # these two are needed for writing only
    assert not list(tmp_path.iterdir())


def test_nothing_private_and_nothing_printed(trained, tmp_path, capfd):
    config = {**trained[0].config, "model_name": str(tmp_path / "secret-place" / "mine")}
    write_onnx(replace(trained[0], config=config), tmp_path / "model.onnx", pictures(32))
    write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert capfd.readouterr() == ("", "")
    for name in ("model.onnx", "int8.onnx"):
        content = (tmp_path / name).read_bytes()
        assert not any(word in content for word in (b"secret-place", b"site-packages", b"stack_trace", str(tmp_path).encode()))
        told = {p.key: p.value for p in onnx.load(tmp_path / name).metadata_props}
        assert told["model_name"] == "mine" and json.loads(told["class_names"]) == trained[0].class_names
        assert set(told) >= {"class_names", "preprocessing", "preprocess", "temperature", "model_name", "dinov3_nb"}


def test_files_of_others(trained, tmp_path):
    path, whole = tmp_path / "model.onnx", onnx.load(trained[1])
    def refused(said, model=None):
        if model is not None: onnx.save(model, path)
        with pytest.raises(UserError, match=said): load_onnx(path)
    def changed(**notes):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        told = {p.key: p.value for p in whole.metadata_props} | notes
        onnx.helper.set_model_props(model, {key: value for key, value in told.items() if value is not None})
        return model
    refused("There is no ONNX file")
    for content in (b"", b"no graph at all", trained[1].read_bytes()[:5000]):
        path.write_bytes(content)
        refused("onnxruntime cannot run .*take another copy")
    refused("does not say its class_names, preprocessing: only files from", changed(class_names=None, preprocessing=None))
    refused("damaged", changed(class_names="[circle"))
    refused("damaged", changed(preprocessing="[1]"))
    refused("damaged", changed(temperature="warm"))
    refused("names 1 classes and has 10 logits", changed(class_names='["one"]'))
    renamed = changed()
    renamed.graph.output[0].name = "scores"
    for node in renamed.graph.node: node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    refused("takes pixel_values and gives scores, where pixel_values and logits", renamed)
    path.unlink()
    with pytest.raises(UserError, match="There is no ONNX file .*model.onnx"): load_onnx(tmp_path)


WITHOUT = """
import json, sys
import _dinov3_nb_command
from dinov3_nb.onnx_inference import load_onnx
answers = load_onnx(sys.argv[1]).predict(sys.argv[2])
print(json.dumps([[answer.labels[0] for answer in answers], sorted(sys.modules)]))
"""


def test_no_model_of_pytorch_is_imported(trained, odd):
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(trained[1]), str(odd)], capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    answers, loaded = json.loads(done.stdout)
    assert len(answers) == 7 and "onnxruntime" in loaded
    unwanted = {"dinov3_nb.model", "dinov3_nb.backbone", "dinov3_nb.inference", "dinov3_nb.lora", "onnx", "onnxscript", "timm", "peft",
                "datasets", "sklearn", "bitsandbytes", "transformers.models.dinov3_vit.modeling_dinov3_vit"}
    assert not unwanted & set(loaded), unwanted & set(loaded)
