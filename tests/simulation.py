"""A world for tests against a model: messages with scripts, processes that are killed, and an operator.

Every message has a script: how its handlings end, one after the other; when the script is over, or one has succeeded,
they succeed. A handling may return, raise, ask for a retry, reject, release, or kill its process. A killed process is
simulated without mercy: from that moment on none of its calls reaches the backend, and it has settled nothing; another
one is started. When everything is settled, the operator replays or purges dead letters, and is interrupted.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
from anyio.lowlevel import checkpoint
from harness import Harness, StepByStep, new_topic

from anybus import (
    BackendError,
    DeadLetters,
    Delivery,
    EventBusError,
    Message,
    Observer,
    Reject,
    ReplayProgress,
    Retry,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus.abc import BusEvent, ClaimedMessage, DeadLetterStore, FetchedEntry, Move, StoredEntry, TransferItem

OK, FAIL, RETRY, REJECT, RELEASE, CRASH = "ok", "fail", "retry", "reject", "release", "crash"
Script = tuple[str, ...]


@dataclass(frozen=True)
class Fate:
    """What becomes of a message.

    :ivar code: of its dead letter; None = it is handled.
    :ivar outcomes: how each handling ended.
    :ivar attempts: which attempt each was.
    """

    code: str | None
    outcomes: Script
    attempts: tuple[int, ...]


def predict(script: Script, max_retry: int, max_deliveries: int, replays: int = 0) -> Fate:
    """The model. A replay is a new beginning."""
    failures = deliveries = 0
    outcomes: list[str] = []
    attempts: list[int] = []
    while True:
        code: str | None = None
        deliveries += 1
        if deliveries > max_deliveries:
            code = "deliveries"
        else:
            outcome = script[len(outcomes)] if len(outcomes) < len(script) else OK
            outcomes.append(outcome)
            attempts.append(failures + 1)
            if outcome == OK:
                return Fate(None, tuple(outcomes), tuple(attempts))
            if outcome == REJECT:
                code = "rejected"
            elif outcome == RELEASE:
                deliveries -= 1
            elif outcome in (FAIL, RETRY):
                failures += 1
                deliveries = 0  # its retry is another entry
                if failures > max_retry:
                    code = "retries"
        if code is not None:
            if not replays:
                return Fate(code, tuple(outcomes), tuple(attempts))
            replays -= 1
            failures = deliveries = 0


@dataclass(frozen=True)
class Cut:
    """How a replay or a purge is interrupted. What is interrupted is done again afterwards.

    :ivar how: ``steps``: cancelled after so many turns of the loop; ``cancel`` or ``raise``: by ``on_progress``, when
        it is told of so many letters.
    """

    how: Literal["steps", "cancel", "raise"]
    after: int


@dataclass(frozen=True)
class Act:
    """What the operator does.

    :ivar what: ``purge``, or replay to the ``topic`` or to the ``group``.
    :ivar keys: the chosen ones (whoever is a dead letter of them, and an id that is gone); None = all.
    :ivar code: only those given up on for that.
    :ivar twice: done twice at once.
    """

    what: Literal["topic", "group", "purge"]
    keys: frozenset[str] | None = None
    code: str | None = None
    cut: Cut | None = None
    twice: bool = False


class StopHereError(Exception):
    """Raised by ``on_progress``."""


class Mortal(StepByStep, DeadLetterStore):
    """What a process has of a backend: when the process is dead, nothing of it gets through."""

    def __init__(self, inner: Any, saw: Callable[[str, Sequence[FetchedEntry]], None]) -> None:
        super().__init__(inner)
        self.is_dead = False
        self._saw = saw

    async def __aenter__(self) -> Mortal:  # noqa: PYI034 - the one backend inside outlives every process
        return self

    async def __aexit__(self, *error: object) -> bool | None:
        return None

    def _check(self) -> None:
        if self.is_dead:
            raise BackendError("the process is dead", may_have_happened=False, can_pass=True)

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        self._check()
        entries = await super().read_new(stream, group, consumer, count=count, timeout=timeout)
        self._saw(stream, entries)
        return entries

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        self._check()
        return await super().reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        self._check()
        return await super().ack_many(stream, group, message_ids, consumer=consumer)

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        self._check()
        return await super().transfer_many(stream, group, consumer, items)

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        self._check()
        return await super().renew(stream, group, consumer, message_ids)

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        self._check()
        await super().release(stream, group, consumer, message_ids)

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        if not self.is_dead:
            await super().forget_consumer(stream, group, consumer)

    async def _outlive(self) -> None:
        """What an operator's call comes to when its process is dead: nothing."""
        if self.is_dead:
            await anyio.sleep_forever()

    async def last_entry_id(self, stream: str) -> str | None:
        await self._outlive()
        last: str | None = await self.inner.last_entry_id(stream)
        return last

    async def read_page(
        self, stream: str, *, after: str | None, until: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        await self._outlive()
        page: list[StoredEntry] = await self.inner.read_page(
            stream, after=after, until=until, count=count, max_bytes=max_bytes, max_entry_bytes=max_entry_bytes
        )
        return page

    async def read_entry(self, stream: str, entry_id: str, *, max_entry_bytes: int) -> StoredEntry | None:
        await self._outlive()
        entry: StoredEntry | None = await self.inner.read_entry(stream, entry_id, max_entry_bytes=max_entry_bytes)
        return entry

    async def has_group(self, stream: str, group: str) -> bool:
        await self._outlive()
        return bool(await self.inner.has_group(stream, group))

    async def move_entries(self, stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        await self._outlive()
        results: list[str | EventBusError | None] = await self.inner.move_entries(stream, moves)
        return results

    async def remove_entries(self, stream: str, entry_ids: Sequence[str]) -> int:
        await self._outlive()
        return int(await self.inner.remove_entries(stream, entry_ids))


class Silent(Observer):
    def on_error(self, event: BusEvent) -> None:
        """What fails here is what the test does."""


@dataclass
class World:
    """Messages with their scripts, processes that handle them one after the other, and what the operator does.

    A message's key is its number; that of a malformed entry is ``bad`` and its number.

    :ivar live: the operator works while the subscription runs, and dies with its process; else in between.
    """

    harness: Harness
    scripts: Sequence[Script]
    max_retry: int
    max_deliveries: int
    max_in_flight: int
    lease: float
    malformed: int = 0
    acts: Sequence[Act] = ()
    live: bool = False
    outcomes: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    attempts: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    replays: Counter[str] = field(default_factory=Counter)
    purged: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    topic: str = field(default_factory=new_topic)
    done: int = 0
    uids: dict[str, str] = field(default_factory=dict)
    first_ids: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [str(number) for number, _ in enumerate(self.scripts)] + [f"bad{n}" for n in range(self.malformed)]

    def killers(self, *, besides: str) -> int:
        """How many other messages have killed a process."""
        return sum(CRASH in seen for key, seen in self.outcomes.items() if key != besides)

    @property
    def retries(self) -> str:
        return f"anybus:{{{self.topic}}}:retry:g"

    async def run(self) -> dict[str, tuple[str | None, int]]:
        """Until every message is settled; of each, by key: the code of its dead letter and the number of those."""
        backend = self.harness.make_backend()
        async with backend:
            await backend.create_group(self.topic, "g", "0")
            for number, _ in enumerate(self.scripts):
                key = str(number)
                message = Message(self.topic, key.encode(), key=key, headers={"tenant": key})
                self.uids[key] = message.uid
                await backend.publish(self.topic, message)
            for number in range(self.malformed):
                await self.harness.append_raw(self.topic, {"message": b"{", "n": str(number).encode()})
            await self._live(backend)
            while self.done < len(self.acts):
                async with StreamBus(Mortal(backend, self._saw), self._options()) as bus:
                    await self._act(bus)
                await self._live(backend)
            codes: dict[str, tuple[str | None, int]] = dict.fromkeys(self.keys, (None, 0))
            for _, key, letter in await self._dead():
                codes[key] = (letter.headers["dead-letter-code"], codes[key][1] + 1)
                self._look_at_letter(key, letter)
            return codes

    async def _live(self, backend: Any) -> None:
        while not await self._life(Mortal(backend, self._saw)):
            pass

    async def _dead(self) -> list[tuple[str, str, Message]]:
        """The dead letters: id, key, and the letter itself."""
        found = await self.harness.entries(f"{self.topic}.dead")
        return [(entry_id, _key(m, fields), m) for entry_id, m, fields in found if m is not None]

    async def _places(self) -> dict[str, dict[str, str]]:
        """By stream: the keys by id."""
        return {
            stream: {
                entry_id: _key(message, fields) for entry_id, message, fields in await self.harness.entries(stream)
            }
            for stream in (f"{self.topic}.dead", self.topic, self.retries)
        }

    def _options(self) -> StreamBusOptions:
        return StreamBusOptions(
            block_timeout=self.lease / 4,
            claim_idle_timeout=self.lease,
            reclaim_interval=self.lease / 10,
            ack_flush_interval=0,
            cleanup_timeout=self.lease / 4,
            observer=Silent(),
        )

    async def _life(self, mine: Mortal) -> bool:
        """One process, until it is killed (false), or nothing is left to do."""
        config = SubscriptionConfig(
            self.topic,
            "g",
            max_in_flight=self.max_in_flight,
            max_pending_acks=self.max_in_flight,
            max_retry=self.max_retry,
            max_deliveries=self.max_deliveries,
            retry_backoff=0.0,
            dead_letter_topic=f"{self.topic}.dead",
        )
        killed = anyio.Event()

        def kill() -> None:
            mine.is_dead = True
            killed.set()

        async def handler(delivery: Delivery) -> None:
            await self._handle(delivery, kill)

        with anyio.CancelScope() as scope:
            async with StreamBus(mine, self._options()) as bus, bus.subscribe(config, handler) as subscription:
                async with anyio.create_task_group() as tasks:

                    async def watch() -> None:
                        await killed.wait()
                        scope.cancel()

                    tasks.start_soon(watch)
                    while True:
                        while not await self._is_settled() or subscription.statistics().held:  # noqa: ASYNC110
                            await anyio.sleep(self.lease / 10)
                        if not self.live or self.done == len(self.acts):
                            break
                        await self._act(bus)
                    tasks.cancel_scope.cancel()
        return not killed.is_set()

    def _saw(self, stream: str, entries: Sequence[FetchedEntry]) -> None:
        if stream == self.topic:
            self.first_ids |= {e.message.key: e.id for e in entries if isinstance(e, ClaimedMessage)}

    async def _handle(self, delivery: Delivery, kill: Callable[[], None]) -> None:
        key = delivery.message.key
        script = self.scripts[int(key)]
        done = self.outcomes[key]
        # Whoever handled it once, and was killed before the server had the acknowledgement, can do it again.
        outcome = script[len(done)] if len(done) < len(script) and OK not in done else OK
        done.append(outcome)
        self.attempts[key].append(delivery.state.attempt)
        self._look_at_message(delivery)
        await checkpoint()
        if outcome == FAIL:
            raise RuntimeError("x")
        if outcome == RETRY:
            raise Retry("x")
        if outcome == REJECT:
            raise Reject("x")
        if outcome == RELEASE:
            await delivery.release()
        if outcome == CRASH:
            kill()
            await anyio.sleep_forever()

    def _look_at_message(self, delivery: Delivery) -> None:
        """What is handled is what was published, with the bus's headers of this life and of no former one."""
        message, attempt = delivery.message, delivery.state.attempt
        key = message.key
        seen = (message.uid, message.topic, message.payload, message.headers.get("tenant"))
        if seen != (self.uids[key], self.topic, key.encode(), key):
            self.wrong.append(f"{key} is changed: {seen}")
        if any(name.startswith("dead-letter-") for name in message.headers):
            self.wrong.append(f"{key} has headers of its death: {message.headers}")
        told = message.headers.get("retry-attempt"), "retry-reason" in message.headers
        if told != ((None, False) if attempt == 1 else (str(attempt - 1), True)):
            self.wrong.append(f"{key}, attempt {attempt}, says {told}")

    def _look_at_letter(self, key: str, letter: Message) -> None:
        if key in self.uids and (letter.uid, letter.payload, letter.headers["tenant"]) != (
            self.uids[key],
            key.encode(),
            key,
        ):
            self.wrong.append(f"the dead letter of {key} is changed: {letter.uid} {letter.payload!r}")
        if key in self.uids and letter.headers["dead-letter-id"] != self.first_ids[key]:
            self.wrong.append(f"the dead letter of {key} names {letter.headers['dead-letter-id']}")
        if letter.headers["dead-letter-code"] in ("retries", "rejected") and letter.headers[
            "dead-letter-attempts"
        ] != str(self.attempts[key][-1]):
            self.wrong.append(f"the dead letter of {key} counts {letter.headers['dead-letter-attempts']} attempts")

    async def _is_settled(self) -> bool:
        """Every message has had its last outcome, and nothing is left anywhere."""
        ended = {key for _, key, _ in await self._dead()} | self.purged
        ended |= {key for key, outcomes in self.outcomes.items() if outcomes[-1] == OK}
        if len(ended) < len(self.keys):
            return False
        return not await self.harness.pending(self.topic, "g") and not await self.harness.pending(self.retries, "g")

    async def _act(self, bus: StreamBus) -> None:
        """The operator's next act, again if it was interrupted, and what must hold then."""
        act = self.acts[self.done]
        letters = bus.dead_letters(self.topic, code=act.code)
        meant = {
            letter_id: key
            for letter_id, key, letter in await self._dead()
            if act.code in (None, letter.headers["dead-letter-code"]) and (act.keys is None or key in act.keys)
        }
        chosen = None if act.keys is None else [*meant, "1-1"]
        before = await self._places()
        if act.cut is not None and await self._interrupted(letters, chosen, act, act.cut):
            self._check_places(act, meant, before, await self._places(), done=False)
        counts: list[int] = []
        async with anyio.create_task_group() as tasks:
            for _ in range(2 if act.twice else 1):
                tasks.start_soon(self._perform, letters, chosen, act, counts.append)
        if act.cut is None:
            assert sum(counts) == len(meant), "each is counted once, however many do it at once"
        self._check_places(act, meant, before, await self._places(), done=True)
        if act.what == "purge":
            self.purged |= set(meant.values())
        else:
            self.replays.update(meant.values())
        self.done += 1

    async def _perform(
        self,
        letters: DeadLetters,
        chosen: Sequence[str] | None,
        act: Act,
        count: Callable[[int], None],
        on_progress: Callable[[ReplayProgress], None] | None = None,
    ) -> None:
        if act.what == "purge":
            count(await letters.purge(chosen))
            return
        # As slow as this, every letter is a step of its own.
        rate = None if act.cut is None else 39
        report = await letters.replay(chosen, to=act.what, rate=rate, on_progress=on_progress)
        count(report.replayed)
        assert report.failed == 0

    async def _interrupted(self, letters: DeadLetters, chosen: Sequence[str] | None, act: Act, cut: Cut) -> bool:
        """Begin; whether something came in between."""
        told = 0
        counts: list[int] = []

        def on_progress(progress: ReplayProgress) -> None:
            nonlocal told
            told += 1
            if told == cut.after and cut.how == "cancel":
                scope.cancel()
            if told == cut.after and cut.how == "raise":
                raise StopHereError

        async with anyio.create_task_group() as tasks:

            async def interrupt() -> None:
                for _ in range(cut.after):
                    await checkpoint()
                scope.cancel()

            with anyio.CancelScope() as scope:
                if cut.how == "steps":
                    tasks.start_soon(interrupt)
                with contextlib.suppress(StopHereError):
                    await self._perform(letters, chosen, act, counts.append, on_progress)
            tasks.cancel_scope.cancel()
        return not counts

    def _check_places(
        self,
        act: Act,
        meant: dict[str, str],
        before: dict[str, dict[str, str]],
        after: dict[str, dict[str, str]],
        *,
        done: bool,
    ) -> None:
        """Each letter is where it was, or has gone where it should; never both, never neither."""
        dead = f"{self.topic}.dead"
        others = {entry_id: key for entry_id, key in before[dead].items() if entry_id not in meant}
        there = {entry_id: key for entry_id, key in after[dead].items() if entry_id in before[dead]}
        assert others.items() <= there.items(), "what was not meant stays"
        left = Counter(there[entry_id] for entry_id in meant if entry_id in there)
        assert not (done and left), f"{left} stay"
        if self.live:
            return  # they are being handled, and may be settled already
        assert after[dead] == there, "nothing else came in between"
        came: Counter[str] = Counter()
        for stream in (self.topic, self.retries):
            new = Counter(key for entry_id, key in after[stream].items() if entry_id not in before[stream])
            assert not new or (act.what == "topic") == (stream == self.topic), f"{new} went to {stream}"
            came += new
        if act.what == "purge":
            assert not came
        else:
            assert left + came == Counter(meant.values()), f"left: {left}, went back: {came}, of {meant}"


def _key(message: Message | None, fields: Any) -> str:
    """The key; of a malformed entry, dead or alive, the number that it has in a field."""
    number = fields.get("raw:n", fields.get("n"))
    if number is not None:
        return f"bad{number.decode()}"
    assert message is not None
    return message.key
