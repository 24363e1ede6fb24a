//! A GGUF file as it stands: metadata and tensors under their own names.
//!
//! ```text
//! magic "GGUF", version u32, tensor count u64, metadata count u64     all little-endian
//! metadata     key string, type u32, value                            string: length u64, UTF-8
//!                                                                     array: type u32, count u64, values
//! tensors      name string, rank u32, dims u64 (contiguous first), type u32, offset u64 into the data
//! data         begins at the next multiple of general.alignment (32)
//! ```
//!
//! Nothing in a file is trusted: a length is compared with the bytes that are left before anything is allocated for
//! it, and every tensor of a known type is proved to lie within the file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::Result;
use crate::dequant::Format;
use crate::mmap::MappedFile;
use crate::stored::{RowOrder, Stored};

const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_RANK: u32 = 4;
/// Nobody nests arrays; a limit keeps a hostile file from exhausting the stack.
const MAX_NESTING: u32 = 4;

pub struct Gguf {
    pub file: Arc<MappedFile>,
    pub metadata: Map<String, Value>,
    pub tensors: BTreeMap<String, Stored>,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = MappedFile::open(path)?;
        let bytes = (*file).as_ref();
        let (metadata, tensors) = read(&file, bytes).map_err(|problem| file.malformed(problem))?;
        Ok(Gguf { file, metadata, tensors })
    }
}

type Contents = (Map<String, Value>, BTreeMap<String, Stored>);

fn read(file: &Arc<MappedFile>, bytes: &[u8]) -> Result<Contents, String> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.take(4)? != b"GGUF" {
        return Err("is not a GGUF file (no magic \"GGUF\"): expected one, or a model folder".into());
    }
    match reader.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => return Err("is a big-endian GGUF file".into()),
        version => return Err(format!("is of GGUF version {version}; supported: 2, 3")),
    }
    let (n_tensors, n_metadata) = (reader.u64()?, reader.u64()?);

    let mut metadata = Map::new();
    for _ in 0..n_metadata {
        let key = reader.string()?.to_owned();
        let kind = reader.u32()?;
        let value = reader.value(kind, 0).map_err(|problem| format!("metadata {key}: {problem}"))?;
        metadata.insert(key, value);
    }
    refuse_split(&metadata)?;

    let mut headers = Vec::new();
    for _ in 0..n_tensors {
        headers.push(reader.tensor_header()?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value
            .as_u64()
            .filter(|alignment| alignment.is_power_of_two())
            .ok_or(format!("general.alignment is {value}, expected a power of two"))?,
    };
    let data = (reader.at as u64).checked_next_multiple_of(alignment).ok_or("its data begins beyond its end")?;
    let mut tensors = BTreeMap::new();
    for header in headers {
        let (name, stored) = header.locate(file, data, bytes.len())?;
        if tensors.insert(name.clone(), stored).is_some() {
            return Err(format!("holds two tensors of the name {name}"));
        }
    }
    Ok((metadata, tensors))
}

fn refuse_split(metadata: &Map<String, Value>) -> Result<(), String> {
    match metadata.get("split.count").and_then(Value::as_u64) {
        Some(count) if count > 1 => {
            let number = metadata.get("split.no").and_then(Value::as_u64).unwrap_or(0).saturating_add(1);
            Err(format!(
                "is part {number} of a model split into {count} files: join them first, with `llama-gguf-split --merge`"
            ))
        }
        _ => Ok(()),
    }
}

struct TensorHeader {
    name: String,
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

impl TensorHeader {
    fn locate(self, file: &Arc<MappedFile>, data: u64, file_bytes: usize) -> Result<(String, Stored), String> {
        let TensorHeader { name, shape, kind, offset } = self;
        let format = Format::from_ggml(kind);
        let range = match &format {
            Ok(format) => tensor_range(*format, &shape, data.checked_add(offset), file_bytes)
                .map_err(|problem| format!("tensor {name} {problem}"))?,
            Err(_) => 0..0,
        };
        Ok((name, Stored { file: file.clone(), range, format, shape, rows: RowOrder::Halves, scales: None }))
    }
}

fn tensor_range(
    format: Format,
    shape: &[usize],
    start: Option<u64>,
    file_bytes: usize,
) -> Result<Range<usize>, String> {
    let columns = shape[shape.len() - 1];
    let Some(row_bytes) = format.bytes(columns) else {
        let (block, _) = format.block();
        return Err(format!("has rows of {columns} elements, which do not fill {format:?} blocks of {block}"));
    };
    let rows = &shape[..shape.len() - 1];
    let range = rows.iter().try_fold(row_bytes, |bytes, &rows| bytes.checked_mul(rows)).and_then(|bytes| {
        let start = usize::try_from(start?).ok()?;
        Some(start..start.checked_add(bytes)?)
    });
    range.filter(|range| range.end <= file_bytes).ok_or_else(|| {
        format!("of shape {shape:?} reaches past the end of the file ({file_bytes} bytes): fetch the file again")
    })
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        if n > rest.len() as u64 {
            return Err(format!(
                "the file ends early: {n} bytes wanted at offset {}, {} are left (fetch the file again)",
                self.at,
                rest.len()
            ));
        }
        self.at += n as usize;
        Ok(&rest[..n as usize])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N as u64)?.try_into().expect("as many bytes as asked for"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let (at, n) = (self.at, self.u64()?);
        std::str::from_utf8(self.take(n)?).map_err(|error| format!("the string at offset {at} is not UTF-8: {error}"))
    }

    /// A value of a metadata type. A float that is not a number becomes null.
    fn value(&mut self, kind: u32, nesting: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            6 => f32::from_le_bytes(self.array()?).into(),
            7 => (self.array::<1>()? != [0]).into(),
            8 => self.string()?.into(),
            9 if nesting == MAX_NESTING => return Err(format!("arrays are nested deeper than {MAX_NESTING}")),
            9 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                // Grows as values are read: the count alone reserves nothing.
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, nesting + 1)?);
                }
                Value::Array(values)
            }
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            12 => f64::from_le_bytes(self.array()?).into(),
            other => return Err(format!("value type {other} is unknown")),
        })
    }

    fn tensor_header(&mut self) -> Result<TensorHeader, String> {
        let name = self.string()?.to_owned();
        let rank = self.u32()?;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(format!("tensor {name} has {rank} dimensions, expected 1 to {MAX_RANK}"));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            let dim = self.u64()?;
            let dim = usize::try_from(dim).ok().filter(|&dim| dim > 0);
            shape.push(dim.ok_or(format!("tensor {name} has an impossible dimension"))?);
        }
        shape.reverse();
        Ok(TensorHeader { name, shape, kind: self.u32()?, offset: self.u64()? })
    }
}
