//! Every kernel of the release table parses, validates, and binds what its calls say.

use naga::front::wgsl;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess};
use treespark_kernel_gen::emit::{Lang, emit};
use treespark_kernel_gen::lower::{Access, KernelCall};
use treespark_kernel_gen::release;

fn module(call: &KernelCall) -> Module {
    let name = call.spec.name();
    let source = emit(&call.spec, Lang::Wgsl).unwrap_or_else(|e| panic!("{name}: {e}"));
    let module = wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{}", e.emit_to_string_with_path(&source, name)));
    Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{}", e.emit_to_string_with_path(&source, name)));
    module
}

/// What binding `index` is declared as.
fn declared(module: &Module, index: u32) -> Option<Access> {
    let found = module.global_variables.iter().find(|(_, v)| v.binding.is_some_and(|b| b.binding == index));
    found.map(|(_, variable)| match variable.space {
        AddressSpace::Uniform => Access::Uniform,
        AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Access::Write,
        AddressSpace::Storage { .. } => Access::Read,
        other => panic!("a binding in {other:?}"),
    })
}

#[test]
fn release_kernels_are_portable() {
    for call in release::calls().unwrap() {
        let name = call.spec.name();
        let module = module(&call);
        let entry = &module.entry_points[0];
        assert!(entry.workgroup_size.iter().product::<u32>() <= 256, "{name}: {:?}", entry.workgroup_size);

        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let workgroup = module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::WorkGroup);
        let bytes: u32 = workgroup.map(|(_, v)| layouter[v.ty].size).sum();
        assert!(bytes <= 16 << 10, "{name}: {bytes} bytes of workgroup memory");

        for (index, binding) in call.bindings.iter().enumerate() {
            assert_eq!(declared(&module, index as u32), Some(binding.access), "{name}: binding {index}");
        }
        assert_eq!(declared(&module, call.bindings.len() as u32), None, "{name}: a binding more than the call has");
        let storage = call.bindings.iter().filter(|b| b.access != Access::Uniform).count();
        assert!(storage <= 8, "{name}: {storage} storage buffers");
    }
}

#[test]
fn release_kernels_have_names_of_their_own() {
    let mut names: Vec<String> = release::calls().unwrap().iter().map(|call| call.spec.name().to_string()).collect();
    let all = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all);
}
