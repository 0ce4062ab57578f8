"""How often topics are looked at, and when something is told. Seconds, on AnyIO's clock."""

from __future__ import annotations

LOOK = 5.0
"""A topic that has a retention is looked at this often, while a subscription of this bus takes or
settles messages of it."""

QUIET = 60.0
"""All other topics are looked at this often."""

REST = 4.0
"""If a step left something to remove, the next one follows after this many times its duration: other clients of the
server do not notice it."""

STALLED = 60.0
"""A group has stalled if for this long it has not acknowledged the first entry of a topic..."""

STALLED_ENTRIES = 1000
"""...and so many entries wait for it."""

REPEAT = 600.0
"""What lasts is told again this often."""

GROWN = 100_000
"""A topic without a retention that has so many entries is told of."""
