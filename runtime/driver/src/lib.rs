//! Gives a program the functions of the NVIDIA driver (libcuda) without linking it.
//!
//! Every function named in `symbols.txt` is defined here as a jump through a table (`build.rs`). [`load`] fills the table
//! from the driver that this machine has. Before that, and for functions that the driver lacks, a call returns
//! [`NO_FUNCTION`] and does nothing.
#![allow(unsafe_code)]

use std::error::Error as _;
use std::ffi::{OsStr, OsString};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

include!(concat!(env!("OUT_DIR"), "/jumps.rs"));

/// What a function returns that is not there: `CUDA_ERROR_STUB_LIBRARY`.
pub const NO_FUNCTION: i32 = 34;

/// Names another library than the machine's driver, so that tests can bring their own.
pub const DRIVER_VARIABLE: &str = "TREESPARK_CUDA_DRIVER";

extern "C" fn no_function() -> i32 {
    NO_FUNCTION
}

static TABLE: [AtomicPtr<()>; NAMES.len()] =
    [const { AtomicPtr::new(no_function as extern "C" fn() -> i32 as *mut ()) }; NAMES.len()];

/// The driver that was found.
#[derive(Debug)]
pub struct Driver {
    /// As it was asked for: a path, or a name that the loader knows.
    pub library: String,
    /// Functions of `symbols.txt` that it lacks.
    pub absent: Vec<&'static str>,
}

/// Finds the driver and fills the table, once. The error says why there is none.
pub fn load() -> Result<&'static Driver, &'static str> {
    static LOADED: OnceLock<Result<Driver, String>> = OnceLock::new();
    let given = std::env::var_os(DRIVER_VARIABLE).filter(|path| !path.is_empty());
    let names = given.map_or_else(|| vec!["libcuda.so.1".into(), "libcuda.so".into()], |path| vec![path]);
    LOADED.get_or_init(|| load_first(&names)).as_ref().map_err(String::as_str)
}

fn load_first(names: &[OsString]) -> Result<Driver, String> {
    let mut why = String::new();
    for name in names {
        match load_from(name) {
            Ok(driver) => return Ok(driver),
            // The first name is what the driver is called; the others are not worth a line.
            Err(error) if why.is_empty() => why = error,
            Err(_) => {}
        }
    }
    Err(why)
}

fn load_from(name: &OsStr) -> Result<Driver, String> {
    // SAFETY: what runs on loading are the initialisers of the NVIDIA driver, or of the library that the person who set
    // the variable named in its place; both are made to be loaded by any program.
    let library = unsafe { libloading::Library::new(name) }
        .map_err(|error| error.source().map_or_else(|| error.to_string(), ToString::to_string))?;
    // The table points into it until the process ends.
    let library: &'static _ = Box::leak(Box::new(library));
    let mut absent = Vec::new();
    for (slot, symbol) in TABLE.iter().zip(NAMES) {
        // SAFETY: the symbol is only kept as an address here; it is called through its declaration in `cust` or in
        // runtime/src/cuda, which are those of the driver's interface for this name.
        match unsafe { library.get::<*mut ()>(symbol.as_bytes()) } {
            Ok(function) => slot.store(*function, Ordering::Release),
            Err(_) => absent.push(symbol),
        }
    }
    Ok(Driver { library: name.to_string_lossy().into_owned(), absent })
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" {
        fn cuProfilerStop() -> i32;
    }

    #[test]
    fn without_a_driver_a_call_returns_an_error() {
        // SAFETY: the jump leads to `no_function`: nothing in this test loads a driver.
        assert_eq!(unsafe { cuProfilerStop() }, NO_FUNCTION);
        let error = load_first(&["no-such-library.so".into(), "nor-this.so".into()]).unwrap_err();
        assert!(error.contains("no-such-library.so") && !error.contains("nor-this"), "{error}");
    }
}
