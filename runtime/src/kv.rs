//! The paged key/value cache of a sequence: a committed prefix, then room for one tree; and the pool of pages.
//!
//! Invariant: slots `0..len` hold the committed tokens' rows. A pass writes its tree to slots `len..len + nodes`;
//! committing moves the accepted ones down and raises `len`. Rejected rows are left alone: nothing reads past `len`,
//! and the next tree overwrites them.
//!
//! Prefixes are shared: a page full of committed tokens is *published* under these tokens and the page before it, and a
//! sequence that begins with the same tokens takes it as its own. Nobody writes to a published page, since all who hold it
//! have a longer prefix. A drafter's keys and values lie in the same slots of the same pages, so that what is shared of the
//! target's context is shared of the drafter's. A published page that nobody holds stays until its place is needed, the
//! longest unused first.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Error, Result};

/// The pages of a cache, and who holds them.
#[derive(Debug)]
pub struct PagePool {
    page_size: usize,
    pages: Vec<Page>,
    /// Pages that nobody holds and that hold nothing.
    free: Vec<u32>,
    /// Published pages that nobody holds, by when they were given back.
    idle: BTreeMap<u64, u32>,
    published: HashMap<Contents, u32>,
    /// Counts events, to name them.
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Page {
    holders: usize,
    /// Names what it holds and all before it, once it is published.
    chain: Option<u64>,
    contents: Option<Contents>,
    given_back: u64,
}

/// The tokens of a page, and the chain of the page before it: 0 of the first.
type Contents = (u64, Box<[u32]>);

impl PagePool {
    pub fn new(pages: usize, page_size: usize) -> PagePool {
        PagePool {
            page_size,
            pages: vec![Page::default(); pages],
            free: (0..pages as u32).rev().collect(),
            idle: BTreeMap::new(),
            published: HashMap::new(),
            clock: 0,
        }
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that a sequence could take.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// A cache that holds as much of these tokens as was published, in whole pages.
    pub fn share(&mut self, tokens: &[u32]) -> KvCache {
        let mut kv = KvCache::default();
        for run in tokens.chunks_exact(self.page_size) {
            let Some(&page) = self.published.get(&(kv.chain, run.into())) else { break };
            self.hold(page);
            kv.pages.push(page);
            kv.chain = self.pages[page as usize].chain.expect("a published page");
            kv.published += 1;
        }
        kv.len = kv.published * self.page_size;
        kv
    }

    /// Publishes the pages of a cache that have become full; `tokens` are those that it holds, and may be more, or fewer where a
    /// sequence ended inside what was accepted.
    pub fn publish(&mut self, kv: &mut KvCache, tokens: &[u32]) {
        while kv.len.min(tokens.len()) / self.page_size > kv.published {
            let from = kv.published * self.page_size;
            let contents: Contents = (kv.chain, tokens[from..from + self.page_size].into());
            let page = match self.published.get(&contents) {
                // Someone else was first. This page stays the sequence's own, and what follows hangs on the other.
                Some(&page) => page,
                None => {
                    let page = kv.pages[kv.published];
                    self.clock += 1;
                    let held = &mut self.pages[page as usize];
                    (held.chain, held.contents) = (Some(self.clock), Some(contents.clone()));
                    self.published.insert(contents, page);
                    page
                }
            };
            kv.chain = self.pages[page as usize].chain.expect("a published page");
            kv.published += 1;
        }
    }

    fn hold(&mut self, page: u32) {
        let held = &mut self.pages[page as usize];
        if held.holders == 0 {
            self.idle.remove(&held.given_back);
        }
        held.holders += 1;
    }

    fn take(&mut self) -> Option<u32> {
        let page = self.free.pop().or_else(|| {
            let (_, page) = self.idle.pop_first()?;
            let page_of = &mut self.pages[page as usize];
            page_of.chain = None;
            self.published.remove(&page_of.contents.take().expect("an idle page is published"));
            Some(page)
        })?;
        self.pages[page as usize].holders = 1;
        Some(page)
    }

    fn give_back(&mut self, page: u32) {
        self.clock += 1;
        let held = &mut self.pages[page as usize];
        held.holders -= 1;
        if held.holders == 0 {
            held.given_back = self.clock;
            match held.contents {
                Some(_) => drop(self.idle.insert(self.clock, page)),
                None => self.free.push(page),
            }
        }
    }
}

#[derive(Debug, Default)]
pub struct KvCache {
    pages: Vec<u32>,
    len: usize,
    /// Pages that are published, under their own name or another's, and the chain of the last of them.
    published: usize,
    chain: u64,
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

    /// Pages that are missing for `nodes` slots behind the prefix.
    pub fn missing(&self, pool: &PagePool, nodes: usize) -> usize {
        (self.len + nodes).div_ceil(pool.page_size).saturating_sub(self.pages.len())
    }

    /// Makes sure that `nodes` slots behind the prefix have pages.
    pub fn reserve(&mut self, pool: &mut PagePool, nodes: usize) -> Result<()> {
        let missing = self.missing(pool, nodes);
        if missing > pool.available() {
            let limit = pool.pages() * pool.page_size;
            return Err(Error::ContextFull { needed: self.len + nodes, limit });
        }
        self.pages.extend((0..missing).map_while(|_| pool.take()));
        Ok(())
    }

    /// Counts `nodes` more slots as committed; their rows must lie next to the prefix.
    pub fn commit(&mut self, nodes: usize) {
        self.len += nodes;
    }

    /// Forgets everything after the first `len` tokens, and keeps the pages for reuse by this sequence. What is published
    /// is not forgotten.
    pub fn rewind(&mut self, len: usize) {
        debug_assert_eq!(self.published, 0, "published pages must stay as they are");
        self.len = self.len.min(len);
    }

    /// Gives all pages back.
    pub fn release(&mut self, pool: &mut PagePool) {
        // The last first: it is the first to be taken again, for what comes before it is worth more.
        std::mem::take(self).pages.into_iter().rev().for_each(|page| pool.give_back(page));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    /// A cache of these tokens, all committed.
    fn filled(pool: &mut PagePool, tokens: &[u32]) -> KvCache {
        let mut kv = pool.share(tokens);
        let missing = tokens.len() - kv.len();
        kv.reserve(pool, missing).unwrap();
        kv.commit(missing);
        pool.publish(&mut kv, tokens);
        kv
    }

    #[test]
    fn whole_pages_of_a_common_prefix_are_shared() {
        let mut pool = PagePool::new(8, 2);
        let a = filled(&mut pool, &[1, 2, 3, 4, 5]);
        let b = filled(&mut pool, &[1, 2, 3, 4, 6, 7]);
        assert_eq!(a.pages()[..2], b.pages()[..2]);
        assert_ne!(a.pages()[2], b.pages()[2]);
        let c = pool.share(&[3, 4, 1, 2]);
        assert_eq!((c.len(), c.pages().len()), (0, 0), "the same tokens behind others are not the same");
        assert_eq!(pool.available(), 4);
    }

    #[test]
    fn what_nobody_holds_is_found_again_until_its_place_is_needed() {
        let mut pool = PagePool::new(3, 2);
        let mut a = filled(&mut pool, &[1, 2, 3, 4]);
        a.release(&mut pool);
        assert_eq!(pool.available(), 3);
        let mut b = pool.share(&[1, 2, 3, 4, 5]);
        assert_eq!((b.len(), pool.available()), (4, 1));
        b.release(&mut pool);
        // Two pages are needed: the free one, and the end of what was published.
        let mut c = filled(&mut pool, &[9, 8, 7, 6]);
        assert_eq!(pool.share(&[1, 2, 3, 4]).len(), 2);
        c.release(&mut pool);
    }

    #[test]
    fn the_second_of_two_equal_caches_keeps_its_own_pages() {
        let mut pool = PagePool::new(4, 2);
        let [mut a, mut b] = [KvCache::default(), KvCache::default()];
        for kv in [&mut a, &mut b] {
            kv.reserve(&mut pool, 4).unwrap();
            kv.commit(4);
        }
        pool.publish(&mut a, &[1, 2, 3, 4]);
        pool.publish(&mut b, &[1, 2, 3, 4]);
        assert_eq!(pool.share(&[1, 2, 3, 4]).pages(), a.pages());
        b.release(&mut pool);
        assert_eq!(pool.available(), 2);
    }

    #[test]
    fn what_lies_behind_the_end_of_a_sequence_is_not_published() {
        let mut pool = PagePool::new(4, 2);
        let mut kv = KvCache::default();
        kv.reserve(&mut pool, 6).unwrap();
        kv.commit(6); // a path of three tokens more, of which the second was a stop token
        pool.publish(&mut kv, &[1, 2, 3, 4, 5]);
        assert_eq!(pool.share(&[1, 2, 3, 4, 5, 6]).len(), 4);
    }

    proptest! {
        /// Whatever sequences come and go: a page has one writer, what is shared holds the tokens that it is shared for, and
        /// in the end all pages are there again.
        #[test]
        fn pages_hold_what_they_are_shared_for(
            asks in proptest::collection::vec((proptest::collection::vec(0u32..2, 1..14), any::<prop::sample::Index>()), 1..60),
        ) {
            let mut pool = PagePool::new(10, 2);
            let mut held: Vec<(KvCache, Vec<u32>)> = Vec::new();
            let mut memory = [[9u32; 2]; 10];
            for (tokens, leaves) in asks {
                let mut kv = pool.share(&tokens);
                if kv.missing(&pool, tokens.len() - kv.len()) > pool.available() {
                    kv.release(&mut pool);
                    let (mut gone, _) = held.swap_remove(leaves.index(held.len()));
                    gone.release(&mut pool);
                    continue;
                }
                let from = kv.len();
                kv.reserve(&mut pool, tokens.len() - from).unwrap();
                for (slot, &token) in tokens.iter().enumerate().skip(from) {
                    memory[kv.pages()[slot / 2] as usize][slot % 2] = token;
                }
                kv.commit(tokens.len() - from);
                pool.publish(&mut kv, &tokens);
                held.push((kv, tokens));
                for (kv, tokens) in &held {
                    let found = |slot: usize| memory[kv.pages()[slot / 2] as usize][slot % 2];
                    prop_assert!(tokens.iter().enumerate().all(|(slot, &token)| found(slot) == token));
                }
            }
            held.iter_mut().for_each(|(kv, _)| kv.release(&mut pool));
            prop_assert_eq!(pool.available(), 10);
        }
    }
}
