"""A small Hugging Face Hub on loopback: repositories of one commit each that can be fetched, and pushed to.

with hub(tmp_path, {"user/toy": folder}) as server:
    status, out, err = server.run(["data", "check", "user/toy"])[0]
    server.fetched      # paths of the files that were fetched
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BRANCH = "main"


def commit_of(files):
    """A commit that depends on the content, as Git's."""
    return hashlib.sha1(json.dumps({path: oid(data) for path, data in sorted(files.items())}).encode()).hexdigest()


def oid(data):
    return hashlib.sha1(data).hexdigest()


@dataclass
class Hub:
    """State of the server.

    Attributes:
        repositories: by type and name ("datasets/user/toy", "models/user/policy"), the files of the only commit.
        tags: by repository, tag to commit.
        gated: repositories that ask for consent.
        fetched: paths of the files that were fetched.
        asked: number of requests.
        home: the client's cache.
    """

    home: Path
    repositories: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    gated: set = field(default_factory=set)
    fetched: list = field(default_factory=list)
    asked: int = 0
    address: str = ""

    def run(self, *steps, **environment):
        """Run steps in one fresh process with this Hub, whose address huggingface_hub reads only once.

        Args:
            steps: each the arguments of a vlaflow command, or the name of a data set to open.
            environment: further environment variables.

        Returns:
            For each step (exit status, standard output, standard error); a data set prints its rows, the frames of its first
            episode, its origin and its fingerprint.
        """
        base = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        base |= {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_x"}
        base |= {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", STEPS, json.dumps(steps)],
            capture_output=True,
            text=True,
            check=False,
            env={**base, **environment},
            cwd=self.home,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


STEPS = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from vlaflow.cli.main import main
from vlaflow.hub import origin
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import VlaflowError

def opened(name):
    try:
        dataset = Dataset.open(name)
        print(len(dataset), len(dataset.frames(0, "corner")), origin(dataset.root), dataset.fingerprint)
    except VlaflowError as error:
        sys.stderr.write(f"{error}\\n")
        return 2
    return 0

results = []
for step in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = opened(step) if isinstance(step, str) else main(step)
    results.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


def read_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def hub(home, folders, checkpoints=()):
    """A running Hub with data sets and checkpoints, by repository name."""
    state = Hub(home)
    state.repositories |= {f"datasets/{name}": read_folder(folder) for name, folder in folders.items()}
    state.repositories |= {f"models/{name}": read_folder(folder) for name, folder in dict(checkpoints).items()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            state.asked += 1
            path = unquote(urlsplit(self.path).path).lstrip("/")
            if path.startswith("api/"):
                kind, user, name, what, *rest = [*path.removeprefix("api/").split("/"), ""]
                key = f"{kind}/{user}/{name}"
                files = self._files(key, rest[0] if rest else "")
                if files is None:
                    return
                if what == "revision":
                    listed = [{"rfilename": each} for each in files]
                    self._json({"id": f"{user}/{name}", "sha": commit_of(files), "siblings": listed})
                else:
                    self._json([{"type": "file", "path": p, "size": len(d), "oid": oid(d)} for p, d in files.items()])
                return
            path = path if path.startswith("datasets/") else f"models/{path}"
            kind, user, name, _, revision, file = path.split("/", 5)
            files = self._files(f"{kind}/{user}/{name}", revision)
            if files is None:
                return
            if file not in files:
                self._refuse(404, "EntryNotFound")
                return
            data = files[file]
            if self.command == "GET":
                state.fetched.append(file)
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit_of(files))
            self.send_header("ETag", f'"{oid(data)}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path).removeprefix("/api/")
            if path == "repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                state.repositories.setdefault(f"{asked['type']}s/{name}", {})
                self._json({"url": f"{state.address}/datasets/{name}"})
                return
            if path == "validate-yaml":
                self._json({"errors": [], "warnings": []})
                return
            kind, user, name, what, *rest = path.split("/")
            key = f"{kind}/{user}/{name}"
            if what == "preupload":
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                self._json({"files": files})
            elif what == "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.repositories[key][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = commit_of(state.repositories[key])
                self._json({"success": True, "commitUrl": f"{state.address}/{key}/commit/{commit}", "commitOid": commit})
            else:
                state.tags.setdefault(key, {})[json.loads(body)["tag"]] = rest[0]
                self._json({})

        def do_DELETE(self):
            kind, user, name, _, tag = unquote(urlsplit(self.path).path).removeprefix("/api/").split("/")
            if state.tags.get(f"{kind}/{user}/{name}", {}).pop(tag, None) is None:
                self._refuse(404, "RevisionNotFound")
            else:
                self._json({})

        def _files(self, key, revision):
            """Files of a repository; None after a refusal."""
            files = state.repositories.get(key)
            if key in state.gated:
                self._refuse(403, "GatedRepo")
            elif files is None:
                self._refuse(404, "RepoNotFound")
            elif revision not in (BRANCH, commit_of(files), *state.tags.get(key, {})):
                self._refuse(404, "RevisionNotFound")
            else:
                return files
            return None

        def _refuse(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
