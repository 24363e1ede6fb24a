//! `treespark-fuzz` as a user runs it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use treespark_verify_tests::cases;

fn fuzz(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_treespark-fuzz")).args(args).output().expect("it runs")
}

fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).expect("a folder for results");
    folder
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_slice_of_random_cases_passes_on_the_cpu() {
    let out = folder("fuzz-cpu");
    let output = fuzz(&["run", "--cases", "120", "--seconds", "600", "--seed", "11", "--out", out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let text = text(&output);
    assert!(text.contains("120 cases"), "{text}");
    // Of models with latents, too, and of both routers.
    assert!(
        ["latent_attention: ", "compressed queries: ", "sigmoid: ", "softmax: "].iter().all(|seen| text.contains(seen)),
        "{text}"
    );
}

#[test]
fn a_slice_of_whole_generations_passes_on_the_cpu() {
    let out = folder("fuzz-rounds");
    let output = fuzz(&["rounds", "--cases", "105", "--seconds", "600", "--seed", "5", "--out", out.to_str().unwrap()]);
    let text = text(&output);
    assert!(output.status.code() == Some(0) && text.contains("105 cases"), "{text}");
    // Of every end some, and of drafts that were accepted many.
    assert!(["Length", "Context", "StopToken", "StopString"].iter().all(|end| text.contains(end)), "{text}");
}

#[test]
fn a_slice_of_the_statistics_passes_on_the_cpu() {
    let out = folder("fuzz-stats");
    let output = fuzz(&["stats", "--answers", "600", "--out", out.to_str().unwrap()]);
    assert!(output.status.code() == Some(0) && text(&output).contains("nothing is rejected"), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(out.join("stats.json")).unwrap()).unwrap();
    assert!(report["rounds"].as_u64() > Some(6000) && report["tests"].as_array().unwrap().len() > 6, "{report}");
    assert!(fs::read_to_string(out.join("stats.svg")).unwrap().contains("</svg>"));
}

#[test]
fn a_short_soak_is_clean_on_the_cpu() {
    if cases::default_model().is_none() {
        return;
    }
    let few = ["--asks", "8", "--tokens", "16", "--max-requests", "4", "--clients", "6", "--cache-tokens", "1200"];
    let output = fuzz(&[&["soak", "--seconds", "8"], &few[..]].concat());
    let text = text(&output);
    assert!(output.status.code() == Some(0) && text.contains("0 of 75 pages in use at the end"), "{text}");
}

#[test]
fn planted_bugs_are_found() {
    for class in ["1", "3", "6", "14", "15", "24"] {
        let output = fuzz(&["mutants", "--class", class]);
        assert_eq!(output.status.code(), Some(0), "class {class}: {}", text(&output));
    }
}

/// A kernel's counter that its next run does not find at zero.
#[cfg(feature = "cuda")]
#[test]
fn a_bug_inside_a_kernel_is_found() {
    let compiler = Command::new("g++").arg("--version").output();
    if cases::needed("TREESPARK_REQUIRE_GPU", compiler).is_none() {
        return;
    }
    let output = fuzz(&["mutants", "--class", "17", "--only", "long contexts", "--seconds", "600"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("1 of 1 found"), "{}", text(&output));
}

#[test]
fn a_case_is_made_again_from_its_file() {
    let file = folder("fuzz-replay").join("case.json");
    let case = r#"{"backend": "cpu", "seed": 5, "index": 7, "property": "a second run equals the first", "wild": true, "scale": "Small"}"#;
    fs::write(&file, case).unwrap();
    let output = fuzz(&["replay", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("request 0:") && text(&output).contains("nothing wrong"), "{}", text(&output));

    let rounds = case.replace("a second run equals the first", "speculative decoding equals plain, drafter: medusa");
    fs::write(&file, &rounds).unwrap();
    let output = fuzz(&["replay", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("Medusa") && text(&output).contains("nothing wrong"), "{}", text(&output));

    let deepseek = rounds.replace("medusa", "mtp").replace('}', r#", "family": "Deepseek"}"#);
    fs::write(&file, deepseek).unwrap();
    let output = fuzz(&["replay", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("LatentSizes") && text(&output).contains("Mtp"), "{}", text(&output));

    fs::write(&file, case.replace("a second run", "a third run")).unwrap();
    let output = fuzz(&["replay", file.to_str().unwrap()]);
    assert!(
        output.status.code() == Some(1) && text(&output).contains("no property is called `a third run"),
        "{}",
        text(&output)
    );
}

#[test]
fn what_cannot_be_run_is_said() {
    let file = folder("fuzz-bad").join("case.json");
    fs::write(&file, "{}").unwrap();
    let cases: [(&[&str], &str); 4] = [
        (&["run", "--backend", "tpu"], "no backend `tpu`"),
        (&["run", "--only", "no such thing"], "no property is called so"),
        (&["replay", "no-such-file.json"], "no-such-file.json"),
        (&["replay", file.to_str().unwrap()], "holds no case"),
    ];
    for (args, says) in cases {
        let output = fuzz(args);
        assert!(output.status.code() == Some(2) && text(&output).contains(says), "{args:?}: {}", text(&output));
    }
}
