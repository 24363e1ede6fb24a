// Noise that is a pure function of (seed, sample, position, token): the same operations as runtime/src/philox.rs,
// which explains them.

const MAX_GUMBEL: f32 = 16.635532f;

// The upper word of the 64 bit product, from products of 16 bit halves.
fn mul_high(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let left = (a >> 16u) * (b & 0xffffu);
    let right = (a & 0xffffu) * (b >> 16u);
    let middle = (low >> 16u) + (left & 0xffffu) + (right & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (left >> 16u) + (right >> 16u) + (middle >> 16u);
}

// Philox4x32-10.
fn philox(block: vec4<u32>, seed: vec2<u32>) -> vec4<u32> {
    var counter = block;
    var key = seed;
    for (var round = 0u; round < 10u; round++) {
        counter = vec4(
            mul_high(0xcd9e8d57u, counter.z) ^ counter.y ^ key.x,
            0xcd9e8d57u * counter.z,
            mul_high(0xd2511f53u, counter.x) ^ counter.w ^ key.y,
            0xd2511f53u * counter.x,
        );
        key += vec2(0x9e3779b9u, 0xbb67ae85u);
    }
    return counter;
}

// The noise words of the four tokens 4 * group ..
fn noise(group: u32, position: u32, sample: u32, seed: vec2<u32>) -> vec4<u32> {
    return philox(vec4(group, position, sample, 0u), seed);
}

// A standard Gumbel variable of each noise word.
fn gumbel(word: vec4<u32>) -> vec4<f32> {
    let u = (vec4<f32>(word >> vec4(9u)) + 0.5f) * (1.0f / 8388608.0f);
    return -ln(-ln(u));
}

// The natural logarithm of positive normal numbers, to 1 unit in the last place or so. `log` would be off by 2^-21 near
// 1, where large Gumbels are made.
fn ln(x: vec4<f32>) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(x);
    let exponent = bitcast<vec4<i32>>(bits - vec4(0x3f3504f3u)) >> vec4(23u);
    let f = bitcast<vec4<f32>>(bits - bitcast<vec4<u32>>(exponent << vec4(23u))) - 1.0f;
    var p = vec4(-0.07634475f);
    p = p * f + 0.1276157f;
    p = p * f - 0.13160187f;
    p = p * f + 0.14201759f;
    p = p * f - 0.16623357f;
    p = p * f + 0.20001227f;
    p = p * f - 0.2500082f;
    p = p * f + 0.3333333f;
    return vec4<f32>(exponent) * 0.6931472f + (f + f * f * (f * p - 0.5f));
}
