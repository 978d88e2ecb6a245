"The demo from end to end: asked through its address as a page asks it, looked at in a browser, and as a Space in a process of its own."
import json
import os
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from forks import ENVIRONMENT
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import make_image_folder, save_convnext, save_timm
from PIL import Image
from sklearn.datasets import load_digits

from dinov3_nb import UserError, load_classifier, train
from dinov3_nb.demo import build_demo, demo, find_known, look_at
from dinov3_nb.report import report
from dinov3_nb.space import write_space

QUICK = dict(model_name="tiny", epochs=5, learning_rate=5e-3, batch_size=32, mixed_precision="no", no_tracking=True, log=lambda line: None)
HOSTILE = ["<img src=x onerror=document.title='hit'>", "**bold** [a](javascript:alert(1))", "{{ 7*7 }}", "x" * 150, "\u202eevil \u05d0", "a\nb", "$x^2$", "🦊", "", "0"]


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    before = {name: os.environ.get(name) for name in ("DINOV3_NB_CACHE", "GRADIO_TEMP_DIR")}
    for name in before: os.environ[name] = str(tmp_path_factory.mktemp("kept"))
    yield
    for name, value in before.items():
        if value is None: del os.environ[name]
        else: os.environ[name] = value


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run on the digits, with its report."
    folder = tmp_path_factory.mktemp("digits") / "run"
    train(dataset="digits", checkpoint_dir=folder, **QUICK)
    report(folder, log=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory):
    "One held-out picture of each digit: {digit: path}."
    digits, rows, folder = load_digits(), load_classifier(run).held_out["rows"].tolist(), tmp_path_factory.mktemp("pictures")
    for digit in range(10):
        row = next(row for row in rows if digits.target[row] == digit)
        Image.fromarray((digits.images[row] / 16 * 255).round().astype(np.uint8)).save(folder / f"{digit}.png")
    return {digit: folder / f"{digit}.png" for digit in range(10)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def page(run):
    "The demo of the run, up: its port, the lines that were logged, and the hosts that were looked up meanwhile."
    port, lines, hosts, before = free_port(), [], [], socket.getaddrinfo
    def note(host, *arguments, **options): hosts.append(host); return before(host, *arguments, **options)
    socket.getaddrinfo = note
    trap = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True"}
    os.environ.update(trap)
    shown = demo(run, port=port, open_browser=False, wait=False, log=lines.append)
    yield shown, port, lines, hosts
    shown.close(verbose=False)
    socket.getaddrinfo = before
    for name in trap: del os.environ[name]


@pytest.fixture(scope="module")
def client(page):
    return Client(f"http://127.0.0.1:{page[1]}", verbose=False)


def ask(client, path):
    "What the page says: {class: probability}, the sentence, [(caption, picture)]."
    classes, worth, near = client.predict(handle_file(path), api_name="/look")
    shares = {entry["label"]: entry["confidence"] for entry in classes["confidences"]}
    return shares, worth, [(entry["caption"], entry["image"]) for entry in near]


@pytest.mark.parametrize("digit", [1, 4, 7])
def test_a_digit_its_neighbours_and_whether_it_is_familiar(client, run, pictures, digit):
    shares, worth, near = ask(client, pictures[digit])
    said = load_classifier(run).predict(pictures[digit])[0]
    assert max(shares, key=shares.get) == str(digit) and len(shares) == 5
    assert shares == pytest.approx(dict(said.labels), abs=1e-5)
    assert worth.startswith("**Familiar.**" if said.familiar else "**Unfamiliar.**")
    assert [caption.split()[0] for caption, _ in near] == [str(digit)] * 5
    assert all(Image.open(path).size == (160, 160) for _, path in near)


def test_noise_is_unfamiliar(client, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    _, worth, near = ask(client, tmp_path / "noise.png")
    assert worth.startswith("**Unfamiliar.**") and len(near) == 5


def test_pictures_are_opened_as_predict_opens_them(client, run, tmp_path):
    "Lying on its side with a note of the camera, see-through, and with 16 bits: gradio alone reads these otherwise."
    digit = Image.fromarray((load_digits().images[3] / 16 * 255).round().astype(np.uint8)).resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    digit.transpose(Image.Transpose.ROTATE_90).convert("RGB").save(tmp_path / "phone.jpg", exif=exif, quality=95)
    clear = digit.convert("RGBA")
    clear.putalpha(Image.fromarray(255 - np.asarray(digit)))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.asarray(digit).astype(np.uint16) * 257).save(tmp_path / "wide.tif")
    classifier = load_classifier(run)
    for name in ("phone.jpg", "clear.png", "wide.tif"):
        shares = ask(client, tmp_path / name)[0]
        assert shares == pytest.approx(dict(classifier.predict(tmp_path / name)[0].labels), abs=1e-5), name
    assert ask(client, tmp_path / "clear.png")[0] != pytest.approx(ask(client, tmp_path / "phone.jpg")[0], abs=1e-3)


def test_what_is_no_picture_gets_a_sentence(client, tmp_path, capfd):
    for name, content in {"notes.txt": b"hello", "empty.png": b"", "cut.jpg": b"\xff\xd8\xff\xe0"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AppError, match=f"^{name} cannot be decoded: "): ask(client, tmp_path / name)
    assert "Traceback" not in capfd.readouterr().err


def test_no_picture_clears_the_page(client):
    classes, worth, near = client.predict(None, api_name="/look")
    assert (worth, near) == ("", []) and not (classes or {}).get("confidences")


def test_files_of_this_machine_are_not_read(page, tmp_path):
    "A path that was not uploaded is refused, whoever asks for it."
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for path in (tmp_path / "private.png", "/etc/passwd"):
        body = json.dumps({"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]}).encode()
        address = f"http://127.0.0.1:{page[1]}/gradio_api/call/look"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        event = json.loads(urllib.request.urlopen(request, timeout=20).read())["event_id"]
        answer = urllib.request.urlopen(f"{address}/{event}", timeout=20).read().decode()
        assert answer.startswith("event: error") and "confidences" not in answer


def test_only_this_machine_and_nobody_is_told(page, client, pictures):
    "Whatever the environment says: the address is loopback, there is no public link, and no other host is looked up."
    shown, port, lines, hosts = page
    ask(client, pictures[3])
    own = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == "LISTEN" and one.laddr.port == port]
    assert own == ["127.0.0.1"] and shown.share_url is None
    assert {str(host) for host in hosts} <= {"127.0.0.1", "localhost"}
    assert lines == ["Collecting the features of 1,437 training images.",
                     f"The demo is at http://127.0.0.1:{port}, for this machine only; Ctrl+C ends it."]


@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (390, "dark")])
def test_in_a_browser(page, pictures, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, asked, wrong = context.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(f"http://127.0.0.1:{page[1]}")
    tab.wait_for_selector("input[type=file]", state="attached")
    tab.set_input_files("input[type=file]", str(pictures[7]))
    tab.wait_for_selector("text=Familiar.")
    tab.wait_for_selector("text=7 (0.9")
    away = [url for url in asked if not url.startswith((f"http://127.0.0.1:{page[1]}", f"blob:http://127.0.0.1:{page[1]}", "data:"))]
    assert not away and not wrong
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_class_names_are_text(run, pictures, browser):
    "Names with markup show as they are, and do nothing."
    classifier = replace(load_classifier(run), class_names=HOSTILE)
    shown, port = build_demo(classifier, find_known(classifier, log=lambda line: None)), free_port()
    shown.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True, ssr_mode=False)
    try:
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{port}")
        tab.wait_for_selector("input[type=file]", state="attached")
        for digit in (0, 1):
            tab.set_input_files("input[type=file]", str(pictures[digit]))
            tab.wait_for_selector(f"h2:has-text({json.dumps(HOSTILE[digit])})")
            tab.wait_for_timeout(300)
            assert tab.title() != "hit" and not tab.query_selector("img[src=x]") and not tab.query_selector("a[href^=javascript]")
            tab.click("button[aria-label=Clear], button[aria-label='Remove Image'], button[title=Clear]")
        tab.close()
    finally: shown.close(verbose=False)


def test_an_exported_folder_has_no_training_images(run, pictures, tmp_path):
    load_classifier(run).save_pretrained(tmp_path / "model")
    lines, port = [], free_port()
    shown = demo(tmp_path / "model", port=port, open_browser=False, wait=False, log=lines.append)
    try: shares, worth, near = ask(Client(f"http://127.0.0.1:{port}", verbose=False), pictures[2])
    finally: shown.close(verbose=False)
    assert max(shares, key=shares.get) == "2" and near == []
    assert worth.startswith("**")  # the calibration has come along
    assert lines[0] == "No training images are shown: the checkpoint does not say which it has learned from."


def test_without_a_report_the_page_says_how_to_get_one(run, pictures):
    classifier = load_classifier(run, calibrated=False)
    assert "`dinov3-nb report`" in look_at(classifier, pictures[2]).sentence()


def test_features_that_were_never_kept_are_computed(tmp_path):
    folder = make_image_folder(tmp_path / "pictures")
    train(dataset=str(folder), checkpoint_dir=tmp_path / "run", cache_features="never", **QUICK)
    classifier = load_classifier(tmp_path / "run")
    known = find_known(classifier, log=lambda line: None)
    look = look_at(classifier, folder / "val" / "stripes" / "0.png", known)
    assert len(known) == 24 and next(iter(look.classes)) == "stripes" and look.near[0].label == "stripes"
    (folder / "train").rename(tmp_path / "gone")
    lines = []
    assert find_known(classifier, log=lines.append) is None
    assert len(lines) == 2 and lines[1].startswith("No training images are shown: ")


@pytest.mark.parametrize("changes", [dict(model_name=save_convnext), dict(model_name=save_timm), dict(head="mlp", pool="cls_mean"),
                                     dict(use_4bit=True), dict(tune="lora"), dict(preprocess="fast", pool="mean")], ids=lambda changes: "-".join(map(str, changes)))
def test_the_demo_and_predict_agree(changes, tmp_path):
    "Whatever backbone, head and rung: the same names and probabilities, and a training image is its own neighbour."
    folder, changes = make_image_folder(tmp_path / "pictures", per_class=4), dict(changes)
    if callable(changes.get("model_name")): changes["model_name"] = str(changes["model_name"](tmp_path / "backbone"))
    train(dataset=str(folder), checkpoint_dir=tmp_path / "run", **QUICK | {"epochs": 1} | changes)
    classifier = load_classifier(tmp_path / "run")
    known = find_known(classifier, log=lambda line: None)
    for path in (folder / "val" / "circle" / "1.png", folder / "train" / "stripes" / "2.png"):
        look = look_at(classifier, path, known)
        assert look.classes == pytest.approx(dict(classifier.predict(path)[0].labels), abs=1e-5)
    assert look.near[0].label == "stripes" and look.near[0].similarity == pytest.approx(1, abs=1e-3)


def test_bad_ports_and_checkpoints(run, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {taken} cannot be opened"):
            demo(run, port=taken, open_browser=False, neighbours=False, wait=False)
    for port in (0, -1, 65536, "80"):
        with pytest.raises(UserError, match="--port"): demo(run, port=port)
    with pytest.raises(UserError): demo(tmp_path / "nothing", open_browser=False)


def test_without_gradio_there_is_a_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'dinov3_nb\[demo\]'"): demo(run)


def test_a_space_runs(run, pictures, tmp_path):
    "The folder of a Space, started as a Space starts it, answers; and no picture is in it."
    load_classifier(run).save_pretrained(tmp_path / "space" / "model")
    write_space(tmp_path / "space", "Which digit?")
    port = free_port()
    environment = {**ENVIRONMENT, "GRADIO_SERVER_PORT": str(port), "GRADIO_SSR_MODE": "False", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            if "Running on" in line: break
        else: pytest.fail("the Space has ended")
        shares, worth, near = ask(Client(f"http://127.0.0.1:{port}", verbose=False), pictures[5])
    finally:
        process.terminate()
        process.wait(20)
    assert shares == pytest.approx(dict(load_classifier(tmp_path / "space" / "model").predict(pictures[5])[0].labels), abs=1e-5)
    assert worth.startswith("**") and near == []
    files = [path.name for path in (tmp_path / "space").rglob("*") if path.is_file()]
    assert not [name for name in files if Path(name).suffix in (".png", ".jpg", ".webp")]
