//! The processor this runs on: its name, and how many cores to use.

use std::collections::HashSet;
use std::fs;
use std::thread::available_parallelism;

/// As its maker calls it, or the architecture if the system does not tell.
pub fn name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned()
}

/// Bytes of memory that could be had, if the system tells.
pub fn free_bytes() -> Option<usize> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<usize>().ok().map(|kb| kb * 1024)
}

/// `RAYON_NUM_THREADS` if set, else one thread per physical core: a second one on a core would only share its
/// bandwidth.
pub fn threads() -> usize {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse().ok()).filter(|&n| n > 0);
    asked.unwrap_or_else(|| {
        let allowed = available_parallelism().map_or(1, usize::from);
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        physical_cores(&info).map_or(allowed, |cores| cores.min(allowed))
    })
}

/// Different pairs of socket and core in `/proc/cpuinfo`; none if it does not name them.
fn physical_cores(info: &str) -> Option<usize> {
    let mut cores = HashSet::new();
    let mut socket = "";
    for (key, value) in info.lines().filter_map(|line| line.split_once(':')) {
        match key.trim() {
            "physical id" => socket = value.trim(),
            "core id" => _ = cores.insert((socket, value.trim())),
            _ => {}
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_are_one_core() {
        let cpu = |socket, core| format!("processor\t: 0\nphysical id\t: {socket}\ncore id\t\t: {core}\n\n");
        assert_eq!(physical_cores(&[cpu(0, 0), cpu(0, 1), cpu(0, 0), cpu(1, 0)].concat()), Some(3));
        assert_eq!(physical_cores("processor\t: 0\nBogoMIPS\t: 50\n"), None);
    }
}
