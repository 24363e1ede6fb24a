//! The sequential heads of a DSpark drafter, on the host: what makes a sequence of the block's independent rows.
//!
//! With h the normalised hidden state of a row and u the token before it:
//!
//! ```text
//! vanilla   b = W2 · W1[u]
//! gated     b = W2 · (σ(Wg · [h ; W1[u]] + bg) ⊙ W1[u])
//! rnn       a, c, o = Wj · [s ; W1[u] ; h] + bj;   s' = σ(a) ⊙ s + (1 - σ(a)) ⊙ tanh(c);   b = W2 · tanh(o)
//! logits = base + b;   confidence = σ((w · [h ; W1[u]] + b) / T)
//! ```
//!
//! T comes from `calibration.json` beside the checkpoint, a temperature for every depth (sequential temperature scaling). So
//! does a factor for every depth, by which the tokens that are not the drafter's first choice are likelier than the softmax
//! has it.

use std::collections::HashMap;

use treespark_kernel_gen::DType;

use super::config::{DsparkConfig, MarkovKind, calibration};
use crate::error::{Error, Result};
use crate::origin::Origin;
use crate::{Checkpoint, Tensor};

#[derive(Default)]
pub struct SequentialHeads {
    markov: Option<Markov>,
    confidence: Option<Confidence>,
}

struct Markov {
    kind: MarkovKind,
    /// `[V, rank]`: the token before.
    w1: Tensor,
    /// `[V, rank]`: the token.
    w2: Tensor,
    /// Wg or Wj, bg or bj.
    mix: Option<(Vec<f32>, Vec<f32>)>,
}

struct Confidence {
    weight: Vec<f32>,
    bias: f32,
    with_markov: bool,
    calibration: Calibration,
}

/// What is known of the confidence head from measurements, by depth; nothing is changed where nothing is known.
#[derive(Debug, Clone, Default, PartialEq)]
struct Calibration {
    /// What its logits are divided by.
    temperatures: Vec<f32>,
    /// What the share of a token other than the first choice is multiplied by.
    siblings: Vec<f32>,
}

/// What an rnn head carries along a path; nothing for the others.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MarkovState(Vec<f32>);

/// What the heads say of the tokens behind a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What W2 multiplies; empty without a Markov head.
    factor: Vec<f32>,
    /// For the steps behind this one.
    pub state: MarkovState,
    /// Logit that the token which the drafter would choose is accepted, if its parents are.
    pub confidence: Option<f32>,
    /// By how much the others are likelier than their share of what that leaves.
    pub siblings: f32,
}

impl DsparkConfig {
    /// The tensors of the heads, with their shapes.
    pub(crate) fn head_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (vocab, hidden) = (self.backbone.vocab_size, self.backbone.hidden);
        let mut list: Vec<(&str, Vec<usize>)> = Vec::new();
        if let Some((kind, rank)) = self.markov {
            list.push(("markov_head.markov_w1.weight", vec![vocab, rank]));
            list.push(("markov_head.markov_w2.weight", vec![vocab, rank]));
            match kind {
                MarkovKind::Vanilla => {}
                MarkovKind::Gated => {
                    list.push(("markov_head.gate_proj.weight", vec![rank, hidden + rank]));
                    list.push(("markov_head.gate_proj.bias", vec![rank]));
                }
                MarkovKind::Rnn => {
                    list.push(("markov_head.joint_proj.weight", vec![3 * rank, 2 * rank + hidden]));
                    list.push(("markov_head.joint_proj.bias", vec![3 * rank]));
                }
            }
        }
        if let Some(with_markov) = self.confidence {
            let rank = self.markov.filter(|_| with_markov).map_or(0, |(_, rank)| rank);
            list.push(("confidence_head.proj.weight", vec![1, hidden + rank]));
            list.push(("confidence_head.proj.bias", vec![1]));
        }
        list.into_iter().map(|(name, shape)| (name.to_string(), shape)).collect()
    }
}

impl SequentialHeads {
    pub(crate) fn load(config: &DsparkConfig, origin: &Origin) -> Result<SequentialHeads> {
        let tensors: HashMap<String, Vec<usize>> = config.head_tensors().into_iter().collect();
        let tensor = |name: &str| origin.tensor(name, &tensors[name]);
        let floats = |name: &str| tensor(name).map(|tensor| widen(&tensor, 0, tensor.shape.iter().product()));
        let markov = match config.markov {
            None => None,
            Some((kind, _)) => Some(Markov {
                kind,
                w1: tensor("markov_head.markov_w1.weight")?,
                w2: tensor("markov_head.markov_w2.weight")?,
                mix: match kind {
                    MarkovKind::Vanilla => None,
                    MarkovKind::Gated => {
                        Some((floats("markov_head.gate_proj.weight")?, floats("markov_head.gate_proj.bias")?))
                    }
                    MarkovKind::Rnn => {
                        Some((floats("markov_head.joint_proj.weight")?, floats("markov_head.joint_proj.bias")?))
                    }
                },
            }),
        };
        let confidence = match config.confidence {
            None => None,
            Some(with_markov) => Some(Confidence {
                weight: floats("confidence_head.proj.weight")?,
                bias: floats("confidence_head.proj.bias")?[0],
                with_markov,
                calibration: match origin.checkpoint() {
                    Some(checkpoint) => Calibration::load(config, checkpoint)?,
                    None => Calibration::default(),
                },
            }),
        };
        Ok(SequentialHeads { markov, confidence })
    }

    /// The confidence head's numbers as [`Op::Trellis`](treespark_kernel_gen::Op::Trellis) reads them: the weights of the
    /// hidden state and of the Markov embedding, the bias, and for each depth one over its temperature and its factor.
    pub fn confidence_numbers(&self, config: &DsparkConfig) -> Option<Vec<f32>> {
        let head = self.confidence.as_ref()?;
        let mut numbers = head.weight.clone();
        numbers.resize(config.backbone.hidden + config.markov.map_or(0, |(_, rank)| rank), 0.0);
        numbers.push(head.bias);
        let of_depth = |depth| [1.0 / head.calibration.temperature(depth), head.calibration.factor(depth)];
        numbers.extend((0..config.depth()).flat_map(of_depth));
        Some(numbers)
    }

    /// Takes the confidence head as it was trained.
    pub fn forget_calibration(&mut self) {
        if let Some(head) = &mut self.confidence {
            head.calibration = Calibration::default();
        }
    }

    /// Whether what follows a token depends on nothing but the token, its depth and the block.
    pub fn has_memory(&self) -> bool {
        self.markov.as_ref().is_some_and(|markov| markov.kind == MarkovKind::Rnn)
    }

    /// Behind the token `previous`, at the row that predicts depth `depth` (1 is the first) and has the hidden state
    /// `hidden`.
    pub fn step(&self, depth: usize, previous: u32, hidden: &[f32], state: &MarkovState) -> Step {
        let embedded = self.markov.as_ref().map_or(Vec::new(), |markov| row(&markov.w1, previous));
        let confidence = self.confidence.as_ref().map(|head| {
            let inputs = hidden.iter().chain(embedded.iter().filter(|_| head.with_markov));
            let logit = head.weight.iter().zip(inputs).map(|(w, x)| w * x).sum::<f32>() + head.bias;
            logit / head.calibration.temperature(depth - 1)
        });
        let siblings = self.confidence.as_ref().map_or(1.0, |head| head.calibration.factor(depth - 1));
        let (factor, state) = match &self.markov {
            None => (Vec::new(), MarkovState::default()),
            Some(markov) => markov.factor(embedded, hidden, state),
        };
        Step { factor, state, confidence, siblings }
    }

    /// What the Markov head adds to the logit of a token.
    pub fn bias(&self, step: &Step, token: u32) -> f32 {
        match &self.markov {
            None => 0.0,
            Some(markov) => dot_row(&markov.w2, token, &step.factor),
        }
    }
}

impl Markov {
    fn factor(&self, embedded: Vec<f32>, hidden: &[f32], state: &MarkovState) -> (Vec<f32>, MarkovState) {
        let rank = embedded.len();
        let mixed = |inputs: &[&[f32]]| -> Vec<f32> {
            let (weight, bias) = self.mix.as_ref().expect("this kind has a projection");
            let inputs = inputs.concat();
            let rows = weight.chunks_exact(inputs.len()).zip(bias);
            rows.map(|(row, bias)| row.iter().zip(&inputs).map(|(w, x)| w * x).sum::<f32>() + bias).collect()
        };
        match self.kind {
            MarkovKind::Vanilla => (embedded, MarkovState::default()),
            MarkovKind::Gated => {
                let gate = mixed(&[hidden, &embedded]);
                (gate.iter().zip(&embedded).map(|(g, x)| sigmoid(*g) * x).collect(), MarkovState::default())
            }
            MarkovKind::Rnn => {
                let before = if state.0.is_empty() { vec![0.0; rank] } else { state.0.clone() };
                let z = mixed(&[&before, &embedded, hidden]);
                let (a, c, o) = (&z[..rank], &z[rank..2 * rank], &z[2 * rank..]);
                let next = |i: usize| sigmoid(a[i]) * before[i] + (1.0 - sigmoid(a[i])) * c[i].tanh();
                (o.iter().map(|o| o.tanh()).collect(), MarkovState((0..rank).map(next).collect()))
            }
        }
    }
}

impl Calibration {
    fn load(config: &DsparkConfig, checkpoint: &Checkpoint) -> Result<Calibration> {
        let Some(json) = calibration(checkpoint)? else { return Ok(Calibration::default()) };
        let list = |key: &str| {
            let value = &json[key];
            let number = |t: &serde_json::Value| t.as_f64().map(|t| t as f32).filter(|t| t.is_finite() && *t > 0.0);
            let list = value.as_array().and_then(|list| list.iter().map(number).collect::<Option<Vec<f32>>>());
            list.filter(|list| list.len() == config.depth()).ok_or_else(|| Error::Malformed {
                path: checkpoint.path().join("calibration.json"),
                problem: format!("{key} is {value}, expected {} positive numbers", config.depth()),
            })
        };
        let siblings = if json["siblings"].is_null() { Vec::new() } else { list("siblings")? };
        Ok(Calibration { temperatures: list("temperatures")?, siblings })
    }

    fn temperature(&self, depth: usize) -> f32 {
        self.temperatures.get(depth).copied().unwrap_or(1.0)
    }

    fn factor(&self, depth: usize) -> f32 {
        self.siblings.get(depth).copied().unwrap_or(1.0)
    }
}

pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Row `index` of a matrix.
fn row(matrix: &Tensor, index: u32) -> Vec<f32> {
    widen(matrix, index as usize * matrix.shape[1], matrix.shape[1])
}

fn dot_row(matrix: &Tensor, index: u32, x: &[f32]) -> f32 {
    row(matrix, index).iter().zip(x).map(|(w, x)| w * x).sum()
}

/// Elements `first .. first + len`, as f32.
fn widen(tensor: &Tensor, first: usize, len: usize) -> Vec<f32> {
    let size = tensor.dtype.size();
    let bytes = &tensor.bytes.as_slice()[first * size..(first + len) * size];
    let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match tensor.dtype {
        DType::BF16 => pairs().map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
        DType::F16 => pairs().map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bytes;

    fn matrix(rows: usize, columns: usize, scale: f32) -> Tensor {
        let values = (0..rows * columns).map(|i| scale * ((i * 7 % 11) as f32 - 5.0));
        let bytes = values.flat_map(f32::to_le_bytes).collect();
        Tensor { dtype: DType::F32, shape: vec![rows, columns], bytes: Bytes::from_vec(bytes) }
    }

    fn heads(kind: MarkovKind, mix: Option<(Vec<f32>, Vec<f32>)>) -> SequentialHeads {
        let markov = Markov { kind, w1: matrix(9, 2, 0.1), w2: matrix(9, 2, 0.2), mix };
        SequentialHeads { markov: Some(markov), confidence: None }
    }

    /// The gate of a gated head multiplies what a vanilla one has, element by element; a shut gate leaves nothing.
    #[test]
    fn a_gated_head_is_a_vanilla_one_behind_its_gate() {
        let vanilla = heads(MarkovKind::Vanilla, None);
        let hidden = [0.5, -1.0, 2.0];
        let step = |of: &SequentialHeads| of.step(1, 4, &hidden, &MarkovState::default());
        let open = heads(MarkovKind::Gated, Some((vec![0.0; 10], vec![30.0; 2])));
        let shut = heads(MarkovKind::Gated, Some((vec![0.0; 10], vec![-30.0; 2])));
        for token in 0..9 {
            let want = vanilla.bias(&step(&vanilla), token);
            assert!((open.bias(&step(&open), token) - want).abs() < 1e-6);
            assert!(shut.bias(&step(&shut), token).abs() < 1e-6);
        }
        // The gate reads the hidden state first, then the embedding of the token before.
        let mut weight = vec![0.0; 10];
        (weight[2], weight[5 + 3]) = (1.0, 2.0);
        let half = heads(MarkovKind::Gated, Some((weight, vec![0.0; 2])));
        let embedded = row(&half.markov.as_ref().unwrap().w1, 4);
        let gates = [sigmoid(hidden[2]), sigmoid(2.0 * embedded[0])];
        let step = step(&half);
        assert!((step.factor[0] - gates[0] * embedded[0]).abs() < 1e-6);
        assert!((step.factor[1] - gates[1] * embedded[1]).abs() < 1e-6);
        assert!(!half.has_memory() && heads(MarkovKind::Rnn, None).has_memory());
    }
}
