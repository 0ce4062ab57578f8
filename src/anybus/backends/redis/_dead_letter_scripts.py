"""The scripts for an operator's work on dead letters. Like all scripts, they append first and delete afterwards."""

from __future__ import annotations

from typing import Final

from ._scripts import FAILED, MOST_VALUES, Script
from ._taking_scripts import MOST_BYTES

# Reads entries one by one, so that at most one is read in vain. ARGV: start and end (as of XRANGE), the maximum number
# of entries, the maximum bytes in all, the maximum bytes of one entry. Of a larger entry only `message` is returned, if
# that is not too large itself. The other values are nil. The sizes of all fields are returned.
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

# KEYS: the stream, then every target stream. ARGV: the number of moves; for each: id, the index of its key, the number
# of fields (0 = the entry's own raw fields), the fields.
# If the moves together have too many bytes for one call, there are results only for the first of them, at least one.
# 'many': the entry has more fields than a script can append; then it is the last result. 'half': the entry could not be
# deleted, and what was appended could not be taken back.
MOVE: Final = Script(
    "move",
    FAILED
    + f"""
local results, at, bytes = {{}}, 2, 0
for move = 1, tonumber(ARGV[1]) do
  if bytes >= {MOST_BYTES} then break end
  local id, key, fields = ARGV[at], KEYS[tonumber(ARGV[at + 1])], tonumber(ARGV[at + 2])
  at = at + 3
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not entry then
    results[move] = {{'gone'}}
  else
    local command = {{'XADD', key, '*'}}
    for i = 0, fields - 1 do
      command[#command + 1] = ARGV[at + i]
      bytes = bytes + #ARGV[at + i]
    end
    for i = 1, #entry[2], 2 do
      bytes = bytes + #entry[2][i] + #entry[2][i + 1]
      if fields == 0 and entry[2][i]:sub(1, 4) == 'raw:' then
        command[#command + 1] = entry[2][i]:sub(5)
        command[#command + 1] = entry[2][i + 1]
      end
    end
    if #command == 3 then
      results[move] = {{'error', 'ERR the entry has no raw fields'}}
    elseif #command > {MOST_VALUES} then
      results[move] = {{'many'}}
      break
    else
      local added = redis.pcall(unpack(command))
      if failed(added) then
        results[move] = {{'error', added.err}}
      else
        local removed = redis.pcall('XDEL', KEYS[1], id)
        if not failed(removed) then
          results[move] = {{'done', added}}
        elseif failed(redis.pcall('XDEL', key, added)) then
          results[move] = {{'half', removed.err}}
        else
          results[move] = {{'error', removed.err}}
        end
      end
    end
  end
  at = at + fields
end
return results
""",
)

# The second step of a move with too many fields for a script. KEYS: the stream, the target stream. ARGV: the entry's
# id, the id of what was appended.
REMOVE_MOVED: Final = Script(
    "remove moved",
    FAILED
    + """
local removed = redis.pcall('XDEL', KEYS[1], ARGV[1])
if removed == 1 then return {'done', ARGV[2]} end
local left = failed(redis.pcall('XDEL', KEYS[2], ARGV[2]))
if left then return {'half', failed(removed) or left} end
if failed(removed) then return {'error', removed.err} end
return {'gone'}
""",
)

ALL: Final = (PAGE, LAST, MOVE, REMOVE_MOVED)
