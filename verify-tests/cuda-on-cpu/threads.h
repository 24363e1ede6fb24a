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

#include "machine.h"

#if defined(__x86_64__) && !defined(EMU_PORTABLE_SWITCH)
asm(R"(
    .text
    .globl emu_switch
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
#endif

namespace emu {

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

void fail(const char* format, ...) {
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

inline void on_bad_address(int signal, siginfo_t* info, void*) {
    if (!running || !running->print_place) {
        ::signal(signal, SIG_DFL); // no kernel did that: it happens again, and ends the process
        return;
    }
    running->print_place();
    fprintf(stderr, "bad address %p (out of bounds, misaligned, or the stack of a thread is full)\n", info->si_addr);
    abort();
}

void catch_bad_addresses() {
    struct sigaction handler = {};
    handler.sa_sigaction = on_bad_address;
    handler.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &handler, nullptr);
    sigaction(SIGBUS, &handler, nullptr);
}

// ---- running

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

// A lane of the warp that can run, or null.
inline Thread* next_lane(Warp& warp) {
    if (!warp.can_run) return nullptr;
    const unsigned first = random_below(LANES);
    const unsigned later = warp.can_run >> first << first;
    return &warp.threads[__builtin_ctz(later ? later : warp.can_run)];
}

void leave(Thread* next) {
    Thread* self = current;
    current = next;
    self->context.switch_to(next ? next->context : scheduler);
}

void wait_for(Wait reason) {
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

void collective(const char* name, unsigned mask, void* operands, void (*perform)(Warp&, unsigned)) {
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
