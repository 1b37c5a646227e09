"""The local web page of `vlm inspect`: a few fixed files and a small JSON interface on Python's own HTTP server.

Python's server and a static page rather than gradio or a web framework: nothing to install, no telemetry, no font or
script from elsewhere, and every byte that a browser gets is written here. It serves one user on loopback.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import socket
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from data_loaders.decoding import decode_image
from vlm.errors import UserError
from vlm.hub import LoadedModel
from vlm.inspect.evaluated import Evaluated
from vlm.inspect.relevance import relevance

MAX_UPLOAD_BYTES = 20_000_000
MAX_JSON_BYTES = 20_000
MAX_QUESTION = 1_000  # characters
PAGE_SIZE = 24
SHOWN_PIXELS = 640  # the longer side of an image as the page shows it
KEPT_UPLOADS, KEPT_PICTURES = 16, 128
MAX_CONNECTIONS = 32  # a browser opens six
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Inspection:
    """What the page shows: an evaluation, if there is one, and a model that is loaded at the first question."""

    def __init__(self, evaluation: Evaluated | None, load: Callable[[], LoadedModel], images_per_text: int) -> None:
        self.evaluation, self.load, self.images_per_text = evaluation, load, images_per_text
        self.uploads: OrderedDict[str, Image.Image] = OrderedDict()
        self.pictures: OrderedDict[str, bytes] = OrderedDict()  # as the page shows them
        self.model: LoadedModel | None = None
        self.asking = threading.Lock()  # one question at a time; pictures come while the model loads or thinks
        self.drawing = threading.Lock()  # and one picture, since a large one takes a quarter of a gigabyte

    def about(self) -> dict[str, Any]:
        found = self.evaluation
        return {
            "runs": list(found.names) if found else [],
            "percent": found.percent if found else [],
            "kinds": found.kinds if found else [],
            "imagesPerText": self.images_per_text,
        }

    def questions(self, show: str, kind: str, search: str, page: int) -> dict[str, Any]:
        """One page of what the filter leaves."""
        if self.evaluation is None:
            return {"total": 0, "page": 0, "pages": 0, "items": []}
        numbers = self.evaluation.select(show, kind, search[:MAX_QUESTION])
        pages = max(1, -(-len(numbers) // PAGE_SIZE))
        page = min(max(page, 0), pages - 1)
        items = []
        for number in numbers[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]:
            one = self.evaluation.questions[number]
            items.append(
                {
                    "id": one.question.id,
                    "question": one.question.text,
                    "kind": one.kind,
                    "images": list(one.question.image_keys),
                    "answers": list(one.question.answers),
                    "predictions": list(one.predictions),
                    "values": list(one.values),
                    "right": [one.is_right(run) for run in range(len(one.predictions))],
                }
            )
        return {"total": len(numbers), "page": page, "pages": pages, "items": items}

    def picture(self, name: str) -> bytes:
        """An image of the evaluation or an upload as PNG, drawn anew: no byte of a stranger's file reaches the page."""
        with self.drawing:
            if name not in self.pictures:
                image = self._image(name).copy()
                image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
                drawn = io.BytesIO()
                image.save(drawn, "PNG")
                self.pictures[name] = drawn.getvalue()
            self.pictures.move_to_end(name)
            while len(self.pictures) > KEPT_PICTURES:
                self.pictures.popitem(last=False)
            return self.pictures[name]

    def upload(self, data: bytes) -> dict[str, str]:
        name = f"upload:{hashlib.sha256(data).hexdigest()[:24]}"
        with self.drawing:
            image = decode_image(data, "the upload")
            image.thumbnail((2048, 2048))  # before it is kept
            self.uploads[name] = image
            self.uploads.move_to_end(name)
            while len(self.uploads) > KEPT_UPLOADS:
                self.uploads.popitem(last=False)
        return {"image": name}

    def ask(self, images: Sequence[str], question: str, answer: str | None) -> dict[str, Any]:
        """The best answers, and what one of them leans on."""
        if len(images) != self.images_per_text:
            raise UserError(f"the model wants {self.images_per_text} image(s). Got {len(images)}")
        with self.drawing:
            pictures = [self._image(name) for name in images]
        with self.asking:
            self.model = self.model or self.load()
            asked: Any = [pictures[0] if self.images_per_text == 1 else pictures]
            best = list(self.model.answer(asked, [question])[0].items())[:5]
            found = relevance(self.model, pictures, question, answer)
        if not all(math.isfinite(value) for _, value in best):
            raise UserError("the model's answers are not numbers: its training must have diverged")
        return {
            "answers": [{"answer": name, "probability": value} for name, value in best],
            "answer": found.answer,
            "maps": [None if grid is None else grid.tolist() for grid in found.patches],
            "tokens": [list(token) for token in found.tokens],
        }

    def _image(self, name: str) -> Image.Image:
        """By a name that was given out before: of an upload, or of an image of the evaluation. It is never a path."""
        if name in self.uploads:
            return self.uploads[name]
        data = self.evaluation.image(name) if self.evaluation else None
        if data is None:
            raise _Refused(
                HTTPStatus.NOT_FOUND, "no such image here; an upload from before may have to be chosen again"
            )
        return decode_image(data, "the image")


class _Handler(BaseHTTPRequestHandler):
    server: InspectionServer
    server_version, sys_version = "vlm", ""
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a silent connection may stay

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """The console is for the address alone."""

    def _answer(self, work: Callable[[], tuple[bytes, str]]) -> None:
        status = HTTPStatus.OK
        try:
            self._check_origin()
            body, kind = work()
        except _Refused as refused:
            status, (body, kind) = refused.status, _json({"error": str(refused)})
        except (UserError, ValueError) as error:
            status, (body, kind) = HTTPStatus.BAD_REQUEST, _json({"error": str(error)})
        except (ConnectionError, TimeoutError):
            raise  # nobody is there to be told
        except Exception:  # the server goes on; what failed where is for the console alone
            traceback.print_exc()
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            body, kind = _json({"error": "the server failed at this; its console says why"})
        if status != HTTPStatus.OK:
            self.close_connection = True  # a body may be unread
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _check_origin(self) -> None:
        """Refuse a page of elsewhere: by its Host (DNS rebinding) and by its Origin."""
        if not self.server.is_own(self.headers.get("Host", "")):
            raise _Refused(HTTPStatus.FORBIDDEN, "unknown Host; open the address that `vlm inspect` printed")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers.get('Host')}":
            raise _Refused(HTTPStatus.FORBIDDEN, "requests of other pages are refused")

    def _get(self) -> tuple[bytes, str]:
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query, max_num_fields=10).items()}
        if address.path in FILES:
            name, kind = FILES[address.path]
            return resources.files("vlm.inspect").joinpath("page", name).read_bytes(), kind
        if address.path == "/image":
            return self.server.inspection.picture(query.get("name", "")), "image/png"
        if address.path == "/favicon.ico":
            return b"", "image/x-icon"  # none; asked for by every browser
        if address.path == "/about":
            return _json(self.server.inspection.about())
        if address.path == "/questions":
            page = query.get("page", "0")
            number = int(page) if page.isascii() and page.isdigit() and len(page) < 10 else 0
            show, kind, search = (query.get(name, "") for name in ("show", "kind", "search"))
            return _json(self.server.inspection.questions(show, kind, search, number))
        raise _Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _post(self) -> tuple[bytes, str]:
        path = urlsplit(self.path).path
        # A type that other sites cannot send without asking first, which is never granted.
        if path == "/upload":
            return _json(self.server.inspection.upload(self._body("application/octet-stream", MAX_UPLOAD_BYTES)))
        if path == "/ask":
            asked = json.loads(self._body("application/json", MAX_JSON_BYTES))
            if not isinstance(asked, dict):
                raise _Refused(HTTPStatus.BAD_REQUEST, "expected an object")
            images: Any = asked.get("images")
            question, answer = asked.get("question"), asked.get("answer")
            sound = isinstance(images, list) and len(images) <= 2 and all(isinstance(name, str) for name in images)
            if not sound or not isinstance(question, str) or not (answer is None or isinstance(answer, str)):
                raise _Refused(HTTPStatus.BAD_REQUEST, "expected images and a question")
            if not question.strip() or len(question) > MAX_QUESTION:
                raise _Refused(HTTPStatus.BAD_REQUEST, f"a question has 1 to {MAX_QUESTION} characters")
            return _json(self.server.inspection.ask(images, question, answer))
        raise _Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _body(self, kind: str, limit: int) -> bytes:
        if self.headers.get("Content-Type", "") != kind:
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected {kind}")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit() and len(length) < 12):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(length) > limit:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {limit / 1e6:g} MB")
        return self.rfile.read(int(length))


class InspectionServer(ThreadingHTTPServer):
    """The page at `host`; port 0 takes a free one."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS  # socketserver's five would let a sixth wait a second

    def __init__(self, inspection: Inspection, host: str = "127.0.0.1", port: int = 0) -> None:
        self.inspection, self.host = inspection, host
        self.places = threading.Semaphore(MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), partial(_Handler))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"{host}:{port}: cannot be listened on ({error}). Choose another --host or --port"
            ) from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, unless too many are open: slow clients can take no more than these."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away before it had its answer is no fault."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_address[1]}/"

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server. Any number does where it listens beyond loopback: only a name can be
        made to point here by somebody else."""
        name = urlsplit(f"//{host}").hostname or ""
        if name in ("localhost", "127.0.0.1", "::1", self.host.lower()):
            return True
        try:
            ip_address(name)
        except ValueError:
            return not is_loopback(self.host) and name == socket.gethostname().lower()
        return not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value, allow_nan=False).encode(), "application/json"
