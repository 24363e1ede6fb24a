//! Kernels made ready to launch: emitted, compiled or found in the cache, loaded.
//!
//! Equal specs share one kernel: the layers of a model differ in their arguments only.

use cust::module::Module;
use rayon::prelude::*;
use treespark_kernel_gen::cuda::Launch;
use treespark_kernel_gen::emit::{Lang, emit};
use treespark_kernel_gen::spec::KernelSpec;

use super::cubin_cache::CubinCache;
use super::driver::{self, FunctionHandle, check, check_cust};
use super::nvrtc::Nvrtc;
use crate::error::{Error, Result};

/// The largest cluster that every launch may have without asking.
const PORTABLE_CLUSTER: usize = 8;

pub(super) struct Kernels {
    compiler: Compiler,
    loaded: Vec<Kernel>,
}

struct Kernel {
    spec: KernelSpec,
    function: FunctionHandle,
    /// Dynamic shared memory that its launches may have so far.
    shared_bytes: usize,
    /// Blocks that its clusters may have so far.
    cluster: usize,
    /// Holds the code of `function`.
    _module: Module,
}

/// From a spec to machine code. Knows no device, so that threads share it.
struct Compiler {
    nvrtc: &'static Nvrtc,
    cache: CubinCache,
    /// The architecture, e.g. `sm_90a`.
    target: String,
}

impl Kernels {
    pub fn new(nvrtc: &'static Nvrtc, cache: CubinCache, target: String) -> Kernels {
        Kernels { compiler: Compiler { nvrtc, cache, target }, loaded: Vec::new() }
    }

    pub fn nvrtc(&self) -> &'static Nvrtc {
        self.compiler.nvrtc
    }

    /// The function of each launch, allowed what the launch asks for. Kernels that are new are compiled all at once.
    pub fn functions(&mut self, launches: &[Launch]) -> Result<Vec<FunctionHandle>> {
        let mut missing: Vec<&KernelSpec> = Vec::new();
        for Launch { spec, .. } in launches {
            if !missing.contains(&spec) && self.loaded.iter().all(|kernel| kernel.spec != *spec) {
                missing.push(spec);
            }
        }
        let compiler = &self.compiler;
        let cubins = missing.par_iter().map(|spec| compiler.cubin(spec)).collect::<Result<Vec<_>>>()?;
        for (spec, cubin) in missing.into_iter().zip(cubins) {
            self.know(spec, &cubin)?;
        }
        launches.iter().map(|launch| self.allowed(launch)).collect()
    }

    /// Loads a kernel, so that launches of its spec find it.
    pub fn know(&mut self, spec: &KernelSpec, cubin: &[u8]) -> Result<()> {
        self.loaded.push(Kernel::load(spec, cubin)?);
        Ok(())
    }

    fn allowed(&mut self, launch: &Launch) -> Result<FunctionHandle> {
        let kernel = self.loaded.iter_mut().find(|kernel| kernel.spec == launch.spec);
        let kernel = kernel.expect("`functions` has loaded the kernels of all launches");
        if launch.shared_bytes > kernel.shared_bytes {
            kernel.allow(driver::FUNCTION_SHARED_BYTES, launch.shared_bytes as i32)?;
            kernel.shared_bytes = launch.shared_bytes;
        }
        if launch.cluster > kernel.cluster {
            kernel.allow(driver::FUNCTION_LARGE_CLUSTERS, 1)?;
            kernel.cluster = launch.cluster;
        }
        Ok(kernel.function)
    }
}

impl Kernel {
    fn load(spec: &KernelSpec, cubin: &[u8]) -> Result<Kernel> {
        let name = spec.name();
        let module = check_cust(&format!("loading kernel {name}"), Module::from_cubin(cubin, &[]))?;
        let function = check_cust(&format!("kernel {name} has no {}", spec.stem()), module.get_function(spec.stem()))?;
        let function = FunctionHandle(function.to_raw().cast());
        Ok(Kernel { spec: spec.clone(), function, shared_bytes: 0, cluster: PORTABLE_CLUSTER, _module: module })
    }

    fn allow(&self, attribute: i32, value: i32) -> Result<()> {
        let what = format!("allowing kernel {} {value} (attribute {attribute})", self.spec.name());
        // SAFETY: the function's module is loaded.
        check(&what, unsafe { driver::cuFuncSetAttribute(self.function, attribute, value) })
    }
}

impl Compiler {
    fn cubin(&self, spec: &KernelSpec) -> Result<Vec<u8>> {
        let name = spec.name();
        let source = emit(spec, Lang::Cuda).map_err(|e| Error::Device(format!("kernel {name}: {e}")))?;
        let key = [source.as_str(), &self.nvrtc.identity(&self.target)];
        if let Some(cubin) = self.cache.get(&key) {
            return Ok(cubin);
        }
        let compiled = self.nvrtc.compile(name, &source, &self.target)?;
        self.cache.put(&key, &compiled.cubin);
        Ok(compiled.cubin)
    }
}
