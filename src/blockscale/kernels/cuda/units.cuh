// Which tiles a block computes, in which order: those of one matrix, or of the rows of groups
// (experts). Which rows belong to which group lies in GPU memory. Every warp reads it for itself:
// all of them, and both blocks of a cluster, come to the same tiles in the same order, so that no
// message passes between them and no count of slots can differ.
//
// Included by gemm.cu, behind the form's constants and Problem.
#pragma once

// A block's tile: its first row and column, the group whose weight it takes, the slot whose rows, and
// the first row that is not to be written. `is_common`: the other block of the cluster takes the same
// group's weight.
struct Place {
    int row;
    int column;
    int group;
    int slot;
    int end;
    bool is_common;
};

// A consumer's rows of a tile: the first, and how many waves hold any.
struct OwnRows {
    int first;
    int waves;
};

// Rows of a unit: of a tile, or of two that share columns of the weight.
constexpr int UNIT_ROWS = SHARE == Share::WEIGHT ? 2 * ROWS : ROWS;

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Units that run at the same time share rows of A and columns of B in L2.
DEVICE Place place_of(const Problem& problem, int unit_rows, int unit) {
    const int band_units = problem.unit_columns * problem.band;
    // Few tokens need no division; each takes some 100 clocks.
    const int band = unit < band_units ? 0 : unit / band_units;
    const int rows = smaller(unit_rows - band * problem.band, problem.band);
    const int inside = unit - band * band_units;
    int column = rows > 1 ? inside / rows : inside;
    int row = band * problem.band + inside - column * rows;
    const int rank = block_index() % CLUSTER;
    if (SHARE == Share::ACTIVATION) column = 2 * column + rank;
    if (SHARE == Share::WEIGHT) row = 2 * row + rank;
    return {row * ROWS, column * COLUMNS, 0, 0, problem.m, true};
}

// What every walker starts from: rows of units, and of one matrix this block's first tile.
struct Start {
    int unit_rows;
    Place first;
};

// Walks the units of this block's cluster; all lanes of a warp, or of one matrix also a lane alone.
template <Grouping GROUPED>
struct UnitsOf;

template <>
struct UnitsOf<Grouping::NOTHING> {
    const Problem& problem;
    int unit = block_index() / CLUSTER;
    Place found;

    DEVICE UnitsOf(const Problem& given, const Start& start) : problem(given), found(start.first) {}
    DEVICE bool are_left() const { return unit < problem.unit_rows * problem.unit_columns; }
    DEVICE void advance() {
        unit += grid_size() / CLUSTER;
        found = place_of(problem, problem.unit_rows, unit);
    }
    DEVICE Place place() const { return found; }
    DEVICE OwnRows own_rows(int consumer) const { return {consumer * OWN_ROWS, WAVES}; }
};

// Starts the store of a box, as far as it lies in the output or in the slot.
DEVICE void store_box(const TensorMap& out, u32 source, const Place& place) {
    if (GROUPING == Grouping::MASKED) {
        tma_store_in_slot(out, source, place.column, place.row, place.slot);
    } else {
        tma_store(out, source, place.column, place.row);
    }
}

// ---- contiguous: row block b belongs to group routing[b], or to none (-1)

// Parts of a tile that may belong to different groups.
constexpr int PARTS = ROWS > SCALE_BLOCK ? 2 : 1;
constexpr int PART_ROWS = ROWS / PARTS;

static_assert(GROUPING != Grouping::CONTIGUOUS || SHARE != Share::WEIGHT || PARTS == 1,
              "two tiles of rows may belong to two groups, but not to four");

// Rows of units up to the last row block that belongs to a group. All lanes of a warp.
DEVICE int count_used_rows(const Problem& problem) {
    int last = 0;
    for (int end = problem.m / problem.block_rows; end > 0 && last == 0; end -= WARP) {
        const int block = end - 1 - lane_index();
        const bool is_used = block >= 0 && load_global(problem.routing + block) >= 0;
        last = warp_maximum(is_used ? block + 1 : 0);
    }
    return (last * problem.block_rows + UNIT_ROWS - 1) / UNIT_ROWS;
}

// A tile whose halves belong to two groups is two units, of each of which the consumers share one
// half; what belongs to no group is left out. Of two tiles that share columns one may be left out: its
// block takes part in copying the other's weight. Where both belong to groups, but not to the same,
// each copies its own.
template <>
struct UnitsOf<Grouping::CONTIGUOUS> {
    const Problem& problem;
    int unit_rows;
    int unit = block_index() / CLUSTER;
    int part = 0;
    int group = 0;
    bool is_whole = true;
    bool is_nobodys = false;
    bool is_common = true;

    DEVICE UnitsOf(const Problem& given, const Start& start)
        : problem(given), unit_rows(start.unit_rows) {
        find();
    }
    DEVICE bool are_left() const { return unit < unit_rows * problem.unit_columns; }
    DEVICE void advance() {
        if (PARTS == 2 && part == 0 && !is_whole) {
            part = 1;
        } else {
            next_tile();
        }
        find();
    }
    DEVICE Place place() const {
        Place found = place_of(problem, unit_rows, unit);
        found.group = group;
        found.is_common = is_common;
        if (is_nobodys) found.end = found.row;
        return found;
    }
    DEVICE OwnRows own_rows(int consumer) const {
        if (is_nobodys) return {0, 0};
        if (PARTS == 1 || is_whole) return {consumer * OWN_ROWS, WAVES};
        return {part * PART_ROWS + consumer * WAVE_ROWS, 1};
    }

  private:
    DEVICE void next_tile() {
        unit += grid_size() / CLUSTER;
        part = 0;
    }
    DEVICE void find() {
        if constexpr (SHARE == Share::WEIGHT) {
            find_pair();
        } else {
            find_part();
        }
    }
    // From this part on to the next that belongs to a group.
    DEVICE void find_part() {
        for (; are_left(); next_tile()) {
            const int row = place_of(problem, unit_rows, unit).row;
            const int first = group_of(row);
            const int second = PARTS == 2 ? group_of(row + PART_ROWS) : first;
            is_whole = first == second;
            if (part == 0 && first < 0 && !is_whole) part = 1;
            group = part == 0 ? first : second;
            if (group >= 0) return;
        }
    }
    // The next two tiles of which one does.
    DEVICE void find_pair() {
        for (; are_left(); next_tile()) {
            const int row = place_of(problem, unit_rows, unit).row;
            const int own = group_of(row), other = group_of(row ^ ROWS);
            is_nobodys = own < 0;
            is_common = own == other || own < 0 || other < 0;
            group = is_nobodys ? other : own;
            if (group >= 0) return;
        }
    }
    DEVICE int group_of(int row) const {
        return uniform(row < problem.m ? load_global(problem.routing + row / problem.block_rows)
                                       : -1);
    }
};

// ---- masked: group g has routing[g] rows at the start of its slot of m rows

DEVICE int rows_of_group(const Problem& problem, int group) {
    const int count = load_global(problem.routing + group);
    return count < 0 ? 0 : smaller(count, problem.m);
}

// Writes GROUP_ENDS; how many rows of units there are. One warp.
DEVICE int count_groups(const Problem& problem, u32 ends) {
    int before = 0;
    for (int first = 0; first < problem.groups; first += WARP) {
        const int group = first + lane_index();
        int rows = 0;
        if (group < problem.groups)
            rows = (rows_of_group(problem, group) + UNIT_ROWS - 1) / UNIT_ROWS;
        const int end = before + warp_prefix_sum(rows);
        if (group < problem.groups) store_shared(ends + 4 * group, end);
        before = warp_maximum(end);
    }
    return before;
}

template <>
struct UnitsOf<Grouping::MASKED> {
    const Problem& problem;
    u32 ends;
    int units;
    int unit = block_index() / CLUSTER;
    Place found{};

    DEVICE UnitsOf(const Problem& given, const Start& start)
        : problem(given),
          ends(shared_memory() + GROUP_ENDS),
          units(start.unit_rows * given.unit_columns) {
        find();
    }
    DEVICE bool are_left() const { return unit < units; }
    DEVICE void advance() {
        unit += grid_size() / CLUSTER;
        find();
    }
    DEVICE Place place() const { return found; }
    // Few rows are shared evenly.
    DEVICE OwnRows own_rows(int consumer) const {
        const int rows = found.end - found.row;
        const int first = consumer * (rows > CONSUMERS * WAVE_ROWS ? OWN_ROWS : WAVE_ROWS);
        const int waves = (rows - first + WAVE_ROWS - 1) / WAVE_ROWS;
        return {first, rows > first ? smaller(waves, rows > CONSUMERS * WAVE_ROWS ? WAVES : 1) : 0};
    }

  private:
    // The first group that ends behind this unit has it.
    DEVICE void find() {
        if (!are_left()) return;
        const int tile = unit / problem.unit_columns;
        int group = 0, last = problem.groups - 1;
        while (group < last) {
            const int middle = (group + last) / 2;
            if (read(ends + 4 * middle) > tile) {
                last = middle;
            } else {
                group = middle + 1;
            }
        }
        const int start = group > 0 ? read(ends + 4 * (group - 1)) : 0;
        const int tiles = read(ends + 4 * group) - start;
        const int inside = unit - start * problem.unit_columns;
        found = place_of(problem, tiles, turned(inside, tiles));
        found.group = found.slot = group;
        found.end = uniform(rows_of_group(problem, group));
    }
    // The tiles of a column upside down in every other round. Of groups with two tiles each, an
    // even number of blocks would otherwise always give half of them the first, which is full, and
    // half the second: these run ahead, and read weights that have left L2 when the others come.
    DEVICE int turned(int inside, int tiles) const {
        const int row = inside % tiles;
        const int round = (unit - row) / (grid_size() / CLUSTER);
        return tiles <= problem.band && round % 2 ? inside + tiles - 1 - 2 * row : inside;
    }
    DEVICE int read(u32 address) const { return uniform(load_shared_integer(address)); }
};

using Units = UnitsOf<GROUPING>;

// Rows of units of all groups; all threads of the block. Whatever is read of groups, the kernel ahead
// may have written.
DEVICE int count_unit_rows(const Problem& problem, u32 memory, int warp) {
    wait_for_kernel_ahead();
    if (GROUPING == Grouping::CONTIGUOUS) return count_used_rows(problem);
    if (warp == 0) count_groups(problem, memory + GROUP_ENDS);
    sync_block();
    return uniform(load_shared_integer(memory + GROUP_ENDS + 4 * (problem.groups - 1)));
}
