// Kernels that are right, one for each thing that the emulation must do as a GPU does.

typedef unsigned short u16;

// Rows of x to softmax(x): loops, shuffles, barriers, static shared memory.
extern "C" __global__ void __launch_bounds__(256) row_softmax(const float* __restrict__ x, float* __restrict__ y, int n) {
    __shared__ float part[8];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* row = x + (long)blockIdx.x * n;
    float m = -3.0e38f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) m = fmaxf(m, row[i]);
    for (int o = 16; o; o >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
    if (lane == 0) part[warp] = m;
    __syncthreads();
    for (int i = 0; i < 8; i++) m = fmaxf(m, part[i]);
    __syncthreads();
    float s = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s += exp2f((row[i] - m) * 1.44269504f);
    for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
    if (lane == 0) part[warp] = s;
    __syncthreads();
    s = 0.0f;
    for (int i = 0; i < 8; i++) s += part[i];
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[(long)blockIdx.x * n + i] = exp2f((row[i] - m) * 1.44269504f) / s;
}

// c[m, n] = a[m, k] b[n, k]^T in 16 x 16 tiles, k in steps of 16 through three buffers: copies, ldmatrix, mma.
extern "C" __global__ void __launch_bounds__(32) gemm(const u16* a, const u16* b, float* c, int n, int k, int f16) {
    DYNAMIC_SHARED(memory);
    u16* tiles = (u16*)memory; // [3][2][16][16]
    const int lane = threadIdx.x, row = blockIdx.y * 16, column = blockIdx.x * 16, steps = k / 16;
    auto load = [&](int step) {
        u16* tile = tiles + step % 3 * 512;
        if (step < steps) {
            const int r = lane / 2, half = lane % 2 * 8;
            cp_async16(tile + r * 16 + half, a + (row + r) * k + step * 16 + half, true);
            cp_async16(tile + 256 + r * 16 + half, b + (column + r) * k + step * 16 + half, true);
        }
        cp_async_commit();
    };
    load(0);
    load(1);
    float d[2][4] = {};
    for (int step = 0; step < steps; step++) {
        cp_async_wait<1>();
        __syncthreads();
        load(step + 2);
        const u16* tile = tiles + step % 3 * 512;
        unsigned ra[4], rb[4];
        ldmatrix_x4(ra, tile + lane % 16 * 16 + lane / 16 * 8);
        ldmatrix_x4(rb, tile + 256 + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
        for (int half = 0; half < 2; half++) {
            if (f16) mma_f16(d[half], ra, rb[2 * half], rb[2 * half + 1]);
            else mma_bf16(d[half], ra, rb[2 * half], rb[2 * half + 1]);
        }
    }
    for (int half = 0; half < 2; half++) {
        float* out = c + (row + lane / 4) * n + column + half * 8 + lane % 4 * 2;
        out[0] = d[half][0];
        out[1] = d[half][1];
        out[8 * n] = d[half][2];
        out[8 * n + 1] = d[half][3];
    }
}

// Four 8 x 8 matrices through registers and back, transposed if asked.
extern "C" __global__ void __launch_bounds__(32) through_registers(const u16* in, u16* out, int transposed) {
    __shared__ __align__(16) u16 tile[4][8][8];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) tile[i / 64][i / 8 % 8][i % 8] = in[i];
    __syncwarp();
    unsigned r[4];
    if (transposed) ldmatrix_x4_trans(r, tile[lane / 8][lane % 8]);
    else ldmatrix_x4(r, tile[lane / 8][lane % 8]);
    for (int i = 0; i < 4; i++) *(unsigned*)(out + i * 64 + lane / 4 * 8 + lane % 4 * 2) = r[i];
}

// Each block of a cluster sums a part of x; block 0 adds the parts of the others.
extern "C" __global__ void __launch_bounds__(64) cluster_sum(const int* x, int* y, int n) {
    DYNAMIC_SHARED(memory);
    int* sum = (int*)memory;
    const unsigned rank = cluster_rank();
    if (threadIdx.x == 0) *sum = 0;
    __syncthreads();
    for (int i = rank * 64 + threadIdx.x; i < n; i += 256) atomicAdd(sum, x[blockIdx.x / 4 * n + i]);
    cluster_sync();
    if (rank == 0 && threadIdx.x == 0) {
        int all = 0;
        for (unsigned other = 0; other < 4; other++) all += *cluster_map(sum, other);
        y[blockIdx.x / 4] = all;
    }
    cluster_sync();
}

// One warp fetches tiles of 256 numbers for three others, two at a time, through barriers in memory.
extern "C" __global__ void __launch_bounds__(128) producer(const float* x, float* y, int tiles) {
    DYNAMIC_SHARED(memory);
    float* buffers = (float*)memory; // [2][256]
    unsigned long long* full = (unsigned long long*)(memory + 2048);
    unsigned long long* empty = full + 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, 96);
        }
        fence_barrier_init();
    }
    __syncthreads();
    float sum = 0.0f;
    if (threadIdx.x < 32) {
        for (int tile = 0; tile < tiles && threadIdx.x == 0; tile++) {
            if (tile >= 2) mbarrier_wait(empty + tile % 2, (tile / 2 - 1) & 1);
            mbarrier_expect(full + tile % 2, 1024);
            bulk_copy(buffers + tile % 2 * 256, x + tile * 256, 1024, full + tile % 2);
        }
    } else {
        for (int tile = 0; tile < tiles; tile++) {
            mbarrier_wait(full + tile % 2, tile / 2 & 1);
            for (int i = threadIdx.x - 32; i < 256; i += 96) sum += buffers[tile % 2 * 256 + i];
            mbarrier_arrive(empty + tile % 2);
        }
        named_barrier(1, 96);
        y[threadIdx.x - 32] = sum;
    }
}

// As `producer`, every lane copying 16 bytes at a time.
extern "C" __global__ void __launch_bounds__(64) copier(const float* x, float* y, int tiles) {
    DYNAMIC_SHARED(memory);
    float* buffers = (float*)memory; // [2][128]
    unsigned long long* full = (unsigned long long*)(memory + 1024);
    unsigned long long* empty = full + 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) mbarrier_init(full + i, 32);
        fence_barrier_init();
    }
    __syncthreads();
    float sum = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
        float* buffer = buffers + tile % 2 * 128;
        if (threadIdx.x < 32) {
            if (tile >= 2) mbarrier_wait(empty + tile % 2, (tile / 2 - 1) & 1);
            cp_async16(buffer + threadIdx.x * 4, x + tile * 128 + threadIdx.x * 4, true);
            cp_async_arrive(full + tile % 2);
        } else {
            mbarrier_wait(full + tile % 2, tile / 2 & 1);
            for (int i = threadIdx.x - 32; i < 128; i += 32) sum += buffer[i];
            mbarrier_arrive(empty + tile % 2);
        }
    }
    if (threadIdx.x >= 32) y[threadIdx.x - 32] = sum;
}

// What warp functions and intrinsics return, one number each.
extern "C" __global__ void __launch_bounds__(32) intrinsics(unsigned* out) {
    const unsigned lane = threadIdx.x, all = 0xffffffffu;
    unsigned results[] = {
        __shfl_sync(all, lane * 3, 5),
        __shfl_sync(all, lane, lane + 1, 8),
        __shfl_up_sync(all, lane, 2),
        __shfl_down_sync(all, lane, 2, 16),
        __ballot_sync(all, lane % 3 == 0),
        (unsigned)__any_sync(all, lane == 9),
        (unsigned)__all_sync(all, lane < 31),
        __reduce_add_sync(all, lane),
        __reduce_max_sync(all, lane ^ 5),
        (unsigned)__reduce_min_sync(all, (int)lane - 7),
        (unsigned)__syncthreads_count(lane < 10),
        __umulhi(0x80000001u, 6),
        (unsigned)__popc(0xf0f1),
        (unsigned)__clz(1),
        (unsigned)__ffs(8),
        __brev(3),
        __float_as_uint(exp2_approx(-1.0f)),
        pack_bf16(1.0f, -2.0f),
        pack_f16(1.0f, -2.0f),
        __float_as_uint(widen_f16(0x3555)),
        pack_bf16(1.00390625f, 1.01171875f), // ties go to even
    };
    if (lane < 16) results[0] += __shfl_xor_sync(0xffffu, lane, 1) * 0;
    for (unsigned i = 0; i < sizeof results / 4; i++) out[i * 32 + lane] = results[i];
}
