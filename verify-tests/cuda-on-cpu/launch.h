// A launch of a kernel: its clusters of blocks one after the other, in any order.
#pragma once
#include "barriers.h"

namespace emu {

// Ends the running thread.
__attribute__((noreturn)) inline void end_thread() {
    Thread& self = *current;
    if (self.cluster_phase) fail("the thread ends while the cluster's barrier counts it");
    Warp& warp = *self.warp;
    const unsigned bit = 1u << self.lane;
    warp.live &= ~bit;
    warp.can_run &= ~bit;
    self.block->live--;
    cluster_live--;
    // Lanes that waited for this one need not any more.
    for (unsigned rest = warp.arrived; rest; rest &= rest - 1) {
        const unsigned lane = __builtin_ctz(rest);
        if ((warp.at[lane].mask & bit) && is_complete(warp, lane)) {
            complete(warp, lane);
            break;
        }
    }
    leave(next_lane(warp));
    abort(); // an ended thread is not chosen again
}

inline void thread_entry() {
    current_launch.body(current_launch.arguments);
    end_thread();
}

// Ends the process if the warp, none of whose lanes can run, will never run again.
inline void check_divergence(Warp& warp) {
    for (unsigned rest = warp.arrived; rest; rest &= rest - 1) {
        const unsigned lane = __builtin_ctz(rest);
        for (unsigned missing = warp.at[lane].mask & warp.live & ~warp.arrived; missing; missing &= missing - 1) {
            const Thread& other = warp.threads[__builtin_ctz(missing)];
            if (other.waits == Wait::Memory) continue;
            current = &warp.threads[lane];
            fail("divergent: at %s (mask %08x), but lane %u is %s", warp.at[lane].name, warp.at[lane].mask, other.lane,
                 name_of(other.waits));
        }
    }
}

__attribute__((noreturn)) inline void deadlock() {
    current = nullptr;
    for_threads([](Thread& thread) {
        if (!current && thread.waits != Wait::None) current = &thread;
    });
    unsigned waiting[5] = {};
    for_threads([&waiting](Thread& thread) {
        if (thread.warp->live >> thread.lane & 1) waiting[(int)thread.waits]++;
    });
    fail("deadlock: of %u threads %u are at a warp operation, %u at a barrier of their block, %u at the cluster's "
         "barrier, %u waiting for an mbarrier; this one is %s",
         cluster_live, waiting[1], waiting[2], waiting[3], waiting[4], current ? name_of(current->waits) : "");
}

inline Block* make_block() {
    Block* block = (Block*)calloc(1, sizeof(Block));
    const size_t threads = MAX_THREADS * sizeof(Thread), warps = MAX_THREADS / LANES * sizeof(Warp);
    block->threads = (Thread*)memset(aligned_alloc(alignof(Thread), threads), 0, threads);
    block->warps = (Warp*)calloc(1, warps);
    for (unsigned i = 0; i < MAX_THREADS; i++) {
        block->threads[i].block = block;
        block->threads[i].warp = &block->warps[i / LANES];
        block->threads[i].lane = i % LANES;
    }
    for (unsigned i = 0; i < MAX_THREADS / LANES; i++) {
        block->warps[i].block = block;
        block->warps[i].threads = &block->threads[i * LANES];
    }
    return block;
}

void free_block(Block* block) {
    if (!block) return;
    for (unsigned i = 0; i < MAX_THREADS; i++) {
        block->threads[i].stack.release();
        free(block->threads[i].copies);
    }
    free(block->threads);
    free(block->warps);
    free(block->static_shared);
    block->shared.release();
    free(block);
}

// Makes a block ready to run from the beginning.
inline void start_block(Block& block, uint3 index, unsigned rank) {
    constexpr size_t STACK = 64 << 10;
    const dim3 size = current_launch.block;
    block.index = index;
    block.rank = rank;
    block.n_threads = block.live = size.x * size.y * size.z;
    block.n_warps = (block.n_threads + LANES - 1) / LANES;
    block.votes = 0;
    memset(block.barriers, 0, sizeof block.barriers);
    if (block.shared.bytes != current_launch.shared_bytes) {
        block.shared.release();
        if (current_launch.shared_bytes) block.shared = Guarded::allocate(current_launch.shared_bytes, 1024);
    }
    if (block.shared.bytes) block.shared.poison();
    block.static_shared = (unsigned char*)realloc(block.static_shared, static_shared_bytes() + 1);
    memset(block.static_shared, POISON, static_shared_bytes());
    for (unsigned i = 0; i < block.n_warps; i++) block.warps[i].live = block.warps[i].arrived = 0;
    for (unsigned i = 0; i < block.n_threads; i++) {
        Thread& thread = block.threads[i];
        if (!thread.stack.begin) thread.stack = Guarded::allocate(STACK, 4096);
        // Stacks begin at different places of their pages, or they would all meet in a few lines of the cache.
        thread.context.start(thread.stack.begin, STACK - i % LANES * 128, thread_entry);
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        thread.waits = Wait::None;
        thread.n_copies = thread.n_arrivals = thread.group = thread.cluster_phase = 0;
        thread.warp->live |= 1u << thread.lane;
        thread.warp->can_run = thread.warp->live;
    }
}

// Lets go on whom nobody has let go on yet; false if there is no such.
inline bool unblock() {
    // Threads that ended since may have been the last that a barrier waited for.
    for (unsigned rank = 0; rank < current_launch.cluster; rank++) {
        for (unsigned id = 0; id < BARRIERS; id++) {
            if (is_full(*cluster[rank], id)) {
                release_barrier(*cluster[rank], id);
                return true;
            }
        }
    }
    if (release_cluster()) return true;
    return deliver();
}

// Puts the static variables of `next` in place of those of `last`, which may be null.
inline void exchange_static_shared(Block* last, Block* next) {
    if (last == next || static_shared_bytes() == 0) return;
    if (last) memcpy(last->static_shared, __start_emu_shared, static_shared_bytes());
    memcpy(__start_emu_shared, next->static_shared, static_shared_bytes());
}

// Runs the blocks of `cluster` to their end.
inline void run_cluster() {
    Block* last = nullptr;
    Warp* warps[MAX_CLUSTER * MAX_THREADS / LANES];
    unsigned n_warps = 0;
    for (unsigned rank = 0; rank < current_launch.cluster; rank++) {
        for (unsigned i = 0; i < cluster[rank]->n_warps; i++) warps[n_warps++] = &cluster[rank]->warps[i];
    }
    while (cluster_live) {
        bool moved = false;
        shuffle(warps, n_warps);
        for (unsigned i = 0; i < n_warps; i++) {
            current = next_lane(*warps[i]);
            if (!current) continue;
            moved = true;
            exchange_static_shared(last, current->block);
            last = current->block;
            scheduler.switch_to(current->context);
            current = nullptr;
            if (!warps[i]->can_run) check_divergence(*warps[i]);
            if (chance(4)) deliver();
        }
        if (!moved && cluster_live && !unblock()) deadlock();
    }
    if (n_bulk_copies) fail("ended with %u bulk copies under way", n_bulk_copies);
    for (unsigned rank = 0; rank < current_launch.cluster; rank++) {
        if (cluster[rank]->shared.bytes && !cluster[rank]->shared.is_intact()) {
            fail("block (%u, %u, %u) wrote behind its dynamic shared memory", cluster[rank]->index.x,
                 cluster[rank]->index.y, cluster[rank]->index.z);
        }
    }
}

void run(const Launch& launch) {
    current_launch = launch;
    current = nullptr;
    random_state = launch.seed * 0x9e3779b97f4a7c15ull;
    n_bulk_copies = n_arrivals = 0;
    const dim3 grid = launch.grid, block = launch.block;
    const size_t threads = (size_t)block.x * block.y * block.z, blocks = (size_t)grid.x * grid.y * grid.z;
    const size_t static_shared = static_shared_bytes();
    if (threads == 0 || threads > MAX_THREADS) fail("%zu threads in a block", threads);
    if (blocks == 0 || grid.y > 65535 || grid.z > 65535) fail("a grid of %u x %u x %u", grid.x, grid.y, grid.z);
    if (launch.cluster == 0 || launch.cluster > MAX_CLUSTER || grid.x % launch.cluster) {
        fail("clusters of %u blocks in a grid of %u", launch.cluster, grid.x);
    }
    if (launch.shared_bytes + static_shared > (227 << 10)) {
        fail("%u + %zu bytes of shared memory", launch.shared_bytes, static_shared);
    }
    for (unsigned rank = 0; rank < launch.cluster; rank++) {
        if (!launch.machine->blocks[rank]) launch.machine->blocks[rank] = make_block();
        cluster[rank] = launch.machine->blocks[rank];
    }

    // Signals are handled on a stack of their own: a thread's may be full.
    static unsigned char signal_stack[64 << 10];
    stack_t on_signal = {}, stack_before;
    on_signal.ss_sp = signal_stack;
    on_signal.ss_size = sizeof signal_stack;
    sigaltstack(&on_signal, &stack_before);
    launch.machine->print_place = print_place;

    const unsigned clusters = (unsigned)(blocks / launch.cluster);
    unsigned* order = (unsigned*)malloc(clusters * sizeof(unsigned));
    for (unsigned i = 0; i < clusters; i++) order[i] = i;
    shuffle(order, clusters);
    for (unsigned i = 0; i < clusters; i++) {
        cluster_live = (unsigned)threads * launch.cluster;
        cluster_arrived = cluster_phase = 0;
        for (unsigned rank = 0; rank < launch.cluster; rank++) {
            const unsigned b = order[i] * launch.cluster + rank;
            start_block(*cluster[rank], {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)}, rank);
        }
        run_cluster();
    }
    free(order);
    launch.machine->print_place = nullptr;
    sigaltstack(&stack_before, nullptr);
}

} // namespace emu
