//! An opened checkpoint: named tensors, configuration, and where the tokenizer and the chat template come from.
//!
//! Whatever the files are, a folder in the Hugging Face layout or a GGUF file, what is seen here is the Hugging Face
//! dialect. A tensor of two or more dimensions comes in [`Checkpoint::dtype`], one of one dimension (norms, biases) in
//! F32; either is a view of the mapped file where the file holds just that, and else is converted when asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use treespark_kernel_gen::DType;

use crate::dequant::fp8;
pub use crate::dialect::GgufVocabulary;
use crate::gguf::Gguf;
use crate::stored::Stored;
use crate::{Error, Result, Tensor, dialect, safetensors};

#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    tensors: BTreeMap<String, Stored>,
    dtype: DType,
    config: Value,
    generation_config: Option<Value>,
    /// Null where the folder has none.
    tokenizer_config: Value,
    tokenizer: TokenizerSource,
    /// The contents of `chat_template.jinja`.
    template_file: Option<String>,
    rope_factors: Option<Vec<f32>>,
}

/// Where a tokenizer comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizerSource {
    /// A `tokenizer.json`.
    Json(PathBuf),
    Gguf(GgufVocabulary),
}

impl Checkpoint {
    /// Opens a folder in the Hugging Face layout, a GGUF file, or a folder that holds exactly one GGUF file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let kind = path.metadata().map_err(|source| Error::Io { path: path.into(), source })?;
        if !kind.is_dir() {
            return Checkpoint::open_gguf(path);
        }
        if safetensors::is_in(path) {
            return Checkpoint::open_folder(path);
        }
        let problem = match &gguf_files(path)?[..] {
            [file] => return Checkpoint::open_gguf(file),
            [] => format!("holds neither {}, nor a .gguf file", safetensors::expected()),
            several => format!("holds {} .gguf files: give the path of one", several.len()),
        };
        Err(Error::Malformed { path: path.into(), problem })
    }

    fn open_folder(folder: &Path) -> Result<Checkpoint> {
        let mut tensors = safetensors::open(folder)?;
        let config = read_json(&folder.join("config.json"))?;
        fp8::attach_scales(&mut tensors, &config)?;
        Ok(Checkpoint {
            path: folder.into(),
            dtype: matrix_dtype(&tensors),
            tensors,
            config,
            generation_config: read_optional(&folder.join("generation_config.json"), read_json)?,
            tokenizer_config: read_optional(&folder.join("tokenizer_config.json"), read_json)?.unwrap_or(Value::Null),
            tokenizer: TokenizerSource::Json(folder.join("tokenizer.json")),
            template_file: read_optional(&folder.join("chat_template.jinja"), read_text)?,
            rope_factors: None,
        })
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint> {
        let mut gguf = Gguf::open(path)?;
        let config = dialect::config(&gguf)?;
        dialect::rename_tensors(&mut gguf, &config);
        let rope_factors = gguf.tensors.remove(dialect::ROPE_FACTORS);
        let vocabulary = dialect::take_vocabulary(&mut gguf)?;
        Ok(Checkpoint {
            path: path.into(),
            dtype: matrix_dtype(&gguf.tensors),
            tensors: gguf.tensors,
            config,
            generation_config: None,
            tokenizer_config: dialect::tokenizer_config(&vocabulary, &gguf.metadata),
            tokenizer: TokenizerSource::Gguf(vocabulary),
            template_file: None,
            rope_factors: rope_factors.map(|stored| read_f32(&stored, dialect::ROPE_FACTORS)).transpose()?,
        })
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`; for GGUF its equivalent, translated from the metadata.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The tensor of this Hugging Face name. A converted tensor is converted anew at each call.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let stored = self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            name: name.into(),
            context: format!("it is not among the {} tensors of {}", self.tensors.len(), self.path.display()),
        })?;
        stored.read(name, if stored.shape.len() < 2 { DType::F32 } else { self.dtype })
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor, without reading it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| &stored.shape[..])
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.tensors.keys().cloned()
    }

    /// The dtype of the matrices: that of the file if they all have the same, else (also when quantised) BF16.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn tokenizer_source(&self) -> Result<TokenizerSource> {
        match &self.tokenizer {
            TokenizerSource::Json(path) if !path.is_file() => Err(Error::Tokenizer(format!(
                "{} does not exist: the model folder needs its tokenizer in the tokenizers library's format",
                path.display()
            ))),
            TokenizerSource::Gguf(vocabulary) if vocabulary.tokens.is_empty() => {
                Err(Error::Tokenizer(format!("{} holds no vocabulary (tokenizer.ggml.tokens)", self.path.display())))
            }
            source => Ok(source.clone()),
        }
    }

    /// `tokenizer_config.json` (null if there is none); for GGUF the parts of it that prompting needs.
    pub fn tokenizer_config(&self) -> &Value {
        &self.tokenizer_config
    }

    /// The template file if there is one, else the tokenizer's template, else its template named `default`.
    pub fn chat_template(&self) -> Option<String> {
        if let Some(template) = &self.template_file {
            return Some(template.clone());
        }
        let template = match &self.tokenizer_config["chat_template"] {
            Value::Array(named) => &named.iter().find(|entry| entry["name"] == "default")?["template"],
            template => template,
        };
        template.as_str().map(str::to_owned)
    }

    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// What each of the D/2 rope frequencies is divided by, where a GGUF file holds that (Llama 3).
    pub fn rope_factors(&self) -> Option<Vec<f32>> {
        self.rope_factors.clone()
    }
}

fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let io_error = |source| Error::Io { path: folder.into(), source };
    let mut files = Vec::new();
    for entry in folder.read_dir().map_err(io_error)? {
        let path = entry.map_err(io_error)?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            files.push(path);
        }
    }
    Ok(files)
}

fn matrix_dtype(tensors: &BTreeMap<String, Stored>) -> DType {
    let matrices = tensors.values().filter(|stored| stored.shape.len() >= 2);
    let mut dtypes = matrices.map(|stored| stored.format.as_ref().ok().and_then(|format| format.dtype()));
    match dtypes.next() {
        None => DType::F32,
        Some(first) => first.filter(|_| dtypes.all(|dtype| dtype == first)).unwrap_or(DType::BF16),
    }
}

fn read_f32(stored: &Stored, name: &str) -> Result<Vec<f32>> {
    Ok(stored.read(name, DType::F32)?.floats())
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path)?;
    serde_json::from_str(&text)
        .map_err(|error| Error::Malformed { path: path.into(), problem: format!("not JSON: {error}") })
}

fn read_optional<T>(path: &Path, read: fn(&Path) -> Result<T>) -> Result<Option<T>> {
    if path.exists() { read(path).map(Some) } else { Ok(None) }
}
