"""Real servers on loopback: web servers with and without ranges, S3, and the calls of Google's storage that we make."""

import asyncio
import json
import socket
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PIECE = 4096  # bytes at a time, of a server that drips


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """Python's own web server: whole files only."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def served(app: Any) -> Iterator[str]:
    """An ASGI app under uvicorn, on a port of its own."""
    import uvicorn

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def range_server(folder: Path, ranges: list[str] | None = None) -> Iterator[str]:
    """Starlette under uvicorn; the Range headers that are asked for are added to `ranges`."""
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    files = Starlette(routes=[Mount("/", StaticFiles(directory=folder, check_dir=False))])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        wanted = dict(scope.get("headers", ())).get(b"range")
        if wanted and ranges is not None:
            ranges.append(wanted.decode())
        await files(scope, receive, send)

    with served(app) as url:
        yield url


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Moto's S3, with an empty bucket; the environment says where it is."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", method=method)).close()
    yield "s3://bucket/team/latents.zarr"
    server.stop()


@contextmanager
def dripping_server(folder: Path, allowed: Callable[[str], int]) -> Iterator[str]:
    """A server of whole files that sends as many bytes of a path as are allowed by now, and waits for more."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    async def read(request: Request) -> Response:
        name = request.path_params["name"]
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""

        async def body() -> AsyncIterator[bytes]:
            sent = 0
            while sent < len(data) and not closing.is_set():
                piece = data[sent : min(allowed(name), sent + PIECE)]
                sent += len(piece)
                yield piece
                await asyncio.sleep(0 if piece else 0.01)

        headers = {"content-length": str(len(data))}
        return StreamingResponse(body(), headers=headers) if path.is_file() else Response(status_code=404)

    closing = threading.Event()
    with served(Starlette(routes=[Route("/{name:path}", read)])) as url:
        try:
            yield url
        finally:
            closing.set()


@contextmanager
def gs_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket whose objects are the files of `folder`'s parent, through the XML API; yields the URL of `folder`.

    https://cloud.google.com/storage/docs/xml-api/reference-methods: GET, PUT, and uploads in several parts.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route

    root, parts = folder.parent, dict[str, bytes]()

    async def read(request: Request) -> Response:
        path = root / request.path_params["name"]
        return FileResponse(path) if path.is_file() else Response(status_code=404)

    def stored(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def write(request: Request) -> Response:
        data, number = await request.body(), request.query_params.get("partNumber")
        if number is None:
            stored(root / request.path_params["name"], data)
        else:
            parts[number] = data
        return Response(headers={"ETag": f'"part{number}"', "x-goog-generation": "1"})

    async def begin_or_end(request: Request) -> Response:
        if "uploads" in request.query_params:
            parts.clear()
            return Response("<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
        stored(root / request.path_params["name"], b"".join(parts[number] for number in sorted(parts, key=int)))
        return Response("<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>",
                        headers={"x-goog-generation": "1"})  # fmt: skip

    place = "/bucket/{name:path}"
    app = Starlette(routes=[Route(place, read, methods=["GET"]), Route(place, write, methods=["PUT"]),
                            Route(place, begin_or_end, methods=["POST"])])  # fmt: skip
    with served(app) as address:
        account = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": "",
                   "private_key_id": ""}  # fmt: skip
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        yield f"gs://bucket/{folder.name}"
