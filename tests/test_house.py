"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import stages
from harness import quick, until

from anybus import Delivery, MemoryBackend, Message, StreamBus, SubscriptionConfig
from anybus._runtime import entry, pool, statistics
from anybus._runtime.entry import TRANSITIONS, Held, Settlement, Stage, Waiter

SOURCE = Path(entry.__file__).parents[1]
DOCS = Path(__file__).parents[1] / "docs"

RECORDS = {
    *Held.__struct_fields__,
    *Settlement.__struct_fields__,
    *Waiter.__slots__,
    *pool.Place.__slots__,
    *statistics.Counters.__dataclass_fields__,
    "deadline",  # of a cancel scope
}
"""Fields of what is no part, but passed from part to part."""


def assigned_from_outside(tree: ast.AST) -> Iterator[str]:
    """Assignments to attributes of anything but ``self``, and of ``self``'s own parts."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            yield f"{node.lineno}: {ast.unparse(node)}"
        while targets:
            target = targets.pop()
            if isinstance(target, (ast.Tuple, ast.List)):
                targets += target.elts
            elif isinstance(target, ast.Attribute):
                owner = ast.unparse(target.value)
                if owner not in ("self", "cls"):
                    yield f"{target.lineno}: {owner}.{target.attr}"


def is_of_a_record(found: str) -> bool:
    owner, _, attribute = found.partition(": ")[2].rpartition(".")
    return attribute in RECORDS and (not owner.startswith("self.") or owner.endswith("counters"))


@pytest.mark.parametrize("module", sorted(SOURCE.glob("_runtime/*.py")), ids=lambda path: path.stem)
def test_no_attribute_of_a_part_is_assigned_from_outside_its_class(module: Path) -> None:
    found = [line for line in assigned_from_outside(ast.parse(module.read_text())) if not is_of_a_record(line)]
    assert found == []


def test_the_rule_finds_what_it_is_made_for() -> None:
    tree = ast.parse("part.on_fatal = f\nself._taker.on_fatal = f\na.b.trial, c = None, 1\nheld.stage = x\nself.x = 1")
    found = sorted(assigned_from_outside(tree))
    assert found == ["1: part.on_fatal", "2: self._taker.on_fatal", "3: a.b.trial", "4: held.stage"]
    assert [line for line in found if is_of_a_record(line)] == ["4: held.stage"]


def test_the_page_on_internals_shows_the_table_of_stages() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*)\|$", (DOCS / "internals.md").read_text(), re.MULTILINE)
    shown = {name: set(re.findall(r"`([A-Z]+)`", after)) for name, after in rows if name in Stage.__members__}
    assert shown == {stage.name: {after.name for after in TRANSITIONS[stage]} for stage in Stage}


async def test_a_stage_that_the_table_does_not_know_fails_a_test() -> None:
    held = Held("t", "1", Message("t"), 1, 1, None, None, 0.0, by_reclaim=False)  # type: ignore[arg-type]
    held.stage = Stage.OPEN
    assert stages.refused == []
    held.stage = Stage.WAITING
    refused, stages.refused[:] = list(stages.refused), []
    assert refused == ["OPEN -> WAITING of entry 1"]


async def test_the_way_of_most_messages() -> None:
    before = set(stages.changes)
    stages.changes.clear()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    with anyio.fail_after(40):
        async with (
            StreamBus(MemoryBackend(), quick()) as bus,
            bus.subscribe(SubscriptionConfig("t", "g"), handler) as one,
        ):
            await bus.publish_batch([Message("t", key=str(number)) for number in range(10)])
            await until(lambda: one.statistics().handled == 10)
    assert len(handled) == 10
    seen = set(stages.changes)
    stages.changes.update(before)
    assert seen == {(Stage.WAITING, Stage.OPEN), (Stage.OPEN, Stage.SETTLING), (Stage.SETTLING, Stage.GONE)}
