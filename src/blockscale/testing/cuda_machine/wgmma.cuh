// Warpgroup MMA of the pretend Hopper: sums of E4M3 products in float64, rounded to float32 when
// they are waited for. Operands must not change in between.
#pragma once

constexpr u32 DESCRIPTOR_UNIT = 16;

DEVICE u32 matrix_descriptor(u32 address) {
    machine::require(address % 1024 == 0, "a swizzled matrix starts on 1024 bytes");
    return address / DESCRIPTOR_UNIT;
}

DEVICE void wgmma_fence() {
    machine::meet(machine::own_warp_meeting(), WARP, "wgmma_fence");
    machine::self().is_fenced_for_wgmma = true;
}

namespace machine {

constexpr int WGMMA_K = 32, GROUP_ROWS = 8, GROUP_BYTES = 1024, ROW_BYTES = 128;

inline float e4m3(unsigned char code) {
    static const std::vector<float> values = [] {
        std::vector<float> made(256);
        for (int bits = 0; bits < 256; bits++) {
            const int exponent = bits >> 3 & 15, fraction = bits & 7;
            float value = exponent ? std::ldexp(1 + fraction / 8.0f, exponent - 7)
                                   : std::ldexp(fraction / 8.0f, -6);
            if ((bits & 127) == 127) value = NAN;
            made[bits] = bits & 128 ? -value : value;
        }
        return made;
    }();
    return values[code];
}

// Address of an operand's row, before the swizzle.
inline u32 row_address(u32 descriptor, int row) {
    return descriptor * DESCRIPTOR_UNIT + row / GROUP_ROWS * GROUP_BYTES +
           row % GROUP_ROWS * ROW_BYTES;
}

inline void read_row(u32 descriptor, int row, float (&values)[WGMMA_K]) {
    const u32 start = row_address(descriptor, row);
    check_place(start, WGMMA_K);
    for (int k = 0; k < WGMMA_K; k++)
        values[k] = e4m3(own_block().shared[swizzle(start + k, ROW_BYTES)]);
}

// A warp's rows of A and all of B are read until the warp has waited; `sign` is +1 or -1.
inline void count_reads(const Chain& chain, int sign) {
    Block& block = own_block();
    const int first = self().warp() % 4 * 16;
    auto count = [&](u32 descriptor, int row) {
        const u32 start = row_address(descriptor, row);
        check_place(start, WGMMA_K);
        for (u32 offset = 0; offset < WGMMA_K; offset += UNIT) {
            const u32 unit = swizzle(start + offset, ROW_BYTES) / UNIT;
            require(block.shadow.writing[unit] == 0, "multiplies what TMA is writing");
            block.shadow.reading[unit] += sign;
        }
    };
    for (auto& [a, b] : chain.operands) {
        for (int row = first; row < first + 16; row++) count(a, row);
        for (int row = 0; row < chain.columns; row++) count(b, row);
    }
}

// This thread's sums: rows r and r + 8 of its warp, two of each 8 columns.
inline void finish(Chain& chain) {
    const int lane = self().lane(), first = self().warp() % 4 * 16 + lane / 4;
    std::vector<double> sums(chain.columns / 2);
    if (!chain.from_zero) std::copy_n(chain.sums, sums.size(), sums.begin());
    float upper[WGMMA_K], lower[WGMMA_K], column[WGMMA_K];
    for (auto& [a, b] : chain.operands) {
        read_row(a, first, upper);
        read_row(a, first + 8, lower);
        for (int group = 0; group < chain.columns / 8; group++)
            for (int side = 0; side < 2; side++) {
                read_row(b, group * 8 + lane % 4 * 2 + side, column);
                double above = 0, below = 0;
                for (int k = 0; k < WGMMA_K; k++) {
                    above += double(upper[k]) * column[k];
                    below += double(lower[k]) * column[k];
                }
                sums[4 * group + side] += above;
                sums[4 * group + 2 + side] += below;
            }
    }
    for (std::size_t i = 0; i < sums.size(); i++) chain.sums[i] = static_cast<float>(sums[i]);
}

}  // namespace machine

template <int N, bool ACCUMULATE>
struct Wgmma {
    static void multiply(float (&sums)[N / 2], u32 a, u32 b) {
        auto& thread = machine::self();
        machine::require(thread.is_fenced_for_wgmma, "wgmma without a fence before it");
        auto& chains = thread.chains;
        if (chains.empty() || chains.back().is_committed) {
            for (auto& other : chains)
                machine::require(other.sums != sums, "sums of a wgmma that is not waited for");
            chains.emplace_back();
            chains.back().from_zero = !ACCUMULATE;
            // NaN until it is waited for.
            if (!ACCUMULATE) std::fill_n(sums, N / 2, NAN);
            chains.back().sums = sums;
        }
        auto& chain = chains.back();
        machine::require(chain.operands.empty() || (chain.sums == sums && ACCUMULATE),
                         "two sums in flight");
        chain.columns = N;
        chain.operands.emplace_back(a, b);
    }
};

DEVICE void wgmma_commit() {
    auto& thread = machine::self();
    auto& chain = thread.chains.back();
    chain.is_committed = true;
    thread.is_fenced_for_wgmma = false;
    machine::meet(machine::own_warp_meeting(), WARP, "wgmma_commit",
                  [&chain] { machine::count_reads(chain, 1); });
}

template <int PENDING>
DEVICE void wgmma_wait() {
    auto& chains = machine::self().chains;
    machine::require(!chains.empty() && chains.back().is_committed,
                     "waits for wgmmas that were not committed");
    while (chains.size() > PENDING) {
        auto& chain = chains.front();
        machine::finish(chain);
        machine::meet(machine::own_warp_meeting(), WARP, "wgmma_wait",
                      [&chain] { machine::count_reads(chain, -1); });
        chains.pop_front();
    }
}

template <int COUNT>
DEVICE void pin(float (&)[COUNT]) {}
