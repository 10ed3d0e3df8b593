// Two waves of a consumer at a time: the tensor cores have the next K block's while one is promoted.
// With one, they wait for the FFMAs of a consumer that has no other's waves beside its own: 128x64
// took 8 % more, 64x128 18 % (H100, 2026-11-26, cuda_stores.py). Part of gemm.cu, in whose words it
// is written.
#pragma once

// Whether the loop over K blocks is written out for a whole turn of the ring, from slot 1 on: where a
// slot lies is then a constant, not a chain of instructions that two consumers' waves wait for. 128x64
// took 3 % less, 128x128 4 %; tiles of one consumer 2 % more (H100, 2026-11-26).
constexpr bool UNROLLS = CONSUMERS == 2;
// Pairs of slots until the ring is back where it began.
constexpr u32 PAIRS = STAGES % 2 ? STAGES : STAGES / 2;

// Of a wave that runs.
struct Running {
    Ring ring;
    Scales scales;
};

// Starts the only wave of the next K block.
DEVICE Running start_block(float (&wave)[SUMS], Ring& ring, const Own& own) {
    barrier_wait(ring.full(), ring.parity);
    start_wave(wave, own.a_slots + ring.slot * (A_BYTES / DESCRIPTOR_UNIT),
               own.b_slots + ring.slot * (B_BYTES / DESCRIPTOR_UNIT));
    const Running running{ring, ask_for_scales<1>(ring, own.scales)};
    ring.advance();
    return running;
}

// Ends a wave, but not the PENDING ones that were started after it.
template <int PENDING>
DEVICE void end_block(float (&results)[SUMS], float (&wave)[SUMS], const Running& running,
                      int own_columns) {
    wgmma_wait<PENDING>();
    pin(wave);
    give_back(running.ring);
    promote(results, wave, running.scales, 0, own_columns);
}

// All K blocks of a tile, two waves at a time: the tensor cores have one while another is promoted.
// `begin`: as `multiply_tile`'s.
template <class Begin>
DEVICE void multiply_blocks(float (&results)[SUMS], float (&even)[SUMS], float (&odd)[SUMS],
                            Ring& ring, int k_blocks, const Own& own, const int& own_columns,
                            Begin begin) {
    if (WHEN == When::AT_ONCE) begin(0);
    Running first = start_block(even, ring, own);
    if (WHEN == When::LATE) begin(0);
    const auto two_blocks = [&]() {
        const Running second = start_block(odd, ring, own);
        end_block<1>(results, even, first, own_columns);
        first = start_block(even, ring, own);
        end_block<1>(results, odd, second, own_columns);
    };
    int left = k_blocks - 1;
    for (; left > 1 && (!UNROLLS || ring.slot != 1); left -= 2) two_blocks();
    while (UNROLLS && left > 1) {
        UNROLL for (u32 pair = 0; pair < PAIRS; pair++)
            if (left > 1) {
                ring.slot = (2 * pair + 1) % STAGES;
                two_blocks();
                left -= 2;
            }
    }
    if (left == 1) {
        const Running second = start_block(odd, ring, own);
        end_block<1>(results, even, first, own_columns);
        end_block<0>(results, odd, second, own_columns);
    } else {
        end_block<0>(results, even, first, own_columns);
    }
}
