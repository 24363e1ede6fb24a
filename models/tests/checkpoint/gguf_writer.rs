//! A GGUF file put together from its parts, which need not be right.

use treespark_models::checkpoint::Checkpoint;

pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(&'static str),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    /// Type number and bytes.
    Raw(u32, Vec<u8>),
}

pub struct TensorPart {
    pub name: String,
    /// Contiguous dimension first, as the file has it.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
}

pub struct GgufParts {
    pub version: u32,
    pub alignment: usize,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<TensorPart>,
}

pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const Q8_0: u32 = 8;

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn array(kind: u32, count: usize, values: Vec<u8>) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes(), &values].concat()
}

impl Meta {
    fn encode(&self) -> (u32, Vec<u8>) {
        match self {
            Meta::U32(value) => (4, value.to_le_bytes().into()),
            Meta::F32(value) => (6, value.to_le_bytes().into()),
            Meta::Bool(value) => (7, vec![u8::from(*value)]),
            Meta::String(value) => (8, string(value)),
            Meta::Strings(values) => (9, array(8, values.len(), values.iter().flat_map(|v| string(v)).collect())),
            Meta::I32s(values) => (9, array(5, values.len(), values.iter().flat_map(|v| v.to_le_bytes()).collect())),
            Meta::Raw(kind, bytes) => (*kind, bytes.clone()),
        }
    }
}

impl GgufParts {
    pub fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(existing, _)| existing != key);
        self.metadata.push((key.into(), value));
    }

    pub fn tensor(&mut self, name: &str) -> &mut TensorPart {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            let (kind, bytes) = value.encode();
            out.extend([string(key), kind.to_le_bytes().into(), bytes].concat());
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }

    /// Writes the file into a new folder, which lives as long as what is returned.
    pub fn write(&self) -> tempfile::TempPath {
        write_bytes(&self.bytes())
    }

    pub fn open(&self) -> Checkpoint {
        Checkpoint::open(&self.write()).unwrap()
    }
}

pub fn write_bytes(bytes: &[u8]) -> tempfile::TempPath {
    let path = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap().into_temp_path();
    std::fs::write(&path, bytes).unwrap();
    path
}
