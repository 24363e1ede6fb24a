// Number formats of weights and caches, widened to f32 where they are used.
//
// WGSL has no bf16, and f16 is an optional feature; both lie two in a word, the element of lower index in the low half.

const F32: u32 = 0u;
const BF16: u32 = 1u;
const F16: u32 = 2u;

// Elements 0..4 and 4..8 of eight consecutive ones.
struct Eight {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

fn widen_pair(format: u32, word: u32) -> vec2<f32> {
    if (format == BF16) {
        return bitcast<vec2<f32>>(vec2<u32>(word << 16u, word & 0xffff0000u));
    }
    return unpack2x16float(word);
}

fn widen(format: u32, words: vec4<u32>) -> Eight {
    let a = widen_pair(format, words.x);
    let b = widen_pair(format, words.y);
    let c = widen_pair(format, words.z);
    let d = widen_pair(format, words.w);
    return Eight(vec4<f32>(a, b), vec4<f32>(c, d));
}

// Rounds to nearest, ties to even. A NaN stays one.
fn bf16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0x7fc0u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn narrow_pair(format: u32, pair: vec2<f32>) -> u32 {
    if (format == BF16) {
        return bf16_bits(pair.x) | (bf16_bits(pair.y) << 16u);
    }
    return pack2x16float(pair);
}

// sum + a · b, one product after the other: written out, so that every kernel rounds alike.
fn fma8(a: Eight, b: Eight, sum: f32) -> f32 {
    var total = fma(a.lo.x, b.lo.x, sum);
    total = fma(a.lo.y, b.lo.y, total);
    total = fma(a.lo.z, b.lo.z, total);
    total = fma(a.lo.w, b.lo.w, total);
    total = fma(a.hi.x, b.hi.x, total);
    total = fma(a.hi.y, b.hi.y, total);
    total = fma(a.hi.z, b.hi.z, total);
    return fma(a.hi.w, b.hi.w, total);
}
