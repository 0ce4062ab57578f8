"""The scripts for retention: declaring it, and trimming in small steps.

Retention is a hash beside the topic: ``version``, ``policy``, ``length``, ``age`` (ms), ``origin`` (``declared`` or
``default``). Trimming adds: ``by`` and ``until`` (who trims, and until when others leave the topic alone), ``trimmed``
(all entries below this id are gone), ``lost:<group>`` (how many entries were removed that the group had not
acknowledged), ``gone:<group>`` (since when a group whose floor is kept is missing).

A full server refuses commands that need memory, unless the script has written before. So the scripts trim first, and
note afterwards.
"""

from __future__ import annotations

from typing import Final

from ._scripts import FAILED, Script

VERSION: Final = 1

MOST_REMOVED: Final = 10_000
"""How many entries one call removes at most."""

MOST_BYTES: Final = 60_000_000
"""How many bytes one call removes, about."""

MOST_LOOKS: Final = 2000
"""After so many groups, one call looks at no other stream."""

MOST_COUNTED: Final = 4000
"""How many pending entries one call counts at most, of all groups together."""

LEASE: Final = 2000
"""For how many ms others leave a topic alone after one step that removed something."""

GRACE: Final = 600_000
"""For how many ms a group that has vanished still counts. Its running members recreate it at its floor."""

_GROUPS: Final = """
local function groups_of(stream)
  local reply = redis.pcall('XINFO', 'GROUPS', stream)
  local failure = failed(reply)
  if failure and not failure:find('no such key', 1, true) then error({err = failure}) end
  local groups = {}
  for _, values in ipairs(failure and {} or reply) do
    local info = {}
    for i = 1, #values, 2 do info[values[i]] = values[i + 1] end
    groups[#groups + 1] = {name = info['name'], last = info['last-delivered-id']}
  end
  return groups
end
"""

# KEYS: the stream, its retention. ARGV: mode, policy, length, age in ms. Replies with what is stored now: policy,
# length, age; or, if a work queue cannot be declared, with the names of the stream's groups.
DECLARE: Final = Script(
    "declare",
    FAILED
    + _GROUPS
    + f"local version = '{VERSION}'"
    + """
local mode, policy, length, age = unpack(ARGV)
local kept = {}
for i, name in ipairs({'version', 'policy', 'length', 'age', 'origin'}) do
  kept[i] = redis.call('HGET', KEYS[2], name) or ''
end
if kept[1] ~= '' and kept[1] ~= version then
  return redis.error_reply('ERR the retention of ' .. KEYS[1] .. ' has the unknown version ' .. kept[1])
end
local same = kept[2] == policy and kept[3] == length and kept[4] == age
local fixed = kept[2] ~= '' and (mode == 'default' or (mode == 'declare' and kept[5] == 'declared'))
if fixed and not same then return {'stored', kept[2], kept[3], kept[4]} end
if same and (mode == 'default' or kept[5] == 'declared') then return {'stored', policy, length, age} end
if policy == 'work-queue' then
  local groups = groups_of(KEYS[1])
  if #groups > 1 then
    local names = {}
    for i, group in ipairs(groups) do names[i] = group.name end
    table.sort(names)
    return {'several', unpack(names, 1, math.min(#names, 100))}
  end
end
local origin = mode == 'default' and 'default' or 'declared'
redis.pcall('HDEL', KEYS[2], '')  -- a full server refuses the next command unless something was written before
redis.call('HSET', KEYS[2], 'version', version, 'policy', policy, 'length', length, 'age', age, 'origin', origin)
return {'stored', policy, length, age}
""",
)

# KEYS: the stream, its retention. ARGV: the group, and 1 if it was created just now. Replies with the name of the group
# to which the work queue belongs, if that is another one. If the retention cannot be read, every group is admitted.
ADMIT: Final = Script(
    "admit",
    FAILED
    + _GROUPS
    + """
local policy = redis.pcall('HGET', KEYS[2], 'policy')
if policy ~= 'work-queue' then return false end
for _, group in ipairs(groups_of(KEYS[1])) do
  if group.name ~= ARGV[1] then
    if ARGV[2] == '1' then redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1]) end
    return group.name
  end
end
return false
""",
)

# Ids are compared as texts, because their parts may be too large for a number.
_IDS: Final = """
local function is_below(a, b)
  local a_ms, a_seq = a:match('^(%d+)%-(%d+)$')
  local b_ms, b_seq = b:match('^(%d+)%-(%d+)$')
  if a_ms == b_ms then a_ms, b_ms = a_seq, b_seq end
  if #a_ms ~= #b_ms then return #a_ms < #b_ms end
  return a_ms < b_ms
end
local function after(id)
  local ms, seq = id:match('^(%d+)%-(%d+)$')
  if #seq > 15 then return id end
  return ms .. '-' .. string.format('%.0f', seq + 1)
end
"""

# `clear` removes entries below an id, at most so many; `drop` removes the first so many. Whole nodes of the stream go
# at once. What is below the id in the node that has the id is counted first, and then removed by the length. To free
# large entries takes the server long (0.05 ms for each MB), so after some of them, the size of those that come next is
# looked at. `spare` is how many bytes may still be removed in this call.
_CLEAR: Final = (
    f"local spare = {MOST_BYTES}"
    """
local function weigh(entries, count)
  local bytes = 0
  for _, entry in ipairs(entries) do
    for i = 2, #entry[2], 2 do bytes = bytes + #entry[2][i] end
  end
  local size = math.max(bytes / math.max(#entries, 1), 1)
  spare = spare - size * count
  return math.max(10, math.min(2000, math.floor(1000000 / size)))
end
local function clear(stream, id, most)
  local removed, chunk = 0, 10
  while removed < most and spare > 0 do
    local asked = math.min(chunk, most - removed)
    local count = redis.call('XTRIM', stream, 'MINID', '~', id, 'LIMIT', asked)
    local next_ones
    if count == 0 then
      asked = math.min(asked, 100)
      next_ones = redis.call('XRANGE', stream, '-', '(' .. id, 'COUNT', asked)
      count = #next_ones
      if count > 0 then redis.call('XTRIM', stream, 'MAXLEN', redis.call('XLEN', stream) - count) end
      if count < asked then return removed + count end
    else
      next_ones = redis.call('XRANGE', stream, '-', '(' .. id, 'COUNT', 1)
      if #next_ones == 0 then return removed + count end
    end
    chunk = weigh(next_ones, count)
    removed = removed + count
  end
  return removed
end
local function drop(stream, most)
  local removed, chunk = 0, 10
  while removed < most and spare > 0 do
    local count = math.min(chunk, most - removed)
    redis.call('XTRIM', stream, 'MAXLEN', redis.call('XLEN', stream) - count)
    chunk = weigh(redis.call('XRANGE', stream, '-', '+', 'COUNT', 1), count)
    removed = removed + count
  end
  return removed
end
"""
)

# Limits. The last delivered ids of the groups divide the stream: what is between two of them was not delivered to the
# same groups. So the entries of each part are removed together, and their number is the loss of these groups. Pending
# entries are counted afterwards, from the id below which everything had been removed before.
_LIMIT: Final = (
    f"local most_counted = {MOST_COUNTED}"
    """
local function limit(stream, kept, groups, now, budget)
  local length = redis.call('XLEN', stream)
  local over = kept.length ~= '' and length - tonumber(kept.length) or 0
  local oldest = kept.age ~= '' and now > tonumber(kept.age) and string.format('%.0f-0', now - tonumber(kept.age))
  if length == 0 or (over <= 0 and not oldest) then return 0, {}, false end
  if #groups > 0 then budget = math.min(budget, math.max(100, math.floor(most_counted / #groups))) end
  table.sort(groups, function(a, b) return is_below(a.last, b.last) end)
  local removed, lost = 0, {}
  for part = 1, #groups + 1 do
    local bound = groups[part] and after(groups[part].last)
    local count = 0
    if oldest and removed < budget then
      count = clear(stream, bound and is_below(bound, oldest) and bound or oldest, budget - removed)
    end
    local most = math.min(over - count, budget - removed - count)
    if most > 0 then
      count = count + (bound and clear(stream, bound, most) or drop(stream, most))
    end
    for i = 1, part - 1 do lost[groups[i].name] = (lost[groups[i].name] or 0) + count end
    removed, over = removed + count, over - count
  end
  if removed > 0 and #groups > 0 then
    local first = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if first then
      first = first[1]
    else
      local values = redis.call('XINFO', 'STREAM', stream)
      for i = 1, #values, 2 do
        if values[i] == 'last-generated-id' then first = after(values[i + 1]) end
      end
    end
    for _, group in ipairs(groups) do
      local from = kept.trimmed or '-'
      local pending = redis.call('XPENDING', stream, group.name, from, '(' .. first, 2 * most_counted)
      lost[group.name] = (lost[group.name] or 0) + #pending
    end
    kept.trimmed = first
  end
  return removed, lost, removed >= budget or (spare <= 0 and removed > 0)
end
"""
)

# Interest: removes what all groups have acknowledged. A group that is missing counts for a while, if its floor is kept.
_ACKNOWLEDGED: Final = (
    f"local grace = {GRACE}"
    """
local function acknowledged(stream, retention, meta, kept, groups, now)
  local holder, position
  local function needs(name, id)
    if not position or is_below(id, position) then holder, position = name, id end
  end
  local there = {}
  for _, group in ipairs(groups) do
    there[group.name] = true
    local lowest = redis.call('XPENDING', stream, group.name, '-', '+', 1)[1]
    needs(group.name, lowest and lowest[1] or after(group.last))
    if kept['gone:' .. group.name] then redis.call('HDEL', retention, 'gone:' .. group.name) end
  end
  local floors = #groups > 0 and redis.call('HGETALL', meta) or {}
  for i = 1, #floors, 2 do
    local name, floor = floors[i], floors[i + 1]
    local id = floor:match('%d+%-%d+$')
    if not there[name] and id then
      local since = tonumber(kept['gone:' .. name])
      if not since or since > now then
        since = now
        redis.pcall('HSET', retention, 'gone:' .. name, string.format('%.0f', now))
      end
      if now - since < grace then needs(name, floor:sub(1, 7) == 'before ' and id or after(id)) end
    end
  end
  return holder, position
end
"""
)

# KEYS: for each stream three: the stream, its retention, the floors of its groups. ARGV: the trimmer. Replies for each
# stream: policy ('' = none is declared), length, age; entries, removed, more, busy, groups, holder, position; the
# losses of this step, and all losses (names and numbers). If anything fails: 'error' and the text.
TRIM: Final = Script(
    "trim",
    FAILED
    + _GROUPS
    + _IDS
    + _CLEAR
    + _LIMIT
    + _ACKNOWLEDGED
    + f"local version, left, looks, lease = '{VERSION}', {MOST_REMOVED}, {MOST_LOOKS}, {LEASE}"
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function flat(counts)
  local values = {}
  for name, count in pairs(counts) do
    if count > 0 then
      values[#values + 1] = name
      values[#values + 1] = count
    end
  end
  return values
end
local function trim(stream, retention, meta)
  if redis.call('EXISTS', retention) == 0 then return {'', '', '', redis.call('XLEN', stream)} end
  local values, kept, totals = redis.call('HGETALL', retention), {}, {}
  for i = 1, #values, 2 do
    kept[values[i]] = values[i + 1]
    local group = values[i]:match('^lost:(.*)$')
    if group then totals[group] = tonumber(values[i + 1]) end
  end
  if kept.version ~= version then
    error({err = 'ERR the retention of ' .. stream .. ' has the unknown version ' .. tostring(kept.version)})
  end
  local removed, lost, more, busy, groups, holder, position = 0, {}, false, false, {}, nil, nil
  local until_ms = tonumber(kept['until'])
  if kept.by ~= ARGV[1] and until_ms and until_ms > now and until_ms <= now + lease then
    busy = true
  elseif left <= 0 or spare <= 0 or looks <= 0 then
    more = true
  else
    groups = groups_of(stream)
    looks = looks - #groups
    if kept.policy == 'limits' then
      removed, lost, more = limit(stream, kept, groups, now, left)
    else
      holder, position = acknowledged(stream, retention, meta, kept, groups, now)
      if position then
        removed = clear(stream, position, left)
        more = removed >= left or (spare <= 0 and removed > 0)
      end
    end
    left = left - removed
  end
  if removed > 0 then
    local note = {'HSET', retention, 'by', ARGV[1], 'until', string.format('%.0f', now + lease)}
    if kept.trimmed then
      note[#note + 1] = 'trimmed'
      note[#note + 1] = kept.trimmed
    end
    for name, count in pairs(lost) do
      if count > 0 then
        totals[name] = (totals[name] or 0) + count
        note[#note + 1] = 'lost:' .. name
        note[#note + 1] = string.format('%.0f', totals[name])
      end
    end
    redis.call(unpack(note))
  end
  return {
    kept.policy, kept.length, kept.age, redis.call('XLEN', stream), removed, more and 1 or 0, busy and 1 or 0, #groups,
    holder or false, position or false, flat(lost), flat(totals),
  }
end
local results = {}
for i = 1, #KEYS, 3 do
  local known, result = pcall(trim, KEYS[i], KEYS[i + 1], KEYS[i + 2])
  if not known then result = {'error', type(result) == 'table' and result.err or tostring(result)} end
  results[#results + 1] = result
end
return results
""",
    partly=True,
)

ALL: Final = (DECLARE, ADMIT, TRIM)
