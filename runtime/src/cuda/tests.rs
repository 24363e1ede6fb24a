//! The way of bytes and launches to a GPU and back, on whatever CUDA device is there; a machine without one has nothing to
//! test. What kernels compute is the conformance suite's business: here they are a line long.

use treespark_kernel_gen::spec::KernelSpec;
use treespark_kernel_gen::{Buf, DType, Role};
use treespark_models::Bytes;

use super::*;

fn gpu() -> Option<CudaBackend> {
    gpus().ok().filter(|gpus| !gpus.is_empty())?;
    CudaBackend::new(0).ok()
}

fn desc(role: Role, dtype: DType, shape: &[usize]) -> BufferDesc {
    BufferDesc { name: "test".into(), role, dtype, shape: shape.to_vec() }
}

fn words(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed)).collect()
}

/// Makes a kernel known under the stem `add`: adds its second argument's words to its first's.
fn know_add(gpu: &mut CudaBackend) -> KernelSpec {
    let source = "extern \"C\" __global__ void add(unsigned* x, const unsigned* y) {\n\
                  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;\n x[i] += y[i];\n}\n";
    let spec = KernelSpec::new("add");
    let compiled = gpu.nvrtc().compile(spec.name(), source, &gpu.gpu().target()).unwrap();
    gpu.kernels.know(&spec, &compiled.cubin).unwrap();
    spec
}

fn add(spec: &KernelSpec, x: Source, y: Source) -> Launch {
    let arguments = [x, y].map(|source| Argument { source, offset: 0 }).to_vec();
    Launch { spec: spec.clone(), arguments, grid: [2, 1, 1], threads: 64, shared_bytes: 0, cluster: 1 }
}

#[test]
fn what_is_written_is_read() {
    let Some(mut gpu) = gpu() else { return };
    // More than the ring of uploads holds, and no multiple of anything.
    let len = (5 << 20) + 3;
    let id = gpu.alloc(&desc(Role::Input, DType::U32, &[len])).unwrap();
    assert!(gpu.read(id, len - 100, 100).unwrap().iter().all(|word| *word == 0));
    let (all, some) = (words(len, 1), words(1000, 2));
    gpu.write(id, 0, &all).unwrap();
    gpu.write(id, 77, &some).unwrap();
    let got = gpu.read(id, 0, len).unwrap();
    assert!(got[..77] == all[..77] && got[77..1077] == some && got[1077..] == all[1077..]);
    assert_eq!(gpu.read(id, 1070, 20).unwrap(), got[1070..1090]);
    assert!(gpu.read(id, 5, 0).unwrap().is_empty());
    gpu.free(id);
}

#[test]
fn parts_of_a_weight_are_stacked() {
    let Some(mut gpu) = gpu() else { return };
    let bytes: Vec<u8> = (0..240).collect();
    let part = |bytes: &[u8]| Tensor { dtype: DType::BF16, shape: vec![], bytes: Bytes::from_vec(bytes.to_vec()) };
    let weight = desc(Role::Weight, DType::BF16, &[6, 20]);
    let id = gpu.load(&weight, &[part(&bytes[..82]), part(&bytes[82..])]).unwrap();
    let got = gpu.read(id, 0, 60).unwrap();
    assert_eq!(bytemuck::cast_slice::<u32, u8>(&got), bytes);
}

#[test]
fn caches_look_plain_and_lie_tiled() {
    let Some(mut gpu) = gpu() else { return };
    let cache = desc(Role::Cache, DType::BF16, &[2, 3, 2, 16, 64]);
    let id = gpu.alloc(&cache).unwrap();
    let mut plain = words(cache.bytes() / 4, 3);
    gpu.write(id, 0, &plain).unwrap();
    let some = words(700, 4);
    gpu.write(id, 333, &some).unwrap();
    plain[333..1033].copy_from_slice(&some);
    assert_eq!(gpu.read(id, 0, plain.len()).unwrap(), plain);
    assert_eq!(gpu.read(id, 501, 30).unwrap(), plain[501..531]);
    let tiled = Tiles::of(&cache).unwrap().tiled(&plain);
    assert_eq!(gpu.read_raw(id, 0, tiled.len()).unwrap(), tiled);
}

#[test]
fn a_pass_is_replayed_behind_what_was_written() {
    let Some(mut gpu) = gpu() else { return };
    let spec = know_add(&mut gpu);
    let [x, y] = [1, 2].map(|_| gpu.alloc(&desc(Role::Scratch, DType::U32, &[128])).unwrap());
    let (from, to) = (Source::Buffer(Buf(1)), Source::Buffer(Buf(0)));
    let pass = gpu.bound(&[add(&spec, to, from), add(&spec, from, to), add(&spec, to, from)], &[x, y]).unwrap();
    let extent = Extent { rows: 1, requests: 1, keys: 1 };
    let (mut a, mut b) = (words(128, 5), words(128, 6));
    gpu.write(x, 0, &a).unwrap();
    gpu.write(y, 0, &b).unwrap();
    for round in 0..3 {
        // A write between runs waits for the one before it, and the one after it for the write.
        b[round] = 7;
        gpu.write(y, round, &[7]).unwrap();
        gpu.run(pass, extent).unwrap();
        for (a, b) in a.iter_mut().zip(&mut b) {
            *a = a.wrapping_add(*b);
            *b = b.wrapping_add(*a);
            *a = a.wrapping_add(*b);
        }
    }
    assert_eq!((gpu.read(x, 0, 128).unwrap(), gpu.read(y, 0, 128).unwrap()), (a, b));
    let times = gpu.time(&[pass, pass], 3).unwrap();
    assert!(times.len() == 3 && times.iter().all(|time| *time >= 0.0), "{times:?}");
}

#[test]
fn shared_memory_grows_without_moving_what_is_captured() {
    let Some(mut gpu) = gpu() else { return };
    let spec = know_add(&mut gpu);
    let x = gpu.alloc(&desc(Role::Scratch, DType::U32, &[128])).unwrap();
    let prepare = |counters: usize, gpu: &mut CudaBackend| {
        let launch = add(&spec, Source::Buffer(Buf(0)), Source::Counters(counters));
        gpu.bound(&[launch], &[x]).unwrap()
    };
    let passes = [128, 4096, 128].map(|counters| prepare(counters, &mut gpu));
    assert_eq!(gpu.counters.kept.len(), 2);
    gpu.write(x, 0, &words(128, 8)).unwrap();
    for pass in passes {
        gpu.run(pass, Extent { rows: 1, requests: 1, keys: 1 }).unwrap();
    }
    assert_eq!(gpu.read(x, 0, 128).unwrap(), words(128, 8), "counters are zero");
}

#[test]
fn several_backends_live_side_by_side_in_threads() {
    if gpu().is_none() {
        return;
    }
    std::thread::scope(|scope| {
        for seed in 0..3 {
            scope.spawn(move || {
                let mut both = [gpu().unwrap(), gpu().unwrap()];
                let ids = both.each_mut().map(|gpu| gpu.alloc(&desc(Role::Input, DType::U32, &[500])).unwrap());
                for (i, gpu) in both.iter_mut().enumerate() {
                    gpu.write(ids[i], 0, &words(500, seed + i as u32)).unwrap();
                }
                for (i, gpu) in both.iter_mut().enumerate() {
                    assert_eq!(gpu.read(ids[i], 0, 500).unwrap(), words(500, seed + i as u32));
                }
            });
        }
    });
}
