//! Proves the release's kernels before anyone runs them: generates each, validates it and translates it to SPIR-V, MSL
//! and HLSL, so that a kernel that some vendor would refuse fails the build, with naga's message.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // `cuda`: the feature is on, and NVIDIA has a driver for this system that we can call.
    println!("cargo::rustc-check-cfg=cfg(cuda)");
    let target = |what: &str| env::var(format!("CARGO_CFG_TARGET_{what}")).unwrap_or_default();
    let reachable = target("OS") == "linux" && ["x86_64", "aarch64"].contains(&target("ARCH").as_str());
    if cfg!(feature = "cuda") && reachable {
        println!("cargo::rustc-cfg=cuda");
    }
    #[cfg(feature = "wgpu")]
    kernels::check();
}

#[cfg(feature = "wgpu")]
mod kernels {
    use naga::Module;
    use naga::back::{hlsl, msl, spv};
    use naga::front::wgsl;
    use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
    use treespark_kernel_gen::emit::{Lang, emit};
    use treespark_kernel_gen::release;

    pub fn check() {
        let calls = release::calls().unwrap_or_else(|e| panic!("release table: {e}"));
        let mut frontend = wgsl::Frontend::new();
        // Nothing that a device may lack, but numbers of 16 bits packed in words.
        let mut validator = Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32);
        for call in calls {
            let name = call.spec.name();
            let source = emit(&call.spec, Lang::Wgsl).unwrap_or_else(|e| panic!("kernel {name}: {e}"));
            let module =
                frontend.parse(&source).unwrap_or_else(|e| panic!("{}", e.emit_to_string_with_path(&source, name)));
            let info =
                validator.validate(&module).unwrap_or_else(|e| panic!("{}", e.emit_to_string_with_path(&source, name)));
            translate(&module, &info).unwrap_or_else(|e| panic!("kernel {name}: {e}"));
        }
    }

    fn translate(module: &Module, info: &ModuleInfo) -> Result<(), String> {
        let options = spv::Options { lang_version: (1, 3), ..Default::default() };
        spv::write_vec(module, info, &options, None).map_err(|e| format!("to SPIR-V: {e}"))?;

        let options = msl::Options { lang_version: (2, 0), fake_missing_bindings: true, ..Default::default() };
        msl::write_string(module, info, &options, &msl::PipelineOptions::default())
            .map_err(|e| format!("to MSL: {e}"))?;

        let options = hlsl::Options { fake_missing_bindings: true, ..Default::default() };
        let mut text = String::new();
        hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
            .write(module, info, None)
            .map_err(|e| format!("to HLSL: {e}"))?;
        Ok(())
    }
}
