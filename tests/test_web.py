"The web page, in a browser with the network cut: it prepares pictures as PyTorch does, and names them as `predict` does."
import base64
import functools
import gzip
import hashlib
import http.server
import io
import json
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_digits
from transformers import DINOv3ViTImageProcessor

from dinov3_nb import load_classifier, train
from dinov3_nb.core import UserError
from dinov3_nb.decoding import FastProcessor
from dinov3_nb.web import check_web_model, web_settings, write_web
from dinov3_nb.web_page import render_index
from dinov3_nb.web_script import SCRIPT
from dinov3_nb.web_worker import PREPROCESS, WORKER

VENDORED = Path(__file__).resolve().parents[1] / "dinov3_nb" / "web"
HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)//", "&amp; \"quoted\" 'twice'", "two\nlines", "\u202eback to front",
           "x" * 200, "", "\U0001f98a", "__proto__", "length"]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values): return self.model(pixel_values=pixel_values).logits


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    "A folder with a run on the digits, and the model as ONNX."
    folder = tmp_path_factory.mktemp("web")
    train(dataset="digits", model_name="tiny", epochs=2, learning_rate=5e-3, batch_size=32, mixed_precision="no", no_tracking=True,
          checkpoint_dir=str(folder / "run"), log=lambda line: None)
    model = load_classifier(folder / "run", "cpu").finished().model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(model), (torch.zeros(2, 3, 32, 32),), dynamo=True, verbose=False, input_names=["pixel_values"],
                          output_names=["logits"], dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}
                          ).save(folder / "model.onnx", external_data=False)
    return folder


@pytest.fixture(scope="session")
def classifier(work): return load_classifier(work / "run", "cpu")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments): pass


@pytest.fixture(scope="session")
def address(work, classifier):
    "Where the pages are served: in sub-folders of a server on loopback."
    for name, names, processor in (("digits", classifier.class_names, classifier.processor), ("hostile", HOSTILE, classifier.processor)):
        (work / "site" / name).mkdir(parents=True)
        write_web(work / "site" / name, work / "model.onnx", processor, names, "What <b>digit</b> is it?", licence="Its licence")
    (work / "site" / "broken").mkdir()
    for name in ("index.html", "page.js", "page.css", "worker.js", "preprocess.js", "runtime.js", "page.json", "runtime.wasm.gz"):
        (work / "site" / "broken" / name).write_bytes((work / "site" / "digits" / name).read_bytes())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(work / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(browser, address):
    "Opens a page; at the end no other machine was asked for anything, and nothing was wrong."
    contexts, problems = [], []

    def route(request):
        if request.request.url.startswith(address): return request.continue_()
        problems.append(f"leaves the machine: {request.request.url}")
        request.abort()

    def visit(name, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.route("**/*", route)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/{name}")
        return page

    yield visit
    for context in contexts: context.close()
    assert not problems


def ask(page, path, name=None):
    "What the page says of a picture: {class name: probability}."
    content = path if isinstance(path, bytes) else Path(path).read_bytes()
    page.set_input_files("#file", {"name": name or getattr(path, "name", "picture"), "mimeType": "", "buffer": content})
    page.wait_for_selector("#answer:not([hidden]), #problem:not([hidden])", timeout=60_000)
    if page.is_visible("#problem"): return page.inner_text("#problem")
    return {item.query_selector("bdi").inner_text(): float(item.query_selector("data").get_attribute("value"))
            for item in page.query_selector_all("#classes li")}


def as_file(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_ten_digits_are_named_right(visit):
    page, digits = visit("digits/"), load_digits()
    for label in range(10):
        last = np.flatnonzero(digits.target == label)[-1]
        said = ask(page, as_file(Image.fromarray((digits.images[last] * 255 / 16).round().astype(np.uint8)), "PNG"))
        assert max(said, key=said.get) == str(label), said
        assert page.inner_text("#spoken").startswith(f"\u2068{label}\u2069, ")
    assert "8 \u00d7 8 pixels" in page.inner_text("#facts")


def scribble(width, height, seed):
    "A digit of some size in two colours, with a little noise."
    generator, digits = np.random.default_rng(seed), load_digits()
    grey = Image.fromarray((digits.images[seed] * 255 / 16).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    share = np.asarray(grey)[..., None] / 255
    pixels = share * generator.integers(150, 256, 3) + (1 - share) * generator.integers(0, 100, 3) + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def with_hole(image):
    "The same, from opaque on the left to transparent on the right."
    image = image.convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(255, 0, image.width).astype(np.uint8), (image.height, 1))))
    return image


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_file(image, "JPEG", quality=95, exif=exif)


def false_colours(image):
    "With a profile in which red and green have changed places; neither PIL nor the page looks at it."
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"?XYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"?XYZ", b"gXYZ", 1)
    return as_file(image, "PNG", icc_profile=profile)


def palette(image):
    "256 colours, of which one is transparent."
    return as_file(image.quantize(256), "PNG", transparency=3)


KINDS = {
    "photo.jpg": lambda: as_file(scribble(101, 77, 1), "JPEG", quality=90),
    "wide.png": lambda: as_file(scribble(333, 31, 2), "PNG"),
    "transparent.png": lambda: as_file(with_hole(scribble(65, 49, 3)), "PNG"),
    "grey.png": lambda: as_file(scribble(8, 8, 4).convert("L"), "PNG"),
    "turned.jpg": lambda: turned(scribble(80, 53, 5)),
    "palette.png": lambda: palette(scribble(97, 99, 6)),
    "line.png": lambda: as_file(scribble(200, 1, 7), "PNG"),
    "large.jpg": lambda: as_file(scribble(1000, 750, 8).resize((4000, 3000)), "JPEG", quality=85, progressive=True),
    "lossless.webp": lambda: as_file(scribble(37, 201, 9), "WEBP", lossless=True),
    "grey.jpg": lambda: as_file(scribble(50, 40, 10).convert("L"), "JPEG"),
    "old.gif": lambda: as_file(scribble(40, 50, 11).quantize(64), "GIF"),
    "profile.png": lambda: false_colours(scribble(40, 41, 13)),
    "print.jpg": lambda: as_file(scribble(60, 70, 14).convert("CMYK"), "JPEG", quality=95),
    "old.bmp": lambda: as_file(scribble(31, 33, 12), "BMP"),
}


def test_pictures_of_all_kinds_get_the_probabilities_of_predict(visit, classifier, tmp_path, capsys):
    page, off = visit("digits/"), {}
    for name, make in KINDS.items():
        (tmp_path / name).write_bytes(make())
        wanted = dict(classifier.predict(tmp_path / name, top_k=10)[0].labels)
        said = ask(page, tmp_path / name)
        assert len(said) == 5 and page.inner_text("#name") == name
        off[name] = max(abs(share - wanted[label]) for label, share in said.items())
    with capsys.disabled(): print("\nlargest difference of a probability:", ", ".join(f"{name} {value:.0e}" for name, value in off.items()))
    assert max(off.values()) < 1e-3, off


SIZES = (1, 1), (7, 1), (1, 7), (5, 3), (31, 33), (32, 32), (225, 223), (640, 480), (1001, 7), (60, 2000)
PROCESSORS = {
    "DINOv3": DINOv3ViTImageProcessor(size={"height": 224, "width": 224}),
    "not square": DINOv3ViTImageProcessor(size={"height": 30, "width": 45}, resample=3),
    "satellite": DINOv3ViTImageProcessor(image_mean=[0.430, 0.411, 0.296], image_std=[0.213, 0.156, 0.143], size={"height": 64, "width": 64}),
    "timm twin": DINOv3ViTImageProcessor(size={"shortest_edge": 73}, resample=3, do_center_crop=True, crop_size={"height": 64, "width": 64}),
    "twin, not cut": DINOv3ViTImageProcessor(size={"shortest_edge": 64}, resample=3, do_center_crop=True, crop_size={"height": 64, "width": 64})}
IN_PAGE = """async ({size: [width, height], pixels, settings}) => {
  const {preprocess} = await import("./preprocess.js"), all = Uint8Array.from(atob(pixels), letter => letter.charCodeAt(0));
  const read = (first, count) => all.subarray(4 * width * first, 4 * width * (first + count));
  const found = new Uint8Array(preprocess({width, height, read}, settings).buffer);
  let text = "";
  for (let i = 0; i < found.length; i += 8192) text += String.fromCharCode(...found.subarray(i, i + 8192));
  return btoa(text);
}"""


def off_by(page, processor, preprocess, size):
    "The largest difference between a picture's normalized pixels in the page and in Python."
    width, height = size
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    used = FastProcessor(processor) if preprocess == "fast" else processor
    wanted = used(images=[Image.fromarray(pixels[..., :3])], return_tensors="pt")["pixel_values"][0].numpy()
    given = {"size": size, "settings": web_settings(processor, preprocess), "pixels": base64.b64encode(pixels.tobytes()).decode()}
    found = np.frombuffer(base64.b64decode(page.evaluate(IN_PAGE, given)), np.float32)
    return abs(found.reshape(wanted.shape) - wanted).max()


def test_the_page_prepares_pictures_as_the_processor_does(visit, capsys):
    page = visit("digits/")
    off = {(kind, preprocess): max(off_by(page, processor, preprocess, size) for size in SIZES)
           for kind, processor in PROCESSORS.items() for preprocess in ("processor", "fast")}
    with capsys.disabled(): print("\nlargest difference of a normalized pixel:", ", ".join(f"{kind} {how} {value:.0e}" for (kind, how), value in off.items()))
    assert max(off.values()) < 1e-5, off


def test_class_names_stay_names(visit):
    page, digits = visit("hostile/"), load_digits()
    said = ask(page, as_file(Image.fromarray((digits.images[0] * 15.9).astype(np.uint8)), "PNG"), name="<b>file</b>.png")
    assert len(said) == 5 and page.title() == "What <b>digit</b> is it?" == page.inner_text("h1")
    assert page.inner_text("#name") == "<b>file</b>.png"
    page.click("summary")
    shown = [item.text_content() for item in page.query_selector_all("#known bdi")]
    assert shown == [name or "(no name)" for name in HOSTILE]
    assert not page.query_selector_all("main script, #result img[onerror], #known img, #known script")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
BAD = {"notes.txt": b"not a picture", "memo.txt": b"MM, please call", "empty.png": b"", "cut.png": as_file(Image.new("RGB", (50, 50)), "PNG")[:40],
       "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"}


def test_what_is_no_picture_is_named(visit):
    page, good = visit("digits/"), as_file(Image.new("RGB", (5, 5)), "PNG")
    for name, content in BAD.items():
        assert ask(page, content, name) == f"\u2068{name}\u2069 is not a picture that this browser can open: use JPEG, PNG, WebP, GIF, BMP or AVIF."
        assert not page.is_visible("#result")
    assert ask(page, HEIC, "IMG_1.HEIC") == "\u2068IMG_1.HEIC\u2069 is a HEIC photo, which this browser cannot open: save it as JPEG or PNG."
    assert "is a TIFF picture, which" in ask(page, as_file(Image.new("L", (5, 5)), "TIFF"), "scan.tif")
    assert len(ask(page, good)) == 5 and not page.is_visible("#problem")


def test_the_last_of_many_pictures_is_answered(visit):
    page, digits = visit("digits/"), load_digits()
    for i in range(10):
        content = as_file(Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)), "PNG")
        page.set_input_files("#file", {"name": f"{i}.png", "mimeType": "image/png", "buffer": content})
    page.wait_for_selector("#answer:not([hidden])")
    page.wait_for_timeout(200)
    assert page.inner_text("#name") == "9.png" and page.inner_text("#best") == "9"


GIVE = """async ([pixels, kind]) => {
  const bytes = Uint8Array.from(atob(pixels), letter => letter.charCodeAt(0)), transfer = new DataTransfer();
  if (bytes.length) transfer.items.add(new File([bytes], "given.png", {type: "image/png"}));
  else transfer.setData("text/plain", "https://example.org/picture.png");
  const event = kind === "paste" ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true})
    : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
  document.body.dispatchEvent(event);
}"""


def test_pictures_can_be_dropped_and_pasted(visit):
    page, digits = visit("digits/"), load_digits()
    for kind, label in (("drop", 3), ("paste", 4)):
        content = as_file(Image.fromarray((digits.images[label] * 15.9).astype(np.uint8)), "PNG")
        page.evaluate(GIVE, [base64.b64encode(content).decode(), kind])
        page.wait_for_selector(f"#best:text-is('{label}')")
    page.evaluate(GIVE, ["", "paste"])
    assert not page.is_visible("#problem")
    page.evaluate(GIVE, ["", "drop"])
    assert page.inner_text("#problem") == "What was dropped is not a file: save the picture first, then drop it here."


def test_it_can_be_used_with_a_keyboard(visit):
    page, choosers = visit("digits/"), []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    page.wait_for_selector("#known:not([hidden])")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.keyboard.press("Space")
    for _ in range(500):
        if not choosers: page.wait_for_timeout(20)
    choosers[0].set_files({"name": "a.png", "mimeType": "image/png", "buffer": as_file(Image.new("RGB", (5, 5)), "PNG")})
    page.wait_for_selector("#answer:not([hidden])")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.is_visible("#known li")


def test_progress_is_told_and_a_picture_may_come_early(browser, address):
    page, held = browser.new_page(), []
    page.route("**/model.onnx", lambda route: held.append(route))
    page.goto(f"{address}/digits/")
    page.wait_for_selector("#stage:text-is('Loading the model: 3.7 of 7.2 MB')")
    assert 0.5 < page.evaluate("document.getElementById('bar').value") < 0.53
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": as_file(Image.new("RGB", (5, 5)), "PNG")})
    assert page.is_visible("#waiting") and not page.is_visible("#answer")
    while not held: page.wait_for_timeout(20)
    held[0].continue_()
    page.wait_for_selector("#answer:not([hidden])")
    assert page.evaluate("document.getElementById('bar').value") == 1 and not page.is_visible("#loading")
    page.close()


def test_a_model_that_is_missing_is_named(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/broken/")
    page.wait_for_selector("#problem:not([hidden])")
    assert re.match(r"The model could not be loaded \(.*\): reload the page to try again\.", page.inner_text("#problem"))
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": as_file(Image.new("RGB", (5, 5)), "PNG")})
    assert page.is_visible("#problem") and not page.is_visible("#result")
    page.close()


def test_a_server_may_unpack_the_runtime_itself(browser, address, work):
    page = browser.new_page()
    page.route("**/runtime.wasm.gz", lambda route: route.fulfill(
        body=gzip.decompress((VENDORED / "runtime.wasm.gz").read_bytes()), content_type="application/wasm"))
    page.goto(f"{address}/digits/")
    page.wait_for_selector("#known:not([hidden])")
    page.close()


def test_opened_as_a_file_it_says_how_to_serve_it(browser, work, address):
    page = browser.new_page()
    page.goto((work / "site" / "digits" / "index.html").as_uri())
    assert page.inner_text("#problem") == ("Opened as a file, this page cannot load its model: run \"python -m http.server\" in its folder, "
                                           "then open http://localhost:8000.")
    page.close()


def test_the_runtime_is_what_was_built():
    sums = dict(reversed(line.split()) for line in (VENDORED / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    there = {path.name for path in VENDORED.iterdir()} - {"SHA256SUMS", "__pycache__"}
    assert there == set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() == digest, f"{name} was changed: tools/web/README.md says how it is built"
    package = json.loads((VENDORED.parents[1] / "tools" / "web" / "package.json").read_text(encoding="utf-8"))
    licences = (VENDORED / "THIRD_PARTY_LICENSES.txt").read_text(encoding="utf-8")
    for name, version in package["dependencies"].items(): assert f"{name} {version} (" in licences, name
    lock = (VENDORED.parents[1] / "tools" / "web" / "package-lock.json").read_text(encoding="utf-8")
    assert not re.search(r'"resolved"|https?://(?!github|opencollective|www\.|paulmillr|tidelift)[^"]*registry', lock)


def make_onnx(path, inputs=("pixel_values",), shape=(None, 3, 32, 32), num_classes=10, outside=False):
    "A model that does nothing of use."
    import onnx
    from onnx import TensorProto, helper
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    if outside:
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value="model.onnx.data")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, num_classes])
    graph = helper.make_graph([helper.make_node("Identity", [inputs[0]], ["logits"])], "g", values, [logits], [weight])
    onnx.save(helper.make_model(graph), path)
    return path


def test_models_that_do_not_fit_are_refused(tmp_path):
    settings, names = web_settings(DINOv3ViTImageProcessor(size={"height": 32, "width": 32})), [str(c) for c in range(10)]
    check_web_model(make_onnx(tmp_path / "a.onnx"), settings, names)
    check_web_model(make_onnx(tmp_path / "a.onnx", shape=(None, 3, None, None), num_classes=None), settings, names)
    for sentence, options in {
            "does not fit this web page: it does not turn pixel_values into logits": {"inputs": ("images",)},
            "its weights lie in another file, and a page loads one": {"outside": True},
            "it takes pictures of 32 x 64, and gets 32 x 32": {"shape": (None, 3, 32, 64)},
            "it knows 7 classes, and 10 have names": {"num_classes": 7}}.items():
        with pytest.raises(UserError, match=sentence): check_web_model(make_onnx(tmp_path / "a.onnx", **options), settings, names)


def test_nothing_is_written_before_all_was_checked(work, classifier, tmp_path):
    for changes in ({"processor": DINOv3ViTImageProcessor(resample=0)}, {"onnx_path": work / "none.onnx"}, {"class_names": ["a"]}):
        values = {"onnx_path": work / "model.onnx", "processor": classifier.processor, "class_names": classifier.class_names, **changes}
        with pytest.raises(UserError): write_web(tmp_path, title="Digits", **values)
        assert not list(tmp_path.iterdir())


def test_the_readme_makes_a_space(work, classifier, address):
    from huggingface_hub import SpaceCard
    card = SpaceCard.load(work / "site" / "digits" / "README.md")
    assert card.data.title == "What <b>digit</b> is it?" and card.data.sdk == "static"
    assert "\n[Its licence](LICENSE.md)\n" in card.text
    assert "LICENSE.md" not in render_index("Digits") and 'href="LICENSE.md">A &lt;licence' in render_index("Digits", "A <licence>")


def test_the_scripts_ask_nobody_else():
    for code in (SCRIPT, WORKER, PREPROCESS): assert not re.findall(r"https?://(?!localhost)", code)
