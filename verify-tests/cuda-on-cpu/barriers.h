// Barriers of a block and of a cluster, barriers in memory, and the copies that these count: how they work.
#pragma once
#include "threads.h"

namespace emu {

inline void release_barrier(Block& block, unsigned id) {
    for (unsigned i = 0; i < block.n_threads; i++) {
        Thread& thread = block.threads[i];
        if (thread.waits == Wait::Barrier && thread.barrier == id) wake(thread);
    }
    if (id == 0) block.votes = block.barriers[id].votes;
    block.barriers[id] = {0, 0, 0};
}

inline bool is_full(const Block& block, unsigned id) {
    const Barrier& barrier = block.barriers[id];
    return barrier.arrived && barrier.arrived == (barrier.expected == ALL_THREADS ? block.live : barrier.expected);
}

// One thread more at a barrier for `expected` threads, or for ALL_THREADS, with a vote.
inline void count_at_barrier(unsigned id, unsigned expected, bool vote = false) {
    Block& block = *current->block;
    if (id >= BARRIERS) fail("there is no barrier %u", id);
    if (expected % LANES) fail("barrier %u is for %u threads: not a multiple of %u", id, expected, LANES);
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived && barrier.expected != expected) {
        fail("barrier %u is for %u threads here, for %u elsewhere", id, expected, barrier.expected);
    }
    barrier.expected = expected;
    barrier.arrived++;
    barrier.votes += vote;
}

void barrier(unsigned id, unsigned expected, bool vote) {
    count_at_barrier(id, expected, vote);
    if (is_full(*current->block, id)) return release_barrier(*current->block, id);
    current->barrier = (unsigned char)id;
    wait_for(Wait::Barrier);
}

void barrier_arrive(unsigned id, unsigned expected) {
    count_at_barrier(id, expected);
    if (is_full(*current->block, id)) release_barrier(*current->block, id);
}

// Calls `f` with each thread of the cluster.
template <class F>
inline void for_threads(F f) {
    for (unsigned rank = 0; rank < current_launch.cluster; rank++) {
        for (unsigned i = 0; i < cluster[rank]->n_threads; i++) f(cluster[rank]->threads[i]);
    }
}

// Every thread that lives must have arrived, once, for the others to go on.
inline bool release_cluster() {
    if (!cluster_arrived || cluster_arrived != cluster_live) return false;
    cluster_arrived = 0;
    cluster_phase++;
    for_threads([](Thread& thread) {
        if (thread.waits == Wait::Cluster) wake(thread);
    });
    return true;
}

void cluster_arrive() {
    if (current->cluster_phase) fail("cluster_arrive: the thread has not waited since it arrived");
    current->cluster_phase = cluster_phase + 1;
    cluster_arrived++;
    release_cluster();
}

void cluster_wait() {
    if (!current->cluster_phase) fail("cluster_wait: the thread has not arrived");
    if (current->cluster_phase > cluster_phase) wait_for(Wait::Cluster);
    current->cluster_phase = 0;
}

// ---- barriers in memory, and copies under way

// Stores a barrier; its phase ends when nothing is missing, and those who wait for it go on.
inline void update_memory_barrier(uint64_t* word, MemoryBarrier barrier) {
    const bool ends = barrier.missing == 0 && barrier.bytes == 0;
    if (ends) {
        barrier.phase = !barrier.phase;
        barrier.missing = barrier.count;
    }
    barrier.write(word);
    if (!ends) return;
    for_threads([word](Thread& thread) {
        if (thread.waits == Wait::Memory && thread.memory == word) wake(thread);
    });
}

void arrive_at_memory_barrier(const char* name, uint64_t* word, unsigned bytes) {
    MemoryBarrier barrier = MemoryBarrier::read(word);
    if (!barrier.missing) fail("%s: more arrivals than the mbarrier counts", name);
    barrier.missing--;
    barrier.bytes += (int)bytes;
    update_memory_barrier(word, barrier);
}

void note(const Copy& copy) {
    Thread& self = *current;
    if (self.n_copies == self.copy_capacity) {
        self.copy_capacity = self.copy_capacity ? 2 * self.copy_capacity : 16;
        self.copies = (Copy*)realloc(self.copies, self.copy_capacity * sizeof(Copy));
    }
    self.copies[self.n_copies++] = copy;
}

void carry_out(Thread& thread, unsigned n) {
    for (unsigned i = 0; i < n; i++) {
        const Copy copy = thread.copies[i];
        if (copy.barrier) {
            thread.n_arrivals--;
            n_arrivals--;
            arrive_at_memory_barrier("cp_async_arrive", copy.barrier, 0);
        } else if (copy.from) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    thread.n_copies -= n;
    memmove(thread.copies, thread.copies + n, thread.n_copies * sizeof(Copy));
}

// Carries out the copies of some thread up to the first arrival that waits for them. There must be one.
inline void deliver_arrival() {
    const unsigned rank = random_below(current_launch.cluster), first = random_below(cluster[0]->n_threads);
    for (unsigned b = 0; b < current_launch.cluster; b++) {
        Block& block = *cluster[(rank + b) % current_launch.cluster];
        for (unsigned i = 0; i < block.n_threads; i++) {
            Thread& thread = block.threads[(first + i) % block.n_threads];
            if (!thread.n_arrivals) continue;
            unsigned n = 0;
            while (!thread.copies[n++].barrier) {}
            return carry_out(thread, n);
        }
    }
}

// Carries out the bulk copy `i`.
inline void deliver_bulk(unsigned i) {
    const BulkCopy copy = bulk_copies[i];
    for (unsigned later = i + 1; later < n_bulk_copies; later++) bulk_copies[later - 1] = bulk_copies[later];
    n_bulk_copies--;
    memcpy(copy.to, copy.from ? copy.from : copy.data, copy.bytes);
    MemoryBarrier barrier = MemoryBarrier::read(copy.barrier);
    barrier.bytes -= (int)copy.bytes;
    update_memory_barrier(copy.barrier, barrier);
}

void start_bulk(const BulkCopy& copy) {
    if (n_bulk_copies == MAX_BULK_COPIES) deliver_bulk(random_below(n_bulk_copies));
    bulk_copies[n_bulk_copies++] = copy;
    if (chance(4)) deliver_bulk(n_bulk_copies - 1);
}

// Carries out some copy that a barrier in memory waits for; false if there is none.
inline bool deliver() {
    if (!n_bulk_copies && !n_arrivals) return false;
    if (n_arrivals && (!n_bulk_copies || chance(2))) deliver_arrival();
    else deliver_bulk(random_below(n_bulk_copies));
    return true;
}

} // namespace emu
