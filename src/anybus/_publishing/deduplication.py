"""Deduplication on publish: by which key, and within which window, a message counts as published before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .._ground.checks import refuse
from .._ground.errors import UnsupportedError
from .._messages.message import Message, lift_headers
from .._options import PublishOptions
from ..abc import StreamBackend

DEFAULT_WINDOW: Final = 120.0
"""The window in seconds of a key that is given without one."""


def check_deduplication(options: PublishOptions, backend: StreamBackend) -> None:
    """
    :raises UnsupportedError: if the options ask for deduplication, and the backend cannot do it.
    """
    if "dedup" in backend.features:
        return
    key, window = options.idempotency_key, options.deduplication_window
    if key is not None or window is not None:
        given = f"idempotency_key={key!r:.80}" if key is not None else f"deduplication_window={window}"
        raise UnsupportedError(f"{type(backend).__name__} cannot deduplicate what is published ({given})")


def with_key(message: Message, options: PublishOptions) -> tuple[Message, str | None, float]:
    """Apply the idempotency key of the options.

    :return: the message as it is stored, the key by which it is deduplicated (None = it is not), and the window.
    :raises ValidationError: if the message has another key of its own.
    """
    key, window = options.idempotency_key, options.deduplication_window
    if key is None and window is None:
        return message, None, 0.0
    own = lift_headers(message).idempotency_key or None
    if key is None:
        return message, own, window or DEFAULT_WINDOW
    if own is None:
        message = message.replace(idempotency_key=key)
    elif own != key:
        refuse("idempotency_key", key, f"unset, or the message's own ({own!r:.80})")
    return message, key, window or DEFAULT_WINDOW


def check_batch(messages: Iterable[Message], options: PublishOptions) -> Iterable[Message]:
    """Refuse one key for several messages: all but the first would count as duplicates.

    :return: the messages.
    :raises ValidationError: if there is more than one.
    """
    if options.idempotency_key is None:
        return messages
    listed = list(messages)
    if len(listed) > 1:
        allowed = (
            f"unset for a batch of {len(listed)} messages (give each Message its own idempotency_key, and set "
            "PublishOptions(deduplication_window=...))"
        )
        refuse("idempotency_key", options.idempotency_key, allowed)
    return listed
