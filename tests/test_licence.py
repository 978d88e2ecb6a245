"Which licence goes with which weights, and where its text is found: folders, a stand-in for the Hub, a wheel's notes."
import importlib.metadata
import importlib.resources
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forks
import pytest
from forks import ENVIRONMENT
from huggingface_hub.errors import LocalEntryNotFoundError

from dinov3_nb import licence as licence_module
from dinov3_nb.core import UserError
from dinov3_nb.licence import LINK, Licence, find_licence, is_ours, write_licence
from dinov3_nb.weights import TINY_FOLDER

TEXT = "# DINOv3 License\n\n*Last Updated: August 19, 2025*\n(a stand-in)\n"
META, TWIN = "facebook/dinov3-vits16-pretrain-lvd1689m", "timm/vit_small_patch16_dinov3.lvd1689m"
COMMIT = "1" * 40


def folder_with(place, name, text=TEXT):
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(text, encoding="utf-8")
    return place


@pytest.mark.parametrize("name", ["LICENSE.md", "LICENSE", "LICENSE.txt"])
def test_the_backbones_own_folder(name, tmp_path):
    found = find_licence(str(folder_with(tmp_path, name)))
    assert found == Licence("other", "dinov3-license", "LICENSE.md", TEXT, str(tmp_path / name))
    assert found.missing() is None and found.doubt() is None


def test_the_nearest_text_is_taken(tmp_path):
    backbone, exported = folder_with(tmp_path / "backbone", "LICENSE", TEXT + "backbone"), folder_with(tmp_path / "out", LINK, TEXT + "out")
    given = folder_with(tmp_path, "given.txt", TEXT + "given") / "given.txt"
    assert find_licence(str(backbone), checkpoint=exported).text.endswith("out")
    assert find_licence(str(backbone), checkpoint=tmp_path / "nowhere").text.endswith("backbone")
    assert find_licence(str(backbone), licence_file=given, checkpoint=exported).text.endswith("given")
    assert find_licence(str(backbone), licence_file=given).source == str(given)
    (exported / LINK).write_text("MIT License", encoding="utf-8")  # of something else
    assert find_licence(str(backbone), checkpoint=exported).text.endswith("backbone")


def test_only_tiny_is_ours(tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(TINY_FOLDER, copy)
    assert is_ours("tiny") and is_ours(str(copy)) and find_licence(str(copy)).key == "apache-2.0"
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert not is_ours(str(copy)) and not is_ours(META) and not is_ours(TWIN) and not is_ours("someone/tiny")
    monkeypatch.chdir(folder_with(tmp_path / "here", "tiny.txt"))
    folder_with(tmp_path / "here" / "tiny", "config.json", "{}")  # a folder of that name comes first, whatever is in it
    found = find_licence("tiny")
    assert (found.key, found.name, found.text) == ("other", "dinov3-license", None)


def test_the_text_of_an_installed_package(tmp_path, monkeypatch):
    "In a clone, and in a wheel, which has no LICENSE beside the package but one among its notes."
    in_a_clone = find_licence("tiny")
    root = Path(str(importlib.resources.files("dinov3_nb"))).parent
    assert in_a_clone.text.startswith((root / "LICENSE").read_text(encoding="utf-8").rstrip())
    site = tmp_path / "site-packages"
    notes = site / "dinov3_nb-0.1.0.dist-info" / "licenses"
    notes.mkdir(parents=True)
    for name in ("LICENSE", "NOTICE"): shutil.copy(root / name, notes / name)
    listed = [f"dinov3_nb-0.1.0.dist-info/{name}" for name in ("METADATA", "RECORD", "licenses/LICENSE", "licenses/NOTICE")]
    (notes.parent / "METADATA").write_text("Metadata-Version: 2.4\nName: dinov3_nb\nVersion: 0.1.0\n", encoding="utf-8")
    (notes.parent / "RECORD").write_text("".join(f"{name},,\n" for name in listed), encoding="utf-8")
    files = importlib.metadata.Distribution.at(notes.parent).files
    folder_with(site, "LICENSE", "of some other package")
    monkeypatch.setattr(licence_module.importlib.resources, "files", lambda name: site / name)
    monkeypatch.setattr(licence_module.importlib.metadata, "files", lambda name: files)
    assert find_licence("tiny") == in_a_clone
    monkeypatch.setattr(licence_module.importlib.metadata, "files", lambda name: None)
    lost = find_licence("tiny")
    assert lost.text is None and "The Apache License has to go with these weights" in lost.missing() and "dinov3-license" not in lost.missing()


def test_a_file_that_is_given(tmp_path):
    with pytest.raises(UserError, match="--licence_file .*no.txt is not there"): find_licence(META, None, tmp_path / "no.txt")
    for content in (b"", b" \n", b"\x89PNG\r\n\x1a\n\xff\xfe\x00"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match="is empty or no text in UTF-8"): find_licence(META, None, tmp_path / "bad")
    with pytest.raises(UserError, match="is not there"): find_licence(META, None, tmp_path)  # a folder
    odd = find_licence(META, None, folder_with(tmp_path, "mine.txt", "Do as you like.") / "mine.txt")
    assert odd.text == "Do as you like." and "does not name the DINOv3 License" in odd.doubt()
    mixed = find_licence("tiny", None, folder_with(tmp_path, "meta.txt") / "meta.txt")
    assert mixed.key == "apache-2.0" and "does not name the Apache License" in mixed.doubt()
    wrapped = folder_with(tmp_path, "wrapped.txt", "The DINOv3\n   license, wrapped") / "wrapped.txt"
    assert find_licence(META, None, wrapped).doubt() is None


def test_written_beside_the_weights(tmp_path):
    assert write_licence(Licence("other", "dinov3-license", LINK, None, "nowhere"), tmp_path) is None and not list(tmp_path.iterdir())
    assert write_licence(Licence("other", "dinov3-license", LINK, "Siméoni", "x"), tmp_path) == tmp_path / "LICENSE.md"
    assert (tmp_path / "LICENSE.md").read_bytes() == "Siméoni".encode()


class Hub(BaseHTTPRequestHandler):
    "Meta's repositories are gated; the twin's has LICENSE.md, someone's has LICENSE, someone else's has none."
    texts = {f"{TWIN}/LICENSE.md": TEXT + "twin", "someone/small/LICENSE": TEXT + "someone", "someone/code/LICENSE": "MIT License"}

    def log_message(self, *args): pass

    def do_GET(self):
        repository, _, file = self.path.lstrip("/").split("?")[0].partition("/resolve/")
        found = self.texts.get(f"{repository}/{file.rpartition('/')[2]}")
        status, code = (401, "GatedRepo") if repository.startswith("facebook/") else (404, "EntryNotFound")
        body = found.encode() if found else b""
        self.send_response(200 if found else status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
        headers |= {"ETag": '"abc"'} if found else {"X-Error-Code": code, "X-Error-Message": code}
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    do_HEAD = do_GET


ASK = """
import json, sys
from dinov3_nb.licence import find_licence
found = [find_licence(name, revision) for name, revision in json.loads(sys.argv[1])]
print("ANSWERS" + json.dumps([[f.name, f.text, f.missing()] for f in found]))
"""


def ask(cache, names, **environment):
    "Look for the licence of each (name, revision) in a process with a cache of its own."
    clean = {k: v for k, v in ENVIRONMENT.items() if not k.lower().endswith("_proxy") and k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment = {**clean, "HF_HOME": cache, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    run = forks.run([sys.executable, "-c", ASK, json.dumps(names)], cache, environment)
    assert "ANSWERS" in run.stdout, run.stderr[-3000:]
    return json.loads(run.stdout.split("ANSWERS")[1])


def test_the_hub_is_asked_and_what_it_gave_is_kept(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [(TWIN, None), (META, None), ("someone/small", None), ("someone/code", None), ("facebook/dinov3-small-384", None)]
    try: answers = ask(tmp_path, names, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0")
    finally: server.shutdown(); server.server_close()
    assert [name for name, *_ in answers] == ["dinov3-license"] * 5
    texts = [text and text.removeprefix(TEXT) for _, text, _ in answers]
    assert texts == ["twin", "twin", "someone", None, "twin"]  # Meta's own are gated: the twin's text is the same
    assert "neither with someone/code nor on the Hub" in answers[3][2]
    later = ask(tmp_path, [*names, ("nobody/nothing", None), ("no such name", None)], HF_HUB_OFFLINE="1")
    assert later[:5] == answers and [text for _, text, _ in later[5:]] == [None, None]


def test_without_a_network_it_asks_once(monkeypatch):
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(licence_module, "hf_hub_download", download)
    assert find_licence(META, "v1").text is None and asked == [(META, "LICENSE.md", "v1")]  # each try waits for the network
