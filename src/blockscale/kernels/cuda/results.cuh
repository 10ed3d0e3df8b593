// From results in registers to memory: bias, rounding, and stores by TMA from buffers in shared
// memory, or by lanes. Part of gemm.cu, in whose words it is written.
#pragma once

constexpr int MATRIX_ROW = 16;  // bytes of a row of an 8x8 matrix, and of a swizzled unit

// A warp's buffers for stores; `next` is the one that is written first.
struct Staging {
    u32 memory;
    u32 next = 0;

    DEVICE u32 buffer() const { return memory + next * BOX_SIZE; }
    DEVICE void advance() { next = next + 1 == BUFFERS ? 0 : next + 1; }
};

// Two results rounded to the output's type.
DEVICE u32 rounded(float low, float high) {
    return OUTPUT == Output::FLOAT16 ? to_float16(low, high) : to_bfloat16(low, high);
}

// Adds the bias to one wave's results, in float32.
DEVICE void add_bias(float (&sums)[SUMS], const Problem& problem, int column) {
    UNROLL for (int i = 0; i < SUMS; i += 4) {
        const int own = column + i * 2 + lane_index() % 4 * 2;
        float left = 0, right = 0;
        if (own < problem.n) {
            if (OUTPUT == Output::FLOAT32) {
                left = load_global(static_cast<const float*>(problem.bias) + own);
                right = load_global(static_cast<const float*>(problem.bias) + own + 1);
            } else {
                const u32 both = load_global(static_cast<const u32*>(problem.bias) + own / 2);
                left = OUTPUT == Output::FLOAT16 ? from_float16(both) : from_bits(both << 16);
                right = OUTPUT == Output::FLOAT16 ? from_float16(both >> 16) : from_bits(both & 0xffff0000);
            }
        }
        sums[i] += left;
        sums[i + 1] += right;
        sums[i + 2] += left;
        sums[i + 3] += right;
    }
}

// Where 16 bytes of a box lie in shared memory: TMA's swizzle of rows of BOX_BYTES.
DEVICE u32 swizzled(int row, int unit) {
    const u32 offset = row * BOX_BYTES + unit * MATRIX_ROW;
    return offset ^ ((offset >> 7 & (BOX_BYTES / MATRIX_ROW - 1)) * MATRIX_ROW);
}

// Puts a box of float32 into its buffer: 8 rows of a wave from `half` on, or 16. `at`: its first sum.
DEVICE void stage_floats(u32 buffer, const float (&sums)[SUMS], int at, int half) {
    const int lane = lane_index();
    UNROLL for (int i = 0; i < BOX_COLUMNS / 2; i += 4) {
        const int unit = i / 2 + lane % 4 / 2;
        UNROLL for (int rows = 0; rows < BOX_ROWS / 8; rows++) {
            const int pair = at + i + 2 * (half + rows);
            const u32 place = buffer + swizzled(lane / 4 + 8 * rows, unit) + lane % 2 * 8;
            store_shared_pair(place, sums[pair], sums[pair + 1]);
        }
    }
}

// The same of 16 bits an element. Four matrices at a time: two above two, or four side by side.
DEVICE void stage_halves(u32 buffer, const float (&sums)[SUMS], int at, int half) {
    const int lane = lane_index();
    constexpr bool is_low = BOX_ROWS == 8;
    const auto pair = [&](int i) { return rounded(sums[i], sums[i + 1]); };
    UNROLL for (int i = 0; i < BOX_COLUMNS / 2; i += is_low ? 16 : 8) {
        const int first = at + i + (is_low ? 2 * half : 0);
        if (is_low)
            store_matrices(buffer + swizzled(lane % 8, i / 4 + lane / 8), pair(first),
                           pair(first + 4), pair(first + 8), pair(first + 12));
        else
            // Lanes 0 to 15 give the rows of the left matrices, the others those of the right ones.
            store_matrices(buffer + swizzled(lane % 16, i / 4 + lane / 16), pair(first),
                           pair(first + 2), pair(first + 4), pair(first + 6));
    }
}

// Starts the stores of one wave: a warp stages its 16 rows box by box, no other warp takes part.
// `first`: the warp's first row, the tile's first column.
DEVICE void write_wave(const float (&sums)[SUMS], const TensorMap& out, const Problem& problem,
                       Place first, Staging& staging) {
    UNROLL for (int half = 0; half < WARP_ROWS / BOX_ROWS; half++) {
        UNROLL for (int box = 0; box < BOXES; box++) {
            const int inside = smaller(box * BOX_COLUMNS, COLUMNS - BOX_COLUMNS);
            Place place = first;
            place.row += half * BOX_ROWS;
            place.column += inside;
            if (lane_index() == 0) tma_store_wait_read<BUFFERS - 1>();
            sync_warp();
            if constexpr (OUTPUT == Output::FLOAT32)
                stage_floats(staging.buffer(), sums, inside / 2, half);
            else
                stage_halves(staging.buffer(), sums, inside / 2, half);
            fence_for_tma();
            sync_warp();
            if (lane_index() == 0) {
                if (place.row < place.end && place.column < problem.n)
                    store_box(out, staging.buffer(), place);
                tma_store_commit();
            }
            staging.advance();
        }
    }
}

// ---- by lanes, without shared memory

// Of two lanes whose numbers differ in `bit`, the lower one gives its `high` for the other's `low`.
DEVICE void transpose(u32& low, u32& high, int bit) {
    const bool is_upper = (lane_index() & bit) != 0;
    const u32 got = across_lanes(is_upper ? low : high, bit);
    low = is_upper ? got : low;
    high = is_upper ? high : got;
}

// Rows of a wave that a lane writes: the upper one and that 8 below; each from the tile's first column
// on, and how many columns from there are written.
struct OwnLines {
    char* start[2];
    int inside[2];
};

// A lane holds two of each 8 columns of a row, as do its three neighbours: they give one another what
// they hold until each has 16 bytes that lie together, and all four a whole 64 bytes.
DEVICE void write_line(const float* sums, const OwnLines& own, int half, int column) {
    const int quad = lane_index() % 4;
    u32 words[4];
    if (OUTPUT == Output::FLOAT32) {
        UNROLL for (int word = 0; word < 4; word++)
            words[word] = to_bits(sums[word / 2 * 4 + 2 * half + word % 2]);
        transpose(words[0], words[2], 1);
        transpose(words[1], words[3], 1);
        column += quad % 2 * 8 + quad / 2 * 4;
    } else {
        UNROLL for (int word = 0; word < 4; word++)
            words[word] = rounded(sums[4 * word + 2 * half], sums[4 * word + 2 * half + 1]);
        transpose(words[0], words[1], 1);
        transpose(words[2], words[3], 1);
        transpose(words[0], words[2], 2);
        transpose(words[1], words[3], 2);
        column += quad * 8;
    }
    if (column < own.inside[half])
        store_global(own.start[half] + column * ELEMENT, words[0], words[1], words[2], words[3]);
}

// The same for 16 columns of 16 bits: 8 bytes a lane.
DEVICE void write_half_line(const float* sums, const OwnLines& own, int half, int column) {
    u32 low = rounded(sums[2 * half], sums[2 * half + 1]);
    u32 high = rounded(sums[4 + 2 * half], sums[4 + 2 * half + 1]);
    transpose(low, high, 1);
    column += lane_index() % 2 * 8 + lane_index() % 4 / 2 * 4;
    if (column < own.inside[half])
        store_global(own.start[half] + column * ELEMENT, low, high);
}

// One wave's results: a warp writes its 16 rows. `first` as `write_wave`'s; nothing is written from
// `first.end` on, nor beyond the last column.
DEVICE void write_by_lanes(const float (&sums)[SUMS], const Problem& problem, const Place& first) {
    // A lane's sums of the columns that one line has.
    constexpr int line = OUTPUT == Output::FLOAT32 ? 8 : 16;
    OwnLines own;
    UNROLL for (int half = 0; half < 2; half++) {
        const int row = first.row + lane_index() / 4 + 8 * half;
        const long place = static_cast<long>(first.slot * problem.m + row) * problem.n + first.column;
        own.start[half] = static_cast<char*>(problem.out) + place * ELEMENT;
        own.inside[half] = row < first.end ? problem.n - first.column : 0;
    }
    UNROLL for (int i = 0; i + line <= SUMS; i += line) {
        write_line(sums + i, own, 0, 2 * i);
        write_line(sums + i, own, 1, 2 * i);
    }
    if constexpr (SUMS % line != 0) {
        write_half_line(sums + SUMS - 8, own, 0, 2 * (SUMS - 8));
        write_half_line(sums + SUMS - 8, own, 1, 2 * (SUMS - 8));
    }
    sync_warp();
}
