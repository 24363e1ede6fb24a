//! Drafters that are shipped with the project, `models/pretrained/<target>/<drafter>/`, found beside the program.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where they are, below a folder that holds the program: in a checkout, and where a package puts them.
const FOLDERS: [&str; 2] = ["models/pretrained", "share/treespark/pretrained"];
/// Names the folder, wherever it is.
const VARIABLE: &str = "TREESPARK_PRETRAINED";

/// The folder of a drafter for a target, by their names.
pub fn find(target: &str, drafter: &str) -> Result<PathBuf> {
    let none = |problem| Error::NotFound { name: drafter.to_string(), problem };
    let roots = roots();
    let found = roots.iter().map(|root| root.join(target).join(drafter)).find(|folder| folder.is_dir());
    found.ok_or_else(|| {
        let looked: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
        none(format!(
            "no such drafter is shipped for {target} (looked in {}; {VARIABLE} names another folder)",
            if looked.is_empty() { "no folder".to_string() } else { looked.join(", ") }
        ))
    })
}

/// Existing folders of shipped drafters.
fn roots() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let beside = program.ancestors().skip(1).flat_map(|folder| FOLDERS.map(|name| folder.join(name)));
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    named.into_iter().chain(beside).filter(|folder: &PathBuf| Path::is_dir(folder)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_shipped_is_named() {
        let error = find("no-such-model", "dspark").unwrap_err().to_string();
        assert!(error.contains("dspark") && error.contains("no-such-model") && error.contains(VARIABLE), "{error}");
    }
}
