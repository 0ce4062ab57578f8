"""The server-side scripts. Each one checks the owner of an entry before it changes it, and appends before it acks.

Redis never rolls back a script: an XACK before an XADD that fails would lose the message. A script that writes more
than once therefore does one of two things. Either all errors happen before its first write: a command with the id 0-0
or an empty name changes nothing, but needs the same permission. Or the script undoes its writes, and its reply tells
what it could not undo.

All scripts work on Redis 6.2. A retry stream (``anybus:…``) has only one group: entries that the group has acknowledged
are of no use any more, and are deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1
from typing import Final

MOST_VALUES: Final = 7000
"""How many values a script passes to one command at most. Lua's ``unpack`` allows 7,999."""

MOST_REAPED: Final = 1000
"""How many dead consumers one call removes at most."""


@dataclass(frozen=True)
class Script:
    """A script, which is called by its digest.

    :ivar partly: whether its commands may fail after its first write. If false, they can fail only before it.
    """

    name: str
    source: str
    partly: bool = False

    @cached_property
    def digest(self) -> str:
        return sha1(self.source.encode(), usedforsecurity=False).hexdigest()


# The text of the error that `redis.pcall` returned, or nil.
FAILED: Final = """
local function failed(reply)
  return type(reply) == 'table' and reply.err or nil
end
"""

# Acknowledges an entry of KEYS[1] and the group ARGV[1]. It fails only before its first write.
_SETTLE: Final = """
local function settle(id)
  local is_retry_stream = KEYS[1]:sub(1, 7) == 'anybus:'
  local failure = is_retry_stream and failed(redis.pcall('XDEL', KEYS[1], '0-0'))
  failure = failure or failed(redis.pcall('XACK', KEYS[1], ARGV[1], id))
  if not failure and is_retry_stream then redis.pcall('XDEL', KEYS[1], id) end
  return failure
end
"""

# KEYS: the stream, then the key of every output (a stream, or a sorted set of delayed entries).
# ARGV: group, consumer, the number of items; for each item: id, number of outputs; for each output: the index of its
# key, its delay in ms (-1 = append now), a token that makes a delayed member unique, the number of fields, the fields.
# Instead of the token, what is appended to a retry stream has the key to note that it waits for a pass.
# If an item fails, its outputs are undone ('error'). If one cannot be undone, the reply says so ('half').
TRANSFER: Final = Script(
    "transfer",
    FAILED
    + _SETTLE
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
local results = {}
local at = 4
for item = 1, tonumber(ARGV[3]) do
  local id, outputs = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  -- An error here means: not an id, so not ours.
  local mine = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1] ~= nil
  local ids, undo, failure = {}, {}, nil
  if mine and outputs > 1 then
    -- Check the types of all keys first, so that less has to be undone.
    local look = at
    for output = 1, outputs do
      local key, wanted = KEYS[tonumber(ARGV[look])], tonumber(ARGV[look + 1]) >= 0 and 'zset' or 'stream'
      local kind = redis.pcall('TYPE', key).ok
      if kind and kind ~= 'none' and kind ~= wanted then
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
        local member = cmsgpack.pack(values)
        reply = redis.pcall('ZADD', key, string.format('%.0f', now + delay), member)
        ids[#ids + 1] = token
        undo[#undo + 1] = {'ZREM', key, member}
      else
        local command = {'XADD', key, '*'}
        for i = 0, fields - 1 do command[#command + 1] = ARGV[at + i] end
        reply = redis.pcall(unpack(command))
        ids[#ids + 1] = reply
        undo[#undo + 1] = {'XDEL', key, reply}
        if token ~= '' then redis.pcall('ZADD', token, 0, 'anybus:returned') end
      end
      failure = failed(reply)
      if failure then undo[#undo] = nil end
    end
    at = at + fields
  end
  if mine and not failure then failure = settle(id) end
  if failure then
    local status = 'error'
    for i = #undo, 1, -1 do
      if failed(redis.pcall(unpack(undo[i]))) then status = 'half' end
    end
    results[item] = {status, failure}
  elseif not mine then
    results[item] = {'not ours'}
  else
    results[item] = {'done', ids}
  end
end
return results
""",
)

# The second step of a transfer whose output has too many fields for a script. KEYS: the stream, the output's stream.
# ARGV: group, consumer, id, the id of the appended output.
SETTLE_APPENDED: Final = Script(
    "settle appended",
    FAILED
    + _SETTLE
    + """
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
local failure = failed(pending)
if not failure and pending[1] then
  failure = settle(ARGV[3])
  if not failure then return {'done'} end
end
local left = failed(redis.pcall('XDEL', KEYS[2], ARGV[4]))
if left then return {'half', failure or left} end
if failure then return {'error', failure} end
return {'not ours'}
""",
)

# Keeps a group's safe floor beside its streams: all members have settled everything up to it. KEYS: pairs of a stream
# and its meta hash. A floor is the last delivered id or, if there are pending entries, "before" and the lowest of them.
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

# Removes consumers that have no pending entries, and were silent for ARGV[3] ms. A live consumer is recreated by its
# next read, so this does no harm. The list of consumers cannot be read in parts: it takes about 1 us for each.
REAP: Final = Script(
    "reap",
    f"local most = {MOST_REAPED}"
    """
local removed = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  if removed >= most then break end
  local info = {}
  for i = 1, #consumer, 2 do info[consumer[i]] = consumer[i + 1] end
  if info['pending'] == 0 and info['idle'] > tonumber(ARGV[3]) and info['name'] ~= ARGV[2] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], info['name'])
    removed = removed + 1
  end
end
return removed
""",
    partly=True,
)

# KEYS: the stream, and the key of the group's lease and its members. ARGV: group, consumer, the key of losses.
FORGET: Final = Script(
    "forget",
    """
redis.pcall('ZREM', KEYS[2], 'member:' .. ARGV[2])
redis.pcall('ZREM', ARGV[3], ARGV[2])
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
""",
)

ALL: Final = (TRANSFER, SETTLE_APPENDED, FLOOR, REAP, FORGET)
