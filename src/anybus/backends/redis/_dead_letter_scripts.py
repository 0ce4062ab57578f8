"""The scripts behind an operator's work on dead letters. Like all of them: append first, delete after it."""

from __future__ import annotations

from typing import Final

from ._scripts import Script

# One entry after another, so that never more than one is held beyond what is handed out. ARGV: from where, to where
# (as of XRANGE), at most so many, so many bytes together, so many bytes in one entry. Of an entry that is larger only
# `message` comes along, if that is not; the others' values are nil, and their sizes are told.
PAGE: Final = Script(
    "page",
    """
local from, count = ARGV[1], tonumber(ARGV[3])
local left, most = tonumber(ARGV[4]), tonumber(ARGV[5])
local found = {}
while #found < count do
  local entry = redis.call('XRANGE', KEYS[1], from, ARGV[2], 'COUNT', 1)[1]
  if not entry then break end
  local fields, sizes, size = entry[2], {}, 0
  for i = 2, #fields, 2 do
    sizes[#sizes + 1] = #fields[i]
    size = size + #fields[i - 1] + #fields[i]
  end
  left = left - size
  if left < 0 and #found > 0 then break end
  if size > most then
    for i = 2, #fields, 2 do
      if fields[i - 1] ~= 'message' or #fields[i] > most then fields[i] = false end
    end
  end
  found[#found + 1] = {entry[1], fields, sizes}
  from = '(' .. entry[1]
end
return found
""",
)

LAST: Final = Script("last", "return (redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1] or {false})[1]\n")

# KEYS: the stream, then every stream that something is appended to. ARGV: the number of moves; of each: id, the index
# of its key, the number of fields (0 = the entry's own raw fields), the fields.
MOVE: Final = Script(
    "move",
    """
local results, at = {}, 2
for move = 1, tonumber(ARGV[1]) do
  local id, key, fields = ARGV[at], KEYS[tonumber(ARGV[at + 1])], tonumber(ARGV[at + 2])
  at = at + 3
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not entry then
    results[move] = {'gone'}
  else
    local command = {'XADD', key, '*'}
    for i = 0, fields - 1 do command[#command + 1] = ARGV[at + i] end
    if fields == 0 then
      for i = 1, #entry[2], 2 do
        if entry[2][i]:sub(1, 4) == 'raw:' then
          command[#command + 1] = entry[2][i]:sub(5)
          command[#command + 1] = entry[2][i + 1]
        end
      end
    end
    local reply
    if #command == 3 then
      reply = {err = 'ERR the entry has no raw fields'}
    elseif #command > 7000 then
      reply = {err = 'ERR the entry has too many fields'}
    else
      reply = redis.pcall(unpack(command))
    end
    if type(reply) == 'table' and reply.err then
      results[move] = {'error', reply.err}
    else
      redis.call('XDEL', KEYS[1], id)
      results[move] = {'done', reply}
    end
  end
  at = at + fields
end
return results
""",
)

ALL: Final = (PAGE, LAST, MOVE)
