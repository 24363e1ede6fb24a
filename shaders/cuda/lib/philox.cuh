// Noise that is a pure function of (seed, sample, position, token): the same operations as runtime/src/philox.rs,
// which explains them.
//
// Bit for bit: products and sums are written so that the compiler does not fuse them.
//
// Needs ptx.

constexpr float MAX_GUMBEL = 16.635532f;

struct Four {
    u32 words[4];
};

// Philox4x32-10.
__device__ __forceinline__ Four philox(Four counter, u32 key0, u32 key1) {
    u32 c0 = counter.words[0], c1 = counter.words[1], c2 = counter.words[2], c3 = counter.words[3];
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
        const u32 high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}

// The natural logarithm of a positive normal number, to 1 unit in the last place or so.
__device__ __forceinline__ float ln(float x) {
    const u32 bits = __float_as_uint(x);
    const int exponent = (int)(bits - 0x3f3504f3u) >> 23;
    const float f = __fadd_rn(__uint_as_float(bits - ((u32)exponent << 23)), -1.0f);
    float p = -0.07634475f;
    p = __fadd_rn(__fmul_rn(p, f), 0.1276157f);
    p = __fadd_rn(__fmul_rn(p, f), -0.13160187f);
    p = __fadd_rn(__fmul_rn(p, f), 0.14201759f);
    p = __fadd_rn(__fmul_rn(p, f), -0.16623357f);
    p = __fadd_rn(__fmul_rn(p, f), 0.20001227f);
    p = __fadd_rn(__fmul_rn(p, f), -0.2500082f);
    p = __fadd_rn(__fmul_rn(p, f), 0.3333333f);
    const float tail = __fmul_rn(__fmul_rn(f, f), __fadd_rn(__fmul_rn(f, p), -0.5f));
    return __fadd_rn(__fmul_rn((float)exponent, 0.6931472f), __fadd_rn(f, tail));
}

// A standard Gumbel variable of a noise word. It never falls as the word grows.
__device__ __forceinline__ float gumbel(u32 word) {
    const float u = __fmul_rn(__fadd_rn((float)(word >> 9), 0.5f), 1.0f / 8388608.0f);
    return -ln(-ln(u));
}
