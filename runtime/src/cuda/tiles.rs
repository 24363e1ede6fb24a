//! The two orders of a cache: the plain one of [`Op`](treespark_kernel_gen::Op)'s definition, which the host sees, and
//! the tiled one that tensor cores read (`kernel_gen::cuda::is_tiled`), which lies on the device.
//!
//! Only who looks into a cache from the host comes here, and that is a test.

use std::ops::Range;

use treespark_kernel_gen::cuda::{cache_place, is_tiled};
use treespark_kernel_gen::{BufferDesc, CacheShape, DType, Role};

/// A tiled cache. Its elements have 16 bits; an even one and the next are a word in both orders.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    shape: CacheShape,
    dtype: DType,
}

impl Tiles {
    /// None where both orders are one.
    pub fn of(desc: &BufferDesc) -> Option<Tiles> {
        let &[layers, pages, kv_heads, page_size, head_dim] = desc.shape.as_slice() else { return None };
        let shape = CacheShape { layers, pages, kv_heads, page_size, head_dim };
        (desc.role == Role::Cache && is_tiled(&shape, desc.dtype)).then_some(Tiles { shape, dtype: desc.dtype })
    }

    /// Words of one page of one head: no word leaves its block.
    fn block_words(&self) -> usize {
        self.shape.page_size * self.shape.head_dim / 2
    }

    /// The words of all blocks that these words touch.
    pub fn blocks(&self, words: Range<usize>) -> Range<usize> {
        let block = self.block_words();
        words.start / block * block..words.end.next_multiple_of(block)
    }

    /// Where each plain word of a block lies in it.
    fn places(&self) -> Vec<usize> {
        let words_of_a_vector = self.shape.head_dim / 2;
        let place = |word: usize| {
            let (slot, d) = (word / words_of_a_vector, 2 * (word % words_of_a_vector));
            cache_place(&self.shape, self.dtype, slot, d) / 2
        };
        (0..self.block_words()).map(place).collect()
    }

    /// Whole blocks, from tiled to plain.
    pub fn plain(&self, tiled: &[u32]) -> Vec<u32> {
        let places = self.places();
        tiled.chunks(places.len()).flat_map(|block| places.iter().map(|&place| block[place])).collect()
    }

    /// Whole blocks, from plain to tiled.
    pub fn tiled(&self, plain: &[u32]) -> Vec<u32> {
        let places = self.places();
        let mut tiled = vec![0; plain.len()];
        for (from, to) in plain.chunks(places.len()).zip(tiled.chunks_mut(places.len())) {
            places.iter().zip(from).for_each(|(&place, &word)| to[place] = word);
        }
        tiled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(dtype: DType, dims: &[usize]) -> BufferDesc {
        BufferDesc { name: "k".into(), role: Role::Cache, dtype, shape: dims.to_vec() }
    }

    #[test]
    fn tiled_and_plain_are_each_other_s_inverse() {
        let dims = [2, 3, 2, 16, 128];
        let desc = cache(DType::BF16, &dims);
        let tiles = Tiles::of(&desc).unwrap();
        let plain: Vec<u32> = (0..desc.bytes() as u32 / 4).collect();
        let tiled = tiles.tiled(&plain);
        assert_ne!(tiled, plain);
        assert_eq!(tiles.plain(&tiled), plain);
        // Layer 1, page 2, head 1, slot 5, elements 70 and 71.
        let block = ((3 + 2) * 2 + 1) * 16 * 128;
        let from = (block + 5 * 128 + 70) / 2;
        let to = (block + cache_place(&tiles.shape, desc.dtype, 5, 70)) / 2;
        assert_eq!((tiled[to], to != from), (plain[from], true));
    }

    #[test]
    fn ranges_grow_to_whole_blocks() {
        let tiles = Tiles::of(&cache(DType::F16, &[1, 2, 1, 16, 64])).unwrap();
        assert_eq!(tiles.blocks(3..4), 0..512);
        assert_eq!(tiles.blocks(511..513), 0..1024);
        assert_eq!(tiles.blocks(512..1024), 512..1024);
    }

    #[test]
    fn other_buffers_are_plain() {
        assert!(Tiles::of(&cache(DType::F32, &[1, 2, 1, 16, 64])).is_none());
        assert!(Tiles::of(&cache(DType::BF16, &[1, 2, 1, 16, 32])).is_none());
        assert!(Tiles::of(&BufferDesc { role: Role::Scratch, ..cache(DType::BF16, &[1, 2, 1, 16, 64]) }).is_none());
    }
}
