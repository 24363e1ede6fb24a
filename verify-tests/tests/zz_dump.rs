use treespark_kernel_gen::cuda::{Device, lower};
use treespark_kernel_gen::emit::{Lang, emit};
use treespark_kernel_gen::{TreeSpec, MAX_NODES};
use treespark_verify_tests::arb::HOUSE_MODELS;
use treespark_verify_tests::tiny_model::{Tail, TinyModel};
#[test]
fn dump() {
    for device in [Device { multiprocessors: 4, ..Device::H100 }, Device { multiprocessors: 4, ..Device::A100 }] {
        for sizes in HOUSE_MODELS {
            for rows in [1, 16, 320] {
                let pass = TinyModel { sizes, seed: 0 }.pass(rows, &TreeSpec::Any(MAX_NODES), Tail::Commit);
                for op in &pass.ops {
                    match lower(op, &pass, &device) {
                        Ok(launches) => for l in launches {
                            std::fs::write(format!("/tmp/emu/k/{}.{}.cu", l.spec.name(), device.arch), emit(&l.spec, Lang::Cuda).unwrap()).unwrap();
                            if rows == 320 { println!("{} grid {:?} threads {} shared {} cluster {}", l.spec.name(), l.grid, l.threads, l.shared_bytes, l.cluster); }
                        },
                        Err(e) => println!("{e}"),
                    }
                }
            }
        }
    }
}
