"The report from end to end: hostile names on the page, every family and rung, where things go, and what `predict` takes along."
import importlib
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, make_image_folder, save_convnext, save_timm
from PIL import Image
from transformers import pipeline

from dinov3_nb import UserError, evaluate, load_classifier, train
from dinov3_nb.calibration import calibration_file, load_calibration
from dinov3_nb.cli import main
from dinov3_nb.gather import gather
from dinov3_nb.report import report

QUICK = dict(model_name="tiny", epochs=2, learning_rate=5e-3, mixed_precision="no", no_tracking=True, log=lambda line: None)
HOSTILE = ["<script>alert(1)</script>", "a'b\"c", "x" * 120, "\u202eevil \u05d0\u05d1", "{{ 7*7 }} ${1+1} &lt;"]
IDS = ["merit", "mistakes", "doubtful", "duplicates", "sure", "familiar", "map", "looks"]


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    before = os.environ.get("DINOV3_NB_CACHE")
    os.environ["DINOV3_NB_CACHE"] = str(tmp_path_factory.mktemp("kept"))
    yield
    if before is None: del os.environ["DINOV3_NB_CACHE"]
    else: os.environ["DINOV3_NB_CACHE"] = before


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    "A run on the digits with its report, and the lines that were logged."
    folder, lines = tmp_path_factory.mktemp("digits") / "run", []
    train(dataset="digits", checkpoint_dir=folder, **QUICK | {"learning_rate": 5e-4})
    made = report(folder, log=lines.append)
    return made, lines


def sections(page):
    "What stands in each section of a page, as text."
    class Reader(HTMLParser):
        def __init__(self): super().__init__(); self.found, self.inside, self.tags = {}, None, []
        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            if tag == "section": self.inside = dict(attributes).get("id")
        def handle_endtag(self, tag):
            if tag == "section": self.inside = None
        def handle_data(self, text):
            if self.inside: self.found[self.inside] = self.found.get(self.inside, "") + text
    reader = Reader()
    reader.feed(Path(page).read_text("utf-8"))
    return reader.found, reader.tags


def test_the_figures_are_those_of_evaluate(digits):
    made, lines = digits
    scores = evaluate(made.page.parent).scores
    assert made.findings.scores.loss == pytest.approx(scores.loss, abs=1e-5) and made.findings.merit.accuracy == pytest.approx(scores.accuracy)
    assert f"{scores.accuracy:.2%}" in lines[2] and "report.html" in lines[-2] and "best.calibration" in lines[-1]
    found, _ = sections(made.page)
    assert list(found) == IDS and all(len(text.split()) > 15 for text in found.values())


def test_predict_takes_the_report_along(digits, tmp_path):
    made, _ = digits
    classifier = load_classifier(made.page.parent)
    temperature = classifier.calibration.temperature
    assert temperature == made.findings.trust.temperature.value != 1  # a short run at a low rate is not sure enough
    plain = gather(made.page.parent).scored
    pictures = [plain.open(i) for i in range(20)]
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)) for i in range(20)]
    answers = classifier.predict(pictures + noise, top_k=1)
    wanted = (plain.logits[:20] / temperature).softmax(1).max(1).values
    assert [a.labels[0][1] for a in answers[:20]] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert sum(a.familiar for a in answers[:20]) >= 16 and sum(a.familiar for a in answers[20:]) <= 4
    shutil.copy(made.page.parent / "best.pt", tmp_path)
    without = load_classifier(tmp_path / "best.pt").predict(pictures[:1])[0]
    assert without.familiar is None and without.labels[0][1] == pytest.approx(plain.logits[0].softmax(0).max().item(), abs=1e-5)


def test_the_command_line_says_what_is_unfamiliar(digits, tmp_path, capsys):
    made, _ = digits
    gather(made.page.parent).scored.open(0).save(tmp_path / "0.png")
    assert main(["predict", "--checkpoint", str(made.page.parent), "--json", str(tmp_path / "0.png")]) == 0
    assert json.loads(capsys.readouterr().out)["familiar"] is True
    assert main(["predict", "--checkpoint", str(made.page.parent), "--top_k", "2", str(tmp_path / "0.png")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert " familiar " in first and "familiar" not in second and first.index("%") == second.index("%")
    assert main(["predict", "--checkpoint", str(made.page.parent / "last.pt"), "--json", str(tmp_path / "0.png")]) == 0
    assert "familiar" not in json.loads(capsys.readouterr().out)


def test_an_exported_folder_answers_as_the_run_does(digits, tmp_path):
    made, _ = digits
    classifier = load_classifier(made.page.parent)
    classifier.save_pretrained(tmp_path / "exported")
    exported = load_classifier(tmp_path / "exported")
    picture = gather(made.page.parent).scored.open(3)
    ours, theirs = classifier.predict(picture)[0], exported.predict(picture)[0]
    assert theirs.familiar is ours.familiar is not None
    assert dict(theirs.labels) == pytest.approx(dict(ours.labels), abs=1e-6)
    asked = pipeline("image-classification", model=str(tmp_path / "exported"), device="cpu")(picture, top_k=5)
    assert {a["label"]: a["score"] for a in asked} == pytest.approx(dict(ours.labels), abs=1e-6)


def test_a_calibration_belongs_to_one_head(digits, tmp_path):
    made, _ = digits
    shutil.copytree(made.page.parent, tmp_path / "run")
    shutil.copy(tmp_path / "run/best.calibration.safetensors", tmp_path / "run/last.calibration.safetensors")
    train(dataset="digits", checkpoint_dir=tmp_path / "other", **QUICK)
    shutil.copy(tmp_path / "run/best.calibration.safetensors", tmp_path / "other")
    assert load_classifier(tmp_path / "other").calibration is None
    train(dataset="digits", checkpoint_dir=tmp_path / "run", overwrite=True, **QUICK)  # a new run leaves nothing of the old one
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best.pt", "last.pt"]


def test_a_damaged_calibration_gets_a_sentence(digits, tmp_path, capsys):
    made, _ = digits
    shutil.copytree(made.page.parent, tmp_path / "run")
    file = calibration_file(tmp_path / "run")
    file.write_bytes(file.read_bytes()[:-20])
    gather(made.page.parent).scored.open(0).save(tmp_path / "0.png")
    assert main(["predict", "--checkpoint", str(tmp_path / "run"), str(tmp_path / "0.png")]) == 2
    assert "dinov3-nb report" in capsys.readouterr().err
    assert main(["report", "--checkpoint", str(tmp_path / "run")]) == 0  # the remedy works
    assert load_classifier(tmp_path / "run").calibration is not None


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    "A run on folders and files with names that nobody expects, and its page."
    root = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    for kind, name in enumerate(HOSTILE):
        for split, count in (("train", 8), ("val", 4)):
            folder = root / "images" / split / name.replace("/", "\u2215")
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (20, 20, 3)) + 40 * kind
                pixels[:, :4 * kind + 2] += 30
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"<img src=x onerror=alert({i})>'\".png")
    done = command("train", "--dataset", "images", "--model_name", "tiny", "--epochs", 2, "--learning_rate", "5e-3", "--report",
                   "--no_tracking", "--mixed_precision", "no", cwd=root, DINOV3_NB_CACHE=str(root / "kept"))
    assert done.returncode == 0, done.stderr
    return root


def test_hostile_names_do_no_harm(hostile, browser):
    page = hostile / "checkpoints_dinov3" / "report.html"
    _, tags = sections(page)
    assert tags.count("script") == 2 and "onerror" not in [tag for tag in tags]
    opened, said, asked = browser.new_page(viewport={"width": 390, "height": 800}), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append("a dialog"))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(f"file://{page}")
    opened.wait_for_timeout(300)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    cell = opened.query_selector("table.confusion button")
    cell.click()
    opened.wait_for_timeout(200)
    assert opened.query_selector_all("#cell img") and said == [] and [url for url in asked if not url.startswith("data:")] == [f"file://{page}"]
    text = opened.inner_text("body")
    assert "<script>alert(1)<" in text.replace("\u2215", "/") and "{{ 7*7 }}" in text
    opened.close()


def test_doubtful_labels_can_be_corrected_and_fed_back(hostile, tmp_path, capsys):
    table = tmp_path / "labels.csv"
    assert main(["report", "--checkpoint", str(hostile / "checkpoints_dinov3"), "--doubtful", str(table), "--out", str(tmp_path)]) == 0
    assert f"{table}: 60 labels" in capsys.readouterr().out and (tmp_path / "report.html").is_file()
    train(dataset=table, checkpoint_dir=tmp_path / "again", **QUICK)
    again = load_classifier(tmp_path / "again")
    assert sorted(again.class_names) == sorted(load_classifier(hostile / "checkpoints_dinov3").class_names)
    assert len(again.trained_on) + len(again.held_out["rows"]) == 60  # a table is one split


FAMILIES = {"convnext": save_convnext, "timm": save_timm}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory): return make_image_folder(tmp_path_factory.mktemp("shapes"), per_class=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_page(family, shapes, tmp_path):
    if family == "timm": pytest.importorskip("timm")
    FAMILIES[family](tmp_path / "backbone")
    train(dataset=shapes, checkpoint_dir=tmp_path / "run", image_size=64, num_workers=0, **QUICK | {"model_name": str(tmp_path / "backbone")})
    found, _ = sections(report(tmp_path / "run", log=lambda line: None).page)
    assert list(found) == IDS
    assert ("no picture of attention" in found["looks"]) is (family == "convnext")


@pytest.mark.parametrize("changes", [dict(tune="last"), dict(tune="lora"), dict(tune="all"), dict(use_4bit=True, bnb_4bit_compute_dtype="float32"),
                                     dict(head="mlp", pool="cls_mean"), dict(pool="mean"), dict(cache_features="never")], ids=str)
def test_every_kind_of_run_has_a_page(changes, shapes, tmp_path):
    if changes.get("tune") == "lora": pytest.importorskip("peft")
    train(dataset=shapes, checkpoint_dir=tmp_path / "run", num_workers=0, **QUICK | changes)
    lines = []
    made = report(tmp_path / "run", log=lines.append)
    found, _ = sections(made.page)
    assert list(found) == IDS and made.findings.merit.accuracy == pytest.approx(evaluate(tmp_path / "run").scores.accuracy)
    assert ("cannot be split up" in found["looks"]) is (changes.get("pool") != "mean")
    assert load_calibration(calibration_file(tmp_path / "run"), load_classifier(tmp_path / "run").model) is not None


def test_other_images_leave_the_calibration_alone(digits, tmp_path):
    made, _ = digits
    shutil.copytree(made.page.parent, tmp_path / "run")
    before = calibration_file(tmp_path / "run").read_bytes()
    other = report(tmp_path / "run", split="train", log=lambda line: None)
    assert other.page.name == "report-train.html" and calibration_file(tmp_path / "run").read_bytes() == before
    assert len(other.findings.every) == 1437  # each picture once
    assert other.findings.mistakes and all(mistake.row not in mistake.neighbours for mistake in other.findings.mistakes)


def test_a_classifier_that_does_not_say_what_it_was_trained_on(digits, tmp_path):
    made, _ = digits
    load_classifier(made.page.parent).save_pretrained(tmp_path / "exported")
    lines = []
    alone = report(tmp_path / "exported", dataset="digits", split="validation", log=lines.append)
    assert alone.findings.calibration is None and any("does not say which images it was trained on" in line for line in lines)
    found, _ = sections(alone.page)
    assert list(found) == IDS and "not known" in found["familiar"]


def test_leaks_into_validation_and_test_are_seen(tmp_path):
    root = make_image_folder(tmp_path / "images", per_class=8)
    (root / "test/circle").mkdir(parents=True)
    shutil.copy(root / "train/circle/0.png", root / "val/circle/copy.png")
    shutil.copy(root / "train/circle/1.png", root / "test/circle/leak.png")
    shutil.copy(root / "val/circle/1.png", root / "test/circle/other.png")
    train(dataset=root, checkpoint_dir=tmp_path / "run", num_workers=0, **QUICK)
    for split, file, copy, images in ((None, "train/circle/0.png", "val/circle/copy.png", 24 + 25), ("test", "train/circle/1.png", "test/circle/leak.png", 24 + 2)):
        found = report(tmp_path / "run", split=split, log=lambda line: None).findings
        leaks = [{found.every.name(row) for row in group.rows} for group in found.copies.groups if group.leak]
        assert {str(root / file), str(root / copy)} in leaks and len(found.every) == images
        assert len(found.compared) == 24 and {part.split for part in found.compared.parts} == {"train"}


def test_training_images_that_have_gone_are_counted(tmp_path):
    root = make_image_folder(tmp_path / "images", per_class=8)
    train(dataset=root, checkpoint_dir=tmp_path / "run", num_workers=0, **QUICK)
    for i in range(3): (root / f"train/circle/{i}.png").unlink()
    lines = []
    made = report(tmp_path / "run", log=lines.append)
    assert "3 of the run's 24 training images are gone or have changed: nothing is compared with those." in lines
    os.rename(root, tmp_path / "moved")
    moved = report(tmp_path / "run", dataset=tmp_path / "moved", log=lines.append)
    assert len(moved.findings.compared) == 21 and not moved.findings.remembered
    assert made.page.name == "report.html" and moved.page.name == "report-moved.html"


def test_your_own_table_is_not_replaced(hostile, tmp_path, capsys):
    table = tmp_path / "labels.csv"
    assert main(["report", "--checkpoint", str(hostile / "checkpoints_dinov3"), "--doubtful", str(table), "--out", str(tmp_path)]) == 0
    train(dataset=table, checkpoint_dir=tmp_path / "again", **QUICK)
    before = table.read_bytes()
    capsys.readouterr()
    assert main(["report", "--checkpoint", str(tmp_path / "again"), "--doubtful", str(table)]) == 2
    assert "name another file" in capsys.readouterr().err and table.read_bytes() == before


def test_a_single_validation_image(tmp_path):
    root = make_image_folder(tmp_path / "images", per_class=8, classes=("circle", "square"))
    for file in sorted((root / "val").rglob("*.png"))[1:]: file.unlink()
    train(dataset=root, checkpoint_dir=tmp_path / "run", num_workers=0, **QUICK)
    found, _ = sections(report(tmp_path / "run", log=lambda line: None).page)
    assert "too few images" in found["sure"]


def test_a_sample_of_the_validation_images_decides_nothing(digits, tmp_path):
    made, _ = digits
    shutil.copytree(made.page.parent, tmp_path / "run")
    before = [path.read_bytes() for path in (tmp_path / "run/report.html", calibration_file(tmp_path / "run"))]
    some = report(tmp_path / "run", val_split_ratio=0.1, log=lambda line: None)
    assert some.page.name == "report-digits.html" and "from now on" not in some.page.read_text("utf-8")
    assert before == [path.read_bytes() for path in (tmp_path / "run/report.html", calibration_file(tmp_path / "run"))]


def test_a_folder_that_cannot_be_written_to(digits, tmp_path, monkeypatch):
    made, _ = digits
    shutil.copytree(made.page.parent, tmp_path / "run")
    module = importlib.import_module("dinov3_nb.report")  # the package's `report` is the function
    monkeypatch.setattr(module.os, "access", lambda path, mode: Path(path) != tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written to: name another place"): report(tmp_path / "run")
    def refuse(*given): raise UserError("no space")
    monkeypatch.setattr(module, "save_calibration", refuse)
    lines = []
    assert report(tmp_path / "run", out=tmp_path / "page.html", log=lines.append).page.is_file()
    assert lines[-1] == "predict takes nothing along from this: no space"


def test_pictures_that_have_gone_are_frames(tmp_path):
    root = make_image_folder(tmp_path / "images", per_class=6)
    train(dataset=root, checkpoint_dir=tmp_path / "run", num_workers=0, **QUICK)
    found = gather(tmp_path / "run")
    for file in list((root / "train").rglob("*.png"))[:3]: os.replace(file, file.with_suffix(".gone"))
    from dinov3_nb.assemble import assemble
    from dinov3_nb.findings import examine
    from dinov3_nb.page import render_page
    assert len(render_page(assemble(examine(found), "gone"))) > 10_000


def test_a_bad_picture_is_left_out_as_in_the_run(tmp_path):
    root = make_image_folder(tmp_path / "images", per_class=6)
    for split in ("train", "val"): (root / split / "circle/bad.png").write_bytes(b"no picture")
    train(dataset=root, checkpoint_dir=tmp_path / "run", num_workers=0, on_bad_image="skip", **QUICK)
    found = report(tmp_path / "run", log=lambda line: None).findings  # the run skipped them, so nobody has to say it again
    assert (found.merit.total, len(found.every), len(found.scores.unread)) == (18, 36, 1)


WRONG = {
    "--out": (["--out", "nowhere/report.html"], "there is no folder nowhere"),
    "--doubtful": (["--doubtful", "nowhere/labels.csv"], "there is no folder nowhere"),
    "--out, a checkpoint": (["--out", "best.pt"], "--out 'best.pt' is no name of a file for it: let it end in .html"),
    "--out, nothing": (["--out", ""], "--out ''"),
    "--doubtful, a page": (["--doubtful", "x.html"], "let it end in .csv"),
    "--doubtful, a folder": (["--doubtful", "."], "--doubtful '.'"),
    "--batch_size": (["--batch_size", "0"], "--batch_size 0"),
    "--split": (["--split", "tset"], "--split 'tset' is not there"),
    "--checkpoint": (["--checkpoint", "nothing"], "nothing"),
    "--dataset": (["--dataset", "nothing"], "nothing"),
    "a flag": (["--oot", "x"], "did you mean --out?"),
}


@pytest.mark.parametrize("words, said", WRONG.values(), ids=WRONG)
def test_wrong_input_gets_one_sentence(words, said, digits, tmp_path, monkeypatch, capsys):
    made, _ = digits
    monkeypatch.chdir(tmp_path)
    given = [] if "--checkpoint" in words else ["--checkpoint", str(made.page.parent)]
    assert main(["report", *given, *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors and len(errors.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_classifier_in_memory_needs_a_place_for_its_page(digits, tmp_path):
    made, _ = digits
    classifier = load_classifier(made.page.parent)
    with pytest.raises(UserError, match="give --out"): report(classifier)
    assert report(classifier, out=tmp_path, log=lambda line: None).page == tmp_path / "report.html"


def test_evaluate_writes_one_as_well_and_its_json_stays_json(digits, tmp_path, capsys):
    made, _ = digits
    shutil.copytree(made.page.parent, tmp_path / "run")
    (tmp_path / "run/report.html").unlink()
    assert main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--json", "--report"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 360 and (tmp_path / "run/report.html").is_file()


def test_only_one_of_several_processes_writes(digits, tmp_path, monkeypatch):
    made, _ = digits
    shutil.copytree(made.page.parent, tmp_path / "run")
    (tmp_path / "run/report.html").unlink()
    monkeypatch.setenv("RANK", "1")
    assert report(tmp_path / "run") is None and not (tmp_path / "run/report.html").exists()


def test_a_perfect_classifier_and_a_class_without_images(tmp_path):
    root = make_image_folder(tmp_path / "images", per_class=8)
    shutil.rmtree(root / "val/square")
    for seed in range(8):  # as different from each other as can be
        for name, shade in (("circle", 0), ("stripes", 255)):
            Image.new("RGB", (20, 20), (shade, 10 * seed, 128)).save(root / "train" / name / f"{seed}.png")
            if seed < 4: Image.new("RGB", (20, 20), (shade, 10 * seed + 5, 128)).save(root / "val" / name / f"{seed}.png")
            else: (root / "val" / name / f"{seed}.png").unlink()
    train(dataset=root, checkpoint_dir=tmp_path / "run", num_workers=0, **QUICK | {"epochs": 6, "learning_rate": 0.02})
    made = report(tmp_path / "run", log=lambda line: None)
    assert made.findings.merit.right == made.findings.merit.total == 8
    found, _ = sections(made.page)
    assert "There is no mistake" in found["mistakes"]
