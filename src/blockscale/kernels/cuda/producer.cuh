// What fills the ring of slots: a warp has TMA copy both operands, another puts the weight's scales
// beside them. Part of gemm.cu, in whose words it is written.
#pragma once

// What is read: codes and scales of the activation and of its last tile, codes of the weight.
struct Operands {
    const TensorMap& a;
    const TensorMap& a_last;
    const TensorMap& b;
    const TensorMap& a_scales;
    const TensorMap& a_scales_last;

    DEVICE void prefetch() const {
        for (const TensorMap* map : {&a, &a_last, &b, &a_scales, &a_scales_last}) prefetch_map(*map);
    }
};

// This block's part of an operand of SIZE rows; from `row` on all of it, or half of it to both.
// GROUP: rows are dealt, in groups of so many.
template <int SIZE, bool SHARED, int GROUP = IN_ORDER>
DEVICE void copy_rows(u32 target, const TensorMap& map, int k, int row, u32 barrier, u64 policy) {
    const int half = SHARED ? SIZE / 2 * (block_index() % CLUSTER) : 0;
    target += half * K_BLOCK;
    row += half;
    if constexpr (GROUP > IN_ORDER) {
        if (SHARED) {
            tma_load_dealt_multicast(target, map, k, row / GROUP, barrier, 3);
        } else {
            tma_load_dealt(target, map, k, row / GROUP, barrier, policy);
        }
    } else if (SHARED) {
        tma_load_multicast(target, map, k, row, barrier, 3);
    } else {
        tma_load(target, map, k, row, barrier, policy);
    }
}

// What all K blocks of a tile have in common, found once for each tile: 76 instructions a K block
// instead of 224, of a thread that all of a small tile waits for.
struct Tile {
    const TensorMap& a;
    const TensorMap& a_scales;
    // Bytes of a slot that this tile fills, and rows of the three arrays that it takes.
    u32 bytes;
    int a_row;
    int b_row;
    int scale_row;
    int scale_block;
    u64 policy;
    bool is_common;
    // A tile without rows of a group: its block only copies its half of the other tile's weight.
    bool is_empty;

    DEVICE Tile(const Operands& operands, const Problem& problem, const Place& place)
        : Tile(operands, problem, place,
               SHARE != Share::ACTIVATION && place.row + ROWS > problem.m) {}

  private:
    // `is_last`: its rows end beyond the last one; then `last_rows` of them are copied. Weights that
    // are read once, by the tile's only rows, leave L2 first: what is read again should stay
    // instead. 1 to 4 % less (H200, 2026-11-26).
    DEVICE Tile(const Operands& operands, const Problem& problem, const Place& place, bool is_last)
        : a(is_last ? operands.a_last : operands.a),
          a_scales(is_last ? operands.a_scales_last : operands.a_scales),
          bytes(B_BYTES),
          a_row(place.slot * problem.m + place.row),
          b_row(place.group * problem.n + place.column),
          scale_row(place.row),
          scale_block(place.slot * problem.k_blocks),
          policy(problem.unit_rows == 1 ? EVICTED_FIRST : EVICTED_AS_USUAL),
          is_common(place.is_common),
          is_empty(GROUPING != Grouping::NOTHING && SHARE == Share::WEIGHT &&
                   place.row >= place.end) {
        const int rows = is_last ? problem.last_rows : ROWS;
        if (!is_empty) bytes += rows * (K_BLOCK + SCALE_BYTES);
    }
};

// Who walks over the K blocks: all lanes of the copying warp, so that what is copied lies in uniform
// registers (by one lane alone some twelve values a K block are moved there after the slot was seen
// empty), or that lane alone, which need not be elected for each K block. Alone 64x32 took 3 and 8 %
// less, 64x64 5 % more, 256x128 2 % more (H100, 2026-11-26).
constexpr bool COPIES_ALONE = GROUPING == Grouping::NOTHING && CONSUMERS == 1 && COLUMNS <= 32;

// Opens a free slot for one K block of a tile, and copies its weights.
DEVICE void copy_weight(const Ring& ring, const Operands& operands, const Tile& tile, int block) {
    barrier_arrive_expecting(ring.full(), tile.bytes);
    const u32 target = ring.memory + B_SLOTS + ring.slot * B_BYTES;
    if (SHARE == Share::WEIGHT && !tile.is_common) {
        for (int half = 0; half < COLUMNS; half += B_ROWS)
            copy_rows<B_ROWS, false, DEALT>(target + half * K_BLOCK, operands.b, block * K_BLOCK,
                                            tile.b_row + half, ring.full(), tile.policy);
        return;
    }
    copy_rows<COLUMNS, SHARE == Share::WEIGHT, DEALT>(target, operands.b, block * K_BLOCK,
                                                      tile.b_row, ring.full(), tile.policy);
}

// Fills the rest of a slot: one K block of a tile's rows, and their scales.
DEVICE void copy_activation(const Ring& ring, const Tile& tile, int block) {
    if (tile.is_empty) return;
    copy_rows<ROWS, SHARE == Share::ACTIVATION>(ring.memory + A_SLOTS + ring.slot * A_BYTES, tile.a,
                                                block * K_BLOCK, tile.a_row, ring.full(),
                                                EVICTED_AS_USUAL);
    tma_load(ring.memory + A_SCALE_SLOTS + ring.slot * A_SCALE_BYTES, tile.a_scales, tile.scale_row,
             tile.scale_block + block, ring.full());
}

// The first K blocks' weights of the first tile, which no kernel ahead writes (product.py); how many.
DEVICE int copy_early(Ring ring, const Operands& operands, const Problem& problem,
                      const Tile& tile) {
    const int early = smaller(problem.early_blocks, smaller(STAGES, problem.k_blocks));
    for (int block = 0; block < early; block++) {
        if (COPIES_ALONE || is_elected()) copy_weight(ring, operands, tile, block);
        ring.advance();
    }
    return early;
}

// Whether the thread that copies looks for its next tile while the ring is full, not between two
// tiles. In slots 128x192 took 3 to 5 % less clocks; in row blocks 1 % more, in pairs 2 % less (ncu,
// H200, 2026-11-26).
constexpr bool LOOKS_AHEAD = GROUPING == Grouping::MASKED;

// Until all slots are empty: no block may end while the other block's consumers still give its slots
// back. Their last arrival comes later than they meet this block's threads, if `barrier.cluster` is
// `.relaxed`: where the other block's last tile has nothing to write, launches failed (128x144 in
// pairs, N 6144, K 128, H200, 2026-11-26). What the other copies to here was waited for by then.
DEVICE void wait_for_last_arrivals(Ring ring) {
    for (int slot = 0; slot < STAGES; slot++) {
        barrier_wait(ring.empty(), ring.parity ^ 1);
        ring.advance();
    }
}

// One warp, of which one lane copies. A warp for each operand took 6 to 15 % more at 64 rows (H100,
// 2026-11-26).
//
// Where weights are copied early, the next kernel starts when this one has asked for all it reads:
// its own early copies then fill the memory's pause between the two. Layers took 0.6 and 2 % less
// than with it started at once, M of 16 and 64 (H200, 2026-11-26).
DEVICE void copy_operands(Ring ring, const Operands& operands, const Problem& problem,
                          const Start& start) {
    Units units(problem, start);
    int early = -1;
    while (units.are_left()) {
        const Tile tile(operands, problem, units.place());
        // Of the first tile what no kernel ahead writes, before that has ended.
        if (early < 0) {
            early = copy_early(ring, operands, problem, tile);
            wait_for_kernel_ahead();
            if (problem.early_blocks == 0) let_next_kernel_start();
        }
        for (int block = 0; block < early; block++) {
            if (COPIES_ALONE || is_elected()) copy_activation(ring, tile, block);
            ring.advance();
        }
        for (int block = early; block < problem.k_blocks; block++) {
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if (COPIES_ALONE || is_elected()) {
                copy_weight(ring, operands, tile, block);
                copy_activation(ring, tile, block);
            }
            ring.advance();
            if (LOOKS_AHEAD && block == 0) units.advance();
        }
        if (!LOOKS_AHEAD) units.advance();
        early = 0;
    }
    if (problem.early_blocks > 0) let_next_kernel_start();
    if (CLUSTER > 1) wait_for_last_arrivals(ring);
}

// The weight's scales of some K blocks of a tile, one block's in each lane: those of its first scale
// row and of the next one.
struct Piece {
    float first;
    float next;
    int blocks;
};

// Reads the scales of this block's tiles, piece by piece.
struct WeightScales {
    const Problem& problem;
    Units units;
    int base = 0;

    DEVICE WeightScales(const Problem& given, const Start& start)
        : problem(given), units(given, start) {}
    // Of no blocks behind the last tile. Nothing waits here for what is read.
    DEVICE Piece read() {
        if (!units.are_left()) return {0, 0, 0};
        const Place place = units.place();
        const int last_row = (problem.n - 1) / SCALE_BLOCK;
        const float* scales =
            problem.b_scales + place.group * (last_row + 1) * problem.b_scale_stride;
        // A tile beyond the last column, and a tile's columns beyond it, take any scale.
        const int first_row = smaller(place.column / SCALE_BLOCK, last_row);
        const int next_row = smaller(first_row + 1, last_row);
        const int blocks = smaller(problem.k_blocks - base, WARP);
        const int own = base + smaller(lane_index(), blocks - 1);
        Piece piece{load_global(scales + first_row * problem.b_scale_stride + own), 0, blocks};
        if (SCALE_ROWS > 1)
            piece.next = load_global(scales + next_row * problem.b_scale_stride + own);
        base += blocks;
        if (base == problem.k_blocks) {
            base = 0;
            units.advance();
        }
        return piece;
    }
};

// One warp puts the scales into the slots, one by one, so that no consumer waits for a load from
// memory; nor does this warp, which has asked for the next piece by then.
DEVICE void copy_weight_scales(Ring ring, const Problem& problem, const Start& start) {
    if (problem.early_blocks == 0) wait_for_kernel_ahead();
    WeightScales scales(problem, start);
    for (Piece next = scales.read(); next.blocks > 0;) {
        const Piece piece = next;
        for (int owner = 0; owner < piece.blocks; owner++) {
            barrier_wait(ring.empty(), ring.parity ^ 1);
            // No lane looks later: the slot may come back once one has said that it is full,
            // and a wait for the phase before would not end.
            sync_warp();
            if (lane_index() == owner) {
                const u32 target = ring.memory + B_SCALE_SLOTS + ring.slot * B_SCALE_BYTES;
                store_shared_pair(target, piece.first, piece.next);
                barrier_arrive(ring.full());
            }
            ring.advance();
            if (owner == 0) next = scales.read();
        }
    }
}
