//! `cuda`: the feature is on, and the runtime has its CUDA backend on this system (see the runtime's build.rs).
//! `TREESPARK_COMMIT`: what is measured, wherever the binary is taken.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(cuda)");
    let target = |what: &str| env::var(format!("CARGO_CFG_TARGET_{what}")).unwrap_or_default();
    if cfg!(feature = "cuda") && target("OS") == "linux" && ["x86_64", "aarch64"].contains(&target("ARCH").as_str()) {
        println!("cargo::rustc-cfg=cuda");
    }

    // They change with each commit, and with what is staged for the next.
    for file in ["logs/HEAD", "index"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let commit = git(&["describe", "--always", "--dirty"]).unwrap_or("unknown".into());
    println!("cargo::rustc-env=TREESPARK_COMMIT={commit}");
}

/// What git says in this folder, if anything.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
}
