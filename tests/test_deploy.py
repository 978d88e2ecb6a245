"The files that the deployment guide shows: they run without PyTorch and without this package, as a server too, and agree with `predict`."
import io
import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
from forks import ENVIRONMENT
from PIL import Image
from sklearn.datasets import load_sample_image

from dinov3_nb import load_classifier, train
from dinov3_nb.onnx_export import write_onnx

GUIDE = Path(__file__).resolve().parents[1] / "nbs" / "guides" / "deploy.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(GUIDE.read_text("utf-8"))["cells"]]
BLOCK = """
import sys
for name in ("torch", "torchvision", "transformers", "dinov3_nb"): sys.modules[name] = None
"""


def shown(name):
    "The text of a file that a cell of the guide writes."
    start = f"%%writefile {name}\n"
    found = [cell for cell in CELLS if cell.startswith(start)]
    assert len(found) == 1, name
    return found[0].removeprefix(start)


def dockerfile():
    found = re.findall(r"```dockerfile\n(.*?)```", "\n".join(CELLS), re.S)
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What would be in the container: the model and both programs; and pictures of odd kinds beside them."
    folder = tmp_path_factory.mktemp("deployed")
    train(dataset="digits", model_name="tiny", epochs=2, learning_rate=5e-3, batch_size=32, mixed_precision="no", no_tracking=True,
          cache_features="never", checkpoint_dir=folder / "run", log=lambda line: None)
    classifier = load_classifier(folder / "run")
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    exif, clear = Image.Exif(), flower.convert("RGBA").crop((100, 50, 421, 260))
    exif[0x0112] = 6
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    flower.save(folder / "phone.jpg", exif=exif)
    clear.save(folder / "clear.png")
    flower.convert("L").resize((31, 77)).save(folder / "grey.png")
    flower.quantize(16).save(folder / "palette.gif")
    flower.resize((9, 8)).save(folder / "small.webp", lossless=True)
    pixels = classifier.processor(images=[Image.open(folder / "grey.png").convert("RGB")], return_tensors="pt")["pixel_values"]
    write_onnx(classifier, folder / "model.onnx", pixels)
    for name in ("ask.py", "server.py"): (folder / name).write_text(shown(name))
    (folder / "sitecustomize.py").write_text(BLOCK)
    return folder


PICTURES = "phone.jpg", "clear.png", "grey.png", "palette.gif", "small.webp"


@pytest.fixture(scope="module")
def environment(folder):
    "Of a process in which PyTorch and this package cannot be imported."
    return {**ENVIRONMENT, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def test_ask_agrees_with_predict_without_pytorch(folder, environment):
    program = f"import json, ask; print(json.dumps([ask.name_picture(name) for name in {PICTURES!r}]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wanted = load_classifier(folder / "run").predict([folder / name for name in PICTURES])
    for name, answer, prediction in zip(PICTURES, json.loads(done.stdout), wanted):
        assert answer == pytest.approx(dict(prediction.labels), abs=1e-5), name


def post(address, name, content):
    "The status and the answer to a file that is sent as a browser's form sends it."
    mark = uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
    request = urllib.request.Request(address, body, {"Content-Type": f"multipart/form-data; boundary={mark}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer: return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error: return error.code, json.loads(error.read())


def test_the_server_answers_and_refuses(folder, environment):
    "Started as the container starts it, on loopback."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = json.loads(re.search(r"^CMD (\[.*\])$", dockerfile(), re.M)[1])
    words = ["127.0.0.1" if word == "0.0.0.0" else str(port) if word == "8000" else word for word in words]
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for line in process.stdout:
            if "Uvicorn running" in line: break
        else: pytest.fail("the server has ended")
        assert json.loads(urllib.request.urlopen(f"{address}/health", timeout=20).read()) == {"status": "ok"}
        wanted = load_classifier(folder / "run").predict(folder / "phone.jpg")[0]
        status, answer = post(f"{address}/classify", "phone.jpg", (folder / "phone.jpg").read_bytes())
        assert status == 200 and answer == pytest.approx(dict(wanted.labels), abs=1e-5)
        bomb = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
        cut = (folder / "phone.jpg").read_bytes()[:2000]
        for name, content in {"notes.txt": b"hello", "nothing.png": b"", "cut.jpg": cut, "bomb.png": bomb.getvalue()}.items():
            assert post(f"{address}/classify", name, content) == (422, {"detail": f"{name} is no picture that can be opened"})
        status, answer = post(f"{address}/classify", "large.bin", bytes(20_000_001))
        assert status == 413 and "20,000,000" in answer["detail"]
        assert post(f"{address}/classify", "small.webp", (folder / "small.webp").read_bytes())[0] == 200  # it is still up
    finally:
        process.terminate()
        process.wait(20)


def test_the_container_has_what_the_programs_need():
    text = dockerfile()
    copied = re.search(r"^COPY .*?(\S+\.\w+(?: \S+\.\w+)*) \./$", text, re.M)[1].split()
    assert set(copied) == {"model.onnx", "ask.py", "server.py", "LICENSE.md"}
    assert "USER server" in text and text.index("USER server") < text.index("CMD") and re.search(r"^FROM python:[\d.]+-slim$", text, re.M)
    assert re.search(r"^EXPOSE (\d+)$", text, re.M)[1] == re.search(r'"--port", "(\d+)"', text)[1]
    installed = set(re.search(r"pip install --no-cache-dir (.*)", text)[1].split())
    imported = set(re.findall(r"^(?:import|from) (\w+)", shown("ask.py") + shown("server.py"), re.M)) - {"json", "ask"}
    packages = {"PIL": "pillow"}
    assert {packages.get(name, name) for name in imported} | {"uvicorn", "python-multipart"} == installed


def test_what_goes_in_is_what_the_run_saw(folder, monkeypatch):
    "The pixels themselves agree with the image processor's, not only the answers."
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "ask", raising=False)
    import ask
    classifier = load_classifier(folder / "run")
    from dinov3_nb.pictures import open_image
    for name in PICTURES:
        wanted = classifier.processor(images=[open_image(folder / name, 0)], return_tensors="pt")["pixel_values"].numpy()
        assert np.abs(ask.prepare(name) - wanted).max() < 1e-5, name
    del sys.modules["ask"]
