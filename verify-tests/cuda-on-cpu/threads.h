// The threads of a cluster of blocks as fibers of one thread of the operating system, and what they wait for.
//
// A thread runs until it waits: for the other lanes of its warp (a collective operation), for a barrier of its block or
// its cluster, or for a barrier in memory (mbarrier). Then the next lane of its warp that can run does, or, if there is
// none, the scheduler picks another warp. So between two waits a thread runs alone; that other orders are possible
// shows by running again with another seed, which shuffles blocks, warps and lanes. Seed 0 keeps them in order.
//
// What a GPU would hang on or leave undefined ends the process with a message: lanes of a warp in different collective
// operations, a warp at one that some of its lanes cannot reach, barriers that not everybody reaches.
#pragma once
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "memory.h"

typedef struct { unsigned x, y, z; } uint3;
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// State of this file is shared by all functions of a library, and by no other library.
#define EMU_STATE inline __attribute__((visibility("hidden")))

#if defined(__x86_64__) && !defined(EMU_PORTABLE_SWITCH)

// Saves what a call preserves on the stack, and the stack's address at `from`; goes on from the stack `to`.
extern "C" __attribute__((visibility("hidden"))) void emu_switch(void** from, void* to);
asm(R"(
    .text
    .weak emu_switch
    .hidden emu_switch
    .type emu_switch, @function
emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace emu {
struct Context {
    void* stack = nullptr;

    void start(unsigned char* stack_memory, size_t bytes, void (*entry)()) {
        void** top = (void**)(stack_memory + bytes - 64);
        *--top = nullptr; // where `entry` would return to
        *--top = (void*)entry;
        for (int saved = 0; saved < 6; saved++) *--top = nullptr;
        stack = top;
    }
    void switch_to(Context& next) { emu_switch(&stack, next.stack); }
};
} // namespace emu

#else // any POSIX system, a few times slower

#include <ucontext.h>

namespace emu {
struct Context {
    ucontext_t context;

    void start(unsigned char* stack_memory, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack_memory;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& next) { swapcontext(&context, &next.context); }
};
} // namespace emu

#endif

namespace emu {

constexpr unsigned LANES = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_CLUSTER = 16;
constexpr unsigned BARRIERS = 16;
constexpr unsigned ALL_THREADS = 0; // of a barrier: those of the block that have not ended

struct Warp;
struct Block;

// A copy of 16 bytes under way from global to shared memory (cp.async), or an arrival that waits for those before it.
struct Copy {
    void* to;         // null: no copy
    const void* from; // null: zeros
    unsigned group;
    uint64_t* barrier; // that the arrival counts at
};

enum class Wait : unsigned char { None, Collective, Barrier, Cluster, Memory };

// What a switch touches comes first.
struct alignas(64) Thread {
    Context context;
    Block* block;
    Warp* warp;
    unsigned lane;
    Wait waits;
    unsigned char barrier; // that it waits at
    uint3 index;
    const uint64_t* memory;            // the mbarrier that it waits for
    Copy* copies;                      // its copies under way, oldest first
    unsigned n_copies, copy_capacity;
    unsigned n_arrivals; // among its copies
    unsigned group;      // of copies, that it is filling
    unsigned cluster_phase; // of the cluster's barrier, that ends when all have arrived as this thread has; or 0
    Guarded stack;
};

// An operation that the lanes of `mask` perform together. The last lane to arrive performs it for all.
struct Collective {
    const char* name;
    unsigned mask;
    void* operands; // a struct on the lane's stack: what it gives and what it gets
    void (*perform)(Warp& warp, unsigned lanes);
};

struct Warp {
    Block* block;
    Thread* threads; // of its 32 lanes
    unsigned live, can_run, arrived; // sets of lanes
    Collective at[LANES];

    template <class Operands>
    Operands& operands(unsigned lane) { return *(Operands*)at[lane].operands; }
};

struct Barrier {
    unsigned arrived, expected, votes;
};

struct Block {
    uint3 index;
    unsigned rank; // in its cluster
    unsigned n_threads, live;
    Thread* threads;
    Warp* warps;
    unsigned n_warps;
    Barrier barriers[BARRIERS];
    unsigned votes; // that __syncthreads counted last
    Guarded shared;               // its dynamic shared memory
    unsigned char* static_shared; // what its static variables hold while another block of the cluster runs

    Block();
    ~Block();
};

// A copy under way that a barrier in memory counts (cp.async.bulk), or a store (st.async), which has its data with it.
struct BulkCopy {
    void* to;
    const void* from; // or null
    unsigned bytes;
    uint64_t* barrier;
    unsigned char data[16];
};

// What outlives a launch: stacks of threads and shared memory, for as many blocks as ran together so far. It serves one
// launch at a time.
struct Machine {
    Block* blocks[MAX_CLUSTER] = {};
    void (*print_place)() = nullptr; // of the launch that it serves

    ~Machine() {
        for (Block* block : blocks) delete block;
    }
};

// One launch of a kernel.
struct Launch {
    const char* kernel;
    void (*body)(void** arguments);
    void** arguments;
    dim3 grid, block;
    unsigned cluster; // blocks of a cluster, along x
    unsigned shared_bytes;
    uint64_t seed;
    Machine* machine;
};

EMU_STATE Launch current_launch;
EMU_STATE Thread* current; // the thread that runs
EMU_STATE Context scheduler;
EMU_STATE Block* cluster[MAX_CLUSTER];
EMU_STATE unsigned cluster_live, cluster_arrived, cluster_phase;
EMU_STATE uint64_t random_state;
constexpr unsigned MAX_BULK_COPIES = 4096;
EMU_STATE BulkCopy bulk_copies[MAX_BULK_COPIES];
EMU_STATE unsigned n_bulk_copies;
EMU_STATE unsigned n_arrivals; // among the copies of all threads
EMU_STATE unsigned char signal_stack[64 << 10];

// Static shared memory: variables in a section of their own, whose bounds the linker knows.
extern "C" {
extern unsigned char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

inline size_t static_shared_bytes() { return __stop_emu_shared - __start_emu_shared; }

// ---- failing

// The launch's kernel and, if one runs, its thread.
inline void print_place() {
    fprintf(stderr, "cuda_on_cpu: kernel %s", current_launch.kernel);
    if (current) {
        const uint3 b = current->block->index, t = current->index;
        fprintf(stderr, ", block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
    }
    fprintf(stderr, ", seed %llu: ", (unsigned long long)current_launch.seed);
}

__attribute__((format(printf, 1, 2), noreturn, noinline, cold)) inline void fail(const char* format, ...) {
    print_place();
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    fflush(stderr);
    abort();
}

inline const char* name_of(Wait wait) {
    switch (wait) {
        case Wait::None: return "running";
        case Wait::Collective: return "at a warp operation";
        case Wait::Barrier: return "at a barrier of the block";
        case Wait::Cluster: return "at the cluster's barrier";
        case Wait::Memory: return "waiting for an mbarrier";
    }
    return "";
}

// The machine that this thread of the operating system lets run.
EMU_STATE thread_local Machine* running;

inline void on_bad_address(int signal, siginfo_t* info, void*) {
    if (!running || !running->print_place) {
        ::signal(signal, SIG_DFL); // no kernel did that: it happens again, and ends the process
        return;
    }
    running->print_place();
    fprintf(stderr, "bad address %p (out of bounds, misaligned, or the stack of a thread is full)\n", info->si_addr);
    abort();
}

// From now on a kernel's bad address ends the process with a message. Who launches kernels calls it once.
inline void catch_bad_addresses() {
    struct sigaction handler = {};
    handler.sa_sigaction = on_bad_address;
    handler.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &handler, nullptr);
    sigaction(SIGBUS, &handler, nullptr);
}

// ---- chance

// A number below n; 0 if the seed is 0.
inline unsigned random_below(unsigned n) {
    if (!random_state) return 0;
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)((random_state >> 33) % n);
}

// True once in n times; never if the seed is 0.
inline bool chance(unsigned n) { return random_state && random_below(n) == 0; }

template <class T>
inline void shuffle(T* items, unsigned n) {
    if (!random_state) return;
    for (unsigned i = n; i > 1; i--) {
        const unsigned j = random_below(i);
        const T item = items[i - 1];
        items[i - 1] = items[j];
        items[j] = item;
    }
}

// ---- running

// A lane of the warp that can run, or null.
inline Thread* next_lane(Warp& warp) {
    if (!warp.can_run) return nullptr;
    const unsigned first = random_below(LANES);
    const unsigned later = warp.can_run >> first << first;
    return &warp.threads[__builtin_ctz(later ? later : warp.can_run)];
}

// Leaves the running thread, which goes on when it is chosen again.
inline void leave(Thread* next) {
    Thread* self = current;
    current = next;
    self->context.switch_to(next ? next->context : scheduler);
}

inline void wait_for(Wait reason) {
    current->waits = reason;
    current->warp->can_run &= ~(1u << current->lane);
    leave(next_lane(*current->warp));
}

inline void wake(Thread& thread) {
    thread.waits = Wait::None;
    thread.warp->can_run |= 1u << thread.lane;
}

// ---- collective operations of a warp

// Whether all living lanes of the mask that `lane` gave have arrived.
inline bool is_complete(Warp& warp, unsigned lane) {
    const unsigned lanes = warp.at[lane].mask & warp.live;
    return (warp.arrived & lanes) == lanes;
}

// Performs the operation that `lane` is at, and lets its lanes go on.
inline void complete(Warp& warp, unsigned lane) {
    const Collective& c = warp.at[lane];
    const unsigned lanes = c.mask & warp.live;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const unsigned other = __builtin_ctz(rest);
        if (warp.at[other].name != c.name || warp.at[other].mask != c.mask) {
            fail("divergent: lane %u is at %s (mask %08x), lane %u at %s (mask %08x)", lane, c.name, c.mask, other,
                 warp.at[other].name, warp.at[other].mask);
        }
    }
    c.perform(warp, lanes);
    warp.arrived &= ~lanes;
    warp.can_run |= lanes;
    for (unsigned rest = lanes; rest; rest &= rest - 1) warp.threads[__builtin_ctz(rest)].waits = Wait::None;
}

// The running thread's part in an operation that all living lanes of `mask` perform.
inline void collective(const char* name, unsigned mask, void* operands, void (*perform)(Warp&, unsigned)) {
    Warp& warp = *current->warp;
    const unsigned lane = current->lane, bit = 1u << lane;
    if (!(mask & bit)) fail("%s: the mask %08x lacks the lane itself", name, mask);
    warp.at[lane] = {name, mask, operands, perform};
    warp.arrived |= bit;
    if (!is_complete(warp, lane)) return wait_for(Wait::Collective);
    complete(warp, lane);
    if (chance(8)) leave(nullptr); // another warp may go first
}

// ---- barriers

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

inline void barrier(unsigned id, unsigned expected, bool vote = false) {
    count_at_barrier(id, expected, vote);
    if (is_full(*current->block, id)) return release_barrier(*current->block, id);
    current->barrier = (unsigned char)id;
    wait_for(Wait::Barrier);
}

// Counts at a barrier without waiting for the others.
inline void barrier_arrive(unsigned id, unsigned expected) {
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

inline void cluster_arrive() {
    if (current->cluster_phase) fail("cluster_arrive: the thread has not waited since it arrived");
    current->cluster_phase = cluster_phase + 1;
    cluster_arrived++;
    release_cluster();
}

inline void cluster_wait() {
    if (!current->cluster_phase) fail("cluster_wait: the thread has not arrived");
    if (current->cluster_phase > cluster_phase) wait_for(Wait::Cluster);
    current->cluster_phase = 0;
}

inline void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

// ---- barriers in memory: a word that counts arrivals and bytes of copies, phase after phase
//
// bits 0-14 arrivals of a phase, 15-29 arrivals still missing, 30-61 bytes still missing (signed), 63 the phase

struct MemoryBarrier {
    unsigned count, missing;
    int bytes;
    bool phase;

    static MemoryBarrier read(const uint64_t* word) {
        const uint64_t w = *word;
        return {(unsigned)(w & 0x7fff), (unsigned)(w >> 15 & 0x7fff), (int)(uint32_t)(w >> 30), (w >> 63) != 0};
    }
    void write(uint64_t* word) const {
        *word = (uint64_t)count | (uint64_t)missing << 15 | (uint64_t)(uint32_t)bytes << 30 | (uint64_t)phase << 63;
    }
};

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

// One arrival, after which the phase also waits for `bytes` of copies.
inline void arrive_at_memory_barrier(const char* name, uint64_t* word, unsigned bytes) {
    MemoryBarrier barrier = MemoryBarrier::read(word);
    if (!barrier.missing) fail("%s: more arrivals than the mbarrier counts", name);
    barrier.missing--;
    barrier.bytes += (int)bytes;
    update_memory_barrier(word, barrier);
}

// ---- copies under way

// Carries out the oldest `n` copies of a thread.
inline void carry_out(Thread& thread, unsigned n) {
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

inline void start_bulk(const BulkCopy& copy) {
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

// ---- a launch

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

inline Block::Block() {
    static_shared = nullptr;
    threads = new Thread[MAX_THREADS]();
    warps = new Warp[MAX_THREADS / LANES]();
    for (unsigned i = 0; i < MAX_THREADS; i++) {
        threads[i].block = this;
        threads[i].warp = &warps[i / LANES];
        threads[i].lane = i % LANES;
    }
    for (unsigned i = 0; i < MAX_THREADS / LANES; i++) {
        warps[i].block = this;
        warps[i].threads = &threads[i * LANES];
    }
}

inline Block::~Block() {
    for (unsigned i = 0; i < MAX_THREADS; i++) {
        threads[i].stack.release();
        free(threads[i].copies);
    }
    delete[] threads;
    delete[] warps;
    free(static_shared);
    shared.release();
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

// Runs all blocks of a launch, a cluster at a time. A library runs one launch at a time.
inline void run(const Launch& launch) {
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
        if (!launch.machine->blocks[rank]) launch.machine->blocks[rank] = new Block();
        cluster[rank] = launch.machine->blocks[rank];
    }

    // Signals are handled on a stack of their own: a thread's may be full.
    stack_t on_signal = {}, stack_before;
    on_signal.ss_sp = signal_stack;
    on_signal.ss_size = sizeof signal_stack;
    sigaltstack(&on_signal, &stack_before);
    launch.machine->print_place = print_place;

    const unsigned clusters = (unsigned)(blocks / launch.cluster);
    unsigned* order = new unsigned[clusters];
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
    delete[] order;
    launch.machine->print_place = nullptr;
    sigaltstack(&stack_before, nullptr);
}

} // namespace emu
