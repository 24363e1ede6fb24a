//! The conformance suite on the CUDA backend without a GPU: its kernels run on the CPU.

#![cfg(feature = "cuda")]

use treespark_verify_tests::{cases, conformance};

conformance!(h100, || cases::cuda_on_cpu(0));
conformance!(deepseek_h100, || cases::cuda_on_cpu(0), deepseek::latents_and_experts_keep_every_property);

conformance! { h100_slice, || cases::cuda_on_cpu(2),
    ops::wide_matrices_equal_the_oracle
    structure::the_compiled_size_of_a_wide_model_changes_nothing
    deepseek::wide_experts_equal_the_oracle
    deepseek::the_compiled_size_of_wide_experts_changes_nothing
}
conformance! { a100_slice, || cases::cuda_on_cpu(3),
    ops::wide_matrices_equal_the_oracle
    structure::the_compiled_size_of_a_wide_model_changes_nothing
    deepseek::wide_experts_equal_the_oracle
    deepseek::the_compiled_size_of_wide_experts_changes_nothing
}
// Blocks of consumer cards have less shared memory.
conformance! { rtx_slice, || cases::cuda_on_cpu(4),
    ops::every_op_equals_the_oracle
    ops::wide_matrices_equal_the_oracle
}

// An A100 lacks clusters, bulk copies and products of warpgroups: other paths of the same kernels.
conformance! { a100, || cases::cuda_on_cpu(1),
    ops::every_op_equals_the_oracle
    ops::edge_sizes_equal_the_oracle
    attention::long_contexts_and_large_numbers_equal_the_oracle
    structure::a_node_sees_exactly_its_root_path
    structure::rows_are_independent_of_their_batch
    structure::a_second_run_equals_the_first
    structure::unused_memory_never_leaks
}
