//! The paged key/value cache of a sequence: a committed prefix, then room for one tree.
//!
//! Invariant: slots `0..len` hold the committed tokens' rows. A pass writes its tree to slots `len..len + nodes`;
//! committing moves the accepted ones down and raises `len`. Rejected rows are left alone: nothing reads past `len`,
//! and the next tree overwrites them.

use crate::error::{Error, Result};

/// The pages of a cache that no sequence holds.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    page_size: usize,
    total: usize,
}

impl PagePool {
    pub fn new(pages: usize, page_size: usize) -> PagePool {
        PagePool { free: (0..pages as u32).rev().collect(), page_size, total: pages }
    }
}

#[derive(Debug, Default)]
pub struct KvCache {
    pages: Vec<u32>,
    len: usize,
}

impl KvCache {
    /// Committed tokens.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The pool's page that holds each run of `page_size` slots.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Makes sure that `nodes` slots behind the prefix have pages.
    pub fn reserve(&mut self, pool: &mut PagePool, nodes: usize) -> Result<()> {
        let needed = (self.len + nodes).div_ceil(pool.page_size);
        while self.pages.len() < needed {
            let Some(page) = pool.free.pop() else {
                return Err(Error::ContextFull { needed: self.len + nodes, limit: pool.total * pool.page_size });
            };
            self.pages.push(page);
        }
        Ok(())
    }

    /// Counts `nodes` more slots as committed; their rows must lie next to the prefix.
    pub fn commit(&mut self, nodes: usize) {
        self.len += nodes;
    }

    /// Forgets everything after the first `len` tokens, and keeps the pages for reuse by this sequence.
    pub fn rewind(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Gives all pages back.
    pub fn release(&mut self, pool: &mut PagePool) {
        pool.free.extend(self.pages.drain(..).rev());
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_once_and_given_back() {
        let mut pool = PagePool::new(3, 4);
        let (mut a, mut b) = (KvCache::default(), KvCache::default());
        a.reserve(&mut pool, 5).unwrap();
        b.reserve(&mut pool, 4).unwrap();
        assert_eq!((a.pages(), b.pages()), ([0, 1].as_slice(), [2].as_slice()));
        a.commit(5);
        let full = a.reserve(&mut pool, 4).unwrap_err();
        assert!(matches!(full, Error::ContextFull { needed: 9, limit: 12 }), "{full}");
        b.release(&mut pool);
        a.reserve(&mut pool, 4).unwrap();
        assert_eq!(a.pages(), [0, 1, 2]);
        a.rewind(2);
        assert_eq!(a.len(), 2);
    }
}
