"""Makes the context that the parts of a subscription share, from its configuration."""

from __future__ import annotations

import sys

from .._failure.copies import retry_stream
from .._failure.expectations import (
    Expectations,
    check_expected_content_type,
    check_expected_event_version,
)
from .._failure.policies import FailurePolicy, backoff_table, check_rules
from .._failure.settlement import Policy
from .._ground.clock import loop_clock
from .._ground.home import Home
from .._options import (
    DEFAULT_IDEMPOTENCY_WINDOW,
    DEFAULT_MAX_DELIVERIES,
    DEFAULT_MAX_RETRY,
    StreamBusOptions,
    SubscriptionConfig,
    ack_mode_of,
    dead_letter_topic_of,
)
from .._reporting import Notices, Reporter
from ..abc import CompletionKeeper, StreamBackend
from .budget import Budget
from .context import Context, ExactlyOnce, LeaseTerm, SuspectSlot
from .ledger import Ledger
from .naming import ConsumerNames
from .retry_times import RetryTimes
from .statistics import Counters


def make_context(
    config: SubscriptionConfig,
    *,
    backend: StreamBackend,
    options: StreamBusOptions,
    notices: Notices,
    suspects: SuspectSlot,
    home: Home,
    names: ConsumerNames,
    pulled: bool,
) -> Context:
    """Resolve the defaults, and create what belongs to one subscription: its name, its ledger, its counters.

    :param pulled: true for ``deliveries()``, where messages are settled by hand.
    """
    consumer = names.new(config.topic, config.group, config.consumer)
    policy = Policy(
        ack_mode="manual" if pulled else ack_mode_of(config),
        max_retry=DEFAULT_MAX_RETRY if config.max_retry is None else config.max_retry,
        max_deliveries=config.max_deliveries or DEFAULT_MAX_DELIVERIES,
        backoff=backoff_table(config.retry_backoff),
        drops_expired=config.on_expired == "drop",
        counts_crashes={"delivery_count", "renew", "release"} <= backend.features,
    )
    notices.mention_limits(backend, options.claim_idle_timeout)
    clock = loop_clock()
    streams = (config.topic, retry_stream(config.topic, config.group))
    max_pending_acks = config.max_pending_acks or 2 * config.max_in_flight
    return Context(
        backend=backend,
        topic=config.topic,
        group=config.group,
        consumer=consumer,
        policy=policy,
        failure_policy=FailurePolicy(
            retry_on=check_rules("retry_on", config.retry_on),
            give_up_on=check_rules("give_up_on", config.give_up_on),
            backoff=config.retry_backoff if callable(config.retry_backoff) else None,
            max_age=config.max_age,
        ),
        expectations=Expectations(
            content_types=check_expected_content_type("expected_content_type", config.expected_content_type),
            event_versions=check_expected_event_version("expected_event_version", config.expected_event_version),
            on_unexpected=config.on_unexpected,
            max_payload_bytes=options.max_payload_bytes or sys.maxsize,
        ),
        circuit=config.circuit,
        options=options,
        group_start_id=config.group_start_id or options.group_start_id,
        max_in_flight=config.max_in_flight,
        dead_letter_topic=dead_letter_topic_of(config),
        handler_timeout=config.handler_timeout,
        on_lease_lost=config.on_lease_lost,
        wait_if_full=config.wait_if_full,
        reporter=Reporter(
            options.observer,
            topic=config.topic,
            group=config.group,
            consumer=consumer,
            max_attempts=policy.max_attempts if policy.ack_mode != "auto-on-receive" else 1,
        ),
        notices=notices,
        suspects=suspects,
        ledger=Ledger(streams, Budget(config.max_in_flight, max_pending_acks)),
        counters=Counters(),
        clock=clock,
        term=LeaseTerm(options.claim_idle_timeout),
        retry_times=RetryTimes(clock),
        home=home,
        once=_exactly_once(config, backend),
    )


def _exactly_once(config: SubscriptionConfig, backend: StreamBackend) -> ExactlyOnce | None:
    if config.guarantee != "exactly-once":
        return None
    window = config.idempotency_window or DEFAULT_IDEMPOTENCY_WINDOW
    if config.idempotency_store is not None:
        return ExactlyOnce(config.idempotency_store, None, window)
    assert isinstance(backend, CompletionKeeper)
    return ExactlyOnce(backend.idempotency_store, backend, window)
