"""A signal, turned into cancellation, loses nothing.

A program of its own (``children/signalled.py``) publishes and handles messages: some handlers return at once, some
wait, some fail and are retried, some reject, some settle by hand. At a random moment it is sent SIGINT or SIGTERM,
which it takes by ``anyio.open_signal_receiver`` and turns into the cancellation of its scope: two hundred times over
the three event loops (a few times in a short run). It ends in time, with exit status 0 and no task left; and as the backend says, every message is
unread, or settled as its handling demands (acked if its handler had returned, in the retry stream if that had raised,
a dead letter if that had rejected it), or pending and handed back: owned by ``anybus:returned``, not counted, there
for whoever reclaims.

A bare Ctrl-C, of which the program knows nothing, ends it too, without a hang, and says so: ``KeyboardInterrupt``
on standard error, and an exit status that is not 0.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sweeps import sampled

CHILD = Path(__file__).parent / "children" / "signalled.py"
RETURNED = "anybus:returned"
TOPIC, RETRIES, DEAD = "work", "anybus:{work}:retry:g", "work.dead"
LOOPS = ("asyncio", "uvloop", "trio")
AT_ONCE = 4
STARTS_IN = 60.0
ENDS_IN = 30.0
LATEST = 0.06
"""Seconds after which at the latest the signal is sent. By then thousands of messages may be through."""

SEED = int(os.environ.get("ANYBUS_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    moment: float
    how: signal.Signals
    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"{self.how.name} after {self.moment * 1000:.2f} ms: status {self.status}\n{self.err[-3000:]}"


def run_child(loop: str, mode: str, how: signal.Signals, moment: float) -> Ended:
    """Start the program, wait until it is at work, send it the signal at that moment, and wait for its end."""
    with subprocess.Popen(
        [sys.executable, str(CHILD), loop, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        # A child that hangs before the signal, or after it, is killed, and so has a status that is not expected.
        assert child.stdout is not None
        starter = ThreadPoolExecutor(1)
        try:
            assert starter.submit(child.stdout.readline).result(STARTS_IN) == "ready\n"
            time.sleep(moment)
            child.send_signal(how)
            out, err = child.communicate(timeout=ENDS_IN)
        except subprocess.TimeoutExpired:
            child.kill()
            _, err = child.communicate()
            raise AssertionError(f"{how.name} after {moment * 1000:.2f} ms: it does not end\n{err[-3000:]}") from None
        finally:
            child.kill()
            starter.shutdown()
        return Ended(moment, how, child.returncode, out, err)


def run_children(loop: str, mode: str, hows: list[signal.Signals], check: Callable[[Ended], None]) -> None:
    """Several at a time, each at a moment of its own; all are looked at, and all that is wrong is told."""
    dice = random.Random(f"{SEED} {loop} {mode}")
    print(f"ANYBUS_SEED={SEED}")
    moments = [dice.uniform(0, LATEST) for _ in hows]
    wrong: list[str] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for future in [pool.submit(run_child, loop, mode, *at) for at in zip(hows, moments, strict=True)]:
            try:
                ended = future.result()
                try:
                    check(ended)
                except AssertionError as error:
                    raise AssertionError(f"{ended}: {error}") from error
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {len(hows)} (ANYBUS_SEED={SEED}); the first: {wrong[0]}"


def check_accounts(ended: Ended) -> int:
    """Every message is accounted for. Returns how many were handed back."""
    assert ended.status == 0
    assert ended.err == ""
    report: dict[str, Any] = json.loads(ended.out)
    assert report["cancelled"]
    assert report["tasks_left"] == 0
    assert report["errors"] == []
    assert report["at_once"] == []
    states = {name: states_of(stream) for name, stream in report["streams"].items()}
    assert set(report["published"]) <= states[TOPIC].keys(), "a published message is missing"
    assert states[TOPIC].keys() <= set(report["tried"])
    returned, failed, rejected = (Counter(report[name]) for name in ("returned", "failed", "rejected"))
    assert returned, "nothing was handled: this was no test"
    for uid, state in states[TOPIC].items():
        retry, dead = states[RETRIES].get(uid, ""), states[DEAD].get(uid, "")
        whole = (uid, state, retry, dead, returned[uid], failed[uid], rejected[uid])
        assert returned[uid] <= 1, whole
        if failed[uid]:
            # Acked here, since it was transferred; in the retry stream its second handling decides.
            assert state == "acked", whole
            assert (retry in ("", "acked")) == (returned[uid] == 1), whole
        else:
            assert (state == "acked") == (returned[uid] + rejected[uid] == 1), whole
            assert retry == "", whole
        assert (dead != "") == (rejected[uid] == 1), whole
    return sum(state == "pending" for stream in states.values() for state in stream.values())


def states_of(stream: dict[str, list[list[Any]]]) -> dict[str, str]:
    """By uid: unread, pending or acked; having looked at whose what is pending is, and that all of it was there."""
    pending = {entry_id for entry_id, _, _ in stream["pending"]}
    unread = {entry_id for (entry_id,) in stream["unread"]}
    for entry in stream["pending"]:
        assert entry[1:] == [RETURNED, 0], entry
    assert {entry_id for (entry_id,) in stream["reclaimed"]} == pending
    assert {name for (name,) in stream["consumers"]} <= {RETURNED}
    states = defaultdict[str, list[str]](list)
    for entry_id, uid in stream["entries"]:
        states[uid].append("unread" if entry_id in unread else "pending" if entry_id in pending else "acked")
    assert pending | unread <= {entry_id for entry_id, _ in stream["entries"]}
    for uid, found in states.items():
        assert len(found) == 1, (uid, found)
    return {uid: found[0] for uid, found in states.items()}


@pytest.mark.timeout(900)
@sampled("signals", 8, 67)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_signal_that_becomes_a_cancellation_loses_nothing(loop: str, signals: int) -> None:
    hows = [(signal.SIGINT, signal.SIGTERM)[number % 2] for number in range(signals)]
    handed_back: list[int] = []
    run_children(loop, "receiver", hows, lambda ended: handed_back.append(check_accounts(ended)))
    print(f"{sum(handed_back)} messages were handed back after {len(handed_back)} signals")
    assert all(handed_back), "a signal came when nothing was at stake"


@pytest.mark.timeout(900)
@sampled("signals", 2, 10)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_bare_ctrl_c_ends_the_program_without_a_hang_and_says_so(loop: str, signals: int) -> None:
    # AnyIO's own way of ending asyncio's main task on Ctrl-C makes it a CancelledError before Python 3.11, bus or no bus.
    said = "KeyboardInterrupt" if loop == "trio" or sys.version_info >= (3, 11) else "CancelledError"

    def check(ended: Ended) -> None:
        assert ended.status != 0
        assert said in ended.err
        assert ended.out == ""

    run_children(loop, "bare", [signal.SIGINT] * signals, check)
