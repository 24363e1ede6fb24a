//! What attention is measured on: heads, what a cache keeps, and requests with their prefixes and trees.

use std::fmt;
use std::str::FromStr;

use treespark_models::random;

/// Tensor cores of an H100 with dense bf16, somewhat below what its maker says.
const FLOPS: f64 = 600e12;
/// Of DeepSeek's models: elements of a latent, and of the rotated key behind it.
const LATENT: usize = 512;
const ROTATED: usize = 64;
/// Elements of a head's key, but for the rotated ones, before it was taken into the query.
const PLAIN: usize = 128;

#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    pub heads: usize,
    pub cached: Cached,
    pub requests: Requests,
}

/// What a cache keeps of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    /// A key and a value for each kv head.
    Heads { kv_heads: usize, head_dim: usize },
    /// A latent and a rotated key, for all heads: together the key, while the latent alone is the value.
    Latents,
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
        let shape = |heads, kv_heads, head_dim, requests| Shape {
            heads,
            cached: Cached::Heads { kv_heads, head_dim },
            requests,
        };
        let qwen = |count, prefix, nodes| shape(32, 8, 128, Requests::Same { count, prefix, nodes });
        let smol = |count, prefix, nodes| shape(9, 3, 64, Requests::Same { count, prefix, nodes });
        let sizes = [(1, 1024), (1, 8192), (1, 32768), (8, 8192), (32, 2048)];
        let mut all: Vec<Shape> = sizes.iter().flat_map(|&(b, l)| [qwen(b, l, 16), qwen(b, l, 64)]).collect();
        all.extend([smol(1, 1024, 16), smol(32, 1024, 16), qwen(8, 8192, 8), qwen(8, 8192, 32), qwen(32, 8192, 16)]);
        all.push(shape(32, 8, 128, Requests::Ragged));
        all
    }

    /// The shapes of `peers/latent_attention_peers.py`, with the heads of DeepSeek-V2-Lite and V3, and one ragged batch.
    pub fn latents() -> Vec<Shape> {
        let shape = |heads, requests| Shape { heads, cached: Cached::Latents, requests };
        let same = |heads, count, prefix, nodes: &[usize]| {
            let requests = nodes.iter().map(|&nodes| Requests::Same { count, prefix, nodes });
            requests.map(|requests| shape(heads, requests)).collect::<Vec<_>>()
        };
        let mut all = same(16, 32, 8192, &[1, 4, 16]);
        all.extend(same(16, 8, 8192, &[4]));
        all.extend(same(16, 1, 1024, &[4]));
        all.extend(same(16, 1, 4096, &[1, 4, 8, 16]));
        all.extend(same(16, 1, 65536, &[1, 4]));
        all.extend(same(128, 8, 8192, &[1, 2]));
        all.push(shape(16, Requests::Ragged));
        all
    }

    pub fn kv_heads(&self) -> usize {
        match self.cached {
            Cached::Heads { kv_heads, .. } => kv_heads,
            Cached::Latents => 1,
        }
    }

    /// Elements of a query and of a key.
    pub fn key_dim(&self) -> usize {
        match self.cached {
            Cached::Heads { head_dim, .. } => head_dim,
            Cached::Latents => LATENT + ROTATED,
        }
    }

    /// Elements of a value and of an output.
    pub fn value_dim(&self) -> usize {
        match self.cached {
            Cached::Heads { head_dim, .. } => head_dim,
            Cached::Latents => LATENT,
        }
    }

    pub fn scale(&self) -> f32 {
        let elements = match self.cached {
            Cached::Heads { head_dim, .. } => head_dim,
            Cached::Latents => PLAIN + ROTATED,
        };
        1.0 / (elements as f32).sqrt()
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

    /// Of all slots that are attended to, in 16 bits.
    pub fn cache_bytes(&self) -> usize {
        let slots: usize = self.members().iter().map(|member| member.prefix + member.nodes).sum();
        let of_slot = match self.cached {
            Cached::Heads { kv_heads, head_dim } => 2 * kv_heads * head_dim,
            Cached::Latents => LATENT + ROTATED,
        };
        2 * slots * of_slot
    }

    /// Microseconds to move the cache, queries and outputs once (all of 16 bits, as the peers have them).
    pub fn memory_floor(&self, bytes_per_second: f64) -> f64 {
        let of_row = 2 * self.heads * (self.key_dim() + self.value_dim());
        (self.cache_bytes() + self.rows() * of_row) as f64 / bytes_per_second * 1e6
    }

    /// Of the two products, every node with every slot.
    pub fn flops(&self) -> f64 {
        let pairs: usize = self.members().iter().map(|member| member.nodes * (member.prefix + member.nodes)).sum();
        (2 * pairs * self.heads * (self.key_dim() + self.value_dim())) as f64
    }

    /// Microseconds of the two products.
    pub fn compute_floor(&self) -> f64 {
        self.flops() / FLOPS * 1e6
    }
}

fn ragged(index: u64) -> Member {
    let fraction = |counter: u64| (random::hash(counter) >> 11) as f64 / (1u64 << 53) as f64;
    Member {
        prefix: (128.0 * 256f64.powf(fraction(2 * index))) as usize,
        nodes: 1 + (64.0 * fraction(2 * index + 1)) as usize,
    }
}

/// `32/8x128:B8:L8192:N16` or `32/8x128:ragged`: query heads / kv heads x head dim, requests, prefix, nodes. For latents
/// `mla16:B32:L8192:N4`: there are only query heads.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.cached {
            Cached::Heads { kv_heads, head_dim } => write!(f, "{}/{kv_heads}x{head_dim}:", self.heads)?,
            Cached::Latents => write!(f, "mla{}:", self.heads)?,
        }
        match self.requests {
            Requests::Same { count, prefix, nodes } => write!(f, "B{count}:L{prefix}:N{nodes}"),
            Requests::Ragged => f.write_str("ragged"),
        }
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Shape, String> {
        let parse = || {
            let (model, requests) = text.split_once(':')?;
            let (heads, cached) = parse_model(model)?;
            Some(Shape { heads, cached, requests: parse_requests(requests)? })
        };
        parse().ok_or_else(|| {
            format!(
                "'{text}' is no shape; shapes look like 32/8x128:B8:L8192:N16, 32/8x128:ragged or mla16:B32:L8192:N4"
            )
        })
    }
}

fn parse_model(text: &str) -> Option<(usize, Cached)> {
    if let Some(heads) = number(text, "mla") {
        return Some((heads, Cached::Latents));
    }
    let (heads, head_dim) = text.split_once('x')?;
    let (heads, kv_heads) = heads.split_once('/')?;
    Some((number(heads, "")?, Cached::Heads { kv_heads: number(kv_heads, "")?, head_dim: number(head_dim, "")? }))
}

fn parse_requests(text: &str) -> Option<Requests> {
    match text.split(':').collect::<Vec<_>>()[..] {
        ["ragged"] => Some(Requests::Ragged),
        [b, l, n] => Some(Requests::Same { count: number(b, "B")?, prefix: number(l, "L")?, nodes: number(n, "N")? }),
        _ => None,
    }
}

fn number(text: &str, prefix: &str) -> Option<usize> {
    text.strip_prefix(prefix)?.parse().ok().filter(|&n| n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_as_they_are_written() {
        for shape in [Shape::all(), Shape::latents()].concat() {
            assert_eq!(shape.to_string().parse(), Ok(shape));
        }
        for text in ["", "32/8x128", "32/8x128:B8:L8192", "32/8x128:B0:L8:N1", "32x128:B1:L8:N1", "32/8x128:B8:N1:L8"] {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
        for text in ["mla16", "mla0:B1:L8:N1", "mla:B1:L8:N1", "mla16/1x576:B1:L8:N1", "16:B1:L8:N1"] {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
    }

    #[test]
    fn floors_are_those_of_the_peers_script() {
        let shape: Shape = "32/8x128:B8:L8192:N16".parse().unwrap();
        assert_eq!(shape.cache_bytes(), 8 * 8208 * 8 * 128 * 4);
        let bytes = shape.cache_bytes() + 4 * 8 * 16 * 32 * 128;
        assert_eq!(shape.memory_floor(1e6), bytes as f64);
        assert_eq!(shape.compute_floor(), (4 * 8 * 16 * 32 * 128 * 8208_u64) as f64 / 600e6);
    }

    #[test]
    fn latents_are_read_once_and_multiplied_twice() {
        let shape: Shape = "mla16:B32:L8192:N4".parse().unwrap();
        assert_eq!(shape.cache_bytes(), 32 * 8196 * 1152);
        assert_eq!(shape.memory_floor(1e6), (shape.cache_bytes() + 32 * 4 * 16 * (576 + 512) * 2) as f64);
        assert_eq!(shape.flops(), (2 * (576 + 512) * 32 * 4 * 16 * 8196_u64) as f64);
        assert_eq!(shape.compute_floor(), shape.flops() / 600e6);
    }

    #[test]
    fn ragged_requests_stay_within_their_bounds() {
        let members = "32/8x128:ragged".parse::<Shape>().unwrap().members();
        assert!(members.iter().all(|m| (128..32768).contains(&m.prefix) && (1..=64).contains(&m.nodes)));
        assert_eq!(members.len(), 8);
    }
}
