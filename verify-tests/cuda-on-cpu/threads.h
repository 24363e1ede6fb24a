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

} // namespace emu
