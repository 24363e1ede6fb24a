//! What every fuzz target has in common: the folder of its files, and the bound on what it allocates.

pub mod parsers;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};

use parsers::{Files, PARSERS, Parser};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of all live allocations, and how many they may be.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator, which ends the process where more is asked for than the input allows: libFuzzer then keeps
/// the input.
struct Counting;

// SAFETY: every call is the system allocator's with the same arguments; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grow(size);
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(block, layout, size) }
    }
}

fn grow(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed).saturating_add(bytes);
    let limit = LIMIT.load(Relaxed);
    if live > limit {
        // What is printed may allocate.
        LIMIT.store(usize::MAX, Relaxed);
        eprintln!("{bytes} bytes were asked for, {} more than this input may have allocated", live - limit);
        std::process::abort();
    }
}

/// Runs a parser on an input, under its bound.
pub fn run(name: &str, bytes: &[u8]) {
    static STATE: OnceLock<(Files, &Parser)> = OnceLock::new();
    let (files, parser) = STATE.get_or_init(|| {
        rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("the first thread pool");
        set_hook(Box::new(|panic| *LAST_PANIC.lock().expect("one thread") = Some(panic.to_string())));
        let files = Files::new(&fresh_folder(name));
        let parser = PARSERS.iter().find(|parser| parser.name == name).expect("a parser of this name");
        // What is made once, at first use, is not the first input's.
        (parser.run)(&files, bytes);
        (files, parser)
    });
    let allowed = parser.multiple * bytes.len() + parser.fixed;
    LIMIT.store(LIVE.load(Relaxed).saturating_add(allowed), Relaxed);
    let returned = catch_unwind(AssertUnwindSafe(|| (parser.run)(files, bytes)));
    LIMIT.store(usize::MAX, Relaxed);
    if returned.is_err() {
        eprintln!("{}", LAST_PANIC.lock().expect("one thread").as_deref().unwrap_or("a panic that says nothing"));
        std::process::abort();
    }
}

/// What the last panic said. libFuzzer's own hook would end the process at any panic, also at one of the tokenizers
/// library that our code catches.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// In memory where the system has such a folder. One for each process, left behind: a few KiB.
fn fresh_folder(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let folder = parent.join(format!("treespark-fuzz-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the files under test");
    folder
}

/// The whole of a fuzz target.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::run(stringify!($name), bytes));
    };
}
