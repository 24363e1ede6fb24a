//! Where the tensors of a model or a speculator come from: a checkpoint, or for measurements random numbers.

use std::path::PathBuf;

use crate::builder::Part;
use crate::random::RandomTensors;
use crate::{Checkpoint, Result, Tensor};

pub(crate) enum Origin {
    Checkpoint(Box<Checkpoint>),
    /// Perhaps with a tokenizer of its own.
    Random(RandomTensors, Option<PathBuf>),
}

impl Origin {
    /// The tensor of this name, which has this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self {
            Origin::Checkpoint(checkpoint) => checkpoint.tensor(name),
            Origin::Random(tensors, _) => Ok(tensors.tensor(name, shape)),
        }
    }

    /// What a weight buffer takes of a tensor.
    pub fn part(&self, part: &Part) -> Result<Tensor> {
        let tensor = self.tensor(&part.tensor, &part.shape)?;
        Ok(part.cut.as_ref().map_or_else(|| tensor.clone(), |cut| cut.of(&tensor)))
    }

    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match self {
            Origin::Checkpoint(checkpoint) => Some(checkpoint),
            Origin::Random(..) => None,
        }
    }
}
