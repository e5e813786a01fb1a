"""Publishing: what reaches a hub, what its refusals and a cut connection become, and the command."""
import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from moon2_lab.cli.main import main
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.files import write_json
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.reporting.hub import export_model, publishable, push_to_hub
from moon2_lab.testing import made_up_metrics
from moon2_lab.tiny_models import tiny_model
from PIL import Image
from small import tiny

REPO = "somebody/shoe-search"


class _Hub(BaseHTTPRequestHandler):
    "As much of the hub's interface as an upload asks for; `refuse` is a status for all, `cut` a path that breaks off."

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.path, self.headers.get("Authorization")))
        if hub.cut and hub.cut in self.path:
            self.connection.close()
            return None
        if hub.refuse:
            return self.answer({"error": "no"}, hub.refuse)
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.answer({"url": f"{hub.address}/{REPO}", "name": REPO})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"{hub.address}/{REPO}/commit/1111111"
        return self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": address})

    def do_GET(self):
        self.answer({"id": REPO, "siblings": []}, self.server.refuse or 200)

    def answer(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked, server.files, server.refuse, server.cut, server.made = [], {}, 0, "", {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name, value in {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_" + "x" * 20, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    "A run folder with scores of its model."
    encoder, folder = tiny(perturbed=True), tmp_path / "run"
    encoder.save_pretrained(folder / "model")
    scores = made_up_metrics()
    scores["protocol"] |= {"model": encoder.fingerprint, "catalog": "/srv/someone/shoes"}
    write_json(folder / "metrics.json", scores)
    return folder


def test_what_was_pushed_loads_again(hub, run, tmp_path, moon2):
    "One commit with model, card and scores; the token travels in a header only, a new repository is private."
    code, out, err = moon2("push", run, REPO, "--json")
    assert (code, json.loads(out)["address"].endswith(REPO)) == (0, True), err
    assert hub.made["visibility" if "visibility" in hub.made else "private"] in (True, "private")
    for name, content in hub.files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert Moon2Encoder.from_pretrained(tmp_path / "back").fingerprint == Moon2Encoder.from_pretrained(
        run / "model"
    ).fingerprint
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "moon2_lab"
    assert "95 % intervals" in card and "search phrase to product" in card
    assert not [name for name, content in hub.files.items() if b"/srv/someone" in content or b"hf_xxx" in content]


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "hf auth login"), (403, "write access"), (404, "check the owner")]
)
def test_refusals_are_one_sentence(hub, run, moon2, status, advice):
    hub.refuse = status
    code, out, err = moon2("push", run, REPO)
    assert (code, out) == (2, "") and f"HTTP {status}" in err and advice in err and "Traceback" not in err


@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/"])
def test_a_cut_connection_is_one_sentence(hub, run, where, monkeypatch):
    "Tried again some times; here without the naps between."
    monkeypatch.setattr("huggingface_hub.utils._http.time", mock.Mock(wraps=time, sleep=lambda seconds: None))
    hub.cut = where
    with pytest.raises(LabError, match="no connection to the hub, or it was cut"):
        push_to_hub(run, REPO)
    assert not hub.files


def test_what_cannot_be_published(hub, run, tmp_path):
    "A wrong name, a damaged model, a base that only this machine has: before anything is sent."
    with pytest.raises(UsageError, match="owner/name"):
        push_to_hub(run, "no such name!")
    base = tiny_model("smolvlm", tmp_path / "base")
    named = Moon2Encoder.from_backbone(str(base), image_size=64, num_experts=2, top_k=1, experts="lowrank")
    with pytest.raises(UsageError, match="only this machine has"):
        push_to_hub(named, REPO, base="named")
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LabError, match="model.safetensors"):
        push_to_hub(run, REPO)
    assert not hub.files and not [path for path, _ in hub.asked if "commit" in path]


def test_a_whole_model_of_transformers_is_published_without_its_folder(tmp_path):
    "The base included: its files go along, its folder's name on this machine does not, the fingerprint stays."
    base = tiny_model("smolvlm", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    encoder = Moon2Encoder.from_backbone(str(base), image_size=64, num_experts=2, top_k=1, experts="lowrank").eval()
    ready = publishable(encoder, tmp_path / "ready", REPO)
    loaded = Moon2Encoder.from_pretrained(ready, "cpu")
    assert loaded.fingerprint == encoder.fingerprint
    assert not [path for path in ready.rglob("*.json") if str(tmp_path) in path.read_text()]
    assert "license: mit" in (ready / "README.md").read_text()
    from families import ITEMS

    assert np.allclose(loaded.encode(ITEMS), encoder.encode(ITEMS), atol=1e-5)


def test_card_only_sends_nothing(hub, run, tmp_path):
    assert main(["push", str(run), REPO, "--card-only", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").is_file() and not [path for path, _ in hub.asked if "repos" in path]


@pytest.mark.slow
def test_an_exported_model_opens_in_sentence_transformers(tmp_path):
    "Trained part beside a named base -> one folder; opened by sentence-transformers its vectors are the model's own."
    st = pytest.importorskip("sentence_transformers")
    folder = Path(__file__).resolve().parents[2] / "data" / "pretrained"
    out = export_model(folder, tmp_path / "out", "sentence-transformers")
    assert "base" not in json.loads((out / "config.json").read_text())
    opened = st.SentenceTransformer(str(out), trust_remote_code=True, device="cpu")
    picture = Image.new("RGB", (200, 120), "navy")
    given = ["red dress", {"text": "navy bag", "image": picture}, picture, ""]
    with pytest.raises(DataError, match="input ''"):
        opened.encode(given)
    seen = ImageRef.from_pil(picture)
    items = [Item("red dress", None), Item("navy bag", seen), Item(None, seen)]
    own = Moon2Encoder.from_pretrained(folder).encode(items)
    assert np.abs(opened.encode(given[:3]) - own).max() < 1e-6
