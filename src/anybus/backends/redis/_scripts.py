"""The server-side scripts. Each checks who owns an entry before it touches it, and appends before it acknowledges.

Lua never rolls back: an XACK before an XADD that fails would lose the message. Nothing here needs more than 6.2.
A retry stream (``anybus:…``) has one group only: what that has acknowledged is of no use any more, and deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1
from typing import Final


@dataclass(frozen=True)
class Script:
    name: str
    source: str

    @cached_property
    def digest(self) -> str:
        return sha1(self.source.encode(), usedforsecurity=False).hexdigest()


# Which of the ids from ARGV[5] on belong to the consumer: one ranged XPENDING for them all. ARGV[3] and ARGV[4] are a
# good guess at their range; what it misses is asked for one by one (an error there: not an id, and so not ours).
_OWNED = """
local function owned(key, group, consumer, low, high, limit)
  local found = {}
  local from = low
  repeat
    local page = redis.call('XPENDING', key, group, from, high, limit, consumer)
    for i = 1, #page do found[page[i][1]] = page[i][4] end
    if #page == limit then from = '(' .. page[#page][1] end
  until #page < limit
  for i = 5, #ARGV do
    if not found[ARGV[i]] then
      local one = redis.pcall('XPENDING', key, group, ARGV[i], ARGV[i], 1, consumer)
      if one[1] then found[ARGV[i]] = one[1][4] end
    end
  end
  return found
end
"""

ACK: Final = Script(
    "ack",
    _OWNED
    + """
local mine = owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], #ARGV + 32)
local ids, refused = {}, {}
for i = 5, #ARGV do
  if mine[ARGV[i]] then ids[#ids + 1] = ARGV[i] else refused[#refused + 1] = ARGV[i] end
end
if #ids > 0 then
  redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
  if KEYS[1]:sub(1, 7) == 'anybus:' then redis.call('XDEL', KEYS[1], unpack(ids)) end
end
return refused
""",
)

RENEW: Final = Script(
    "renew",
    _OWNED
    + """
local mine = owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], #ARGV + 32)
local ids = {}
for i = 5, #ARGV do
  if mine[ARGV[i]] then ids[#ids + 1] = ARGV[i] end
end
if #ids == 0 then return ids end
local command = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0}
for i = 1, #ids do command[#command + 1] = ids[i] end
command[#command + 1] = 'JUSTID'
return redis.call(unpack(command))
""",
)

RELEASE: Final = Script(
    "release",
    _OWNED
    + """
local parking = 'anybus:returned'
local mine = owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], #ARGV + 32)
local released = 0
for i = 5, #ARGV do
  local count = mine[ARGV[i]]
  if count then
    local before = math.max(count - 1, 0)
    redis.call('XCLAIM', KEYS[1], ARGV[1], parking, 0, ARGV[i], 'TIME', 0, 'RETRYCOUNT', before, 'JUSTID')
    released = released + 1
  end
end
return released
""",
)

# KEYS: the stream, then every key that an output goes to (a stream, or a sorted set of delayed entries).
# ARGV: group, consumer, the number of items; of each item: id, number of outputs; of each output: the index of its
# key, its delay in ms (-1 = append now), a token that makes a delayed member unique, the number of fields, the fields.
TRANSFER: Final = Script(
    "transfer",
    """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local results = {}
local at = 4
for item = 1, tonumber(ARGV[3]) do
  local id, outputs = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])
  local mine = #pending > 0
  local ids, failure = {}, nil
  if mine and outputs > 1 then
    -- Nothing rolls back: what would fail after others were appended is found before.
    local look = at
    for output = 1, outputs do
      local key, wanted = KEYS[tonumber(ARGV[look])], tonumber(ARGV[look + 1]) >= 0 and 'zset' or 'stream'
      local kind = redis.call('TYPE', key).ok
      if kind ~= 'none' and kind ~= wanted then
        failure = 'WRONGTYPE ' .. key .. ' is a ' .. kind .. ', not a ' .. wanted
      end
      look = look + 4 + tonumber(ARGV[look + 3])
    end
  end
  for output = 1, outputs do
    local key, delay, token = KEYS[tonumber(ARGV[at])], tonumber(ARGV[at + 1]), ARGV[at + 2]
    local fields = tonumber(ARGV[at + 3])
    at = at + 4
    if mine and not failure then
      local reply
      if delay >= 0 then
        local values = {token}
        for i = 0, fields - 1 do values[#values + 1] = ARGV[at + i] end
        reply = redis.pcall('ZADD', key, string.format('%.0f', now + delay), cmsgpack.pack(values))
        ids[#ids + 1] = token
      else
        local command = {'XADD', key, '*'}
        for i = 0, fields - 1 do command[#command + 1] = ARGV[at + i] end
        reply = redis.pcall(unpack(command))
        ids[#ids + 1] = reply
      end
      if type(reply) == 'table' and reply.err then failure = reply.err end
    end
    at = at + fields
  end
  if failure then
    results[item] = {'error', failure}
  elseif not mine then
    results[item] = {'not ours'}
  else
    redis.call('XACK', KEYS[1], ARGV[1], id)
    if KEYS[1]:sub(1, 7) == 'anybus:' then redis.call('XDEL', KEYS[1], id) end
    results[item] = {'done', ids}
  end
end
return results
""",
)

_MOVE_DUE = """
local function move_due(stream, delayed)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', string.format('%.0f', now), 'LIMIT', 0, 200)
  for i = 1, #due do
    local values = cmsgpack.unpack(due[i])
    local command = {'XADD', stream, '*'}
    for j = 2, #values do command[#command + 1] = values[j] end
    redis.call(unpack(command))
    redis.call('ZREM', delayed, due[i])
  end
  local first = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')
  if #first == 0 then return -1 end
  return math.max(0, math.ceil(first[2] - now))
end
"""

# Appends what is due; says in how many ms the next one is (-1 = there is none).
MOVE_DUE: Final = Script("move due", _MOVE_DUE + "return move_due(KEYS[1], KEYS[2])\n")

# ARGV: due time in ms (absolute) or, with a leading +, from now; token; fields.
SCHEDULE: Final = Script(
    "schedule",
    """
local due = ARGV[1]
if due:sub(1, 1) == '+' then
  local time = redis.call('TIME')
  due = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(due:sub(2)))
end
local values = {}
for i = 2, #ARGV do values[#values + 1] = ARGV[i] end
redis.call('ZADD', KEYS[1], due, cmsgpack.pack(values))
return due
""",
)

CANCEL: Final = Script(
    "cancel",
    """
local cursor = '0'
repeat
  local page = redis.call('ZSCAN', KEYS[1], cursor, 'COUNT', 500)
  cursor = page[1]
  for i = 1, #page[2], 2 do
    if cmsgpack.unpack(page[2][i])[1] == ARGV[1] then return redis.call('ZREM', KEYS[1], page[2][i]) end
  end
until cursor == '0'
return 0
""",
)

# What was delivered to the consumer above an id, up to ARGV[4] pending entries looked at; and the highest id looked at
# ('' = there was none). Of that, what a read brought (handed over once, that is); or, with ARGV[5], what was handed
# over or renewed at most so many ms ago. The count stays what it is.
UNSEEN: Final = Script(
    "unseen",
    """
local page = redis.call('XPENDING', KEYS[1], ARGV[1], '(' .. ARGV[3], '+', ARGV[4], ARGV[2])
local found = {}
for _, entry in ipairs(page) do
  local wanted = entry[4] == 1
  if ARGV[5] then wanted = entry[3] <= tonumber(ARGV[5]) end
  if wanted then
    local body = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'RETRYCOUNT', entry[4])
    found[#found + 1] = {entry[1], body[1] and body[1][2] or false, entry[4]}
  end
end
return {#page > 0 and page[#page][1] or '', found}
""",
)

# Scans are bounded by their number, since TIME stands still inside a script: 50 of them look at 32,000 entries with a
# COUNT of 64, some 20 ms. The next call goes on from there.
# One entry: id, its body (false = gone), the server's count of hand-overs, this one included.
_RECLAIM = """
local function reclaim(key, group, consumer, min_idle, count, cursor)
  local parking = 'anybus:returned'
  local taken, scans, wrapped = {}, 0, cursor == '0-0'
  repeat
    scans = scans + 1
    local page = redis.call('XAUTOCLAIM', key, group, consumer, min_idle, cursor, 'COUNT', count - #taken, 'JUSTID')
    cursor = page[1]
    for _, id in ipairs(page[2]) do
      local pending = redis.call('XPENDING', key, group, id, id, 1)
      local deliveries = pending[1] and pending[1][4] + 1 or 1
      local body = redis.call('XCLAIM', key, group, consumer, 0, id, 'RETRYCOUNT', deliveries)
      taken[#taken + 1] = {id, body[1] and body[1][2] or false, deliveries}
    end
    for _, id in ipairs(page[3] or {}) do taken[#taken + 1] = {id, false, 0} end
    if cursor == '0-0' then
      if wrapped then break end
      wrapped = true
    end
  until #taken >= count or scans >= 50
  if #taken > 0 and #redis.call('XPENDING', key, group, '-', '+', 1, parking) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', key, group, parking)
  end
  return {cursor, taken}
end
"""

RECLAIM: Final = Script(
    "reclaim",
    _RECLAIM + "return reclaim(KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5])\n",
)

# A whole pass over a topic (KEYS 1 and 2: stream and delayed set) and its retry stream (KEYS 3 and 4): what is idle
# there, what is due, what is new on the retry stream. ARGV: group, consumer, min idle ms, room, cursor of the topic,
# cursor of the retry stream, which step goes first (0, 1 or 2).
# A group that is missing shows as an error in its own step: the others keep what they took.
PASS: Final = Script(
    "pass",
    _MOVE_DUE
    + _RECLAIM
    + """
local group, consumer, min_idle, room = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local cursors = {ARGV[5], ARGV[6]}
local results = {false, false, false}
local first = tonumber(ARGV[7])
local next_due = -1
local function guarded(work)
  local ok, reply = pcall(work)
  if ok then return reply end
  return {'error', type(reply) == 'table' and reply.err or tostring(reply)}
end
guarded(function() move_due(KEYS[1], KEYS[2]) return {} end)
for offset = 0, 2 do
  local step = (first + offset) % 3
  if room > 0 then
    local reply
    if step == 0 then
      reply = guarded(function() return reclaim(KEYS[1], group, consumer, min_idle, room, cursors[1]) end)
    elseif step == 1 then
      reply = guarded(function()
        move_due(KEYS[3], KEYS[4])
        local read = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', room, 'STREAMS', KEYS[3], '>')
        return {'read', read and read[1] and read[1][2] or {}}
      end)
    else
      reply = guarded(function() return reclaim(KEYS[3], group, consumer, min_idle, room, cursors[2]) end)
    end
    if reply[1] ~= 'error' then room = room - #reply[2] end
    results[step + 1] = reply
  end
end
return results
""",
)

# Keeps a group's safe floor beside its streams: what lies below it, every member had settled. KEYS: pairs of a stream
# and its meta hash. A floor is the last delivered id, or, with something pending, "before" the lowest of that.
FLOOR: Final = Script(
    "floor",
    """
for pair = 1, #KEYS, 2 do
  local lowest = redis.pcall('XPENDING', KEYS[pair], ARGV[1], '-', '+', 1)
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[pair])
  if not lowest.err and not groups.err then
    if lowest[1] then
      redis.call('HSET', KEYS[pair + 1], ARGV[1], 'before ' .. lowest[1][1])
    else
      for _, group in ipairs(groups) do
        local info = {}
        for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
        if info['name'] == ARGV[1] then redis.call('HSET', KEYS[pair + 1], ARGV[1], info['last-delivered-id']) end
      end
    end
  end
end
return 1
""",
)

# Removes consumers that are gone: nothing pending, and silent for so many ms. A live one is made again by its next
# read, so that this harms nobody.
REAP: Final = Script(
    "reap",
    """
local removed = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local info = {}
  for i = 1, #consumer, 2 do info[consumer[i]] = consumer[i + 1] end
  if info['pending'] == 0 and info['idle'] > tonumber(ARGV[3]) and info['name'] ~= ARGV[2] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], info['name'])
    removed = removed + 1
  end
end
return removed
""",
)

FORGET: Final = Script(
    "forget",
    """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
""",
)

ALL: Final = (ACK, RENEW, RELEASE, TRANSFER, MOVE_DUE, SCHEDULE, CANCEL, UNSEEN, RECLAIM, PASS, FLOOR, REAP, FORGET)
