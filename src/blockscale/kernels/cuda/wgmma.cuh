// Warpgroup MMA: 64 x N sums of 32 products of E4M3, operands in shared memory.
#pragma once

// Operands lie as TMA writes them with 128-byte swizzling: rows of 128 bytes, 8 rows after 8 rows.
// A descriptor's lower word has the address (in 16 bytes), its upper word 1024 bytes from 8 rows
// to the next (64 times 16) and the kind of swizzle (PTX ISA, matrix descriptor).
constexpr u32 DESCRIPTOR_UPPER = (1u << 30) | 64;
constexpr u32 DESCRIPTOR_UNIT = 16;

// The lower word for a matrix at a multiple of 1024 bytes; adding to it moves along the matrix.
DEVICE u32 matrix_descriptor(u32 address) { return address / DESCRIPTOR_UNIT; }

// Before the first wgmma on registers that other instructions touched.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last PENDING committed groups of this warpgroup are done.
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving what it knows of these registers across this point; no instruction.
template <int COUNT>
DEVICE void pin(float (&values)[COUNT]) {
    UNROLL for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(values[i])::"memory");
}

// sums (+)= A x B^T; without ACCUMULATE from zero. Results: row lane / 4 of the warp's 16 in
// sums[4 i], sums[4 i + 1] and that + 8 in the next two, columns 8 i + 2 (lane % 4) and + 1.
template <int N, bool ACCUMULATE>
struct Wgmma;

#define D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define D16 D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D24 D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define D32 D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define D40 D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define D48 D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define D56 D48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define D64 D56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define D72 D64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define D80 D72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define D88 D80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define D96 D88 ", %88, %89, %90, %91, %92, %93, %94, %95"

#define S8(i)                                                                                    \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]),   \
        "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SUMS8 S8(0)
#define SUMS16 SUMS8, S8(8)
#define SUMS24 SUMS16, S8(16)
#define SUMS32 SUMS24, S8(24)
#define SUMS40 SUMS32, S8(32)
#define SUMS48 SUMS40, S8(40)
#define SUMS56 SUMS48, S8(48)
#define SUMS64 SUMS56, S8(56)
#define SUMS72 SUMS64, S8(64)
#define SUMS80 SUMS72, S8(72)
#define SUMS88 SUMS80, S8(80)
#define SUMS96 SUMS88, S8(88)

// A, B, UPPER, ACC: numbers of the operands after the sums.
#define WGMMA(columns, count, A, B, UPPER, ACC)                                                  \
    template <bool ACCUMULATE>                                                                   \
    struct Wgmma<columns, ACCUMULATE> {                                                          \
        static DEVICE void multiply(float (&sums)[count], u32 a, u32 b) {                        \
            asm volatile(                                                                        \
                "{\n\t.reg .pred accumulate;\n\t.reg .b64 a, b;\n\t"                             \
                "mov.b64 a, {%" #A ", %" #UPPER "};\n\tmov.b64 b, {%" #B ", %" #UPPER "};\n\t"     \
                "setp.ne.b32 accumulate, %" #ACC ", 0;\n\t"                                      \
                "wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32.e4m3.e4m3 {" D##count      \
                "}, a, b, accumulate, 1, 1;\n\t}"                                                \
                : SUMS##count                                                                    \
                : "r"(a), "r"(b), "n"(DESCRIPTOR_UPPER), "n"(static_cast<int>(ACCUMULATE)));     \
        }                                                                                        \
    };

WGMMA(16, 8, 8, 9, 10, 11)
WGMMA(32, 16, 16, 17, 18, 19)
WGMMA(48, 24, 24, 25, 26, 27)
WGMMA(64, 32, 32, 33, 34, 35)
WGMMA(80, 40, 40, 41, 42, 43)
WGMMA(96, 48, 48, 49, 50, 51)
WGMMA(112, 56, 56, 57, 58, 59)
WGMMA(128, 64, 64, 65, 66, 67)
WGMMA(144, 72, 72, 73, 74, 75)
WGMMA(160, 80, 80, 81, 82, 83)
WGMMA(192, 96, 96, 97, 98, 99)
