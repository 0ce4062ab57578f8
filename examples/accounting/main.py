"""The main job on real input, and the proof that nothing was lost.

It reads ``events.jsonl`` (see ``make_events.py``), publishes every event, and handles them in two consumer groups of
four consumers each. Handlers fail for a moment, ask for retries, refuse messages, and fail for good. In the middle of
the work one consumer of each group is cancelled while its handlers run. Both groups use the topic's default
dead-letter topic; which group gave a message up stands in the dead letter's headers.

At the end a table holds sets of uids against each other: the input file, the files that the handlers wrote, and the
dead letters as they were read back. The exit status is 1 if the accounting does not hold.

    python examples/accounting/main.py [--loop asyncio|trio] [--url redis://localhost:6379]

Without a URL it works in memory. On a server it leaves the topics of this run, and their dead letters, behind.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import anyio
import msgspec
from books import open_books
from day import GROUPS, Day
from report import Bar, show
from rich.console import Console

from anybus import Message

EVENTS = Path(__file__).with_name("events.jsonl")


TOPIC = "source.functions"
"""Each run publishes to topics of its own, whose names begin like this."""


class Event(msgspec.Struct):
    """A line of the input. The payload is published as it stands there."""

    uid: str
    kind: str
    key: str
    occurred_at: datetime
    payload: msgspec.Raw


def read_messages() -> list[Message]:
    decoder = msgspec.json.Decoder(Event)
    events = [decoder.decode(line) for line in EVENTS.read_bytes().splitlines()]
    return [
        Message(
            TOPIC,
            bytes(event.payload),
            uid=event.uid,
            key=event.key,
            kind=event.kind,
            occurred_at=event.occurred_at,
            content_type="application/json",
        )
        for event in events
    ]


def run_on(loop: str, url: str, messages: Sequence[Message], console: Console) -> bool:
    """Do it all on one event loop. True if the accounting holds."""
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="anybus-accounting-") as folder,
        open_books(Path(folder), list(GROUPS)) as books,
        Bar(console, [f"{loop:8}{group}" for group in GROUPS], len(messages)) as bar,
    ):
        day = Day(url, messages, books, bar.update)
        accounts = anyio.run(day.run, backend=loop)
    show(console, loop, accounts)
    console.print(f"Took {time.monotonic() - started:.1f} s.", highlight=False)
    for surprise in day.surprises.seen:
        console.print(f"Not expected: {surprise}", style="red", markup=False)
    console.print()
    return all(account.holds for account in accounts)


def is_news(record: logging.LogRecord) -> bool:
    """Whether the log should say it. The table accounts for the retries and dead letters, thousands of them."""
    return getattr(record, "scope", None) not in ("retried", "dead-lettered")


def main() -> int:
    parser = argparse.ArgumentParser(description="Publishes and handles real events, and accounts for every one.")
    parser.add_argument("--loop", choices=("asyncio", "trio"), help="only on this event loop (default: on both)")
    parser.add_argument("--url", default="memory://", help="where to do it (default: %(default)s)")
    arguments = parser.parse_args()
    logging.getLogger("anybus").addFilter(is_news)
    messages = read_messages()
    console = Console()
    loops: list[str] = [arguments.loop] if arguments.loop else ["asyncio", "trio"]
    held = [run_on(loop, arguments.url, messages, console) for loop in loops]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
