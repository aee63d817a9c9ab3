"""Finds the places where a source waits for somebody else without a deadline in sight.

Judges by names, and by what stands around a call in the same function; types are not known. A wait
has a deadline in sight if it is inside `fail_after` or `move_on_after`, or if it is given a timeout
(an argument named `..._s`). A loop that sleeps has one, too, if it looks at a clock or a budget. A
thread that is waited for has none, unless whoever waits may leave it behind. A lock of threads is
no wait where it is held for what does not wait.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ("Wait", "find_waits")

WAITS: Final = frozenset(
    {
        "accept",
        "acquire",
        "aclose",
        "anext",
        "communicate",
        "connect_tcp",
        "connect_unix",
        "flock",
        "join",
        "poll",
        "receive",
        "receive_exactly",
        "recv",
        "recv_multipart",
        "result",
        "run_process",
        "select",
        "serve",
        "serve_forever",
        "sleep_forever",
        "start",
        "wait",
        "wait_all_tasks_blocked",
        "wait_readable",
        "wait_writable",
        "waitpid",
    }
)
"""What a wait is called, whoever it belongs to."""

AWAITED_ONLY: Final = frozenset({"aclose", "select", "serve", "start"})
"""Names that wait only where they are awaited."""

NEVER_WAIT: Final = frozenset({"LOCK_NB", "NOBLOCK", "LOCK_UN", "WNOHANG"})
"""A call with such a flag returns at once."""

GUARDS: Final = frozenset({"fail_after", "move_on_after"})

CLOCKS: Final = frozenset({"check", "current_time", "left_s", "monotonic"})
"""What a loop looks at that does not wait for ever."""

LOCKS: Final = frozenset({"Lock", "RLock", "Condition", "Semaphore", "CapacityLimiter"})


class Wait(NamedTuple):
    """A wait without a deadline in sight."""

    function: str
    """Qualified name of the innermost function around it."""
    what: str
    """As it stands in the source."""
    line: int


def find_waits(source: str) -> list[Wait]:
    """Every wait of a module, in order."""
    tree = ast.parse(source)
    locks = {
        target.attr if isinstance(target, ast.Attribute) else ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and _name(node.value.func) in LOCKS
        for target in node.targets
    }
    awaited = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Await)}
    found = _Finder(locks, awaited).find(tree, (), bounded=False)
    return sorted(found, key=lambda wait: wait.line)


class _Finder:
    def __init__(self, locks: set[str], awaited: set[int]) -> None:
        self._locks = locks
        self._awaited = awaited
        """`id` of every expression that is awaited."""

    def find(self, node: ast.AST, path: tuple[str, ...], *, bounded: bool) -> Iterator[Wait]:
        where = ".".join(path)
        inside = bounded
        match node:
            case ast.ClassDef(name=name):
                path = (*path, name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                path, inside = (*path, name), False
            case ast.With(items=items) | ast.AsyncWith(items=items):
                calls = [i.context_expr for i in items if isinstance(i.context_expr, ast.Call)]
                inside = bounded or any(_name(call.func) in GUARDS for call in calls)
                if not inside and (isinstance(node, ast.AsyncWith) or _dawdles(node)):
                    yield from self._locked(items, where)
            case ast.AsyncFor(iter=iterated, lineno=line) if not bounded:
                yield Wait(where, f"async for ... in {ast.unparse(iterated)}", line)
            case ast.While(test=test, lineno=line) if not bounded and _polls(node):
                yield Wait(where, f"while {ast.unparse(test)}: sleep", line)
            case ast.Call() if _name(node.func) == "run_sync":
                if not (bounded and _may_be_left(node)):
                    yield Wait(where, ast.unparse(node), node.lineno)
            case ast.Call() if not bounded and self._waits(node):
                yield Wait(where, ast.unparse(node), node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from self.find(child, path, bounded=inside)

    def _locked(self, items: list[ast.withitem], where: str) -> Iterator[Wait]:
        for item in items:
            if _name(item.context_expr) in self._locks:
                lock = item.context_expr
                yield Wait(where, f"with {ast.unparse(lock)}", lock.lineno)

    def _waits(self, call: ast.Call) -> bool:
        name = _name(call.func)
        if name == "serve" and not isinstance(call.func, ast.Attribute):
            return False
        if name not in WAITS or (name in AWAITED_ONLY and id(call) not in self._awaited):
            return False
        if name == "join" and call.args:  # of words, of a path, or of a thread with a timeout
            return False
        return not _timed(call)


def _dawdles(block: ast.With) -> bool:
    """Whether a lock of threads is held while something else is waited for."""
    calls = [node for node in ast.walk(block) if isinstance(node, ast.Call)]
    return any(_name(call.func) in WAITS | {"sleep"} for call in calls)


def _polls(loop: ast.While) -> bool:
    """Whether a loop sleeps and never looks how late it is."""
    names = {_name(node) for node in ast.walk(loop)}
    return "sleep" in names and not names & CLOCKS


def _may_be_left(call: ast.Call) -> bool:
    return any(keyword.arg == "abandon_on_cancel" for keyword in call.keywords)


def _timed(call: ast.Call) -> bool:
    """Whether a call is given a timeout, or told not to wait."""
    names = {
        _name(one)
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        for one in ast.walk(argument)
        if isinstance(one, ast.Name | ast.Attribute)
    }
    if names & NEVER_WAIT or any(name.lower().endswith(("_s", "_ms")) for name in names):
        return True
    return any(keyword.arg == "timeout" for keyword in call.keywords)


def _name(node: ast.AST) -> str:
    """The last name of `a.b.c`."""
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""
