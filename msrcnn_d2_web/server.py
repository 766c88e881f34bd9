"""The server: the page, uploads and downloads."""

import errno
import logging
import os
import secrets
import socket
import threading
import urllib.parse
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

# Before Gradio is imported: it tells nobody that it is used
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.predictor import Predictor

from .analysis import Analyser, Analysis, View
from .guard import Guard
from .page import Page
from .pictures import full_picture, predictions_json, stem_of
from .store import AnalysisStore

__all__ = ["address_of", "build_app", "listen", "serve", "server_of", "share"]

logger = logging.getLogger(__name__)

MAX_WAITING = 16  # uploads that wait for the model; each takes memory
STOPPING = 2  # seconds in which open connections may finish when the server stops


def build_app(
    predictor: Predictor,
    *,
    title: str,
    examples: Sequence[Path] = (),
    max_upload_mb: int = 20,
    max_pixels: int | None = None,
    where_it_goes: str = "it stays on this computer",
) -> FastAPI:
    """
    Args:
        predictor: whose model users try.
        title, examples, max_upload_mb, where_it_goes: as for :class:`Page`.
        max_pixels: as for :class:`Analyser`.

    Returns:
        the server as an ASGI application.

    Raises:
        UserError: the model does not work, or an example is no image.
    """
    analyser, store = Analyser(predictor, max_pixels), AnalysisStore()
    page = Page(
        analyser,
        store,
        title=title,
        examples=examples,
        max_upload_mb=max_upload_mb,
        where_it_goes=where_it_goes,
    )
    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard)
    waiting = 0
    downloads = threading.Lock()  # large pictures take much memory

    @app.post("/images")
    async def upload(request: Request) -> Response:
        nonlocal waiting
        # Pages of other hosts cannot send this header
        name = urllib.parse.unquote(request.headers.get("x-file-name", ""))[:255]
        if not name:
            return _message(400, "The request has no file name.")
        if waiting >= MAX_WAITING:
            return _message(503, "Many images are waiting for the model: try again in a minute.")
        waiting += 1
        try:
            data = bytearray()
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_upload_mb * 1_000_000:
                    return _message(413, f"This page takes files of up to {max_upload_mb} MB.")
            analysis = await run_in_threadpool(analyser.analyse, name, bytes(data))
        except UserError as error:
            return _message(422, str(error))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            logger.exception("The model failed on an uploaded image")
            kind = type(error).__name__
            return _message(500, f"The model failed on this image ({kind}); the terminal says why.")
        finally:
            waiting -= 1
        return JSONResponse({"key": store.add(analysis)})

    @app.get("/images/{key}/{what}")
    async def download(key: str, what: str, request: Request) -> Response:
        analysis = store.get(key)
        if analysis is None:
            return _message(404, "The server does not have this image any more: upload it again.")
        view = _view(page, request)
        if view is None:
            return _message(400, "The address of this download is wrong.")
        return await run_in_threadpool(_file, page, analysis, view, what, downloads)

    css = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return gr.mount_gradio_app(
        app,
        page.blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        head=f"<style>\n{css}</style>",  # Gradio would rewrite rules that are given as css
        allowed_paths=[],
        blocked_paths=[os.path.abspath(os.sep)],
    )


def theme() -> gr.themes.Base:
    """Fonts of the reader's system: others would be fetched from the internet."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    return gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)


def listen(host: str, port: int) -> socket.socket:
    """
    Returns:
        a socket to which browsers can connect.

    Raises:
        UserError: the port is in use, or the host is not this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"'{host}' is not a name or an address of this machine.") from None
        raise UserError(
            f"The page cannot be served at {host}, port {port} ({error.strerror}): give another "
            "port, or 0 for any that is free."
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the page."""
    host, port = _local(listener)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def share(listener: socket.socket) -> str:
    """
    Returns:
        a public address that leads to the page, until the process ends.

    Raises:
        UserError: Gradio's servers do not give one.
    """
    from gradio import networking

    try:
        return networking.setup_tunnel(*_local(listener), secrets.token_urlsafe(32), None, None)
    except Exception as error:  # a network can fail in many ways
        raise UserError(
            "Gradio's servers gave no public address "
            f"({str(error).rstrip('.')}): is there access to the internet? "
            "Without --share, the page is for this computer."
        ) from error


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests until the process is told to stop, by Ctrl-C for example."""
    server_of(app).run(sockets=[listener])


def server_of(app: FastAPI) -> uvicorn.Server:
    """A server that is not started yet."""
    return _Server(
        uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=STOPPING, lifespan="on")
    )


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Every open page has a request that never ends; to cancel it is no error
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def _local(listener: socket.socket) -> tuple[str, int]:
    """Host and port of the page for this machine."""
    host, port = listener.getsockname()[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _file(page: Page, analysis: Analysis, view: View, what: str, lock: threading.Lock) -> Response:
    if what == "picture":
        with lock:
            data, suffix = full_picture(analysis, view, page.class_names, page.analyser.settings)
        kind = "image/jpeg" if suffix == ".jpg" else "image/png"
    else:
        data = predictions_json(analysis, view, page.class_names).encode()
        kind, suffix = "application/json", ".json"
    name = urllib.parse.quote(f"{stem_of(analysis)}_predictions{suffix}")
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}"}
    return Response(data, media_type=kind, headers={**headers, "Cache-Control": "no-store"})


def _view(page: Page, request: Request) -> View | None:
    """What the address of a download asks for, or None if it makes no sense."""
    query = request.query_params
    ranking = query.get("ranking")
    if ranking not in [score.field for score in page.rankings]:
        return None
    try:
        return page.view([ranking, *(query.get(score.field, 0) for score in page.scores)])
    except ValueError:
        return None


def _message(status: int, message: str) -> Response:
    return JSONResponse({"message": message}, status_code=status)
