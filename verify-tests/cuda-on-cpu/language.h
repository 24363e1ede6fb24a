// CUDA C++ for a C++ compiler: its keywords, vectors, built-in variables and functions.
#pragma once
#include <math.h>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __shared__ static __attribute__((section("emu_shared")))
#define DYNAMIC_SHARED(name) unsigned char* const name = emu::current->block->shared.begin

#define threadIdx (emu::current->index)
#define blockIdx (emu::current->block->index)
#define blockDim (emu::current_launch.block)
#define gridDim (emu::current_launch.grid)
constexpr int warpSize = 32;

// ---- vectors

#define EMU_VECTORS(T, name)                                                                   \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                         \
    struct name##3 { T x, y, z; };                                                             \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };         \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                 \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                         \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
// dim3's relative is declared where the scheduler needs it.
#define uint3 emu_uint3
EMU_VECTORS(unsigned, uint)
#undef uint3
EMU_VECTORS(int, int)
EMU_VECTORS(float, float)
EMU_VECTORS(unsigned short, ushort)
EMU_VECTORS(unsigned char, uchar)
EMU_VECTORS(unsigned long long, ulonglong)
#undef EMU_VECTORS

// ---- numbers as bits, and bits

template <class To, class From>
inline To emu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu_bits<int>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}

// ---- arithmetic

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

#define EMU_MIN_MAX(T)                                    \
    inline T min(T a, T b) { return b < a ? b : a; }      \
    inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }

// ---- memory

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcv(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T value) { *p = value; }
template <class T> inline void __stcs(T* p, T value) { *p = value; }
template <class T> inline void __stwt(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// Threads take turns, so that plain reads and writes are atomic.
#define EMU_ATOMIC(name, result)                           \
    template <class T>                                     \
    inline T name(T* p, decltype(T()) v) {                 \
        const T before = *p;                               \
        *p = result;                                       \
        return before;                                     \
    }
EMU_ATOMIC(atomicAdd, before + v)
EMU_ATOMIC(atomicSub, before - v)
EMU_ATOMIC(atomicMax, before < v ? v : before)
EMU_ATOMIC(atomicMin, v < before ? v : before)
EMU_ATOMIC(atomicOr, before | v)
EMU_ATOMIC(atomicAnd, before & v)
EMU_ATOMIC(atomicXor, before ^ v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicInc, before >= v ? 0 : before + 1)
EMU_ATOMIC(atomicDec, before == 0 || before > v ? v : before - 1)
#undef EMU_ATOMIC
template <class T>
inline T atomicCAS(T* p, decltype(T()) expected, decltype(T()) v) {
    const T before = *p;
    if (before == expected) *p = v;
    return before;
}

// ---- barriers of the block

inline void __syncthreads() { emu::barrier(0, emu::ALL_THREADS); }

// How many threads of the block have a predicate that holds. All read it before the block's next barrier is complete.
inline int __syncthreads_count(int predicate) {
    emu::barrier(0, emu::ALL_THREADS, predicate != 0);
    return (int)emu::current->block->votes;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }

// ---- operations of a warp

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emu::collective("__syncwarp", mask, nullptr, [](emu::Warp&, unsigned) {});
}

namespace emu {

template <class T>
struct Exchange {
    T given;
    unsigned from; // lane
    T got;
};

// The value of lane `from`. What an ended lane or one outside the mask would have given is undefined.
template <class T>
inline T exchange(const char* name, unsigned mask, T value, unsigned from) {
    Exchange<T> mine = {value, from, value};
    collective(name, mask, &mine, [](Warp& warp, unsigned lanes) {
        for (unsigned rest = lanes; rest; rest &= rest - 1) {
            Exchange<T>& to = warp.operands<Exchange<T>>(__builtin_ctz(rest));
            if (lanes >> to.from & 1) to.got = warp.operands<Exchange<T>>(to.from).given;
            else memset(&to.got, POISON, sizeof(T));
        }
    });
    return mine.got;
}

struct Vote {
    unsigned given, got;
};

// What `combine` makes of the values of all lanes.
template <class Combine>
inline unsigned vote(const char* name, unsigned mask, unsigned value, Combine) {
    Vote mine = {value, 0};
    collective(name, mask, &mine, [](Warp& warp, unsigned lanes) {
        const unsigned result = Combine()(warp, lanes);
        for (unsigned rest = lanes; rest; rest &= rest - 1) warp.operands<Vote>(__builtin_ctz(rest)).got = result;
    });
    return mine.got;
}

// The lanes whose value is not zero.
struct Ballot {
    unsigned operator()(Warp& warp, unsigned lanes) const {
        unsigned set = 0;
        for (unsigned rest = lanes; rest; rest &= rest - 1) {
            const unsigned lane = __builtin_ctz(rest);
            if (warp.operands<Vote>(lane).given) set |= 1u << lane;
        }
        return set;
    }
};

struct Add { static unsigned of(unsigned a, unsigned b) { return a + b; } };
struct Or { static unsigned of(unsigned a, unsigned b) { return a | b; } };
struct And { static unsigned of(unsigned a, unsigned b) { return a & b; } };
struct Xor { static unsigned of(unsigned a, unsigned b) { return a ^ b; } };
template <class T> struct Max { static unsigned of(unsigned a, unsigned b) { return (T)a < (T)b ? b : a; } };
template <class T> struct Min { static unsigned of(unsigned a, unsigned b) { return (T)b < (T)a ? b : a; } };

template <class Op>
struct Reduce {
    unsigned operator()(Warp& warp, unsigned lanes) const {
        unsigned sum = warp.operands<Vote>(__builtin_ctz(lanes)).given;
        for (unsigned rest = lanes & (lanes - 1); rest; rest &= rest - 1) {
            sum = Op::of(sum, warp.operands<Vote>(__builtin_ctz(rest)).given);
        }
        return sum;
    }
};

} // namespace emu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const unsigned lane = emu::current->lane;
    return emu::exchange("__shfl_sync", mask, value, (lane & ~(width - 1u)) | (from & (width - 1u)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
    const unsigned lane = emu::current->lane, from = lane ^ distance;
    return emu::exchange("__shfl_xor_sync", mask, value, from / width > lane / width ? lane : from & 31);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const unsigned lane = emu::current->lane, inside = lane & (width - 1u);
    return emu::exchange("__shfl_up_sync", mask, value, inside < distance ? lane : lane - distance);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const unsigned lane = emu::current->lane, inside = lane & (width - 1u);
    const bool leaves = inside + distance >= (unsigned)width;
    return emu::exchange("__shfl_down_sync", mask, value, leaves ? lane : lane + distance);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emu::vote("__ballot_sync", mask, predicate != 0, emu::Ballot());
}
inline int __any_sync(unsigned mask, int predicate) {
    return emu::vote("__any_sync", mask, predicate != 0, emu::Ballot()) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return emu::vote("__all_sync", mask, predicate == 0, emu::Ballot()) == 0;
}
#define EMU_REDUCE(name, T, Op) \
    inline T name(unsigned mask, T value) { return (T)emu::vote(#name, mask, (unsigned)value, emu::Reduce<Op>()); }
EMU_REDUCE(__reduce_add_sync, unsigned, emu::Add)
EMU_REDUCE(__reduce_add_sync, int, emu::Add)
EMU_REDUCE(__reduce_max_sync, unsigned, emu::Max<unsigned>)
EMU_REDUCE(__reduce_max_sync, int, emu::Max<int>)
EMU_REDUCE(__reduce_min_sync, unsigned, emu::Min<unsigned>)
EMU_REDUCE(__reduce_min_sync, int, emu::Min<int>)
EMU_REDUCE(__reduce_or_sync, unsigned, emu::Or)
EMU_REDUCE(__reduce_and_sync, unsigned, emu::And)
EMU_REDUCE(__reduce_xor_sync, unsigned, emu::Xor)
#undef EMU_REDUCE

inline void __trap() { emu::fail("__trap"); }
inline void __nanosleep(unsigned) { emu::leave(nullptr); }
