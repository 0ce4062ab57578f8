"""Makes ``events.jsonl``: one event per function defined in some modules of Python's standard library.

The data is real: it is read with :mod:`ast` from the source of the standard library that belongs to the interpreter
running this script. The file beside it was made with CPython 3.13.0; the same version always gives the same file, byte
for byte, and another one gives other events.

The standard library is copyright of the Python Software Foundation, and free to use and to derive from under the PSF
License Agreement (https://docs.python.org/3/license.html). The events hold nothing of it but names and line numbers.
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

# Sources do not say when a function was written. The events follow each other by a second from this day on, the
# release of 3.13.0, so that the file is the same whenever it is made.
FIRST_EVENT = datetime(2024, 10, 7, tzinfo=timezone.utc)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def source_files(name: str) -> list[Path]:
    """The files of a module: one, or those of a package in the order of their paths."""
    path = LIBRARY.joinpath(*name.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def module_name(file: Path) -> str:
    parts = file.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, FunctionNode]]:
    """Every function defined below a node, by its qualified name, in the order of the source."""
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
    """The names as they are written in the signature, without the separators ``/`` and ``*``."""
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
