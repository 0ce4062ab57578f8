"""Functions that an application gives are called with one argument, and must accept one.

Specification: a handler, a rule, a backoff function, a replay's progress function and an observer's hook that surely
cannot be called with one positional argument is refused where it is given, with its signature. Whatever may accept one
(a decorator's wrapper, a builtin that does not tell) is accepted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from harness import Harness, quick, until

from anybus import (
    BusEvent,
    Delivery,
    MemoryBackend,
    Message,
    Observer,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    ValidationError,
)


def untyped(function: object) -> Any:
    """For a wrong use, on purpose."""
    return function


def injecting(function: Callable[..., Any]) -> Any:
    """A decorator as frameworks have: the wrapper takes one argument, and gives the function a second."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **more: Any) -> None:
        await function(*args, "db", **more)

    return wrapper


def declaring(function: Callable[..., Any]) -> Any:
    """Another, whose wrapper declares the function's own signature."""
    wrapper = injecting(function)
    wrapper.__signature__ = inspect.signature(function)
    return wrapper


async def nothing() -> None: ...


async def two(delivery: Delivery, db: Any) -> None: ...


async def keyword_only(delivery: Delivery, *, db: Any) -> None: ...


async def only_keywords(*, delivery: Delivery) -> None: ...


async def with_secret(delivery: Delivery, db: Any, password: str = "hunter2") -> None: ...


class Objects:
    async def method(self, delivery: Delivery) -> None: ...

    async def without_delivery(self) -> None: ...

    async def lost() -> None: ...  # type: ignore[misc]  # pyright: ignore[reportSelfClsParameterName]

    @staticmethod
    async def static(handlers: Any, delivery: Delivery) -> None: ...

    @classmethod
    async def of_class(cls) -> None: ...


class Called:
    async def __call__(self) -> None: ...


BAD_HANDLERS: dict[str, tuple[Any, str]] = {
    "no parameter": (nothing, "nothing()"),
    "two parameters": (two, "two(delivery, db)"),
    "a keyword-only one without a default": (keyword_only, "keyword_only(delivery, *, db)"),
    "keyword-only": (only_keywords, "only_keywords(*, delivery)"),
    "a method of the class": (Objects.method, "Objects.method(self, delivery)"),
    "a method without a parameter": (Objects().without_delivery, "Objects.without_delivery()"),
    "a method without self": (untyped(Objects()).lost, "Objects.lost()"),
    "a static method with two": (Objects.static, "Objects.static(handlers, delivery)"),
    "a class method": (Objects.of_class, "Objects.of_class()"),
    "an object": (Called(), "Called.__call__()"),
    "a partial with too little": (functools.partial(keyword_only), "keyword_only(delivery, *, db)"),
    "a partial with too much": (functools.partial(untyped(two), 1, 2), "two()"),
    "a partial by keyword": (functools.partial(untyped(two), delivery=1, db=2), "two(*, delivery=..., db=...)"),
    "a wrapper of its own signature": (injecting(nothing).__wrapped__, "nothing()"),
}


@pytest.mark.parametrize(("value", "shown"), BAD_HANDLERS.values(), ids=BAD_HANDLERS.keys())
async def test_a_handler_that_cannot_be_called_with_a_delivery_is_refused_before_anything_is_made(
    value: Any, shown: str, harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    async with StreamBus(backend, quick()) as bus:
        with pytest.raises(ValidationError) as refused:
            bus.subscribe(SubscriptionConfig(topic, "g"), value)
        with pytest.raises(ValidationError) as refused_too:
            await bus.consume(SubscriptionConfig(topic, "g"), value)
        for text in (str(refused.value), str(refused_too.value)):
            assert text.startswith("handler must be an async function that takes one Delivery, not ")
            assert f"{shown}, which cannot be called with one argument: " in text
        assert await backend.create_group(topic, "g"), "a refusal has made a group"


def test_the_error_says_what_is_missing_and_shows_no_default_value() -> None:
    bus = StreamBus(MemoryBackend())
    with pytest.raises(ValidationError) as caught:
        bus.subscribe(SubscriptionConfig("t", "g"), with_secret)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == (
        "handler must be an async function that takes one Delivery, not with_secret(delivery, db, password=...), "
        "which cannot be called with one argument: missing a required argument: 'db'"
    )


def test_a_long_signature_is_cut() -> None:
    names = ", ".join(f"parameter_{number}" for number in range(100))
    space: dict[str, Any] = {}
    exec(f"async def long({names}): ...", space)
    with pytest.raises(ValidationError) as caught:
        StreamBus(MemoryBackend()).subscribe(SubscriptionConfig("t", "g"), space["long"])
    assert len(str(caught.value)) < 500


class Handlers:
    """Each takes a delivery, in a way of its own, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def method(self, delivery: Delivery) -> None:
        self.calls.append((delivery,))

    async def default(self, delivery: Delivery, db: str = "none") -> None:
        self.calls.append((delivery, db))

    async def anything(self, *args: Any, **more: Any) -> None:
        self.calls.append(args)

    async def positional(self, delivery: Delivery, /) -> None:
        self.calls.append((delivery,))

    async def injected(self, delivery: Delivery, db: str) -> None:
        self.calls.append((delivery, db))

    def all(self) -> dict[str, Any]:
        return {
            "a method": self.method,
            "a default": self.default,
            "anything": self.anything,
            "positional-only": self.positional,
            "a wrapper that gives more": injecting(self.injected),
            "a wrapper that declares more": declaring(self.injected),
            "a partial of one that declares more": functools.partial(declaring(self.injected)),
            "a partial": functools.partial(self.injected, db="none"),
            "a mock": AsyncMock(side_effect=self.anything),
        }


@pytest.mark.parametrize("name", Handlers().all())
async def test_every_handler_that_may_accept_a_delivery_is_accepted_and_called(
    name: str, harness: Harness, topic: str
) -> None:
    handlers = Handlers()
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handlers.all()[name]) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert [type(call[0]) for call in handlers.calls] == [Delivery]


# --- plain functions: rules, backoff, progress, hooks


def needs_two(one: Any, two: Any) -> Any: ...


def needs_none() -> Any: ...


def needs_keyword(one: Any, *, two: Any) -> Any: ...


BAD_FUNCTIONS: dict[str, tuple[Any, str]] = {
    "two parameters": (needs_two, "needs_two(one, two)"),
    "none": (needs_none, "needs_none()"),
    "a keyword-only one without a default": (needs_keyword, "needs_keyword(one, *, two)"),
    "a lambda": (lambda: True, "<lambda>()"),
}
bad_functions = pytest.mark.parametrize(("value", "shown"), BAD_FUNCTIONS.values(), ids=BAD_FUNCTIONS.keys())


def takes_one(one: Any) -> bool:
    return True


def takes_any(*args: Any) -> bool:
    return True


GOOD_FUNCTIONS: list[Any] = [takes_one, takes_any, [].append, {}.update, Mock(), print, bool.__init__]


def refuses(shown: str, field: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValidationError, match=field) as caught:
        make()
    assert f"{shown}, which cannot be called with one argument: " in str(caught.value)


@bad_functions
def test_a_rule_that_cannot_be_asked_is_refused(value: Any, shown: str) -> None:
    refuses(shown, "retry_on", lambda: SubscriptionConfig("t", "g", retry_on=value))
    refuses(shown, "give_up_on", lambda: SubscriptionConfig("t", "g", give_up_on=[OSError, value]))


@bad_functions
def test_a_backoff_function_that_cannot_be_asked_is_refused(value: Any, shown: str) -> None:
    refuses(shown, "retry_backoff", lambda: SubscriptionConfig("t", "g", retry_backoff=value))


@bad_functions
async def test_a_progress_function_that_cannot_be_told_is_refused(value: Any, shown: str) -> None:
    async with StreamBus(MemoryBackend()) as bus:
        with pytest.raises(ValidationError, match="on_progress") as caught:
            await bus.dead_letters("t").replay(on_progress=value)
        assert f"{shown}, which cannot be called with one argument: " in str(caught.value)


@pytest.mark.parametrize("value", GOOD_FUNCTIONS, ids=[str(index) for index, _ in enumerate(GOOD_FUNCTIONS)])
async def test_every_function_that_may_accept_one_argument_is_accepted(value: Any) -> None:
    SubscriptionConfig("t", "g", retry_on=value, retry_backoff=value)
    SubscriptionConfig("t", "g", give_up_on=value)
    async with StreamBus(MemoryBackend()) as bus:
        assert (await bus.dead_letters("t").replay(on_progress=value)).replayed == 0


HOOKS = [name for name in vars(Observer) if name.startswith("on_")]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_cannot_be_told_or_would_have_to_be_awaited_is_refused(name: str) -> None:
    def without_event(self: Observer) -> None: ...

    async def awaited(self: Observer, event: BusEvent) -> None: ...

    for function, said in ((without_event, "without_event(), which cannot be called"), (awaited, "a plain function")):
        observer = type("Mine", (Observer,), {name: function})()
        with pytest.raises(ValidationError, match=rf"observer\.{name} must be") as caught:
            StreamBusOptions(observer=observer)
        assert said in str(caught.value)


def test_hooks_that_may_accept_an_event_are_accepted() -> None:
    class Mine(Observer):
        def on_error(self, event: BusEvent, more: int = 5) -> None: ...

        def on_settled(self, *args: Any, **more: Any) -> None: ...

        on_started = Mock()

    assert HOOKS
    observer = Mine()
    assert StreamBusOptions(observer=observer).observer is observer
