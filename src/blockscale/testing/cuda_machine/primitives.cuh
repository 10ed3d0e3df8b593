// The functions of kernels/cuda/primitives.cuh for the pretend Hopper: what they mean stands there.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "memory.hpp"

#define DEVICE inline
#define KERNEL(threads, beside) static void
#define CONSTANT const
#define UNROLL

DEVICE int lane_index() { return machine::self().lane(); }

DEVICE int warp_index() { return machine::self().warp(); }

// Values of a warp's lanes while they meet; what `of_all` makes of them.
template <class OfAll>
int meet_with(int value, const char* what, OfAll of_all) {
    struct Given {
        int values[WARP];
        int result;
    };
    static std::map<machine::Meeting*, Given> all;
    machine::Meeting& meeting = machine::own_warp_meeting();
    Given& given = all[&meeting];
    given.values[lane_index()] = value;
    machine::meet(meeting, WARP, what, [&] { given.result = of_all(given.values); });
    return given.result;
}

DEVICE int uniform(int value) {
    return meet_with(value, "uniform", [](const int (&values)[WARP]) { return values[0]; });
}

DEVICE int warp_maximum(int value) {
    return meet_with(value, "warp_maximum", [](const int (&values)[WARP]) {
        return *std::max_element(values, values + WARP);
    });
}

DEVICE int warp_prefix_sum(int value) {
    static std::map<machine::Meeting*, std::array<int, WARP>> all;
    auto& sums = all[&machine::own_warp_meeting()];
    const int lane = lane_index();
    meet_with(value, "warp_prefix_sum", [&sums](const int (&values)[WARP]) {
        std::partial_sum(values, values + WARP, sums.begin());
        return 0;
    });
    return sums[lane];
}

DEVICE bool is_elected() {
    machine::meet(machine::own_warp_meeting(), WARP, "is_elected");
    return lane_index() == 0;
}

DEVICE int block_index() { return machine::own_block().index; }

DEVICE int grid_size() { return machine::launch->grid; }

DEVICE u32 shared_memory() { return machine::SHARED_START; }

DEVICE void sync_block() {
    machine::meet(machine::own_block().block_meeting, machine::launch->threads, "sync_block");
}

DEVICE void sync_warp() { machine::meet(machine::own_warp_meeting(), WARP, "sync_warp"); }

DEVICE void sync_cluster() {
    const int cluster = machine::launch->cluster;
    machine::meet(machine::launch->cluster_meetings[block_index() / cluster],
                  cluster * machine::launch->threads, "sync_cluster");
}

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    machine::check_place(barrier, 8);
    machine::require(barrier % 8 == 0, "misaligned barrier");
    machine::own_block().barriers_are_fenced = false;
    auto& made = machine::own_block().barriers;
    machine::require(made.count(barrier) == 0, "a barrier is initialised twice");
    made[barrier] = {arrivals, static_cast<int>(arrivals), 0, 0};
}

DEVICE void fence_barrier_init() { machine::own_block().barriers_are_fenced = true; }

DEVICE void barrier_arrive(u32 barrier) {
    machine::maybe_yield();
    machine::arrive(machine::own_block(), barrier);
}

DEVICE void barrier_arrive_at(u32 barrier, u32 rank) {
    machine::maybe_yield();
    machine::arrive(machine::block_of_rank(rank), barrier);
}

DEVICE void barrier_arrive_expecting(u32 barrier, u32 bytes) {
    machine::maybe_yield();
    machine::arrive(machine::own_block(), barrier, bytes);
}

DEVICE bool barrier_test(u32 barrier, u32 parity) {
    machine::maybe_yield();
    return machine::barrier_at(machine::own_block(), barrier).has_ended(parity);
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    machine::maybe_yield();
    machine::Barrier& found = machine::barrier_at(machine::own_block(), barrier);
    machine::wait_until([&found, parity] { return found.has_ended(parity); },
                        "barrier at " + std::to_string(barrier) + ", parity " +
                            std::to_string(parity));
}

DEVICE void prefetch_map(const TensorMap&) {}

// What a real Hopper's L2 keeps for how long; here it has none.
constexpr u64 EVICTED_AS_USUAL = 0, EVICTED_FIRST = 1;

DEVICE void tma_load(u32 target, const TensorMap& map, int column, int row, u32 barrier,
                     u64 = EVICTED_AS_USUAL) {
    machine::maybe_yield();
    machine::load(machine::own_block(), map, target, column, row, barrier);
}

DEVICE void tma_load_multicast(u32 target, const TensorMap& map, int column, int row, u32 barrier,
                               u16 ranks) {
    machine::maybe_yield();
    for (u32 rank = 0; ranks >> rank; rank++)
        if (ranks >> rank & 1)
            machine::load(machine::block_of_rank(rank), map, target, column, row, barrier);
}

DEVICE void tma_load_dealt(u32 target, const TensorMap& map, int column, int group, u32 barrier,
                           u64 policy) {
    machine::require(map.rows % map.dealt == 0, "rows are dealt in whole groups");
    tma_load(target, map, column, group * map.dealt, barrier, policy);
}

DEVICE void tma_load_dealt_multicast(u32 target, const TensorMap& map, int column, int group,
                                     u32 barrier, u16 ranks) {
    machine::require(map.rows % map.dealt == 0, "rows are dealt in whole groups");
    tma_load_multicast(target, map, column, group * map.dealt, barrier, ranks);
}

DEVICE void tma_store(const TensorMap& map, u32 source, int column, int row) {
    machine::maybe_yield();
    machine::store(map, source, column, row);
}

DEVICE void tma_store_in_slot(const TensorMap& map, u32 source, int column, int row, int slot) {
    machine::maybe_yield();
    machine::store(map, source, column, row, slot);
}

DEVICE void tma_store_commit() { machine::commit_stores(); }

template <int PENDING>
DEVICE void tma_store_wait_read() {
    machine::wait_stores(PENDING);
}

DEVICE void fence_for_tma() {
    auto& thread = machine::self();
    thread.fenced.insert(thread.fenced.end(), thread.unfenced.begin(), thread.unfenced.end());
    thread.unfenced.clear();
}

DEVICE void wait_for_kernel_ahead() {
    machine::wait_until([] { return machine::launch->is_ahead_done; }, "the kernel ahead");
}

DEVICE void let_next_kernel_start() {}

// Every warp of a warpgroup must come here; that all come with one number is the template's doing.
template <int REGISTERS>
DEVICE void take_registers() {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "setmaxnreg");
    sync_warp();
}

template <int REGISTERS>
DEVICE void give_registers() {
    take_registers<REGISTERS>();
}

DEVICE float load_shared(u32 address) { return machine::read_shared<float>(address); }

DEVICE int load_shared_integer(u32 address) { return machine::read_shared<int>(address); }

DEVICE void store_shared(u32 address, int value) { machine::write_shared(address, value); }

DEVICE void store_shared_pair(u32 address, float first, float second) {
    struct Pair {
        float first, second;
    };
    machine::write_shared(address, Pair{first, second});
}

DEVICE void store_matrices(u32 address, u32 first, u32 second, u32 third, u32 fourth) {
    struct Given {
        u32 address[WARP];
        u32 values[WARP][4];
    };
    static std::map<machine::Meeting*, Given> all;
    machine::Meeting& meeting = machine::own_warp_meeting();
    Given& given = all[&meeting];
    const int lane = lane_index();
    given.address[lane] = address;
    const u32 values[] = {first, second, third, fourth};
    std::copy(values, values + 4, given.values[lane]);
    machine::meet(meeting, WARP, "store_matrices", [&given] {
        for (int row = 0; row < WARP; row++)
            for (int pair = 0; pair < 4; pair++)
                machine::write_shared(given.address[row] + 4 * pair,
                                      given.values[row % 8 * 4 + pair][row / 8]);
        // The last lane wrote for all: each of them must fence what it wrote itself.
        auto& writer = machine::self();
        auto& threads = writer.block->threads;
        const auto mine = std::move(writer.unfenced);
        writer.unfenced.clear();
        for (std::size_t i = 0; i < mine.size(); i++)
            threads[writer.warp() * WARP + i % WARP]->unfenced.push_back(mine[i]);
    });
}

template <class T>
DEVICE T load_global(const T* address) {
    return machine::load_global(address);
}

DEVICE void store_global(void* address, u32 first, u32 second, u32 third, u32 fourth) {
    machine::store_global(address, {first, second, third, fourth});
}

DEVICE void store_global(void* address, u32 word) { machine::store_global(address, {word}); }

DEVICE void store_global(void* address, u32 first, u32 second) {
    machine::store_global(address, {first, second});
}

DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

// Rounds to nearest even, as the conversion instructions do.
DEVICE u32 to_bfloat16(float low, float high) {
    auto one = [](float value) -> u32 {
        u32 bits;
        std::memcpy(&bits, &value, 4);
        if (std::isnan(value)) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return one(low) | one(high) << 16;
}

DEVICE u32 to_float16(float low, float high) {
    auto one = [](float value) -> u32 {
        const _Float16 half = static_cast<_Float16>(value);
        u16 bits;
        std::memcpy(&bits, &half, 2);
        return bits;
    };
    return one(low) | one(high) << 16;
}

DEVICE float from_bits(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

DEVICE u32 to_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

DEVICE float from_float16(u32 bits) {
    const u16 half = static_cast<u16>(bits);
    _Float16 value;
    std::memcpy(&value, &half, 2);
    return static_cast<float>(value);
}

#include "wgmma.cuh"
