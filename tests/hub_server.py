"""A Hub on this machine: enough of its HTTP protocol for the real `huggingface_hub` client, and faults on demand.

Clients reach it through HF_ENDPOINT, which they read when they are imported, with HF_HUB_DISABLE_XET=1 (Git LFS).
"""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

# What may be written with which token.
TOKENS = {"hf_writer": {"me"}, "hf_reader": set()}
IN_LFS = re.compile(r".*\.(safetensors|png|bin|pt)")
NAME = re.compile(r"(?:[\w-]+/)?[\w.-]+")
LICENCES = {"apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-4.0", "bsd-3-clause", "other", "unknown"}


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **content):
        super().__init__(message)
        self.status = status
        self.code = code
        self.content = {"error": message, **content}


class HubServer(ThreadingHTTPServer):
    """The server's state.

    Attributes:
        repositories: {"owner/name": list of commits, each {path: content}}; the first one is empty.
        requests: "METHOD path" of all requests since `control`.
        faulty: the numbers (from 1) of the first and the last request that fail.
        failure: "error" answers with status 500, "drop" closes the connection without an answer, "lost" does what was
            asked and closes it then.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.objects: dict[tuple[str, str], bytes] = {}  # by repository and SHA-256
        self.requests: list[str] = []
        self.faulty = (0, 0)
        self.failure = "error"

    def control(self, faulty=(0, 0), failure: str = "error") -> None:
        """Counts anew, and says what fails; clients in other processes `POST /control`."""
        with self.lock:
            self.requests, self.faulty, self.failure = [], faulty, failure

    def failure_of(self, request: str) -> str | None:
        with self.lock:
            self.requests.append(request)
            first, last = self.faulty
            return self.failure if first <= len(self.requests) <= last else None

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id][-1]

    def environment(self, home: Path, token: str | None = "hf_writer") -> dict[str, str]:
        """For a client's process: this server as its Hub, its own cache, one token or none."""
        mine = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        others = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        return others | mine | ({"HF_TOKEN": token} if token else {})


@contextmanager
def hub_server():
    """A running server."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer
    silent = False

    def log_message(self, *args):
        pass

    def handle_request(self):
        self.path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/control":
            self.server.control(**json.loads(body))
            return self.answer(200, {})
        if self.path == "/requests":
            return self.answer(200, self.server.requests)
        if self.path == "/api/agent-harnesses":  # asked once per process, by clients that look whom they work for
            return self.answer(404, {})
        failure = self.server.failure_of(f"{self.command} {self.path}")
        if failure == "error":
            return self.answer(500, {"error": "Internal Server Error"})
        self.close_connection = failure is not None
        if failure == "drop":
            return None
        self.silent = failure == "lost"
        try:
            for (method, pattern), route in ROUTES.items():
                found = re.fullmatch(pattern, self.path)
                if method == self.command and found:
                    return route(self, body, **found.groupdict())
            raise Refused(404, f"No route {self.command} {self.path}")
        except Refused as refusal:
            return self.answer(refusal.status, refusal.content, {"X-Error-Code": refusal.code} if refusal.code else {})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, status: int, content, headers: dict | None = None) -> None:
        if self.silent:
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who may do what

    def check_writable(self, owner: str) -> None:
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refused(401, "Invalid username or password.")
        if owner not in TOKENS[token]:
            raise Refused(403, f"You don't have the rights to write to the namespace {owner!r}.")

    def commits(self, repo: str, revision: str = "main") -> list[dict[str, bytes]]:
        """The commits of a repository up to a revision."""
        if repo not in self.server.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        commits = self.server.repositories[repo]
        numbers = {commit_id(repo, number): number for number in range(len(commits))} | {"main": len(commits) - 1}
        if revision not in numbers:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits[: numbers[revision] + 1]

    # Routes

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self.check_writable(repo.split("/")[0])
        content = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repositories:
            raise Refused(409, "You already created this model repo", **content)
        self.server.repositories[repo] = [{}]
        self.answer(200, content)

    def auth_check(self, body, repo, write):
        self.commits(repo)
        if write:
            self.check_writable(repo.split("/")[0])
        self.answer(200, {})

    def validate_yaml(self, body):
        faults = faults_of_card(json.loads(body)["content"])
        if faults:
            raise Refused(400, "Invalid metadata", errors=[{"message": fault} for fault in faults])
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body, repo, revision):
        self.check_writable(repo.split("/")[0])
        present = self.commits(repo, revision)[-1]
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if IN_LFS.fullmatch(path) else "regular"
            oid = {"oid": object_id(present[path], mode)} if path in present else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer(200, {"files": files})

    def lfs_batch(self, body, repo):
        self.check_writable(repo.split("/")[0])
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/storage/{repo}/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.server.url}/{repo}.git/info/lfs/objects/verify", "header": {}},
            }
            stored = (repo, wanted["oid"]) in self.server.objects
            objects.append(wanted if stored else wanted | {"authenticated": True, "actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, repo, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The content is not what its hash says.")
        self.server.objects[repo, oid] = body
        self.answer(200, b"")

    def verify(self, body, repo):
        wanted = json.loads(body)
        if len(self.server.objects.get((repo, wanted["oid"]), b"")) != wanted["size"]:
            raise Refused(404, "Object not found")
        self.answer(200, {})

    def commit(self, body, repo, revision):
        self.check_writable(repo.split("/")[0])
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(self.commits(repo, revision)[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if (repo, value["oid"]) not in self.server.objects:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.server.objects[repo, value["oid"]]
        self.server.repositories[repo].append(files)
        sha = commit_id(repo, len(self.server.repositories[repo]) - 1)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def info(self, body, repo, revision="main"):
        commits = self.commits(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commits[-1])]
        facts = {"_id": repo, "id": repo, "modelId": repo, "private": False, "tags": [], "siblings": siblings}
        self.answer(200, facts | {"sha": commit_id(repo, len(commits) - 1)})

    def tree(self, body, repo, revision, folder):
        files = self.commits(repo, revision)[-1]
        inside = {path: content for path, content in files.items() if path.startswith(folder or "")}
        self.answer(
            200,
            [
                {"type": "file", "path": path, "size": len(content), "oid": object_id(content, "regular")}
                for path, content in sorted(inside.items())
            ],
        )

    def resolve(self, body, repo, revision, path):
        commits = self.commits(repo, revision)
        headers = {"X-Repo-Commit": commit_id(repo, len(commits) - 1)}
        if path not in commits[-1]:
            return self.answer(404, b"Entry not found", headers | {"X-Error-Code": "EntryNotFound"})
        content = commits[-1][path]
        etag = object_id(content, "lfs" if IN_LFS.fullmatch(path) else "regular")
        return self.answer(200, content, headers | {"ETag": f'"{etag}"'})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = {
    ("POST", "/api/repos/create"): Handler.create,
    ("GET", f"/api/models/{REPO}/auth-check(?P<write>/write)?"): Handler.auth_check,
    ("POST", "/api/validate-yaml"): Handler.validate_yaml,
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)"): Handler.preupload,
    ("POST", f"/{REPO}.git/info/lfs/objects/batch"): Handler.lfs_batch,
    ("PUT", rf"/storage/{REPO}/(?P<oid>\w+)"): Handler.store,
    ("POST", f"/{REPO}.git/info/lfs/objects/verify"): Handler.verify,
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)"): Handler.commit,
    ("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?"): Handler.info,
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?"): Handler.tree,
    ("HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): Handler.resolve,
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): Handler.resolve,
}


def commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


def object_id(content: bytes, mode: str) -> str:
    """The id of a file's content: SHA-256 in LFS, git's own otherwise."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def faults_of_card(content: str) -> list[str]:
    """What the Hub would say against a card's metadata."""
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", content, re.DOTALL)
    if not front:
        return ["empty or missing yaml metadata in repo card"]
    metadata = yaml.safe_load(front[1])
    faults = []
    for key in ("library_name", "pipeline_tag", "license"):
        if key in metadata and not isinstance(metadata[key], str):
            faults.append(f'"{key}" must be a string')
    if metadata.get("license", "mit") not in LICENCES:
        faults.append('"license" must be one of the known ones')
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(value, str) for value in metadata.get(key, [])):
            faults.append(f'"{key}" must be an array of strings')
    faults += [f'"datasets" {value!r} is no id' for value in metadata.get("datasets", []) if not NAME.fullmatch(value)]
    if "base_model" in metadata and not NAME.fullmatch(metadata["base_model"]):
        faults.append(f'"base_model" {metadata["base_model"]!r} is no id')
    for model in metadata.get("model-index", []):
        if not isinstance(model.get("name"), str):
            faults.append('"model-index[0].name" is required')
        for result in model["results"]:
            faults += faults_of_result(result)
    return faults


def faults_of_result(result: dict) -> list[str]:
    faults = []
    if not isinstance(result.get("task", {}).get("type"), str):
        faults.append('"task.type" is required')
    dataset = result.get("dataset", {})
    if not isinstance(dataset.get("name"), str) or not NAME.fullmatch(str(dataset.get("type"))):
        faults.append(f'"dataset" needs a name and a type that matches the required pattern, not {dataset}')
    if not result.get("metrics"):
        faults.append('"metrics" is required')
    for metric in result.get("metrics", []):
        if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
            faults.append(f'"metrics" need a type and a value, not {metric}')
    return faults
