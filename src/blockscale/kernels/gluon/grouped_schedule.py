"""Device code: which tile of which group comes next, found by one warp and told to the others.

Row counts lie on the GPU. The producer warp reads them, finds its program's items and posts each
in a mailbox in shared memory; consumers read what to do from there, so that no register of theirs
holds a schedule.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from blockscale.kernels.gluon.schedule import next_slot

# Messages that may wait, and the integers of one: the four below, rounded up.
DEPTH = gl.constexpr(4)
FIELDS = gl.constexpr(8)
ROWS = gl.constexpr(0)
SLOT = gl.constexpr(1)
ROW = gl.constexpr(2)
COLUMN = gl.constexpr(3)
WARP = gl.constexpr(32)
# Row blocks that ``count_blocks`` looks at in one step.
AT_ONCE = gl.constexpr(128)


@gluon.jit
def allocate_mailbox(READERS: gl.constexpr):
    """Messages, and the barriers that say that one was posted, and read by all ``READERS``."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    messages = gl.allocate_shared_memory(gl.int32, [DEPTH, FIELDS], PLAIN)
    posted = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(DEPTH):
        mbarrier.init(posted.index(place), count=1)
        mbarrier.init(read.index(place), count=READERS)
    return messages, posted, read


@gluon.jit
def post(mailbox, place, phase, rows, slot, row, column):
    """Producer warp: tell all readers. ``rows`` that count from ``row`` on; 0 ends the work."""
    ONE_WARP: gl.constexpr = gl.BlockedLayout([1], [WARP], [1], [0])
    messages, posted, read = mailbox
    mbarrier.wait(read.index(place), phase)
    field = gl.arange(0, FIELDS, layout=ONE_WARP)
    later = gl.where(field == ROW, row, column)
    message = gl.where(field == ROWS, rows, gl.where(field == SLOT, slot, later))
    messages.index(place).store(message.to(gl.int32))
    mbarrier.arrive(posted.index(place), count=1)
    return next_slot(place, phase, DEPTH)


@gluon.jit
def receive(mailbox, place, phase, WARPS: gl.constexpr):
    """A reader: (rows, slot, row, column) of the next item, and the place after it."""
    # Every thread holds the whole message: nothing to exchange.
    EACH: gl.constexpr = gl.BlockedLayout([FIELDS], [WARP], [WARPS], [0])
    messages, posted, read = mailbox
    mbarrier.wait(posted.index(place), phase)
    message = messages.index(place).load(EACH)
    mbarrier.arrive(read.index(place), count=1)
    field = gl.arange(0, FIELDS, layout=EACH)
    rows = gl.sum(gl.where(field == ROWS, message, 0), 0)
    slot = gl.sum(gl.where(field == SLOT, message, 0), 0)
    row = gl.sum(gl.where(field == ROW, message, 0), 0)
    column = gl.sum(gl.where(field == COLUMN, message, 0), 0)
    place, phase = next_slot(place, phase, DEPTH)
    return rows, slot, row, column, place, phase


@gluon.jit
def _add(one, other):
    return one + other


@gluon.jit
def read_counts(counts, groups, slot_rows, GROUPS: gl.constexpr):
    """The rows of each group, between 0 and ``slot_rows``, in one warp; 0 from ``groups`` on."""
    EACH: gl.constexpr = max(1, GROUPS // WARP)
    ONE_WARP: gl.constexpr = gl.BlockedLayout([EACH], [WARP], [1], [0])
    group = gl.arange(0, GROUPS, layout=ONE_WARP)
    rows = gl.load(counts + group, mask=group < groups, other=0)
    return gl.minimum(gl.maximum(rows, 0), slot_rows)


@gluon.jit
def item_ends(rows, columns, TILE_ROWS: gl.constexpr):
    """For each group, the items of it and of all before it; ``columns`` for every TILE_ROWS."""
    return gl.associative_scan((rows + (TILE_ROWS - 1)) // TILE_ROWS * columns, 0, _add)


@gluon.jit
def find_item(item, ends, rows, GROUPS: gl.constexpr):
    """Group of an item, the item's number within the group, and the group's rows."""
    EACH: gl.constexpr = max(1, GROUPS // WARP)
    ONE_WARP: gl.constexpr = gl.BlockedLayout([EACH], [WARP], [1], [0])
    is_before = ends <= item
    group = gl.sum(gl.where(is_before, 1, 0), 0)
    first = gl.max(gl.where(is_before, ends, 0), 0)
    number = gl.arange(0, GROUPS, layout=ONE_WARP)
    own = gl.sum(gl.where(number == group, rows, 0), 0)
    return group, item - first, own


@gluon.jit
def count_blocks(block_groups, blocks):
    """How many row blocks there are up to the last one that belongs to a group, for one warp."""
    ONE_WARP: gl.constexpr = gl.BlockedLayout([AT_ONCE // WARP], [WARP], [1], [0])
    offset = gl.arange(0, AT_ONCE, layout=ONE_WARP)
    found = gl.full((AT_ONCE,), 0, gl.int32, ONE_WARP)
    for start in range(0, blocks, AT_ONCE):
        block = start + offset
        group = gl.load(block_groups + block, mask=block < blocks, other=-1)
        found = gl.where(group >= 0, block + 1, found)
    return gl.max(found, 0)
