"""The scripts of the fence: acknowledging, renewing and releasing what still belongs to a consumer, and nothing else.

**One by one.** A ranged XPENDING tells who owns each entry. This is exact, but its reply costs the server two to three
times as much as the XACK itself.

**Together.** ``ACK`` acknowledges a large batch by a single XACK if no entry of it is in dispute. A script is one step
for the server, so nothing can change between the check and the XACK. Two questions are asked:

1. *Does somebody else own an entry of the batch?* XPENDING without a range names the owners that have pending entries.
   If the consumer is the only one, the answer is no. Otherwise each other owner is asked for its first entry within the
   batch's range. That entry is none of the batch (or the answer is yes), and the search goes on at the next id of the
   batch that is above it. So the number of looks is the number of times that the entries of two owners alternate. If
   they alternate often, the entries are looked up one by one instead.

   The answer is the server's own and does not depend on what anybody noted: it holds for members of other
   implementations, for an operator's XCLAIM, for a group that was recreated, after a failover, and for consumers that
   were removed and created again. So a stale acknowledgement never touches what somebody else owns.

2. *May an entry of the batch have been lost, and then been settled by its new owner?* Nobody owns such an entry any
   more, so an XACK does no harm. But the consumer must be told, because it did not own what it settled. Each script
   that takes entries away from a consumer notes the loss in the same step: a sorted set (``losses`` in ``_keys``) has,
   for each consumer, the milliseconds of the highest id that it has lost. Batches that are entirely above it cannot
   contain a lost entry. Other batches are looked up one by one.

   Each of these scripts notes a loss: ``RELEASE`` for the consumer itself; ``RECLAIM`` and ``PASS`` for all consumers
   (the member with the empty name), unless they take entries of the parking consumer. XAUTOCLAIM does not tell whose
   entries it takes, and counting the entries of all owners would make a pass more expensive in a larger group. They
   also note a loss of the consumer itself where they pass on an entry that it had. The others move no entry from one
   consumer to another: ``UNSEEN`` and ``RENEW`` claim for the owner, transfers only acknowledge.

   The note is needed for reports only. If it is missing (no permission, another implementation, or more than 1,000
   consumers that lost something and were killed), an entry that a new owner has settled counts as acknowledged. (With
   at-most-once the answer decides about a handling, so the bus does not use this script there, but a transfer.)

If XACK finds fewer entries than the batch has, some were no longer pending although no script of ours took them: they
were acknowledged before, by a try whose reply was lost or by hand. Nobody else owns them, so they count as
acknowledged. Ids that the group has not delivered yet are refused: it was recreated, and will deliver them again.

Not covered is what no server can tell: two consumers of the same name (subscriptions have unique names).
"""

from __future__ import annotations

from typing import Final

from ._scripts import Script

TOGETHER: Final = 16
"""From how many ids on a batch may be acknowledged together."""

MOST_LOSSES: Final = 1000
"""For how many consumers of a group losses are kept: those with the highest ids."""

# Notes that a consumer ('' = any) lost entries from `lowest` to `highest`. Milliseconds of fewer than 13 digits (in ids
# that were made by hand) can be below those of a batch, although the id as text is not. Then no batch is above them.
NOTE_LOSS: Final = f"""
local function note_loss(losses, consumer, lowest, highest)
  local at = #lowest:match('^%d+') < 13 and '+inf' or highest:match('^%d+')
  redis.pcall('ZADD', losses, 'GT', at, consumer)
  local beyond = redis.pcall('ZRANGE', losses, 0, -{MOST_LOSSES + 1})
  if #beyond > 0 then redis.pcall('ZREM', losses, unpack(beyond, 1, math.min(#beyond, 1000))) end
end
"""

# Notes that entries wait for a pass: nobody leases them. Members that watch the group look for this key, instead of
# making passes in vain. (If it cannot be noted, they find the entries a few seconds later.)
NOTE_WAITING: Final = """
local function note_waiting(waiting)
  if waiting ~= '' then redis.pcall('ZADD', waiting, 0, 'anybus:returned') end
end
"""

# Which of the ids from ARGV[6] on belong to the consumer. One XPENDING looks at the range from ARGV[3] to ARGV[4], in
# which most likely all ids are. Ids that it misses are looked up one by one (an error means: not an id, so not ours).
_OWNED = """
local function owned(key, group, consumer, low, high, limit)
  local found = {}
  local from = low
  repeat
    local page = redis.call('XPENDING', key, group, from, high, limit, consumer)
    for i = 1, #page do found[page[i][1]] = page[i][4] end
    if #page == limit then from = '(' .. page[#page][1] end
  until #page < limit
  for i = 6, #ARGV do
    if not found[ARGV[i]] then
      local one = redis.pcall('XPENDING', key, group, ARGV[i], ARGV[i], 1, consumer)
      if one[1] then found[ARGV[i]] = one[1][4] end
    end
  end
  return found
end
"""

# Whether the ids from ARGV[6] on can be acknowledged together: nobody else owns one of them, and the consumer has lost
# none of them. If it cannot tell, the answer is no: for ids that were made by hand, and whose milliseconds therefore do
# not have 13 digits, and if the ids are not in ascending order while others have pending entries.
_UNDISPUTED = """
-- How many owners there are besides the consumer, if these are too many.
local crowd

-- Two ids, both of 13 digits, a dash and digits without leading zeros.
local function is_below(a, b)
  if #a == #b then return a < b end
  local ms_a, ms_b = a:sub(1, 13), b:sub(1, 13)
  if ms_a == ms_b then return #a < #b end
  return ms_a < ms_b
end

local function may_be_lost(losses, consumer, low)
  local losers = redis.pcall('ZRANGEBYSCORE', losses, low:sub(1, 13), '+inf', 'LIMIT', 0, 100)
  if losers.err or #losers == 100 then return true end
  for i = 1, #losers do
    if losers[i] == consumer or losers[i] == '' then return true end
  end
  return false
end

-- No id is below ARGV[3], as text. So if a dash comes after 13 characters, these are digits, or it is no id at all.
local function are_ascending()
  local byte, before, length = string.byte, ARGV[6], #ARGV[6]
  for i = 6, #ARGV do
    local id = ARGV[i]
    local dash, first = byte(id, 14, 15)
    if dash ~= 45 or not first or first > 57 or first < 49 and (first < 48 or #id > 15) then return false end
    if i > 6 then
      if #id == length then
        if before >= id then return false end
      elseif is_below(before, id) then
        length = #id
      else
        return false
      end
      before = id
    end
  end
  return true
end

local function are_undisputed(key, group, consumer)
  local low = ARGV[3]
  if not low:find('^[1-9]%d%d%d%d%d%d%d%d%d%d%d%d%-') or may_be_lost(ARGV[5], consumer, low) then return false end
  local count = #ARGV - 5
  local own, others = 0, {}
  for _, owner in ipairs(redis.call('XPENDING', key, group)[4] or {}) do
    if owner[1] == consumer then own = tonumber(owner[2]) else others[#others + 1] = owner[1] end
  end
  if own < count then return false end
  if #others == 0 then return true end
  if #others > count / 4 then crowd = #others end
  if crowd or not are_ascending() then return false end
  local last, credit = #ARGV, 4
  for _, other in ipairs(others) do
    local at = 6
    while at <= last do
      local page = redis.pcall('XPENDING', key, group, ARGV[at], ARGV[last], 1, other)
      if page.err then return false end
      if not page[1] then break end
      local theirs = page[1][1]
      -- The first id that is not below theirs.
      local from, above = at, last + 1
      while at < above do
        local middle = math.floor((at + above) / 2)
        if is_below(ARGV[middle], theirs) then at = middle + 1 else above = middle end
      end
      if ARGV[at] == theirs then return false end
      -- Give up if the entries alternate too often.
      credit = credit - 1 + (at - from) / 16
      if credit < 0 then return false end
    end
  end
  return true
end
"""

# ARGV: group, consumer, the range of the ids, the key of losses ('' = do not try to acknowledge them together), the
# ids. Replies with those that were refused and, if they were not acknowledged together because the entries of the group
# have too many owners, the number of these.
ACK: Final = Script(
    "ack",
    _OWNED
    + _UNDISPUTED
    + f"local together = {TOGETHER}"
    + """
local key, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local is_retry_stream = key:sub(1, 7) == 'anybus:'
local count = #ARGV - 5
local ids, refused = {}, {}

local function place(id)
  local ms, seq = id:match('^(%d+)%-?(%d*)$')
  return tonumber(ms) or 0, tonumber(seq) or 0
end

-- Which ids are above the last one that the group has delivered. Nil: unknown.
local function undelivered()
  for _, values in ipairs(redis.pcall('XINFO', 'GROUPS', key)) do
    local info = {}
    for i = 1, #values, 2 do info[values[i]] = values[i + 1] end
    if info['name'] == group then
      local last_ms, last_seq = place(info['last-delivered-id'])
      local found = {}
      for i = 6, #ARGV do
        local ms, seq = place(ARGV[i])
        found[ARGV[i]] = ms > last_ms or (ms == last_ms and seq > last_seq)
      end
      return found
    end
  end
end

if count >= together and ARGV[5] ~= '' and are_undisputed(key, group, consumer) then
  if is_retry_stream then redis.call('XDEL', key, '0-0') end
  local acked = redis.pcall('XACK', key, group, unpack(ARGV, 6))
  if acked == count then
    if is_retry_stream then redis.call('XDEL', key, unpack(ARGV, 6)) end
    return refused
  end
  if type(acked) == 'number' then
    local above = undelivered()
    for i = 6, #ARGV do
      if above and above[ARGV[i]] then refused[#refused + 1] = ARGV[i] else ids[#ids + 1] = ARGV[i] end
    end
    if is_retry_stream and above and #ids > 0 then redis.call('XDEL', key, unpack(ids)) end
    return refused
  end
  -- An error, and nothing was acknowledged: one of the ids is none.
end

local mine = owned(key, group, consumer, ARGV[3], ARGV[4], count + 32)
for i = 6, #ARGV do
  if mine[ARGV[i]] then ids[#ids + 1] = ARGV[i] else refused[#refused + 1] = ARGV[i] end
end
if #ids > 0 then
  if is_retry_stream then redis.call('XDEL', key, '0-0') end
  redis.call('XACK', key, group, unpack(ids))
  if is_retry_stream then redis.call('XDEL', key, unpack(ids)) end
end
if crowd then refused[#refused + 1] = crowd end
return refused
""",
)

RENEW: Final = Script(
    "renew",
    _OWNED
    + """
local mine = owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], #ARGV + 32)
local ids = {}
for i = 6, #ARGV do
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
    + NOTE_LOSS
    + NOTE_WAITING
    + """
local parking = 'anybus:returned'
local mine = owned(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], #ARGV + 32)
local released = 0
for i = 6, #ARGV do
  local count = mine[ARGV[i]]
  if count then
    local before = math.max(count - 1, 0)
    redis.call('XCLAIM', KEYS[1], ARGV[1], parking, 0, ARGV[i], 'TIME', 0, 'RETRYCOUNT', before, 'JUSTID')
    note_loss(ARGV[5], ARGV[2], ARGV[i], ARGV[i])
    released = released + 1
  end
end
if released > 0 then note_waiting(KEYS[2]) end
return released
""",
    partly=True,
)

ALL: Final = (ACK, RENEW, RELEASE)
