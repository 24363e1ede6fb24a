//! The generator's own small tool: looks at trees and at the kernels made for them.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use treespark_kernel_gen::cuda::{self, Device};
use treespark_kernel_gen::draw::draw;
use treespark_kernel_gen::emit::{Lang, emit, stems};
use treespark_kernel_gen::lower::lower;
use treespark_kernel_gen::spec::KernelSpec;
use treespark_kernel_gen::{Pass, TreeShape, TreeSpec, release};

const HELP: &str = "\
Looks at speculation trees and at the kernels made for them.

Usage:
  treespark-kernel-gen draw SHAPE                          the tree
  treespark-kernel-gen show SHAPE [--lang LANG] [--kernel STEM]  a kernel compiled for the tree (tree_attention)
  treespark-kernel-gen list [--lang LANG]                  the kernels of a release
  treespark-kernel-gen golden                              writes the committed kernels, kernel-gen/golden/

A LANG is wgsl, which is taken if none is given, or cuda (for an H100).
A SHAPE is root, chain:8 (8 nodes below the root), 4x2x2x1 (children a node, level by level),
parents:0,0,0,1,1 (the root's own 0 first) or paths:0;0.0;1 (child ranks from the root down).
Kernels are shown with the sizes of SmolLM2-135M.

Examples:
  cargo run -p treespark-kernel-gen -- draw 4x2x2x1
  cargo run -p treespark-kernel-gen -- draw 'paths:0;0.0;1'
  cargo run -p treespark-kernel-gen -- show 4x2x2x1 --lang wgsl
  cargo run -p treespark-kernel-gen -- show chain:4 --lang cuda --kernel accept
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        // A reader that has seen enough (`| head`) is no failure.
        Ok(text) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[String]) -> Result<String, String> {
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--help" | "-h" | "help"] => Ok(HELP.to_string()),
        ["draw", shape] => {
            let shape: TreeShape = shape.parse().map_err(text)?;
            let (n, leaves, depth) = (shape.len(), shape.leaves().len(), shape.max_depth());
            let drawing = draw(&shape, |node| node.to_string());
            Ok(format!("{shape}: {n} nodes, {leaves} leaves, depth {depth}\n{drawing}"))
        }
        ["show", shape, ref options @ ..] => show(shape.parse().map_err(text)?, &Options::parse(options)?),
        ["list", ref options @ ..] => {
            let specs = match Options::parse(options)? {
                Options { lang, kernel: None } => release_specs(lang)?,
                Options { kernel: Some(_), .. } => return Err("list takes no --kernel".to_string()),
            };
            Ok(specs.iter().map(|spec| format!("{}\n", spec.name())).collect())
        }
        ["golden"] => write_goldens(),
        _ => Err(format!("nothing to do for `{}`\n\n{HELP}", arguments.join(" "))),
    }
}

struct Options<'a> {
    lang: Lang,
    kernel: Option<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(words: &[&'a str]) -> Result<Options<'a>, String> {
        let mut options = Options { lang: Lang::Wgsl, kernel: None };
        for option in words.chunks(2) {
            match *option {
                ["--lang", "wgsl"] => options.lang = Lang::Wgsl,
                ["--lang", "cuda"] => options.lang = Lang::Cuda,
                ["--lang", other] => return Err(format!("no kernels in `{other}`; there are: wgsl, cuda")),
                ["--kernel", stem] => options.kernel = Some(stem),
                _ => return Err(format!("`{}` is not understood; see --help", option.join(" "))),
            }
        }
        Ok(options)
    }
}

/// The first kernel of this stem in a pass over the tree.
fn show(shape: TreeShape, options: &Options) -> Result<String, String> {
    let (lang, stem) = (options.lang, options.kernel.unwrap_or("tree_attention"));
    let pass = release::MODELS[0].pass(shape.len(), TreeSpec::Static(shape));
    let known = || stems(lang).collect::<Vec<_>>().join(", ");
    let spec = specs(&pass, lang)?.into_iter().find(|spec| spec.stem() == stem);
    let spec = spec.ok_or_else(|| format!("no kernel `{stem}` in a pass over this tree; kernels: {}", known()))?;
    emit(&spec, lang).map_err(text)
}

fn specs(pass: &Pass, lang: Lang) -> Result<Vec<KernelSpec>, String> {
    match lang {
        Lang::Wgsl => {
            let calls: Result<Vec<_>, _> = pass.ops.iter().map(|op| lower(op, pass, &release::PORTABLE)).collect();
            Ok(calls.map_err(text)?.concat().into_iter().map(|call| call.spec).collect())
        }
        Lang::Cuda => {
            let launches = cuda::lower_pass(pass, &Device::H100).map_err(text)?;
            Ok(launches.into_iter().map(|launch| launch.spec).collect())
        }
    }
}

fn release_specs(lang: Lang) -> Result<Vec<KernelSpec>, String> {
    Ok(match lang {
        Lang::Wgsl => release::calls().map_err(text)?.into_iter().map(|call| call.spec).collect(),
        Lang::Cuda => {
            release::cuda_launches(&Device::H100).map_err(text)?.into_iter().map(|launch| launch.spec).collect()
        }
    })
}

fn write_goldens() -> Result<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let write = |name: &str, source: &str| {
        let path = folder.join(name);
        fs::write(&path, source).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(format!("{}\n", path.display()))
    };
    release::goldens().iter().map(|(name, source)| write(name, source)).collect()
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::run;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_string).collect()
    }

    #[test]
    fn draws_and_explains() {
        assert_eq!(run(&words("draw 2x1")).unwrap(), "2x1: 5 nodes, 2 leaves, depth 2\n0\n├─ 1 ─ 3\n└─ 2 ─ 4\n");
        assert!(run(&words("draw chain:256")).unwrap_err().contains("257"));
        assert!(run(&words("--help")).unwrap().contains("Usage"));
        assert!(run(&words("drew 2x1")).unwrap_err().contains("`drew 2x1`"));
    }

    #[test]
    fn shows_and_lists_kernels() {
        let shown = run(&words("show 2x1 --lang wgsl")).unwrap();
        assert!(shown.contains("├─ 1 ─ 3") && shown.contains("@compute"), "{shown}");
        assert!(run(&words("show 2x1 --kernel accept")).unwrap().contains("accepted"));
        assert!(run(&words("show 2x1 --lang cobol")).unwrap_err().contains("cobol"));
        assert!(run(&words("show 2x1 --kernel")).unwrap_err().contains("--kernel"));
        assert!(run(&words("show 2x1 --kernel attend")).unwrap_err().contains("tree_attention"));
        assert!(run(&words("list")).unwrap().contains("tree_attention__"));
        assert!(run(&words("list --kernel accept")).unwrap_err().contains("--kernel"));
        assert!(run(&words("list --lang cuda")).unwrap().contains("tree_attention__"));
        assert!(run(&words("show 2x1 --lang cuda")).unwrap().contains("__global__"));
    }
}
