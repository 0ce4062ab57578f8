"""Payloads as JSON: types of the application's, both ways, and what becomes of a payload that cannot be read.

Specification: a class with ``model_validate_json`` and ``model_dump_json`` reads and writes itself, alone or inside what
msgspec knows. NaN and infinities are refused, at any depth. A payload that ``message.json`` cannot read makes its
message a dead letter at once, with the code ``invalid``, unless ``retry_on`` names such errors. Another
``SerializationError`` (of another message, or of writing) is a failure like all others.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Union

import anyio
import msgspec
import pytest
from harness import QUICK, Harness, Recorder, quick, until

from anybus import (
    Delivery,
    Message,
    SerializationError,
    StreamBus,
    SubscriptionConfig,
)


class Model:
    """Reads and writes itself, as Pydantic's models do."""

    def __init__(self, number: int, rate: float | None = None) -> None:
        self.number = number
        self.rate = rate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.number)

    @classmethod
    def model_validate_json(cls, data: str | bytes) -> Model:
        found = json.loads(data)
        if not isinstance(found, dict) or not isinstance(found.get("number"), int):
            raise ModelError(found)
        return cls(found["number"], found.get("rate"))

    def model_dump(self) -> dict[str, Any]:
        return vars(self)

    def model_dump_json(self) -> str:
        rate = None if self.rate is None or not math.isfinite(self.rate) else self.rate
        return json.dumps({"number": self.number, "rate": rate})


class ModelError(ValueError):
    """As Pydantic's: its text shows the value, and ``errors`` tells what was wrong without it."""

    def __init__(self, value: object) -> None:
        super().__init__(f"1 validation error [input_value={value!r}]")

    def errors(self, **more: bool) -> list[dict[str, Any]]:
        assert more == {"include_url": False, "include_input": False, "include_context": False}
        problem = {"type": "int", "loc": ("number",), "msg": "Input should be a valid integer"}
        return [problem] * 5


class Small:
    """As little as a model must have. It writes NaN as a word, and its errors tell nothing."""

    def __init__(self, value: float) -> None:
        self.value = value

    @classmethod
    def model_validate_json(cls, data: bytes) -> Small:
        try:
            return cls(float(data))
        except ValueError:
            raise ValueError from None

    def model_dump_json(self) -> bytes:
        return json.dumps(self.value).encode()


@dataclass
class Box:
    model: Model
    rate: float = 0.0


class Record(msgspec.Struct):
    models: dict[str, Model]
    rate: float | None = None


class Shop:
    """Nothing that JSON could be checked against."""


MODEL = Model(1, 0.5)
INSIDE: dict[str, tuple[Any, Any]] = {
    "alone": (MODEL, Model),
    "in a list": ([MODEL, Model(2)], list[Model]),
    "in a dict": ({"a": MODEL}, dict[str, Model]),
    "in a dataclass": (Box(MODEL, 1.5), Box),
    "in a Struct": (Record({"a": MODEL}), Record),
    "deep": ([{"a": [Box(MODEL)]}], list[dict[str, list[Box]]]),
    "optional": (MODEL, Model | None),
}


@pytest.mark.parametrize(("obj", "wanted"), INSIDE.values(), ids=INSIDE.keys())
def test_a_model_is_written_and_read_by_itself(obj: Any, wanted: Any) -> None:
    message = Message.from_json("t", obj)
    assert message.content_type == "application/json"
    assert message.json(wanted) == obj


def test_a_model_that_has_no_more_than_the_two_methods_works_too() -> None:
    message = Message.from_json("t", Small(1.5))
    assert message.payload == b"1.5"
    assert message.json(Small).value == 1.5
    assert Message.from_json("t", [Small(1.5)]).json(list[Small])[0].value == 1.5
    with pytest.raises(SerializationError, match=r"not a valid Small: ValueError"):
        Message("t", b"{}").json(Small)


@pytest.mark.parametrize("wanted", [Model, list[Model], Model | None], ids=str)
def test_a_model_that_refuses_the_payload_is_a_serialization_error_that_does_not_show_it(wanted: Any) -> None:
    payload = b'[{"number": "hunter2"}]' if wanted == list[Model] else b'{"number": "hunter2"}'
    message = Message("t", payload)
    with pytest.raises(SerializationError, match=message.uid) as caught:
        message.json(wanted)
    assert "not a valid Model: Input should be a valid integer - at `number`;" in str(caught.value)
    assert "(and 2 more)" in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:  # as a traceback shows them
        assert "hunter2" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_what_a_models_own_code_raises_otherwise_comes_out_as_it_is() -> None:
    class Broken:
        @classmethod
        def model_validate_json(cls, data: bytes) -> Any:
            raise ConnectionError("no database")

    with pytest.raises(ConnectionError, match="no database"):
        Message("t", b"{}").json(Broken)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [(Shop, "Shop"), (list[Shop], "list"), (5, "5"), ("Model", "'Model'"), (Union[Model, int], "Model"), (Shop(), "Shop")],
    ids=["class", "list of them", "number", "text", "union", "object"],
)  # fmt: skip
def test_a_type_that_cannot_be_used_is_named(wanted: Any, named: str) -> None:
    message = Message("t", b"[{}]" if wanted == list[Shop] else b"{}")
    with pytest.raises(SerializationError, match=rf"cannot be read as .*{named}.*, which is not a type") as caught:
        message.json(wanted)
    assert caught.value.payload_of == message.uid


def test_a_value_of_the_wanted_class_needs_no_model() -> None:
    assert Message("t", b'{"a": 1}').json(object) == {"a": 1}
    anything: Any = Any
    assert Message("t", b"1").json(anything) == 1


# --- NaN and infinities

NUMBERS = (math.nan, math.inf, -math.inf)
HOLDING: dict[str, tuple[Callable[[float], Any], str]] = {
    "alone": (lambda number: number, "`$`"),
    "in a list": (lambda number: [1.0, None, number], "`$[2]`"),
    "in a tuple": (lambda number: (number,), "`$[0]`"),
    "in a set": (lambda number: {number}, "`$[0]`"),
    "in a dict": (lambda number: {1: None, "a": {"b": [number]}}, "`$.a.b[0]`"),
    "in a dataclass": (lambda number: Box(Model(1), number), "`$.rate`"),
    "in a Struct": (lambda number: [Record({}, number)], "`$[0].rate`"),
    "in a model": (lambda number: Model(1, number), "`$.rate`"),
    "in a model inside": (lambda number: Record({"a": Model(1, number)}), "`$.models.a.rate`"),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("make", "place"), HOLDING.values(), ids=HOLDING.keys())
def test_a_number_that_json_does_not_have_is_refused_with_its_place(
    make: Callable[[float], Any], place: str, number: float
) -> None:
    obj = make(number)
    with pytest.raises(SerializationError) as caught:
        Message.from_json("t", obj)
    assert f"{type(obj).__name__} cannot be written as JSON" in str(caught.value)
    assert f"no NaN and no infinity - at {place}" in str(caught.value)
    assert caught.value.payload_of is None


@pytest.mark.parametrize("number", NUMBERS)
def test_a_model_that_writes_such_a_number_as_a_word_is_refused(number: float) -> None:
    for obj in (Small(number), [Small(number)]):
        with pytest.raises(SerializationError, match="cannot be written as JSON"):
            Message.from_json("t", obj)


def test_none_and_the_words_in_texts_are_written_as_ever() -> None:
    obj = {"a": None, "b": ["null", "NaN", "Infinity", 1e308, -0.0], "c": {"null": None}, "1": 1, 2: None}
    assert Message.from_json("t", obj).json() == {str(name): value for name, value in obj.items()}
    assert Message.from_json("t", Decimal("NaN")).payload == b'"NaN"'


def test_a_model_that_writes_itself_in_a_shape_of_its_own_is_no_puzzle() -> None:
    class Odd(Model):
        def model_dump_json(self) -> str:
            return '[null, {"NaN": null}, "Infinity"]'

    assert Message.from_json("t", Odd(1, math.nan)).json() == [None, {"NaN": None}, "Infinity"]


# --- what becomes of a payload that cannot be read

BAD = b'{"number": "one"}'


async def fates(harness: Harness, topic: str, handler: Any, recorder: Recorder | None = None, **options: Any) -> Any:
    """The dead letter of one message with a bad payload, and how often it was handled."""
    attempts: list[int] = []

    async def counted(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        await handler(delivery)

    config = SubscriptionConfig(topic, "g", max_retry=2, retry_backoff=QUICK, **options)
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(config, counted) as subscription:
            message = Message(topic, BAD)
            await bus.publish(message)
            await until(lambda: subscription.statistics().dead_lettered == 1)
            assert subscription.statistics().failed == len(attempts)
        [letter] = [letter async for letter in bus.dead_letters(topic)]
    assert letter.message is not None
    assert (letter.message.uid, letter.message.payload) == (message.uid, BAD)
    return letter, attempts


async def read_as_model(delivery: Delivery) -> None:
    delivery.message.json(Model)


async def read_as_struct(delivery: Delivery) -> None:
    delivery.message.json(Record)


async def read_as_nothing(delivery: Delivery) -> None:
    delivery.message.json(Shop)


async def read_changed_copy(delivery: Delivery) -> None:
    delivery.message.replace(payload=b"decrypted").json()


async def read_in_a_group(delivery: Delivery) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_as_model, delivery)


@pytest.mark.parametrize(
    "handler", [read_as_model, read_as_struct, read_as_nothing, read_changed_copy, read_in_a_group]
)
async def test_a_payload_that_cannot_be_read_is_a_dead_letter_at_once(
    handler: Any, harness: Harness, topic: str
) -> None:
    recorder = Recorder()
    letter, attempts = await fates(harness, topic, handler, recorder)
    assert attempts == [1]
    assert (letter.code, letter.attempts) == ("invalid", 1)
    assert letter.error_type == "anybus.SerializationError"
    assert f"the payload of message {letter.message.uid} " in letter.reason
    assert len(recorder.of("on_error")) == 1
    async with StreamBus(harness.make_backend(), quick()) as bus:
        assert [found.id async for found in bus.dead_letters(topic, code="invalid")] == [letter.id]


def names_payloads(error: Exception) -> bool:
    return isinstance(error, SerializationError) and error.payload_of is not None


def fails(error: Exception) -> bool:
    raise ZeroDivisionError("in the rule")


RULES: dict[str, tuple[dict[str, Any], str, int]] = {
    "retried by its type": ({"retry_on": SerializationError}, "retries", 3),
    "retried by a base": ({"retry_on": (OSError, Exception)}, "retries", 3),
    "retried by a function": ({"retry_on": names_payloads}, "retries", 3),
    "not among what is retried": ({"retry_on": OSError}, "invalid", 1),
    "given up on": ({"give_up_on": SerializationError}, "invalid", 1),
    "retried, and given up on": ({"retry_on": Exception, "give_up_on": names_payloads}, "invalid", 1),
    "no failing rule": ({"retry_on": fails}, "invalid", 1),
    "retried, beside a failing rule": ({"retry_on": Exception, "give_up_on": fails}, "retries", 3),
}


@pytest.mark.parametrize(("rules", "code", "times"), RULES.values(), ids=RULES.keys())
async def test_a_rule_may_ask_for_more_tries_at_a_payload(
    rules: dict[str, Any], code: str, times: int, harness: Harness, topic: str
) -> None:
    letter, attempts = await fates(harness, topic, read_as_model, Recorder(), **rules)
    assert (letter.code, attempts) == (code, list(range(1, times + 1)))


async def writes_badly(delivery: Delivery) -> None:
    Message.from_json("t", math.nan)


async def reads_another(delivery: Delivery) -> None:
    Message("t", b"no json").json()


async def raises_its_own(delivery: Delivery) -> None:
    try:
        delivery.message.json(Model)
    except SerializationError as error:
        raise LookupError("unknown order") from error


@pytest.mark.parametrize("handler", [writes_badly, reads_another, raises_its_own])
async def test_another_serialization_error_is_a_failure_like_all_others(
    handler: Any, harness: Harness, topic: str
) -> None:
    letter, attempts = await fates(harness, topic, handler, Recorder())
    assert (letter.code, attempts) == ("retries", [1, 2, 3])


async def test_at_most_once_a_payload_that_cannot_be_read_is_only_reported(harness: Harness, topic: str) -> None:
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        config = SubscriptionConfig(topic, "g", guarantee="at-most-once")
        async with bus.subscribe(config, read_as_model) as subscription:
            await bus.publish(Message(topic, BAD))
            await until(lambda: subscription.statistics().failed == 1)
        assert [letter async for letter in bus.dead_letters(topic)] == []
    assert Counter(event.scope for event in recorder.of("on_error")) == {"handler": 1}
