"""`vllm serve`, stood in for: its HTTP endpoints as 0.26 and 0.32 have them.

Every request is checked: what a real vLLM does not have, does not take, or must not be asked now is
a *violation*, and fails the test (`StandIn.check`). Calls to the engine core run one after the
other, as they do in vLLM: one that comes while a turn is under way waits for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.integration.engines.vllm.workers import Executor, WorkerError

__all__ = ("Call", "StandIn", "Style", "serving")

LONG_S: Final = 60.0

Style = Literal["0.32", "0.26", "extension", "no dev mode", "no documents"]

Query = Mapping[str, list[str]]

_ALWAYS: Final = ("GET /health", "GET /metrics/")
_COMMON: Final = (
    "GET /server_info",
    "POST /pause",
    "POST /resume",
    "GET /is_paused",
    "POST /reset_prefix_cache",
    "POST /reset_mm_cache",
    "POST /reset_encoder_cache",
    "POST /sleep",
    "POST /wake_up",
    "GET /is_sleeping",
    "POST /collective_rpc",
)
_TRANSFER: Final = (
    "GET /get_world_size",
    "POST /init_weight_transfer_engine",
    "POST /start_weight_update",
    "POST /start_draft_weight_update",
    "POST /update_weights",
    "POST /finish_weight_update",
)
_ROUTES: Final[Mapping[Style, tuple[str, ...]]] = {
    "0.32": (*_ALWAYS, *_COMMON, *_TRANSFER, "POST /update_weight_version", "GET /weight_info"),
    "0.26": (*_ALWAYS, *_COMMON, *_TRANSFER),
    "extension": (*_ALWAYS, *_COMMON),
    "no dev mode": _ALWAYS,
    "no documents": (*_ALWAYS, *_COMMON, *_TRANSFER),
}
_BODIES: Final = {
    "POST /init_weight_transfer_engine": {"init_info"},
    "POST /update_weights": {"update_info"},
    "POST /update_weight_version": {"new_version"},
    "POST /collective_rpc": {"method", "args"},
}
_QUERIES: Final[Mapping[str, Mapping[str, set[str] | None]]] = {
    "POST /pause": {"mode": {"keep", "wait", "abort"}, "clear_cache": {"true", "false"}},
    "GET /server_info": {"config_format": {"json"}},
    "GET /metrics/": {"name[]": {"vllm:generation_tokens_total"}},
    "GET /get_world_size": {"include_dp": {"true", "false"}},
    "POST /reset_prefix_cache": {"reset_running_requests": {"true"}, "reset_external": {"true"}},
    "POST /wake_up": {"tags": {"weights", "kv_cache"}},
}


class Call(NamedTuple):
    route: str
    query: Query
    body: Any

    @property
    def detail(self) -> str:
        """The route, and what was given with it but for numbers of requests."""
        given = "&".join(f"{key}={','.join(values)}" for key, values in self.query.items())
        method = f" {self.body['method']}" if self.route == "POST /collective_rpc" else ""
        return f"{self.route}{'?' if given else ''}{given}{method}"


@dataclass
class StandIn:
    """One server, over workers that may be replaced as by a restart."""

    executor: Executor
    style: Style = "0.32"
    copies: int = 1
    """Data parallel ones."""
    api_key: str = ""
    paused: bool = False
    asleep: set[str] = field(default_factory=set)
    version: str = "default"
    encodes: bool = True
    """Its model is multimodal."""
    connector_resets: bool = True
    """Whether its KV connector, if it has one, can drop what it keeps."""
    running: int = 0
    """Requests that hold blocks."""
    preempted: int = 0
    aborted: int = 0
    caches: set[str] = field(default_factory=lambda: {"prefix", "encoder", "connector"})
    """What was computed with weights and can be found."""
    calls: list[Call] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    failing: dict[str, str] = field(default_factory=dict)
    """Route -> what it fails with, for now."""
    late: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Route -> what happens on its way to the engine core: others overtake it meanwhile."""
    drained: threading.Event = field(default_factory=threading.Event)
    """Set: running requests end when they are waited for."""
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Route -> what happens, in the engine core, before it is carried out."""
    after: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Route -> what happens between that and its answer."""
    stages: int = 1
    """Of a pipeline, as it says."""
    tokens: int = 0
    """That it has made."""
    url: str = ""

    def __post_init__(self) -> None:
        self._core = threading.Lock()
        self.drained.set()

    def check(self) -> None:
        assert not self.violations, "\n".join(self.violations)

    def details(self, since: int = 0) -> list[str]:
        return [call.detail for call in self.calls[since:]]

    def restart(self, executor: Executor) -> None:
        """As when the server is started anew; its port stays."""
        with self._core:
            self.executor.end()
            self.executor = executor
            self.paused, self.version = False, "default"
            self.asleep.clear()

    # ------------------------------------------------------------ answers

    def answer(self, call: Call, headers: Mapping[str, str]) -> tuple[int, Any]:
        """Status and JSON, or text, of a request."""
        self.calls.append(call)
        if call.route == "GET /openapi.json":
            if self.style == "no documents":
                return 404, {"detail": "Not Found"}
            return 200, {"paths": dict(map(self._documented, _ROUTES[self.style]))}
        self._check(call, headers)
        if call.route not in _ROUTES[self.style]:
            return 404, {"detail": "Not Found"}
        if call.route == "GET /health":
            return 200, None
        if call.route == "GET /metrics/":
            return 200, f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}.0\n'
        if (failure := self.failing.get(call.route)) is not None:
            return 500, {"error": {"message": failure, "type": "InternalServerError", "code": 500}}
        try:
            if call.route == "GET /get_world_size":
                ranks = len(self.executor.workers)
                every = call.query["include_dp"] == ["true"]
                return 200, {"world_size": ranks * (self.copies if every else 1)}
            if call.route == "GET /server_info":
                return 200, {"vllm_config": self._config()}
            if (late := self.late.get(call.route)) is not None:
                late()
            with self._core:
                if (before := self.before.get(call.route)) is not None:
                    before()
                answer = self._carry_out(call)
            if call.query.get("mode") == ["wait"]:
                assert self.drained.wait(LONG_S)
            if (after := self.after.get(call.route)) is not None:
                after()
            return 200, answer
        except WorkerError as error:
            self.violations.append(f"{call.detail}: a call of workers failed: {error}")
            return 500, {"error": {"message": str(error), "type": "Exception", "code": 500}}

    def _documented(self, route: str) -> tuple[str, Any]:
        """As FastAPI describes it."""
        method, path = route.split()
        names = {*_QUERIES.get(route, ())} - self._not_taken(route)
        parameters = [{"name": name, "in": "query"} for name in sorted(names)]
        return path, {method.lower(): {"parameters": parameters}}

    def _not_taken(self, route: str) -> set[str]:
        """What this version has no name for yet."""
        is_old = self.style == "extension" and route == "POST /reset_prefix_cache"
        return {"reset_external"} if is_old else set()

    def _config(self) -> dict[str, Any]:
        config = self.executor.workers[0].vllm_config
        transfer = config.weight_transfer_config
        return {
            "model_config": {"multimodal_config": {"language_model_only": False}}
            if self.encodes
            else {"multimodal_config": None},
            "weight_transfer_config": transfer and {"backend": transfer.backend},
            "kv_transfer_config": None,
            "parallel_config": {
                **vars(config.parallel_config),
                "data_parallel_size": self.copies,
                "pipeline_parallel_size": self.stages,
            },
        }

    def _check(self, call: Call, headers: Mapping[str, str]) -> None:
        def violated(what: str) -> None:
            self.violations.append(f"{call.detail}: {what}")

        if call.route not in _ROUTES[self.style]:
            violated(f"this vLLM ({self.style}) has no such route")
        if self.api_key and headers.get("Authorization") != f"Bearer {self.api_key}":
            violated(f"Authorization is {headers.get('Authorization')}")
        allowed = _QUERIES.get(call.route, {})
        for key, values in call.query.items():
            known = allowed.get(key)
            if known is None or key in self._not_taken(call.route) or not set(values) <= known:
                violated(f"{key}={values} is not taken")
        body = set(call.body) if isinstance(call.body, dict) else set()
        if body != _BODIES.get(call.route, set()):
            violated(f"body has {sorted(body)}")

    def _carry_out(self, call: Call) -> Any:
        match call.route.split()[1]:
            case "/pause":
                self._pause(call.query["mode"][0], call.query["clear_cache"][0] == "true")
                return {"status": "paused"}
            case "/resume":
                self.paused = False
                return {"status": "resumed"}
            case "/is_paused":
                return {"is_paused": self.paused}
            case "/is_sleeping":
                return {"is_sleeping": self.paused or bool(self.asleep)}
            case "/wake_up":
                self.asleep -= set(call.query.get("tags", ["weights", "kv_cache"]))
                self.paused = self.paused and bool(self.asleep)
                return {"status": "awake"}
            case "/reset_prefix_cache":
                preempt, external = "reset_running_requests", "reset_external"
                if self._reset_prefix(preempt=preempt in call.query):
                    self.caches -= {"connector"} if external in call.query else set()
                    return {"success": self.connector_resets}
                return {"success": False}
            case "/reset_encoder_cache":
                if self.running:
                    self.violations.append("encoder cache dropped under running requests")
                self.caches.discard("encoder")
                return None
            case "/update_weight_version":
                self.version = call.body["new_version"]
                return {"success": True, "new_version": self.version}
            case "/collective_rpc":
                for argument in call.body["args"]:
                    if not isinstance(argument, str):
                        self.violations.append(f"{argument!r} is not a string")
                return {"results": self._on_workers(call.body["method"], args=call.body["args"])}
            case operation:
                self._on_workers(operation.removeprefix("/"), kwargs=call.body or {})
                return {"message": "done"}

    def _on_workers(self, method: str, **given: Any) -> list[Any]:
        """Weights change only while nothing runs."""
        before = None if self.paused else self.executor.fingerprints()
        try:
            return self.executor.collective_rpc(method, **given)
        finally:
            if before is not None and self.executor.fingerprints() != before:
                self.violations.append(f"{method} changed weights that are served")

    def _pause(self, mode: str, clear: bool) -> None:
        if mode != "keep":
            self.aborted += self.running if mode == "abort" else 0
            self.running = 0
        self.paused = True
        if clear:
            self._reset_prefix(preempt=True)
            self.caches -= {"encoder", "connector"}

    def _reset_prefix(self, *, preempt: bool) -> bool:
        if self.running and not preempt:
            return False
        self.preempted += self.running
        self.running = 0
        self.caches.discard("prefix")
        return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    stand_in: StandIn
    is_dead = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.server.is_dead:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        size_bytes = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size_bytes)) if size_bytes else None
        call = Call(f"{self.command} {parts.path}", parse_qs(parts.query), body)
        status, answer = self.server.stand_in.answer(call, dict(self.headers))
        text = answer if isinstance(answer, str) else json.dumps(answer)
        encoded = b"" if answer is None else text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)
        except OSError:
            self.close_connection = True  # whoever asked has given up

    def log_message(self, format: str, *args: object) -> None:
        """The tests look at `StandIn.calls`."""


@contextmanager
def serving(stand_in: StandIn, port: int = 0) -> Iterator[StandIn]:
    """Until the context closes; then its connections are refused."""
    server = _Server(("127.0.0.1", port), _Handler)
    server.stand_in = stand_in
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stand_in
    finally:
        server.is_dead = True
        server.shutdown()
        thread.join(LONG_S)
        server.server_close()
