"""A Hub on this machine: the part of its HTTP API that huggingface_hub uses to make, fill, list and read model repos, and
to list and read data sets.

Blobs go by git-lfs; with HF_HUB_DISABLE_XET=1 huggingface_hub uploads that way. `failures` says how many uploads to refuse first.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Repos in memory: {name: [files of each commit]}, files being {path: bytes}.

    `tags` are {repo: {tag: number of the commit}}, `gated` the repos that nobody has access to, and `read` are the paths of
    all files that were asked for.
    """

    def __init__(self):
        self.repos = {}
        self.tags = {}
        self.gated = set()
        self.read = []
        self.blobs = {}
        self.failures = 0
        self.ranges = 0  # parts of files that were asked for
        self.tokens = set()
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_any(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                hub.tokens.add(self.headers.get("Authorization"))
                path = urllib.parse.unquote(self.path.partition("?")[0])
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                with hub.lock:  # two commits at a time would each drop the other's files
                    status, headers, answer = hub.answer(self.command, path, body, self.headers.get("Host"))
                if not isinstance(answer, bytes):
                    headers, answer = {**headers, "Content-Type": "application/json"}, json.dumps(answer).encode()
                if asked and status == 200:
                    start, end = int(asked[1]), min(len(answer), int(asked[2]) + 1)
                    headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(answer)}"}
                    status, answer = 206, answer[start:end]
                    hub.ranges += 1
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add_dataset(self, repo: str, folder: Path) -> None:
        """Publish the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos[repo] = [files]

    def answer(self, method: str, path: str, body: bytes, host: str):
        """(status, headers, body) of a request."""
        if path == "/api/whoami-v2":
            return 200, {}, {"name": "me", "type": "user", "orgs": []}
        if path == "/api/repos/create":
            name = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
            name = name if "/" in name else f"me/{name}"
            self.repos.setdefault(name, [{}])
            return 200, {}, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":  # of a model card
            return 200, {}, {"errors": [], "warnings": []}
        if method == "PUT" and path.startswith("/blobs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}, b""
        if match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            return 200, {}, {"transfer": "basic", "objects": [self.upload_of(entry) for entry in objects]}
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/refs", path):
            return self.refs(match[1])
        if match := re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)/(preupload|commit|tree|revision)/([^/]+)", path
        ):
            return self.api(*match.groups(), body)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            return self.paths_info(*match.groups(), body)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/(.+)", path):
            return self.tree(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self.api(match[1], "revision", "main", body)
        if match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.read.append(match[3])
            return self.file(*match.groups())
        return 404, {"X-Error-Code": "RepoNotFound"}, {"error": path}

    def upload_of(self, entry: dict) -> dict:
        known = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] in self.blobs:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.url}/blobs/{entry['oid']}"}}}

    def refs(self, repo: str):
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.commit_of(repo, "main")[0]}
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": f"{number:040x}"}
            for tag, number in self.tags.get(repo, {}).items()
        ]
        return 200, {}, {"branches": [main], "tags": tags, "converts": []}

    def commit_of(self, repo: str, revision: str):
        commits = self.repos[repo]
        if revision in self.tags.get(repo, {}):
            revision = f"{self.tags[repo][revision]:040x}"
        names = {f"{number:040x}": files for number, files in enumerate(commits)}
        name = f"{len(commits) - 1:040x}" if revision == "main" else revision
        return name, names.get(name)

    def api(self, repo: str, what: str, revision: str, body: bytes):
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        name, files = self.commit_of(repo, revision)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Revision not found"}
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return (
                200,
                {},
                {"id": repo, "modelId": repo, "sha": name, "siblings": siblings, "private": False, "tags": []},
            )
        if what == "tree":
            entries = [{"type": "file", "path": p, "size": len(data), "oid": name} for p, data in files.items()]
            return 200, {}, entries
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": mode_of(f["path"]), "shouldIgnore": False} for f in asked]
            return 200, {}, {"files": modes}
        if self.failures > 0:
            self.failures -= 1
            return 400, {}, {"error": "not now"}
        fresh = dict(files)
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                fresh[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                fresh[value["path"]] = self.blobs[value["oid"]]
        self.repos[repo].append(fresh)
        name = f"{len(self.repos[repo]) - 1:040x}"
        return 200, {}, {"commitUrl": f"{self.url}/{repo}/commit/{name}", "commitOid": name, "pullRequestUrl": None}

    def paths_info(self, repo: str, revision: str, body: bytes):
        """Facts of files and folders; those that are not there are left out."""
        name, files = self.commit_of(repo, revision)
        asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
        entries = []
        for path in asked:
            if path in files:
                entries.append({"type": "file", "path": path, "size": len(files[path]), "oid": name})
            elif any(other.startswith(f"{path}/") for other in files):
                entries.append({"type": "directory", "path": path, "oid": name})
        return 200, {}, entries

    def tree(self, repo: str, revision: str, folder: str):
        name, files = self.commit_of(repo, revision)
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/")}
        return 200, {}, [{"type": "file", "path": p, "size": len(data), "oid": name} for p, data in inside.items()]

    def file(self, repo: str, revision: str, path: str):
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, {"error": "Access to this repo is restricted"}
        name, files = self.commit_of(repo, revision)
        if files is None or path not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
        data = files[path]
        return 200, {"X-Repo-Commit": name, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data


def mode_of(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".pth", ".png")) else "regular"


def connect(monkeypatch, server: Hub) -> None:
    """Make huggingface_hub talk to this server and to no other."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
