// The functions of shaders/cuda/lib/ptx.cuh, which it leaves to this file under CUDA_ON_CPU. It says what each does.
//
// Copies from global to shared memory are late on purpose: one of a thread (cp.async) is carried out by the wait that
// covers it, a bulk copy when nothing else can run, so that a missing wait shows. With a seed some are early instead,
// so that a copy into memory still in use shows.
#pragma once
#include "language.h"

// ---- the pass: launches run one after the other

inline void wait_for_previous() {}
inline void release_next() {}

// ---- copies from global to shared memory

namespace emu {

inline void check_aligned(const char* what, const void* p, size_t bytes) {
    if ((uintptr_t)p % bytes) fail("%s: address %p is not aligned to %zu bytes", what, p, bytes);
}

inline void check_shared(const char* what, const void* p, size_t bytes) {
    const Guarded& dynamic = current->block->shared;
    const unsigned char* begin = (const unsigned char*)p;
    const bool in_dynamic = dynamic.bytes && begin >= dynamic.begin && begin + bytes <= dynamic.begin + dynamic.bytes;
    const bool in_static = begin >= __start_emu_shared && begin + bytes <= __stop_emu_shared;
    if (!in_dynamic && !in_static) fail("%s: %p is not in the block's shared memory", what, p);
}

} // namespace emu

inline void cp_async16(void* shared, const void* global, bool on) {
    emu::check_aligned("cp_async16", shared, 16);
    emu::check_shared("cp_async16", shared, 16);
    if (on) emu::check_aligned("cp_async16", global, 16);
    emu::note({shared, on ? global : nullptr, emu::current->group, nullptr});
    if (emu::chance(4) && !emu::current->n_arrivals) emu::carry_out(*emu::current, emu::current->n_copies);
}

inline void cp_async_commit() { emu::current->group++; }

template <int PENDING>
inline void cp_async_wait() {
    emu::Thread& self = *emu::current;
    unsigned done = 0;
    while (done < self.n_copies && self.copies[done].group + PENDING < self.group) done++;
    emu::carry_out(self, done);
}

inline void cp_async_arrive(unsigned long long* bar) {
    emu::note({nullptr, nullptr, emu::current->group, (uint64_t*)bar});
    emu::current->n_arrivals++;
    emu::n_arrivals++;
}

inline uint4 load_once(const void* global) {
    emu::check_aligned("load_once", global, 16);
    return *(const uint4*)global;
}

// ---- matrices: the lanes' parts in what machine.cpp does with all of them

namespace emu {

inline float widen_bf16(unsigned short bits) { return emu_bits<float>((unsigned)bits << 16); }
inline float widen_f16(unsigned short bits) { return (float)emu_bits<_Float16>(bits); }

struct LoadMatrix {
    const unsigned short* row;
    unsigned* result;
};
void load_matrices(Warp& warp, unsigned lanes);
void load_matrices_transposed(Warp& warp, unsigned lanes);

struct Multiply {
    float* d;
    const unsigned* a;
    unsigned b[2];
};
void multiply_bf16(Warp& warp, unsigned lanes);
void multiply_f16(Warp& warp, unsigned lanes);

inline void load_matrices(const char* name, unsigned* result, const void* row, void (*perform)(Warp&, unsigned)) {
    check_aligned(name, row, 16);
    check_shared(name, row, 16);
    LoadMatrix mine = {(const unsigned short*)row, result};
    collective(name, 0xffffffffu, &mine, perform);
}

} // namespace emu

inline void ldmatrix_x4(unsigned r[4], const void* shared_row) {
    emu::load_matrices("ldmatrix_x4", r, shared_row, emu::load_matrices);
}
inline void ldmatrix_x4_trans(unsigned r[4], const void* shared_row) {
    emu::load_matrices("ldmatrix_x4_trans", r, shared_row, emu::load_matrices_transposed);
}
inline void mma_bf16(float d[4], const unsigned a[4], unsigned b0, unsigned b1) {
    emu::Multiply mine = {d, a, {b0, b1}};
    emu::collective("mma_bf16", 0xffffffffu, &mine, emu::multiply_bf16);
}
inline void mma_f16(float d[4], const unsigned a[4], unsigned b0, unsigned b1) {
    emu::Multiply mine = {d, a, {b0, b1}};
    emu::collective("mma_f16", 0xffffffffu, &mine, emu::multiply_f16);
}

// ---- numbers

namespace emu {

inline unsigned round_bf16(float x) {
    const unsigned bits = emu_bits<unsigned>(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned round_f16(float x) {
    if (x != x) return 0x7fff;
    return emu_bits<unsigned short>((_Float16)x);
}

} // namespace emu

inline unsigned pack_bf16(float low, float high) { return emu::round_bf16(high) << 16 | emu::round_bf16(low); }
inline unsigned pack_f16(float low, float high) { return emu::round_f16(high) << 16 | emu::round_f16(low); }
inline float widen_f16(unsigned short bits) { return emu::widen_f16(bits); }
inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y; // subnormal results are flushed
}
inline float reciprocal_approx(float x) { return 1.0f / x; }

// ---- blocks and clusters

inline void named_barrier(unsigned id, unsigned threads) { emu::barrier(id, threads); }
inline void named_barrier_arrive(unsigned id, unsigned threads) { emu::barrier_arrive(id, threads); }
inline unsigned cluster_rank() { return emu::current->block->rank; }
inline void cluster_arrive() { emu::cluster_arrive(); }
inline void cluster_wait() { emu::cluster_wait(); }
inline void cluster_sync() {
    emu::cluster_arrive();
    emu::cluster_wait();
}
inline void cluster_leave() { cluster_sync(); }

template <class T>
inline T* cluster_map(T* p, unsigned rank) {
    const emu::Guarded& own = emu::current->block->shared;
    if (!own.contains(p)) emu::fail("cluster_map: %p is not in the block's dynamic shared memory", (const void*)p);
    if (rank >= emu::current_launch.cluster) emu::fail("cluster_map: no block %u in the cluster", rank);
    return (T*)(emu::cluster[rank]->shared.begin + ((unsigned char*)p - own.begin));
}

inline unsigned arrive(unsigned* counter) { return (*counter)++; }

// ---- barriers in memory, and the copies that they count

inline void mbarrier_init(unsigned long long* bar, unsigned count) {
    emu::check_aligned("mbarrier_init", bar, 8);
    emu::check_shared("mbarrier_init", bar, 8);
    emu::MemoryBarrier{count, count, 0, false}.write((uint64_t*)bar);
}
inline void fence_barrier_init() {}

inline void mbarrier_expect(unsigned long long* bar, unsigned bytes) {
    emu::arrive_at_memory_barrier("mbarrier_expect", (uint64_t*)bar, bytes);
}
inline void mbarrier_arrive(unsigned long long* bar) {
    emu::arrive_at_memory_barrier("mbarrier_arrive", (uint64_t*)bar, 0);
}

// Until the phase of this parity, 0 for the first, has ended.
inline void mbarrier_wait(unsigned long long* bar, unsigned parity) {
    while (emu::MemoryBarrier::read((uint64_t*)bar).phase == (parity & 1)) {
        emu::current->memory = (uint64_t*)bar;
        emu::wait_for(emu::Wait::Memory);
    }
}

inline void bulk_copy(void* shared, const void* global, unsigned bytes, unsigned long long* bar) {
    emu::check_aligned("bulk_copy", shared, 16);
    emu::check_aligned("bulk_copy", global, 16);
    emu::check_shared("bulk_copy", shared, bytes);
    if (bytes == 0 || bytes % 16) emu::fail("bulk_copy: %u bytes", bytes);
    emu::start_bulk({shared, global, bytes, (uint64_t*)bar, {}});
}

inline void send(uint4* to, uint4 value, unsigned long long* bar, unsigned rank) {
    emu::check_aligned("send", to, 16);
    emu::BulkCopy copy = {cluster_map(to, rank), nullptr, 16, (uint64_t*)cluster_map(bar, rank), {}};
    memcpy(copy.data, &value, 16);
    emu::start_bulk(copy);
}
