"""Every error that the library raises."""

from __future__ import annotations

from typing import Any


class EventBusError(Exception):
    """Base of every error that the library raises."""


class ValidationError(EventBusError, ValueError):
    """A value was refused at the door: the text names the field, the value and what is allowed."""


class UnsupportedError(EventBusError):
    """The backend cannot do what was asked, and no fallback keeps the promise."""


class AlreadySettledError(EventBusError):
    """The delivery has been settled already; a delivery is settled exactly once."""


class LeaseLostError(EventBusError):
    """The backend says that the entry is no longer ours: another consumer has it, or it is settled."""


class ClosedError(EventBusError):
    """The bus or the subscription has ended; nothing can be done with it any more."""


class HandlerTimeoutError(EventBusError, TimeoutError):
    """A handler was cancelled after ``handler_timeout``. Reported, and shown to policies: handlers never see it."""


class SerializationError(EventBusError):
    """A payload could not be turned into bytes, or bytes not into what was asked for.

    :ivar payload_of: the uid of the message whose payload could not be read by :meth:`Message.json`; None = the error
        is about something else. Raised by the handler of that very message, it is not retried.
    """

    def __init__(self, message: str = "", *, payload_of: str | None = None) -> None:
        super().__init__(message)
        self.payload_of = payload_of


class BackendError(EventBusError):
    """The backend failed.

    :ivar may_have_happened: true if the server may have carried the command out all the same; false = surely not.
    :ivar can_pass: true for a transient error: trying again later may succeed (a broken connection, a server that is
        loading). False only if it is known that it will not, until somebody changes something (a wrong type, no
        permission). A subscription waits out transient errors; any other ends it.
    """

    def __init__(self, message: str, *, may_have_happened: bool = True, can_pass: bool = True) -> None:
        super().__init__(message)
        self.may_have_happened = may_have_happened
        self.can_pass = can_pass


class GroupLostError(BackendError):
    """The consumer group (or its whole stream) has vanished from the backend. The bus makes it again.

    :ivar stream: the stream whose group it was.
    :ivar group: the group.
    :ivar safe_id: the id up to which every member of the group had settled everything, if the backend knows;
        the group is made again there, else at ``"0"``.
    """

    def __init__(self, stream: str, group: str, safe_id: str | None = None) -> None:
        super().__init__(
            f"group {group!r} of stream {stream!r} no longer exists", may_have_happened=False, can_pass=True
        )
        self.stream = stream
        self.group = group
        self.safe_id = safe_id

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is copied and pickled by calling its type with what it says, unless it tells otherwise.
        return type(self), (self.stream, self.group, self.safe_id), self.__dict__


def words(error: BaseException) -> str:
    """What an exception says; its type's name if it says nothing, or cannot."""
    try:
        # Plain: what str() returns may be of a subclass of str.
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
"""What a mistake in a program raises."""


def can_pass(error: BaseException) -> bool:
    """Whether trying again may help. Permanent is only what is known to be: a backend's own word, the bus's other
    errors, and mistakes in the backend's code. All else (the operating system's errors, a driver's) is transient.
    """
    if isinstance(error, BackendError):
        return error.can_pass
    return isinstance(error, Exception) and not isinstance(error, (EventBusError, *_BUGS))


def may_have_happened(error: BaseException) -> bool:
    """Whether the backend may have done the work all the same; only a backend can say no."""
    return not isinstance(error, EventBusError) or (isinstance(error, BackendError) and error.may_have_happened)
