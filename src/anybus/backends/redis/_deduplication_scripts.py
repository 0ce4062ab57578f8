"""The scripts that append a message only if no other with its idempotency key was published to the topic.

Beside the topic, a hash holds a record for each key: when its window ends, and what its first publish returned. A
sorted set has the same fields by the end of their windows, so that records whose window is over can be removed: by each
call that appends, and more of them than it adds. No key of the server has an expiry: a server may evict such keys
before the others, and every eviction would break the promise.

A key is looked up, its message appended, and then its record written, in this order and in one step. If the record
cannot be written, what was appended is removed again. A record without its message would be a lost message: its
publisher would believe the answer to its second try.

All reads come first. They fail, if a key has the wrong type, before anything is written.

A server that takes no writes must not say that a message was published before. It may be a primary that was replaced,
and what only it knows is about to be lost. So an answer without a write is confirmed by one that changes nothing.
"""

from __future__ import annotations

from typing import Final

from ._schedule_scripts import SCHEDULING
from ._scripts import FAILED, Script

# KEYS[2] and KEYS[3]: the hash of records, and the sorted set of their ends. Cleaning always makes its calls, so that
# a missing permission is noticed at once and not when the first window is over.
_RECORDS: Final = (
    FAILED
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function read_over(most)
  return redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now), 'LIMIT', 0, most)
end
local function clean(over)
  local failure = failed(redis.pcall('HDEL', KEYS[2], '', unpack(over)))
  return failure or failed(redis.pcall('ZREM', KEYS[3], '', unpack(over)))
end
local function first_of(record)
  local stop, first = (record or ''):match('^(%d+) (.*)$')
  if stop and tonumber(stop) > now then return first end
end
local function takes_no_writes()
  return failed(redis.pcall('ZREM', KEYS[3], ''))
end
-- An end without its record does no harm, and is removed when it is over.
local function keep(field, stop, record)
  local failure = failed(redis.pcall('ZADD', KEYS[3], stop, field))
  return failure or failed(redis.pcall('HSET', KEYS[2], field, record))
end
"""
)

# KEYS: the stream, the records, their ends. ARGV: the number of messages; for each of them: the field of its record
# ('' = it is appended without a look), its window in ms, and the encoded message.
# Replies with one value for each message: the id of its entry; a list of one: what the first publish returned; a list
# of two: 'error' or 'half' (it is appended, but has no record), and the error's text. After an error nothing more is
# tried.
PUBLISH_ONCE: Final = Script(
    "publish once",
    _RECORDS
    + """
local count = tonumber(ARGV[1])
local over = read_over(2 * count + 2)
local fields = {}
for i = 1, count do fields[i] = ARGV[3 * i - 1] end
local found, known = redis.call('HMGET', KEYS[2], unpack(fields)), {}
for i = 1, count do known[fields[i]] = found[i] end
local cleaned, appended, answered = false, false, false
local results = {}
for i = 1, count do
  local field = fields[i]
  local first = field ~= '' and first_of(known[field])
  if first then
    results[i] = {first}
    answered = true
  else
    local id = redis.pcall('XADD', KEYS[1], '*', 'message', ARGV[3 * i + 1])
    local failure, status = failed(id), 'error'
    if not failure and field ~= '' then
      if not cleaned then failure = clean(over) end
      cleaned = true
      local stop = string.format('%.0f', now + tonumber(ARGV[3 * i]))
      known[field] = stop .. ' ' .. id
      failure = failure or keep(field, stop, known[field])
      if failure and failed(redis.pcall('XDEL', KEYS[1], id)) then status = 'half' end
    end
    if failure then
      results[i] = {status, failure}
      break
    end
    results[i] = id
    appended = true
  end
end
local failure = answered and not appended and takes_no_writes()
if failure then return {{'error', failure}} end
return results
""",
)

# KEYS: the sorted set of delayed entries, the records, their ends. ARGV: due time in ms, absolute or (with a leading +)
# from now; a random text; the field of the record; the window in ms; the entry's fields. The schedule id has a record
# of its own, by which a cancellation finds the key. Replies with the schedule id and in how many ms it is due, or as
# PUBLISH_ONCE does for one message.
SCHEDULE_ONCE: Final = Script(
    "schedule once",
    _RECORDS
    + SCHEDULING
    + """
local field = ARGV[3]
local over = read_over(4)
local first = first_of(redis.call('HGET', KEYS[2], field))
if first then
  local failure = takes_no_writes()
  if failure then return {'error', failure} end
  return {first}
end
local values = {}
for i = 5, #ARGV do values[#values + 1] = ARGV[i] end
local scheduled = schedule(KEYS[1], ARGV[1], ARGV[2], values)
local id, stop = scheduled[1], string.format('%.0f', now + tonumber(ARGV[4]))
local failure = clean(over) or keep('@' .. id, stop, field) or keep(field, stop, stop .. ' ' .. id)
if not failure then return scheduled end
local left = failed(redis.pcall('ZREM', KEYS[1], cmsgpack.pack(values)))
return {left and 'half' or 'error', failure}
""",
)

ALL: Final = (PUBLISH_ONCE, SCHEDULE_ONCE)
