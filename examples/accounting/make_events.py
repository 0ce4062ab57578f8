"""Creates ``events.jsonl``: one event for each function in some modules of Python's standard library.

The data is real: the script reads the source of its own interpreter's standard library with :mod:`ast`. The file in
this folder was created with CPython 3.13.0. The same version always creates the same file, byte for byte. Another
version creates other events.

The standard library is copyright of the Python Software Foundation. It may be used and derived from under the PSF
License Agreement (https://docs.python.org/3/license.html). The events contain only names and line numbers of it.
"""

from __future__ import annotations

import ast
import json
import platform
import sysconfig
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

EVENTS = Path(__file__).with_name("events.jsonl")
LIBRARY = Path(sysconfig.get_path("stdlib"))
SOURCE = f"cpython-{platform.python_version()}"
MODULES = (
    "ast",
    "asyncio.futures",
    "asyncio.locks",
    "asyncio.queues",
    "asyncio.runners",
    "asyncio.streams",
    "asyncio.subprocess",
    "asyncio.taskgroups",
    "asyncio.tasks",
    "asyncio.timeouts",
    "calendar",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "gzip",
    "heapq",
    "imaplib",
    "inspect",
    "json",
    "mailbox",
    "operator",
    "os",
    "pickle",
    "queue",
    "random",
    "re",
    "shutil",
    "smtplib",
    "socket",
    "statistics",
    "tarfile",
    "threading",
    "uuid",
)

# The source does not say when a function was written. So the first event has the release date of Python 3.13.0, and
# each further event is one second later. This makes the file the same whenever it is created.
FIRST_EVENT = datetime(2024, 10, 7, tzinfo=timezone.utc)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def source_files(name: str) -> list[Path]:
    """The files of a module. A package has several, which are sorted by path."""
    path = LIBRARY.joinpath(*name.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def module_name(file: Path) -> str:
    parts = file.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, FunctionNode]]:
    """All functions below a node with their qualified names, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            name = f"{prefix}{child.name}"
            yield name, child
            yield from functions(child, f"{name}.<locals>.")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.")
        else:
            yield from functions(child, prefix)


def argument_names(arguments: ast.arguments) -> list[str]:
    """The names of the parameters, without the separators ``/`` and ``*``."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return names


def event(module: str, function: str, node: FunctionNode, number: int) -> dict[str, object]:
    occurred_at = FIRST_EVENT + timedelta(seconds=number)
    return {
        "uid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{SOURCE}/{module}/{function}:{node.lineno}")),
        "kind": "FunctionDefined",
        "key": f"{module}.{function}",
        "occurred_at": occurred_at.isoformat().replace("+00:00", "Z"),
        "payload": {
            "module": module,
            "function": function,
            "line": node.lineno,
            "arguments": argument_names(node.args),
            "is_async": isinstance(node, ast.AsyncFunctionDef),
            "has_docstring": ast.get_docstring(node) is not None,
        },
    }


def make_events() -> list[dict[str, object]]:
    events: list[dict[str, object]] = []
    for name in MODULES:
        for file in source_files(name):
            module = module_name(file)
            for function, node in functions(ast.parse(file.read_bytes())):
                events.append(event(module, function, node, len(events)))
    return events


def main() -> None:
    events = make_events()
    lines = [json.dumps(item, separators=(",", ":"), ensure_ascii=False) for item in events]
    EVENTS.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(events)} events from {SOURCE}, {EVENTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
