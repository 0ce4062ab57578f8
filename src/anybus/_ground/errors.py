"""The errors that the library raises."""

from __future__ import annotations

from functools import partial
from typing import Any


class EventBusError(Exception):
    """Base class of the library's errors."""


class ValidationError(EventBusError, ValueError):
    """A value was refused. The text names the field, the value and what is allowed."""


class UnsupportedError(EventBusError):
    """The backend cannot do what was asked, and there is no fallback that keeps the promise."""


class AlreadySettledError(EventBusError):
    """The delivery has already been settled. A delivery can be settled only once."""


class LeaseLostError(EventBusError):
    """The backend says that the entry no longer belongs to this consumer: another one has it, or it is settled."""


class ClosedError(EventBusError):
    """The bus or the subscription is not open: it has ended, or it has not been entered yet."""


class HandlerTimeoutError(EventBusError, TimeoutError):
    """A handler was cancelled after ``handler_timeout``. Reported and passed to policies; handlers never see it."""


class SerializationError(EventBusError):
    """A payload could not be encoded, or data could not be decoded into what was asked for.

    :ivar payload_of: the uid of the message whose payload :meth:`Message.json` could not read; None = the error is
        about something else. If a handler lets this error out for its own message, the message is not retried.
    """

    def __init__(self, message: str = "", *, payload_of: str | None = None) -> None:
        super().__init__(message)
        self.payload_of = payload_of


class BackendError(EventBusError):
    """The backend failed.

    :ivar may_have_happened: true if the server may have carried out the command; false if it certainly has not.
    :ivar can_pass: true for a transient error: a later try may succeed (a broken connection, a server that is loading).
        False for a permanent error: it is known that no try will succeed until somebody changes something (a wrong
        type, a missing permission). A subscription survives transient errors, and ends with a permanent one.
    """

    def __init__(self, message: str, *, may_have_happened: bool = True, can_pass: bool = True) -> None:
        super().__init__(message)
        self.may_have_happened = may_have_happened
        self.can_pass = can_pass


class NotConfirmedError(BackendError):
    """The message is stored on the server that took it, but not as safely as ``confirmation`` demands, in time.

    Publishing it again would store it twice.

    :ivar entry_id: the id of the stored entry.
    """

    def __init__(self, message: str, *, entry_id: str) -> None:
        super().__init__(message, may_have_happened=True, can_pass=True)
        self.entry_id = entry_id

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), entry_id=self.entry_id), (str(self),), self.__dict__


class ServerFullError(BackendError):
    """The server has no memory left for what was asked. Nothing was stored. It may pass: somebody may free memory."""


class GroupLostError(BackendError):
    """The consumer group, or its whole stream, no longer exists on the backend. The bus recreates it.

    :ivar stream: the stream to which the group belonged.
    :ivar group: the group.
    :ivar safe_id: the id up to which all members of the group had settled everything; None = the backend does not know.
        The group is recreated at this position, or at ``"0"`` if it is not known.
    """

    def __init__(self, stream: str, group: str, safe_id: str | None = None) -> None:
        super().__init__(
            f"group {group!r} of stream {stream!r} no longer exists", may_have_happened=False, can_pass=True
        )
        self.stream = stream
        self.group = group
        self.safe_id = safe_id

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, an exception is copied and pickled by calling its type with its text alone.
        return type(self), (self.stream, self.group, self.safe_id), self.__dict__


def words(error: BaseException) -> str:
    """An exception's text; the name of its type if the text is empty or cannot be computed."""
    try:
        # str() may return an instance of a subclass.
        return str.__str__(str(error)) or type(error).__name__
    except Exception:
        return type(error).__name__


_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""The exceptions that programming errors raise."""


def can_pass(error: BaseException) -> bool:
    """Whether the error is transient, so that trying again may help.

    A ``BackendError`` says so itself. The bus's other errors and programming errors in a backend are permanent. All
    other errors (of the operating system, of a driver) are transient.
    """
    if isinstance(error, BackendError):
        return error.can_pass
    return isinstance(error, Exception) and not isinstance(error, (EventBusError, *_BUGS))


def may_have_happened(error: BaseException) -> bool:
    """Whether the backend may have done the work despite the error.

    A ``BackendError`` says so itself. With the bus's other errors nothing was done. Any other exception leaves it open.
    """
    return not isinstance(error, EventBusError) or (isinstance(error, BackendError) and error.may_have_happened)
