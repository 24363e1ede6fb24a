//! A tensor on the host: dtype, shape and shared, read-only bytes. Cloning copies no data.

use std::sync::Arc;

use treespark_kernel_gen::DType;

/// Read-only bytes, kept alive by whoever holds a clone: a mapped file or an owned vector.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    start: usize,
    len: usize,
}

impl Bytes {
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, start: usize, len: usize) -> Bytes {
        assert!(start + len <= (*owner).as_ref().len(), "bytes {start}+{len} reach past their owner");
        Bytes { owner, start, len }
    }

    pub fn from_vec(bytes: Vec<u8>) -> Bytes {
        let len = bytes.len();
        Bytes::new(Arc::new(bytes), 0, len)
    }

    /// Some of these bytes, kept alive by the same owner.
    pub fn part(&self, start: usize, len: usize) -> Bytes {
        assert!(start + len <= self.len, "part {start}+{len} reaches past {} bytes", self.len);
        Bytes { owner: self.owner.clone(), start: self.start + start, len }
    }

    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

#[derive(Debug, Clone)]
pub struct Tensor {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major. Need not be aligned to the element's size.
    pub bytes: Bytes,
}

impl Tensor {
    /// The elements of an F32 tensor.
    pub fn floats(&self) -> Vec<f32> {
        assert_eq!(self.dtype, DType::F32, "elements are asked for as they are");
        self.bytes.as_slice().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}
