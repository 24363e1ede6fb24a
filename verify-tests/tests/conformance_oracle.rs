//! The conformance suite on the oracle itself: the properties must hold of the definition, or they say too much.

use treespark_verify_tests::{conformance, oracle::Oracle};

conformance!(oracle, || Some(Box::new(Oracle::new())));
