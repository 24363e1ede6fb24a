//! `treespark devices`: what was found, and which one `--backend auto` takes and why.

use anyhow::Result;
use treespark::devices::{BackendChoice, Devices};

use super::Outcome;

pub fn run() -> Result<Outcome> {
    let devices = Devices::find();
    let (taken, why) = devices.choose(BackendChoice::Auto)?;
    for (i, device) in devices.list.iter().enumerate() {
        let mark = if i == taken { '*' } else { ' ' };
        let mut details = device.details.clone();
        if let Some(free) = device.free_bytes() {
            details += &format!(", {:.1} GiB free", free as f64 / (1 << 30) as f64);
        }
        if let Some(drawback) = &device.drawback {
            details += &format!("; {drawback}");
        }
        println!("{mark} {:<8} {} ({details})", device.choice.to_string(), device.name);
    }
    if let Some(why) = &devices.no_cuda {
        println!("no CUDA device: {why}");
    }
    println!("* is taken by --backend auto: {why}");
    Ok(Outcome::Done)
}
