// Kernels with a fault each, which the emulation must show: in wrong results under some seed, or by ending the process.

// No barrier between writing and reading what another warp wrote.
extern "C" __global__ void missing_barrier(float* y) {
    __shared__ float s[256];
    s[threadIdx.x] = (float)threadIdx.x;
    y[threadIdx.x] = s[(threadIdx.x + 255) % 256];
}

// A warp that runs ahead overwrites what the others still read.
extern "C" __global__ void barrier_too_few(float* y) {
    __shared__ float s[256];
    for (int round = 0; round < 4; round++) {
        s[threadIdx.x] = (float)(threadIdx.x + round);
        __syncthreads();
        y[round * 256 + threadIdx.x] = s[(threadIdx.x + 128) % 256];
    }
}

extern "C" __global__ void divergent_shuffle(float* y) {
    if (threadIdx.x % 32 < 20) __syncthreads();
    else y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

extern "C" __global__ void missing_copy_wait(float* y, const float* x) {
    __shared__ __align__(16) float s[128];
    cp_async16(s + threadIdx.x * 4, x + threadIdx.x * 4, true);
    cp_async_commit();
    __syncthreads();
    for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = s[threadIdx.x * 4 + i];
}

extern "C" __global__ void out_of_bounds(float* y) { y[threadIdx.x + 1] = 1.0f; }

extern "C" __global__ void behind_shared(float* y) {
    DYNAMIC_SHARED(memory);
    memory[threadIdx.x + 1] = 1;
    y[threadIdx.x] = memory[threadIdx.x];
}

extern "C" __global__ void barrier_for_some(float* y) {
    if (threadIdx.x < 32) named_barrier(1, 64);
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void misaligned_copy(float* y, const float* x) {
    __shared__ __align__(16) float s[128];
    cp_async16(s + threadIdx.x * 4, x + threadIdx.x * 4 + 1, threadIdx.x < 31);
    cp_async_commit();
    cp_async_wait<0>();
    y[threadIdx.x] = s[threadIdx.x];
}

// Waits for a phase that nobody ends.
extern "C" __global__ void barrier_never_ends(float* y) {
    __shared__ unsigned long long bar;
    if (threadIdx.x == 0) mbarrier_init(&bar, 2);
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive(&bar);
    mbarrier_wait(&bar, 0);
    y[threadIdx.x] = 1.0f;
}
