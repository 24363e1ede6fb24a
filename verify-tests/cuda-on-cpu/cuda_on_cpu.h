// Runs CUDA kernels on the CPU, for tests: include this first, then a kernel's source, then launch it.
//
//   #define CUDA_ON_CPU
//   #include "cuda_on_cpu.h"
//   #include "machine.cpp" // or link it
//   #include "kernel.cu"
//   emu::launch(kernel, grid, block, cluster, shared_bytes, arguments...);
//
// Compile with `g++ -O2 -std=c++17 -ffp-contract=off -mavx2 -mfma -mf16c`: a product and a sum are rounded apart unless
// the kernel says fmaf. The environment variable EMU_SEED shuffles the order in which blocks, warps and lanes run.
//
//   memory.h    memory between pages that may not be touched
//   machine.h   threads, warps, blocks, and what they ask of the machine that runs them (machine.cpp, compiled once)
//   language.h  CUDA C++: keywords, vectors, built-in functions
//   ptx.h       the functions of shaders/cuda/lib/ptx.cuh
//   wgmma.h     the functions of shaders/cuda/lib/wgmma.cuh
#pragma once
#include <stdlib.h>

#include "ptx.h"
#include "wgmma.h"

namespace emu {

template <size_t...>
struct Indices {};
template <size_t N, size_t... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I>
struct Count<0, I...> {
    using Type = Indices<I...>;
};

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** arguments, Indices<I...>) {
    kernel(*(A*)arguments[I]...);
}

// Calls a kernel with arguments given as cuLaunchKernel takes them: a pointer to each.
template <class... A>
inline void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, typename Count<sizeof...(A)>::Type());
}

// Of the arguments of a kernel, the sizes, in order; returns how many there are.
template <class... A>
inline unsigned argument_sizes(void (*)(A...), size_t* sizes) {
    const size_t all[] = {sizeof(A)..., 0};
    for (unsigned i = 0; i < sizeof...(A); i++) sizes[i] = all[i];
    return sizeof...(A);
}

template <class T>
struct Same {
    using Type = T;
};

template <class... A>
inline void launch(void (*kernel)(A...), dim3 grid, dim3 block, unsigned cluster, unsigned shared_bytes,
                   typename Same<A>::Type... arguments) {
    static Machine machine;
    struct Bound {
        void (*kernel)(A...);
        void** arguments;
    };
    void* pointers[] = {(void*)&arguments..., nullptr};
    Bound bound = {kernel, pointers};
    const char* seed = getenv("EMU_SEED");
    Launch launch = {"(launched by hand)", nullptr, (void**)&bound, grid, block, cluster, shared_bytes, 0, &machine};
    launch.body = [](void** b) { call(((Bound*)b)->kernel, ((Bound*)b)->arguments); };
    launch.seed = seed ? strtoull(seed, nullptr, 10) : 0;
    catch_bad_addresses();
    running = &machine;
    run(launch);
    running = nullptr;
}

} // namespace emu
