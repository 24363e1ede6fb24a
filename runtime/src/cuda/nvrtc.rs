//! NVRTC, NVIDIA's compiler as a library: from a kernel's source to machine code for one architecture.
//!
//! It is found and loaded when the program runs (`search`); a machine without it cannot use its GPU through CUDA.

mod search;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{fmt, fs, ptr};

use libloading::Library;

use super::gpus::DriverVersion;
use crate::error::{Error, Result};
use search::{Places, is_nvrtc};

/// Beside `--gpu-architecture`. What is optimised is exact: no flushing of small numbers, no fast functions, and a product and
/// a sum are one operation only where the source says so, or a row's bits would depend on the tile that it is in. `-v` costs
/// nothing and puts registers, shared memory and spills into the log; warnings would be of constants that one kernel of
/// several does not use.
const OPTIONS: [&str; 5] = ["--std=c++17", "--ftz=false", "--fmad=false", "--ptxas-options=-v", "--disable-warnings"];

pub struct Nvrtc {
    pub version: Version,
    /// The library, as it was found.
    pub path: PathBuf,
    functions: Functions,
    /// What `functions` point into, and what it loads by name.
    _libraries: Vec<Library>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub major: i32,
    pub minor: i32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A kernel's machine code, and what the compiler said about it.
pub struct Compiled {
    pub cubin: Vec<u8>,
    pub log: String,
}

type Program = *mut c_void;

/// The functions that are used, as `nvrtc.h` declares them.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

impl Nvrtc {
    /// The first NVRTC in the order of `search` whose code the driver takes; looked for once a process. The error says
    /// where it was looked for, and what to install.
    pub fn find(driver: DriverVersion) -> Result<&'static Nvrtc, &'static str> {
        static FOUND: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
        let find = || Nvrtc::first(&Places::of_this_machine(), driver);
        FOUND.get_or_init(find).as_ref().map_err(String::as_str)
    }

    fn first(places: &Places, driver: DriverVersion) -> Result<Nvrtc, String> {
        let mut refused = String::new();
        for path in places.libraries() {
            match Nvrtc::open(&path) {
                // The driver loads machine code of its own CUDA version or an older one. Who names a file means it.
                Ok(nvrtc) if nvrtc.version.major > driver.major && !places.is_given() => {
                    refused += &format!("; {} is of CUDA {}, the driver of {driver}", path.display(), nvrtc.version);
                }
                Ok(nvrtc) => return Ok(nvrtc),
                Err(_) if path.parent() == Some(Path::new("")) => {} // a name that the loader does not know
                Err(why) => refused += &format!("; {}: {why}", path.display()),
            }
        }
        let package = if driver.major >= 13 { "nvidia-cuda-nvrtc" } else { "nvidia-cuda-nvrtc-cu12" };
        let looked = places.describe();
        Err(format!("no CUDA compiler (libnvrtc) was found: pip install {package}. Looked in {looked}{refused}"))
    }

    fn open(path: &Path) -> Result<Nvrtc, String> {
        let load = |path: &Path| {
            // SAFETY: the initialisers of NVIDIA's compiler, or of what the person who set the variable named instead.
            let library = unsafe { Library::new(path) };
            library.map_err(|e| std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string))
        };
        // It opens its built-in headers by a bare name, which the loader knows only if they are loaded already.
        let mut libraries: Vec<Library> = builtins(path).iter().filter_map(|path| load(path).ok()).collect();
        let library = load(path)?;
        // SAFETY: `Functions` declares each as nvrtc.h does.
        let functions = unsafe { Functions::of(&library) }.map_err(|e| e.to_string())?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two numbers are written.
        let code = unsafe { (functions.version)(&mut major, &mut minor) };
        if code != 0 {
            return Err(format!("its version is not known (error {code})"));
        }
        libraries.push(library);
        let path = loaded_path(path);
        Ok(Nvrtc { version: Version { major, minor }, path, functions, _libraries: libraries })
    }

    /// All that decides what comes out, but for the source.
    pub(super) fn identity(&self, target: &str) -> String {
        format!("NVRTC {} {} {}", self.version, self.path.display(), options(target).join(" "))
    }

    /// Compiles a source for one architecture, e.g. `sm_90a`. May be called by several threads at once.
    pub fn compile(&self, name: &str, source: &str, target: &str) -> Result<Compiled> {
        let c_string = |text: &str| CString::new(text).expect("sources, names and options hold no zero byte");
        let (c_name, c_source) = (c_string(&format!("{name}.cu")), c_string(source));
        let c_options: Vec<CString> = options(target).iter().map(|option| c_string(option)).collect();
        let options: Vec<*const c_char> = c_options.iter().map(|option| option.as_ptr()).collect();

        let mut program = OpenProgram { nvrtc: self, program: ptr::null_mut() };
        // SAFETY: both texts end with a zero and live on; there are no headers, so their lists may be null.
        let code = unsafe {
            let (source, name) = (c_source.as_ptr(), c_name.as_ptr());
            (self.functions.create)(&mut program.program, source, name, 0, ptr::null(), ptr::null())
        };
        let failed = |what: &str, code: c_int, log: &str| {
            let (version, path) = (self.version, self.path.display());
            Err(Error::Device(format!("kernel {name}: {what} with NVRTC {version} ({path}), error {code}: {log}")))
        };
        if code != 0 {
            return failed("not taken", code, "");
        }
        // SAFETY: `options` are texts that live on.
        let code = unsafe { (self.functions.compile)(program.program, options.len() as c_int, options.as_ptr()) };
        let log = program.read(self.functions.log_size, self.functions.log);
        let log = log.map(|bytes| String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_string());
        let log = log.unwrap_or_default();
        if code != 0 {
            return failed("does not compile", code, &log);
        }
        match program.read(self.functions.cubin_size, self.functions.cubin) {
            Ok(cubin) => Ok(Compiled { cubin, log }),
            Err(code) => failed("no code", code, &log),
        }
    }
}

fn options(target: &str) -> Vec<String> {
    let architecture = format!("--gpu-architecture={target}");
    OPTIONS.map(String::from).into_iter().chain([architecture]).collect()
}

struct OpenProgram<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl OpenProgram<'_> {
    /// What one of the pairs of functions says: how many bytes, then the bytes. The error is NVRTC's code.
    fn read(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, c_int> {
        let mut bytes = 0;
        // SAFETY: the program is alive; one number is written.
        let code = unsafe { size(self.program, &mut bytes) };
        if code != 0 {
            return Err(code);
        }
        let mut out = vec![0_u8; bytes];
        // SAFETY: as many bytes are written as `size` said.
        let code = unsafe { get(self.program, out.as_mut_ptr().cast()) };
        if code == 0 { Ok(out) } else { Err(code) }
    }
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: nothing else holds the program.
            unsafe { (self.nvrtc.functions.destroy)(&mut self.program) };
        }
    }
}

impl Functions {
    /// # Safety
    /// The library's functions of these names have the types declared in [`Functions`].
    unsafe fn of(library: &Library) -> Result<Functions, libloading::Error> {
        /// # Safety
        /// `T` is the type of that function.
        unsafe fn get<T: Copy>(library: &Library, name: &CStr) -> Result<T, libloading::Error> {
            // SAFETY: the caller's promise.
            unsafe { library.get::<T>(name.to_bytes()) }.map(|function| *function)
        }
        // SAFETY: the caller's promise.
        unsafe {
            Ok(Functions {
                version: get(library, c"nvrtcVersion")?,
                create: get(library, c"nvrtcCreateProgram")?,
                compile: get(library, c"nvrtcCompileProgram")?,
                destroy: get(library, c"nvrtcDestroyProgram")?,
                log_size: get(library, c"nvrtcGetProgramLogSize")?,
                log: get(library, c"nvrtcGetProgramLog")?,
                cubin_size: get(library, c"nvrtcGetCUBINSize")?,
                cubin: get(library, c"nvrtcGetCUBIN")?,
            })
        }
    }
}

/// The libraries of built-in headers beside an NVRTC that was named with its folder.
fn builtins(nvrtc: &Path) -> Vec<PathBuf> {
    let folder = nvrtc.parent().filter(|folder| *folder != Path::new(""));
    let entries = folder.and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let named =
        |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so"));
    entries.map(|entry| entry.path()).filter(|path| named(path)).collect()
}

/// Where a library that the loader found by its name lies, as the process's memory map has it.
fn loaded_path(path: &Path) -> PathBuf {
    if path.parent() != Some(Path::new("")) {
        return path.to_path_buf();
    }
    let map = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut files = map.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    files.find(|file| is_nvrtc(file)).unwrap_or(path).to_path_buf()
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;
    use treespark_kernel_gen::cuda::{Device, Launch};
    use treespark_kernel_gen::emit::{Lang, emit};
    use treespark_kernel_gen::release::cuda_launches;

    use super::*;

    const DRIVER: DriverVersion = DriverVersion { major: 13, minor: 0 };

    #[test]
    fn a_file_that_is_no_compiler_is_refused_with_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("libnvrtc.so");
        fs::write(&file, "no library").unwrap();
        let error = Nvrtc::first(&Places::given(&file), DRIVER).err().unwrap();
        assert!(error.contains("pip install nvidia-cuda-nvrtc.") && error.contains("libnvrtc.so: "), "{error}");
        let old = DriverVersion { major: 12, minor: 4 };
        let error = Nvrtc::first(&Places::given(&file), old).err().unwrap();
        assert!(error.contains("pip install nvidia-cuda-nvrtc-cu12"), "{error}");
    }

    #[test]
    fn a_kernel_of_each_source_is_compiled_where_the_compiler_is() {
        let Ok(nvrtc) = Nvrtc::find(DRIVER) else { return };
        for (device, target) in [(Device::H100, "sm_90a"), (Device::A100, "sm_80")] {
            // Not every model of the table fits the shared memory of every GPU.
            let Ok(mut launches) = cuda_launches(&device) else { continue };
            launches.sort_by_key(|launch| launch.spec.stem());
            launches.dedup_by_key(|launch| launch.spec.stem());
            launches.par_iter().for_each(|Launch { spec, .. }| {
                let compiled = nvrtc.compile(spec.name(), &emit(spec, Lang::Cuda).unwrap(), target);
                let Compiled { cubin, log } = compiled.unwrap_or_else(|error| panic!("{target}: {error}"));
                assert!(!cubin.is_empty(), "{}: {log}", spec.name());
            });
        }
    }

    #[test]
    fn a_mistake_is_reported_with_its_kernel() {
        let Ok(nvrtc) = Nvrtc::find(DRIVER) else { return };
        let error = nvrtc.compile("broken__test", "extern \"C\" __global__ void broken() { nothing }", "sm_90a");
        let message = error.err().unwrap().to_string();
        assert!(message.contains("broken__test") && message.contains("nothing"), "{message}");
    }
}
