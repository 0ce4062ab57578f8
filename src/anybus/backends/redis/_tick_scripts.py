"""The scripts for recurring schedules: a lease, and a fence that lets each tick through once.

The hash of a schedule has the fields ``definition``, ``generation``, ``tick`` (the last one), ``owner`` and ``until``
(the end of the lease). Times are milliseconds since the epoch, by the server's clock. The hash is created by the first
process that enters the schedule, and is never removed.
"""

from __future__ import annotations

from typing import Final

from ._scripts import Script

_READ: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function text(number) return string.format('%.0f', number) end
local function number(field) return tonumber(redis.call('HGET', KEYS[1], field) or '') end
local generation, tick = number('generation'), number('tick')
local owner = redis.call('HGET', KEYS[1], 'owner')
"""

# KEYS: the schedule's hash. ARGV: owner, definition, generation ('' = the process enters), lease and grace in ms.
CLAIM: Final = Script(
    "claim schedule",
    _READ
    + """
local mine, definition, known = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease, grace = tonumber(ARGV[4]), tonumber(ARGV[5])
local until_ = number('until') or 0
local takes_over = false
if not generation or not tick then
  generation, tick, takes_over = known or 1, now, true
elseif known and known > generation then
  generation, tick, takes_over = known, math.max(tick, now - grace), true
elseif not known and redis.call('HGET', KEYS[1], 'definition') ~= definition then
  generation, tick, takes_over = generation + 1, math.max(tick, now - grace), true
end
if known and known < generation then return {0, generation, tick, until_, now} end
local grants = takes_over or not owner or owner == '' or owner == mine or until_ <= now
if grants then
  redis.call('HSET', KEYS[1], 'definition', definition, 'generation', text(generation), 'tick', text(tick),
    'owner', mine, 'until', text(now + lease))
  return {1, generation, tick, now + lease, now}
end
-- An end too far in the future: the server's clock was set back.
if until_ > now + lease then redis.call('HSET', KEYS[1], 'until', text(now + lease)) end
return {0, generation, tick, math.min(until_, now + lease), now}
""",
)

# KEYS: the schedule's hash, the stream. ARGV: owner, generation, tick, lease and grace in ms ('' = no limit), fields
# (none = the tick is only recorded).
PUBLISH: Final = Script(
    "publish tick",
    _READ
    + """
local due, lease, grace = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
if not tick or generation ~= tonumber(ARGV[2]) or owner ~= ARGV[1] then
  return {'not-owner', tick or due, now, ''}
end
if due <= tick then return {'known', tick, now, ''} end
if due > now then return {'early', tick, now, ''} end
local status, id = 'published', ''
-- Needs the same right as the last write, and changes nothing but the lease.
redis.call('HSET', KEYS[1], 'until', text(now + lease))
if grace and now - due > grace then
  status = 'missed'
elseif #ARGV > 5 then
  id = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 6))
end
redis.call('HSET', KEYS[1], 'tick', ARGV[3])
return {status, due, now, id}
""",
)

# KEYS: the schedule's hash. ARGV: owner.
LEAVE: Final = Script(
    "leave schedule",
    """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'owner', '')
return 1
""",
)

ALL: Final = (CLAIM, PUBLISH, LEAVE)
