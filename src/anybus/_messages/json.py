"""Payloads as JSON, checked against the application's types.

msgspec supports builtins, dataclasses, Structs and many more types. A class with the methods ``model_validate_json``
and ``model_dump_json`` (a Pydantic model, for example) reads and writes itself, at the top level or nested in a type
that msgspec supports.
"""

from __future__ import annotations

import math
from typing import Any, Final, cast, get_origin

import msgspec

from .._ground.errors import SerializationError, words

_USABLE: Final = "a type that msgspec can check against (a dataclass, a Struct, list[int]...), or a model"
_SHOWN_PROBLEMS: Final = 3
_BUILTINS: Final = frozenset({dict, list, tuple, str, int, float, bool, type(None)})


class _UnusableTypeError(Exception):
    """A type that no payload can be checked against."""


def read(payload: bytes, wanted: Any, uid: str) -> Any:
    """Decode a payload.

    :param wanted: a type; None = any JSON.
    :param uid: the uid of the payload's message, for the error.
    :raises SerializationError: if the payload is not JSON or not of that type, or if the type cannot be used.
    """
    try:
        if wanted is None:
            return msgspec.json.decode(payload)
        if isinstance(wanted, type) and _validator(wanted) is not None:
            return _validated(wanted, payload)
        return _decode(payload, wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SerializationError(f"the payload of message {uid} could not be read: {error}", payload_of=uid) from error
    except _UnusableTypeError as error:
        text = f"the payload of message {uid} cannot be read as {_name(wanted)}, which is not {_USABLE}: {error}"
        raise SerializationError(text, payload_of=uid) from error


def _decode(payload: bytes, wanted: Any) -> Any:
    try:
        return msgspec.json.decode(payload, type=wanted, dec_hook=_from_builtins)
    except (TypeError, NameError) as error:
        raise _UnusableTypeError(str(error)) from error


def _name(wanted: Any) -> str:
    return wanted.__qualname__ if isinstance(wanted, type) and get_origin(wanted) is None else f"{wanted!r:.100}"


def _validator(wanted: Any) -> Any:
    method = getattr(wanted, "model_validate_json", None)
    return method if callable(method) else None


def _validated(model: Any, data: bytes) -> Any:
    try:
        return model.model_validate_json(data)
    except (ValueError, RecursionError) as error:
        # The error's own text may quote the payload, which must not reach a log by accident.
        raise msgspec.ValidationError(f"not a valid {_name(model)}: {_problems(error)}") from None


def _problems(error: Any) -> str:
    """The text of a model's error, without the values that Pydantic includes."""
    try:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        shown = [f"{problem['msg']} - at `{'.'.join(map(str, problem['loc'])) or '$'}`" for problem in found]
    except Exception:
        return words(error)
    more = f" (and {len(shown) - _SHOWN_PROBLEMS} more)" if len(shown) > _SHOWN_PROBLEMS else ""
    return "; ".join(shown[:_SHOWN_PROBLEMS]) + more


def _from_builtins(wanted: Any, value: Any) -> Any:
    """Decode a class that msgspec does not support, nested or at the top level."""
    if _validator(wanted) is not None:
        return _validated(wanted, msgspec.json.encode(value))
    origin = get_origin(wanted) or wanted
    try:
        if isinstance(value, origin):
            return value
    except TypeError:
        pass
    raise _UnusableTypeError(f"{_name(wanted)} has no model_validate_json")


def write(obj: Any) -> bytes:
    """Encode an object.

    :raises SerializationError: if the object cannot be encoded as JSON.
    """
    try:
        # Builtins first: looking for a missing method takes longer than encoding a small dict.
        payload = _encode(obj) if type(obj) in _BUILTINS or not _writes_itself(obj) else _dumped(obj)
        # msgspec and Pydantic write NaN and infinities as null.
        if b"null" in payload and (path := _lost_number(obj, payload)) is not None:
            raise ValueError(f"JSON has no NaN and no infinity - at `{path}`")
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise SerializationError(f"{type(obj).__name__} cannot be written as JSON: {error}") from error
    return payload


def _writes_itself(obj: Any) -> bool:
    kind = cast("object", type(obj))
    return callable(getattr(kind, "model_dump_json", None))


def _dumped(model: Any) -> bytes:
    text: Any = model.model_dump_json()
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"model_dump_json of {type(model).__name__} returned {type(text).__name__}, not str")
    payload = text.encode() if isinstance(text, str) else text
    if b"NaN" in payload or b"Infinity" in payload:
        msgspec.json.decode(payload)  # raises, unless the word is part of a string
    return payload


def _to_raw(obj: Any) -> msgspec.Raw:
    if _writes_itself(obj):
        return msgspec.Raw(_dumped(obj))
    raise TypeError(f"Encoding objects of type {type(obj).__name__} is unsupported")


_encode = msgspec.json.Encoder(enc_hook=_to_raw).encode


def _to_builtins(obj: Any) -> Any:
    dump = getattr(obj, "model_dump", None)
    return dump() if callable(dump) else None


def _lost_number(obj: Any, payload: bytes) -> str | None:
    """The path of a null that was written for a NaN or an infinity; None = there is none."""
    stack = [("$", msgspec.to_builtins(obj, enc_hook=_to_builtins), msgspec.json.decode(payload))]
    while stack:
        path, given, written = stack.pop()
        if written is None:
            if isinstance(given, float) and not math.isfinite(given):
                return path
        else:
            of_given, of_written = _children(path, given), _children(path, written)
            if len(of_given) == len(of_written):  # otherwise a model's JSON has a shape of its own
                stack += [(*child, inside) for child, (_, inside) in zip(of_given, of_written, strict=True)]
    return None


def _children(path: str, value: object) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"{path}.{name}", inside) for name, inside in cast("dict[object, Any]", value).items()]
    if isinstance(value, (list, tuple)):
        return [(f"{path}[{index}]", inside) for index, inside in enumerate(cast("list[Any]", value))]
    return []
