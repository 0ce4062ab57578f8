"""Options of the bus, of a subscription and of a publish. Frozen, and validated when created."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from ._failure.backoff import ExponentialBackoff
from ._failure.expectations import (
    ON_EXPIRED,
    Expected,
    OnExpired,
    OnUnexpected,
    check_expected_content_type,
    check_expected_event_version,
    check_on_unexpected,
)
from ._failure.policies import Backoff, CircuitBreaker, Rules, check_backoff, check_no_contradiction, check_rules
from ._failure.settlement import AckMode
from ._ground.callables import check_function
from ._ground.checks import check_choice, check_delay, check_int, check_name, check_start_id, check_topic, refuse
from ._ground.windows import check_window
from ._messages.message import Headers
from .abc import Confirmation
from .abc._idempotency import IdempotencyStore
from .abc._observer import Observer
from .abc._retention import Retention, check_retention

Guarantee = Literal["at-least-once", "at-most-once", "exactly-once"]
OnLeaseLost = Literal["continue", "cancel"]

CONFIRMATIONS: Final[tuple[Confirmation, ...]] = ("accepted", "replicated", "persisted")
GUARANTEES: Final[tuple[Guarantee, ...]] = ("at-least-once", "at-most-once", "exactly-once")
ACK_MODES: Final[tuple[AckMode, ...]] = ("auto-on-handler-success", "manual", "auto-on-receive")
LEASE_LOST: Final[tuple[OnLeaseLost, ...]] = ("continue", "cancel")
LABEL_SUFFIX_BYTES: Final = 17
DEFAULT_BACKOFF: Final = ExponentialBackoff()
DEFAULT_MAX_RETRY: Final = 3
DEFAULT_MAX_DELIVERIES: Final = 10
DEFAULT_CONFIRMATION_TIMEOUT: Final = 2.0
DEFAULT_IDEMPOTENCY_WINDOW: Final = 86_400.0
LONGEST_IDEMPOTENCY_WINDOW: Final = 90 * 86_400.0
MAX_TTL: Final = 10 * 365.25 * 86400
"""Ten years in seconds: the longest ``topic_ttl``."""


class Drop(enum.Enum):
    """The type of :data:`DROP`."""

    DROP = "DROP"

    def __repr__(self) -> str:
        return "anybus.DROP"


DROP: Final = Drop.DROP
"""As ``dead_letter_topic``: messages that are given up on are acknowledged and dropped."""


def _keep(options: StreamBusOptions | SubscriptionConfig, name: str, value: object) -> None:
    """Replace a given value by the one that its check returned."""
    object.__setattr__(options, name, value)


def _check_observer(observer: object) -> None:
    if not isinstance(observer, Observer):
        refuse("observer", observer, "an instance of anybus.Observer, or None")
    for name in vars(Observer):
        if name.startswith("on_"):
            check_function(f"observer.{name}", getattr(observer, name), "a plain function that takes one BusEvent")


@dataclass(frozen=True, kw_only=True)
class StreamBusOptions:
    """Options of a bus. Durations are seconds, sizes are bytes.

    :param block_timeout: how long one read waits for new entries before the next read begins. A read never waits longer
        than a third of the lease.
    :param claim_idle_timeout: the lease: how long a pending entry belongs to its consumer, unless it is renewed. All
        members of a group must use the same value, because each of them may reclaim the entries of the others. If the
        backend is an :class:`anybus.abc.LeaseKeeper`, a new member with a value other than that of the running members
        is refused.
    :param change_lease: if the running members use another ``claim_idle_timeout``, change it for all of them. They
        adopt the new value within seconds, and report it.
    :param claim_scan_batch_size: the maximum number of entries that one reclaim takes.
    :param reclaim_interval: the pause between two passes over idle entries and due retries. (A backend that
        knows that there are none leaves a pass out.)
    :param group_start_id: where a group starts if it is created: ``"$"`` = only entries published later, ``"0"`` = from
        the first entry, an entry's id = after that entry.
    :param publish_timeout: the time limit of a publish, including the wait for a connection.
    :param publish_buffer_size: how many messages ``publish_nowait`` holds at most, until they are sent; 0 = it is not
        available.
    :param ack_batch_size: acknowledgements are sent as soon as this many are waiting.
    :param ack_flush_interval: waiting acknowledgements are sent after this time at the latest.
    :param max_payload_bytes: larger payloads are refused when they are published, and are not handled when they are
        received: such a message becomes a dead letter with the code ``too-large``. 0 = no limit.
    :param close_timeout: how long a graceful end waits for running handlers before it cancels them.
    :param cleanup_timeout: how long the end may take to settle what is left.
    :param retention: the retention of topics that have none declared, applied when a subscription of this bus starts:
        :class:`Limits`, :class:`Interest` or :class:`WorkQueue`. It does not apply to topics that end in ``.dead``.
        None = such topics are never trimmed.
    :param observer: told of everything that happens. Errors are logged by the ``anybus`` logger, unless the observer
        overrides ``on_error``.
    :raises ValidationError: if a value is refused.
    """

    block_timeout: float = 2.0
    claim_idle_timeout: float = 60.0
    change_lease: bool = False
    claim_scan_batch_size: int = 64
    reclaim_interval: float = 0.5
    group_start_id: str = "$"
    publish_timeout: float = 5.0
    publish_buffer_size: int = 0
    ack_batch_size: int = 64
    ack_flush_interval: float = 0.002
    max_payload_bytes: int = 4 * 1024 * 1024
    close_timeout: float = 30.0
    cleanup_timeout: float = 5.0
    retention: Retention | None = None
    observer: Observer | None = None

    def __post_init__(self) -> None:
        for name in ("block_timeout", "claim_idle_timeout", "reclaim_interval", "publish_timeout", "cleanup_timeout"):
            _keep(self, name, check_delay(name, getattr(self, name), positive=True))
        for name in ("ack_flush_interval", "close_timeout"):
            _keep(self, name, check_delay(name, getattr(self, name)))
        for name in ("claim_scan_batch_size", "ack_batch_size", "publish_buffer_size", "max_payload_bytes"):
            least = 0 if name in ("publish_buffer_size", "max_payload_bytes") else 1
            _keep(self, name, check_int(name, getattr(self, name), least=least))
        if not isinstance(self.change_lease, bool):
            refuse("change_lease", self.change_lease, "True or False")
        _keep(self, "group_start_id", check_start_id("group_start_id", self.group_start_id))
        if self.retention is not None:
            _keep(self, "retention", check_retention("retention", self.retention))
        if self.observer is not None:
            _check_observer(self.observer)


@dataclass(frozen=True)
class SubscriptionConfig:
    """The configuration of a subscription. Keyword-only after topic and group. Durations are seconds.

    :param topic: the topic whose messages are handled.
    :param group: the consumer group whose members share the work.
    :param consumer: a label for this member. Its name on the server is ``<label>-<unique>``. No other member
        of the group ever has that name.
    :param guarantee: ``at-least-once`` (the default), ``at-most-once``: messages are acknowledged when they are
        received, and never retried, or ``exactly-once``: a message is not handled if one with the same key was
        handled before. None = what ``ack_mode`` implies.
    :param ack_mode: ``auto-on-handler-success`` (the default), ``manual``, or ``auto-on-receive`` (the only mode for
        ``at-most-once``). None = what ``guarantee`` implies.
    :param max_in_flight: the maximum number of handlers that run at once.
    :param max_pending_acks: the maximum number of entries that are held at once, at least ``max_in_flight``; None =
        twice ``max_in_flight``.
    :param max_retry: the number of retries after the first handling; None = 3, which means four handlings.
    :param max_deliveries: how many deliveries of one entry may end without an outcome (by a crash, for example), at
        least 4; None = 10.
    :param retry_backoff: how long a failed message waits for its retry: an :class:`ExponentialBackoff`, a number of
        seconds, a list of seconds (the last one repeats), or a function that takes a :class:`Failure` and returns
        seconds.
    :param retry_on: an exception type, a function that takes an exception, or a list of these. Only failures that match
        are retried; others are given up on at once. None = all failures are retried.
    :param give_up_on: a type, a function or a list, as in ``retry_on``. Failures that match are given up on at once,
        whatever ``retry_on`` says. None = no failure matches.
    :param max_age: a message is given up on if its first entry was stored longer ago than this; None = never.
    :param on_expired: what happens to a message that is too old to be handled, by its ``expires_at`` or by ``max_age``:
        ``dead-letter`` (with the code ``expired``), or ``drop`` (it is acknowledged).
    :param expected_content_type: a media type, or a list of them; None in the list = also messages without one. A
        message with another one is not handled. Compared without parameters, and whatever the case. None = any.
    :param expected_event_version: the same for the version of the payload's schema, compared exactly.
    :param on_unexpected: what happens to a message that does not match these two: ``dead-letter`` (with the code
        ``unexpected``), ``drop``, or a plain function of the message that returns ``handle``, ``dead-letter`` or
        ``drop``. If it fails, this is reported, and the message becomes a dead letter.
    :param dead_letter_topic: where messages go that are given up on; None = ``<topic>.dead``; :data:`DROP` = they are
        dropped.
    :param circuit: pauses the subscription while its handler keeps failing; None = never.
    :param handler_timeout: a handler that runs longer is cancelled, which counts as a failure; None = no limit.
    :param group_start_id: where the group starts if it is created; None = the value of the bus's options.
    :param on_lease_lost: ``continue`` (``delivery.lease_lost`` tells the handler), or ``cancel`` the handler.
    :param wait_if_full: if the server is full when the subscription starts, wait until there is room. Otherwise
        entering raises :class:`ServerFullError` after ``publish_timeout``.
    :param idempotency_store: for ``exactly-once``, remembers which keys were handled; None = the backend's own store.
    :param idempotency_window: for ``exactly-once``, for how many seconds a handled key is remembered, at most 90 days;
        None = one day.
    :raises ValidationError: if a value is refused, or contradicts another one.
    """

    topic: str
    group: str
    consumer: str = field(default="consumer", kw_only=True)
    guarantee: Guarantee | None = field(default=None, kw_only=True)
    ack_mode: AckMode | None = field(default=None, kw_only=True)
    max_in_flight: int = field(default=16, kw_only=True)
    max_pending_acks: int | None = field(default=None, kw_only=True)
    max_retry: int | None = field(default=None, kw_only=True)
    max_deliveries: int | None = field(default=None, kw_only=True)
    retry_backoff: Backoff = field(default=DEFAULT_BACKOFF, kw_only=True)
    retry_on: Rules | None = field(default=None, kw_only=True)
    give_up_on: Rules | None = field(default=None, kw_only=True)
    max_age: float | None = field(default=None, kw_only=True)
    on_expired: OnExpired = field(default="dead-letter", kw_only=True)
    expected_content_type: Expected | None = field(default=None, kw_only=True)
    expected_event_version: Expected | None = field(default=None, kw_only=True)
    on_unexpected: OnUnexpected = field(default="dead-letter", kw_only=True)
    dead_letter_topic: str | Drop | None = field(default=None, kw_only=True)
    circuit: CircuitBreaker | None = field(default=None, kw_only=True)
    handler_timeout: float | None = field(default=None, kw_only=True)
    group_start_id: str | None = field(default=None, kw_only=True)
    on_lease_lost: OnLeaseLost = field(default="continue", kw_only=True)
    wait_if_full: bool = field(default=False, kw_only=True)
    idempotency_store: IdempotencyStore | None = field(default=None, kw_only=True)
    idempotency_window: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _keep(self, "topic", check_topic("topic", self.topic))
        _keep(self, "group", check_name("group", self.group))
        _keep(self, "consumer", check_name("consumer", self.consumer, max_bytes=256 - LABEL_SUFFIX_BYTES))
        if self.guarantee is not None:
            allowed = f"one of {', '.join(GUARANTEES)}, or None"
            _keep(self, "guarantee", check_choice("guarantee", self.guarantee, GUARANTEES, allowed=allowed))
        if self.ack_mode is not None:
            allowed = f"one of {', '.join(ACK_MODES)}, or None"
            _keep(self, "ack_mode", check_choice("ack_mode", self.ack_mode, ACK_MODES, allowed=allowed))
        _keep(self, "max_in_flight", check_int("max_in_flight", self.max_in_flight, least=1))
        # With fewer than four deliveries, an entry would be given up on before it was ever handled alone, as a suspect.
        for name, least in (("max_pending_acks", 1), ("max_retry", 0), ("max_deliveries", 4)):
            if getattr(self, name) is not None:
                _keep(self, name, check_int(name, getattr(self, name), least=least))
        if self.max_pending_acks is not None and self.max_pending_acks < self.max_in_flight:
            refuse("max_pending_acks", self.max_pending_acks, f"at least max_in_flight ({self.max_in_flight})")
        self._check_retry_policy()
        self._check_expectations()
        self._check_dead_letter_topic()
        if self.circuit is not None and not isinstance(self.circuit, CircuitBreaker):
            refuse("circuit", self.circuit, "an anybus.CircuitBreaker, or None")
        if self.handler_timeout is not None:
            _keep(self, "handler_timeout", check_delay("handler_timeout", self.handler_timeout, positive=True))
        if self.group_start_id is not None:
            _keep(self, "group_start_id", check_start_id("group_start_id", self.group_start_id))
        on_lease_lost = check_choice("on_lease_lost", self.on_lease_lost, LEASE_LOST, allowed="'continue' or 'cancel'")
        _keep(self, "on_lease_lost", on_lease_lost)
        if not isinstance(self.wait_if_full, bool):
            refuse("wait_if_full", self.wait_if_full, "True or False")
        self._check_guarantee()
        self._check_idempotency()

    def _check_guarantee(self) -> None:
        if self.guarantee is not None and self.ack_mode is not None:
            on_receive = self.ack_mode == "auto-on-receive"
            if on_receive != (self.guarantee == "at-most-once"):
                allowed = (
                    "unset or 'auto-on-receive'" if not on_receive else "unset, 'manual' or 'auto-on-handler-success'"
                )
                refuse("ack_mode", self.ack_mode, f"{allowed} with guarantee={self.guarantee!r}")
        if ack_mode_of(self) != "auto-on-receive":
            return
        named = "guarantee='at-most-once'" if self.guarantee else "ack_mode='auto-on-receive' (at most once)"
        for name in ("max_retry", "max_deliveries", "retry_on", "give_up_on"):
            if getattr(self, name) is not None:
                refuse(name, getattr(self, name), f"unset with {named}, which never retries")
        if self.retry_backoff is not DEFAULT_BACKOFF:
            refuse("retry_backoff", self.retry_backoff, f"unset with {named}, which never retries")
        if self.on_lease_lost != "continue":
            refuse(
                "on_lease_lost", self.on_lease_lost, f"'continue' with {named}, which holds no lease during handling"
            )

    def _check_idempotency(self) -> None:
        store, window = self.idempotency_store, self.idempotency_window
        if self.guarantee != "exactly-once":
            for name, value in (("idempotency_store", store), ("idempotency_window", window)):
                if value is not None:
                    refuse(name, value, "unset without guarantee='exactly-once'")
        if store is not None and not isinstance(store, IdempotencyStore):
            refuse("idempotency_store", store, "an anybus.idempotency.IdempotencyStore, or None")
        if window is not None:
            window = check_delay("idempotency_window", window, positive=True)
            if window > LONGEST_IDEMPOTENCY_WINDOW:
                refuse("idempotency_window", window, f"at most {LONGEST_IDEMPOTENCY_WINDOW:.0f} seconds (90 days)")
            _keep(self, "idempotency_window", window)

    def _check_retry_policy(self) -> None:
        retry_on = check_rules("retry_on", self.retry_on)
        give_up_on = check_rules("give_up_on", self.give_up_on)
        check_no_contradiction(retry_on, give_up_on)
        if self.max_age is not None:
            _keep(self, "max_age", check_delay("max_age", self.max_age, positive=True))
        _keep(self, "retry_backoff", check_backoff(self.retry_backoff))
        _keep(self, "retry_on", retry_on)
        _keep(self, "give_up_on", give_up_on)

    def _check_expectations(self) -> None:
        on_expired = check_choice("on_expired", self.on_expired, ON_EXPIRED, allowed="'dead-letter' or 'drop'")
        _keep(self, "on_expired", on_expired)
        content_types = check_expected_content_type("expected_content_type", self.expected_content_type)
        versions = check_expected_event_version("expected_event_version", self.expected_event_version)
        on_unexpected = check_on_unexpected(self.on_unexpected)
        if on_unexpected != "dead-letter" and content_types is None and versions is None:
            allowed = "unset without expected_content_type or expected_event_version: then nothing is unexpected"
            refuse("on_unexpected", on_unexpected, allowed)
        _keep(self, "expected_content_type", content_types)
        _keep(self, "expected_event_version", versions)
        _keep(self, "on_unexpected", on_unexpected)

    def _check_dead_letter_topic(self) -> None:
        if self.dead_letter_topic is not None and self.dead_letter_topic is not DROP:
            _keep(self, "dead_letter_topic", check_topic("dead_letter_topic", self.dead_letter_topic))
            if self.dead_letter_topic == self.topic:
                refuse("dead_letter_topic", self.dead_letter_topic, "a topic other than the subscription's own")
        if self.dead_letter_topic is None:
            check_topic("dead_letter_topic", f"{self.topic}.dead")


def ack_mode_of(config: SubscriptionConfig) -> AckMode:
    """The ack mode that results from ``ack_mode`` and ``guarantee``."""
    return config.ack_mode or ("auto-on-receive" if config.guarantee == "at-most-once" else "auto-on-handler-success")


def dead_letter_topic_of(config: SubscriptionConfig) -> str | None:
    """The dead-letter topic; None = dead letters are dropped."""
    if config.dead_letter_topic is None:
        return f"{config.topic}.dead"
    return None if isinstance(config.dead_letter_topic, Drop) else config.dead_letter_topic


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """Options of a publish.

    :param metadata: headers that are added to the message's. They replace the message's headers of the same name.
    :param idempotency_key: of several publishes to a topic with the same key, only the first appends its message. The
        others return a :class:`Duplicate`. The stored message has the key. Not blank, at most 256 bytes.
    :param deduplication_window: for how many seconds a key counts as published, at most 604,800 (7 days); None = 120.
        Without ``idempotency_key``: messages that have a key of their own are deduplicated by it, others are not.
    :param confirmation: when the message counts as published: ``accepted`` = the server has it; ``replicated`` =
        replicas have it, too; ``persisted`` = it is on the server's disk. It cannot be combined with deduplication.
    :param replicas: how many replicas must have it, beside the server that took it; None = 1 with ``replicated``, 0
        with ``persisted``.
    :param confirmation_timeout: for how many seconds to wait for replicas or disks. It must be less than the bus's
        ``publish_timeout``, which limits the whole call.
    :param topic_ttl: the message expires so many seconds after it is published (after it is due, if it is delayed): its
        ``expires_at`` is set. A message that has its own ``expires_at`` keeps it. At most ten years; None = it does not
        expire.
    :raises ValidationError: if a value is refused, or contradicts another one.
    """

    metadata: Mapping[str, str] = Headers()
    idempotency_key: str | None = None
    deduplication_window: float | None = None
    confirmation: Confirmation = "accepted"
    replicas: int | None = None
    confirmation_timeout: float = DEFAULT_CONFIRMATION_TIMEOUT
    topic_ttl: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metadata, Mapping):
            refuse("metadata", self.metadata, "a mapping of str to str")
        object.__setattr__(self, "metadata", Headers(self.metadata))
        if self.topic_ttl is not None:
            topic_ttl = check_delay("topic_ttl", self.topic_ttl, positive=True)
            if topic_ttl > MAX_TTL:
                refuse("topic_ttl", self.topic_ttl, f"at most ten years ({MAX_TTL:.0f} s)")
            object.__setattr__(self, "topic_ttl", topic_ttl)
        if self.idempotency_key is not None:
            object.__setattr__(self, "idempotency_key", check_name("idempotency_key", self.idempotency_key))
        if self.deduplication_window is not None:
            window = check_window("deduplication_window", self.deduplication_window)
            object.__setattr__(self, "deduplication_window", window)
        self._check_confirmation()

    def _check_confirmation(self) -> None:
        allowed = f"one of {', '.join(CONFIRMATIONS)}"
        confirmation = check_choice("confirmation", self.confirmation, CONFIRMATIONS, allowed=allowed)
        object.__setattr__(self, "confirmation", confirmation)
        timeout = check_delay("confirmation_timeout", self.confirmation_timeout, positive=True)
        object.__setattr__(self, "confirmation_timeout", timeout)
        if confirmation == "accepted" and timeout != DEFAULT_CONFIRMATION_TIMEOUT:
            refuse("confirmation_timeout", timeout, "unset with confirmation='accepted', which waits for none")
        if self.replicas is not None:
            if confirmation == "accepted":
                refuse("replicas", self.replicas, "unset with confirmation='accepted', which waits for none")
            least = 1 if confirmation == "replicated" else 0
            object.__setattr__(self, "replicas", check_int("replicas", self.replicas, least=least))
