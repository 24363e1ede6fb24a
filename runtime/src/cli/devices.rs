//! `treespark devices`: what was found, and which one `--backend auto` takes and why.

use anyhow::Result;
use treespark::devices::{self, BackendChoice};

use super::Outcome;

pub fn run() -> Result<Outcome> {
    let list = devices::list();
    let (taken, why) = devices::choose(&list, &BackendChoice::Auto)?;
    for (i, device) in list.iter().enumerate() {
        let mark = if i == taken { '*' } else { ' ' };
        println!("{mark} {:<8} {} ({})", device.choice, device.name, device.details);
    }
    println!("* is taken by --backend auto: {why}");
    Ok(Outcome::Done)
}
