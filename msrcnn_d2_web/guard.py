"""Which requests the server answers."""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["Guard"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# What the page and its scripts ask for, and no more: Gradio also has addresses for the server's
# files, for other hosts' pages, for uploads into its own folder, and for programs
ALLOWED = {
    "GET": re.compile(
        r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/[\w./-]+"
        r"|/gradio_api/(startup-events|queue/data|heartbeat/\w+)"
        r"|/images/[\w-]+/(picture|predictions)"
    ),
    "POST": re.compile(r"/images|/gradio_api/(queue/join|reset|cancel)/?"),
}
ALLOWED["HEAD"] = ALLOWED["GET"]
MAX_JSON = 65536  # bytes of what a user does, such as the positions of the sliders
# The browser loads nothing from other hosts. Gradio's components are made of inline scripts
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """
    Middleware that refuses all requests but those that the page needs.

    In what a user does, only text, numbers and truth values get through. Gradio takes a dict with a
    path or an address for a file, wherever it is, and would read it.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        allowed = ALLOWED.get(scope.get("method", ""))
        path = scope["path"]
        if scope["type"] != "http" or not allowed or not allowed.fullmatch(path) or ".." in path:
            return await _refuse(scope, send, 404, "There is nothing here.")
        if path == "/":
            scope = {**scope, "query_string": b""}  # it could name a saved page
        if scope["method"] == "POST" and path != "/images":
            request = _harmless(await _body(receive))
            if request is None:
                return await _refuse(scope, send, 400, "This page does not send such a request.")
            # What was checked, not what was sent: parsers may understand a text differently
            body = json.dumps(request).encode()
            other = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            scope, receive = {**scope, "headers": [*other, length]}, _replaying(body, receive)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _harmless(body: bytes) -> dict | None:
    """What a user does, or None if it has values other than text, numbers and truth values."""
    try:
        request = json.loads(body)
    except ValueError:
        return None
    if not isinstance(request, dict):
        return None
    data, event = request.get("data") or [], request.get("event_data") or {}
    if not isinstance(data, list) or not isinstance(event, dict):
        return None
    rest = [value for key, value in request.items() if key not in ("data", "event_data")]
    values = [*data, *event.values(), *rest]
    if not all(value is None or isinstance(value, (str, int, float)) for value in values):
        return None
    return request


async def _body(receive: Receive) -> bytes:
    """The body of a request; nothing if it is too long or incomplete."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += message.get("body", b"")
        if len(body) > MAX_JSON:
            return b""
        if not message.get("more_body"):
            return body


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and then what follows."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return replay


async def _refuse(scope: Scope, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": message.encode()})
