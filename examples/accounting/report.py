"""The accounting: it compares sets of uids. It does not use the bus's own counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from books import Books
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass(frozen=True)
class DeadLetter:
    """A dead letter, as it was read from the dead-letter topic.

    :ivar group: its ``dead-letter-group`` header. Several groups share the dead-letter topic.
    :ivar code: its ``dead-letter-code`` header: ``rejected`` or ``retries``.
    """

    uid: str
    group: str
    code: str


@dataclass(frozen=True)
class Account:
    """The final figures of one group.

    :ivar begun: the uid and the attempt of each handling that began.
    """

    group: str
    published: frozenset[str]
    handled: frozenset[str]
    dead: frozenset[str]
    dead_by_code: Counter[str]
    begun: Counter[tuple[str, str]]

    @property
    def lost(self) -> frozenset[str]:
        return self.published - self.handled - self.dead

    @property
    def both(self) -> frozenset[str]:
        """Both handled and dead-lettered."""
        return self.handled & self.dead

    @property
    def unknown(self) -> frozenset[str]:
        """Never published."""
        return (self.handled | self.dead) - self.published

    @property
    def redeliveries(self) -> int:
        """Handlings after the first one of each message."""
        return self.begun.total() - len({uid for uid, _ in self.begun})

    @property
    def handled_again(self) -> int:
        """Handlings with the same attempt number as an earlier one, which was cancelled and did not count."""
        return self.begun.total() - len(self.begun)

    @property
    def holds(self) -> bool:
        return not (self.lost or self.both or self.unknown)


def close_account(group: str, published: frozenset[str], books: Books, letters: Sequence[DeadLetter]) -> Account:
    own = [letter for letter in letters if letter.group == group]
    return Account(
        group=group,
        published=published,
        handled=frozenset(books.handled_uids()),
        dead=frozenset(letter.uid for letter in own),
        dead_by_code=Counter(letter.code for letter in own),
        begun=Counter((uid, attempt) for uid, attempt, _ in books.begun.rows()),
    )


class Bar:
    """Shows how many messages of each group are done. Without a terminal it is printed once, at the end."""

    def __init__(self, console: Console, names: Sequence[str], total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._tasks = [self._progress.add_task(name, total=total) for name in names]

    def __enter__(self) -> Bar:  # noqa: PYI034 - `Self` would need typing_extensions before 3.11
        self._progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, accounts: Sequence[Account]) -> None:
        for task, account in zip(self._tasks, accounts, strict=True):
            self._progress.update(task, completed=len(account.handled | account.dead))
        self._progress.refresh()


def show(console: Console, loop: str, accounts: Sequence[Account]) -> None:
    """Print the table."""
    table = Table(title=f"Accounting on {loop}, by sets of uids", title_justify="left")
    table.add_column("messages")
    for account in accounts:
        table.add_column(f"group {account.group}", justify="right")

    def row(name: str, values: Sequence[int], *, must_be_zero: bool = False, last: bool = False) -> None:
        style = "" if not must_be_zero else "red" if any(values) else "green"
        table.add_row(name, *(f"{value:,}" for value in values), style=style, end_section=last)

    row("published", [len(account.published) for account in accounts], last=True)
    row("handled", [len(account.handled) for account in accounts])
    row("dead-lettered", [len(account.dead) for account in accounts])
    for code in sorted({code for account in accounts for code in account.dead_by_code}):
        row(f"  {code}", [account.dead_by_code[code] for account in accounts])
    row("handled + dead-lettered", [len(account.handled) + len(account.dead) for account in accounts], last=True)
    row("lost", [len(account.lost) for account in accounts], must_be_zero=True)
    row("handled and dead-lettered", [len(account.both) for account in accounts], must_be_zero=True)
    row("never published", [len(account.unknown) for account in accounts], must_be_zero=True, last=True)
    row("handlings begun", [account.begun.total() for account in accounts])
    row("  redeliveries in all", [account.redeliveries for account in accounts])
    row("  cancelled and handled again", [account.handled_again for account in accounts])
    console.print(table)
    if all(account.holds for account in accounts):
        verdict = "The accounting is correct: each message was either handled or dead-lettered."
    else:
        verdict = "THE ACCOUNTING IS NOT CORRECT: see the red rows."
    console.print(verdict, highlight=False)
