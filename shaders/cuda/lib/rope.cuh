// Rotary embedding: elements i and i + half of what is turned, a *pair*, are turned by an angle of the token's position.
//
// Expects POSITIONS, which the table has.

// The elements of four pairs.
struct Pairs {
    float4 first;
    float4 second;
};

// Cosines and sines of pairs d .. d + 4 of HALF, at a position: cos, sin, cos, sin.
template <u32 HALF>
__device__ __forceinline__ Pairs load_turn(const float* rope, u32 position, u32 d) {
    const u32 row = position < POSITIONS ? position : POSITIONS - 1;
    const float4* table = (const float4*)(rope + (u64)(row * HALF + d) * 2);
    return {table[0], table[1]};
}

__device__ __forceinline__ Pairs turn(Pairs v, Pairs by) {
    const float4 x = v.first, y = v.second, a = by.first, b = by.second;
    return {make_float4(x.x * a.x - y.x * a.y, x.y * a.z - y.y * a.w, x.z * b.x - y.z * b.y, x.w * b.z - y.w * b.w),
            make_float4(y.x * a.x + x.x * a.y, y.y * a.z + x.y * a.w, y.z * b.x + x.z * b.y, y.w * b.z + x.w * b.w)};
}
