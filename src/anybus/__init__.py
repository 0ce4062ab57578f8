"""anybus: an at-least-once event bus for AnyIO."""

from typing import TYPE_CHECKING

from . import abc as abc
from ._bus import StreamBus as StreamBus
from ._codec import JsonCodec as JsonCodec
from ._codec import MsgpackCodec as MsgpackCodec
from ._connect import connect as connect
from ._dead_letters.letter import DeadLetter as DeadLetter
from ._dead_letters.replay import ReplayProgress as ReplayProgress
from ._dead_letters.replay import ReplayReport as ReplayReport
from ._dead_letters.view import DeadLetterPage as DeadLetterPage
from ._dead_letters.view import DeadLetters as DeadLetters
from ._failure.backoff import ExponentialBackoff as ExponentialBackoff
from ._failure.copies import retry_stream as retry_stream
from ._failure.policies import CircuitBreaker as CircuitBreaker
from ._failure.policies import Failure as Failure
from ._failure.verdicts import Reject as Reject
from ._failure.verdicts import Retry as Retry
from ._ground.errors import AlreadySettledError as AlreadySettledError
from ._ground.errors import BackendError as BackendError
from ._ground.errors import ClosedError as ClosedError
from ._ground.errors import EventBusError as EventBusError
from ._ground.errors import GroupLostError as GroupLostError
from ._ground.errors import HandlerTimeoutError as HandlerTimeoutError
from ._ground.errors import LeaseLostError as LeaseLostError
from ._ground.errors import NotConfirmedError as NotConfirmedError
from ._ground.errors import SerializationError as SerializationError
from ._ground.errors import ServerFullError as ServerFullError
from ._ground.errors import UnsupportedError as UnsupportedError
from ._ground.errors import ValidationError as ValidationError
from ._messages.message import Headers as Headers
from ._messages.message import Message as Message
from ._messages.schema import Schema as Schema
from ._messages.trace import TraceContext as TraceContext
from ._options import DROP as DROP
from ._options import PublishOptions as PublishOptions
from ._options import StreamBusOptions as StreamBusOptions
from ._options import SubscriptionConfig as SubscriptionConfig
from ._publishing.batch import BatchOutcome as BatchOutcome
from ._runtime.delivery import Delivery as Delivery
from ._runtime.keeper import DeliveryState as DeliveryState
from ._runtime.pool import Handler as Handler
from ._runtime.pull import DeliveryStream as DeliveryStream
from ._runtime.statistics import SubscriptionStatistics as SubscriptionStatistics
from ._runtime.subscription import Subscription as Subscription
from ._scheduling.delayed import Scheduled as Scheduled
from ._scheduling.delayed import ScheduledMessages as ScheduledMessages
from ._scheduling.delayed import ScheduledPage as ScheduledPage
from .abc import BusEvent as BusEvent
from .abc import Duplicate as Duplicate
from .abc import Interest as Interest
from .abc import Limits as Limits
from .abc import Observer as Observer
from .abc import Retention as Retention
from .abc import WorkQueue as WorkQueue
from .backends.memory.backend import MemoryBackend as MemoryBackend


def _show_public_names() -> None:
    """Tracebacks, pickles and dead-letter headers show the public name, anybus.BackendError for example."""
    for public in tuple(globals().values()):
        if isinstance(public, type) and issubclass(public, Exception):
            public.__module__ = __name__


_show_public_names()

__version__: str
"""The version of the installed package."""

if not TYPE_CHECKING:  # otherwise type checkers would accept any attribute of this module

    def __getattr__(name: str) -> str:
        if name == "__version__":
            # Imported late, because importlib.metadata would take a large part of this package's import time.
            from importlib.metadata import version  # noqa: PLC0415

            return version("anybus")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
