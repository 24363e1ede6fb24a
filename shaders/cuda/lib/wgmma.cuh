// Warpgroup matrix products (sm_90a): four warps multiply 64 rows held in registers by a matrix in shared memory.
//
// Registers are laid out as for `mma_bf16`, warp w of the group holding rows 16 w .. 16 w + 16. The matrix in shared memory
// lies in pieces of 64 elements (128 bytes) a row, rows of a piece one behind the other, 16-byte chunks permuted by the row
// modulo 8: the order of a tiled cache. Pieces begin at multiples of 1024 bytes.
//
// Needs ptx.

#ifndef CUDA_ON_CPU

// Registers that the products read or add to are as the code says.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the latest PENDING groups of products are complete.
template <u32 PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What this thread wrote to shared memory is seen by products and bulk copies that come after a barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// How the unit that multiplies finds the matrix: where it begins, how far apart pieces beside each other are (`across`)
// and groups of eight rows (`down`), in bytes.
__device__ __forceinline__ u64 wgmma_matrix(const void* begin, u32 across, u32 down) {
    const u64 swizzle_128 = 1;
    return (u64)(shared_address(begin) >> 4 & 0x3fff) | (u64)(across >> 4) << 16 | (u64)(down >> 4) << 32 | swizzle_128 << 62;
}

// The same matrix so many bytes further on: one addition, where a descriptor made anew takes ten instructions.
__device__ __forceinline__ u64 wgmma_further(u64 matrix, u32 bytes) {
    return (matrix & 0xffffffff00000000ull) | ((u32)matrix + (bytes >> 4));
}

#define WGMMA_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define WGMMA_EIGHT(i) \
    WGMMA_FOUR(i), WGMMA_FOUR(i + 1), WGMMA_FOUR(i + 2), WGMMA_FOUR(i + 3), WGMMA_FOUR(i + 4), WGMMA_FOUR(i + 5), \
        WGMMA_FOUR(i + 6), WGMMA_FOUR(i + 7)
#define WGMMA_NAMES_4 "%0, %1, %2, %3"
#define WGMMA_NAMES_8 WGMMA_NAMES_4 ", %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32 \
    WGMMA_NAMES_16 ", " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64 \
    WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Results [64 x WIDTH] in d, operands behind them: `a`, `b`, whether to add.
#define WGMMA_PRODUCT(NAME, WIDTH, FORMAT, TRANSPOSED, NAMES, OPERANDS, ADD, ...)                                        \
    __device__ __forceinline__ void NAME(float (*d)[4], const u32 a[4], u64 b, bool add) {                              \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." FORMAT "." FORMAT " {" NAMES "}, " OPERANDS    \
                     ", add, 1, 1, " TRANSPOSED ";\n}\n"                                                                \
                     : __VA_ARGS__                                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));                              \
    }
// The same with `a` in shared memory: 64 rows of a piece.
#define WGMMA_SHARED_PRODUCT(NAME, WIDTH, FORMAT, TRANSPOSED, NAMES, OPERANDS, ADD, ...)                                 \
    __device__ __forceinline__ void NAME(float (*d)[4], u64 a, u64 b, bool add) {                                       \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." FORMAT "." FORMAT " {" NAMES "}, " OPERANDS    \
                     ", add, 1, 1, 0, " TRANSPOSED ";\n}\n"                                                             \
                     : __VA_ARGS__                                                                                      \
                     : "l"(a), "l"(b), "r"((int)add));                                                                  \
    }
#define WGMMA_8(NAME, FORMAT) \
    WGMMA_PRODUCT(NAME, "8", FORMAT, "0", WGMMA_NAMES_4, "{%4, %5, %6, %7}, %8", "%9", WGMMA_FOUR(0))
#define WGMMA_16(NAME, FORMAT) \
    WGMMA_PRODUCT(NAME, "16", FORMAT, "0", WGMMA_NAMES_8, "{%8, %9, %10, %11}, %12", "%13", WGMMA_FOUR(0), WGMMA_FOUR(1))
#define WGMMA_32(NAME, FORMAT)                                                                                          \
    WGMMA_PRODUCT(NAME, "32", FORMAT, "0", WGMMA_NAMES_16, "{%16, %17, %18, %19}, %20", "%21", WGMMA_FOUR(0), WGMMA_FOUR(1), \
                  WGMMA_FOUR(2), WGMMA_FOUR(3))
#define WGMMA_64(NAME, FORMAT, TRANSPOSED) \
    WGMMA_PRODUCT(NAME, "64", FORMAT, TRANSPOSED, WGMMA_NAMES_32, "{%32, %33, %34, %35}, %36", "%37", WGMMA_EIGHT(0))
#define WGMMA_128(NAME, FORMAT, TRANSPOSED)                                                                     \
    WGMMA_PRODUCT(NAME, "128", FORMAT, TRANSPOSED, WGMMA_NAMES_64, "{%64, %65, %66, %67}, %68", "%69", WGMMA_EIGHT(0), \
                  WGMMA_EIGHT(8))

// d[64 x N] = a[64 x 16] bᵀ, or += if `add`; b has N rows, of which 16 columns are used.
// The _f16 forms take f16 instead of bf16.
WGMMA_8(wgmma_rows8, "bf16")
WGMMA_8(wgmma_rows8_f16, "f16")
WGMMA_16(wgmma_rows16, "bf16")
WGMMA_16(wgmma_rows16_f16, "f16")
WGMMA_32(wgmma_rows32, "bf16")
WGMMA_32(wgmma_rows32_f16, "f16")
WGMMA_64(wgmma_rows64, "bf16", "0")
WGMMA_64(wgmma_rows64_f16, "f16", "0")

// d[64 x 64] += a[64 x 16] b; b has 16 rows of 64 columns.
WGMMA_64(wgmma_columns64, "bf16", "1")
WGMMA_64(wgmma_columns64_f16, "f16", "1")

// d[64 x 128] += a[64 x 16] b; b has 16 rows of 128 columns.
WGMMA_128(wgmma_columns128, "bf16", "1")
WGMMA_128(wgmma_columns128_f16, "f16", "1")

// Both in shared memory.
#define WGMMA_SHARED_64(NAME, FORMAT) \
    WGMMA_SHARED_PRODUCT(NAME, "64", FORMAT, "0", WGMMA_NAMES_32, "%32, %33", "%34", WGMMA_EIGHT(0))
#define WGMMA_SHARED_128(NAME, FORMAT)                                                                                  \
    WGMMA_SHARED_PRODUCT(NAME, "128", FORMAT, "1", WGMMA_NAMES_64, "%64, %65", "%66", WGMMA_EIGHT(0), WGMMA_EIGHT(8))
WGMMA_SHARED_64(wgmma_shared_rows64, "bf16")
WGMMA_SHARED_64(wgmma_shared_rows64_f16, "f16")
WGMMA_SHARED_128(wgmma_shared_columns128, "bf16")
WGMMA_SHARED_128(wgmma_shared_columns128_f16, "f16")

// All four warps of a group keep this many registers each, or get as many, once others have given them.
template <u32 REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <u32 REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif // CUDA_ON_CPU
