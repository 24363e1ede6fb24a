//! What one kernel is compiled for: the source it comes from and the constants that replace its example values.
//!
//! A spec's name is file stem, table key, bench id and log line, e.g. `tree_attention__hd64_h9_g3_bf16_p16_t12_any64`. It
//! holds the sizes a person would ask for; constants that follow from them, or from the device, are left out.

use crate::op::TreeSpec;
use crate::pass::DType;
use crate::shape::TreeShape;

/// The value of one constant in a kernel source.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    /// An array of words, at least one.
    Words(Vec<u32>),
}

/// One kernel: the stem of its source and a value for each constant in it.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelSpec {
    stem: &'static str,
    name: String,
    constants: Vec<(&'static str, Value)>,
    tree: Option<TreeShape>,
}

impl KernelSpec {
    pub fn new(stem: &'static str) -> KernelSpec {
        KernelSpec { stem, name: stem.to_string(), constants: Vec::new(), tree: None }
    }

    /// File stem of the source, e.g. `tree_attention`.
    pub fn stem(&self) -> &'static str {
        self.stem
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn constants(&self) -> &[(&'static str, Value)] {
        &self.constants
    }

    /// The tree the kernel is compiled for, if it is compiled for one.
    pub fn tree(&self) -> Option<&TreeShape> {
        self.tree.as_ref()
    }

    /// A size that tells kernels of one stem apart: `tag` and value become part of the name.
    pub fn size(mut self, constant: &'static str, tag: &str, value: usize) -> KernelSpec {
        self.tag(&format!("{tag}{value}"));
        self.set(constant, Value::U32(value as u32))
    }

    /// A constant that follows from sizes, or that the name need not show.
    pub fn with(self, constant: &'static str, value: impl Into<Value>) -> KernelSpec {
        self.set(constant, value.into())
    }

    /// Something a kernel has or lacks: `tag` becomes part of the name if it has it.
    pub fn flag(mut self, constant: &'static str, tag: &str, value: bool) -> KernelSpec {
        if value {
            self.tag(tag);
        }
        self.set(constant, Value::Bool(value))
    }

    /// `BANK_BEGIN` and `BANK_ROWS`: the part of a weight that the kernel serves, by its rows.
    pub fn bank(mut self, begin: usize, rows: usize) -> KernelSpec {
        self.tag(&format!("w{rows}"));
        if begin > 0 {
            self.tag(&format!("from{begin}"));
        }
        self.with("BANK_BEGIN", begin).with("BANK_ROWS", rows)
    }

    /// `ROWS_BEGIN` and `ROWS_END`: the rows whose partial results the kernel works on, `u32::MAX` for no end.
    pub fn turn(mut self, begin: usize, end: usize) -> KernelSpec {
        if end != u32::MAX as usize {
            self.tag(&format!("from{begin}to{end}"));
        }
        self.with("ROWS_BEGIN", begin).with("ROWS_END", end)
    }

    /// The format in which 16 or 32 bit numbers lie in memory; see `shaders/wgsl/lib/formats.wgsl`.
    pub fn format(mut self, constant: &'static str, dtype: DType) -> KernelSpec {
        self.tag(dtype.name());
        let code = match dtype {
            DType::F32 => 0,
            DType::BF16 => 1,
            DType::F16 => 2,
            DType::U32 => unreachable!("Op::check refuses words where numbers belong"),
        };
        self.set(constant, Value::U32(code))
    }

    /// `STATIC_TREE` and `TREE_WORDS`: the ancestor words of every node, `tree_words` a node, or one unused word.
    pub fn tree_constants(mut self, tree: &TreeSpec) -> KernelSpec {
        let (is_static, words) = match tree {
            TreeSpec::Any(n) => {
                self.tag(&format!("any{n}"));
                (false, vec![0])
            }
            TreeSpec::Static(shape) => {
                self.tag(&tree_tag(shape));
                self.tree = Some(shape.clone());
                let used = tree_words(tree);
                (true, (0..shape.len()).flat_map(|node| shape.ancestors(node)[..used].to_vec()).collect())
            }
        };
        self.with("STATIC_TREE", is_static).with("TREE_WORDS", tree_words(tree)).with("TREE", Value::Words(words))
    }

    /// `PARENTS`: of every node of a tree.
    pub fn parents(mut self, shape: &TreeShape) -> KernelSpec {
        self.tag(&tree_tag(shape));
        self.tree = Some(shape.clone());
        self.with("PARENTS", Value::Words(shape.parents().to_vec()))
    }

    fn tag(&mut self, tag: &str) {
        self.name.push_str(if self.name.contains("__") { "_" } else { "__" });
        self.name.push_str(tag);
    }

    fn set(mut self, constant: &'static str, value: Value) -> KernelSpec {
        assert!(self.constants.iter().all(|(name, _)| *name != constant), "{constant} is set twice");
        self.constants.push((constant, value));
        self
    }
}

/// Ancestor words that a tree of this size needs.
fn tree_words(tree: &TreeSpec) -> usize {
    tree.max_nodes().div_ceil(32)
}

/// A tree as part of a file name: its text where that is short, else its size and a hash of its parents.
fn tree_tag(shape: &TreeShape) -> String {
    let text = shape.to_string().replace(':', "");
    if text.len() <= 24 && text.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return text;
    }
    // FNV-1a: stable across builds, unlike the standard library's hasher.
    let hash = shape
        .parents()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, &p| (h ^ u64::from(p)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("tree{}x{:08x}", shape.len(), hash as u32)
}

impl From<usize> for Value {
    fn from(value: usize) -> Value {
        Value::U32(u32::try_from(value).expect("sizes fit 32 bits"))
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Value {
        Value::F32(value)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Bool(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_shows_what_tells_kernels_apart() {
        let spec = KernelSpec::new("tree_attention")
            .size("HEAD_DIM", "hd", 64)
            .with("SCALE", 0.125_f32)
            .format("CACHE", DType::BF16)
            .tree_constants(&TreeSpec::Any(64));
        assert_eq!(spec.name(), "tree_attention__hd64_bf16_any64");
        assert_eq!(spec.constants()[1], ("SCALE", Value::F32(0.125)));
    }

    #[test]
    fn trees_get_short_stable_names() {
        let named = |text: &str| {
            let shape: TreeShape = text.parse().unwrap();
            KernelSpec::new("accept").tree_constants(&TreeSpec::Static(shape)).name().to_string()
        };
        assert_eq!(named("4x2x2x1"), "accept__4x2x2x1");
        assert_eq!(named("chain:8"), "accept__chain8");
        let long = named("parents:0,0,0,1,1,2,4,5,6,6,6,6");
        assert!(long.starts_with("accept__tree12x") && long.len() == "accept__tree12x".len() + 8, "{long}");
        assert_ne!(long, named("parents:0,0,0,1,1,2,4,5,6,6,6,7"));
    }
}
