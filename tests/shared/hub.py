"""A stand-in of the Hugging Face Hub on loopback: what huggingface_hub asks for to push and read a data set.

The files of branch main of user/name are those of a folder, so that a test can look at them and damage them. Large
files travel as on the Hub, by the LFS batch protocol (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md),
small ones inside the commit. Xet, the Hub's other way for large files, is switched off.
"""

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tests.shared.servers import served

REPO = "user/name"


class HubServer:
    """State of the stand-in: folders of branches, uploaded objects by sha256, and the bodies of commits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.objects = folder, folder.with_name("objects")
        self.visibility: str | None = None
        self.commits: list[int] = []  # files in each commit

    def branch(self, revision: str) -> Path:
        return self.folder if revision == "main" else self.folder.with_name(f"{self.folder.name}@{revision}")

    def missing(self, code: str) -> Response:
        return JSONResponse({"error": code}, 404, {"X-Error-Code": code})

    def refusal(self, request: Request) -> Response | None:
        """The answer to a call about a repository or branch that is not there."""
        if request.path_params["repo"] != REPO or not self.folder.is_dir():
            return self.missing("RepoNotFound")
        return None if self.branch(request.path_params["revision"]).is_dir() else self.missing("RevisionNotFound")

    async def create(self, request: Request) -> Response:
        wanted = await request.json()
        assert wanted["type"] == "dataset" and f"{wanted['organization']}/{wanted['name']}" == REPO
        answer, new = {"url": f"https://huggingface.co/datasets/{REPO}"}, not self.folder.is_dir()
        if new:
            self.visibility = wanted.get("visibility") or ("private" if wanted.get("private") else "public")
            self.folder.mkdir()
        return JSONResponse(answer, 200 if new else 409)

    async def create_branch(self, request: Request) -> Response:
        branch = self.branch(request.path_params["revision"])
        if branch.is_dir():
            return JSONResponse({"error": "exists"}, 409)
        shutil.copytree(self.folder, branch)
        return JSONResponse({})

    async def read(self, request: Request) -> Response:
        path = self.branch(request.path_params["revision"]) / request.path_params["path"]
        return self.refusal(request) or (FileResponse(path) if path.is_file() else self.missing("EntryNotFound"))

    async def preupload(self, request: Request) -> Response:
        files = (await request.json())["files"]
        modes = [{"path": file["path"], "shouldIgnore": False,
                  "uploadMode": "regular" if file["path"].endswith(".json") else "lfs"} for file in files]  # fmt: skip
        return self.refusal(request) or JSONResponse({"files": modes})

    async def batch(self, request: Request) -> Response:
        objects = (await request.json())["objects"]
        for wanted in objects:
            if not (self.objects / wanted["oid"]).is_file():
                wanted["actions"] = {"upload": {"href": f"{request.base_url}objects/{wanted['oid']}"}}
        return JSONResponse({"objects": objects}, media_type="application/vnd.git-lfs+json")

    async def upload(self, request: Request) -> Response:
        data, oid = await request.body(), request.path_params["oid"]
        assert hashlib.sha256(data).hexdigest() == oid
        self.objects.mkdir(exist_ok=True)
        (self.objects / oid).write_bytes(data)
        return Response()

    async def commit(self, request: Request) -> Response:
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        files = [line["value"] for line in lines if line["key"] != "header"]
        for file in files:
            path = self.branch(request.path_params["revision"]) / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content(file))
        self.commits.append(len(files))
        return self.refusal(request) or JSONResponse(
            {"commitUrl": f"https://huggingface.co/datasets/{REPO}/commit/0", "commitOid": "0" * 40}
        )

    def content(self, file: dict[str, Any]) -> bytes:
        if "oid" in file:
            return (self.objects / file["oid"]).read_bytes()
        return base64.b64decode(file["content"])

    def app(self) -> Starlette:
        api = "/api/datasets/{repo:path}"
        return Starlette(routes=[
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route(api + "/branch/{revision}", self.create_branch, methods=["POST"]),
            Route(api + "/preupload/{revision}", self.preupload, methods=["POST"]),
            Route(api + "/commit/{revision}", self.commit, methods=["POST"]),
            Route("/datasets/{repo:path}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route("/objects/{oid}", self.upload, methods=["PUT"]),
            Route("/datasets/{repo:path}/resolve/{revision}/{path:path}", self.read, methods=["GET"]),
        ])  # fmt: skip


@contextmanager
def hub_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Hub with one data set, whose main branch is `folder` (absent: not created yet); yields its hf:// URL."""
    hub = HubServer(folder)
    with hub_address(hub, monkeypatch):
        yield f"hf://datasets/{REPO}"


@contextmanager
def hub_address(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve a stand-in and make huggingface_hub, here and in child processes, talk to it; yields its address."""
    from huggingface_hub import constants

    with served(hub.app()) as address:
        for name, value in {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test",
                            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", address)  # it read the environment when it was imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield address
