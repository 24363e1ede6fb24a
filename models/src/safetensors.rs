//! Weights in the safetensors layout: `model.safetensors`, or shards named by `model.safetensors.index.json`.
//!
//! The header is read with the `safetensors` crate, which proves that every tensor lies within its file and that its
//! bytes are what its shape and dtype need.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use ::safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::checkpoint::read_json;
use crate::dequant::Format;
use crate::mmap::MappedFile;
use crate::stored::{RowOrder, Stored};
use crate::{Error, Result};

/// A model's one file, and what files of Medusa heads are called.
const SINGLE_FILES: [&str; 3] = ["model.safetensors", "medusa_lm_head.safetensors", "medusa_head.safetensors"];
const INDEX: &str = "model.safetensors.index.json";

/// Bytes before the header: its length.
const LENGTH_BYTES: usize = 8;

/// Whether a folder holds any.
pub fn is_in(folder: &Path) -> bool {
    single_file(folder).is_some() || folder.join(INDEX).is_file()
}

/// What a folder must hold, for messages.
pub fn expected() -> String {
    format!("{}, nor {INDEX}", SINGLE_FILES[0])
}

/// The tensors of a folder, by name.
pub fn open(folder: &Path) -> Result<BTreeMap<String, Stored>> {
    match single_file(folder) {
        Some(file) => open_file(&file),
        None => open_shards(folder),
    }
}

fn single_file(folder: &Path) -> Option<PathBuf> {
    SINGLE_FILES.iter().map(|name| folder.join(name)).find(|file| file.is_file())
}

fn open_shards(folder: &Path) -> Result<BTreeMap<String, Stored>> {
    let path = folder.join(INDEX);
    let index = read_json(&path)?;
    let malformed = |problem: String| Error::Malformed { path: path.clone(), problem };
    let Some(weight_map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(malformed("has no object \"weight_map\" from tensor names to files".into()));
    };
    let mut shards: BTreeMap<&str, BTreeMap<String, Stored>> = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (name, file) in weight_map {
        let Some(file) = file.as_str().filter(|file| is_file_name(file)) else {
            return Err(malformed(format!("tensor {name} is in {file}, expected the name of a file in this folder")));
        };
        if !shards.contains_key(file) {
            let shard = folder.join(file);
            if !shard.exists() {
                return Err(malformed(format!("shard {file} is missing from this folder: fetch the model again")));
            }
            shards.insert(file, open_file(&shard)?);
        }
        let Some(stored) = shards[file].get(name) else {
            return Err(malformed(format!("says that tensor {name} is in {file}, which does not hold it")));
        };
        tensors.insert(name.clone(), stored.clone());
    }
    Ok(tensors)
}

/// An index may name its neighbours, and nothing outside the folder.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

fn open_file(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let file = MappedFile::open(path)?;
    let (header_bytes, metadata) = SafeTensors::read_metadata((*file).as_ref())
        .map_err(|error| file.malformed(format!("not a whole safetensors file: {error}")))?;
    let data = LENGTH_BYTES + header_bytes;
    let stored = |info: &::safetensors::tensor::TensorInfo| Stored {
        file: file.clone(),
        range: data + info.data_offsets.0..data + info.data_offsets.1,
        format: match info.dtype {
            Dtype::F32 => Ok(Format::F32),
            Dtype::F16 => Ok(Format::F16),
            Dtype::BF16 => Ok(Format::BF16),
            Dtype::F8_E4M3 => Ok(Format::F8E4M3),
            other => Err(other.to_string()),
        },
        shape: info.shape.clone(),
        rows: RowOrder::Halves,
        scales: None,
    };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, stored(info))).collect())
}
