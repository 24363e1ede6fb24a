//! Where the tensors of a model or a speculator come from: a checkpoint, or for measurements random numbers.

use crate::random::RandomTensors;
use crate::{Checkpoint, Result, Tensor};

pub(crate) enum Origin {
    Checkpoint(Box<Checkpoint>),
    Random(RandomTensors),
}

impl Origin {
    /// The tensor of this name, which has this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self {
            Origin::Checkpoint(checkpoint) => checkpoint.tensor(name),
            Origin::Random(tensors) => Ok(tensors.tensor(name, shape)),
        }
    }

    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match self {
            Origin::Checkpoint(checkpoint) => Some(checkpoint),
            Origin::Random(_) => None,
        }
    }
}
