"""The rank explorer's page, served to this machine alone."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import webbrowser
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from tensormoe.choosing import Session
from tensormoe.cli._profile import MEASURED, measured_devices, resolve_device
from tensormoe.errors import SpecError, TensormoeError
from tensormoe.factorizations import FACTORIZATIONS

__all__ = ["LARGEST", "ChoosingServer", "run_choose"]

LARGEST = 2**16
"""Bytes of the largest request that is read."""

_ADDRESS = "127.0.0.1"
_NAMES = (_ADDRESS, "localhost")
_LAST_PORT = 2**16 - 1
_SECONDS = 30
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def run_choose(arguments: argparse.Namespace) -> None:
    """Serve until interrupted."""
    server = ChoosingServer(_port(arguments.port))
    print(f"The rank explorer is at {server.url}", "Ctrl-C ends it.", sep="\n", flush=True)
    if arguments.browser:
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        # the usual end, and no error
        print()
    finally:
        server.server_close()


class ChoosingServer(ThreadingHTTPServer):
    """The page and its questions, on the loopback interface.

    Args:
        port: 0 for one that is free.

    Raises:
        SpecError: the port is in use, or not for this user.
    """

    daemon_threads = True
    # what another program has answered on before is not taken over
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, port: int) -> None:
        self.pages = _pages()
        session = Session()
        try:
            super().__init__((_ADDRESS, port), partial(_Handler, session))
        except OSError as error:
            raise SpecError(
                f"--port must be free; {port} can't be used: {error.strerror}. Pass another one, "
                "or --port 0 for any that is free."
            ) from None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{_ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that a browser of this machine calls the server by."""
        return tuple(f"{name}:{self.server_port}" for name in _NAMES)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away; of anything else, what Python says."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection. The page is read from a table, so that no path leads to other files."""

    protocol_version = "HTTP/1.1"
    server_version = "tensormoe"
    sys_version = ""
    timeout = _SECONDS
    server: ChoosingServer

    def __init__(self, session: Session, *arguments: Any) -> None:
        self._session = session
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """A file of the page."""
        if not self._is_ours():
            return
        name = self.path.partition("?")[0].removeprefix("/") or "index.html"
        body = _engine() if name == "engine.json" else self.server.pages.get(name)
        if body is None:
            self._refuse(HTTPStatus.NOT_FOUND, "no such file")
        else:
            self._answer(HTTPStatus.OK, body, _TYPES[name.rpartition(".")[2]])

    def do_POST(self) -> None:
        """An answer to a question."""
        if not self._is_ours():
            return
        if self.path != "/explore":
            return self._refuse(HTTPStatus.NOT_FOUND, "questions go to /explore")
        if self.headers.get_content_type() != "application/json":
            # of other types a browser sends what any page asks it to
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a question must be JSON")
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit():
            return self._refuse(HTTPStatus.LENGTH_REQUIRED, "a question must have a length")
        if len(size) > len(str(LARGEST)) or int(size) > LARGEST:
            text = f"a question must have at most {LARGEST:,} bytes"
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        try:
            question = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            return self._refuse(HTTPStatus.BAD_REQUEST, "a question must be valid JSON")
        body = json.dumps(_explored(self._session, question)).encode()
        self._answer(HTTPStatus.OK, body, _TYPES["json"])

    def _is_ours(self) -> bool:
        """Whether the page asks that this server sent, and no other site by way of a browser.

        A name that leads here only now is not the server's; a page of another origin says so.
        """
        hosts = self.server.hosts
        if self.headers.get_all("Host") not in [[host] for host in hosts]:
            self._refuse(HTTPStatus.FORBIDDEN, f"the host must be {hosts[0]}")
            return False
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in hosts]:
            self._refuse(HTTPStatus.FORBIDDEN, "questions must come from this server's own page")
            return False
        return True

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # what was not read of the request must not be taken for the next one
        self.close_connection = True
        self._answer(status, f"{reason}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests of a page are no news."""


def _explored(session: Session, question: Any) -> dict[str, Any]:
    """The response, with a measured profile in place of its name."""
    device = question.get("device") if isinstance(question, Mapping) else None
    if device in MEASURED:
        try:
            question = {**question, "device": resolve_device(device)}
        except TensormoeError as error:
            return {"errors": [{"field": "device", "message": str(error)}]}
    return session.explore(question)


def _engine() -> bytes:
    """A server of the page and of answers to its questions, with what it knows beyond the page."""
    known = {
        "engine": "server",
        "measured": measured_devices(),
        "factorizations": list(FACTORIZATIONS),
    }
    return json.dumps(known).encode()


def _pages() -> dict[str, bytes]:
    """Files of the page, by name."""
    folder = files("tensormoe.choosing").joinpath("page")
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or int(text) > _LAST_PORT:
        raise SpecError(f"--port must be a number up to {_LAST_PORT}; got {text!r}.")
    return int(text)
