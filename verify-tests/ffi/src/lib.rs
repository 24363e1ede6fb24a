//! C interface of `treespark_verify_tests::foreign`; `include/treespark_fuzz.h` describes it.
#![allow(unsafe_code)]

use std::ffi::c_void;

use treespark_verify_tests::foreign::{self, Acceptance, Attention};

/// As `treespark_attention` in the header.
#[repr(C)]
pub struct CAttention {
    n_rows: u32,
    n_requests: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    page_size: u32,
    n_pages: u32,
    pages_per_request: u32,
    scale: f32,
    row_request: *const u32,
    row_node: *const u32,
    row_position: *const u32,
    mask: *const u32,
    prefix: *const u32,
    pages: *const u32,
    q: *const f32,
    k: *const f32,
    v: *const f32,
    out: *mut f32,
}

/// As `treespark_acceptance` in the header.
#[repr(C)]
pub struct CAcceptance {
    n_nodes: u32,
    parents: *const u32,
    tokens: *const u32,
    draws: *const u32,
    path: *mut u32,
    n_path: *mut u32,
}

pub type AttentionFn = unsafe extern "C" fn(*const CAttention, *mut c_void) -> i32;
pub type AcceptanceFn = unsafe extern "C" fn(*const CAcceptance, *mut c_void) -> i32;

fn attend(run: AttentionFn, user: *mut c_void, case: &Attention) -> Option<Vec<f32>> {
    let of_rows = |field: fn(&foreign::Row) -> u32| case.rows.iter().map(field).collect::<Vec<u32>>();
    let (row_request, row_node) = (of_rows(|row| row.request), of_rows(|row| row.node));
    let row_position = of_rows(|row| row.position);
    let mask: Vec<u32> = case.rows.iter().flat_map(|row| row.ancestors).collect();
    let mut out = vec![f32::NAN; case.q.len()];
    let sizes = case.sizes;
    let c = CAttention {
        n_rows: case.rows.len() as u32,
        n_requests: case.prefix.len() as u32,
        heads: sizes.heads() as u32,
        kv_heads: sizes.kv_heads as u32,
        head_dim: sizes.head_dim as u32,
        page_size: sizes.page_size as u32,
        n_pages: (case.keys.len() / (sizes.kv_heads * sizes.page_size * sizes.head_dim)) as u32,
        pages_per_request: case.pages_per_request as u32,
        scale: case.scale,
        row_request: row_request.as_ptr(),
        row_node: row_node.as_ptr(),
        row_position: row_position.as_ptr(),
        mask: mask.as_ptr(),
        prefix: case.prefix.as_ptr(),
        pages: case.pages.as_ptr(),
        q: case.q.as_ptr(),
        k: case.keys.as_ptr(),
        v: case.values.as_ptr(),
        out: out.as_mut_ptr(),
    };
    // SAFETY: the caller of `treespark_fuzz_attention` vouches for the function; all that it is shown lives until it returns,
    // and has the lengths that the header states.
    (unsafe { run(&c, user) } == 0).then_some(out)
}

fn accept(run: AcceptanceFn, user: *mut c_void, case: &Acceptance) -> Option<Vec<u32>> {
    let nodes = case.parents.len();
    let (mut path, mut n_path) = (vec![0; nodes], 0u32);
    let c = CAcceptance {
        n_nodes: nodes as u32,
        parents: case.parents.as_ptr(),
        tokens: case.tokens.as_ptr(),
        draws: case.draws.as_ptr(),
        path: path.as_mut_ptr(),
        n_path: &mut n_path,
    };
    // SAFETY: as in `attend`.
    let done = unsafe { run(&c, user) } == 0;
    path.truncate(n_path as usize);
    done.then_some(path)
}

fn told(result: Result<(), String>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(problem) => {
            println!("{problem}");
            1
        }
    }
}

/// # Safety
/// `run` must keep to what the header says of the case that it is shown.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treespark_fuzz_attention(
    run: AttentionFn,
    user: *mut c_void,
    seed: u64,
    cases: u64,
    tolerance: f32,
) -> i32 {
    told(foreign::attack_attention(seed, cases, tolerance, &mut |case| attend(run, user, case)))
}

/// # Safety
/// `run` must keep to what the header says of the case that it is shown.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treespark_fuzz_acceptance(run: AcceptanceFn, user: *mut c_void, seed: u64, cases: u64) -> i32 {
    told(foreign::attack_acceptance(seed, cases, &mut |case| accept(run, user, case)))
}
