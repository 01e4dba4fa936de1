"""The local server: whom it answers, what it refuses, and that its answers are `explore`'s."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tensormoe.choosing import explore
from tensormoe.cli._server import LARGEST, ChoosingServer
from tensormoe.errors import SpecError
from tensormoe.planning import Roofline

QUESTION = {"in_features": 96, "out_features": 64, "experts": "8x4"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[ChoosingServer]:
    with ChoosingServer(0) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def send(
    server: ChoosingServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[HTTPResponse, bytes]:
    """A request with a sound host unless another is given; underscores are dashes."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host="Host" in given, skip_accept_encoding=True)
    for name, value in given.items():
        connection.putheader(name, value)
    if body is not None and "Content-Length" not in given:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    found = response.read()
    connection.close()
    return response, found


def ask(server: ChoosingServer, question: Any, **headers: str) -> tuple[HTTPResponse, bytes]:
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    return send(
        server, "POST", "/explore", body, **{"Content_Type": JSON["Content-Type"], **headers}
    )


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        {**QUESTION, "parts": ["rows"], "kind": "mlp", "budget": {"flops": "20M"}},
        {**QUESTION, "in_features": "many", "batch": 0},
        {"experts": "<img src=x onerror=alert(1)>"},
        [],
        "a question",
        None,
        {**QUESTION, "in_features": 10**30},
        {**QUESTION, "experts": 10**300},
        {**QUESTION, "budget": {"time": 1e-300}},
    ],
)
def test_answers_are_those_of_explore(server: ChoosingServer, question: Any) -> None:
    response, body = ask(server, question)
    assert response.status == 200, body
    assert response.getheader("Content-Type") == "application/json"
    assert json.loads(body) == json.loads(json.dumps(explore(question)))


def test_the_measured_profile(
    server: ChoosingServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "roofline.json"
    monkeypatch.setattr("tensormoe.cli._profile.profile_path", lambda: path)
    asked = {**QUESTION, "device": "this", "parts": ["rows"]}
    [error] = json.loads(ask(server, asked)[1])["errors"]
    assert error["field"] == "device"
    assert "tensormoe calibrate" in error["message"]
    assert json.loads(send(server, "GET", "/engine.json")[1])["measured"] == []
    device = Roofline("mine", 1e11, 1e9, 1e10, 1e-6).to_dict()
    path.write_text(json.dumps(device))
    response = json.loads(ask(server, asked)[1])
    assert response["request"]["device"]["name"] == "mine"
    assert response["rows"] == explore({**asked, "device": device})["rows"]
    assert json.loads(send(server, "GET", "/engine.json")[1])["measured"] == ["this"]
    # of several libraries, one with other threads than there are now
    others = {"torch": {**device, "name": "theirs", "threads": None}}
    others |= {"numpy": device, "jax": {**device, "threads": 999}}
    path.write_text(json.dumps({"profiles": others}))
    measured = json.loads(send(server, "GET", "/engine.json")[1])["measured"]
    assert measured == ["this-numpy", "this-torch"]
    response = json.loads(ask(server, {**asked, "device": "this-torch"})[1])
    assert response["request"]["device"]["name"] == "theirs"
    [error] = json.loads(ask(server, asked)[1])["errors"]
    assert "this-numpy or this-torch" in error["message"]


def test_the_page_and_its_headers(server: ChoosingServer) -> None:
    for path in ("/", "/?a=1", "/index.html", "/page.css", "/main.js", "/engine.json"):
        response, body = send(server, "GET", path)
        assert response.status == 200
        assert body
        policy = response.getheader("Content-Security-Policy") or ""
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert response.getheader("Cross-Origin-Resource-Policy") == "same-origin"
        assert response.getheader("Access-Control-Allow-Origin") is None
    assert send(server, "GET", "/main.js")[0].getheader("Content-Type") == (
        "text/javascript; charset=utf-8"
    )


@pytest.mark.parametrize(
    "path",
    [
        "/../_session.py",
        "/..%2f_session.py",
        "/%2e%2e/_session.py",
        "//etc/passwd",
        "/etc/passwd",
        "/page/../main.js",
        "/..\\_session.py",
        "/explore",
        "/__init__.py",
    ],
)
def test_no_other_files(server: ChoosingServer, path: str) -> None:
    response, body = send(server, "GET", path)
    assert response.status == 404
    assert body == b"no such file\n"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost", ""]
)
def test_other_hosts_are_refused(server: ChoosingServer, host: str) -> None:
    host = host.format(port=server.server_port)
    for method, path, body in (("GET", "/", None), ("POST", "/explore", b"{}")):
        response, said = send(
            server, method, path, body, Host=host, Content_Type=JSON["Content-Type"]
        )
        assert response.status == 403
        assert b"the host must be" in said


def test_both_names_of_this_machine(server: ChoosingServer) -> None:
    for host in server.hosts:
        assert ask(server, QUESTION, Host=host, Origin=f"http://{host}")[0].status == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1", ""]
)
def test_other_origins_are_refused(server: ChoosingServer, origin: str) -> None:
    origin = origin.format(port=server.server_port)
    response, said = ask(server, QUESTION, Origin=origin)
    assert response.status == 403
    assert b"own page" in said


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_forms_send_is_refused(server: ChoosingServer, kind: str) -> None:
    assert ask(server, QUESTION, Content_Type=kind)[0].status == 415


def test_large_bodies_are_refused_unread(server: ChoosingServer) -> None:
    for size in (LARGEST + 1, 10**18, 10**400):
        response, said = send(
            server,
            "POST",
            "/explore",
            None,
            Content_Length=str(size),
            **{"Content_Type": JSON["Content-Type"]},
        )
        assert response.status == 413
        assert f"{LARGEST:,} bytes".encode() in said
    just = json.dumps(QUESTION).encode().ljust(LARGEST)
    assert ask(server, just)[0].status == 200


@pytest.mark.parametrize("length", ["", "-1", "1e3", "+5", "٣"])
def test_a_length_must_be_a_number(server: ChoosingServer, length: str) -> None:
    sent = length.encode("utf-8").decode("latin-1")
    response, _ = send(
        server, "POST", "/explore", b"{}", Content_Length=sent, Content_Type=JSON["Content-Type"]
    )
    assert response.status == 411


@pytest.mark.parametrize(
    "junk",
    [b"", b"{", b"\xff\xfe", b"[" * 60_000, b"1" * 60_000, b'{"a": 1} {', b"\x00"],
)
def test_junk_is_refused(server: ChoosingServer, junk: bytes) -> None:
    response, said = ask(server, junk)
    assert response.status == 400
    assert said == b"a question must be valid JSON\n"


def test_other_methods_and_paths(server: ChoosingServer) -> None:
    assert send(server, "PUT", "/explore", b"{}")[0].status == 501
    assert send(server, "OPTIONS", "/explore")[0].status == 501
    assert send(server, "POST", "/", b"{}", Content_Type=JSON["Content-Type"])[0].status == 404


def test_only_this_machine(server: ChoosingServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            SpecError, match=f"--port must be free; {port} can't be used: .*--port 0"
        ):
            ChoosingServer(port)


def command(*words: str, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tensormoe.cli", "choose", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell that runs this in the background has interrupts ignored
        preexec_fn=_interruptible if sys.platform != "win32" else None,
        **more,
    )


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_command_ends_quietly() -> None:
    process = command("--port", "0", "--no-browser")
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("The rank explorer is at http://127.0.0.1:")
        port = int(line.rstrip("/\n").rpartition(":")[2])
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("port", ["-1", "65536", "a", "", "1e3"])
def test_ports_that_are_none(port: str) -> None:
    process = command(f"--port={port}", "--no-browser")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(f"error: --port must be a number up to 65535; got {port!r}")
