"""What a subscription expects of a message: its content type, the version of its event, and its size.

The specification, on memory and on a server:

- ``expected_content_type`` and ``expected_event_version`` name what is handled: one value, or a list of them. Media
  types are compared without their parameters, and whatever the case; versions exactly. A message that does not say is
  not expected, unless None is in the list.
- What is not expected is not handled: it becomes a dead letter with the code ``unexpected``, or is dropped, or a
  function decides for each message: ``handle``, ``dead-letter`` or ``drop``. If that fails, this is reported, and the
  message becomes a dead letter.
- ``max_payload_bytes`` of the bus holds both ways: what is larger is not published, and when it is received it becomes
  a dead letter with the code ``too-large``, which keeps the payload.
- So it is in every ack mode, and with ``deliveries()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from harness import Harness, Recorder, nothing_pending, quick, until
from refusal import refused

from anybus import Delivery, Message, StreamBus, StreamBusOptions, SubscriptionConfig, ValidationError

MODES: Sequence[dict[str, Any]] = ({}, {"ack_mode": "manual"}, {"guarantee": "at-most-once"})


async def never(delivery: Delivery) -> None:
    raise AssertionError("it must not be handled")


async def dead(harness: Harness, topic: str) -> dict[str, Message]:
    """The dead letters, by key."""
    return {m.key: m for _, m, _ in await harness.entries(f"{topic}.dead") if m is not None}


async def handled_of(
    harness: Harness, topic: str, messages: Sequence[Message], **expected: Any
) -> tuple[set[str], Recorder]:
    """Which of the messages are handled, by key. The others are given up on."""
    recorder = Recorder()
    handled: set[str] = set()

    async def handler(delivery: Delivery) -> None:
        handled.add(delivery.message.key)

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", **expected), handler) as subscription:
            await bus.publish_batch(messages)

            def all_settled() -> bool:
                counts = subscription.statistics()
                return counts.handled + counts.dead_lettered == len(messages)

            await until(all_settled)
            await nothing_pending(harness, topic, "g")
    return handled, recorder


# --- content type and version

CONTENT_TYPES = {
    "plain": "application/json",
    "with a charset": "application/json; charset=utf-8",
    "without a space": "application/json;charset=utf-8",
    "in capitals": "Application/JSON",
    "another": "application/xml",
    "longer": "application/json-patch",
    "empty": "",
    "unset": None,
}
JSON = {"plain", "with a charset", "without a space", "in capitals"}


def str_of(value: object) -> str:
    """The same in every process of a test run, unlike the order of a set, or the address of a function."""
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(repr, value)))
    return getattr(value, "__name__", repr(value))


@pytest.mark.parametrize(
    ("expected", "handled"),
    [
        ("application/json", JSON),
        (" APPLICATION/json ", JSON),
        (["application/json", "application/xml"], JSON | {"another"}),
        (("application/xml", None), {"another", "empty", "unset"}),
        ([None], {"empty", "unset"}),
    ],
    ids=str_of,
)
async def test_content_types_are_compared_without_parameters_and_case(
    harness: Harness, topic: str, expected: Any, handled: set[str]
) -> None:
    messages = [Message(topic, key=key, content_type=value) for key, value in CONTENT_TYPES.items()]
    assert (await handled_of(harness, topic, messages, expected_content_type=expected))[0] == handled
    letters = await dead(harness, topic)
    assert set(letters) == set(CONTENT_TYPES) - handled
    assert {letter.headers["dead-letter-code"] for letter in letters.values()} == {"unexpected"}


@pytest.mark.parametrize(
    ("expected", "handled"),
    [("2", {"two", "from a header"}), (["1", "2", None], {"one", "two", "from a header", "unset"})],
    ids=str_of,
)
async def test_versions_are_compared_exactly(harness: Harness, topic: str, expected: Any, handled: set[str]) -> None:
    messages = [
        Message(topic, key="one", event_version="1"),
        Message(topic, key="two", event_version="2"),
        Message(topic, key="from a header", headers={"event-version": "2"}),
        Message(topic, key="two and more", event_version="2.0"),
        Message(topic, key="unset"),
    ]
    assert (await handled_of(harness, topic, messages, expected_event_version=expected))[0] == handled
    assert set(await dead(harness, topic)) == {message.key for message in messages} - handled


async def test_the_dead_letter_says_what_was_found_and_what_was_expected(harness: Harness, topic: str) -> None:
    messages = [
        Message(topic, b"<a/>", key="type", content_type="application/xml; q=1", event_version="2"),
        Message(topic, key="version", content_type="text/csv", event_version="3"),
    ]
    expected = {"expected_content_type": ["Application/JSON", "text/csv"], "expected_event_version": "2"}
    handled, recorder = await handled_of(harness, topic, messages, **expected)
    assert not handled
    letters = await dead(harness, topic)
    reasons = {key: letter.headers["dead-letter-reason"] for key, letter in letters.items()}
    assert reasons == {
        "type": "content type 'application/xml; q=1', expected 'application/json' or 'text/csv'",
        "version": "event version '3', expected '2'",
    }
    assert letters["type"].payload == b"<a/>"
    assert letters["type"].headers["dead-letter-attempts"] == "0"
    details = sorted(str(event.detail).partition(":")[0] for event in recorder.of("on_dead_lettered"))
    assert details == ["unexpected", "unexpected"]
    assert not recorder.of("on_error")


@pytest.mark.parametrize("mode", MODES, ids=str_of)
async def test_what_is_not_expected_is_not_handled_in_any_ack_mode(
    harness: Harness, topic: str, mode: dict[str, Any]
) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", expected_event_version="1", **mode)
        async with bus.subscribe(config, never) as subscription:
            await bus.publish(Message(topic, key="k"))
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await nothing_pending(harness, topic, "g")
    assert (await dead(harness, topic))["k"].headers["dead-letter-code"] == "unexpected"


async def test_deliveries_bring_only_what_is_expected(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g", expected_event_version="1")) as deliveries:
            await bus.publish_batch([Message(topic, key="a"), Message(topic, key="b", event_version="1")])
            delivery = await deliveries.receive()
            assert delivery.message.key == "b"
            await delivery.ack()
            await nothing_pending(harness, topic, "g")
    assert set(await dead(harness, topic)) == {"a"}


# --- the rule


async def test_what_is_not_expected_is_dropped_where_the_subscription_says_so(harness: Harness, topic: str) -> None:
    messages = [Message(topic, key="a", event_version="1"), Message(topic, key="b")]
    expected = {"expected_event_version": "1", "on_unexpected": "drop"}
    handled, recorder = await handled_of(harness, topic, messages, **expected)
    assert handled == {"a"}
    assert not await harness.entries(f"{topic}.dead")
    assert sorted(str(event.detail) for event in recorder.of("on_settled")) == ["acked", "dropped"]


async def test_a_function_decides_for_each_message_that_is_not_expected(harness: Harness, topic: str) -> None:
    asked: list[str] = []

    def decide(message: Message) -> Any:
        asked.append(message.key)
        return message.headers["verdict"]

    verdicts = ("handle", "dead-letter", "drop")
    messages = [Message(topic, key=verdict, headers={"verdict": verdict}) for verdict in verdicts]
    messages.append(Message(topic, key="expected", event_version="1"))
    expected = {"expected_event_version": "1", "on_unexpected": decide}
    handled, recorder = await handled_of(harness, topic, messages, **expected)
    assert handled == {"handle", "expected"}
    assert set(await dead(harness, topic)) == {"dead-letter"}
    assert sorted(asked) == sorted(verdicts)
    assert not recorder.of("on_error")


async def coroutine_of(message: Message) -> str:
    return "handle"


def fails(message: Message) -> Any:
    raise LookupError("no table")


def says_nothing(message: Message) -> Any:
    return None


def says_yes(message: Message) -> Any:
    return True


def hands_a_coroutine(message: Message) -> Any:
    return coroutine_of(message)


@pytest.mark.parametrize("rule", [fails, says_nothing, says_yes, hands_a_coroutine])
async def test_a_function_that_fails_is_reported_and_the_message_becomes_a_dead_letter(
    harness: Harness, topic: str, rule: Any
) -> None:
    expected = {"expected_event_version": "1", "on_unexpected": rule}
    handled, recorder = await handled_of(harness, topic, [Message(topic, key="k")], **expected)
    assert not handled
    assert set(await dead(harness, topic)) == {"k"}
    (event,) = recorder.of("on_error", "handler")
    assert event.detail == "on_unexpected failed: the message becomes a dead letter"
    assert isinstance(event.error, LookupError if rule is fails else TypeError)


async def test_a_message_that_a_function_lets_pass_is_retried_as_any_other(harness: Harness, topic: str) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if len(attempts) == 1:
            raise LookupError("no answer")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(
            topic, "g", expected_event_version="1", on_unexpected=lambda message: "handle", retry_backoff=0.0
        )
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert attempts == [1, 2]


# --- size


@pytest.mark.parametrize("mode", MODES, ids=str_of)
async def test_a_payload_over_the_limit_is_a_dead_letter_that_keeps_it(
    harness: Harness, topic: str, mode: dict[str, Any]
) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if mode.get("ack_mode") == "manual":
            await delivery.ack()

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(Recorder())) as elsewhere:
        async with StreamBus(harness.make_backend(), quick(recorder, max_payload_bytes=10)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g", **mode), handler) as subscription:
                await elsewhere.publish(Message(topic, b"x" * 11, key="large"))
                await elsewhere.publish(Message(topic, b"x" * 10, key="small"))
                await until(lambda: handled == ["small"] and subscription.statistics().dead_lettered == 1)
                await nothing_pending(harness, topic, "g")
    letter = (await dead(harness, topic))["large"]
    assert letter.payload == b"x" * 11
    assert letter.headers["dead-letter-code"] == "too-large"
    assert letter.headers["dead-letter-reason"] == "its payload has 11 bytes (max_payload_bytes=10)"
    assert not recorder.of("on_error")


async def test_the_rule_for_what_is_not_expected_says_nothing_about_the_size(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder())) as elsewhere:
        async with StreamBus(harness.make_backend(), quick(Recorder(), max_payload_bytes=1)) as bus:
            config = SubscriptionConfig(topic, "g", expected_event_version="1", on_unexpected=lambda message: "handle")
            async with bus.subscribe(config, never) as subscription:
                await elsewhere.publish(Message(topic, b"xx", key="large"))
                await until(lambda: subscription.statistics().dead_lettered == 1)
    assert (await dead(harness, topic))["large"].headers["dead-letter-code"] == "too-large"


async def test_without_a_limit_every_size_is_handled(harness: Harness, topic: str) -> None:
    large = 5 * 1024 * 1024
    sizes: list[int] = []

    async def handler(delivery: Delivery) -> None:
        sizes.append(len(delivery.message.payload))

    async with StreamBus(harness.make_backend(), StreamBusOptions(max_payload_bytes=0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic, b"x" * large))
            await until(lambda: sizes == [large])


async def test_operators_find_them_by_their_codes_and_can_send_them_back(harness: Harness, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as large:
        async with StreamBus(harness.make_backend(), quick(Recorder(), max_payload_bytes=1)) as bus:
            config = SubscriptionConfig(topic, "g", expected_event_version="1")
            async with bus.subscribe(config, never) as subscription:
                await large.publish_batch([Message(topic, key="version"), Message(topic, b"xx", key="size")])
                await until(lambda: subscription.statistics().dead_lettered == 2)
        for code, key in (("unexpected", "version"), ("too-large", "size")):
            letters = [letter async for letter in large.dead_letters(topic, code=code)]
            assert [letter.message and letter.message.key for letter in letters] == [key]
        async with large.subscribe(SubscriptionConfig(topic, "g"), handler):
            await large.dead_letters(topic).replay(to="group")
            await until(lambda: sorted(handled) == ["size", "version"])


# --- bad input


@pytest.mark.parametrize("field", ["expected_content_type", "expected_event_version"])
@pytest.mark.parametrize(
    ("value", "shown", "allowed"),
    [
        (5, "5", "a str, a list of them"),
        (b"1", "b'1'", "a str, a list of them"),
        ({"1": "2"}, "{'1': '2'}", "a str, a list of them"),
        ([], "()", "an empty list would expect nothing"),
        ([1], "1", "a str"),
        (" ", "' '", "a "),
        (["\ud800"], "'\\ud800'", "UTF-8"),
    ],
    ids=str_of,
)
def test_an_expectation_that_is_none_is_refused(field: str, value: Any, shown: str, allowed: str) -> None:
    with refused(field, shown, allowed):
        SubscriptionConfig("t", "g", **{field: value})


@pytest.mark.parametrize("value", ["application/json; charset=utf-8", "application/*", "*/*", "a/b, c/d", "a b"])
def test_a_content_type_that_could_never_match_is_refused(value: str) -> None:
    with refused("expected_content_type", repr(value), "a media type without parameters and wildcards"):
        SubscriptionConfig("t", "g", expected_content_type=value)
    with refused("expected_content_type", repr(value), "a media type without parameters and wildcards"):
        SubscriptionConfig("t", "g", expected_content_type=["application/json", value])


@pytest.mark.parametrize("value", ["handle", "dead_letter", "", None, True, 5, Message, coroutine_of], ids=str_of)
def test_an_on_unexpected_that_is_no_rule_is_refused(value: Any) -> None:
    with refused(
        "on_unexpected", repr(value)[:20], "'dead-letter', 'drop', or a function that takes one anybus.Message"
    ):
        SubscriptionConfig("t", "g", expected_event_version="1", on_unexpected=value)


def test_a_function_that_cannot_take_one_message_is_refused() -> None:
    def two(first: Any, second: Any) -> Any: ...

    rule: Any = two
    with pytest.raises(ValidationError, match=r"on_unexpected must be .* cannot be called with one argument"):
        SubscriptionConfig("t", "g", expected_event_version="1", on_unexpected=rule)


@pytest.mark.parametrize("value", ["drop", fails], ids=["drop", "a function"])
def test_a_rule_without_an_expectation_is_refused(value: Any) -> None:
    with refused("on_unexpected", repr(value), "unset without expected_content_type or expected_event_version"):
        SubscriptionConfig("t", "g", on_unexpected=value)


def test_what_is_checked_is_what_is_used() -> None:
    class Text(str):
        __slots__ = ()

        def __repr__(self) -> str:
            return "Text"

    config = SubscriptionConfig(
        "t", "g", expected_content_type=[Text("A/B"), None], expected_event_version=Text("1"), on_unexpected="drop"
    )
    assert (config.expected_content_type, config.expected_event_version) == (("a/b", None), ("1",))
    assert isinstance(config.expected_content_type, tuple)
    assert type(config.expected_content_type[0]) is str
    again = SubscriptionConfig("t", "g", expected_content_type=config.expected_content_type)
    assert again.expected_content_type == config.expected_content_type
