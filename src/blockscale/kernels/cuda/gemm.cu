// Block-scaled FP8 GEMM for Hopper: out = activation x weight^T (+ bias), one launch, persistent.
//
// A producer warp copies tiles into a ring of shared-memory slots (TMA), another puts the weight's
// scales beside them; consumer warpgroups multiply, each its own half of the tile's rows, in one or
// two waves of 64 rows. A wave is the sum of 128 products, straight from the tensor cores; it is
// scaled and added to the results ("promoted") with one FFMA an element:
//
//     result += wave * (activation_scale[row, k / 128] * weight_scale[column / 128, k / 128])
//
// The product of the scales is rounded first, as in the Gluon kernels: the same bits as theirs.
//
// Two blocks may form a cluster that shares the rows of the activation or those of the weight: each
// copies half and sends it to both. A slot is then empty when the consumers of both gave it back.
//
// Macros choose the form (work.py): FORM_ROWS x FORM_COLUMNS of a tile, and what is named below.
#include <primitives.cuh>

enum class Share { NOTHING, ACTIVATION, WEIGHT };
enum class Output { BFLOAT16, FLOAT16, FLOAT32 };
// Whose rows they are: units.cuh.
enum class Grouping { NOTHING, CONTIGUOUS, MASKED };
enum class When { AT_ONCE, LATE };

constexpr int ROWS = FORM_ROWS, COLUMNS = FORM_COLUMNS;
// Slots of the ring.
constexpr int STAGES = FORM_STAGES;
// What the two blocks of a cluster share.
constexpr Share SHARE = static_cast<Share>(FORM_SHARE);
constexpr Output OUTPUT = static_cast<Output>(FORM_OUTPUT);
constexpr Grouping GROUPING = static_cast<Grouping>(FORM_GROUPING);
// One store: rows, and bytes of each; buffers of each warp for stores. None: lanes write by themselves.
constexpr int BOX_ROWS = FORM_BOX_ROWS, BOX_BYTES = FORM_BOX_BYTES, BUFFERS = FORM_BUFFERS;
// When a tile is written: at its end, or while the next one's first waves run.
constexpr When WHEN = static_cast<When>(FORM_WHEN);
// Blocks that share a multiprocessor.
constexpr int BESIDE = FORM_BESIDE;
// Waves of a consumer that run at a time.
constexpr int FLIGHT = FORM_FLIGHT;
// Weight rows of a group whose quarters take turns in a slot, two rows each, as four lanes' results do.
// In groups of 8 rows lie in order.
constexpr int DEALT = FORM_DEALT, IN_ORDER = 8;

// Lanes of a consumer's warp that say that it has read a slot: 1, or WARP, which tools/racecheck.py
// has it compiled with.
#ifndef ARRIVING_LANES
#define ARRIVING_LANES 1
#endif
constexpr int ARRIVING = ARRIVING_LANES;

// K of a slot: one scale block, and 128 bytes of codes.
constexpr int K_BLOCK = 128;
// Weight rows that share a scale.
constexpr int SCALE_BLOCK = 128;
constexpr int WAVE_ROWS = 64;
// K of one wgmma.
constexpr int STEP = 32;
constexpr int WARPS = 4;  // of a warpgroup
constexpr int WARP_ROWS = WAVE_ROWS / WARPS;

constexpr int CONSUMERS = ROWS > WAVE_ROWS ? 2 : 1;
constexpr int OWN_ROWS = ROWS / CONSUMERS;
constexpr int WAVES = OWN_ROWS / WAVE_ROWS;
constexpr int CLUSTER = SHARE == Share::NOTHING ? 1 : 2;
constexpr int THREADS = (CONSUMERS + 1) * WARPS * WARP;
// Results of one wave in one thread.
constexpr int SUMS = COLUMNS / 2;

// Columns that share a weight scale, wherever a tile starts: the greatest common divisor of both.
constexpr int SEGMENT = (COLUMNS | SCALE_BLOCK) & -(COLUMNS | SCALE_BLOCK);
constexpr int SEGMENTS = COLUMNS / SEGMENT;
constexpr int SCALE_ROWS = SEGMENTS > 1 ? 2 : 1;

constexpr int ELEMENT = OUTPUT == Output::FLOAT32 ? 4 : 2;
constexpr int BOX_COLUMNS = BOX_BYTES / ELEMENT;
// Boxes of a row. The last one ends with the tile: it may write again what the one before wrote.
constexpr int BOXES = (COLUMNS + BOX_COLUMNS - 1) / BOX_COLUMNS;
constexpr int BOX_SIZE = BOX_ROWS * BOX_BYTES;
constexpr bool BY_LANES = BUFFERS == 0;
// Weight rows of one copy.
constexpr int B_ROWS = SHARE == Share::WEIGHT ? COLUMNS / 2 : COLUMNS;

// Registers of a thread: 168 x 384 and 128 x 512 are all there are.
constexpr bool MOVES_REGISTERS = CONSUMERS == 2 || BESIDE == 2;
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 208;

static_assert(ARRIVING == 1 || ARRIVING == WARP, "one lane, or all");
static_assert(OWN_ROWS % WAVE_ROWS == 0 && WAVES <= 2, "one or two waves a consumer");
static_assert(COLUMNS % 16 == 0, "a pair of matrices is 16 columns wide");
static_assert(COLUMNS <= 144 || SEGMENT >= COLUMNS - 128, "a tile meets two scale blocks at most");
static_assert(FLIGHT == 1 || (FLIGHT == 2 && WAVES == 1 && STAGES > 2),
              "the next K block's wave runs while one is promoted");
static_assert(BOX_COLUMNS <= COLUMNS, "a box lies inside of its tile");
static_assert(B_ROWS % DEALT == 0 && SEGMENT % DEALT == 0, "a copy has whole groups, one scale each");
static_assert(BOX_ROWS == WARP_ROWS || (BOX_ROWS == WARP_ROWS / 2 && BOX_COLUMNS % 32 == 0),
              "four matrices are 16 rows of 16 columns, or 8 rows of 32");

// Bytes of one slot.
constexpr u32 SCALE_BYTES = 4, B_SCALE_BYTES = 2 * SCALE_BYTES, BARRIER_BYTES = 8;
constexpr u32 A_BYTES = ROWS * K_BLOCK, B_BYTES = COLUMNS * K_BLOCK;
constexpr u32 A_SCALE_BYTES = ROWS * SCALE_BYTES;
constexpr u32 STAGING_BYTES = CONSUMERS * WARPS * BUFFERS * BOX_SIZE;

// Offsets in shared memory.
constexpr u32 A_SLOTS = 0;
constexpr u32 B_SLOTS = A_SLOTS + STAGES * A_BYTES;
constexpr u32 STAGING = B_SLOTS + STAGES * B_BYTES;
constexpr u32 A_SCALE_SLOTS = STAGING + STAGING_BYTES;
constexpr u32 B_SCALE_SLOTS = A_SCALE_SLOTS + STAGES * A_SCALE_BYTES;
constexpr u32 FULL = B_SCALE_SLOTS + STAGES * B_SCALE_BYTES;
constexpr u32 EMPTY = FULL + STAGES * BARRIER_BYTES;
// For each group, the tiles of its rows and of those of all groups before it.
constexpr u32 GROUP_ENDS = EMPTY + STAGES * BARRIER_BYTES;
constexpr int MOST_GROUPS = GROUPING == Grouping::MASKED ? 512 : 0;
constexpr u32 SHARED_BYTES = GROUP_ENDS + MOST_GROUPS * 4;

static_assert(SHARED_BYTES <= 232448, "what a block may have on SM90");

// What a launch is about; the same words in launch.py.
struct Problem {
    const float* b_scales;
    // In the output's type; null if there is none.
    const void* bias;
    void* out;
    int m;
    int n;
    int k_blocks;
    int b_scale_stride;
    // A unit is what a cluster computes at a time: one tile, or two that share rows.
    int unit_rows;
    int unit_columns;
    // Units go down columns in bands of so many rows of units.
    int band;
    // Of the activation's last tile, what `a_last` and `a_scales_last` copy: about those that exist.
    // The slot's other rows hold anything; they are multiplied, and never stored.
    int last_rows;
    // K blocks whose weights are copied before the kernel ahead has ended.
    int early_blocks;
    // Contiguous: rows of a row block, and the group of each of them. Masked: how many groups, and
    // the rows of each that count; m is a slot's rows.
    int block_rows;
    int groups;
    const int* routing;
};

#include <units.cuh>

// A place in the ring of slots: it goes on from tile to tile.
struct Ring {
    u32 memory;
    u32 slot = 0;
    u32 parity = 0;

    DEVICE u32 full() const { return memory + FULL + slot * BARRIER_BYTES; }
    DEVICE u32 empty() const { return memory + EMPTY + slot * BARRIER_BYTES; }
    DEVICE void advance() {
        slot++;
        if (slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }
};

#include <producer.cuh>

// ---- consumers

// Starts one wave of one K block.
DEVICE void start_wave(float (&wave)[SUMS], u32 a, u32 b) {
    constexpr u32 next = STEP / DESCRIPTOR_UNIT;
    pin(wave);
    wgmma_fence();
    Wgmma<COLUMNS, false>::multiply(wave, a, b);
    UNROLL for (u32 step = 1; step < K_BLOCK / STEP; step++)
        Wgmma<COLUMNS, true>::multiply(wave, a + step * next, b + step * next);
    wgmma_commit();
}

DEVICE void end_wave(float (&wave)[SUMS]) {
    wgmma_wait<0>();
    pin(wave);
}

// A slot's scales of a thread's rows: of each wave, the upper row's and that of the row 8 below.
struct Scales {
    float a[WAVES][2];
    float b[SCALE_ROWS];
};

// Asks for them; whoever gives the slot back has them.
template <int COUNT>
DEVICE Scales ask_for_scales(const Ring& ring, u32 own) {
    Scales scales;
    const u32 a = own + ring.slot * A_SCALE_BYTES;
    const u32 b = ring.memory + B_SCALE_SLOTS + ring.slot * B_SCALE_BYTES;
    UNROLL for (int i = 0; i < SCALE_ROWS; i++) scales.b[i] = load_shared(b + 4 * i);
    UNROLL for (int wave = 0; wave < COUNT; wave++) {
        scales.a[wave][0] = load_shared(a + 4 * (wave * WAVE_ROWS));
        scales.a[wave][1] = load_shared(a + 4 * (wave * WAVE_ROWS + 8));
    }
    return scales;
}

// results += wave * scales. `own_columns`: columns before the second weight scale begins. Pinned:
// otherwise the compiler may move the FFMAs below the start of the next wave, which then spills.
DEVICE void promote(float (&results)[SUMS], const float (&wave)[SUMS], const Scales& scales,
                    int number, int own_columns) {
    constexpr int per_segment = SUMS / SEGMENTS;
    UNROLL for (int segment = 0; segment < SEGMENTS; segment++) {
        const bool is_first = segment * SEGMENT < own_columns;
        const float b = is_first ? scales.b[0] : scales.b[SCALE_ROWS - 1];
        const float upper = scales.a[number][0] * b;
        const float lower = scales.a[number][1] * b;
        UNROLL for (int i = 0; i < per_segment; i += 4) {
            const int at = segment * per_segment + i;
            results[at] = multiply_add(wave[at], upper, results[at]);
            results[at + 1] = multiply_add(wave[at + 1], upper, results[at + 1]);
            results[at + 2] = multiply_add(wave[at + 2], lower, results[at + 2]);
            results[at + 3] = multiply_add(wave[at + 3], lower, results[at + 3]);
        }
    }
    pin(results);
}

// One lane of each warp, or one for each block of the cluster: the warp has read the slot, for all
// of its lanes meet after they have (`bar.warp.sync` orders memory among them, PTX ISA 9.0, 9.7.13.2,
// and what orders one after the other orders all that was before: 8.9.5).
DEVICE void give_back(const Ring& ring) {
    sync_warp();
    if (ARRIVING == WARP) {
        barrier_arrive(ring.empty());
        if (CLUSTER == 2) barrier_arrive_at(ring.empty(), 1 - block_index() % CLUSTER);
    } else if (CLUSTER == 1) {
        if (lane_index() == 0) barrier_arrive(ring.empty());
    } else {
        if (lane_index() < CLUSTER) barrier_arrive_at(ring.empty(), lane_index());
    }
}

// What a consumer's warp reads its operands by.
struct Own {
    u32 a_slots;
    u32 b_slots;
    u32 scales;
};

DEVICE Own own_operands(const Ring& ring, int first_row, int warp_row) {
    return {matrix_descriptor(ring.memory + A_SLOTS + first_row * K_BLOCK),
            matrix_descriptor(ring.memory + B_SLOTS),
            ring.memory + A_SCALE_SLOTS + 4 * (first_row + warp_row + lane_index() / 4)};
}

// One K block, COUNT waves. Scales are asked for before the first, since a wave and TMA nearly fill the
// bandwidth of shared memory (256x128 took 1.7 % less clocks, ncu, H200, 2026-11-26); they come while
// it runs, and the lanes meet after it. While a wave runs the next slot is looked at: what stands
// between two is the FFMAs and the arrival that gives the slot back. `meanwhile` is called while each
// wave runs, with its number, and with those of waves beyond COUNT. `is_full`: whether the slot is
// known to be, then the next. `own_columns`: as `promote`'s; read after the first `meanwhile`.
template <int COUNT, class Meanwhile>
DEVICE void multiply_block(float (&results)[WAVES][SUMS], float (&wave)[SUMS], Ring& ring,
                           bool& is_full, const Own& own, const int& own_columns,
                           Meanwhile meanwhile) {
    if (!is_full) barrier_wait(ring.full(), ring.parity);
    const u32 a = own.a_slots + ring.slot * (A_BYTES / DESCRIPTOR_UNIT);
    const u32 b = own.b_slots + ring.slot * (B_BYTES / DESCRIPTOR_UNIT);
    Ring next = ring;
    next.advance();
    const Scales scales = ask_for_scales<COUNT>(ring, own.scales);
    UNROLL for (int number = 0; number < COUNT; number++) {
        start_wave(wave, a + number * (WAVE_ROWS * K_BLOCK / DESCRIPTOR_UNIT), b);
        meanwhile(number);
        if (number == COUNT - 1)
            UNROLL for (int beyond = COUNT; beyond < WAVES; beyond++) meanwhile(beyond);
        if (number == COUNT - 1) is_full = barrier_test(next.full(), next.parity);
        end_wave(wave);
        if (number == COUNT - 1) give_back(ring);
        promote(results[number], wave, scales, number, own_columns);
    }
    ring = next;
}

// All K blocks of one tile. `begin`: as `meanwhile`, in the first; or before it. `look_ahead`: called
// once; where tiles follow one another, while a wave of the second K block runs.
template <int COUNT, class Begin, class LookAhead>
DEVICE void multiply_tile(float (&results)[WAVES][SUMS], float (&wave)[SUMS], Ring& ring,
                          int k_blocks, const Own& own, const int& own_columns, Begin begin,
                          LookAhead look_ahead) {
    bool is_full = false;
    int block = 0;
    const auto second = [&](int number) {
        if (number == 0) look_ahead();
    };
    if (WHEN == When::LATE) {
        multiply_block<COUNT>(results, wave, ring, is_full, own, own_columns, begin);
        if (k_blocks > 1)
            multiply_block<COUNT>(results, wave, ring, is_full, own, own_columns, second);
        block = 2;
    } else {
        UNROLL for (int number = 0; number < WAVES; number++) begin(number);
    }
    for (; block < k_blocks; block++)
        multiply_block<COUNT>(results, wave, ring, is_full, own, own_columns, [](int) {});
    if (WHEN == When::AT_ONCE || k_blocks == 1) look_ahead();
}

// Gives back the slots of a tile that has no rows for this consumer.
DEVICE void skip(Ring& ring, int k_blocks) {
    for (int block = 0; block < k_blocks; block++) {
        barrier_wait(ring.full(), ring.parity);
        give_back(ring);
        ring.advance();
    }
}

#include <flight.cuh>
#include <results.cuh>

// A tile's results: written at its end, or each wave's while the next tile's first one runs. So the
// tensor cores work while a consumer rounds, stages and waits for a buffer.
DEVICE void consume(Ring ring, int warp, const TensorMap& out, const Problem& problem,
                    const Start& start) {
    const int consumer = warp / WARPS;
    // The warp's first row in a wave.
    const int warp_row = warp % WARPS * WARP_ROWS;
    Staging staging{ring.memory + STAGING + warp * (BUFFERS * BOX_SIZE)};
    float wave[SUMS], odd[SUMS], results[WAVES][SUMS];
    UNROLL for (int i = 0; i < SUMS; i++) wave[i] = 0;
    Place place{};
    int own_columns = 0;
    bool is_written = true;
    const auto write = [&](int number) {
        if (problem.bias) add_bias(results[number], problem, place.column);
        Place first = place;
        first.row += warp_row + number * WAVE_ROWS;
        if (GROUPING != Grouping::NOTHING && first.row >= first.end) return;
        if constexpr (BY_LANES) {
            write_by_lanes(results[number], problem, first);
        } else {
            write_wave(results[number], out, problem, first, staging);
        }
    };
    Units units(problem, start);
    // Not between two tiles, where the tensor cores would wait for it: 128x192 took 3 % less clocks
    // in slots, 256x128 1 % in row blocks (ncu, H200, 2026-11-26).
    const auto look_ahead = [&]() { units.advance(); };
    while (units.are_left()) {
        const OwnRows rows = units.own_rows(consumer);
        if (rows.waves == 0) {
            skip(ring, problem.k_blocks);
            units.advance();
            continue;
        }
        const Own own = own_operands(ring, rows.first, warp_row);
        Place next{};
        const auto begin = [&](int number) {
            if (number == 0) {
                next = units.place();
                next.row += rows.first;
                if (GROUPING != Grouping::NOTHING)
                    next.end = smaller(next.end, next.row + rows.waves * WAVE_ROWS);
                own_columns = SCALE_BLOCK - next.column % SCALE_BLOCK;
            }
            if (WHEN == When::LATE && !is_written) write(number);
            UNROLL for (int i = 0; i < SUMS; i++) results[number][i] = 0;
        };
        if constexpr (FLIGHT == 2) {
            UNROLL for (int i = 0; i < SUMS; i++) odd[i] = 0;
            multiply_blocks(results[0], wave, odd, ring, problem.k_blocks, own, own_columns,
                            begin);
            look_ahead();
        } else if (WAVES == 1 || rows.waves == WAVES) {
            multiply_tile<WAVES>(results, wave, ring, problem.k_blocks, own, own_columns, begin,
                                 look_ahead);
        } else {
            multiply_tile<1>(results, wave, ring, problem.k_blocks, own, own_columns, begin,
                             look_ahead);
        }
        place = next;
        is_written = false;
        if (WHEN == When::AT_ONCE) UNROLL for (int number = 0; number < WAVES; number++) write(number);
    }
    if (WHEN == When::LATE && !is_written)
        UNROLL for (int number = 0; number < WAVES; number++) write(number);
    if (BY_LANES) return;
    // Read, not written: the kernel's end waits for that, and shared memory is free before.
    if (lane_index() == 0) tma_store_wait_read<0>();
    sync_warp();
}

DEVICE void prepare_barriers(u32 memory) {
    for (u32 slot = 0; slot < STAGES; slot++) {
        // The copies' thread and the scales' lane; lanes of every consumer warp of the cluster.
        barrier_init(memory + FULL + slot * BARRIER_BYTES, 2);
        barrier_init(memory + EMPTY + slot * BARRIER_BYTES, CLUSTER * CONSUMERS * WARPS * ARRIVING);
    }
    fence_barrier_init();
}

// Blocks: a multiple of CLUSTER; THREADS threads, SHARED_BYTES of shared memory.
KERNEL(THREADS, BESIDE)
block_fp8_gemm(CONSTANT TensorMap a, CONSTANT TensorMap a_last, CONSTANT TensorMap b,
               CONSTANT TensorMap a_scales, CONSTANT TensorMap a_scales_last,
               CONSTANT TensorMap out, CONSTANT Problem problem) {
    const int warp = warp_index();
    Ring ring{shared_memory()};
    const Operands operands{a, a_last, b, a_scales, a_scales_last};
    // All that the first copy waits for is done by different warps, before they meet.
    if (warp == CONSUMERS * WARPS && is_elected()) {
        operands.prefetch();
        prefetch_map(out);
    }
    if (warp == CONSUMERS * WARPS + 1 && is_elected()) prepare_barriers(ring.memory);
    Start start{problem.unit_rows, {}};
    if (GROUPING == Grouping::NOTHING)
        start.first = place_of(problem, problem.unit_rows, block_index() / CLUSTER);
    if (CLUSTER > 1) {
        sync_cluster();
    } else {
        sync_block();
    }
    if (GROUPING != Grouping::NOTHING)
        start.unit_rows = count_unit_rows(problem, ring.memory, warp);
    if (warp < CONSUMERS * WARPS) {
        if constexpr (MOVES_REGISTERS) take_registers<CONSUMER_REGISTERS>();
        consume(ring, warp, out, problem, start);
    } else {
        if constexpr (MOVES_REGISTERS) give_registers<PRODUCER_REGISTERS>();
        if (warp == CONSUMERS * WARPS && (!COPIES_ALONE || is_elected()))
            copy_operands(ring, operands, problem, start);
        if (warp == CONSUMERS * WARPS + 1) copy_weight_scales(ring, problem, start);
        sync_warp();
    }
}
