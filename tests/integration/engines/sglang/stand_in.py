"""A server that takes what SGLang takes and nothing else, with ranks that hold real parameters.

Fields and types are those of `srt/managers/io_struct.py`, and what is answered is that of
`srt/entrypoints/http_server.py`, of SGLang 0.5.6 to 0.5.23. It is stricter: where SGLang would pass
over a field, abort a request or let one wait, it notes a violation, and every test ends by looking.
Bytes are not unpickled: their instructions are looked at one by one.
"""

from __future__ import annotations

import base64
import json
import pickletools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NamedTuple

from weightbus.consumers.engines.sglang.payload import LOADER
from weightbus.consumers.engines.sglang.worker import SglangWorker

__all__ = ("DEFAULT_LABEL", "Answer", "Rank", "StandIn", "open_stand_in", "payload_name")

DEFAULT_LABEL: Final = "default"
WAIT_S: Final = 60.0

Check = Callable[[Any], bool]


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _payloads(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class Route(NamedTuple):
    method: str
    fields: Mapping[str, Check] | None = None
    """None: no body is read."""
    required: frozenset[str] = frozenset()
    admin: bool = True


ROUTES: Final[Mapping[str, Route]] = {
    "/openapi.json": Route("GET", admin=False),
    "/server_info": Route("GET", admin=False),
    "/model_info": Route("GET", admin=False),
    "/metrics": Route("GET", admin=False),
    "/metrics/": Route("GET", admin=False),
    "/flush_cache": Route("POST"),
    "/pause_generation": Route(
        "POST", {"mode": lambda value: value in ("abort", "retract", "in_place")}
    ),
    "/continue_generation": Route("POST", {"torch_empty_cache": _flag}),
    "/update_weight_version": Route(
        "POST",
        {"new_version": _text, "abort_all_requests": _flag},
        frozenset({"new_version"}),
    ),
    "/update_weights_from_tensor": Route(
        "POST",
        {
            "serialized_named_tensors": _payloads,
            "load_format": _optional(_text),
            "flush_cache": _flag,
            "abort_all_requests": _flag,
            "weight_version": _optional(_text),
        },
        frozenset({"serialized_named_tensors"}),
    ),
}
SESSION_ROUTES: Final[Mapping[str, Route]] = {
    "/begin_weight_update": Route(
        "POST", {"selector": lambda value: value in ("target", "draft", "all")}
    ),
    "/end_weight_update": Route("POST", {}),
}


class Answer(NamedTuple):
    status: int
    content: dict[str, Any] | str


class Rank:
    """One scheduler: its own thread, on which turns are taken one after the other."""

    def __init__(self, make_worker: Callable[[], SglangWorker]) -> None:
        self.errors: list[Exception] = []
        """What its log would tell."""
        self._make_worker = make_worker
        self._tasks: queue.Queue[tuple[str, Future[None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, name: str) -> Future[None]:
        """Have it call the weight loader with an entry of this name."""
        done: Future[None] = Future()
        self._tasks.put((name, done))
        return done

    def end(self) -> None:
        self._tasks.put(None)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        worker = self._make_worker()
        while (task := self._tasks.get()) is not None:
            name, done = task
            try:
                worker.take(name)
            except Exception as error:  # noqa: BLE001 - as the loader does: it is looked at by tests
                self.errors.append(error)
            done.set_result(None)
        worker.close()


class StandIn:
    """One server. Its state may be read at any time, and changed between two requests."""

    def __init__(self, ranks: Sequence[Rank], *, has_sessions: bool) -> None:
        self.url = ""
        self.stopped = False
        """Connections end without an answer, and no other is taken."""
        self.ranks = list(ranks)
        self.routes = {**ROUTES, **(SESSION_ROUTES if has_sessions else {})}
        self.has_sessions = has_sessions
        self.flushes_beside_waiting = True
        """Whether a paused server flushes while requests wait: 0.5.10 to 0.5.15 do not."""
        self.api_key = self.admin_key = ""
        self.started_as: dict[str, Any] = {
            "tp_size": len(ranks),
            "dp_size": 1,
            "pp_size": 1,
            "nnodes": 1,
            "custom_weight_loader": [LOADER],
            "speculative_algorithm": None,
            "disaggregation_mode": "null",
            "offload_group_size": -1,
            "cpu_offload_gb": 0,
            "version": "0.5.23",
        }
        self.refusals: dict[str, Answer] = {}
        """Path -> what it answers instead."""
        self.holding: dict[str, threading.Event] = {}
        """Path -> its requests wait for this before they are looked at."""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Path and body of every request that was carried out or refused."""
        self.turns = 0
        """That every rank has taken."""
        self.violations: list[str] = []
        self.running: list[str] = []
        self.waiting: list[str] = []
        self.aborted: list[str] = []
        self.counted: dict[str, int] | None = None
        """By its metrics; None: it was started without them."""
        self.session: str | None = None
        self.label = DEFAULT_LABEL
        self.paused = ""
        """The mode; empty: it is not."""
        self._commands = threading.Lock()
        """SGLang's `is_pause_cond`: held while weights are updated, too."""

    @property
    def paths(self) -> list[str]:
        """Of the requests that change something, in their order."""
        return [path for path, _ in self.asked if self.routes[path].method == "POST"]

    def restart(self, ranks: Sequence[Rank]) -> None:
        """Another process: nothing is left of what this one was told."""
        for rank in self.ranks:
            if rank not in ranks:
                rank.end()
        self.ranks = list(ranks)
        self.session, self.label, self.paused = None, DEFAULT_LABEL, ""
        self.running.clear()
        self.waiting.clear()

    def end_ranks(self) -> None:
        for rank in self.ranks:
            rank.end()

    def answer(self, method: str, path: str, query: str, key: str, body: bytes) -> Answer:
        """To one request."""
        if (event := self.holding.get(path)) is not None:
            event.wait(WAIT_S)
        route = self.routes.get(path)
        if route is None or route.method != method:
            return Answer(404, {"detail": "Not Found"})
        if path.startswith("/metrics") and self.counted is None:
            return Answer(404, {"detail": "Not Found"})
        if path == "/metrics/":
            return Answer(200, "")
        if query:
            self.violations.append(f"{path} takes no query, and got {query}")
        wanted = self.api_key if not route.admin else self.admin_key or self.api_key
        if wanted and key != f"Bearer {wanted}":
            return Answer(401, {"error": "Unauthorized"})
        fields = self._fields(path, route, body)
        self.asked.append((path, fields))
        if path in self.refusals:
            return self.refusals[path]
        command: Callable[[dict[str, Any]], Answer] = getattr(
            self, path.strip("/").replace(".", "_")
        )
        return command(fields)

    def _fields(self, path: str, route: Route, body: bytes) -> dict[str, Any]:
        if route.fields is None:
            if body:
                self.violations.append(f"{path} reads no body, and got {body!r}")
            return {}
        try:
            fields = json.loads(body)
            assert isinstance(fields, dict)
        except (ValueError, AssertionError):
            self.violations.append(f"{path} wants a JSON object, and got {body!r}")
            return {}
        for name in sorted(route.required - fields.keys()):
            self.violations.append(f"{path} lacks {name}")
        for name, value in fields.items():
            if name not in route.fields:
                self.violations.append(f"{path} knows no {name}")
            elif not route.fields[name](value):
                self.violations.append(f"{path}: {name} may not be {value!r}")
        return fields

    # ---------------------------------------------------------------- what is asked

    def openapi_json(self, fields: dict[str, Any]) -> Answer:
        paths: dict[str, Any] = {
            path: {route.method.lower(): {} if route.fields is None else {"requestBody": {}}}
            for path, route in self.routes.items()
        }
        return Answer(200, {"openapi": "3.1.0", "paths": paths})

    def server_info(self, fields: dict[str, Any]) -> Answer:
        return Answer(200, self.started_as)

    def model_info(self, fields: dict[str, Any]) -> Answer:
        return Answer(200, {"model_path": "/models/small", "weight_version": self.label})

    def metrics(self, fields: dict[str, Any]) -> Answer:
        """Of several processes: it shows all of them, or nothing of what is chosen."""
        lines = ["# TYPE sglang:num_running_reqs gauge", "sglang:num_running_reqs 0.0"]
        lines += [f'{name}{{model_name="a"}} {n}.0' for name, n in (self.counted or {}).items()]
        return Answer(200, "\n".join([*lines, ""]))

    def flush_cache(self, fields: dict[str, Any]) -> Answer:
        if not self.paused:
            self.violations.append("/flush_cache of a server that is not paused")
        if self.running or (self.waiting and not self.flushes_beside_waiting):
            return Answer(400, "Flush cache failed.\n")
        return Answer(200, "Cache flushed.\n")

    def pause_generation(self, fields: dict[str, Any]) -> Answer:
        with self._commands:
            self.paused = fields.get("mode", "abort")
            if self.paused == "abort":
                self.aborted += self.running
                self.running = []
            elif self.paused == "retract":
                self.waiting += self.running
                self.running = []
        return Answer(200, {"message": "Generation paused successfully.", "status": "ok"})

    def continue_generation(self, fields: dict[str, Any]) -> Answer:
        with self._commands:
            if fields.get("torch_empty_cache", True):
                self.violations.append("/continue_generation empties a cache before it goes on")
            self.paused = ""
            self.running += self.waiting
            self.waiting = []
        return Answer(200, {"message": "Generation continued successfully.", "status": "ok"})

    def update_weight_version(self, fields: dict[str, Any]) -> Answer:
        if fields.get("abort_all_requests", True):
            self.violations.append("/update_weight_version aborts every request")
        if not self.paused:
            self.violations.append("/update_weight_version while the server serves")
        self.label = fields["new_version"]
        return Answer(200, {"success": True, "message": "", "new_version": self.label})

    def begin_weight_update(self, fields: dict[str, Any]) -> Answer:
        if self.session is not None:
            return Answer(400, {"success": False, "message": "a session is already open"})
        self.session = fields.get("selector", "all")
        if self.session != "draft":
            self.violations.append("/begin_weight_update repacks the weights that serve")
        return Answer(200, {"success": True, "message": "Success"})

    def end_weight_update(self, fields: dict[str, Any]) -> Answer:
        if self.session is None:
            return Answer(400, {"success": False, "message": "no session is open"})
        self.session = None
        return Answer(200, {"success": True, "message": "Success"})

    def update_weights_from_tensor(self, fields: dict[str, Any]) -> Answer:
        if not self.paused:
            self.violations.append("an update of a server that is not paused waits for requests")
        if fields.get("flush_cache", True):
            self.violations.append("a turn flushes the cache")
        if fields.get("load_format") != LOADER:
            self.violations.append(f"load_format is {fields.get('load_format')!r}")
        payloads = fields["serialized_named_tensors"]
        if len(payloads) != len(self.ranks):
            self.violations.append(f"{len(payloads)} payloads for {len(self.ranks)} ranks")
        if self.has_sessions and self.session is None:
            message = (
                "update_weights_from_tensor must run between "
                "begin_weight_update() and end_weight_update()"
            )
            return Answer(400, {"success": False, "message": message})
        with self._commands:
            taken = [
                rank.give(payload_name(base64.b64decode(payload, validate=True)))
                for rank, payload in zip(self.ranks, payloads, strict=True)
            ]
            for done in taken:  # SGLang's barrier
                done.result(WAIT_S)
            self.turns += 1
        return Answer(200, {"success": True, "message": "Success"})


def payload_name(payload: bytes) -> str:
    """The name of the one entry that SGLang's unpickler would make of a payload.

    Every instruction is looked at; none is carried out.
    """
    found = [(code.name, argument) for code, argument, _ in pickletools.genops(payload)]
    assert len(found) == 9, found
    name = found[2][1]
    assert isinstance(name, str), found
    assert found == [
        ("PROTO", 2),
        ("EMPTY_LIST", None),
        ("BINUNICODE", name),
        ("GLOBAL", "torch Tensor"),
        ("EMPTY_TUPLE", None),
        ("REDUCE", None),
        ("TUPLE2", None),
        ("APPEND", None),
        ("STOP", None),
    ]
    return name


@contextmanager
def open_stand_in(ranks: Sequence[Rank], *, has_sessions: bool) -> Iterator[StandIn]:
    """The server; at the end no rank runs, and nothing was violated."""
    stand_in = StandIn(ranks, has_sessions=has_sessions)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._handle()

        def do_POST(self) -> None:
            self._handle()

        def log_message(self, format: str, *args: object) -> None:
            """Tests look at what was asked."""

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if stand_in.stopped:
                self.close_connection = True
                return
            key = self.headers.get("Authorization", "")
            path, _, query = self.path.partition("?")
            answer = stand_in.answer(self.command, path, query, key, body)
            is_text = isinstance(answer.content, str)
            said = answer.content if is_text else json.dumps(answer.content)
            encoded = str(said).encode()
            try:
                self.send_response(answer.status)
                kind = "text/plain" if is_text else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # whoever asked has given up

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stand_in
    finally:
        for event in stand_in.holding.values():
            event.set()
        server.shutdown()
        server.server_close()
        thread.join(WAIT_S)
        stand_in.end_ranks()
    assert stand_in.violations == []
