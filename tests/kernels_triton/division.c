// Does one FMA correction make dividend * (1 / divisor) the correctly rounded quotient?
//   division BITS STEP: dividends with BITS mantissa bits, every STEP-th float32 divisor mantissa.
// Exponents do not matter: every operation scales exactly. Prints how many pairs differ.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float with_mantissa(uint32_t mantissa) {
    uint32_t bits = 0x3f800000u | mantissa;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    int bits = atoi(arguments[1]);
    uint32_t step = (uint32_t)atoi(arguments[2]);
    long wrong = 0;
    for (uint32_t high = 0; high < 1u << bits; high++) {
        float dividend = with_mantissa(high << (23 - bits));
        long found = 0;
        for (uint32_t low = 0; low < 1u << 23; low += step) {
            float divisor = with_mantissa(low);
            float reciprocal = 1.0f / divisor;
            float quotient = dividend * reciprocal;
            float excess = __builtin_fmaf(quotient, divisor, -dividend);
            quotient = __builtin_fmaf(excess, -reciprocal, quotient);
            found += quotient != dividend / divisor;
        }
        wrong += found;
    }
    printf("%ld\n", wrong);
    return 0;
}
