// A pretend Hopper: every thread of every block is a fiber; one of them runs at a time, in an order
// that chance decides. Copies run late and in any order. What the hardware forbids is reported, as
// is a wait that cannot end. Memory and TMA: memory.hpp.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr int WARP = 32;

namespace machine {

constexpr std::size_t STACK_BYTES = 64 << 10;
// One in so many primitives lets others run first.
constexpr int YIELD_ONE_IN = 8;
// A slow block has one turn while others have so many.
constexpr int SLOW_ONE_IN = 16;
// Where a block's dynamic shared memory starts.
constexpr u32 SHARED_START = 1024;
constexpr u32 UNIT = 16;  // bytes that one shadow counter stands for

struct Barrier {
    u32 count = 0;
    int pending = 0;
    long bytes = 0;
    u64 phases = 0;

    bool has_ended(u32 parity) const { return phases % 2 != parity; }
    void complete() {
        if (pending == 0 && bytes == 0) {
            phases++;
            pending = static_cast<int>(count);
        }
    }
};

// Threads that meet: the last one acts for all.
struct Meeting {
    std::string what;
    int arrived = 0;
    u64 number = 0;
};

struct StoreGroup {
    int unread = 0;
    bool is_open = true;
};

// wgmmas of one accumulator that are not waited for.
struct Chain {
    float* sums = nullptr;
    int columns = 0;
    bool from_zero = false;
    bool is_committed = false;
    std::vector<std::pair<u32, u32>> operands;
};

struct Block;

struct Thread {
    Block* block;
    int index;
    ucontext_t start;
    jmp_buf state;
    std::unique_ptr<char[]> stack;
    bool has_started = false, is_done = false;
    std::function<bool()> is_ready;
    std::string waits_for;
    std::deque<std::shared_ptr<StoreGroup>> stores;
    std::deque<Chain> chains;
    bool is_fenced_for_wgmma = false;
    // Units of shared memory it wrote: since its last proxy fence, and before that.
    std::vector<u32> unfenced, fenced;

    int lane() const { return index % WARP; }
    int warp() const { return index / WARP; }
};

// Counters for each 16 bytes of shared memory.
struct Shadow {
    std::vector<int> writing, reading, unpublished;
};

struct Block {
    int index;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<unsigned char> shared;
    Shadow shadow;
    std::map<u32, Barrier> barriers;
    bool barriers_are_fenced = true;
    int copies_under_way = 0;
    int living = 0;
    std::vector<Meeting> warp_meetings;
    Meeting block_meeting;
};

// What may be read by a load from global memory; weights before the kernel ahead has ended.
struct Array {
    const char* start;
    std::size_t bytes;
    bool is_weight = false;
};

struct Launch {
    int grid = 0, cluster = 1, threads = 0;
    u32 shared_bytes = 0;
    std::mt19937 chance;
    // Of this run: one copy in so many turns, and a block that seldom gets its turn.
    u32 copy_one_in = 16;
    int slow_block = 0;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Meeting> cluster_meetings;
    std::vector<std::function<void()>> copies;
    // Of the kernel ahead: not run until the threads wait for it, or later.
    std::function<void()> kernel_ahead;
    bool is_ahead_done = false;
    std::vector<Array> readable;
    Array writable;
    std::function<void()> kernel;
    jmp_buf scheduler;
    Thread* running = nullptr;
    std::string failure;
};

inline Launch* launch = nullptr;

inline Thread& self() { return *launch->running; }
inline Block& own_block() { return *self().block; }

inline std::string name_of(const Thread& thread) {
    return "block " + std::to_string(thread.block->index) + " warp " +
           std::to_string(thread.warp()) + " lane " + std::to_string(thread.lane());
}

enum class Return { SWITCHED = 1, FAILED };

[[noreturn]] inline void fail(const std::string& what) {
    if (launch->failure.empty())
        launch->failure = (launch->running ? name_of(self()) + ": " : std::string()) + what;
    longjmp(launch->scheduler, static_cast<int>(Return::FAILED));
}

inline void require(bool holds, const std::string& otherwise) {
    if (!holds) fail(otherwise);
}

inline u32 random_below(u32 bound) { return static_cast<u32>(launch->chance() % bound); }

inline void switch_away() {
    if (_setjmp(self().state) == 0) longjmp(launch->scheduler, static_cast<int>(Return::SWITCHED));
}

inline void maybe_yield() {
    if (random_below(YIELD_ONE_IN) == 0) {
        self().is_ready = nullptr;
        switch_away();
    }
}

inline void wait_until(const std::function<bool()>& is_ready, const std::string& what) {
    if (is_ready()) return;
    self().is_ready = is_ready;
    self().waits_for = what;
    switch_away();
    self().is_ready = nullptr;
}

// What other threads of the meeting wrote is published: TMA may read what was fenced before.
inline void publish(Thread& thread) {
    for (u32 unit : thread.fenced) thread.block->shadow.unpublished[unit]--;
    thread.fenced.clear();
}

// Meet `count` threads; the last to come acts. All must have come for the same thing.
inline void meet(Meeting& meeting, int count, const std::string& what,
                 const std::function<void()>& act = nullptr) {
    if (meeting.arrived == 0) meeting.what = what;
    require(meeting.what == what, "at " + what + " while others are at " + meeting.what);
    publish(self());
    if (++meeting.arrived == count) {
        if (act) act();
        meeting.arrived = 0;
        meeting.number++;
        return;
    }
    const u64 number = meeting.number;
    wait_until([&meeting, number] { return meeting.number != number; }, what);
}

inline Meeting& own_warp_meeting() { return own_block().warp_meetings[self().warp()]; }

inline void run_fiber() {
    launch->kernel();
    Thread& thread = self();
    if (!thread.stores.empty()) fail("ends before its stores are done");
    if (!thread.chains.empty()) fail("ends before its wgmmas are done");
    thread.is_done = true;
    if (--thread.block->living == 0 && thread.block->copies_under_way > 0)
        fail("the block ends while copies into it are under way");
    longjmp(launch->scheduler, static_cast<int>(Return::SWITCHED));
}

// Runs a thread until it waits, yields or ends.
inline void resume(Thread& thread) {
    launch->running = &thread;
    if (thread.has_started) _longjmp(thread.state, 1);
    thread.has_started = true;
    thread.stack.reset(new char[STACK_BYTES]);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = STACK_BYTES;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, run_fiber, 0);
    setcontext(&thread.start);
}

inline std::string all_waits() {
    std::map<std::string, int> found;
    for (auto& block : launch->blocks)
        for (auto& thread : block->threads)
            if (!thread->is_done)
                found["block " + std::to_string(block->index) + " warp " +
                      std::to_string(thread->warp()) + ": " + thread->waits_for]++;
    std::string text = "nothing can go on:";
    for (auto& [what, count] : found) text += "\n  " + what + " (" + std::to_string(count) + ")";
    return text;
}

inline void do_a_copy() {
    std::swap(launch->copies[random_below(static_cast<u32>(launch->copies.size()))],
              launch->copies.back());
    auto copy = std::move(launch->copies.back());
    launch->copies.pop_back();
    copy();
}

inline void end_kernel_ahead() {
    launch->is_ahead_done = true;
    if (launch->kernel_ahead) launch->kernel_ahead();
}

// Unless no other can go on.
inline void leave_out_slow_block(std::vector<Thread*>& round) {
    auto is_other = [](Thread* thread) { return thread->block->index != launch->slow_block; };
    auto slow = std::stable_partition(round.begin(), round.end(), is_other);
    if (slow != round.begin()) round.erase(slow, round.end());
}

// Threads that can go on, in any order; now and then a copy. False when all have ended.
inline bool choose_and_resume(std::vector<Thread*>& round) {
    launch->running = nullptr;
    if (!launch->copies.empty() && random_below(launch->copy_one_in) == 0) do_a_copy();
    if (!launch->is_ahead_done && random_below(4096) == 0) end_kernel_ahead();
    while (!round.empty()) {
        Thread* thread = round.back();
        round.pop_back();
        if (!thread->is_done && (!thread->is_ready || thread->is_ready())) resume(*thread);
    }
    bool is_any_left = false;
    for (auto& block : launch->blocks)
        for (auto& thread : block->threads) {
            if (thread->is_done) continue;
            is_any_left = true;
            if (!thread->is_ready || thread->is_ready()) round.push_back(thread.get());
        }
    if (random_below(SLOW_ONE_IN) != 0) leave_out_slow_block(round);
    std::shuffle(round.begin(), round.end(), launch->chance);
    if (!is_any_left && launch->copies.empty()) return false;
    if (!round.empty()) return true;
    if (!launch->copies.empty()) {
        do_a_copy();
    } else if (!launch->is_ahead_done) {
        end_kernel_ahead();
    } else {
        launch->failure = all_waits();
        return false;
    }
    return true;
}

inline void make_blocks(Launch& made) {
    const u32 units = (SHARED_START + made.shared_bytes) / UNIT + 1;
    made.cluster_meetings.resize(made.grid / made.cluster);
    for (int index = 0; index < made.grid; index++) {
        auto block = std::make_unique<Block>();
        block->index = index;
        block->living = made.threads;
        block->shared.assign(SHARED_START + made.shared_bytes, 0xff);
        for (auto* counters :
             {&block->shadow.writing, &block->shadow.reading, &block->shadow.unpublished})
            counters->assign(units, 0);
        block->warp_meetings.resize(made.threads / WARP);
        for (int number = 0; number < made.threads; number++) {
            block->threads.push_back(std::make_unique<Thread>());
            block->threads.back()->block = block.get();
            block->threads.back()->index = number;
        }
        made.blocks.push_back(std::move(block));
    }
}

// Runs a launch to its end; what went wrong, or nothing.
inline std::string run(Launch& made) {
    make_blocks(made);
    launch = &made;
    made.copy_one_in = 4u << random_below(10);
    made.slow_block = static_cast<int>(random_below(made.grid + 1));
    // Outlives the jumps back to the scheduler.
    auto round = std::make_unique<std::vector<Thread*>>();
    if (setjmp(made.scheduler) != static_cast<int>(Return::FAILED))
        while (choose_and_resume(*round)) {
        }
    launch = nullptr;
    return made.failure;
}

}  // namespace machine
