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

    // The element of 16 bits at a byte of the unpermuted matrix: 16-byte chunks are permuted by the row modulo 8.
    static unsigned short element(unsigned at) {
        const Guarded& shared = current->block->shared;
        const unsigned permuted = at ^ (at >> 7 & 7) << 4;
        if (permuted + 2 > shared.bytes) fail("wgmma: reads behind the block's shared memory");
        return *(const unsigned short*)(shared.begin + permuted);
    }
};

struct GroupMultiply {
    float (*d)[4];
    const unsigned* a;
    unsigned long long b;
    bool add;
};

// d[16 x N] (+)= a[16 x 16] b, b read by rows of its transpose (BY_ROWS) or as it is. Layout of registers as for mma.
template <unsigned N, bool BY_ROWS, float (*WIDEN)(unsigned short)>
inline void group_multiply(const char* name, float (*d)[4], const unsigned* a, unsigned long long b, bool add) {
    GroupMultiply mine = {d, a, b, add};
    collective(name, 0xffffffffu, &mine, [](Warp& warp, unsigned lanes) {
        check_whole("wgmma", lanes);
        static float a[16][16], b[16][N], d[16][N];
        const SharedMatrix matrix = SharedMatrix::read(warp.operands<GroupMultiply>(0).b);
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned n = 0; n < N; n++) {
                const unsigned by_rows = matrix.begin + n / 8 * matrix.down + n % 8 * 128 + k * 2;
                const unsigned as_is =
                    matrix.begin + n / 64 * matrix.across + k / 8 * matrix.down + k % 8 * 128 + n % 64 * 2;
                b[k][n] = WIDEN(SharedMatrix::element(BY_ROWS ? by_rows : as_is));
            }
        }
        const bool add = warp.operands<GroupMultiply>(0).add;
        for (unsigned lane = 0; lane < LANES; lane++) {
            const GroupMultiply& from = warp.operands<GroupMultiply>(lane);
            const unsigned g = lane / 4, t = lane % 4;
            for (unsigned i = 0; i < 4; i++) {
                const unsigned row = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
                a[row][k] = WIDEN((unsigned short)from.a[i]);
                a[row][k + 1] = WIDEN((unsigned short)(from.a[i] >> 16));
                for (unsigned n = 0; n < N / 8; n++)
                    d[g + 8 * (i / 2)][8 * n + 2 * t + i % 2] = add ? from.d[n][i] : 0.0f;
            }
        }
        for (unsigned row = 0; row < 16; row++)
            for (unsigned k = 0; k < 16; k++)
                for (unsigned n = 0; n < N; n++) d[row][n] += a[row][k] * b[k][n];
        for (unsigned lane = 0; lane < LANES; lane++)
            for (unsigned n = 0; n < N / 8; n++)
                for (unsigned i = 0; i < 4; i++) {
                    const unsigned row = lane / 4 + 8 * (i / 2), column = 8 * n + 2 * (lane % 4) + i % 2;
                    warp.operands<GroupMultiply>(lane).d[n][i] = d[row][column];
                }
    });
}

} // namespace emu

inline unsigned long long wgmma_matrix(const void* begin, unsigned across, unsigned down) {
    emu::check_shared("wgmma_matrix", begin, 16);
    const unsigned at = (unsigned)((const unsigned char*)begin - emu::current->block->shared.begin);
    return emu::SharedMatrix{at, across, down}.write();
}

#define EMU_WGMMA(NAME, N, BY_ROWS, WIDEN)                                                     \
    inline void NAME(float (*d)[4], const unsigned a[4], unsigned long long b, bool add) {     \
        emu::group_multiply<N, BY_ROWS, emu::WIDEN>(#NAME, d, a, b, add);                      \
    }
EMU_WGMMA(wgmma_rows8, 8, true, widen_bf16)
EMU_WGMMA(wgmma_rows8_f16, 8, true, widen_f16)
EMU_WGMMA(wgmma_rows16, 16, true, widen_bf16)
EMU_WGMMA(wgmma_rows16_f16, 16, true, widen_f16)
EMU_WGMMA(wgmma_rows32, 32, true, widen_bf16)
EMU_WGMMA(wgmma_rows32_f16, 32, true, widen_f16)
EMU_WGMMA(wgmma_rows64, 64, true, widen_bf16)
EMU_WGMMA(wgmma_rows64_f16, 64, true, widen_f16)
EMU_WGMMA(wgmma_columns64, 64, false, widen_bf16)
EMU_WGMMA(wgmma_columns64_f16, 64, false, widen_f16)
EMU_WGMMA(wgmma_columns128, 128, false, widen_bf16)
EMU_WGMMA(wgmma_columns128_f16, 128, false, widen_f16)
#undef EMU_WGMMA
