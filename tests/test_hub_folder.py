"Folders that others load: every family with every kind of head, whole, as a head alone, and where dinov3_nb cannot be imported."
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import forks
import numpy as np
import pytest
import torch
from forks import ENVIRONMENT
from helpers import make_image_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hub import COMMIT, SERVED, Hub
from test_lora import BITS, FAMILIES, NAMES, build, close, save_twin, tune
from transformers import AutoImageProcessor, AutoModelForImageClassification, DINOv3ViTImageProcessor, pipeline

from dinov3_nb import load_classifier, train
from dinov3_nb.backbone import load_backbone, load_processor
from dinov3_nb.calibration import Calibration, calibration_file, head_digest
from dinov3_nb.core import ModelArguments, UserError
from dinov3_nb.hub_folder import standalone_source, write_hub_folder
from dinov3_nb.inference import Classifier
from dinov3_nb.model import build_classifier
from dinov3_nb.quantization import quantized_layers
from dinov3_nb.weights import TINY_FOLDER, weights_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*Palette images with Transparency")
BACKBONES = {**FAMILIES, "timm-qkvb": lambda folder: save_twin("vit_small_patch16_dinov3_qkvb", folder, depth=2, embed_dim=64, num_heads=2)}
KINDS = {  # head, pool, bits, adapters
    "linear": ("linear", "cls", None, False), "mlp": ("mlp", "mean", None, False), "cls_mean": ("mlp", "cls_mean", None, False),
    "4bit": ("linear", "cls_mean", BITS["4bit"], False), "lora": ("linear", "cls", None, True), "qlora": ("mlp", "cls", BITS["4bit"], True),
}
ALL = [f"{family} {kind}" for family in FAMILIES for kind in KINDS] + ["timm-qkvb linear", "timm-qkvb 4bit"]
PICTURES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model): return model.eval()(PICTURES).logits


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    "A folder of random weights for each family."
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("backbones")
    for name, save in BACKBONES.items():
        (root / name).mkdir()
        torch.manual_seed(0)
        save(root / name)
        if "timm" not in name: DINOv3ViTImageProcessor().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def classifiers(backbones):
    "One of each, as a checkpoint would give it, by name."
    found = {}
    for name in ALL:
        family, (head, pool, bits, adapters) = name.split()[0], KINDS[name.split()[1]]
        folder = str(backbones / family)
        torch.manual_seed(0)
        if adapters:
            model = build(folder, bits, head)
            tune(model, PICTURES.repeat(2, 1, 1, 1), steps=2)
        else:
            model = build_classifier(ModelArguments(folder, image_size=64, head=head, pool=pool), NAMES, bits)
            for p in model.head.parameters(): torch.nn.init.normal_(p, std=0.1)
        told = {"tune": "lora" if adapters else "head", "model_name": folder}
        found[name] = Classifier(model.eval(), load_processor(folder, image_size=64), NAMES, told)
    return found


def write(classifier, folder, **how):
    folder.mkdir(parents=True)
    write_hub_folder(classifier, folder, **how)
    return folder


@pytest.mark.parametrize("name", ALL)
def test_a_whole_folder_is_the_same_classifier(name, classifiers, tmp_path):
    classifier = classifiers[name]
    folder = write(classifier, tmp_path / "folder")
    again = load_classifier(folder, "cpu")
    assert close(logits(again.model), logits(classifier.model)) and again.class_names == NAMES
    assert bool(quantized_layers(again.model)) == (name.split()[1] == "4bit")  # in 4 bits still; merged ones are plain
    assert close(logits(AutoModelForImageClassification.from_pretrained(folder)), logits(classifier.model))


HEADS = [name for name in ALL if "lora" not in name]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_alone_is_the_same_classifier(name, classifiers, backbones, tmp_path, monkeypatch):
    monkeypatch.chdir(backbones)  # a whole folder keeps the last part of its backbone's path
    classifier = classifiers[name]
    folder = write(classifier, tmp_path / "folder", head_only=True)
    assert set(load_file(folder / "model.safetensors")) == {f"head.{key}" for key in classifier.model.head.state_dict()}
    assert (folder / "model.safetensors").stat().st_size < 200_000
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert told["head_only"] is True and len(told["backbone_fingerprint"]) == 16 and told["backbone_revision"] is None
    again = load_classifier(folder, "cpu")
    assert close(logits(again.model), logits(classifier.model)) and again.class_names == NAMES
    assert len(quantized_layers(again.model)) == len(quantized_layers(classifier.model))
    whole = load_classifier(write(again, tmp_path / "whole"), "cpu")  # and from there a whole one, which says nothing of a head alone
    assert close(logits(whole.model), logits(classifier.model))
    told = json.loads((tmp_path / "whole" / "config.json").read_text(encoding="utf-8"))
    assert "head_only" not in told and "backbone_fingerprint" not in told
    once_more = load_classifier(write(whole, tmp_path / "head", head_only=True), "cpu")
    assert close(logits(once_more.model), logits(classifier.model))


@pytest.mark.parametrize("name", ["vit lora", "convnext qlora"])
def test_a_backbone_that_has_learned_needs_its_folder(name, classifiers, backbones, tmp_path, monkeypatch):
    monkeypatch.chdir(backbones)
    with pytest.raises(UserError, match="has learned, so nobody else has it"): write(classifiers[name], tmp_path / "no", head_only=True)
    with pytest.raises(UserError, match="has learned"): write(classifiers[name].finished(), tmp_path / "no3", head_only=True)
    merged = load_classifier(write(classifiers[name], tmp_path / "whole"), "cpu")  # its run is not known any more
    with pytest.raises(UserError, match="are not those of .*: leave out --head_only"): write(merged, tmp_path / "no2", head_only=True)
    assert not list((tmp_path / "no").iterdir()) and not list((tmp_path / "no2").iterdir())


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, *given):
        if name.split(".")[0] == "dinov3_nb": raise ImportError(name)
sys.meta_path.insert(0, Refuse())
"""
ALONE = REFUSE + """
import json, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
root, pictures = Path(sys.argv[1]), load_file(sys.argv[1] + "/pictures.safetensors")["pictures"]
found, shares = {}, {}
for folder in sorted(path.parent for path in root.glob("*/config.json")):
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad(): found[folder.name] = model(pictures).logits
    assert type(model).__module__.endswith("modeling_dinov3_nb"), type(model)
for name in ("vit linear", "timm mlp"):
    processor = AutoImageProcessor.from_pretrained(root / name, trust_remote_code=True)
    classify = pipeline("image-classification", str(root / name), trust_remote_code=True, device="cpu")
    model = AutoModelForImageClassification.from_pretrained(root / name, trust_remote_code=True)
    for path in sorted((root / "pictures").iterdir()):
        with torch.no_grad(): by_hand = model(**processor(images=str(path), return_tensors="pt")).logits.softmax(1)[0].tolist()
        shares[f"{name} {path.name}"] = {a["label"]: a["score"] for a in classify(str(path))}, by_hand
save_file(found, root / "found.safetensors")
(root / "shares.json").write_text(json.dumps(shares))
assert "dinov3_nb" not in sys.modules
"""


def save_pictures(folder):
    "One file of each kind that is more than plain RGB."
    folder.mkdir()
    ramp = np.add.outer(np.arange(60), 2 * np.arange(80)).astype(np.uint8)
    photo = Image.fromarray(np.stack([ramp, ramp.T.reshape(60, 80), 255 - ramp], -1))
    photo.save(folder / "plain.png")
    photo.quantize(16).save(folder / "palette.png")
    photo.quantize(16).save(folder / "palette-transparent.png", transparency=3)
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("LAB").save(folder / "lab.tiff")
    cut_out = photo.copy()
    cut_out.putalpha(Image.fromarray(255 - ramp))
    cut_out.save(folder / "transparent.png")
    Image.merge("LA", cut_out.split()[2:]).save(folder / "grey-transparent.png")
    turned = Image.Exif()
    turned[274] = 6
    photo.save(folder / "turned.jpg", exif=turned)
    Image.fromarray(ramp.astype(np.uint16) * 13).save(folder / "wide.png")
    Image.fromarray(ramp.astype(np.float32) / 255).save(folder / "floats.tiff")
    return folder


@pytest.fixture(scope="module")
def alone(classifiers, tmp_path_factory):
    "Each as a self-contained folder, and what a process found there that cannot import dinov3_nb."
    root = tmp_path_factory.mktemp("alone")
    for name in ALL: write(classifiers[name], root / name, self_contained=True)
    save_file({"pictures": PICTURES}, root / "pictures.safetensors")
    save_pictures(root / "pictures")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", ALONE, str(root)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return root, load_file(root / "found.safetensors")


@pytest.mark.parametrize("name", ALL)
def test_without_this_package(name, classifiers, alone):
    assert close(alone[1][name], logits(classifiers[name].model))


def test_pictures_without_this_package(classifiers, alone):
    "The pipeline and the processor of the file see what `predict` sees."
    root, shares = alone[0], json.loads((alone[0] / "shares.json").read_text())
    assert len(shares) == 20
    for name in ("vit linear", "timm mlp"):
        classifier = load_classifier(root / name, "cpu")
        classifier.config["mixed_precision"] = "no"
        for path in (root / "pictures").iterdir():
            wanted = pytest.approx(dict(classifier.predict(path)[0].labels), abs=1e-5)
            by_pipeline, by_hand = shares[f"{name} {path.name}"]
            assert by_pipeline == wanted and dict(zip(NAMES, by_hand)) == wanted, path.name


def test_with_this_package_it_trusts_nobody(classifiers, alone, tmp_path, monkeypatch):
    "The very same folder, by our own classes; written again, it names no code that is not there."
    folder, wanted, questions = alone[0] / "vit mlp", logits(classifiers["vit mlp"].model), []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
    for trust in ({}, {"trust_remote_code": True}):
        model = AutoModelForImageClassification.from_pretrained(folder, **trust)
        processor = AutoImageProcessor.from_pretrained(folder, **trust)
        classify = pipeline("image-classification", str(folder), device="cpu", **trust)
        kinds = [type(thing).__module__ for thing in (model, model.config, processor, classify, classify.model)]
        assert kinds == ["dinov3_nb.model"] * 5 and close(logits(model), wanted) and not questions
    again = write(load_classifier(folder, "cpu"), tmp_path / "again")
    for name in ("config.json", "preprocessor_config.json"):
        told = json.loads((again / name).read_text(encoding="utf-8"))
        assert "auto_map" not in told and "custom_pipelines" not in told
    changed = shutil.copytree(folder, tmp_path / "changed") / "modeling_dinov3_nb.py"
    changed.write_text(changed.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="modeling_dinov3_nb.py is damaged, or was changed"): load_classifier(changed.parent)


def test_a_picture_in_base64_is_no_path_that_is_too_long(alone):
    content = io.BytesIO()
    Image.new("RGB", (40, 40)).save(content, "BMP")
    text = base64.b64encode(content.getvalue()).decode()
    assert "/" not in text[:1000]  # else a path of short names
    classify = pipeline("image-classification", str(alone[0] / "vit linear"), device="cpu")
    assert classify(text) == classify(Image.new("RGB", (40, 40)))


def test_the_file_that_travels():
    "Short, without notes of its notebook, and it imports only what it says."
    source = standalone_source()
    assert source.startswith("# From dinov3_nb, https://github.com/dinov3-nb/dinov3_nb; licence: Apache-2.0.\n")
    for note in ("AUTOGENERATED", "# %%", "__all__", ".ipynb", "import dinov3_nb", "from dinov3_nb", "from ."): assert note not in source, note
    packages = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert packages == {"base64", "io", "math", "os", "numpy", "torch", "PIL", "transformers"}
    assert sum(bool(line.strip()) for line in source.splitlines()) < 150


def test_two_sizes_at_once_and_other_refusals(classifiers, tmp_path):
    with pytest.raises(UserError, match="do not go together"): write(classifiers["vit linear"], tmp_path / "no", head_only=True, self_contained=True)
    model = build_classifier(ModelArguments("tiny", freeze_backbone=False), NAMES)
    tuned = Classifier(model.eval(), load_processor("tiny"), NAMES, {"tune": "all"})
    with pytest.raises(UserError, match="has learned"): write(tuned, tmp_path / "no2", head_only=True)
    assert close(logits(load_classifier(write(tuned, tmp_path / "whole"), "cpu").model), logits(model))


def test_a_backbone_that_has_moved_or_changed(classifiers, backbones, tmp_path):
    place = shutil.copytree(backbones / "vit", tmp_path / "backbone")
    model = build_classifier(ModelArguments(str(place), image_size=64), NAMES).eval()
    folder = write(Classifier(model, load_processor(str(place), image_size=64), NAMES, {"tune": "head"}), tmp_path / "folder", head_only=True)
    moved = tmp_path / "moved"
    place.rename(moved)
    with pytest.raises(UserError, match="was in .*backbone, which is not there any more: give --model_name"): load_classifier(folder)
    with pytest.raises(Exception, match="is not there any more: give --model_name"): pipeline("image-classification", str(folder))
    found = load_classifier(folder, "cpu", model_name=str(moved))
    assert close(logits(found.model), logits(model)) and found.model.config.model_name == str(moved)
    with pytest.raises(UserError, match="not the one that this head was trained on"): load_classifier(folder, model_name="tiny")
    other = load_backbone(str(moved))
    other.norm.weight.data += 1e-3
    other.save_pretrained(moved)
    with pytest.raises(UserError, match="its weights have changed"): load_classifier(folder, model_name=str(moved))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors is damaged"): load_classifier(folder, model_name=str(moved))


def test_what_a_report_has_left_comes_along(tmp_path):
    "The temperature is in the head, and what is familiar stands beside it, in both sizes."
    model = build_classifier(ModelArguments("tiny"), NAMES).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    bank = torch.nn.functional.normalize(torch.randn(30, 128), dim=1).half()
    calibration = Calibration(2.5, bank, 0.7, 10, head_digest(model))
    classifier = Classifier(model, load_processor("tiny"), NAMES, {"tune": "head", "mixed_precision": "no"}, calibration=calibration)
    picture = Image.linear_gradient("L").convert("RGB")
    wanted = classifier.predict(picture)[0]
    for how in ({}, {"head_only": True}, {"self_contained": True}):
        folder = write(classifier, tmp_path / str(how), **how)
        again = load_classifier(folder, "cpu")
        assert calibration_file(folder).is_file() and again.calibration.temperature == 1
        answer = again.predict(picture)[0]
        assert dict(answer.labels) == pytest.approx(dict(wanted.labels), abs=1e-6) and answer.familiar == wanted.familiar
        assert close(logits(again.model) * 2.5, logits(model))


def test_from_a_run_on_disk(tmp_path):
    images = make_image_folder(tmp_path / "images", per_class=4)
    train(dataset=str(images), model_name="tiny", epochs=1, no_tracking=True, head="mlp", mixed_precision="no",
          checkpoint_dir=str(tmp_path / "run"), log=lambda line: None)
    classifier = load_classifier(tmp_path / "run", "cpu")
    again = load_classifier(write(classifier, tmp_path / "folder", head_only=True), "cpu")
    assert close(logits(again.model), logits(classifier.model)) and again.class_names == classifier.class_names
    told = json.loads((tmp_path / "folder" / "config.json").read_text(encoding="utf-8"))
    assert told["model_name"] == "tiny" and told["backbone_fingerprint"] == weights_fingerprint(load_file(TINY_FOLDER / "model.safetensors").values())


RUN = """
import json, sys, torch
from pathlib import Path
import dinov3_nb
from dinov3_nb import load_classifier
from dinov3_nb.backbone import load_processor
from dinov3_nb.core import ModelArguments
from dinov3_nb.hub_folder import write_hub_folder
from dinov3_nb.inference import Classifier
from dinov3_nb.model import build_classifier
from transformers import AutoModelForImageClassification
name, pixels, folders = sys.argv[1], torch.randn(2, 3, 32, 32), [Path("head"), Path("whole"), Path("again")]
for folder in folders: folder.mkdir()
model = build_classifier(ModelArguments(name), ["a", "b"]).eval()
classifier = Classifier(model, load_processor(name), ["a", "b"], {"tune": "head"})
write_hub_folder(classifier, folders[0], head_only=True)
write_hub_folder(classifier, folders[1])
write_hub_folder(load_classifier(folders[1], "cpu"), folders[2], head_only=True)
with torch.no_grad():
    wanted = model(pixels).logits
    same = [torch.equal(AutoModelForImageClassification.from_pretrained(folder)(pixels).logits, wanted) for folder in [*folders, "someone/digits-head"]]
told = [json.loads((folder / "config.json").read_text())["backbone_revision"] for folder in folders]
print("ANSWERS" + json.dumps([same, told]))
"""


class HubWithHead(Hub):
    "The stand-in of test_hub, and a repository with what the run below has written."
    head, asked = None, []

    def do_GET(self):
        self.asked.append(self.path)
        name = self.path.split("?")[0].rpartition("/")[2]
        if "someone/digits-head" not in self.path: return super().do_GET()
        if "/api/models/" in self.path:
            files = [{"rfilename": file.name} for file in self.head.iterdir()]
            return self.answer(200, json.dumps({"id": "someone/digits-head", "sha": "2" * 40, "siblings": files}).encode())
        if not (self.head / name).is_file(): return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="2" * 40)
        body = (self.head / name).read_bytes()
        self.answer(200, body, X_Repo_Commit="2" * 40, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    do_HEAD = do_GET


def test_a_commit_of_the_hub_is_kept_and_asked_for(tmp_path):
    HubWithHead.head = tmp_path / "head"
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubWithHead)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clean = {k: v for k, v in ENVIRONMENT.items() if not k.lower().endswith("_proxy") and k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    told = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    try: run = forks.run([sys.executable, "-c", RUN, SERVED], tmp_path, {**clean, **told})
    finally: server.shutdown(); server.server_close()
    assert "ANSWERS" in run.stdout, run.stderr[-3000:]
    assert json.loads(run.stdout.split("ANSWERS")[1]) == [[True] * 4, [COMMIT] * 3]
    assert any(f"{SERVED}/resolve/{COMMIT}/" in path for path in HubWithHead.asked)
