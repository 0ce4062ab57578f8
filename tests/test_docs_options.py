"""The guide's tables of options are whole: each field has a row, with its default, and no row has no field."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from test_docs_programs import ROOT

from anybus import ExponentialBackoff, PublishOptions, StreamBusOptions, SubscriptionConfig

TITLES = {
    StreamBusOptions: "## Options of the bus",
    SubscriptionConfig: "## Options of a subscription",
    ExponentialBackoff: "`ExponentialBackoff` takes keyword arguments only:",
    PublishOptions: "`PublishOptions` takes keyword arguments only:",
}


def rows(title: str) -> dict[str, str]:
    """The first table after this text: what its first two columns say."""
    page = (ROOT / "docs/guide.md").read_text()
    table = page.partition(title)[2].partition("\n\n|")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| *([^|]*?) *\|", table, re.MULTILINE))


@pytest.mark.parametrize("options", TITLES, ids=lambda options: options.__name__)
def test_each_option_has_a_row(options: Any) -> None:
    assert list(rows(TITLES[options])) == [field.name for field in dataclasses.fields(options)]


@pytest.mark.parametrize("options", TITLES, ids=lambda options: options.__name__)
def test_defaults_that_are_numbers_are_the_ones_in_the_table(options: Any) -> None:
    shown = rows(TITLES[options])
    numbers = [field for field in dataclasses.fields(options) if type(field.default) in (int, float)]
    for field in numbers:
        written = shown[field.name].replace(",", "").replace(" MiB", "*1048576").removesuffix(" s")
        number, _, factor = written.partition("*")
        assert float(number) * float(factor or 1) == field.default, field.name
