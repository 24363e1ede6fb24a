//! From a spec to kernel source: constants are generated, algorithms never.
//!
//! A source in `shaders/` is a readable program with example values between two marks. Only those values are replaced;
//! every constant there must be given, and no other. WGSL has no include, and the run-time compiler of CUDA no folder to
//! look in, so a first line `// needs: a b` names the files of `shaders/<lang>/lib/` that are put in front of the code.
//!
//! ```text
//! // needs: formats
//! // constants-begin
//! const HEAD_DIM: u32 = 64u; // what it means              (CUDA: constexpr u32 HEAD_DIM = 64; // what it means)
//! // constants-end
//! ```

use std::fmt::Write;

use crate::draw::draw;
use crate::spec::{KernelSpec, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lang {
    Wgsl,
    Cuda,
}

impl Lang {
    pub const fn name(self) -> &'static str {
        match self {
            Lang::Wgsl => "wgsl",
            Lang::Cuda => "cuda",
        }
    }

    fn kernels(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Lang::Wgsl => WGSL_KERNELS,
            Lang::Cuda => CUDA_KERNELS,
        }
    }

    fn library(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Lang::Wgsl => WGSL_LIBRARY,
            Lang::Cuda => CUDA_LIBRARY,
        }
    }

    /// Of files.
    pub const fn extension(self) -> &'static str {
        match self {
            Lang::Wgsl => "wgsl",
            Lang::Cuda => "cu",
        }
    }

    /// What its sources are called.
    fn file(self, stem: &str) -> String {
        format!("shaders/{}/{stem}.{}", self.name(), self.extension())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EmitError {
    #[error("no kernel source `{stem}` in {}; there are: {}", .lang.name(), stems(*.lang).collect::<Vec<_>>().join(", "))]
    UnknownKernel { lang: Lang, stem: String },
    #[error("{file} has a constant {constant} that the spec does not give")]
    MissingConstant { file: String, constant: String },
    #[error("{file} has no constant {constant}, which the spec gives")]
    UnknownConstant { file: String, constant: &'static str },
    #[error("{file}: {problem}")]
    Malformed { file: String, problem: String },
}

const BEGIN: &str = "// constants-begin";
const END: &str = "// constants-end";

macro_rules! sources {
    ($folder:literal $extension:literal: $($stem:literal)*) => {
        &[$(($stem, include_str!(concat!("../../shaders/", $folder, $stem, $extension)))),*]
    };
}

/// Kernel sources by stem, and what kernels share, by name.
const WGSL_KERNELS: &[(&str, &str)] = sources!("wgsl/" ".wgsl":
    "embed" "qkv" "tree_attention" "merge" "project" "gate_up" "res_block" "rms_norm" "head" "mask" "draw" "perturb" "top_k" "accept" "commit"
    "latent" "latent_queries" "per_head" "latent_attention" "route" "group_rows" "expert_gate_up" "expert_down" "combine" "gather");
const WGSL_LIBRARY: &[(&str, &str)] = sources!("wgsl/lib/" ".wgsl":
    "layout" "formats" "matmul" "x_rows" "experts" "paged" "batch" "ancestors" "philox" "best");
const CUDA_KERNELS: &[(&str, &str)] = sources!("cuda/" ".cu":
    "embed" "qkv" "tree_attention" "plain_attention" "project" "gate_up" "res_block" "rms_norm" "head" "mask" "draw" "perturb" "top_k" "accept" "commit"
    "draft_ngram" "grow" "open_block" "trellis" "grow_trellis"
    "normed_product" "latent" "latent_queries" "per_head" "latent_attention" "merge_latents" "plain_latents"
    "route" "group_rows" "expert_gate_up" "expert_down" "combine" "gather");
const CUDA_LIBRARY: &[(&str, &str)] = sources!("cuda/lib/" ".cuh":
    "ptx" "wgmma" "layout" "formats" "pieces" "paged" "chunks" "tiles" "accumulator" "parts" "batch" "ancestors" "philox" "best" "score" "vectors" "matmul"
    "rope" "experts" "latents");

/// Stems of all kernel sources.
pub fn stems(lang: Lang) -> impl Iterator<Item = &'static str> {
    lang.kernels().iter().map(|(stem, _)| *stem)
}

/// The source of a kernel.
pub fn emit(spec: &KernelSpec, lang: Lang) -> Result<String, EmitError> {
    let source = find(lang, lang.kernels(), spec.stem())?;
    let mut out = header(spec, lang);
    let (needs, body) = match source.strip_prefix("// needs:") {
        None => ("", source),
        Some(rest) => rest.split_once('\n').unwrap_or((rest, "")),
    };
    let mut library = String::new();
    for name in needs.split_whitespace() {
        library.push_str(find(lang, lang.library(), name)?);
        library.push('\n');
    }
    match lang {
        Lang::Wgsl => {
            out.push_str(&library);
            replace_constants(spec, lang, body, &mut out)?;
        }
        // What comes first in C++ must not name what comes later: constants, what is shared, the kernel.
        Lang::Cuda => {
            out.push_str("typedef unsigned int u32;\n\n");
            let mut kernel = String::new();
            replace_constants(spec, lang, body, &mut kernel)?;
            let (constants, kernel) = kernel.split_at(kernel.find(END).map_or(0, |at| at + END.len()));
            for part in [constants, "\n\n", &library, kernel] {
                out.push_str(part);
            }
        }
    }
    Ok(out)
}

fn find(lang: Lang, table: &[(&str, &'static str)], stem: &str) -> Result<&'static str, EmitError> {
    let found = table.iter().find(|(name, _)| *name == stem);
    found.map(|(_, source)| *source).ok_or_else(|| EmitError::UnknownKernel { lang, stem: stem.to_string() })
}

fn header(spec: &KernelSpec, lang: Lang) -> String {
    let file = lang.file(spec.stem());
    let mut out = format!("// {}\n// Generated by treespark-kernel-gen from {file}: do not edit.\n", spec.name());
    if let Some(shape) = spec.tree() {
        writeln!(out, "//\n// The tree {shape}:").expect("writing to a string");
        for line in draw(shape, |node| node.to_string()).lines() {
            writeln!(out, "//   {line}").expect("writing to a string");
        }
    }
    out.push('\n');
    out
}

/// Copies `body` with the values between the marks replaced by those of the spec.
fn replace_constants(spec: &KernelSpec, lang: Lang, body: &str, out: &mut String) -> Result<(), EmitError> {
    let file = || lang.file(spec.stem());
    let malformed = |problem: String| EmitError::Malformed { file: file(), problem };
    let mut unused: Vec<&'static str> = spec.constants().iter().map(|(name, _)| *name).collect();
    let mut inside = false;
    for line in body.lines() {
        match line.trim() {
            BEGIN => inside = true,
            END => inside = false,
            text if inside && !text.is_empty() && !text.starts_with("//") => {
                let found = match lang {
                    Lang::Wgsl => wgsl_declaration(text),
                    Lang::Cuda => cuda_declaration(text),
                };
                let Declaration { name, kind, comment } =
                    found.ok_or_else(|| malformed(format!("`{text}` declares no constant")))?;
                let (_, value) = (spec.constants().iter().find(|(known, _)| *known == name))
                    .ok_or_else(|| EmitError::MissingConstant { file: file(), constant: name.to_string() })?;
                let (value_kind, constant) = match lang {
                    Lang::Wgsl => wgsl_constant(name, value),
                    Lang::Cuda => cuda_constant(name, value),
                };
                if kind != value_kind {
                    return Err(malformed(format!("{name} is {kind}, the spec gives {value_kind}")));
                }
                unused.retain(|unused| *unused != name);
                writeln!(out, "{constant}{}{comment}", if comment.is_empty() { "" } else { " " })
                    .expect("writing to a string");
                continue;
            }
            _ => {}
        }
        out.push_str(line);
        out.push('\n');
    }
    if inside || !body.contains(BEGIN) {
        return Err(malformed(format!("needs one region between `{BEGIN}` and `{END}`")));
    }
    match unused.first() {
        Some(constant) => Err(EmitError::UnknownConstant { file: file(), constant }),
        None => Ok(()),
    }
}

/// A constant as a source declares it. The kind leaves out how long an array is.
#[derive(Debug, PartialEq)]
struct Declaration<'a> {
    name: &'a str,
    kind: &'a str,
    comment: &'a str,
}

/// `const NAME: type = value; // comment`
fn wgsl_declaration(line: &str) -> Option<Declaration<'_>> {
    let (name, rest) = line.strip_prefix("const ")?.split_once(':')?;
    let (kind, rest) = rest.split_once('=')?;
    let (_, comment) = rest.split_once(';')?;
    let kind = kind.split('<').next()?;
    Some(Declaration { name: name.trim(), kind: kind.trim(), comment: comment.trim() })
}

/// Kind and declaration of a value.
fn wgsl_constant(name: &str, value: &Value) -> (&'static str, String) {
    match value {
        Value::U32(v) => ("u32", format!("const {name}: u32 = {v}u;")),
        Value::F32(v) => ("f32", format!("const {name}: f32 = {v:?}f;")),
        Value::Bool(v) => ("bool", format!("const {name}: bool = {v};")),
        Value::Words(words) => {
            let kind = format!("array<u32, {}>", words.len());
            let list: Vec<String> = words.iter().map(|w| format!("{w:#x}u")).collect();
            ("array", format!("const {name}: {kind} = {kind}({});", list.join(", ")))
        }
    }
}

/// `constexpr type NAME = value; // comment`, or `__device__ constexpr u32 NAME[] = {..}; // comment`
fn cuda_declaration(line: &str) -> Option<Declaration<'_>> {
    let line = line.strip_prefix("__device__ ").unwrap_or(line);
    let (kind, rest) = line.strip_prefix("constexpr ")?.split_once(' ')?;
    let (name, rest) = rest.split_once('=')?;
    let (_, comment) = rest.split_once(';')?;
    let (name, kind) = match name.trim().strip_suffix("[]") {
        Some(name) => (name, "array"),
        None => (name.trim(), kind),
    };
    Some(Declaration { name, kind, comment: comment.trim() })
}

/// Kind and declaration of a value.
fn cuda_constant(name: &str, value: &Value) -> (&'static str, String) {
    match value {
        Value::U32(v) => ("u32", format!("constexpr u32 {name} = {v}u;")),
        Value::F32(v) => ("float", format!("constexpr float {name} = {v:?}f;")),
        Value::Bool(v) => ("bool", format!("constexpr bool {name} = {v};")),
        Value::Words(words) => {
            let list: Vec<String> = words.iter().map(|w| format!("{w:#x}u")).collect();
            ("array", format!("__device__ constexpr u32 {name}[] = {{{}}};", list.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn embed() -> KernelSpec {
        KernelSpec::new("embed").size("COLUMNS", "k", 64)
    }

    #[test]
    fn a_constant_more_or_less_is_an_error() {
        let missing = emit(&embed(), Lang::Wgsl).unwrap_err();
        assert!(matches!(missing, EmitError::MissingConstant { .. }), "{missing}");
        let full = embed().format("WEIGHT", crate::DType::BF16).bank(0, 8);
        let unknown = emit(&full.clone().with("COLOUR", 3_usize), Lang::Wgsl).unwrap_err();
        let file = "shaders/wgsl/embed.wgsl".to_string();
        assert_eq!(unknown, EmitError::UnknownConstant { file, constant: "COLOUR" });
        let source = emit(&full, Lang::Wgsl).unwrap();
        assert!(source.contains("const COLUMNS: u32 = 64u;"), "{source}");
        let wrong = KernelSpec::new("embed").with("COLUMNS", true);
        assert!(emit(&wrong, Lang::Wgsl).unwrap_err().to_string().contains("COLUMNS is u32, the spec gives bool"));
        assert!(emit(&KernelSpec::new("embedding"), Lang::Wgsl).unwrap_err().to_string().contains("tree_attention"));
    }

    #[test]
    fn declarations_keep_their_comments() {
        let expected = |kind| Some(Declaration { name: "TREE", kind, comment: "// [nodes, words]" });
        let wgsl = "const TREE: array<u32, 1> = array<u32, 1>(0u); // [nodes, words]";
        assert_eq!(wgsl_declaration(wgsl), expected("array"));
        assert_eq!(wgsl_declaration("let x = 1;"), None);
        assert_eq!(cuda_declaration("__device__ constexpr u32 TREE[] = {0x0u}; // [nodes, words]"), expected("array"));
        assert_eq!(cuda_declaration("constexpr float TREE = 0.5f; // [nodes, words]"), expected("float"));
        assert_eq!(cuda_declaration("float TREE = 0.5f;"), None);
    }

    #[test]
    fn constants_are_written_as_their_language_has_them() {
        let words = Value::Words(vec![1, 255]);
        assert_eq!(wgsl_constant("T", &words).1, "const T: array<u32, 2> = array<u32, 2>(0x1u, 0xffu);");
        assert_eq!(cuda_constant("T", &words).1, "__device__ constexpr u32 T[] = {0x1u, 0xffu};");
        assert_eq!(cuda_constant("S", &Value::F32(1e-5)).1, "constexpr float S = 1e-5f;");
    }
}
