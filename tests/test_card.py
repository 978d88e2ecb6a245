"A model card says what `evaluate` says, nothing of the machine, and passes the Hub's validation; whatever the names are."
import json
import re
import shlex
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from dinov3_nb import evaluate, probe, train
from dinov3_nb.backbone import load_processor
from dinov3_nb.card import CardFacts, card_data, current_versions, write_card
from dinov3_nb.card_run import public_name, settings_that_matter, training_command
from dinov3_nb.cli import _GROUPS, _add_probe_flags
from dinov3_nb.core import ModelArguments, make_settings
from dinov3_nb.files import read_checkpoint
from dinov3_nb.flags import make_parser, parse
from dinov3_nb.gather import gather
from dinov3_nb.inference import Classifier
from dinov3_nb.merit import figures_of_merit
from dinov3_nb.model import build_classifier
from dinov3_nb.scores import score
from helpers import make_image_folder, save_convnext, save_timm
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import close_session
from markdown_it import MarkdownIt

APACHE = SimpleNamespace(key="apache-2.0", name="apache-2.0", link="LICENSE.md", text="Apache License", source="the package")
DINOV3 = SimpleNamespace(key="other", name="dinov3-license", link="LICENSE.md", text="DINOv3 License", source="a file")
QUICK = dict(model_name="tiny", epochs=2, learning_rate=5e-3, batch_size=32, mixed_precision="no", no_tracking=True,
             log=lambda line: None)


def facts_of(checkpoint, **more):
    "As an export fills them in."
    gathered = gather(checkpoint)
    classifier, scored, chosen = gathered.asked.classifier, gathered.scored, gathered.asked.chosen
    labels = torch.as_tensor(scored.labels)
    stored = read_checkpoint(checkpoint)
    return CardFacts(
        title="a-model", classifier=classifier, licence=APACHE, num_bytes=1_400_000, scores=score(scored.logits, labels, scored.unread),
        merit=figures_of_merit(labels, scored.logits.argmax(1), len(classifier.class_names)), scored_on="; ".join(chosen.notes),
        scored_split=classifier.held_out["split"], own_validation=chosen.held_out, command=training_command(classifier.config),
        probe=stored.get("probe"), versions=stored["versions"], exported_with=current_versions(), **more)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    train(dataset="digits", checkpoint_dir=folder / "run", **QUICK)
    return folder / "run"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    "A probe on a folder of pictures, with a space in its path."
    folder = tmp_path_factory.mktemp("some body")
    make_image_folder(folder / "my shapes")
    probe(dataset=str(folder / "my shapes"), model_name="tiny", checkpoint_dir=folder / "run", log=lambda line: None)
    return folder / "run"


def html(path):
    "The body of a card as a page."
    body = path.read_text(encoding="utf-8").split("---\n", 2)[2]
    return MarkdownIt("commonmark").enable("table").render(body)


def cells(page):
    "Rows of all tables, as texts."
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)] for row in rows]


def test_the_figures_are_those_of_evaluate(digits, tmp_path):
    found = evaluate(digits).scores
    path = write_card(tmp_path, facts_of(digits))
    rows = {row[0]: row[1:] for row in cells(html(path))}
    for name, value in (("top-1 accuracy", found.accuracy), ("top-5 accuracy", found.top5), ("macro F1", found.macro_f1),
                        ("balanced accuracy", found.balanced_accuracy)):
        assert rows[name] == [f"{value:.2%}".replace("%", " %")], name
    for number, share in enumerate(found.recall):
        precision, recall, f1, images, output = rows[str(number)]
        assert recall == f"{share:.1%}".replace("%", " %") and output == str(number)
    assert sum(int(rows[str(c)][3]) for c in range(10)) == found.num_images == 360
    results = {result.metric_type: result for result in ModelCard.load(path).data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "accuracy": round(found.accuracy, 4), "top_5_accuracy": round(found.top5, 4), "f1": round(found.macro_f1, 4)}
    assert {(r.dataset_name, r.dataset_split, r.task_type) for r in results.values()} == {("digits", "validation", "image-classification")}
    assert (tmp_path / "confusion.png").stat().st_size < 100_000


class Hub(BaseHTTPRequestHandler):
    "The Hub's check of metadata, after its documentation: https://huggingface.co/docs/hub/model-cards"

    def log_message(self, *args): pass

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, told))
        wrong = list(self.complaints(yaml.safe_load(told["content"].split("---\n")[1])))
        body = json.dumps({"errors": [{"message": line} for line in wrong], "warnings": []}).encode()
        self.send_response(400 if wrong else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def complaints(self, head):
        if head.get("license") not in ("apache-2.0", "mit", "other"): yield '"license" must be one of [...]'
        if head["license"] == "other" and not re.fullmatch(r"[a-z0-9.-]+", head.get("license_name", "")): yield '"license_name" is wrong'
        for key in ("base_model", "datasets"):
            for name in [head[key]] if isinstance(head.get(key), str) else head.get(key, []):
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name): yield f'"{key}" {name} is not a valid repo id'
        if head.get("base_model_relation", "finetune") not in ("finetune", "quantized", "adapter", "merge"): yield "relation"
        for model in head.get("model-index", []):
            if not isinstance(model["name"], str): yield '"model-index[0].name" must be a string'
            for result in model["results"]:
                if not {"type", "name"} <= set(result["dataset"]) or "type" not in result["task"]: yield "results"
                if not all({"type", "value"} <= set(metric) for metric in result["metrics"]): yield "metrics"


@pytest.fixture()
def validator(monkeypatch):
    "A loopback server in the Hub's place; what it was asked."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"): monkeypatch.delenv(name, False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield server.seen
    close_session()
    server.shutdown()
    server.server_close()


def with_backbone(facts, name, dataset=None):
    "The same facts, of another backbone."
    classifier = facts.classifier
    config = SimpleNamespace(**{**vars(classifier.model.config), "model_name": name, "model_type": classifier.model.config.model_type})
    told = classifier.config if dataset is None else {**classifier.config, "dataset": dataset}
    return replace(facts, classifier=replace(classifier, model=SimpleNamespace(config=config), config=told))


def test_the_hubs_own_validation(digits, shapes, tmp_path, validator):
    facts = facts_of(digits)
    meta = replace(with_backbone(facts, "facebook/dinov3-vits16-pretrain-lvd1689m", "ethz/food101"), licence=DINOV3)
    kinds = {"tiny": facts, "meta": meta, "bits": replace(meta, four_bits=True), "head": replace(meta, form="head_only"),
             "contained": replace(meta, self_contained=True), "probe": facts_of(shapes),
             "local": with_backbone(facts, "/home/ann/dinov3", "/home/ann/pets.csv"), "title": replace(facts, title="a: - [b]\n---\n# 'c' \"d\"")}
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        path = write_card(tmp_path / name, kind)
        card = ModelCard.load(path)
        card.validate()
        assert validator[-1] == ("/api/validate-yaml", {"repoType": "model", "content": path.read_text(encoding="utf-8")})
        assert card.data.to_dict() == card_data(kind).to_dict() == metadata_load(path)
        index = metadata_load(path)["model-index"]
        assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    heads = {name: metadata_load(tmp_path / name / "README.md") for name in kinds}
    assert {key: heads["meta"][key] for key in ("license", "license_name", "license_link", "base_model", "base_model_relation", "datasets")} == {
        "license": "other", "license_name": "dinov3-license", "license_link": "LICENSE.md", "base_model_relation": "finetune",
        "base_model": "facebook/dinov3-vits16-pretrain-lvd1689m", "datasets": ["ethz/food101"]}
    assert heads["bits"]["base_model_relation"] == "quantized" and heads["head"]["library_name"] == "dinov3_nb"
    for name in ("tiny", "local", "probe"):
        assert not {"base_model", "datasets", "license_name", "license_link"} & set(heads[name]), name
        assert heads[name]["pipeline_tag"] == "image-classification" and heads[name]["library_name"] == "transformers"
    assert "top_5_accuracy" not in str(heads["probe"])  # of three classes
    bad = ModelCard.load(tmp_path / "meta" / "README.md")
    bad.data.license = "whatever"
    with pytest.raises(ValueError, match="license"): bad.validate()


def test_nothing_of_the_machine_and_nothing_missing(digits, shapes, tmp_path):
    noted = "scored without kept features: /home/ann smith/cache/x is full"
    for name, checkpoint in (("digits", digits), ("shapes", shapes)):
        facts = replace(facts_of(checkpoint), remembered=24, temperature=1.25, seconds=3.0, scored_on=noted)
        (tmp_path / name).mkdir()
        text = write_card(tmp_path / name, facts).read_text(encoding="utf-8")
        assert "my shapes" in text or name == "digits"
        for secret in (str(tmp_path.parent), "some body", "smith", "hf_", "checkpoint_dir", "cache_dir"):
            assert secret not in text.replace("huggingface_hub", ""), secret
        assert not re.search(r"needed|\bTODO\b|\bNone\b(?! of Meta)|\bnan\b|\[More", text)
        sections = re.split(r"^## ", text, flags=re.M)[1:]
        assert [section.split("\n")[0] for section in sections if "confuses" not in section] == [
            "How to load it", "What it is worth", "Use and limits", "Data", "Training", "Licence", "How this card was made"]
        assert all(len(section.split("\n", 1)[1].strip()) > 50 for section in sections)
        assert "24 of them" in text and "divided by 1.250" in text and "took 3 seconds" in text
    assert "Of the heads that the probe tried" in text and "stands for the images" in text


def test_a_command_gives_the_settings_of_its_run(digits, shapes):
    config = gather(digits).asked.classifier.config
    words = shlex.split(training_command(config))
    assert words[:2] == ["dinov3-nb", "train"] and not {"--checkpoint_dir", "--no_tracking", "--freeze_backbone"} & set(words)
    again = make_settings(*parse(make_parser("train", "", _GROUPS), words[2:])).flat()
    assert settings_that_matter(again) == settings_that_matter(config)
    left = {"checkpoint_dir", "no_tracking"}  # where it goes, and what is seen of it
    assert {name for name, value in again.items() if config[name] != value} == left
    config = gather(shapes).asked.classifier.config
    words = shlex.split(training_command(config))
    assert words == ["dinov3-nb", "probe", "--dataset", "my shapes", "--model_name", "tiny"]
    parser = make_parser("probe", "", [g for g in _GROUPS if g[0] not in ("Model", "Tuning", "Training")])
    _add_probe_flags(parser)
    data, *_, others = parse(parser, words[2:])
    assert data.dataset == public_name(config["dataset"]) and (others.model_name, others.seed) == ("tiny", config["seed"])


@pytest.mark.parametrize("values", [
    dict(tune="lora", lora_rank=4, dora=True, use_4bit=True, use_nested_quant=True), dict(tune="all", layer_decay=0.9, wise_ft=True),
    dict(tune="last", last_blocks=3, max_grad_norm=0.5), dict(head="mlp", dropout=0.1, pool="cls_mean", image_size=64, ema_decay=0.99),
    dict(learning_rate="auto", val_split_ratio=0.5, eval_every_steps="epoch"), dict(augment="trivial", mixup=0.2, cutmix=1.0),
    dict(class_weights="balanced", metric="macro_f1", patience=3, on_bad_image="skip", image_column="a b", label_column="it's"),
    dict(revision="abc", preprocess="fast", feature_dtype="float16", seed=7, weight_decay=1e-8, cache_dir="/home/ann/x", num_workers=0)])
def test_any_command_is_read_again(values):
    settings = make_settings(dataset="ethz/food101", model_name="timm/vit_small_patch16_dinov3.lvd1689m", **values)
    text = training_command({**settings.flat(), "num_classes": 101, "num_train_images": 5})
    again = make_settings(*parse(make_parser("train", "", _GROUPS), shlex.split(text)[2:])).flat()
    assert settings_that_matter(again) == settings_that_matter(settings.flat()) and "/home" not in text
    silent = {"cache_dir", "num_workers"}
    assert {n: v for n, v in again.items() if n not in silent} == {n: v for n, v in settings.flat().items() if n not in silent}


ODD = ["a|b", "`x` ``y", "<script>alert(1)</script>", "---", "two\nlines\r", "חתול", "قطة", "*b* _c_ [d](e)", "# h", "$x$ \\(y\\)", "",
       "&lt;", "http://a.b", "| --- |", "1. one", "a\u202eb", "🐈‍⬛", "{link}", "{{ x }}", "'\"", "x" * 200]


def test_names_of_any_kind(digits, tmp_path):
    facts = facts_of(digits)
    labels = torch.arange(len(ODD)).repeat_interleave(3)
    logits = torch.nn.functional.one_hot((labels + (torch.arange(len(labels)) % 3 == 0)) % len(ODD), len(ODD)).float()
    odd = replace(facts, title="|`<b>\n---", merit=figures_of_merit(labels, logits.argmax(1), len(ODD)), scores=score(logits, labels),
                  classifier=replace(facts.classifier, class_names=ODD))
    path = write_card(tmp_path, odd)
    page, rows = html(path), cells(html(path))
    assert "<script" not in page and "<b>" not in page and page.count("<h1>") == 1 and "<hr" not in page
    shown = {int(row[5]): row[0] for row in rows if len(row) == 6 and row[5].isdigit()}
    plain = {c: re.sub("[\u2068\u2069]", "", name).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
             for c, name in shown.items()}
    assert plain[0] == "a|b" and plain[2] == "<script>alert(1)</script>" and plain[3] == "---" and plain[4] == "two lines"
    assert plain[5] == ODD[5] and plain[7] == ODD[7] and plain[10] == "(empty)" and plain[11] == "&lt;" and plain[17] == "{link}"
    assert len(plain) == len(ODD) and plain[16] == ODD[16]
    ModelCard.load(path)
    assert metadata_load(path)["model-index"][0]["name"] == "|`<b> ---"


def test_many_classes_are_folded(digits, tmp_path):
    facts, many = facts_of(digits), 300
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(np.repeat(np.arange(many), 6))
    wrong = torch.from_numpy(generator.random(len(labels)) < 0.3)
    said = torch.where(wrong, (labels + 1) % many, labels)
    logits = torch.nn.functional.one_hot(said, many).float()
    names = [f"class {c}" for c in range(many)]
    wide = replace(facts, merit=figures_of_merit(labels, said, many), scores=score(logits, labels),
                   classifier=replace(facts.classifier, class_names=names))
    path = write_card(tmp_path, wide)
    text, rows = path.read_text(encoding="utf-8"), [row for row in cells(html(path)) if len(row) == 6 and row[0].startswith("class ")]
    assert "<summary>All 300 classes</summary>" in text and "fewer than 10 images" in text
    assert len(rows) == 25 + 300 and {row[0] for row in rows} == set(names)
    f1 = [float(row[3].removesuffix(" %")) for row in rows[:25]]
    everything = sorted(float(row[3].removesuffix(" %")) for row in rows[25:])
    assert f1[:20] == everything[:20] and f1[20:] == everything[-5:]
    assert (tmp_path / "confusion.png").stat().st_size < 100_000


def test_each_kind_says_what_it_is_and_how_it_is_loaded(digits, tmp_path):
    facts = replace(with_backbone(facts_of(digits), "facebook/dinov3-vits16-pretrain-lvd1689m"), licence=DINOV3)
    kinds = {"whole": (facts, ["import dinov3_nb", 'pipeline("image-classification"', "the whole model ("]),
             "contained": (replace(facts, self_contained=True), ["trust_remote_code=True", "pip install transformers torchvision\n"]),
             "head": (replace(facts, form="head_only"), ["load_classifier(", "the head alone", "head alone is made from the weights"]),
             "bits": (replace(facts, four_bits=True, self_contained=True), ["its backbone in 4 bits", "bitsandbytes"]),
             "absent": (replace(facts, licence=SimpleNamespace(**{**vars(DINOV3), "text": None})), ["Its text could not be had"])}
    for name, (kind, words) in kinds.items():
        (tmp_path / name).mkdir()
        text = write_card(tmp_path / name, kind).read_text(encoding="utf-8")
        for word in (*words, "same agreement", "acknowledge DINOv3", "military", "facebook/dinov3-vits16-pretrain-lvd1689m"):
            assert word in text, (name, word)
        for code in re.findall(r"```python\n(.*?)```", text, re.S): compile(code, name, "exec")
        assert ("import dinov3_nb" in text) == (name in ("whole", "absent"))


@pytest.mark.parametrize("family, save, side, words", [
    ("convnext", save_convnext, 224, "the mean of the patches"), ("timm", save_timm, 256, "torchvision timm\n")])
def test_other_families(family, save, side, words, tmp_path):
    place = save(tmp_path / "my backbone")
    model = build_classifier(ModelArguments(model_name=str(place), head="mlp", pool="mean"), ["a", "b"])
    classifier = Classifier(model.eval(), load_processor(str(place)), ["a", "b"], {})
    facts = CardFacts(title=family, classifier=classifier, licence=DINOV3, num_bytes=10**9, self_contained=True)
    text = write_card(tmp_path, facts).read_text(encoding="utf-8")
    assert f"resized to {side} × {side} pixels" in text and words in text and str(tmp_path) not in text
    assert "a head of two layers on the mean of the patches of a DINOv3 backbone (my backbone)" in text
    assert "base_model" not in text and "model-index" not in text and not (tmp_path / "confusion.png").exists()
