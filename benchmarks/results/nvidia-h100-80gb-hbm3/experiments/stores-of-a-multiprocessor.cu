// Each warp of a block stores `count` words of 16 bytes a lane; clocks of each block.
extern "C" __global__ void __launch_bounds__(256) stores(char* out, long* clocks, long pitch, long block_bytes, int repeats, int pattern, int wrap) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    char* own = out + blockIdx.x * block_bytes;
    __syncthreads();
    long start; asm volatile("mov.u64 %0, %%clock64;" : "=l"(start) :: "memory");
    for (int r = 0; r < repeats; r++) {
        char* base = own + (long)(r % wrap) * gridDim.x * block_bytes;
#pragma unroll
        for (int i = 0; i < 32; i++) {   // 32 x 512 bytes a warp, 128 KB a block of 8 warps
            char* place;
            if (pattern == 0) place = base + (warp * 32 + i) * 512 + lane * 16;
            else { // 16 rows a warp x 2 waves, 512 bytes a row
                const int row = (i / 16) * 128 + warp * 16 + lane / 4 + 8 * (i % 2), column = i % 16 / 2 * 64 + lane % 4 * 16;
                place = base + row * pitch + column;
            }
            asm volatile("st.global.v4.b32 [%0], {%1,%1,%1,%1};" :: "l"(place), "r"(i) : "memory");
        }
    }
    __threadfence();
    __syncthreads();
    long end; asm volatile("mov.u64 %0, %%clock64;" : "=l"(end) :: "memory");
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
}
// How long a warp waits until its stores are issued, and until a load of shared memory after them returns.
extern "C" __global__ void __launch_bounds__(256) issue(char* out, long* clocks, long pitch, int per_warp) {
    __shared__ int word[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    word[lane] = lane;
    __syncthreads();
    char* own = out + blockIdx.x * 512l;
    long a, b, c;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(a) :: "memory");
    for (int i = 0; i < per_warp; i++) {
        const int row = (i / 16) * 128 + warp * 16 + lane / 4 + 8 * (i % 2), column = i % 16 / 2 * 64 + lane % 4 * 16;
        asm volatile("st.global.v4.b32 [%0], {%1,%1,%1,%1};" :: "l"(own + row * pitch + column), "r"(i) : "memory");
    }
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(b) :: "memory");
    int got; asm volatile("ld.shared.s32 %0, [%1];" : "=r"(got) : "r"((unsigned)__cvta_generic_to_shared(word + lane)) : "memory");
    if (got == 77) out[0] = 1;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(c) :: "memory");
    if (threadIdx.x == 0) { clocks[2 * blockIdx.x] = b - a; clocks[2 * blockIdx.x + 1] = c - a; }
}
