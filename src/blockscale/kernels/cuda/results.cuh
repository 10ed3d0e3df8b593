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

// Columns of a group that one lane holds, and the words of four bytes that they are.
constexpr int QUARTER = DEALT / 4;
constexpr int WORDS = QUARTER * ELEMENT / 4;

// The tile's column of a lane's first sum of a matrix; `i`: that sum.
DEVICE int own_column(int i) {
    return i * 2 / DEALT * DEALT + lane_index() % 4 * QUARTER + i * 2 % DEALT / 4;
}

// Adds the bias to one wave's results, in float32.
DEVICE void add_bias(float (&sums)[SUMS], const Problem& problem, int column) {
    UNROLL for (int i = 0; i < SUMS; i += 4) {
        const int own = column + own_column(i);
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

// Rows of a wave that a lane writes: the upper one and that 8 below; each from the lane's first column
// on, and how many columns from the tile's first one are written.
struct OwnLines {
    char* start[2];
    int inside[2];
};

// One wave's results: a warp writes its 16 rows. Weight rows are dealt such that a lane holds QUARTER
// columns that lie together, and four lanes DEALT. `first` as `write_wave`'s; nothing is written from
// `first.end` on, nor beyond the last column.
DEVICE void write_by_lanes(const float (&sums)[SUMS], const Problem& problem, const Place& first) {
    OwnLines own;
    UNROLL for (int half = 0; half < 2; half++) {
        const int row = first.row + lane_index() / 4 + 8 * half;
        const long line = static_cast<long>(first.slot * problem.m + row) * problem.n;
        const long place = line + first.column + lane_index() % 4 * QUARTER;
        own.start[half] = static_cast<char*>(problem.out) + place * ELEMENT;
        own.inside[half] = row < first.end ? problem.n - first.column : 0;
    }
    UNROLL for (int column = 0; column < COLUMNS; column += DEALT) {
        UNROLL for (int half = 0; half < 2; half++) {
            const float* pairs = sums + column / 2 + 2 * half;
            u32 words[WORDS];
            UNROLL for (int word = 0; word < WORDS; word++)
                words[word] = OUTPUT == Output::FLOAT32
                                  ? to_bits(pairs[word / 2 * 4 + word % 2])
                                  : rounded(pairs[4 * word], pairs[4 * word + 1]);
            char* place = own.start[half] + column * ELEMENT;
            if (column >= own.inside[half]) continue;
            if constexpr (WORDS == 4)
                store_global(place, words[0], words[1], words[2], words[3]);
            else if constexpr (WORDS == 2)
                store_global(place, words[0], words[1]);
            else
                store_global(place, words[0]);
        }
    }
    sync_warp();
}
