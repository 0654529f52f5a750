"""A stand-in of the Hugging Face Hub for repositories of models, as tests/shared/hub.py is for data sets."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.shared.hub import REPO, HubServer


class ModelHub(HubServer):
    """The stand-in for repositories of models: other addresses, the same protocol."""

    async def create(self, request: Request) -> Response:
        wanted = await request.json()
        assert wanted.get("type", "model") == "model" and f"{wanted['organization']}/{wanted['name']}" == REPO
        self.visibility = "private" if wanted.get("private") or wanted.get("visibility") == "private" else "public"
        self.folder.mkdir(exist_ok=True)
        return JSONResponse({"url": f"https://huggingface.co/{REPO}"})

    async def validate(self, request: Request) -> Response:
        assert (await request.json())["content"].startswith("---\n")
        return JSONResponse({"errors": [], "warnings": []})

    async def commit(self, request: Request) -> Response:
        await super().commit(request)
        return JSONResponse({"commitUrl": f"https://huggingface.co/{REPO}/commit/0", "commitOid": "0" * 40})

    def app(self) -> Any:
        app, known = super().app(), "/api/models/{repo:path}"
        app.router.routes += [
            Route(known + "/preupload/{revision}", self.preupload, methods=["POST"]),
            Route(known + "/commit/{revision}", self.commit, methods=["POST"]),
            Route("/api/validate-yaml", self.validate, methods=["POST"]),
            Route("/{repo:path}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
        ]
        return app
