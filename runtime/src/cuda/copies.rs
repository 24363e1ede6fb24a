//! Copies between host and device, through memory that the device reaches by itself (pinned).
//!
//! Uploads do not wait: bytes are put into a ring of segments and copied from there when the device comes to it. Only a
//! segment whose copies are still under way when its turn comes again is waited for.

use std::ffi::c_void;

use cust::memory::LockedBuffer;
use rayon::prelude::*;

use super::device::{Event, OpenDevice};
use super::driver::{self, check, check_cust};
use crate::error::Result;

const SEGMENT_BYTES: usize = 4 << 20;
const SEGMENTS: usize = 4;
/// What one thread copies of a large piece. Weights come from mapped files, and reading those is the slower half.
const SHARE_BYTES: usize = 256 << 10;

pub(super) struct Uploads {
    segments: Vec<Segment>,
    /// The segment being filled, and how far it is.
    current: usize,
    filled: usize,
}

struct Segment {
    memory: LockedBuffer<u8>,
    /// Behind its last copy.
    done: Event,
}

impl Uploads {
    pub fn new() -> Result<Uploads> {
        let segment = || Ok(Segment { memory: pinned(SEGMENT_BYTES)?, done: Event::new(driver::EVENT_UNTIMED)? });
        let segments = (0..SEGMENTS).map(|_| segment()).collect::<Result<_>>()?;
        Ok(Uploads { segments, current: 0, filled: 0 })
    }

    /// Copies the bytes to the device address, before whatever is enqueued next. `bytes` are free when this returns.
    pub fn enqueue(&mut self, device: &OpenDevice, mut to: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.filled == SEGMENT_BYTES {
                self.segments[self.current].done.record(device)?;
                self.current = (self.current + 1) % SEGMENTS;
                self.filled = 0;
                self.segments[self.current].done.wait()?;
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(SEGMENT_BYTES - self.filled));
            let place = &mut self.segments[self.current].memory[self.filled..][..piece.len()];
            if piece.len() <= SHARE_BYTES {
                // What a round writes: handing it to other threads would take longer than copying it.
                place.copy_from_slice(piece);
            } else {
                let shares = place.par_chunks_mut(SHARE_BYTES).zip(piece.par_chunks(SHARE_BYTES));
                shares.for_each(|(to, from)| to.copy_from_slice(from));
            }
            let from = place.as_ptr() as *const c_void;
            // SAFETY: `from` is pinned and stays as it is until `done`, behind this copy, has been waited for; the caller
            // owns that much memory at `to`.
            check("copying to the device", unsafe {
                driver::cuMemcpyHtoDAsync_v2(to, from, piece.len(), device.stream)
            })?;
            self.filled += piece.len();
            to += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }
}

pub(super) struct Downloads {
    memory: LockedBuffer<u8>,
}

impl Downloads {
    pub fn new() -> Result<Downloads> {
        Ok(Downloads { memory: pinned(SEGMENT_BYTES)? })
    }

    /// The words from this device address on, after all enqueued work. Waits for it.
    pub fn words(&mut self, device: &OpenDevice, from: u64, len: usize) -> Result<Vec<u32>> {
        let mut words = vec![0; len];
        let chunks = words.chunks_mut(SEGMENT_BYTES / 4).enumerate();
        for (i, chunk) in chunks {
            let to = self.memory.as_mut_ptr() as *mut c_void;
            let (from, bytes) = (from + (i * SEGMENT_BYTES) as u64, 4 * chunk.len());
            // SAFETY: `to` is pinned memory of SEGMENT_BYTES, not looked at before `wait` returns; the caller owns the
            // memory from `from` on.
            check("copying from the device", unsafe { driver::cuMemcpyDtoHAsync_v2(to, from, bytes, device.stream) })?;
            device.wait()?;
            bytemuck::cast_slice_mut(chunk).copy_from_slice(&self.memory[..bytes]);
        }
        Ok(words)
    }
}

fn pinned(bytes: usize) -> Result<LockedBuffer<u8>> {
    check_cust("pinned memory", LockedBuffer::new(&0, bytes))
}
