"A stand-in for the Hub on this machine's loopback: gated, refused, missing and served repositories, and no network at all."
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import forks
import pytest
from dinov3_nb.weights import TINY_FOLDER
from forks import ENVIRONMENT

GATED, REFUSED, SERVED = "facebook/dinov3-vits16-pretrain-lvd1689m", "facebook/dinov3-vitb16-pretrain-lvd1689m", "someone/small-dinov3"
COMMIT = "0" * 40
TRY = """
import json, sys, torch
from dinov3_nb.core import UserError
from dinov3_nb.backbone import load_backbone, load_processor
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        backbone, processor = load_backbone(name, revision), load_processor(name, revision)
        answers.append(f"loaded {type(backbone).__name__} {processor.size.height}")
    except UserError as error: answers.append(str(error))
print("ANSWERS" + json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if GATED in path: return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        if REFUSED in path: return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Not in the authorized list.")
        if SERVED not in path: return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if "no-such-branch" in path: return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if "/api/models/" in path:
            files = [{"rfilename": f.name} for f in TINY_FOLDER.iterdir()]
            body = json.dumps({"id": SERVED, "sha": COMMIT, "siblings": files}).encode()
            return self.answer(200, body, Content_Type="application/json")
        file = TINY_FOLDER / path.rsplit("/", 1)[-1]
        if not file.is_file(): return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        body = file.read_bytes()
        return self.answer(200, body, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(cache, names, **environment):
    "Load each (name, revision) in a process of its own, with an empty cache; the answers in words."
    clean = {k: v for k, v in ENVIRONMENT.items() if not k.lower().endswith("_proxy") and k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment = {**clean, "HF_HOME": cache, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    run = forks.run([sys.executable, "-c", TRY, json.dumps(names)], cache, environment)
    assert "ANSWERS" in run.stdout, run.stderr[-3000:]
    return json.loads(run.stdout.split("ANSWERS")[1])


def test_each_answer_of_the_hub_has_its_sentence(endpoint, tmp_path):
    names = [(GATED, None), (REFUSED, None), ("facebook/dinov3-vits16-pretrained-lvd1689m", None), ("nobody/nothing", None),
             (SERVED, "no-such-branch"), (SERVED, None)]
    gated, refused, misspelt, missing, branch, served = ask(tmp_path, names, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    for answer, name, twin in ((gated, GATED, "vit_small"), (refused, REFUSED, "vit_base")):
        assert answer.startswith(f"{name} is gated: ask for access at https://huggingface.co/{name}, then run `hf auth login`")
        assert f"timm/{twin}_patch16_dinov3.lvd1689m" in answer
    assert "neither a model on the Hub" in misspelt and misspelt.endswith(f"The nearest known name is {GATED}.")
    assert "neither a model on the Hub" in missing and "nearest" not in missing
    assert "but not the --revision" in branch
    assert served == "loaded DINOv3ViTModel 32"


def test_no_network(tmp_path):
    # nobody listens on port 9 (discard) of the loopback: a connection is refused at once
    answers = ask(tmp_path, [("facebook/dinov3-small-384", None), ("tiny", None)], HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert f"{GATED} is not on this machine and the Hub cannot be reached" in answers[0] and "'tiny'" in answers[0]
    assert answers[1] == "loaded DINOv3ViTModel 32"


def test_offline_by_choice(tmp_path):
    run = forks.run([sys.executable, "-c", TRY, json.dumps([("timm/vit_small_patch16_dinov3.lvd1689m", None)])], tmp_path, ENVIRONMENT)
    answer, = json.loads(run.stdout.split("ANSWERS")[1])  # what all commands of the tests see: offline, with an empty cache
    assert "the Hub cannot be reached" in answer
