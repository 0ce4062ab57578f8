"""The floors: blocking sockets and hiredis, without an event loop. Of a bus they have only the envelope.

They wait for each reply before they send the next command. So they never work at the same time as the server does.
"""

from __future__ import annotations

from collections.abc import Sequence

from _costs import Stopwatch
from _figures import Measured
from _wire import AT_ONCE, GROUP, TOPIC, Wire, check_drained, check_length, clear, forget_group

from anybus import JsonCodec, Message


def drain(port: int, count: int) -> Measured:
    """It repeats: read 200, decode each, call a function, acknowledge 200."""
    decode = JsonCodec().decode

    def handler(message: Message) -> None:
        return

    with Wire(port) as wire:
        watch = Stopwatch(port)
        wire.call("XGROUP", "CREATE", TOPIC, GROUP, "0")
        left = count
        while left:
            [[_, entries]] = wire.call("XREADGROUP", "GROUP", GROUP, "floor", "COUNT", AT_ONCE, "STREAMS", TOPIC, ">")
            for _, fields in entries:
                handler(decode(fields[1]))
            wire.call("XACK", TOPIC, GROUP, *[entry_id for entry_id, _ in entries])
            left -= len(entries)
        measured = watch.stop(count)
    check_drained(port, count)
    forget_group(port)
    return measured


def publish_pipelined(port: int, messages: Sequence[Message]) -> Measured:
    """It repeats: encode 200, send them in one write, read 200 replies."""
    encode = JsonCodec().encode
    clear(port)
    with Wire(port) as wire:
        watch = Stopwatch(port)
        for start in range(0, len(messages), AT_ONCE):
            part = messages[start : start + AT_ONCE]
            wire.pipeline([("XADD", TOPIC, "*", "message", encode(message)) for message in part])
        measured = watch.stop(len(messages))
    check_length(port, len(messages))
    return measured
