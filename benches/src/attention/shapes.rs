//! What tree attention is measured on: heads, and requests with their prefixes and trees.

use std::fmt;
use std::str::FromStr;

use treespark_models::random;

/// Tensor cores of an H100 with dense bf16, somewhat below what its maker says.
const FLOPS: f64 = 600e12;

#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub requests: Requests,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Requests {
    /// All alike.
    Same { count: usize, prefix: usize, nodes: usize },
    /// Eight, with prefixes of 128 to 32768 slots (even by their logarithm) and trees of 1 to 64 nodes.
    Ragged,
}

/// What a request brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    pub prefix: usize,
    pub nodes: usize,
}

impl Shape {
    /// The shapes of `peers/tree_attention_peers.py`, and one ragged batch.
    pub fn all() -> Vec<Shape> {
        let qwen = |count, prefix, nodes| Shape {
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            requests: Requests::Same { count, prefix, nodes },
        };
        let smol = |count, prefix, nodes| Shape { heads: 9, kv_heads: 3, head_dim: 64, ..qwen(count, prefix, nodes) };
        let sizes = [(1, 1024), (1, 8192), (1, 32768), (8, 8192), (32, 2048)];
        let mut all: Vec<Shape> = sizes.iter().flat_map(|&(b, l)| [qwen(b, l, 16), qwen(b, l, 64)]).collect();
        all.extend([smol(1, 1024, 16), smol(32, 1024, 16), qwen(8, 8192, 8), qwen(8, 8192, 32), qwen(32, 8192, 16)]);
        all.push(Shape { requests: Requests::Ragged, ..qwen(1, 1, 1) });
        all
    }

    pub fn members(&self) -> Vec<Member> {
        match self.requests {
            Requests::Same { count, prefix, nodes } => vec![Member { prefix, nodes }; count],
            Requests::Ragged => (0..8).map(ragged).collect(),
        }
    }

    /// Rows of a pass.
    pub fn rows(&self) -> usize {
        self.members().iter().map(|member| member.nodes).sum()
    }

    fn slots(&self) -> usize {
        self.members().iter().map(|member| member.prefix + member.nodes).sum()
    }

    /// Of keys and values, which have 16 bits.
    pub fn kv_bytes(&self) -> usize {
        4 * self.slots() * self.kv_heads * self.head_dim
    }

    /// Microseconds to move keys, values, queries and outputs once (all of 16 bits, as the peers have them).
    pub fn memory_floor(&self, bytes_per_second: f64) -> f64 {
        (self.kv_bytes() + 4 * self.rows() * self.heads * self.head_dim) as f64 / bytes_per_second * 1e6
    }

    /// Microseconds of the two products, every node with every slot.
    pub fn compute_floor(&self) -> f64 {
        let pairs: usize = self.members().iter().map(|member| member.nodes * (member.prefix + member.nodes)).sum();
        (4 * pairs * self.heads * self.head_dim) as f64 / FLOPS * 1e6
    }
}

fn ragged(index: u64) -> Member {
    let fraction = |counter: u64| (random::hash(counter) >> 11) as f64 / (1u64 << 53) as f64;
    Member {
        prefix: (128.0 * 256f64.powf(fraction(2 * index))) as usize,
        nodes: 1 + (64.0 * fraction(2 * index + 1)) as usize,
    }
}

/// `32/8x128:B8:L8192:N16` or `32/8x128:ragged`: query heads / kv heads x head dim, requests, prefix, nodes.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}x{}:", self.heads, self.kv_heads, self.head_dim)?;
        match self.requests {
            Requests::Same { count, prefix, nodes } => write!(f, "B{count}:L{prefix}:N{nodes}"),
            Requests::Ragged => f.write_str("ragged"),
        }
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Shape, String> {
        let number = |text: &str, prefix: &str| text.strip_prefix(prefix)?.parse().ok().filter(|&n: &usize| n > 0);
        let parse = || {
            let (model, requests) = text.split_once(':')?;
            let (heads, head_dim) = model.split_once('x')?;
            let (heads, kv_heads) = heads.split_once('/')?;
            let requests = match requests.split(':').collect::<Vec<_>>()[..] {
                ["ragged"] => Requests::Ragged,
                [b, l, n] => Requests::Same { count: number(b, "B")?, prefix: number(l, "L")?, nodes: number(n, "N")? },
                _ => return None,
            };
            let [heads, kv_heads, head_dim] = [number(heads, "")?, number(kv_heads, "")?, number(head_dim, "")?];
            Some(Shape { heads, kv_heads, head_dim, requests })
        };
        parse()
            .ok_or_else(|| format!("'{text}' is no shape; shapes look like 32/8x128:B8:L8192:N16 or 32/8x128:ragged"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_as_they_are_written() {
        for shape in Shape::all() {
            assert_eq!(shape.to_string().parse(), Ok(shape));
        }
        for text in ["", "32/8x128", "32/8x128:B8:L8192", "32/8x128:B0:L8:N1", "32x128:B1:L8:N1", "32/8x128:B8:N1:L8"] {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
    }

    #[test]
    fn floors_are_those_of_the_peers_script() {
        let shape: Shape = "32/8x128:B8:L8192:N16".parse().unwrap();
        assert_eq!(shape.kv_bytes(), 8 * 8208 * 8 * 128 * 4);
        let bytes = shape.kv_bytes() + 4 * 8 * 16 * 32 * 128;
        assert_eq!(shape.memory_floor(1e6), bytes as f64);
        assert_eq!(shape.compute_floor(), (4 * 8 * 16 * 32 * 128 * 8208_u64) as f64 / 600e6);
    }

    #[test]
    fn ragged_requests_stay_within_their_bounds() {
        let members = Shape { requests: Requests::Ragged, ..Shape::all()[0].clone() }.members();
        assert!(members.iter().all(|m| (128..32768).contains(&m.prefix) && (1..=64).contains(&m.nodes)));
        assert_eq!(members.len(), 8);
    }
}
