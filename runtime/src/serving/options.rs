//! How much a service takes on.

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceOptions {
    /// Sequences that run at once; `None` is as many as the device serves well.
    pub max_requests: Option<usize>,
    /// Asks that may wait behind those that run; another is refused.
    pub max_queue: usize,
}

impl Default for ServiceOptions {
    fn default() -> ServiceOptions {
        ServiceOptions { max_requests: None, max_queue: 256 }
    }
}
