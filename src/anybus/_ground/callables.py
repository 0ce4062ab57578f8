"""Checks of functions that an application passes in. Each is called with one argument, so it must accept one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .checks import refuse
from .errors import ValidationError


def check_async_function(field: str, function: Any, allowed: str) -> None:
    """Refuse anything but an async function that takes one argument, or an object whose ``__call__`` is one."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inspect.isclass(inner):
        refuse(field, function, f"{allowed} (a class is not accepted)")
    if not _is_async(inner):
        refuse(field, function, allowed)
    _check_takes_one(field, function, allowed)


def check_function(field: str, function: Any, allowed: str, *, otherwise: str = "") -> None:
    """Refuse anything but a plain function that takes one argument.

    :param otherwise: what else the field may hold, for the error text.
    """
    if not callable(function):
        refuse(field, function, f"{allowed}{otherwise}")
    if _is_async(function):
        refuse(field, function, f"{allowed} (an async one is not accepted){otherwise}")
    _check_takes_one(field, function, f"{allowed}{otherwise}")


def check_any_function(field: str, function: Any, allowed: str) -> None:
    """Refuse anything but a plain or an async function that takes one argument."""
    if not callable(function):
        refuse(field, function, allowed)
    _check_takes_one(field, function, allowed)


def _is_async(function: Any) -> bool:
    # An object whose __call__ is async also counts.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _check_takes_one(field: str, function: Any, allowed: str) -> None:
    """Refuse a function that certainly cannot be called with one positional argument."""
    try:
        # The wrapper's own signature, since the wrapper is called: it may differ from that of the wrapped function.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        if not inspect.ismethod(function):
            return  # a builtin without a signature
        signature = inspect.signature(function.__func__, follow_wrapped=False)  # a method that does not even take self
    try:
        signature.bind(None)
    except TypeError as error:
        if _declares_signature(function):
            return  # the signature was declared by a decorator, which may pass more arguments to the function
        shown = f"{_name(function)}{_without_values(signature)}"
        if len(shown) > 200:
            shown = f"{shown[:180]}... ({len(shown)} characters)"
        raise ValidationError(
            f"{field} must be {allowed}, not {shown}, which cannot be called with one argument: {error}"
        ) from None


def _declares_signature(function: Any) -> bool:
    while function is not None:
        if getattr(function, "__signature__", None) is not None:
            return True
        function = function.func if isinstance(function, functools.partial) else getattr(function, "__func__", None)
    return False


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else f"{type(function).__qualname__}.__call__"


class _Elided:
    def __repr__(self) -> str:
        return "..."


def _without_values(signature: inspect.Signature) -> inspect.Signature:
    """The signature without annotations, which are long, and without default values, which may be secret."""
    empty: Callable[[], Any] = inspect.Parameter.empty
    parameters = [
        parameter.replace(annotation=empty, default=empty if parameter.default is empty else _Elided())
        for parameter in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
