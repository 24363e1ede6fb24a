// Partial results of attention to latents: what the chunks of a unit leave for `merge_latents`.
//
// Needs ptx, chunks. Expects M, LATENT.

// Floats of a chunk in the workspace: outputs [M, LATENT], not divided by their sums, then {maximum, sum} [M], maxima of base 2.
constexpr u32 PARTIAL = M * (LATENT + 2);
