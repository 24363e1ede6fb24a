// The machine that kernels run on: its state, and what they ask of it. What it does then is compiled once, from
// machine.cpp, and linked to each kernel's library: it is larger than most kernels.
#pragma once
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
};

void free_block(Block* block); // or null

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
        for (Block* block : blocks) free_block(block);
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

// Static shared memory: variables in a section of their own, whose bounds the linker knows.
extern "C" {
extern unsigned char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

inline size_t static_shared_bytes() { return __stop_emu_shared - __start_emu_shared; }

// The machine that this thread of the operating system lets run.
EMU_STATE thread_local Machine* running;

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

// ---- what kernels ask of the machine

// Ends the process with a message that says where.
__attribute__((format(printf, 1, 2), noreturn, cold)) void fail(const char* format, ...);
// From now on a kernel's bad address ends the process with a message. Who launches kernels calls it once.
void catch_bad_addresses();

// Runs all blocks of a launch, a cluster at a time. A library runs one launch at a time.
void run(const Launch& launch);

// Leaves the running thread, which goes on when it is chosen again.
void leave(Thread* next);
void wait_for(Wait reason);
// The running thread's part in an operation that all living lanes of `mask` perform.
void collective(const char* name, unsigned mask, void* operands, void (*perform)(Warp&, unsigned));

// One thread more at a barrier for `expected` threads, or for ALL_THREADS, with a vote.
void barrier(unsigned id, unsigned expected, bool vote = false);
// Counts at a barrier without waiting for the others.
void barrier_arrive(unsigned id, unsigned expected);
void cluster_arrive();
void cluster_wait();

// One arrival, after which the phase also waits for `bytes` of copies.
void arrive_at_memory_barrier(const char* name, uint64_t* word, unsigned bytes);
// Notes a copy or an arrival of the running thread, to be carried out later.
void note(const Copy& copy);
// Carries out the oldest `n` copies of a thread.
void carry_out(Thread& thread, unsigned n);
void start_bulk(const BulkCopy& copy);

} // namespace emu
