"""What a subscription expects of a message: its content type, its version, its size. The rest is not handled."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Union, cast

from .._ground.callables import check_function
from .._ground.checks import check_choice, check_text, plain_text, refuse
from .._messages.message import Message
from .settlement import Outcome, Result

OnExpired = Literal["dead-letter", "drop"]
UnexpectedVerdict = Literal["handle", "dead-letter", "drop"]
OnUnexpected = Union[Literal["dead-letter", "drop"], Callable[[Message], UnexpectedVerdict]]
Expected = Union[str, Sequence[Union[str, None]]]

ON_EXPIRED: Final[tuple[OnExpired, ...]] = ("dead-letter", "drop")
VERDICTS: Final[tuple[UnexpectedVerdict, ...]] = ("handle", "dead-letter", "drop")

_ON_UNEXPECTED = "'dead-letter', 'drop', or a function that takes one anybus.Message"
_NO_LIMIT: Final = sys.maxsize


def media_type(text: str) -> str:
    """A content type as it is compared: without parameters, in lower case."""
    return text.partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Expectations:
    """The expectations of one subscription.

    :ivar content_types: the expected media types, None among them if a message need not say; None = anything.
    :ivar event_versions: the same for the version.
    :ivar max_payload_bytes: larger payloads are not handled.
    """

    content_types: tuple[str | None, ...] | None = None
    event_versions: tuple[str | None, ...] | None = None
    on_unexpected: OnUnexpected = "dead-letter"
    max_payload_bytes: int = _NO_LIMIT

    @property
    def names_any(self) -> bool:
        """Whether more than the size is checked."""
        return self.content_types is not None or self.event_versions is not None

    def objection(self, message: Message, report: Callable[[BaseException, str], None]) -> Result | None:
        """The result for a message that must not be handled; None = it may be.

        :param report: is called if the function ``on_unexpected`` fails.
        """
        size = len(message.payload)
        if size > self.max_payload_bytes:
            limit = f"max_payload_bytes={self.max_payload_bytes}"
            return Result(Outcome.TOO_LARGE, f"its payload has {size} bytes ({limit})")
        reason = self._mismatch(message)
        if reason is None:
            return None
        verdict = self._verdict(message, report)
        return None if verdict == "handle" else Result(Outcome.UNEXPECTED, reason, dropped=verdict == "drop")

    def _mismatch(self, message: Message) -> str | None:
        if self.content_types is not None:
            given = media_type(message.content_type or "") or None
            if given not in self.content_types:
                return f"content type {message.content_type!r}, expected {_listed(self.content_types)}"
        if self.event_versions is not None and (message.event_version or None) not in self.event_versions:
            return f"event version {message.event_version!r}, expected {_listed(self.event_versions)}"
        return None

    def _verdict(self, message: Message, report: Callable[[BaseException, str], None]) -> UnexpectedVerdict:
        rule = self.on_unexpected
        if not callable(rule):
            return rule
        try:
            answer: Any = rule(message)
            if inspect.iscoroutine(answer):
                answer.close()  # nobody awaits it, and otherwise Python prints a warning
            for verdict in VERDICTS:
                if isinstance(answer, str) and plain_text(answer) == verdict:
                    return verdict
            raise TypeError(f"on_unexpected must return one of {', '.join(VERDICTS)}, not {answer!r:.80}")
        except (KeyboardInterrupt, SystemExit):
            raise  # perhaps from a signal handler, which can strike anywhere
        except BaseException as error:  # noqa: ASYNC103 - it awaits nothing: no real cancellation
            report(error, "on_unexpected failed: the message becomes a dead letter")
            return "dead-letter"  # noqa: ASYNC104


def _listed(expected: tuple[str | None, ...]) -> str:
    return " or ".join(repr(one) for one in expected)


def check_expected_content_type(field: str, value: Any) -> tuple[str | None, ...] | None:
    """Check ``expected_content_type``. The media types are returned in lower case; None = anything is expected."""
    return _check_expected(field, value, _check_media_type)


def check_expected_event_version(field: str, value: Any) -> tuple[str | None, ...] | None:
    """Check ``expected_event_version``."""
    return _check_expected(field, value, _check_version)


def _check_expected(field: str, value: Any, check: Callable[[str, object], str]) -> tuple[str | None, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return (check(field, value),)
    allowed = "a str, a list of them (None in the list: messages that do not say), or None"
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray, memoryview)):
        refuse(field, cast("object", value), allowed)
    listed = tuple(cast("Sequence[object]", value))
    if not listed:
        refuse(field, listed, f"{allowed}; an empty list would expect nothing")
    return tuple(None if one is None else check(field, one) for one in listed)


def _check_media_type(field: str, value: object) -> str:
    text = check_text(field, value)
    # Parameters and wildcards would have no effect: media types are compared without parameters, one by one.
    if not text.strip() or any(sign in text for sign in ";*,") or len(text.split()) > 1:
        refuse(field, value, "a media type without parameters and wildcards ('application/json')")
    return media_type(text)


def _check_version(field: str, value: object) -> str:
    text = check_text(field, value)
    if not text.strip():
        refuse(field, value, "a version that is not blank")
    return text


def check_on_unexpected(value: Any) -> OnUnexpected:
    """Check ``on_unexpected``: one of two words, or a plain function."""
    if isinstance(value, str):
        return check_choice("on_unexpected", value, ON_EXPIRED, allowed=_ON_UNEXPECTED)
    if not callable(value) or inspect.isclass(value):
        refuse("on_unexpected", value, _ON_UNEXPECTED)
    check_function("on_unexpected", value, _ON_UNEXPECTED)
    return cast("OnUnexpected", value)
