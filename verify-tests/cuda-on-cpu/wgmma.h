// The functions of shaders/cuda/lib/wgmma.cuh, which it leaves to this file under CUDA_ON_CPU.
//
// A warpgroup's product is four products, one a warp, of 16 rows each: nothing passes between the warps but the matrix
// in shared memory, which is read when the product is asked for.
#pragma once
#include "ptx.h"

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <unsigned PENDING>
inline void wgmma_wait() {}
inline void fence_async() {}
template <unsigned REGISTERS>
inline void give_registers() {}
template <unsigned REGISTERS>
inline void take_registers() {}

namespace emu {

// A matrix in the block's dynamic shared memory, in one word.
struct SharedMatrix {
    unsigned begin, across, down;

    static SharedMatrix read(unsigned long long word) {
        return {(unsigned)(word & 0xfffff), (unsigned)(word >> 20 & 0xfffff), (unsigned)(word >> 40)};
    }
    unsigned long long write() const {
        return begin | (unsigned long long)across << 20 | (unsigned long long)down << 40;
    }
};

struct GroupMultiply {
    float (*d)[4];
    const unsigned* a;
    unsigned long long b;
    bool add;
};

} // namespace emu

inline unsigned long long wgmma_matrix(const void* begin, unsigned across, unsigned down) {
    emu::check_shared("wgmma_matrix", begin, 16);
    const unsigned at = (unsigned)((const unsigned char*)begin - emu::current->block->shared.begin);
    return emu::SharedMatrix{at, across, down}.write();
}

inline unsigned long long wgmma_further(unsigned long long matrix, unsigned bytes) { return matrix + bytes; }

// Name, columns of the product, whether b is read by rows of its transpose, format.
#define EMU_EACH_WGMMA(EACH)                     \
    EACH(wgmma_rows8, 8, true, bf16)             \
    EACH(wgmma_rows8_f16, 8, true, f16)          \
    EACH(wgmma_rows16, 16, true, bf16)           \
    EACH(wgmma_rows16_f16, 16, true, f16)        \
    EACH(wgmma_rows32, 32, true, bf16)           \
    EACH(wgmma_rows32_f16, 32, true, f16)        \
    EACH(wgmma_rows64, 64, true, bf16)           \
    EACH(wgmma_rows64_f16, 64, true, f16)        \
    EACH(wgmma_columns64, 64, false, bf16)       \
    EACH(wgmma_columns64_f16, 64, false, f16)    \
    EACH(wgmma_columns128, 128, false, bf16)     \
    EACH(wgmma_columns128_f16, 128, false, f16)

#define EMU_WGMMA(NAME, N, BY_ROWS, FORMAT)                                                    \
    namespace emu {                                                                            \
    void NAME(Warp& warp, unsigned lanes);                                                     \
    }                                                                                          \
    inline void NAME(float (*d)[4], const unsigned a[4], unsigned long long b, bool add) {     \
        emu::GroupMultiply mine = {d, a, b, add};                                              \
        emu::collective(#NAME, 0xffffffffu, &mine, emu::NAME);                                 \
    }
EMU_EACH_WGMMA(EMU_WGMMA)
#undef EMU_WGMMA

namespace emu {
// This lane's elements of 64 rows in shared memory, as products take them from registers.
void read_rows(unsigned long long matrix, unsigned a[4]);
} // namespace emu

#define EMU_SHARED_WGMMA(NAME, OF_REGISTERS)                                                             \
    inline void NAME(float (*d)[4], unsigned long long a, unsigned long long b, bool add) {             \
        unsigned rows[4];                                                                               \
        emu::read_rows(a, rows);                                                                        \
        OF_REGISTERS(d, rows, b, add);                                                                  \
    }
EMU_SHARED_WGMMA(wgmma_shared_rows64, wgmma_rows64)
EMU_SHARED_WGMMA(wgmma_shared_rows64_f16, wgmma_rows64_f16)
EMU_SHARED_WGMMA(wgmma_shared_columns128, wgmma_columns128)
EMU_SHARED_WGMMA(wgmma_shared_columns128_f16, wgmma_columns128_f16)
#undef EMU_SHARED_WGMMA
