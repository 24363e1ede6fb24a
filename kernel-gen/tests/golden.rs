//! What the generator writes equals what is committed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use treespark_kernel_gen::release;

const REFRESH: &str = "if the change is meant, run `cargo run -p treespark-kernel-gen -- golden` and commit the result";

#[test]
fn goldens_are_up_to_date() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let goldens = release::goldens();
    for (name, source) in &goldens {
        let committed =
            fs::read_to_string(folder.join(name)).unwrap_or_else(|e| panic!("golden/{name}: {e}; {REFRESH}"));
        let line = committed.lines().zip(source.lines()).position(|(a, b)| a != b);
        let first = line.map_or("their lengths differ".to_string(), |i| {
            let (was, is) = (committed.lines().nth(i).unwrap(), source.lines().nth(i).unwrap());
            format!("line {}:\n  committed: {was}\n  generated: {is}\n", i + 1)
        });
        assert!(committed == *source, "golden/{name} differs, {first}; {REFRESH}");
    }
    let names = |file: std::io::Result<fs::DirEntry>| file.unwrap().file_name().into_string().unwrap();
    let committed: BTreeSet<String> = fs::read_dir(&folder).unwrap().map(names).collect();
    let generated: BTreeSet<String> = goldens.into_iter().map(|(name, _)| name).collect();
    assert_eq!(committed, generated, "kernel-gen/golden has other files; {REFRESH}");
}
