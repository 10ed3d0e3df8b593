"""What a launch of ``gemm.cu`` does: which form of the kernel, which tiles. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from math import ceil, gcd

from blockscale.formats import DType

# Shared memory that one block may have on SM90 (227 KB), and each of two on one multiprocessor.
SHARED_BYTES = 232_448
HALF_SHARED_BYTES = 115_200
# Full and empty barriers of a slot, and its two weight scales.
SLOT_EXTRA_BYTES = 24
MAX_STAGES = 12
# Masked groups that one launch may have, and what shared memory holds of each.
MAX_GROUPS, GROUP_BYTES = 512, 4

K_BLOCK = 128
SCALE_BLOCK = 128
WAVE_ROWS = 64
WARP_ROWS = 16
WARPS = 4
WARP = 32
SCALE_BYTES = 4
# A row of codes in a slot, and the widest swizzle.
ROW_BYTES = 128
# Of a swizzle's pattern.
SWIZZLE_ROWS = 8
# What a lane stores at a time.
LANE_BYTES = 16
# Rows of a group of dealt ones (``Box``) that lie in order: each quarter has one turn.
IN_ORDER = 8
# Widths that gemm.cu has wgmmas for: no tile meets more than two weight scales.
WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192)
# Two waves of more columns than these would not leave room for their results in registers.
MAX_COLUMNS = {64: 192, 128: 192, 256: 128}
OUTPUTS = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)


class Share(IntEnum):
    """What the two blocks of a cluster copy for each other."""

    NOTHING = 0
    ACTIVATION = 1
    WEIGHT = 2


class Grouping(IntEnum):
    """Whose rows they are."""

    NOTHING = 0
    CONTIGUOUS = 1
    MASKED = 2


class When(IntEnum):
    """When a tile's results are written: at its end, or while the next one's first waves run."""

    AT_ONCE = 0
    LATE = 1


@dataclass(frozen=True, slots=True)
class Box:
    """What one TMA copy moves: rows x columns of elements; ``swizzle`` in bytes, 0 for none.

    ``dealt``: rows of a group whose quarters take turns in shared memory, two rows each
    (``driver.encode``).
    """

    rows: int
    columns: int
    element_bytes: int
    swizzle: int
    dealt: int = IN_ORDER


@dataclass(frozen=True, slots=True)
class Stores:
    """How a warp writes its 16 rows of a wave.

    ``box_bytes``: of a row in one store, at most a tile's row; where they do not divide it, the
    last store writes some columns again. ``buffers``: of each warp; without any its lanes write,
    and boxes mean nothing. ``box_rows``: of one store.
    """

    box_bytes: int
    buffers: int
    box_rows: int = WARP_ROWS
    when: When = When.AT_ONCE

    @property
    def shared_bytes(self) -> int:
        """One warp's buffers."""
        return self.buffers * self.box_rows * self.box_bytes

    @property
    def name(self) -> str:
        """``b128r8x3``: bytes and rows, if not 16, of a box, and buffers; or ``lanes``."""
        if self.buffers == 0:
            return "lanes"
        rows = "" if self.box_rows == WARP_ROWS else f"r{self.box_rows}"
        return f"b{self.box_bytes}{rows}x{self.buffers}"


@dataclass(frozen=True, slots=True)
class Form:
    """One compiled form of the kernel.

    ``rows`` x ``columns``: a tile. ``stages``: slots of the ring. ``beside``: blocks that share a
    multiprocessor. ``grouping``: contiguous, a tile of 256 rows is for row blocks of 128, others
    for any multiple. ``flight``: waves of a consumer that run at a time; two where it has one for
    each K block, so that the tensor cores have the next while it promotes.
    """

    rows: int
    columns: int
    stages: int
    share: Share
    out: DType
    stores: Stores
    beside: int
    grouping: Grouping = Grouping.NOTHING
    flight: int = 1

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return min(2, self.rows // WAVE_ROWS)

    @property
    def waves(self) -> int:
        """Waves of 64 rows of each consumer."""
        return self.rows // (self.consumers * WAVE_ROWS)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 1 if self.share is Share.NOTHING else 2

    @property
    def threads(self) -> int:
        """Of a block: the consumers' and the producer's warpgroup."""
        return (self.consumers + 1) * WARPS * WARP

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        staging = self.consumers * WARPS * self.stores.shared_bytes
        table = MAX_GROUPS * GROUP_BYTES if self.grouping is Grouping.MASKED else 0
        return self.stages * slot_bytes(self.rows, self.columns) + staging + table

    @property
    def weight_rows(self) -> int:
        """Of one copy: a tile's, or half of them."""
        return self.columns // (2 if self.share is Share.WEIGHT else 1)

    @property
    def dealt(self) -> int:
        """Weight rows whose quarters take turns in a slot: of so many columns a lane has a quarter.

        Where lanes write, that is 16 bytes, or fewer if copies are no whole groups; elsewhere rows
        lie in order.
        """
        if self.stores.buffers:
            return IN_ORDER
        return gcd(self.weight_rows, 4 * LANE_BYTES // self.out.bytes)

    @property
    def macros(self) -> dict[str, int]:
        """What ``gemm.cu`` is compiled with."""
        return {
            "FORM_ROWS": self.rows,
            "FORM_COLUMNS": self.columns,
            "FORM_STAGES": self.stages,
            "FORM_SHARE": int(self.share),
            "FORM_OUTPUT": OUTPUTS.index(self.out),
            "FORM_BOX_ROWS": self.stores.box_rows,
            "FORM_BOX_BYTES": self.stores.box_bytes,
            "FORM_BUFFERS": self.stores.buffers,
            "FORM_WHEN": int(self.stores.when),
            "FORM_BESIDE": self.beside,
            "FORM_GROUPING": int(self.grouping),
            "FORM_FLIGHT": self.flight,
            "FORM_DEALT": self.dealt,
        }

    @property
    def name(self) -> str:
        """``256x128s4+ab64x3``: tile, slots, what is shared, stores, ``x2`` beside, ``-late``."""
        shared = ("", "+a", "+b")[self.share]
        beside = f"x{self.beside}" if self.beside > 1 else ""
        late = "-late" if self.stores.when is When.LATE else ""
        grouping = "" if self.grouping is Grouping.NOTHING else f"{self.grouping.name.lower()}-"
        tile = f"{self.rows}x{self.columns}s{self.stages}"
        flight = f"w{self.flight}" if self.flight > 1 else ""
        return f"{grouping}{tile}{shared}{self.stores.name}{beside}{late}{flight}"


def slot_bytes(rows: int, columns: int) -> int:
    """Shared memory of one slot, with its barriers."""
    return (rows + columns) * ROW_BYTES + rows * SCALE_BYTES + SLOT_EXTRA_BYTES


def make_form(
    rows: int, columns: int, out: DType, *, share: Share = Share.NOTHING, beside: int = 1,
    stores: Stores | None = None,
) -> Form:  # fmt: skip
    """The form with the deepest ring that fits beside its buffers; ``stores`` if not the usual."""
    stores = stores or usual_stores(rows, columns, out)
    stages = most_stages(rows, columns, stores, beside)
    return Form(rows, columns, stages, share, out, stores, beside)


def most_stages(rows: int, columns: int, stores: Stores, beside: int) -> int:
    """Slots that fit beside the buffers."""
    consumers = min(2, rows // WAVE_ROWS)
    staging = consumers * WARPS * stores.shared_bytes
    room = (SHARED_BYTES if beside == 1 else HALF_SHARED_BYTES) - staging
    return min(MAX_STAGES, room // slot_bytes(rows, columns))


def widest_box(columns: int, out: DType) -> int:
    """Bytes of a row in one store: the widest swizzle that is no wider than a tile's row."""
    return next(width for width in (128, 64, 32) if columns * out.bytes >= width)


def usual_stores(rows: int, columns: int, out: DType) -> Stores:
    """At once, in boxes that divide a row; 4 KB a warp. 256x128 has 4 slots beside 3 KB."""
    if rows * columns == 256 * 128:
        return Stores(64, 3)
    whole = next(width for width in (128, 64, 32) if columns * out.bytes % width == 0)
    return Stores(whole, min(8, 4096 // (WARP_ROWS * whole)))


def with_stores(form: Form, stores: Stores) -> Form:
    """The same tile, written in this way."""
    stages = most_stages(form.rows, form.columns, stores, form.beside)
    return replace(form, stores=stores, stages=stages)


# Copied before the kernel ahead has ended.
EARLY_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Work:
    """A form and its units: what a cluster computes at a time, one tile or two that share rows.

    ``n``: columns of the result, ValueError if they do not fit. ``k``: of both operands. Tiles take
    whole K blocks. ``last_rows``: what is copied of the activation's last tile. ``crowd``: blocks
    that the busiest multiprocessor has at a time.
    """

    form: Form
    n: int
    unit_rows: int
    unit_columns: int
    k: int
    band: int
    blocks: int
    last_rows: int
    crowd: int = 1

    def __post_init__(self) -> None:
        if not fits(self.form, self.n):
            msg = f"{self.form.name} needs N in groups of {self.form.dealt}, not {self.n}"
            raise ValueError(msg)

    @property
    def k_blocks(self) -> int:
        """The last one may lie beyond K."""
        return ceil(self.k / K_BLOCK)

    @property
    def units(self) -> int:
        """All of them."""
        return self.unit_rows * self.unit_columns

    @property
    def turns(self) -> float:
        """Units that a block takes one after the other, the mean."""
        return self.units * self.form.cluster / self.blocks

    @property
    def early_blocks(self) -> int:
        """K blocks whose weights a block copies before the kernel ahead has ended.

        Where all tokens fit into one tile's rows. M of 1 to 64: 1 to 8 % less at K of 512 to 3072
        (H200), 0.5 to 4 % at K of 6144 and more (H100, 2026-11-26, perf-log G29 and G39).
        """
        form = self.form
        if self.unit_rows > 1 or form.share is not Share.NOTHING:
            return 0
        if form.grouping is not Grouping.NOTHING:
            return 0
        return EARLY_BLOCKS

    @property
    def boxes(self) -> tuple[Box, Box, Box, Box, Box, Box]:
        """Codes of the activation, of its last tile, of the weight; both tiles' scales; results."""
        form = self.form
        shared = 2 if form.share is Share.ACTIVATION else 1
        element, stores = form.out.bytes, form.stores
        return (
            Box(form.rows // shared, K_BLOCK, 1, ROW_BYTES),
            Box(self.last_rows // shared, K_BLOCK, 1, ROW_BYTES),
            Box(form.weight_rows, K_BLOCK, 1, ROW_BYTES, form.dealt),
            Box(1, form.rows, SCALE_BYTES, 0),
            Box(1, self.last_rows, SCALE_BYTES, 0),
            Box(stores.box_rows, stores.box_bytes // element, element, stores.box_bytes),
        )

    @property
    def name(self) -> str:
        """The form's, and the height of a band."""
        return f"{self.form.name} /{self.band}"


def make_work(
    form: Form, m: int, n: int, k: int, processors: int, *, band: int | None = None
) -> Work:
    """The units of (m, n, k), all at least 1; ``band``: rows of units, about square by itself."""
    row_tiles, column_tiles = ceil(m / form.rows), ceil(n / form.columns)
    unit_rows = ceil(row_tiles / (2 if form.share is Share.WEIGHT else 1))
    unit_columns = ceil(column_tiles / (2 if form.share is Share.ACTIVATION else 1))
    clusters = processors * form.beside // form.cluster
    if band is None:
        band = square_band(form, clusters)
    band = max(1, min(band, unit_rows))
    blocks = min(clusters, unit_rows * unit_columns) * form.cluster
    return Work(
        form,
        n,
        unit_rows,
        unit_columns,
        k,
        band,
        blocks,
        last_rows=last_rows(form, m),
        crowd=ceil(blocks / processors),
    )


def fits(form: Form, n: int) -> bool:
    """Whether ``n`` columns of a result are whole groups of dealt rows."""
    return form.dealt == IN_ORDER or n % form.dealt == 0


def last_rows(form: Form, m: int) -> int:
    """Of the last tile's rows those that exist, in whole patterns of the swizzle.

    TMA takes its time for rows beyond M too, which it fills with zeros: 64x32 took 17.1 us for 8
    tokens where it took 13.3 for 64 (N 4096, K 7168, H100, 2026-11-26), and for their scales: one
    token took 24 % more with a box of 64 scales than with 8 (H200, 2026-11-26). Blocks that copy
    halves for each other copy all; so do tiles of row blocks, which start anywhere.
    """
    if form.share is Share.ACTIVATION or form.grouping is Grouping.CONTIGUOUS:
        return form.rows
    rest = m - (ceil(m / form.rows) - 1) * form.rows
    return ceil(rest / SWIZZLE_ROWS) * SWIZZLE_ROWS


def unit_height(form: Form) -> int:
    """Rows of a unit: of a tile, or of two."""
    return form.rows * (2 if form.share is Share.WEIGHT else 1)


def square_band(form: Form, clusters: int) -> int:
    """Rows of units such that what runs at a time reads as many rows of A as of B."""
    height = unit_height(form)
    width = form.columns * (2 if form.share is Share.ACTIVATION else 1)
    return max(1, round((clusters * width / height) ** 0.5))


def aligned_scale_stride(m: int) -> int:
    """From one K block's activation scales to the next, in elements: TMA wants 16 bytes."""
    return (m + 3) // 4 * 4
