"""A demonstration on real input, which proves that no message is lost.

It reads ``events.jsonl`` (see ``make_events.py``), publishes every event, and handles them in two consumer groups of
four consumers each. Some handlings fail and succeed later, some ask for a retry, some reject the message, and some fail
every time. In the middle of the work, one consumer of each group is cancelled while its handlers run. Both groups use
the topic's default dead-letter topic. The headers of each dead letter name the group that gave the message up.

At the end, a table compares sets of uids: from the input file, from the files that the handlers wrote, and from the
dead letters on the backend. The exit status is 1 if a message is missing, unknown or both handled and dead-lettered.

    python examples/accounting/main.py [--loop asyncio|trio] [--url redis://localhost:6379]

The URL may also be one of a cluster (``redis+cluster://host:port,host:port``) or of sentinels
(``redis+sentinel://host:port,host:port/service``). Without a URL it runs in memory. On a server it does not delete the
topics of this run and their dead letters.
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

import anybus
from anybus import EventBusError, Message

EVENTS = Path(__file__).with_name("events.jsonl")


TOPIC = "source.functions"
"""Each run uses a new topic whose name begins with this."""


class Event(msgspec.Struct):
    """A line of the input. The payload is published unchanged."""

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
    """Run the demonstration on one event loop. Return true if the accounting is correct."""
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
        console.print(f"Unexpected error: {surprise}", style="red", markup=False)
    console.print()
    return all(account.holds for account in accounts)


def is_news(record: logging.LogRecord) -> bool:
    """Whether to log the record. There are thousands of retries and dead letters, and the table counts them."""
    return getattr(record, "scope", None) not in ("retried", "dead-lettered")


async def enter(url: str) -> None:
    """Connect once, and do nothing."""
    async with anybus.connect(url):
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description="Publishes and handles real events, and accounts for each of them.")
    parser.add_argument("--loop", choices=("asyncio", "trio"), help="use only this event loop (default: both)")
    parser.add_argument(
        "--url", default="memory://", help="the backend, in any form that anybus.connect accepts (default: %(default)s)"
    )
    arguments = parser.parse_args()
    logging.getLogger("anybus").addFilter(is_news)
    try:
        anyio.run(enter, arguments.url)
    except EventBusError as error:
        parser.error(str(error))
    messages = read_messages()
    console = Console()
    loops: list[str] = [arguments.loop] if arguments.loop else ["asyncio", "trio"]
    held = [run_on(loop, arguments.url, messages, console) for loop in loops]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
