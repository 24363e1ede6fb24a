// A *piece* of a row of attention's output, which a thread finishes: eight elements, as one lane has them of a product's results:
// pairs, eight apart.
//
// Needs ptx, formats.

#define NEVER __uint_as_float(0xff800000u) // minus infinity

__device__ __forceinline__ u32 piece_element(u32 piece, u32 pair) { return piece / 4 * 32 + pair * 8 + piece % 4 * 2; }

// Of some of the row's keys: to be divided by the sum.
struct Piece {
    float largest = NEVER;
    float sum = 0.0f;
    Eight out = {};

    // Scales to a larger maximum, which may still be none.
    __device__ __forceinline__ float weight(float most) const { return exp2_approx(largest - (most == NEVER ? 0.0f : most)); }

    __device__ void add(const Piece& other) {
        const float most = fmaxf(largest, other.largest), mine = weight(most), theirs = other.weight(most);
        largest = most;
        sum = sum * mine + other.sum * theirs;
#pragma unroll
        for (u32 i = 0; i < 8; i++) out.x[i] = out.x[i] * mine + other.out.x[i] * theirs;
    }
};
