//! Writes one jump for each driver function named in symbols.txt.
//!
//! A jump is the whole function: it leaves registers and stack as they are, so it forwards any arguments.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=symbols.txt");
    let symbols = fs::read_to_string("symbols.txt").expect("symbols.txt lies beside build.rs");
    let names: Vec<&str> = symbols.split_whitespace().collect();
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo tells the architecture");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo gives a folder")).join("jumps.rs");
    fs::write(out, jumps(&names, &arch)).expect("the folder is writable");
}

/// `NAMES`, and an assembly block that defines them all; function i jumps to what `TABLE[i]` holds.
fn jumps(names: &[&str], arch: &str) -> String {
    let mut text = format!("pub const NAMES: [&str; {}] = {names:?};\n", names.len());
    text.push_str("core::arch::global_asm!(\n\".text\",\n");
    for (i, name) in names.iter().enumerate() {
        let slot = format!("{{table}}+{}", i * 8);
        let jump = match arch {
            "x86_64" => format!("jmp qword ptr [rip + {slot}]"),
            "aarch64" => format!("adrp x16, {slot}\\nldr x16, [x16, :lo12:{slot}]\\nbr x16"),
            other => panic!("no jump is written for {other}: build without the feature cuda"),
        };
        writeln!(text, "\".globl {name}\\n.type {name},@function\\n{name}:\\n{jump}\",").expect("writing to a string");
    }
    text.push_str("table = sym TABLE,\n);\n");
    text
}
