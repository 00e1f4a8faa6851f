"""The labelling page on this machine: answers requests that carry the token of the address, and no others.

    GET  /TOKEN/             the page
    GET  /TOKEN/state        which pair is next, as JSON
    GET  /TOKEN/image/3/0    the left image of pair 3 as it is shown; 1 is the right one
    POST /TOKEN/press        {"choice": "left", "right", "tie" or "undo", "at": "at" of the state that was seen}

Other pages that are open in the same browser must not be able to read images or to label: without the token there is
nothing, a name that somebody made resolve to 127.0.0.1 is refused, and no answer may be framed or kept.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import secrets
import shlex
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from spo_jax.errors import UserError
from spo_jax.files import write_text
from spo_jax.formats.json_files import Json
from spo_jax.labelling import page
from spo_jax.labelling.log import Log
from spo_jax.labelling.session import CHOICES, Pair, apply, left_of, record_of, replay, shown, table_of

MAX_BODY = 10_000
HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": page.POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """An answer that is an error: its status and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Desk:
    """A session with its files: ``session/labels.jsonl``, the log, and ``pairs.jsonl``, which follows from it.

    Raises:
      UserError: another command has the log open, or it does not fit these pairs.
    """

    def __init__(self, folder: Path, pairs: Sequence[Pair], seed: int) -> None:
        self.folder, self.pairs, self.seed = folder, pairs, seed
        place = folder / "session" / "labels.jsonl"
        self._log = Log(place)
        self.labels = replay(self._log.records, len(pairs), str(place))
        self._at = len(self._log.records)
        self._lock = threading.Lock()
        self._write_table()

    def state(self) -> Json:
        """What the page shows: the next pair, or that there is none."""
        with self._lock:
            return self._state()

    def press(self, choice: str, at: int) -> Json:
        """Adds a label or undoes one, durably, and says what comes next.

        Raises:
          Refused: the page that sent it had not seen the last press, of another window for example.
          OSError: it could not be written.
        """
        with self._lock:
            if at != self._at:
                raise Refused(HTTPStatus.CONFLICT, "Another window has labelled meanwhile.")
            number = len(self.labels)
            record = record_of(choice, self.labels, len(self.pairs), left_of(self.seed, number))
            if record is not None:
                self._log.append(record)
                self._at += 1
                apply(record, self.labels, len(self.pairs))
                self._write_table()
            return self._state()

    def image(self, number: int, side: int) -> Path | None:
        """The file of an image as it is shown, 0 left and 1 right; None if there is no such pair."""
        if number >= len(self.pairs):
            return None
        return self.folder / shown(self.pairs[number], left_of(self.seed, number))[side]

    def close(self) -> None:
        """Lets another command go on."""
        self._log.close()

    def _state(self) -> Json:
        number, total = len(self.labels), len(self.pairs)
        caption = self.pairs[number].caption if number < total else ""
        told = {"at": self._at, "number": number, "total": total, "caption": caption}
        whole = self.folder.resolve()
        command = shlex.join(["python", "-m", "spo_jax.prepare", f"--source={self.folder}", "--out=data/mine"])
        places = {"pairs": str(whole / "pairs.jsonl"), "images": str(whole / "images"), "next": command}
        return told | places | {"ties": self.labels.count(0.5)}

    def _write_table(self) -> None:
        write_text(self.folder / "pairs.jsonl", table_of(self.pairs, self.labels))


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # that of HTTPServer asks the network for the machine's name
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the browser has gone
            super().handle_error(request, client_address)


def make_server(desk: Desk, token: str, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of the desk on the loopback; ``serve_forever`` runs it. Port 0 takes a free one.

    Raises:
      UserError: the port is taken.
    """

    class Handler(_Handler):
        pass

    Handler.desk, Handler.token = desk, token
    try:
        return _Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port={port} cannot be used ({error.strerror}); leave it out for a free one.") from error


def address_of(server: http.server.ThreadingHTTPServer, token: str) -> str:
    """The address to open in a browser."""
    return f"http://127.0.0.1:{server.server_port}/{token}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    desk: Desk
    token: str
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a connection may be silent

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, make: Callable[[str], tuple[str, bytes]]) -> None:
        try:
            kind, body = make(self._checked_path())
        except Refused as error:
            self.send_error(error.status, str(error))
        except OSError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"Not written: {error.strerror or 'unknown error'}.")
        else:
            self._send(HTTPStatus.OK, kind, body)

    def _checked_path(self) -> str:
        """What follows the token in the path, of a request that may have an answer."""
        hosts = self.headers.get_all("Host") or []
        # Any port: it is another one at the other end of an SSH tunnel.
        if len(hosts) != 1 or re.sub(r":[0-9]*$", "", hosts[0].strip()).lower() not in HOSTS:
            raise Refused(HTTPStatus.FORBIDDEN, "Open the page at 127.0.0.1 or localhost.")
        _, token, *rest = (*self.path.split("/", 2), "")
        if not self.path.startswith("/") or not secrets.compare_digest(token.encode(), self.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "Open the address that the command has printed last.")
        return rest[0]

    def _get(self, path: str) -> tuple[str, bytes]:
        if path == "" and self.path.endswith("/"):
            return "text/html; charset=utf-8", page.PAGE.encode()
        if path == "state":
            return _json(self.desk.state())
        if match := re.fullmatch(r"image/([0-9]{1,9})/([01])", path):
            file = self.desk.image(int(match[1]), int(match[2]))
            if file is not None and file.is_file():
                return "image/png", file.read_bytes()
        raise self._no_such("press", path)

    def _post(self, path: str) -> tuple[str, bytes]:
        if path != "press":
            raise self._no_such("", path)
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A press is JSON.")
        lengths = self.headers.get_all("Content-Length") or []
        if len(lengths) != 1 or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "A press says its length.")
        if not re.fullmatch(r"[0-9]{1,18}", lengths[0].strip()):
            raise Refused(HTTPStatus.BAD_REQUEST, "Its length is no number.")
        if int(lengths[0]) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A press has {MAX_BODY} bytes at most.")
        try:
            press = json.loads(self.rfile.read(int(lengths[0])))
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "It is not valid JSON.") from error
        if not isinstance(press, dict) or press.get("choice") not in CHOICES or type(press.get("at")) is not int:
            raise Refused(HTTPStatus.BAD_REQUEST, 'A press has a "choice" and an "at".')
        return _json(self.desk.press(press["choice"], press["at"]))

    def _no_such(self, of_other_method: str, path: str) -> Refused:
        if path == of_other_method or (self.command == "POST" and path == "state"):
            return Refused(HTTPStatus.METHOD_NOT_ALLOWED, "Not by this method.")
        return Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One sentence as text; the connection ends, as what is left of the request has not been read."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:  # how the base class refuses other methods
            status, message = HTTPStatus.METHOD_NOT_ALLOWED, "Not by this method."
        self.close_connection = True
        self._send(status, "text/plain; charset=utf-8", (message or status.phrase).encode())
        # What comes of it yet is read and dropped: to close at once would take the answer away from the other side.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(16):
                if self.command == "GET" or not self.connection.recv(2**16):
                    break

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, POST"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "spo_jax"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the address in each line would have the token."""


def _json(value: Json) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()
