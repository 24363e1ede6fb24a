// What the lanes of a warp do together with matrices.
#pragma once
#include "wgmma.h"

namespace emu {

inline void check_whole(const char* name, unsigned lanes) {
    if (lanes != 0xffffffffu) fail("%s: only lanes %08x take part", name, lanes);
}

// Matrix i of four: lane l gets the elements 2 (l % 4) and the next of row l / 4, or of column l / 4.
template <bool TRANSPOSED>
inline void load(Warp& warp, unsigned lanes) {
    check_whole("ldmatrix", lanes);
    for (unsigned lane = 0; lane < LANES; lane++) {
        for (unsigned i = 0; i < 4; i++) {
            const unsigned a = lane / 4, b = lane % 4 * 2;
            auto element = [&](unsigned r, unsigned c) -> unsigned {
                return warp.operands<LoadMatrix>(8 * i + r).row[c];
            };
            const unsigned low = TRANSPOSED ? element(b, a) : element(a, b);
            const unsigned high = TRANSPOSED ? element(b + 1, a) : element(a, b + 1);
            warp.operands<LoadMatrix>(lane).result[i] = high << 16 | low;
        }
    }
}
void load_matrices(Warp& warp, unsigned lanes) { load<false>(warp, lanes); }
void load_matrices_transposed(Warp& warp, unsigned lanes) { load<true>(warp, lanes); }

// d[16 x 8] += a[16 x 16] b[16 x 8]. With g = lane / 4 and t = lane % 4, a lane holds of a the elements
// [g + 8 (i % 2)][2 t + 8 (i / 2)] and the next in a[i], of b [2 t + 8 i][g] and the one below in b[i], of d
// [g + 8 (i / 2)][2 t + i % 2] in d[i]. Sums run from k = 0 on, starting with d.
template <float (*WIDEN)(unsigned short)>
inline void multiply(Warp& warp, unsigned lanes) {
    check_whole("mma", lanes);
    float a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        const Multiply& from = warp.operands<Multiply>(lane);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
            a[row][k] = WIDEN((unsigned short)from.a[i]);
            a[row][k + 1] = WIDEN((unsigned short)(from.a[i] >> 16));
            d[g + 8 * (i / 2)][2 * t + i % 2] = from.d[i];
        }
        for (unsigned i = 0; i < 2; i++) {
            b[2 * t + 8 * i][g] = WIDEN((unsigned short)from.b[i]);
            b[2 * t + 8 * i + 1][g] = WIDEN((unsigned short)(from.b[i] >> 16));
        }
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        for (unsigned i = 0; i < 4; i++) {
            warp.operands<Multiply>(lane).d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
        }
    }
}
void multiply_bf16(Warp& warp, unsigned lanes) { multiply<widen_bf16>(warp, lanes); }
void multiply_f16(Warp& warp, unsigned lanes) { multiply<widen_f16>(warp, lanes); }

// The element of 16 bits at a byte of the unpermuted matrix in shared memory: 16-byte chunks are permuted by the row
// modulo 8.
inline unsigned short element(unsigned at) {
    const Guarded& shared = current->block->shared;
    const unsigned permuted = at ^ (at >> 7 & 7) << 4;
    if (permuted + 2 > shared.bytes) fail("wgmma: reads behind the block's shared memory");
    return *(const unsigned short*)(shared.begin + permuted);
}

void read_rows(unsigned long long word, unsigned a[4]) {
    const SharedMatrix matrix = SharedMatrix::read(word);
    const unsigned lane = current->index.x % LANES, warp = current->index.x / LANES % 4;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = warp * 16 + lane / 4 + 8 * (i % 2), k = lane % 4 * 2 + 8 * (i / 2);
        const unsigned at = matrix.begin + row / 8 * matrix.down + row % 8 * 128 + k * 2;
        a[i] = element(at) | (unsigned)element(at + 2) << 16;
    }
}

// d[16 x N] (+)= a[16 x 16] b, b read by rows of its transpose (BY_ROWS) or as it is. Layout of registers as for mma.
template <unsigned N, bool BY_ROWS, float (*WIDEN)(unsigned short)>
inline void group_multiply(Warp& warp, unsigned lanes) {
    check_whole("wgmma", lanes);
    static float a[16][16], b[16][N], d[16][N];
    const SharedMatrix matrix = SharedMatrix::read(warp.operands<GroupMultiply>(0).b);
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned n = 0; n < N; n++) {
            const unsigned by_rows = matrix.begin + n / 8 * matrix.down + n % 8 * 128 + k * 2;
            const unsigned as_is =
                matrix.begin + n / 64 * matrix.across + k / 8 * matrix.down + k % 8 * 128 + n % 64 * 2;
            b[k][n] = WIDEN(element(BY_ROWS ? by_rows : as_is));
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
}
#define EMU_WGMMA(NAME, N, BY_ROWS, FORMAT) \
    void NAME(Warp& warp, unsigned lanes) { group_multiply<N, BY_ROWS, widen_##FORMAT>(warp, lanes); }
EMU_EACH_WGMMA(EMU_WGMMA)
#undef EMU_WGMMA

} // namespace emu
