// The quotients of kernels/triton/arithmetic.py against the rule, code for code. Prints how many differ.
//   division half BITS LOW_PARTS   dividends and largest magnitudes with BITS mantissa bits, all of them;
//                                  LOW_PARTS 0 leaves the second part of the reciprocal out
//   division float STEP            every STEP-th divisor's mantissa, dividends beside the borders of codes
//   division scale STEP            every STEP-th largest magnitude's mantissa over 448
//   division sum BITS              pairs of halves: rounded once, and by way of float32
// Exponents do not matter where every operation scales exactly; where one does not, they are tried.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The E4M3 code of a quotient in [0, 464), ties to even.
static int code(float quotient) {
    if (quotient < 0x1p-6f) return (int)nearbyintf(quotient * 512.0f);
    uint32_t bits = bits_of(quotient);
    bits += 0x7ffffu + ((bits >> 20) & 1u);
    return (int)(bits >> 20) - (120 << 3);
}

// Every dividend up to `largest` whose code may be other than zero, for each guess of 1 / scale that
// rcp.approx may give: at most 2**-23 off for a divisor in [1, 2].
static long in_block(float largest, int bits, int low_parts) {
    float scale = largest / 448.0f;
    long wrong = 0;
    for (int off = -2; off <= 2; off++) {
        float high = from_bits(bits_of(1.0f / scale) + (uint32_t)off) * (1.0f - 0x1p-20f);
        float low = fminf(fmaf(-scale, high, 1.0f), 1.0f) * high * (float)low_parts;
        wrong += !(low >= 0.0f);
        int top = (int)(bits_of(largest) >> 23);
        for (int exponent = top > 19 ? top - 19 : 1; exponent <= top; exponent++)
            for (uint32_t mantissa = 0; mantissa < 1u << bits; mantissa++) {
                float dividend = from_bits((uint32_t)exponent << 23 | mantissa << (23 - bits));
                if (dividend > largest) break;
                float quotient = fmaf(dividend, high, dividend * low);
                wrong += code(quotient) != code(dividend / scale);
            }
    }
    return wrong;
}

// Magnitudes of bfloat16 are any float32's, where low parts become subnormal at the top; those of
// float16 scale exactly.
static long halves(int bits, int low_parts) {
    int is_wide = bits == 7;
    long wrong = is_wide ? in_block(1e-10f, bits, low_parts) : 0;
    for (int exponent = is_wide ? 93 : 127; exponent <= (is_wide ? 254 : 127); exponent++) {
        if (exponent > 95 && exponent < 220 && exponent != 127) continue;
        for (uint32_t mantissa = 0; mantissa < 1u << bits; mantissa++) {
            float largest = from_bits((uint32_t)exponent << 23 | mantissa << (23 - bits));
            if (largest >= 1e-10f) wrong += in_block(largest, bits, low_parts);
        }
    }
    return wrong;
}

// The corrected quotient and the rounded one are less than two ulp from the exact one: only dividends
// within three ulp of border * divisor could get another code.
static long floats(uint32_t step) {
    long wrong = 0;
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += step) {
        float divisor = from_bits(0x3f800000u | mantissa), reciprocal = 1.0f / divisor;
        for (int sixteenths = 16; sixteenths < 32; sixteenths++) {
            float border = (float)sixteenths / 16.0f;
            uint32_t nearest = bits_of(border * divisor);
            for (int off = -3; off <= 3; off++) {
                float dividend = from_bits(nearest + (uint32_t)off);
                float exact = dividend / divisor, quotient = dividend * reciprocal;
                float excess = fmaf(quotient, divisor, -dividend);
                quotient = fmaf(excess, -reciprocal, quotient);
                int side = (exact > border) - (exact < border);
                wrong += side != (quotient > border) - (quotient < border);
            }
        }
    }
    return wrong;
}

static long scales(uint32_t step) {
    float high = 0x1.249248p-9f, low = (float)(1.0 / 448.0 - (double)high);
    long wrong = 0;
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += step) {
        float largest = from_bits(0x3f800000u | mantissa);
        wrong += fmaf(largest, high, largest * low) != largest / 448.0f;
    }
    return wrong;
}

// Integers that stand for mantissas: `value` to `bits` significant bits, ties to even.
static int64_t rounded(int64_t value, int bits) {
    uint64_t magnitude = (uint64_t)(value < 0 ? -value : value);
    int surplus = 64 - (magnitude ? __builtin_clzll(magnitude) : 63) - bits;
    if (surplus <= 0) return value;
    uint64_t kept = magnitude >> surplus, lost = magnitude & ((1ull << surplus) - 1);
    uint64_t middle = 1ull << (surplus - 1);
    kept += lost > middle || (lost == middle && (kept & 1));
    return value < 0 ? -(int64_t)(kept << surplus) : (int64_t)(kept << surplus);
}

// Exponents up to 30 apart: beyond, neither rounding sees the smaller one.
static long sums(int bits) {
    int digits = bits + 1;
    long wrong = 0;
    for (int apart = 0; apart <= 30; apart++)
        for (int64_t one = 1 << bits; one < 1 << digits; one++)
            for (int64_t other = 1 << bits; other < 1 << digits; other++)
                for (int sign = -1; sign <= 1; sign += 2) {
                    int64_t sum = (one << apart) + sign * other;
                    wrong += rounded(sum, digits) != rounded(rounded(sum, 24), digits);
                }
    return wrong;
}

int main(int count, char **arguments) {
    if (count < 3) return 2;
    int number = atoi(arguments[2]);
    long wrong;
    if (!strcmp(arguments[1], "half") && count == 4) wrong = halves(number, atoi(arguments[3]));
    else if (!strcmp(arguments[1], "float")) wrong = floats((uint32_t)number);
    else if (!strcmp(arguments[1], "scale")) wrong = scales((uint32_t)number);
    else if (!strcmp(arguments[1], "sum")) wrong = sums(number);
    else return 2;
    printf("%ld\n", wrong);
    return 0;
}
