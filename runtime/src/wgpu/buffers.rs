//! Buffers on the device. A large weight or cache lies in several banks; see [`Limits::banks`].

use std::ops::Range;

use ::wgpu::Buffer;
use treespark_kernel_gen::BufferDesc;
use treespark_kernel_gen::lower::Limits;
use treespark_models::Tensor;

use super::device::OpenDevice;
use crate::error::Result;

/// Bytes of a weight that are on their way to the device at a time.
const UPLOAD_BYTES: usize = 16 << 20;

pub(super) struct Banked {
    pub banks: Vec<Buffer>,
    /// Which bytes of the whole each bank holds.
    ranges: Vec<Range<usize>>,
}

impl Banked {
    pub fn new(device: &OpenDevice, desc: &BufferDesc, limits: &Limits) -> Result<Banked> {
        let ranges = limits.banks(desc);
        let what = |bank: usize| match ranges.len() {
            1 => desc.name.clone(),
            n => format!("{} (part {} of {n})", desc.name, bank + 1),
        };
        let banks = ranges.iter().enumerate();
        let banks = banks.map(|(i, range)| device.buffer(&what(i), range.len() as u64)).collect::<Result<_>>()?;
        Ok(Banked { banks, ranges })
    }

    /// The parts of `bytes`, bank by bank: bank, offset in it, and which of the bytes.
    fn pieces(&self, bytes: Range<usize>) -> impl Iterator<Item = (&Buffer, usize, Range<usize>)> {
        self.banks.iter().zip(&self.ranges).filter_map(move |(bank, range)| {
            let (begin, end) = (bytes.start.max(range.start), bytes.end.min(range.end));
            (begin < end).then(|| (bank, begin - range.start, begin - bytes.start..end - bytes.start))
        })
    }

    /// Overwrites the bytes from `offset` on, when the device comes to it. Whole words only.
    pub fn write(&self, device: &OpenDevice, offset: usize, bytes: &[u8]) {
        for (bank, at, piece) in self.pieces(offset..offset + bytes.len()) {
            device.queue.write_buffer(bank, at as u64, &bytes[piece]);
        }
    }

    /// Fills the buffer with the tensors, one behind the other, a little at a time: what is under way is kept twice.
    pub fn upload(&self, device: &OpenDevice, parts: &[Tensor]) -> Result<()> {
        let mut offset = 0;
        let mut under_way = 0;
        for part in parts {
            for chunk in part.bytes.as_slice().chunks(UPLOAD_BYTES) {
                self.write(device, offset, chunk);
                offset += chunk.len();
                under_way += chunk.len();
                if under_way >= UPLOAD_BYTES {
                    device.queue.submit([]);
                    device.wait()?;
                    under_way = 0;
                }
            }
        }
        device.check()
    }

    pub fn read(&self, device: &OpenDevice, bytes: Range<usize>) -> Result<Vec<u32>> {
        let pieces = self.pieces(bytes);
        let places: Vec<_> = pieces.map(|(bank, at, piece)| (bank, at as u64, piece.len() as u64)).collect();
        device.read(&places)
    }
}
