"""The script for the lease that all members of a group share."""

from __future__ import annotations

from typing import Final

from ._scripts import Script

LONGEST: Final = 15_000
"""For how many ms at most a member counts as running after each call."""

# In the sorted set `key`, the score of the lease is +inf. The score of a member is the time until which it counts as
# running. `own` is the member's lease in seconds, `alive` for how many ms it counts as running, `mode` one of `join`,
# `change` and `stay`.
AGREE_LEASE: Final = (
    f"local longest = {LONGEST}"
    """
local function agree(key, now, consumer, own, alive, mode)
  local latest = string.format('%.0f', now + longest)
  -- Scores too far in the future: the server's clock was set back. A dead member would count as running for too long.
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. latest, '(+inf', 'LIMIT', 0, 100)) do
    redis.call('ZADD', key, latest, member)
  end
  local kept, stale = nil, {}
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '+inf', '+inf')) do
    local lease = member:match('^lease:(.*)$')
    if lease and tonumber(lease) and not kept then kept = lease else stale[#stale + 1] = member end
  end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, 100)) do
    stale[#stale + 1] = member
  end
  if kept and tonumber(kept) == tonumber(own) then own = kept end
  local running = own
  if kept and kept ~= own then
    if mode == 'stay' then
      running = kept
    else
      local range = redis.call('ZRANGEBYSCORE', key, '(' .. string.format('%.0f', now), '(+inf', 'LIMIT', 0, 2)
      for _, member in ipairs(range) do
        if member ~= 'member:' .. consumer then running = kept end
      end
      if mode == 'join' and running == kept then return kept end
    end
  end
  -- A full server refuses what needs memory, unless the script has written before. Members must start nevertheless:
  -- handling and trimming make room.
  redis.call('ZREM', key, '')
  redis.call('ZADD', key, string.format('%.0f', now + alive), 'member:' .. consumer)
  if not kept or (kept ~= own and mode ~= 'stay') then
    redis.call('ZADD', key, '+inf', 'lease:' .. own)
    if kept then redis.call('ZREM', key, 'lease:' .. kept) end
  end
  for _, member in ipairs(stale) do redis.call('ZREM', key, member) end
  return running
end
"""
)

# ARGV: consumer, its lease in seconds, for how many ms it counts as running, and the mode.
AGREE: Final = Script(
    "agree",
    AGREE_LEASE
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return agree(KEYS[1], now, ARGV[1], ARGV[2], ARGV[3], ARGV[4])
""",
    partly=True,
)

ALL: Final = (AGREE,)
