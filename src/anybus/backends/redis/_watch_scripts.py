"""The scripts that watch quiet groups: whether a pass would find something, and which members run.

They cost the server little: one ``EXISTS`` asks about hundreds of groups, several times a second. The rest is
asked group by group, every few seconds.
"""

from __future__ import annotations

from typing import Final

from ._lease_scripts import AGREE_LEASE
from ._scripts import FAILED, Script

# For each group three keys: the delayed sets of its topic and of its retry stream, and the key that exists while
# entries wait for a pass (see `note_waiting`). Replies with the indexes, from 1, of the groups for which a pass would
# find something now; and with pairs: the index of a group on whose topic something is due within ARGV[1] ms, and in how
# many ms. Most groups have none of these keys, so halves that have none are not looked at further.
LOOK: Final = Script(
    "look",
    FAILED
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found, soon = {}, {}
local function is_due(delayed, topic)
  local first = redis.pcall('ZRANGE', delayed, 0, 0, 'WITHSCORES')
  if failed(first) then return true end
  if not first[1] then return false end
  local wait = math.ceil(first[2] - now)
  if topic and wait <= tonumber(ARGV[1]) then soon[#soon + 1] = {topic, math.max(0, wait)} end
  return wait <= 0
end
local function search(from, to)
  if redis.call('EXISTS', unpack(KEYS, 3 * from - 2, 3 * to)) == 0 then return end
  if from < to then
    local middle = math.floor((from + to) / 2)
    search(from, middle)
    search(middle + 1, to)
  else
    local topic_is_due, retries_are_due = is_due(KEYS[3 * from - 2], from), is_due(KEYS[3 * from - 1])
    if redis.call('EXISTS', KEYS[3 * from]) == 1 or topic_is_due or retries_are_due then found[#found + 1] = from end
  end
end
search(1, #KEYS / 3)
return {found, soon}
""",
)

# KEYS: for each member the key of its group's lease, the topic, and the retry stream. ARGV: for each member its group,
# its name, its lease in seconds ('' = it does not mark itself as running), and for how many ms it counts as running.
# Replies for each member: the lease that the running members use ('' = unknown), and for both streams: how many entries
# are pending, the last delivered id, and (for the retry stream) how many are unread. If anything fails: only the error.
CHECK: Final = Script(
    "check",
    FAILED
    + AGREE_LEASE
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function state(stream, name)
  for _, values in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info = {}
    for i = 1, #values, 2 do info[values[i]] = values[i + 1] end
    if info['name'] == name then return info['pending'], info['last-delivered-id'] end
  end
  error({err = 'NOGROUP no group ' .. name .. ' in ' .. stream})
end
local function check(member)
  local key, topic, retries = KEYS[3 * member - 2], KEYS[3 * member - 1], KEYS[3 * member]
  local group, consumer, lease, alive = unpack(ARGV, 4 * member - 3, 4 * member)
  local kept = ''
  if lease ~= '' then kept = agree(key, now, consumer, lease, alive, 'stay') end
  local pending, last = state(topic, group)
  local retrying, last_retry = state(retries, group)
  local unread = math.max(redis.call('XLEN', retries) - retrying, 0)
  return {kept, pending, last, retrying, last_retry, unread}
end
local results = {}
for member = 1, #KEYS / 3 do
  local known, result = pcall(check, member)
  if not known then result = {type(result) == 'table' and result.err or tostring(result)} end
  results[member] = result
end
return results
""",
    partly=True,
)

ALL: Final = (LOOK, CHECK)
