"""Models to and from a stand-in of the hub on this machine, through the real client."""

import base64
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scldm_cd4 import CD4Model, _errors
from scldm_cd4.checkpoint.hub import is_name

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub is not installed")
SECRET = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """Repositories as a list of commits, each the bytes by file name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, int]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.wrong: bytes | None = None

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        commits = self.repos[repo]
        for i, files in enumerate(commits):
            if revision == sha(repo, i):
                return files
        branch = self.branches[repo].get(revision)
        return None if branch is None else commits[branch]

    def commit(self, repo: str, revision: str) -> str:
        files = self.files(repo, revision)
        return sha(repo, next(i for i, f in enumerate(self.repos[repo]) if f is files))


def sha(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The few paths that the client asks for."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, values: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(values).encode(), Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.reply(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = self.path.split("?")[0].strip("/")
        hub.asked.append(f"{self.command} {path}")
        if path.startswith("api/models/"):
            org, name, *rest = path.removeprefix("api/models/").split("/")
            repo, revision = f"{org}/{name}", rest[1] if rest[:1] == ["revision"] else "main"
            file = None
        else:
            org, name, _, revision, file = path.split("/", 4)
            repo = f"{org}/{name}"
        allowed = not hub.private.get(repo) or self.headers.get("authorization") == f"Bearer {SECRET}"
        if repo not in hub.repos or not allowed:
            return self.missing("RepoNotFound")
        files = hub.files(repo, revision)
        if files is None:
            return self.missing("RevisionNotFound")
        commit = hub.commit(repo, revision)
        if file is None:
            siblings = [{"rfilename": n, "size": len(d)} for n, d in files.items()]
            if "/tree/" in path:
                return self.json([{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()])
            info = {"id": repo, "sha": commit, "private": hub.private[repo], "tags": [], "siblings": siblings}
            return self.json(
                info | {"downloads": 0, "likes": 0, "usedStorage": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
            )
        if file not in files:
            return self.missing("EntryNotFound")
        data = files[file]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        sent = hub.wrong if hub.wrong is not None and file.startswith("config.") else data
        return self.reply(200, sent, ETag=etag, X_Repo_Commit=commit)

    def do_POST(self) -> None:
        hub = self.server
        path = self.path.split("?")[0].strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(f"POST {path}")
        if self.headers.get("authorization") != f"Bearer {SECRET}":
            return self.reply(401, b"{}")
        if path == "api/repos/create":
            values = json.loads(body)
            repo = "/".join(x for x in (values.get("organization"), values["name"]) if x)
            if repo in hub.repos:
                return self.json({"error": "exists", "url": self.path}, 409)
            hub.repos[repo], hub.branches[repo], hub.private[repo] = (
                [{}],
                {"main": 0},
                values.get("visibility") == "private",
            )
            return self.json({"url": f"http://127.0.0.1/{repo}", "name": repo, "id": repo})
        if path == "api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        org, name, what, revision = path.removeprefix("api/models/").split("/")
        repo = f"{org}/{name}"
        if what == "branch":
            if revision in hub.branches[repo]:
                return self.json({"error": "exists"}, 409)
            hub.branches[repo][revision] = hub.branches[repo]["main"]
            return self.json({})
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self.json({"files": modes})
        assert what == "commit"
        files = dict(hub.files(repo, revision) or {})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        hub.repos[repo].append(files)
        hub.branches[repo][revision] = len(hub.repos[repo]) - 1
        oid = sha(repo, len(hub.repos[repo]) - 1)
        return self.json({"success": True, "commitOid": oid, "commitUrl": f"http://127.0.0.1/{repo}/commit/{oid}"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield server
    server.shutdown()
    server.server_close()


def push(model: CD4Model, name: str = "me/cd4", **options: Any) -> str:
    with pytest.warns(UserWarning, match="condition labels .* and the training history are uploaded"):
        return model.push_to_hub(name, token=SECRET, **options)


def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub, trained: CD4Model, tmp_path: Path):
    address = push(trained)
    assert "/me/cd4/commit/" in address
    assert hub.private == {"me/cd4": True}
    again = CD4Model.from_pretrained("me/cd4", token=SECRET, cache_dir=tmp_path / "mine")
    assert again._state.fingerprint() == trained._state.fingerprint()
    assert again.registry == trained.registry
    sent = json.dumps({k: v.decode(errors="replace") for k, v in hub.repos["me/cd4"][-1].items()})
    assert SECRET not in sent
    assert str(tmp_path) not in sent
    push(trained, "me/open", private=False)
    assert hub.private["me/open"] is False
    assert CD4Model.from_pretrained("me/open").is_trained_


def test_revisions_are_kept_apart(hub: Hub, trained: CD4Model):
    push(trained, private=False)
    first = hub.commit("me/cd4", "main")
    push(trained, revision="v2", commit_message="again")
    hub.repos["me/cd4"][hub.branches["me/cd4"]["v2"]]["README.md"] = b"# The second"
    assert CD4Model.from_pretrained("me/cd4", revision="v2").is_trained_
    assert CD4Model.from_pretrained("me/cd4", revision=first).is_trained_
    with pytest.raises(_errors.CheckpointError, match="no revision 'v9'"):
        CD4Model.from_pretrained("me/cd4", revision="v9")


def test_without_network_the_cache_is_used(hub: Hub, trained: CD4Model, monkeypatch: pytest.MonkeyPatch):
    push(trained, private=False)
    CD4Model.from_pretrained("me/cd4")
    n = len(hub.asked)
    assert CD4Model.from_pretrained("me/cd4", local_files_only=True).is_trained_
    assert len(hub.asked) == n
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client may say that it takes the cache
        assert CD4Model.from_pretrained("me/cd4").is_trained_
    with pytest.raises(_errors.CheckpointError, match="not in the local cache, and the hub could not be asked"):
        CD4Model.from_pretrained("me/other")
    with pytest.raises(_errors.CheckpointError, match="not in the local cache"):
        CD4Model.from_pretrained("me/other", local_files_only=True)
    with pytest.raises(_errors.CheckpointError, match="cannot be reached"), pytest.warns(UserWarning, match="uploaded"):
        trained.push_to_hub("me/cd4", token=SECRET)


def test_what_cannot_be_seen_or_written_is_said(hub: Hub, trained: CD4Model):
    push(trained)
    for name in ("me/cd4", "me/nothing"):
        with pytest.raises(_errors.CheckpointError, match=f"no model {name} on the hub that you may see"):
            CD4Model.from_pretrained(name)
    with pytest.raises(_errors.CheckpointError, match="hub"), pytest.warns(UserWarning, match="uploaded"):
        trained.push_to_hub("me/cd4", token="hf_wrong")
    for name in ("cd4", "../etc/passwd", "a/b/c", "me/..", "/tmp/x", "me/", ""):
        with pytest.raises(_errors.CheckpointError, match="no name of a repository"):
            trained.push_to_hub(name, token=SECRET)
    assert not any(map(is_name, ("..", "../x", "a/../b", "~/x", "./x", "a\\b/c", "http://x/y")))
    with pytest.raises(_errors.CheckpointError, match="revision= is for a model on the hub"):
        CD4Model.from_pretrained(".", revision="main")


def test_damaged_and_foreign_files_on_the_hub_are_refused_or_left_there(hub: Hub, trained: CD4Model, tmp_path: Path):
    push(trained, private=False)
    files = hub.repos["me/cd4"][-1]
    files |= {"model.pkl": b"\x80\x04.", "run.py": b"raise SystemExit", ".gitattributes": b"", "sub/config.json": b"{}"}
    CD4Model.from_pretrained("me/cd4", cache_dir=tmp_path / "one")
    fetched = {p.name for p in (tmp_path / "one").rglob("*") if p.is_file() or p.is_symlink()}
    assert not fetched & {"model.pkl", "run.py"}
    assert not list((tmp_path / "one").rglob("sub"))
    hub.wrong = files["config.json"].replace(b"width", b"widht")
    with pytest.raises(_errors.CheckpointError, match=r"config\.json is damaged: its checksum"):
        CD4Model.from_pretrained("me/cd4", cache_dir=tmp_path / "two")
    hub.wrong = files["config.json"][:-9]
    with pytest.raises(_errors.CheckpointError, match=r"config\.json|cannot be reached"):
        CD4Model.from_pretrained("me/cd4", cache_dir=tmp_path / "three")


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(_errors.CheckpointError, match=r"scldm_cd4\[hub\]"):
        CD4Model.from_pretrained("me/cd4")


def test_the_reference_layout_comes_from_the_hub_too(hub: Hub, tmp_path: Path):
    import yaml
    from safetensors.torch import save
    from test_pretrained import VOCABULARY, settings, tensors

    hub.repos["lab/released"] = [
        {"model.safetensors": save(tensors()), "config.yaml": yaml.safe_dump(settings()).encode(), "x.pkl": b"\x80"}
    ]
    hub.branches["lab/released"], hub.private["lab/released"] = {"main": 0}, False
    model = CD4Model.from_pretrained("lab/released", vocabulary=VOCABULARY)
    assert model.training_["pretrained"]["weights"] == "ema"
    hub.wrong = hub.repos["lab/released"][0]["config.yaml"].replace(b"n_head: 2", b"n_head: 1")
    with pytest.raises(_errors.CheckpointError, match=r"config\.yaml is damaged: its checksum is not the one"):
        CD4Model.from_pretrained("lab/released", vocabulary=VOCABULARY, cache_dir=tmp_path / "other")
