"""The scripts that take entries: those that are due, those that are idle, and those whose reply was lost.

Each call is bounded in bytes and in the number of entries that it looks at, because a script blocks the whole server
while it runs. (TIME does not advance in a script, so it cannot be bounded in time.) The next call does the rest.
"""

from __future__ import annotations

from typing import Final

from ._fence_scripts import NOTE_LOSS, NOTE_WAITING
from ._scripts import FAILED, MOST_VALUES, Script

MOST_BYTES: Final = 1024 * 1024
"""How many bytes one call moves or takes at most, unless a single entry is larger."""

MOST_LOOKS: Final = 2000
"""How many pending entries one call looks at."""

# Appends the delayed entries that are due. Returns in how many ms the next one is due (0 = now, there were too many for
# one call; -1 = there is none), and the error that stopped it. A member that cannot be read is appended as it is, in a
# field `delayed`: it becomes a malformed entry, and does not delay the others.
_MOVE_DUE: Final = f"""
local function move_due(stream, delayed)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local moved, bytes = 0, 0
  while true do
    -- Looking at a member copies it.
    if moved >= 200 or bytes >= {MOST_BYTES} then return 0 end
    local first = redis.pcall('ZRANGE', delayed, 0, 0, 'WITHSCORES')
    if failed(first) then return -1, first.err end
    if #first == 0 then return -1 end
    local member, wait = first[1], math.ceil(first[2] - now)
    if wait > 0 then return wait end
    bytes = bytes + #member
    if moved > 0 and bytes > {MOST_BYTES} then return 0 end
    moved = moved + 1
    local command = {{'XADD', stream, '*'}}
    local known, values = pcall(cmsgpack.unpack, member)
    known = known and type(values) == 'table' and #values >= 3 and #values % 2 == 1 and #values < {MOST_VALUES}
    if known then
      for i = 2, #values do
        known = known and type(values[i]) == 'string'
        command[#command + 1] = values[i]
      end
    end
    if not known then command = {{'XADD', stream, '*', 'delayed', member}} end
    local id = redis.pcall(unpack(command))
    if failed(id) then return -1, id.err end
    local removed = redis.pcall('ZREM', delayed, member)
    if failed(removed) then
      redis.pcall('XDEL', stream, id)
      return -1, removed.err
    end
  end
end
"""

MOVE_DUE: Final = Script(
    "move due",
    FAILED
    + _MOVE_DUE
    + """
local wait, failure = move_due(KEYS[1], KEYS[2])
if failure then return redis.error_reply(failure) end
return wait
""",
    partly=True,
)

_SIZE: Final = """
local function size_of(fields)
  local size = 0
  for i = 1, #fields do size = size + #fields[i] end
  return size
end
"""

# Entries that were delivered to the consumer, with ids above ARGV[3], and the highest id that was looked at ('' = there
# was none). It looks at up to ARGV[4] pending entries. It returns those that a read took (they were delivered once) or,
# with ARGV[5], those that were delivered or renewed at most ARGV[5] ms ago. The count of deliveries is not changed.
UNSEEN: Final = Script(
    "unseen",
    _SIZE
    + f"""
local page = redis.call('XPENDING', KEYS[1], ARGV[1], '(' .. ARGV[3], '+', ARGV[4], ARGV[2])
local found, bytes, last = {{}}, 0, ''
for _, entry in ipairs(page) do
  local wanted = entry[4] == 1
  if ARGV[5] then wanted = entry[3] <= tonumber(ARGV[5]) end
  if wanted then
    if bytes >= {MOST_BYTES} then break end
    local body = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'RETRYCOUNT', entry[4])
    local fields = body[1] and body[1][2] or false
    if fields then bytes = bytes + size_of(fields) end
    found[#found + 1] = {{entry[1], fields, entry[4]}}
  end
  last = entry[1]
end
return {{last, found}}
""",
    partly=True,
)

# For each entry: id, body (false = gone), the server's count of deliveries, including this one.
# Bodies are fetched one by one. Entries that were claimed beyond the bytes of one call go to the parking consumer,
# uncounted, and the next scan starts there. `budget` is what is left for this call: bytes, looks, and whether anything
# was taken. `budget.more` is set if entries were left.
# Losses are noted (see `_fence_scripts`), unless the entries belonged to the parking consumer.
# Entries of the parking consumer come first, for up to half of the room: a scan over many pending entries may need many
# calls until it reaches them. The other half is for the scan, however often entries are released again.
_RECLAIM: Final = """
local function reclaim(key, group, consumer, min_idle, count, cursor, budget, losses)
  local parking = 'anybus:returned'
  local taken, got, wrapped, more = {}, {}, cursor == '0-0', false
  -- These fail, if anything fails, before an entry is taken.
  local waiting = redis.call('XPENDING', key, group, '-', '+', math.max(1, math.floor(count / 2)), parking)
  redis.call('XCLAIM', key, group, consumer, 0, '0-0', 'JUSTID')
  local function take(id)
    local pending = redis.call('XPENDING', key, group, id, id, 1)
    local deliveries = pending[1] and pending[1][4] + 1 or 1
    local body = redis.call('XCLAIM', key, group, consumer, 0, id, 'RETRYCOUNT', deliveries)
    local fields = body[1] and body[1][2] or false
    if fields then budget.bytes = budget.bytes - size_of(fields) end
    taken[#taken + 1] = {id, fields, deliveries}
    got[id] = true
    budget.any = true
  end
  -- With room for one entry only, those of dead consumers would never be reached.
  for i = 1, count > 1 and #waiting or 0 do
    if budget.bytes <= 0 and budget.any then
      more = true
      break
    end
    take(waiting[i][1])
  end
  while not more and #taken < count do
    local scan = math.min(count - #taken, math.max(1, math.floor(budget.looks / 10)))
    budget.looks = budget.looks - 10 * scan
    local parked = {}
    local returned = redis.call('XPENDING', key, group, cursor, '+', scan, parking)
    for i = 1, #returned do parked[returned[i][1]] = true end
    local page = redis.call('XAUTOCLAIM', key, group, consumer, min_idle, cursor, 'COUNT', scan, 'JUSTID')
    cursor = page[1]
    for i = #page[2], 1, -1 do
      if not parked[page[2][i]] then
        note_loss(losses, '', page[2][1], page[2][i])
        break
      end
    end
    for _, id in ipairs(page[2]) do
      if got[id] then
        -- With a minimum idle time of zero, a scan meets what was taken before.
      elseif budget.bytes <= 0 and budget.any then
        local pending = redis.call('XPENDING', key, group, id, id, 1)
        local before = pending[1] and pending[1][4] or 0
        redis.call('XCLAIM', key, group, parking, 0, id, 'TIME', 0, 'RETRYCOUNT', before, 'JUSTID')
        note_loss(losses, consumer, id, id)
        if not more then cursor = id end
        more = true
      else
        take(id)
      end
    end
    for _, id in ipairs(page[3] or {}) do taken[#taken + 1] = {id, false, 0} end
    if cursor == '0-0' then
      if wrapped then break end
      wrapped = true
    end
    if budget.looks < 10 then break end
  end
  budget.more = budget.more or more
  if #taken > 0 and #redis.call('XPENDING', key, group, '-', '+', 1, parking) == 0 then
    redis.pcall('XGROUP', 'DELCONSUMER', key, group, parking)
  end
  return {cursor, taken}
end
"""

_BUDGET: Final = f"local budget = {{bytes = {MOST_BYTES}, looks = {MOST_LOOKS}, any = false, more = false}}\n"

RECLAIM: Final = Script(
    "reclaim",
    _SIZE
    + NOTE_LOSS
    + NOTE_WAITING
    + _RECLAIM
    + _BUDGET
    + """
local reply = reclaim(KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], budget, ARGV[6])
if budget.more then note_waiting(ARGV[7]) end
return reply
""",
    partly=True,
)

# A whole pass over a topic (KEYS 1 and 2: stream and delayed set) and its retry stream (KEYS 3 and 4). It appends the
# entries that are due, then takes idle entries of both, and new entries of the retry stream. ARGV: group, consumer, min
# idle ms, room, cursor of the topic, cursor of the retry stream, which step goes first (0, 1 or 2), key of
# losses, key of what waits.
# Replies with the results of the three steps, whether entries were left that were too much for one call, and the errors
# of appending to the topic and to the retry stream. A missing group is an error of its own step only: the other steps
# keep the entries that they took.
PASS: Final = Script(
    "pass",
    FAILED
    + _MOVE_DUE
    + _SIZE
    + NOTE_LOSS
    + NOTE_WAITING
    + _RECLAIM
    + _BUDGET
    + """
local group, consumer, min_idle, room = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local cursors = {ARGV[5], ARGV[6]}
local results = {false, false, false}
local first, losses, waiting = tonumber(ARGV[7]), ARGV[8], ARGV[9]
local function guarded(work)
  local ok, reply = pcall(work)
  if ok then return reply end
  return {'error', type(reply) == 'table' and reply.err or tostring(reply)}
end
local function claim_idle(key, cursor)
  return reclaim(key, group, consumer, min_idle, room, cursor, budget, losses)
end
local function read_retries()
  local entries = {}
  while #entries < room do
    if budget.bytes <= 0 and budget.any then
      budget.more = true
      break
    end
    local read = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', 1, 'STREAMS', KEYS[3], '>')
    local entry = read and read[1] and read[1][2][1]
    if not entry then break end
    if entry[2] then budget.bytes = budget.bytes - size_of(entry[2]) end
    budget.any = true
    entries[#entries + 1] = entry
  end
  return {'read', entries}
end
local wait, failure = move_due(KEYS[1], KEYS[2])
local retry_wait, retry_failure = move_due(KEYS[3], KEYS[4])
for offset = 0, 2 do
  local step = (first + offset) % 3
  if room > 0 and budget.any and budget.bytes <= 0 then
    budget.more = true
  elseif room > 0 then
    local reply
    if step == 0 then
      reply = guarded(function() return claim_idle(KEYS[1], cursors[1]) end)
    elseif step == 1 then
      reply = guarded(read_retries)
    else
      reply = guarded(function() return claim_idle(KEYS[3], cursors[2]) end)
    end
    if reply[1] ~= 'error' then room = room - #reply[2] end
    results[step + 1] = reply
  end
end
local more = budget.more or wait == 0 or retry_wait == 0
-- Whether entries that nobody leases are left, for members that watch the group.
local function are_left()
  for _, key in ipairs({KEYS[1], KEYS[3]}) do
    local parked = redis.pcall('XPENDING', key, group, '-', '+', 1, 'anybus:returned')
    if failed(parked) or parked[1] then return true end
  end
  -- XPENDING without a range would have the total too, but it names all owners.
  local groups, length = redis.pcall('XINFO', 'GROUPS', KEYS[3]), redis.pcall('XLEN', KEYS[3])
  if failed(groups) or failed(length) then return true end
  for _, values in ipairs(groups) do
    local info = {}
    for i = 1, #values, 2 do info[values[i]] = values[i + 1] end
    if info['name'] == group then return length > info['pending'] end
  end
  return true
end
if more or room <= 0 then
  if are_left() then note_waiting(waiting) end
elseif #redis.pcall('ZRANGE', waiting, 0, 0) > 0 and not are_left() then
  redis.pcall('ZREM', waiting, 'anybus:returned')
end
return {results[1], results[2], results[3], more and 1 or 0, failure or false, retry_failure or false}
""",
    partly=True,
)

ALL: Final = (MOVE_DUE, UNSEEN, RECLAIM, PASS)
