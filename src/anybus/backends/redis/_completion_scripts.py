"""The scripts for exactly-once effects: claiming keys, and completing them in the step of the acknowledgement.

The keys of a group are the members of one sorted set. The score of a key is the time in ms at which it is forgotten:
the end of its claim's lease, or of the window of its completion. A hash has the keys that are claimed, not completed,
with the entry and the consumer of the claim. A key whose time is over counts as unknown, and every claim removes some
of those. There is no EXPIRE.

The order of the writes matters, because a script is never rolled back. A key in the sorted set alone is completed. So a
claim is written to the hash first. A field of the hash alone means nothing.
"""

from __future__ import annotations

from typing import Final

from ._scripts import FAILED, Script

CLEANED: Final = 20
"""How many forgotten keys one call removes at most, besides two for each claim. A claim adds one key at most."""

# The time in ms; what is known of a key; and what is done to it. The probe comes before the first write. It leaves out
# ZADD, which a full server refuses as a script's first write, and accepts after another one: what is claimed and
# completed makes room, once it is trimmed.
_KEYS: Final = (
    FAILED
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function text(number) return string.format('%.0f', number) end

local function probe(keys, claims)
  redis.call('ZREM', keys, '')
  redis.call('HDEL', claims, '')
end

-- 'completed', or nil if it is unknown, or the holder of the claim; and when that ends.
local function known(keys, claims, key)
  local ends = tonumber(redis.call('ZSCORE', keys, key) or '')
  if not ends or ends <= now then return nil, 0 end
  return redis.call('HGET', claims, key) or 'completed', ends
end

local function complete(keys, claims, key, window)
  local failure = failed(redis.pcall('ZADD', keys, text(now + window), key))
  if not failure then redis.call('HDEL', claims, key) end
  return failure
end

-- A holder is the entry, a line end, the consumer.
local function belongs(claims, key, consumer)
  local holder = redis.call('HGET', claims, key)
  return holder and holder:match('\\n(.*)$') == consumer
end

local function release(keys, claims, key, consumer)
  if belongs(claims, key, consumer) then
    redis.call('ZREM', keys, key)
    redis.call('HDEL', claims, key)
  end
end
"""
)

# KEYS: the sorted set, the hash. ARGV: consumer, lease in ms; for each claim: key, entry. Replies, for each, with the
# state, and for how many ms.
CLAIM: Final = Script(
    "claim",
    _KEYS
    + f"local cleaned = {CLEANED}"
    + """
local keys, claims, consumer, ends_at = KEYS[1], KEYS[2], ARGV[1], text(now + ARGV[2])
probe(keys, claims)
local old = redis.call('ZRANGEBYSCORE', keys, '-inf', text(now), 'LIMIT', 0, cleaned + #ARGV)
if #old > 0 then
  redis.call('ZREM', keys, unpack(old))
  redis.call('HDEL', claims, unpack(old))
end
local results = {}
for i = 3, #ARGV, 2 do
  local key, entry = ARGV[i], ARGV[i + 1]
  local holder, ends = known(keys, claims, key)
  if holder == 'completed' then
    results[#results + 1] = {'completed', 0}
  elseif holder and holder:match('^(.-)\\n') ~= entry then
    results[#results + 1] = {'busy', ends - now}
  else
    redis.call('HSET', claims, key, entry .. '\\n' .. consumer)
    redis.call('ZADD', keys, ends_at, key)
    results[#results + 1] = {'claimed', 0}
  end
end
return results
""",
    partly=True,
)

# KEYS: the sorted set, the hash. ARGV: consumer, what to do (renew, complete, release), for how many ms, the keys.
END: Final = Script(
    "end of claims",
    _KEYS
    + """
local keys, claims, consumer, what, ms = KEYS[1], KEYS[2], ARGV[1], ARGV[2], tonumber(ARGV[3])
probe(keys, claims)
for i = 4, #ARGV do
  if what == 'complete' then
    local failure = complete(keys, claims, ARGV[i], ms)
    if failure then return redis.error_reply(failure) end
  elseif what == 'release' then
    release(keys, claims, ARGV[i], consumer)
  elseif belongs(claims, ARGV[i], consumer) then
    redis.call('ZADD', keys, text(now + ms), ARGV[i])
  end
end
return #ARGV - 3
""",
    partly=True,
)

# KEYS: the stream, the sorted set, the hash, then the key of every output. ARGV: group, consumer, window in ms, the
# number of items; for each item: id, its key, what to do with it (complete, release, none), and its outputs, as for a
# transfer (see there). The outputs of an item whose key was completed before are left out.
SETTLE: Final = Script(
    "settle keyed",
    _KEYS
    + """
local stream, keys, claims, group, consumer = KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2]
local is_retry_stream = stream:sub(1, 7) == 'anybus:'
redis.call('XPENDING', stream, group, '-', '+', 1, consumer)
redis.call('XACK', stream, group, '0-0')
if is_retry_stream then redis.call('XDEL', stream, '0-0') end
probe(keys, claims)
local results = {}
local at = 5
for item = 1, tonumber(ARGV[4]) do
  local id, key, step, outputs = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  at = at + 4
  -- An error here means: not an id, so not ours.
  local mine = redis.pcall('XPENDING', stream, group, id, id, 1, consumer)[1] ~= nil
  local publishes = mine and not (step == 'complete' and known(keys, claims, key) == 'completed')
  local ids, undo, failure = {}, {}, nil
  if publishes and outputs > 1 then
    local look = at
    for output = 1, outputs do
      local place, wanted = KEYS[tonumber(ARGV[look])], tonumber(ARGV[look + 1]) >= 0 and 'zset' or 'stream'
      local kind = redis.pcall('TYPE', place).ok
      if kind and kind ~= 'none' and kind ~= wanted then
        failure = 'WRONGTYPE ' .. place .. ' is a ' .. kind .. ', not a ' .. wanted
      end
      look = look + 4 + tonumber(ARGV[look + 3])
    end
  end
  for output = 1, outputs do
    local place, delay, token = KEYS[tonumber(ARGV[at])], tonumber(ARGV[at + 1]), ARGV[at + 2]
    local fields = tonumber(ARGV[at + 3])
    at = at + 4
    if publishes and not failure then
      local reply
      if delay >= 0 then
        local values = {token}
        for i = 0, fields - 1 do values[#values + 1] = ARGV[at + i] end
        local member = cmsgpack.pack(values)
        reply = redis.pcall('ZADD', place, text(now + delay), member)
        ids[#ids + 1] = token
        undo[#undo + 1] = {'ZREM', place, member}
      else
        local command = {'XADD', place, '*'}
        for i = 0, fields - 1 do command[#command + 1] = ARGV[at + i] end
        reply = redis.pcall(unpack(command))
        ids[#ids + 1] = reply
        undo[#undo + 1] = {'XDEL', place, reply}
        if token ~= '' then redis.pcall('ZADD', token, 0, 'anybus:returned') end
      end
      failure = failed(reply)
      if failure then undo[#undo] = nil end
    end
    at = at + fields
  end
  if mine and not failure and step == 'complete' then failure = complete(keys, claims, key, ARGV[3]) end
  if failure then
    local status = 'error'
    for i = #undo, 1, -1 do
      if failed(redis.pcall(unpack(undo[i]))) then status = 'half' end
    end
    results[item] = {status, failure}
  elseif not mine then
    results[item] = {'not ours'}
  else
    if step == 'release' then release(keys, claims, key, consumer) end
    redis.call('XACK', stream, group, id)
    if is_retry_stream then redis.call('XDEL', stream, id) end
    results[item] = {'done', ids}
  end
end
return results
""",
)

ALL: Final = (CLAIM, END, SETTLE)
