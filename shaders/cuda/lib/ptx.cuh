// The instructions that CUDA C++ has no word for, each in a function of its own. No NVIDIA header is needed.
//
// A kernel's other files contain no `asm`. The CPU emulation that tests run on (verify-tests/cuda-on-cpu) defines
// CUDA_ON_CPU and these functions itself.
//
// How kernels of a pass overlap (programmatic dependent launch): a kernel calls `release_next` first, and the next one may
// start while it runs. Before `wait_for_previous`, which waits until all kernels before are complete, a kernel writes
// nothing, and reads only what no kernel of the pass has written: weights, the batch buffers, the page table, cache rows of
// the prefix. Kernels that write those (commit, draft_ngram, grow) never release the next one.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr unsigned FULL_WARP = 0xffffffffu;

#ifndef CUDA_ON_CPU

// Dynamic shared memory of the block, aligned to 1024 bytes. Kernels that run in clusters use no other.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- the pass

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- copies from global to shared memory

// 16 bytes; zeros if not `on`, and then `global` is not read.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool on) {
    const int bytes = on ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `PENDING` of this thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- copies that a barrier in shared memory waits for

// `count` arrivals complete a phase. Phases have parity 0, 1, 0, ..
__device__ __forceinline__ void mbarrier_init(u64* bar, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

// After the barriers' initialisation, before the block's first barrier: copies see them too.
__device__ __forceinline__ void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(u64* bar) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(bar)) : "memory");
}

// Until the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(u64* bar, u32 parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            shared_address(bar)),
        "r"(parity)
        : "memory");
#else
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(shared_address(bar)), "r"(parity)
            : "memory");
    } while (!done);
#endif
}

// This thread's earlier `cp_async16`, once complete, arrive on the barrier.
__device__ __forceinline__ void cp_async_arrive(u64* bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of bulk copies.
__device__ __forceinline__ void mbarrier_expect(u64* bar, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(shared_address(bar)),
                 "r"(bytes)
                 : "memory");
#endif
}

// A multiple of 16 bytes, both addresses aligned to 16; counts its bytes on the barrier when they have arrived.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
#endif
}

// 16 bytes that are read once: kept out of L1.
__device__ __forceinline__ uint4 load_once(const void* global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// ---- matrices

// Four 8 x 8 matrices of 16-bit elements; lane l gives the row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(u32 r[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 r[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8]
__device__ __forceinline__ void mma_bf16(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers

// Rounded to nearest, ties to even; `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float widen_f16(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

// 2^x, to 2 units in the last place; 0 for very negative x.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- blocks and clusters

// A barrier for `threads` threads of the block (a multiple of 32). Barrier 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts this warp's threads there, without waiting.
__device__ __forceinline__ void named_barrier_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

// The two halves of a barrier for all threads of the cluster, which orders no memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// A barrier for all threads of the cluster; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Until all threads of the cluster have come here: after it, nobody reads this block's shared memory any more. Unlike
// `cluster_sync` it does not wait for what was written.
__device__ __forceinline__ void cluster_leave() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Writes 16 bytes where `to`, in this block's shared memory, lies in that of block `rank` of the cluster. They count as a
// bulk copy on that block's barrier `bar`.
__device__ __forceinline__ void send(uint4* to, uint4 value, u64* bar, u32 rank) {
    asm volatile(
        "{\n.reg .b32 to, bar;\nmapa.shared::cluster.u32 to, %0, %6;\nmapa.shared::cluster.u32 bar, %5, %6;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%1, %2, %3, %4}, [bar];\n}" ::"r"(
            shared_address(to)),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(shared_address(bar)), "r"(rank)
        : "memory");
}

// Where `p`, in this block's shared memory, lies in that of block `rank` of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_map(T* p, u32 rank) {
    u64 there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"((u64)p), "r"(rank));
    return (T*)there;
}
#else
__device__ __forceinline__ u32 cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_leave() {}
__device__ __forceinline__ void send(uint4* to, uint4 value, u64*, u32) { *to = value; }
template <class T>
__device__ __forceinline__ T* cluster_map(T* p, u32) { return p; }
#endif

// Adds one; what this thread wrote before is seen by whoever reads the counter later. Returns the value before.
__device__ __forceinline__ u32 arrive(u32* counter) {
    u32 before;
    asm volatile("atom.global.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

#endif // CUDA_ON_CPU
