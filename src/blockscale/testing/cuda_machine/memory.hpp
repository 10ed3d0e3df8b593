// Shared memory with swizzled boxes, TMA and mbarriers of the pretend Hopper.
#pragma once

#include "machine.hpp"

// What a real descriptor knows: a matrix, the box of one copy, the swizzle.
struct TensorMap {
    char* data;
    long rows, columns;      // of the matrix
    long pitch;              // bytes from one row to the next
    int box_rows, box_columns;
    int element;             // bytes
    int swizzle;             // 0, 32, 64 or 128 bytes
    bool is_weight;          // may be read before the kernel ahead has ended
    long slots;              // matrices one after the other, of an array of three axes
    int dealt;               // rows of a group whose quarters take turns, two rows each
};

namespace machine {

// The address at which TMA and wgmma find what lies at `address` in a swizzled box.
inline u32 swizzle(u32 address, int bytes) {
    if (bytes == 0) return address;
    return address ^ ((address >> 7 & (bytes / UNIT - 1)) * UNIT);
}

inline void check_place(u32 address, u32 bytes) {
    require(address >= SHARED_START && address + bytes <= SHARED_START + launch->shared_bytes,
            "shared memory ends before address " + std::to_string(address));
}

inline void before_read(u32 address, u32 bytes) {
    check_place(address, bytes);
    for (u32 unit = address / UNIT; unit <= (address + bytes - 1) / UNIT; unit++)
        require(own_block().shadow.writing[unit] == 0, "reads what TMA is writing");
}

inline void before_write(u32 address, u32 bytes) {
    before_read(address, bytes);
    for (u32 unit = address / UNIT; unit <= (address + bytes - 1) / UNIT; unit++) {
        require(own_block().shadow.reading[unit] == 0, "overwrites what TMA or wgmma is reading");
        own_block().shadow.unpublished[unit]++;
        self().unfenced.push_back(unit);
    }
}

template <class T>
T read_shared(u32 address) {
    before_read(address, sizeof(T));
    T value;
    std::memcpy(&value, own_block().shared.data() + address, sizeof(T));
    return value;
}

template <class T>
void write_shared(u32 address, T value) {
    require(address % sizeof(T) == 0, "misaligned store");
    before_write(address, sizeof(T));
    std::memcpy(own_block().shared.data() + address, &value, sizeof(T));
}

inline Barrier& barrier_at(Block& block, u32 address) {
    require(block.living > 0, "a barrier of a block that has ended");
    auto found = block.barriers.find(address);
    require(found != block.barriers.end(), "no barrier at " + std::to_string(address));
    return found->second;
}

inline void arrive(Block& block, u32 address, long bytes = 0) {
    Barrier& barrier = barrier_at(block, address);
    require(block.barriers_are_fenced, "barriers are used before fence_barrier_init");
    barrier.bytes += bytes;
    require(--barrier.pending >= 0, "more arrivals than the barrier was made for");
    barrier.complete();
}

inline Block& block_of_rank(u32 rank) {
    require(rank < static_cast<u32>(launch->cluster), "no such block in the cluster");
    return *launch->blocks[own_block().index / launch->cluster * launch->cluster + rank];
}

inline int box_bytes(const TensorMap& map) { return map.box_rows * map.box_columns * map.element; }

inline void check_box(const TensorMap& map, u32 address, int column, int row) {
    require(column >= 0 && row >= 0, "negative coordinates");
    require(address % 128 == 0, "TMA wants 128 bytes of alignment in shared memory");
    require(map.swizzle == 0 || map.box_columns * map.element <= map.swizzle,
            "a row of the box is longer than the swizzle");
    require(map.is_weight || launch->is_ahead_done, "used before the kernel ahead has ended");
    check_place(address, box_bytes(map));
}

// Which row of the matrix the box's row number `r` is.
inline int row_of(const TensorMap& map, int r) {
    const int inside = r % map.dealt, turn = inside / 8, quarter = inside % 8 / 2;
    return r - inside + map.dealt / 4 * quarter + 2 * turn + inside % 2;
}

// Calls visit(address in shared memory, address in the matrix or null) for each element.
template <class Visit>
void for_each_element(const TensorMap& map, u32 address, int column, int row, int slot,
                      Visit visit) {
    char* matrix = map.data + slot * map.rows * map.pitch;
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < map.box_columns; c++) {
            const u32 offset = (r * map.box_columns + c) * map.element;
            const int own = row + row_of(map, r);
            const bool is_inside = own < map.rows && column + c < map.columns;
            char* place = matrix + own * map.pitch + long(column + c) * map.element;
            visit(swizzle(address + offset, map.swizzle), is_inside ? place : nullptr);
        }
}

inline void load(Block& target, const TensorMap& map, u32 address, int column, int row, u32 barrier) {
    check_box(map, address, column, row);
    require(target.living > 0, "copies into a block that has ended");
    barrier_at(target, barrier);
    const u32 first = address / UNIT, last = (address + box_bytes(map) - 1) / UNIT;
    for (u32 unit = first; unit <= last; unit++) {
        require(target.shadow.reading[unit] == 0, "fills a slot that is being read");
        require(target.shadow.writing[unit]++ == 0, "fills a slot twice");
    }
    // NaN, in codes and in scales, until the copy comes.
    std::memset(target.shared.data() + address, 0xff, box_bytes(map));
    target.copies_under_way++;
    launch->copies.push_back([&target, &map, address, column, row, barrier, first, last] {
        for_each_element(map, address, column, row, 0, [&](u32 shared, const char* place) {
            if (place)
                std::memcpy(target.shared.data() + shared, place, map.element);
            else
                std::memset(target.shared.data() + shared, 0, map.element);
        });
        for (u32 unit = first; unit <= last; unit++) target.shadow.writing[unit]--;
        target.copies_under_way--;
        Barrier& waiting = barrier_at(target, barrier);
        waiting.bytes -= box_bytes(map);
        waiting.complete();
    });
}

inline void store(const TensorMap& map, u32 address, int column, int row, int slot = 0) {
    require(slot >= 0 && slot < map.slots, "stores into no slot");
    Block& block = own_block();
    check_box(map, address, column, row);
    require(row < map.rows && column < map.columns, "stores a box with nothing in it");
    const u32 first = address / UNIT, last = (address + box_bytes(map) - 1) / UNIT;
    for (u32 unit = first; unit <= last; unit++) {
        require(block.shadow.unpublished[unit] == 0,
                "stores what was not fenced for TMA, or without the writers' warp meeting after");
        require(block.shadow.writing[unit] == 0, "stores what TMA is writing");
        block.shadow.reading[unit]++;
    }
    if (self().stores.empty() || !self().stores.back()->is_open)
        self().stores.push_back(std::make_shared<StoreGroup>());
    auto group = self().stores.back();
    group->unread++;
    launch->copies.push_back([&block, &map, address, column, row, slot, group, first, last] {
        for_each_element(map, address, column, row, slot, [&](u32 shared, char* place) {
            if (place) std::memcpy(place, block.shared.data() + shared, map.element);
        });
        for (u32 unit = first; unit <= last; unit++) block.shadow.reading[unit]--;
        group->unread--;
    });
}

inline void commit_stores() {
    auto& stores = self().stores;
    if (stores.empty() || !stores.back()->is_open)
        stores.push_back(std::make_shared<StoreGroup>());
    stores.back()->is_open = false;
}

inline void wait_stores(std::size_t pending) {
    auto& stores = self().stores;
    while (stores.size() > pending && !(stores.size() == 1 && stores.back()->is_open)) {
        auto group = stores.front();
        wait_until([group] { return group->unread == 0; }, "stores");
        stores.pop_front();
    }
}

// What lanes write by themselves, in words of four bytes.
inline void store_global(void* address, std::initializer_list<u32> words) {
    const std::size_t bytes = words.size() * sizeof(u32);
    const auto& [start, length, is_weight] = launch->writable;
    char* place = static_cast<char*>(address);
    require(reinterpret_cast<std::size_t>(place) % bytes == 0, "misaligned store");
    require(place >= start && place + bytes <= start + length, "stores outside of the output");
    require(launch->is_ahead_done, "writes before the kernel ahead has ended");
    std::memcpy(place, words.begin(), bytes);
}

template <class T>
T load_global(const T* address) {
    const char* place = reinterpret_cast<const char*>(address);
    for (auto& [start, bytes, is_weight] : launch->readable) {
        if (place < start || place + sizeof(T) > start + bytes) continue;
        require(is_weight || launch->is_ahead_done, "reads before the kernel ahead has ended");
        return *address;
    }
    fail("reads global memory outside of its arrays");
}

}  // namespace machine
