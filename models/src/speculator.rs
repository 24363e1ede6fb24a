//! A speculator: a drafter that reads the target's hidden states, as a checkpoint. It is a model of its own only on disk; on
//! a device its buffers lie beside the target's, and the target's passes compute what it needs.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;
use treespark_kernel_gen::{Buf, BufferDesc, DType};

use crate::builder::{Builder, Source, Weight};
use crate::dspark::{DsparkConfig, SequentialHeads};
use crate::error::{Error, Result};
use crate::{Bytes, Checkpoint, Config, Tensor, rope};

/// What a speculator is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum SpeculatorConfig {
    Dspark(DsparkConfig),
}

/// An opened checkpoint that fits its target.
pub struct Speculator {
    config: SpeculatorConfig,
    checkpoint: Checkpoint,
}

impl SpeculatorConfig {
    /// Bytes of all weight buffers together.
    pub fn weight_bytes(&self, context: usize) -> usize {
        self.weights(context).iter().map(|weight| weight.desc.bytes()).sum()
    }

    /// Rows of its largest pass.
    pub fn rows(&self) -> usize {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.block,
        }
    }

    pub(crate) fn weights(&self, context: usize) -> Vec<Weight> {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.weights(context),
        }
    }

    /// Where the target's residual stream `x` is hidden state `state`: 0 behind the embedding, l + 1 behind layer l.
    pub(crate) fn tap(&self, builder: &mut Builder, state: usize, x: Buf) {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.tap(builder, state, x),
        }
    }

    /// Behind the last layer of the target.
    pub(crate) fn inject(&self, builder: &mut Builder) {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.inject(builder),
        }
    }

    /// Behind the commit of the target's cache.
    pub(crate) fn commit(&self, builder: &mut Builder) {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.commit(builder),
        }
    }
}

impl Speculator {
    /// Whether a folder holds a speculator, rather than a model of its own.
    pub fn is_at(path: &Path) -> bool {
        let config = std::fs::read(path.join("config.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        config.is_some_and(|config: Value| DsparkConfig::is_described_by(&config))
    }

    /// Opens a folder in the Hugging Face layout. What does not fit the target is refused, with both values named.
    pub fn open(path: &Path, target: &Config) -> Result<Speculator> {
        let checkpoint = Checkpoint::open(path)?;
        let dspark = DsparkConfig::from_checkpoint(&checkpoint, target)?;
        let speculator = Speculator { config: SpeculatorConfig::Dspark(dspark), checkpoint };
        speculator.check_tensors()?;
        Ok(speculator)
    }

    pub fn config(&self) -> &SpeculatorConfig {
        &self.config
    }

    /// The same for a device that drafts by itself, if it can.
    pub fn config_on_device(&self) -> SpeculatorConfig {
        let SpeculatorConfig::Dspark(dspark) = &self.config;
        SpeculatorConfig::Dspark(DsparkConfig { heads_on_device: dspark.fits_devices(), ..dspark.clone() })
    }

    /// The folder it came from.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// Every weight buffer of a config of it with the tensors that, stacked, make it; see
    /// [`Model::weights`](crate::Model::weights).
    pub fn weights(
        &self,
        config: &SpeculatorConfig,
        context: usize,
    ) -> impl Iterator<Item = Result<(BufferDesc, Vec<Tensor>)>> + '_ {
        config.weights(context).into_iter().map(|Weight { desc, source }| {
            let parts = match &source {
                Source::Stack(parts) => {
                    parts.iter().map(|(name, _)| self.checkpoint.tensor(name)).collect::<Result<Vec<_>>>()?
                }
                Source::Columns { tensor, first, .. } => {
                    vec![columns(&self.checkpoint.tensor(tensor)?, *first, desc.shape[1])]
                }
                Source::RopeTable => vec![self.rope_table(&desc.shape)],
            };
            Ok((desc, parts))
        })
    }

    /// The heads that make a sequence of a DSpark block.
    pub fn sequential_heads(&self) -> Result<SequentialHeads> {
        let SpeculatorConfig::Dspark(dspark) = &self.config;
        SequentialHeads::load(dspark, &self.checkpoint)
    }

    /// What a device needs of the confidence head, if it runs the heads by this config and there is one.
    pub fn confidence_numbers(&self, config: &SpeculatorConfig) -> Result<Option<Vec<f32>>> {
        let SpeculatorConfig::Dspark(dspark) = config;
        Ok(if dspark.heads_on_device { self.sequential_heads()?.confidence_numbers(dspark) } else { None })
    }

    fn rope_table(&self, shape: &[usize]) -> Tensor {
        let SpeculatorConfig::Dspark(dspark) = &self.config;
        let frequencies = rope::inverse_frequencies(&dspark.backbone.rope, dspark.backbone.head_dim, None);
        let bytes = rope::table(&frequencies, shape[0]).iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor { dtype: DType::F32, shape: shape.to_vec(), bytes: Bytes::from_vec(bytes) }
    }

    /// All tensors that are needed are there in their shape, and no other.
    fn check_tensors(&self) -> Result<()> {
        let SpeculatorConfig::Dspark(dspark) = &self.config;
        let mut needed: Vec<(String, Vec<usize>)> = dspark.head_tensors();
        for weight in self.config.weights(1) {
            match weight.source {
                Source::Stack(parts) => needed.extend(parts),
                Source::Columns { tensor, shape, .. } => needed.push((tensor, shape)),
                Source::RopeTable => {}
            }
        }
        let mut used = HashSet::new();
        for (name, expected) in needed {
            match self.checkpoint.shape(&name) {
                Some(got) if got == expected => used.insert(name),
                Some(got) => return Err(Error::TensorShape { name, expected, got: got.to_vec() }),
                None => {
                    let context = format!("the drafter as configured in {} needs it", self.path().display());
                    return Err(Error::MissingTensor { name, context });
                }
            };
        }
        match self.checkpoint.names().find(|name| !used.contains(name)) {
            Some(name) => Err(Error::Malformed {
                path: self.path().to_path_buf(),
                problem: format!("tensor {name} is not part of the drafter as it is configured"),
            }),
            None => Ok(()),
        }
    }
}

/// Some columns of a matrix, as a matrix.
fn columns(tensor: &Tensor, first: usize, width: usize) -> Tensor {
    let size = tensor.dtype.size();
    let rows = tensor.bytes.as_slice().chunks_exact(tensor.shape[1] * size);
    let bytes = rows.flat_map(|row| &row[first * size..(first + width) * size]).copied().collect();
    Tensor { dtype: tensor.dtype, shape: vec![tensor.shape[0], width], bytes: Bytes::from_vec(bytes) }
}
