"""The scripts for delayed messages: storing, listing, cancelling one, and asking when something is due.

A delayed message is a member of a sorted set (see ``_keys.delayed``). Its score is the due time in ms, by the server's
clock. The member is a packed list: a token, then the fields. What is due is appended by the scripts that take entries
(``_taking_scripts``).

The token begins with the time in microseconds at which the message was stored. So members with the same score are in
the order in which they were stored. A schedule id is the score and the token, so a message is found by a binary search
among the members of its score. Ids without a score are those of delayed outputs, and of earlier versions: these are
found by a scan.
"""

from __future__ import annotations

from typing import Final

from ._scripts import MOST_VALUES, Script

# Stores a message for later. `due` is in ms, absolute or (with a leading +) from now; `random` makes the token unique;
# `fields` is changed. Returns the schedule id, and in how many ms it is due. It fails only before its first write.
SCHEDULING: Final = """
local function schedule(key, due, random, fields)
  local time = redis.call('TIME')
  local micros = time[1] * 1000000 + time[2]
  local now = math.floor(micros / 1000)
  if due:sub(1, 1) == '+' then due = now + tonumber(due:sub(2)) else due = math.max(now, tonumber(due)) end
  local token, score = string.format('%014x', micros) .. random, string.format('%.0f', due)
  table.insert(fields, 1, token)
  redis.call('ZADD', key, score, cmsgpack.pack(fields))
  return {score .. '-' .. token, due - now}
end
"""

# ARGV: when it is due, a random text, the fields.
SCHEDULE: Final = Script(
    "schedule",
    SCHEDULING
    + """
local fields = {}
for i = 3, #ARGV do fields[#fields + 1] = ARGV[i] end
return schedule(KEYS[1], ARGV[1], ARGV[2], fields)
""",
)

# Among the members of one score, from rank `low` up to `high`: the rank of the first one that does not come before
# `head`, which is the beginning of a member. Bytes are compared, because Lua compares texts as the locale does.
_POSITION: Final = """
local function comes_before(member, head)
  for i = 1, #head do
    local one, other = member:byte(i), head:byte(i)
    if one ~= other then return one == nil or one < other end
  end
  return false
end
local function position(key, low, high, head)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if comes_before(redis.call('ZRANGE', key, middle, middle)[1], head) then low = middle + 1 else high = middle end
  end
  return low
end
local function ranks(key, score)
  return redis.call('ZCOUNT', key, '-inf', '(' .. score), redis.call('ZCOUNT', key, '-inf', score)
end
"""

# ARGV: the score, the token, how many members were looked at. Replies with how many have been looked at (-1 = all), and
# how many members were removed. A member begins with the head of a list, the head of a text, and the token. Lists of up
# to 15 values are searched for by each of their possible heads. Longer ones, which are rare, come after all others,
# and are looked at one by one. The message's idempotency key, if it has one, is forgotten first (KEYS 2 and 3: see
# ``_deduplication_scripts``).
CANCEL: Final = Script(
    "cancel",
    _POSITION
    + """
local key, score, token = KEYS[1], ARGV[1], ARGV[2]
local low, high = ranks(key, score)
local text = string.char(160 + #token) .. token
local function take(member)
  local id = score .. '-' .. token
  local field = redis.pcall('HGET', KEYS[2], '@' .. id)
  if type(field) == 'string' then
    local record = redis.pcall('HGET', KEYS[2], field)
    local fields = {'@' .. id}
    if type(record) == 'string' and record:match('^%d+ (.*)$') == id then fields[2] = field end
    redis.pcall('HDEL', KEYS[2], unpack(fields))
    redis.pcall('ZREM', KEYS[3], unpack(fields))
  end
  return redis.call('ZREM', key, member)
end
local function remove(rank, head)
  local member = redis.call('ZRANGE', key, rank, rank)[1]
  if member and member:sub(1, #head) == head then return take(member) end
  return 0
end
for values = 3, 15, 2 do
  local head = string.char(144 + values) .. text
  local rank = position(key, low, high, head)
  if rank < high and remove(rank, head) == 1 then return {-1, 1} end
end
local first = position(key, low, high, string.char(220)) + tonumber(ARGV[3])
for rank = first, math.min(first + 50, high) - 1 do
  local member = redis.call('ZRANGE', key, rank, rank)[1]
  if member:sub(4, 3 + #text) == text then return {-1, take(member)} end
end
if first + 50 >= high then return {-1, 0} end
return {ARGV[3] + 50, 0}
""",
)

# Searches a part of the set for a delayed member, by its token, from a cursor on. A member begins with the head of a
# list, the head of a string, and the token. Replies with the next cursor ('0' = the end), and how many it removed.
CANCEL_UNDATED: Final = Script(
    "cancel undated",
    """
local cursor = ARGV[2]
for scan = 1, 10 do
  local page = redis.call('ZSCAN', KEYS[1], cursor, 'MATCH', '??' .. ARGV[1] .. '*', 'COUNT', 200)
  cursor = page[1]
  for i = 1, #page[2], 2 do
    local known, values = pcall(cmsgpack.unpack, page[2][i])
    if known and type(values) == 'table' and values[1] == ARGV[1] then
      return {'0', redis.call('ZREM', KEYS[1], page[2][i])}
    end
  end
  if cursor == '0' then break end
end
return {cursor, 0}
""",
)

# A page of what waits. ARGV: after which score and beginning of a member ('' = from the first), the most members, the
# most bytes (unless a single one has more). Replies whether there are more, and for each with the score, the beginning
# of the member, and its values; or, if it cannot be read, the member alone.
PAGE: Final = Script(
    "delayed page",
    _POSITION + f"local most = {MOST_VALUES}"
    """
local key, rank = KEYS[1], 0
if ARGV[1] ~= '' then
  local low, high = ranks(key, ARGV[1])
  rank = position(key, low, high, ARGV[2])
  local there = rank < high and redis.call('ZRANGE', key, rank, rank)[1]
  if there and there:sub(1, #ARGV[2]) == ARGV[2] then rank = rank + 1 end
end
local page, bytes = {}, 0
while #page < tonumber(ARGV[3]) do
  local found = redis.call('ZRANGE', key, rank, rank, 'WITHSCORES')
  if not found[1] then break end
  bytes = bytes + #found[1]
  if page[1] and bytes > tonumber(ARGV[4]) then break end
  local known, values = pcall(cmsgpack.unpack, found[1])
  known = known and type(values) == 'table' and #values % 2 == 1 and #values < most
  for i = 1, known and #values or 0 do known = known and type(values[i]) == 'string' end
  page[#page + 1] = {found[2], found[1]:sub(1, 40), known and values or {found[1]}}
  rank = rank + 1
end
return {redis.call('ZCARD', key) > rank and 1 or 0, page}
""",
)

# KEYS: delayed sets. Replies for each: in how many ms the first member is due, if that is within ARGV[1] ms; 'later';
# or 'none'.
DUE_WITHIN: Final = Script(
    "due within",
    """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local waits = {}
for index, key in ipairs(KEYS) do
  local wait
  -- Counting copies no member.
  local soon = redis.pcall('ZCOUNT', key, '-inf', now + tonumber(ARGV[1]))
  if type(soon) == 'table' then
    wait = 'none'
  elseif soon > 0 then
    wait = math.max(0, math.ceil(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2] - now))
  else
    wait = redis.call('EXISTS', key) == 1 and 'later' or 'none'
  end
  waits[index] = wait
end
return waits
""",
)

ALL: Final = (SCHEDULE, CANCEL, CANCEL_UNDATED, PAGE, DUE_WITHIN)
