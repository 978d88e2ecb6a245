"A stand-in for the Hub on this machine's loopback, and everything that it can say to `push`."
import base64
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import forks
import pytest
from dinov3_nb.backbone import load_processor
from dinov3_nb.core import ModelArguments, UserError
from dinov3_nb.model import build_classifier, export_classifier
from dinov3_nb.push import push
from dinov3_nb.digests import file_sha256
from forks import ENVIRONMENT
from huggingface_hub import constants
from huggingface_hub.utils import close_session

USERS = {"hf_ann": ("ann", "write"), "hf_reader": ("ann", "read"), "hf_bob": ("bob", "write")}
OID = "1" * 40


class Hub(BaseHTTPRequestHandler):
    "Whoami, repositories, LFS and commits: as much of the Hub as an upload meets."

    def log_message(self, *args): pass

    def answer(self, status, content=None, **headers):
        body = json.dumps({} if content is None else content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle_one(self):
        hub, path = self.server.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, self.path))
        for part, trouble in hub.trouble.items():
            if part not in path: continue
            if trouble == "reset": return self.connection.close()
            return self.answer(trouble, {"error": "as the test wants it."})
        if path.startswith("/lfs/"):
            hub.stored[path.removeprefix("/lfs/")] = body
            return self.answer(200)
        user, _ = USERS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "), (None, None))
        if user is None: return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/whoami-v2": return self.answer(200, self.who())
        if path == "/api/validate-yaml": return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create": return self.create(user, json.loads(body))
        return self.in_repository(user, path, body)

    do_GET = do_POST = do_PUT = handle_one

    def who(self):
        name, role = USERS[self.headers["Authorization"].removeprefix("Bearer ")]
        return {"name": name, "type": "user", "orgs": [], "auth": {"accessToken": {"displayName": "laptop", "role": role}}}

    def create(self, user, told):
        hub, owner = self.server.hub, told.get("organization") or user
        name = f"{owner}/{told['name']}"
        address = {"url": f"{hub.endpoint}/{name}"}
        if name in hub.files: return self.answer(409, {**address, "error": "You already created this model repo"})
        if owner != user: return self.answer(403, {"error": f"You don't have the rights to create a model under the namespace {owner}"})
        hub.private[name] = told.get("visibility") == "private" or told.get("private") is True
        hub.files[name] = {}
        self.answer(200, address)

    def in_repository(self, user, path, body):
        hub = self.server.hub
        name = next((name for name in hub.files if f"/{name}" in path), None)
        if name is None: return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if path == f"/api/models/{name}" or "/revision/" in path:
            return self.answer(200, {"id": name, "sha": OID, "private": hub.private[name], "siblings": []})
        propose = "create_pr=1" in self.path
        if user != name.split("/")[0] and not propose and ".git/" not in path:
            return self.answer(403, {"error": "Authorization error."}, X_Error_Message="Authorization error.")
        if "/preupload/" in path: return self.answer(200, {"files": [self.mode(name, file) for file in json.loads(body)["files"]]})
        if path.endswith("/objects/batch"): return self.batch(json.loads(body)["objects"])
        assert "/commit/" in path, path
        self.commit(name, [json.loads(line) for line in body.splitlines()], propose)

    def mode(self, name, file):
        content = self.server.hub.files[name].get(file["path"])
        large, oid = file["path"].endswith(".safetensors"), None
        if content is not None and large: oid = hashlib.sha256(content).hexdigest()
        elif content is not None: oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, objects):
        hub = self.server.hub
        for thing in objects:
            if thing["oid"] in hub.stored: continue
            thing["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{thing['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name, lines, propose):
        hub, files = self.server.hub, {}
        for line in lines[1:]:
            value = line["value"]
            files[value["path"]] = hub.stored[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        hub.commits.append((name, lines[0]["value"]["summary"], propose))
        target = hub.proposed if propose else hub.files[name]
        target.update(files)
        self.answer(200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{OID}", "commitOid": OID,
                          "pullRequestUrl": f"{hub.endpoint}/{name}/discussions/1" if propose else None})


@pytest.fixture()
def hub(monkeypatch):
    "The stand-in, and a `huggingface_hub` that takes it for the Hub."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.hub = SimpleNamespace(endpoint=f"http://127.0.0.1:{server.server_port}", asked=[], stored={}, commits=[], proposed={},
                                 trouble={}, files={"other/shapes": {}, "ann/public": {}}, private={"other/shapes": False, "ann/public": False})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"): monkeypatch.delenv(name, False)
    for name, value in {"ENDPOINT": server.hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                        "HF_TOKEN_PATH": "/nowhere/token"}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    close_session()
    yield server.hub
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A folder as an export leaves it, with things that don't belong in it."
    folder = tmp_path_factory.mktemp("exported")
    model = build_classifier(ModelArguments(model_name="tiny"), ["circle", "square"])
    export_classifier(model, load_processor("tiny"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["backbone_config"]["_name_or_path"] = "tiny"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    digests = {file.name: file_sha256(file) for file in folder.glob("*") if file.name != "digests.json"}
    (folder / "digests.json").write_text(json.dumps(digests), encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: other\n---\n\n# Shapes\n", encoding="utf-8")
    (folder / "LICENSE.md").write_text("DINOv3 License", encoding="utf-8")
    (folder / ".env").write_text("HF_TOKEN=hf_secret")
    (folder / "best.pt").write_bytes(b"weights")
    (folder / "photos").mkdir()
    (folder / "photos" / "README.md").write_text("private")
    return folder


BELONGS = {"README.md", "LICENSE.md", "config.json", "preprocessor_config.json", "digests.json", "model.safetensors"}


def refused(folder, repo="ann/shapes", **options):
    "The one sentence in which it fails."
    with pytest.raises(UserError) as caught: push(folder, repo, log=lambda line: None, **options)
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said and "hf_" not in said.replace("hf_secret", "hf_"), said
    return said


def test_whole_in_one_commit(hub, exported):
    lines = []
    address = push(exported, "ann/shapes", log=lines.append)
    assert address == f"{hub.endpoint}/ann/shapes/commit/{OID}"
    assert hub.commits == [("ann/shapes", "A classifier, exported by dinov3_nb", False)]
    assert set(hub.files["ann/shapes"]) == BELONGS
    assert all(content == (exported / name).read_bytes() for name, content in hub.files["ann/shapes"].items())
    assert lines == ["Not uploaded, as it is no part of an export: .env, best.pt, photos", f"Uploaded 6 files: {address}"]
    assert hub.private["ann/shapes"] is False
    assert push(exported, "ann/shapes", message="again", log=lines.append) == address
    assert len(hub.commits) == 1  # nothing has changed, so there is nothing to commit


def test_a_private_repository(hub, exported):
    push(exported, "ann/shapes", private=True, message="first", log=lambda line: None)
    assert hub.private["ann/shapes"] and hub.commits == [("ann/shapes", "first", False)]
    lines = []
    push(exported, "ann/shapes", log=lines.append)
    assert "ann/shapes is private: only its owner can read it." in lines
    assert "everybody can read it" in refused(exported, "ann/public", private=True)
    assert not hub.files["ann/public"] and not any("preupload" in path for _, path in hub.asked[-3:])


def test_a_pull_request(hub, exported):
    address = push(exported, "other/shapes", create_pr=True, log=lambda line: None)
    assert address == f"{hub.endpoint}/other/shapes/discussions/1"
    assert set(hub.proposed) == BELONGS and not hub.files["other/shapes"]
    assert not any("repos/create" in path for _, path in hub.asked)
    said = refused(exported, "ann/nowhere", create_pr=True)
    assert said.startswith("--create_pr proposes") and "ann/nowhere is not" in said


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
def test_interrupted(hub, exported, where):
    hub.trouble[where] = "reset"
    said = refused(exported)
    assert said.startswith("The upload to ann/shapes broke off") and "all of this commit or nothing of it" in said
    assert hub.files["ann/shapes"] == {} and not hub.commits
    hub.trouble.clear()
    puts = [path for method, path in hub.asked if method == "PUT"]
    push(exported, "ann/shapes", log=lambda line: None)
    again = [path for method, path in hub.asked if method == "PUT"][len(puts):]
    assert set(hub.files["ann/shapes"]) == BELONGS
    assert len(again) == (1 if where == "/lfs/" else 0)  # what has arrived is not uploaded twice


def test_tokens(hub, exported, monkeypatch):
    assert "'laptop' may only read" in refused(exported, token="hf_reader")
    assert "does not accept your token" in refused(exported, token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.asked)
    assert refused(exported).startswith("There is no token for the Hub") and len(hub.asked) == asked
    assert not any("create" in path for _, path in hub.asked)


def test_no_right_to_write(hub, exported):
    for repo in ("other/new", "other/shapes"):
        said = refused(exported, repo)
        assert said.startswith(f"You may not write to {repo} (") and "--create_pr" in said
    assert not hub.commits and not hub.stored


@pytest.mark.parametrize("status, words", [(402, "no room"), (409, "changed by somebody else"), (413, "larger than the Hub takes"),
                                           (429, "too often"), (400, "refuses ann/shapes"), (503, "trouble of its own (503")])
def test_each_answer_has_its_sentence(hub, exported, status, words):
    hub.trouble["/commit/"] = status
    assert words in (said := refused(exported)) and "as the test wants it" in said
    assert hub.files["ann/shapes"] == {}


def test_a_head_that_the_hub_does_not_like(hub, exported):
    hub.trouble["validate-yaml"] = 400
    assert refused(exported).startswith("The Hub refuses ann/shapes (as the test wants it)")
    assert not hub.stored and hub.files["ann/shapes"] == {}


def test_too_large_for_the_storage(hub, exported):
    hub.trouble["/lfs/"] = 413
    assert "ann/shapes is larger than the Hub takes" in refused(exported)


def test_no_network(hub, exported, monkeypatch):
    # nobody listens on port 9 (discard) of the loopback: a connection is refused at once
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(exported).startswith("The Hub cannot be reached at http://127.0.0.1:9 (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(exported).startswith("HF_HUB_OFFLINE is set")


def test_nothing_is_asked_before_the_folder_is_right(hub, exported, tmp_path):
    licence = (exported / "LICENSE.md").read_bytes()
    (exported / "LICENSE.md").unlink()
    try: assert refused(exported).startswith("push refuses:") and "--licence_file" in refused(exported)
    finally: (exported / "LICENSE.md").write_bytes(licence)
    assert "cannot be the name of a model" in refused(exported, "shapes")
    assert "There is no folder" in refused(tmp_path / "none")
    assert "no classifier of this package" in refused(tmp_path)
    assert not hub.asked


def test_a_weight_or_a_place_that_should_not_leave(hub, exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"model_name": "tiny"', '"model_name": "/home/ann/dinov3"'), encoding="utf-8")
    assert "config.json is damaged, or was changed" in refused(folder)
    (folder / "digests.json").unlink()  # by hand, on purpose
    assert "names a place on this machine (/home/ann/dinov3)" in refused(folder)
    weights = bytearray((exported / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    shutil.copytree(exported, tmp_path / "bit")
    (tmp_path / "bit" / "model.safetensors").write_bytes(weights)
    assert "model.safetensors is damaged, or was changed" in refused(tmp_path / "bit")
    assert not hub.asked


def test_as_a_program_with_the_settings_of_the_environment(hub, exported, tmp_path):
    program = "import sys; from dinov3_nb.push import push; push(sys.argv[1], 'ann/shapes')"
    clean = {k: v for k, v in ENVIRONMENT.items() if not k.lower().endswith("_proxy")}
    environment = {**clean, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_ann",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = forks.run([sys.executable, "-c", program, str(exported)], tmp_path, environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(hub.files["ann/shapes"]) == BELONGS and "Uploaded 6 files" in run.stdout
