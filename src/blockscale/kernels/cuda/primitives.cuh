// The instructions of Hopper that gemm.cu is made of, one function each (PTX ISA 8.x, sm_90a).
// No header of the CUDA toolkit is needed, so that NVRTC compiles this wherever it is installed.
// src/blockscale/testing/cuda_machine has the same functions for a pretend Hopper on the CPU.
#pragma once

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, beside) extern "C" __global__ void __launch_bounds__(threads, beside)
#define CONSTANT const __grid_constant__
#define UNROLL _Pragma("unroll")

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int WARP = 32;

// CUtensorMap (cuda.h).
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

// ---- where a thread is

DEVICE int lane_index() { return threadIdx.x % WARP; }

// Uniform for the compiler too: by a shuffle, as threadIdx / 32 is not.
DEVICE int warp_index() { return __shfl_sync(0xffffffff, threadIdx.x / WARP, 0); }

// The first lane's value, uniform for the compiler too. All lanes of a warp.
DEVICE int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

// The largest of a warp's values. All lanes of a warp.
DEVICE int warp_maximum(int value) { return __reduce_max_sync(0xffffffff, value); }

// The sum of a lane's value and of those of all lanes before it. All lanes of a warp.
DEVICE int warp_prefix_sum(int value) {
    UNROLL for (int distance = 1; distance < WARP; distance *= 2) {
        const int before = __shfl_up_sync(0xffffffff, value, distance);
        if (lane_index() >= distance) value += before;
    }
    return value;
}

// True for one lane, always the same. All lanes of a warp. What only this lane does is compiled for
// one thread: asked for by `lane_index() == 0`, each TMA copy is a loop over lanes.
DEVICE bool is_elected() {
    u32 is_it;
    asm volatile(
        "{\n\t.reg .pred elected;\n\t"
        "elect.sync _|elected, 0xffffffff;\n\t"
        "selp.u32 %0, 1, 0, elected;\n\t}"
        : "=r"(is_it));
    return is_it != 0;
}

DEVICE int block_index() { return blockIdx.x; }

DEVICE int grid_size() { return gridDim.x; }

// Address of the block's dynamic shared memory.
DEVICE u32 shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return static_cast<u32>(__cvta_generic_to_shared(memory));
}

// ---- synchronisation

DEVICE void sync_block() { __syncthreads(); }

DEVICE void sync_warp() { __syncwarp(); }

// All threads of the cluster. Of what they wrote before only barriers are sure to be visible, by
// `fence_barrier_init`: `.release` would be a MEMBAR of the whole GPU.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the cluster and to TMA. Without `.shared::cta` the second
// fence is a MEMBAR of the whole GPU: 0.2 to 0.5 us before every kernel's first copy (H100,
// 2026-11-26).
DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" :::
                     "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier in the same place of the cluster's block number `rank`. It says that this
// warp has read a slot, nothing that it wrote: `.release.cluster` would be two MEMBARs in the loop.
DEVICE void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\t"
        "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Arrives, and has the phase wait for so many bytes of copies too.
DEVICE void barrier_arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Whether the phase of this parity has ended.
DEVICE bool barrier_test(u32 barrier, u32 parity) {
    u32 has_ended;
    asm volatile(
        "{\n\t.reg .pred ended;\n\t"
        "mbarrier.test_wait.parity.shared::cta.b64 ended, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, ended;\n\t}"
        : "=r"(has_ended)
        : "r"(barrier), "r"(parity)
        : "memory");
    return has_ended != 0;
}

// Until the phase of this parity has ended.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred ended;\n"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n\t"
        "@!ended bra again;\n\t}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- TMA

DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// How long L2 keeps what is copied: the words that `createpolicy` gives for all of the bytes.
constexpr u64 EVICTED_AS_USUAL = 0x1000000000000000, EVICTED_FIRST = 0x12f0000000000000;

// Copies the box at (column, row) into shared memory; `barrier` counts its bytes.
DEVICE void tma_load(u32 target, const TensorMap& map, int column, int row, u32 barrier,
                     u64 policy = EVICTED_AS_USUAL) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}

// The same into the same place of every block of `ranks` (bits), each with its own barrier.
DEVICE void tma_load_multicast(u32 target, const TensorMap& map, int column, int row, u32 barrier,
                               u16 ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(ranks)
        : "memory");
}

// The same of dealt rows: `group` of them is the first one (driver.py's `encode`).
DEVICE void tma_load_dealt(u32 target, const TensorMap& map, int column, int group, u32 barrier,
                           u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %5, %5, %5, %3}], [%4], %6;" ::"r"(target),
        "l"(&map), "r"(column), "r"(group), "r"(barrier), "r"(0), "l"(policy)
        : "memory");
}

DEVICE void tma_load_dealt_multicast(u32 target, const TensorMap& map, int column, int group,
                                     u32 barrier, u16 ranks) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %5, %5, %5, %3}], [%4], %6;" ::"r"(target),
        "l"(&map), "r"(column), "r"(group), "r"(barrier), "r"(0), "h"(ranks)
        : "memory");
}

// Copies a box from shared memory to (column, row), as a group of its own.
DEVICE void tma_store(const TensorMap& map, u32 source, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                     &map),
                 "r"(source), "r"(column), "r"(row)
                 : "memory");
}

// The same to (column, row, slot) of an array of three axes: nothing outside of the slot is written.
DEVICE void tma_store_in_slot(const TensorMap& map, u32 source, int column, int row, int slot) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            &map),
        "r"(source), "r"(column), "r"(row), "r"(slot)
        : "memory");
}

DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last PENDING groups of this thread have been read from shared memory.
template <int PENDING>
DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Shared memory that this thread wrote may be read by TMA.
DEVICE void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- launches that overlap

DEVICE void wait_for_kernel_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" :::); }

// ---- registers and memory

template <int REGISTERS>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

DEVICE float load_shared(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

DEVICE int load_shared_integer(u32 address) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

DEVICE void store_shared(u32 address, int value) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

DEVICE void store_shared_pair(u32 address, float first, float second) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
                 : "memory");
}

// Four 8x8 matrices of 16 bits; lanes 8 i to 8 i + 7 give the addresses of matrix i's rows.
DEVICE void store_matrices(u32 address, u32 first, u32 second, u32 third, u32 fourth) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(first), "r"(second), "r"(third), "r"(fourth)
                 : "memory");
}

DEVICE float load_global(const float* address) { return __ldg(address); }

DEVICE u32 load_global(const u32* address) { return __ldg(address); }

// What the kernel ahead wrote, after waiting for it: not by __ldg, which is for what nobody writes
// while this kernel lives.
DEVICE int load_global(const int* address) {
    int value;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

DEVICE void store_global(void* address, u32 first, u32 second, u32 third, u32 fourth) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(first), "r"(second),
                 "r"(third), "r"(fourth)
                 : "memory");
}

DEVICE void store_global(void* address, u32 word) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(word) : "memory");
}

DEVICE void store_global(void* address, u32 first, u32 second) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(first), "r"(second)
                 : "memory");
}

// ---- arithmetic

DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Two floats rounded to nearest even, the first in the lower half.
DEVICE u32 to_bfloat16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE u32 to_float16(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE float from_bits(u32 bits) { return __uint_as_float(bits); }

DEVICE u32 to_bits(float value) { return __float_as_uint(value); }

// The float16 in the lower half.
DEVICE float from_float16(u32 bits) {
    float value;
    asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %1;\n\tcvt.f32.f16 %0, low;\n\t}"
        : "=f"(value)
        : "r"(bits));
    return value;
}

#include <wgmma.cuh>
