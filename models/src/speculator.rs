//! A speculator: a drafter that reads the target's hidden states, as a checkpoint. It is a model of its own only on disk; on
//! a device its buffers lie beside the target's, and the target's passes compute what it needs.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;
use treespark_kernel_gen::{BlockShape, Buf, BufferDesc, DType, Pass, PassError};

use crate::builder::{Builder, Source, Weight};
use crate::dspark::{DsparkConfig, SequentialHeads};
use crate::error::{Error, Result};
use crate::medusa::MedusaConfig;
use crate::mtp::MtpConfig;
use crate::origin::Origin;
use crate::random::RandomTensors;
use crate::{Bytes, Checkpoint, Config, Llama, Model, Tensor, rope};

/// What a speculator is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum SpeculatorConfig {
    Dspark(DsparkConfig),
    Medusa(MedusaConfig),
    Mtp(MtpConfig),
}

/// A checkpoint that fits its target, or for measurements a configuration with random weights.
pub struct Speculator {
    config: SpeculatorConfig,
    origin: Origin,
}

impl SpeculatorConfig {
    /// As a person would call it.
    pub fn name(&self) -> &'static str {
        match self {
            SpeculatorConfig::Dspark(dspark) if dspark.markov.is_none() => "dflash",
            SpeculatorConfig::Dspark(_) => "dspark",
            SpeculatorConfig::Medusa(_) => "medusa",
            SpeculatorConfig::Mtp(_) => "mtp",
        }
    }

    /// The rows that it fills for a draft.
    pub fn block(&self) -> BlockShape {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.block_shape(),
            SpeculatorConfig::Medusa(medusa) => medusa.block_shape(),
            SpeculatorConfig::Mtp(mtp) => mtp.block_shape(),
        }
    }

    /// Whether devices that draft can grow its trees by themselves.
    pub fn fits_devices(&self) -> bool {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.fits_devices(),
            SpeculatorConfig::Medusa(medusa) => medusa.fits_devices(),
            SpeculatorConfig::Mtp(_) => false,
        }
    }

    /// Whether it reads the target's hidden states at every row of every pass, those of prompts too.
    pub fn reads_all_states(&self) -> bool {
        matches!(self, SpeculatorConfig::Mtp(_))
    }

    /// Bytes of all weight buffers together.
    pub fn weight_bytes(&self, context: usize) -> usize {
        self.weights(context).iter().map(|weight| weight.desc.bytes()).sum()
    }

    pub(crate) fn weights(&self, context: usize) -> Vec<Weight> {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.weights(context),
            SpeculatorConfig::Medusa(medusa) => medusa.weights(),
            SpeculatorConfig::Mtp(mtp) => mtp.weights(context),
        }
    }

    /// Where the target's residual stream `x` is hidden state `state`: 0 behind the embedding, l + 1 behind layer l.
    pub(crate) fn tap(&self, builder: &mut Builder, state: usize, x: Buf) {
        if let SpeculatorConfig::Dspark(dspark) = self {
            dspark.tap(builder, state, x);
        }
    }

    /// Behind the last hidden state that is tapped, in every pass of the target.
    pub(crate) fn inject(&self, builder: &mut Builder) {
        if let SpeculatorConfig::Dspark(dspark) = self {
            dspark.inject(builder);
        }
    }

    /// Behind the last layer, in a pass of the target that runs all of it.
    pub(crate) fn keep_states(&self, builder: &mut Builder, x: Buf) {
        match self {
            SpeculatorConfig::Dspark(_) => {}
            SpeculatorConfig::Medusa(medusa) => medusa.keep_states(builder, x),
            SpeculatorConfig::Mtp(mtp) => mtp.keep_states(builder, x),
        }
    }

    /// Behind the commit of the target's cache.
    pub(crate) fn commit(&self, builder: &mut Builder) {
        if let SpeculatorConfig::Dspark(dspark) = self {
            dspark.commit(builder);
        }
    }

    /// Fills up to `blocks` blocks, of a request each, and ranks `candidates` tokens of each of their rows. With `costs` of a
    /// pass of 1, 2, .. rows, as many as a tree may have nodes, the device also grows the next round's trees. No request may
    /// have a block that the pass has no rows for. The block may be a shortened one.
    pub fn draft_pass(
        &self,
        target: &Llama,
        block: BlockShape,
        blocks: usize,
        candidates: usize,
        costs: Option<&[f32]>,
    ) -> Result<Pass, PassError> {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.draft_pass(target, block, blocks, candidates, costs),
            SpeculatorConfig::Medusa(medusa) => medusa.draft_pass(target, block, blocks, candidates, costs),
            SpeculatorConfig::Mtp(mtp) => mtp.level_pass(target, blocks, true),
        }
    }

    /// The tensors that are read besides those of the weight buffers.
    fn head_tensors(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            SpeculatorConfig::Dspark(dspark) => dspark.head_tensors(),
            SpeculatorConfig::Medusa(_) | SpeculatorConfig::Mtp(_) => Vec::new(),
        }
    }
}

impl Speculator {
    /// Whether a folder holds a speculator, rather than a model of its own.
    pub fn is_at(path: &Path) -> bool {
        let config = std::fs::read(path.join("config.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        config.is_some_and(|config: Value| {
            DsparkConfig::is_described_by(&config) || MedusaConfig::is_described_by(&config)
        })
    }

    /// Opens a folder in the Hugging Face layout. What does not fit the target is refused, with both values named.
    pub fn open(path: &Path, target: &Config) -> Result<Speculator> {
        let checkpoint = Checkpoint::open(path)?;
        let config = if MedusaConfig::is_described_by(checkpoint.config()) {
            SpeculatorConfig::Medusa(MedusaConfig::from_checkpoint(&checkpoint, target)?)
        } else {
            SpeculatorConfig::Dspark(DsparkConfig::from_checkpoint(&checkpoint, target)?)
        };
        check_tensors(&config, &checkpoint)?;
        Ok(Speculator { config, origin: Origin::Checkpoint(Box::new(checkpoint)) })
    }

    /// The MTP module in the checkpoint of a target, or one of random weights beside those of the target.
    pub fn of_target(target: &Model) -> Result<Speculator> {
        let config = SpeculatorConfig::Mtp(MtpConfig::of_target(target.config())?);
        let Some(path) = target.path() else { return Ok(Speculator::random(config, target.config(), 1)) };
        let checkpoint = Checkpoint::open(path)?;
        check_that_tensors_are_there(&config, &checkpoint)?;
        Ok(Speculator { config, origin: Origin::Checkpoint(Box::new(checkpoint)) })
    }

    /// A drafter of these sizes that knows nothing, for a target. For whoever measures speed, or looks for mistakes.
    pub fn random(config: SpeculatorConfig, target: &Config, seed: u64) -> Speculator {
        let (weights, heads) = (config.weights(1), config.head_tensors());
        let parts = weights.iter().flat_map(|weight| weight.source.parts()).map(|part| &part.shape[..]);
        let tensors = RandomTensors::new(parts.chain(heads.iter().map(|(_, shape)| &shape[..])), target, seed);
        Speculator { config, origin: Origin::Random(tensors, None) }
    }

    pub fn config(&self) -> &SpeculatorConfig {
        &self.config
    }

    /// The same for a device that drafts by itself, if it can.
    pub fn config_on_device(&self) -> SpeculatorConfig {
        match &self.config {
            SpeculatorConfig::Dspark(dspark) => {
                SpeculatorConfig::Dspark(DsparkConfig { heads_on_device: dspark.fits_devices(), ..dspark.clone() })
            }
            medusa => medusa.clone(),
        }
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
                Source::Stack(parts) => parts.iter().map(|part| self.origin.part(part)).collect::<Result<Vec<_>>>()?,
                Source::RopeTable => vec![self.rope_table(&desc.shape)],
            };
            Ok((desc, parts))
        })
    }

    /// The heads that make a sequence of a block's rows; without any, the rows stand by themselves.
    pub fn sequential_heads(&self) -> Result<SequentialHeads> {
        match &self.config {
            SpeculatorConfig::Dspark(dspark) => SequentialHeads::load(dspark, &self.origin),
            SpeculatorConfig::Medusa(_) | SpeculatorConfig::Mtp(_) => Ok(SequentialHeads::default()),
        }
    }

    /// What a device needs of the confidence head, if it runs the heads by this config and there is one.
    pub fn confidence_numbers(&self, config: &SpeculatorConfig) -> Result<Option<Vec<f32>>> {
        match config {
            SpeculatorConfig::Dspark(dspark) if dspark.heads_on_device => {
                Ok(self.sequential_heads()?.confidence_numbers(dspark))
            }
            _ => Ok(None),
        }
    }

    fn rope_table(&self, shape: &[usize]) -> Tensor {
        let layer = match &self.config {
            SpeculatorConfig::Dspark(dspark) => &dspark.backbone,
            SpeculatorConfig::Mtp(mtp) => mtp.layer(),
            SpeculatorConfig::Medusa(_) => unreachable!("heads have no rope"),
        };
        let frequencies = rope::inverse_frequencies(&layer.rope, layer.rotated(), None);
        let table = rope::table(&frequencies, shape[0], layer.rope.attention_factor());
        let bytes = table.into_iter().flat_map(f32::to_le_bytes).collect();
        Tensor { dtype: DType::F32, shape: shape.to_vec(), bytes: Bytes::from_vec(bytes) }
    }
}

/// All tensors that are needed are there in their shape, and no other.
fn check_tensors(config: &SpeculatorConfig, checkpoint: &Checkpoint) -> Result<()> {
    let used = check_that_tensors_are_there(config, checkpoint)?;
    match checkpoint.names().find(|name| !used.contains(name)) {
        Some(name) => Err(Error::Malformed {
            path: checkpoint.path().to_path_buf(),
            problem: format!("tensor {name} is not part of the drafter as it is configured"),
        }),
        None => Ok(()),
    }
}

/// All that are needed, whatever others there may be. Returns their names.
fn check_that_tensors_are_there(config: &SpeculatorConfig, checkpoint: &Checkpoint) -> Result<HashSet<String>> {
    let mut needed = config.head_tensors();
    let weights = config.weights(1);
    needed.extend(weights.iter().flat_map(|weight| weight.source.parts()).map(|p| (p.tensor.clone(), p.shape.clone())));
    let mut used = HashSet::new();
    for (name, expected) in needed {
        match checkpoint.shape(&name) {
            Some(got) if got == expected => used.insert(name),
            Some(got) => return Err(Error::TensorShape { name, expected, got: got.to_vec() }),
            None => {
                let context = format!("the drafter as configured in {} needs it", checkpoint.path().display());
                return Err(Error::MissingTensor { name, context });
            }
        };
    }
    Ok(used)
}
