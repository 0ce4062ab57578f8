"""What every refusal must say: the field, the value, and what is allowed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest

from anybus import ValidationError


@contextmanager
def refused(field: str, shown: str, allowed: str) -> Generator[None, None, None]:
    """What stands in the block is refused at the door, in a text that helps.

    :param shown: how the text must show the value; of a long one the beginning is enough.
    :param allowed: words that the text must use for what would have been accepted.
    """
    with pytest.raises(ValidationError) as caught:
        yield
    text = str(caught.value)
    assert field in text, f"{text!r} does not name the field {field!r}"
    assert shown[:40] in text, f"{text!r} does not show the value {shown[:40]!r}"
    assert allowed in text, f"{text!r} does not say what is allowed ({allowed!r})"
    assert len(text) < 500, "a refusal of a large value must not be as large as the value"
