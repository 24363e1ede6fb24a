//! What is printed of a shape: its time, beside what the GPU could do.

use std::fmt;

use serde_json::{Value, json};
use treespark_benches::commit;

use super::Measured;
use super::shapes::Shape;

/// Where it was measured.
pub struct Gpu {
    pub name: String,
    pub driver: String,
    /// Bytes of a device copy, read and written, a second.
    pub bandwidth: f64,
}

/// The names of a line's columns.
pub fn header() -> String {
    let floors = format!("{:>9} {:>9} {:>8}", "memory", "compute", "of floor");
    let rates = format!("{:>6} {:>7} {:>8}", "TB/s", "TFLOP/s", "error");
    format!("{:<26} {:>9} {:>9} {:>9} {floors} {rates}  kernel", "shape", "us", "p10", "p90")
}

/// One shape.
pub struct Line<'a> {
    shape: &'a Shape,
    measured: &'a Measured,
    gpu: &'a Gpu,
    us: f64,
    /// Microseconds below which nothing is possible: by memory, by products.
    floors: [f64; 2],
    /// Bytes of the cache and operations, in millions a microsecond.
    rates: [f64; 2],
}

impl<'a> Line<'a> {
    pub fn new(shape: &'a Shape, measured: &'a Measured, gpu: &'a Gpu) -> Line<'a> {
        let us = measured.samples.median();
        let floors = [shape.memory_floor(gpu.bandwidth), shape.compute_floor()];
        let rates = [shape.cache_bytes() as f64, shape.flops()].map(|amount| amount / us / 1e6);
        Line { shape, measured, gpu, us, floors, rates }
    }

    fn of_floor(&self) -> f64 {
        self.us / self.floors[0].max(self.floors[1])
    }

    /// The quantiles that are printed.
    fn spread(&self) -> [f64; 2] {
        [0.1, 0.9].map(|q| self.measured.samples.quantile(q))
    }

    /// Microseconds with nothing hidden, and how much longer the mask takes.
    fn off(&self) -> Option<(f64, f64)> {
        let us = self.measured.off.as_ref()?.median();
        Some((us, self.us / us))
    }

    pub fn json(&self) -> Value {
        let ([p10, p90], [memory, compute], [cache, products]) = (self.spread(), self.floors, self.rates);
        json!({
            "bench": "attention", "device": self.gpu.name, "driver": self.gpu.driver, "commit": commit(),
            "copy_TBps": self.gpu.bandwidth / 1e12, "shape": self.shape.to_string(), "us": self.us, "p10_us": p10,
            "p90_us": p90, "memory_floor_us": memory, "compute_floor_us": compute, "of_floor": self.of_floor(),
            "cache_TBps": cache, "TFLOPps": products, "error": self.measured.error, "kernel": self.measured.kernel,
            "mask_off_us": self.off().map(|(us, _)| us), "mask_ratio": self.off().map(|(_, ratio)| ratio),
        })
    }
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let ([p10, p90], [memory, compute], [cache, products]) = (self.spread(), self.floors, self.rates);
        let (shape, us, of_floor) = (self.shape.to_string(), self.us, self.of_floor());
        let Measured { error, kernel, .. } = self.measured;
        write!(f, "{shape:<26} {us:>9.2} {p10:>9.2} {p90:>9.2} {memory:>9.2} {compute:>9.2} {of_floor:>8.2} ")?;
        write!(f, "{cache:>6.2} {products:>7.1} {error:>8.4}  {kernel}")?;
        match self.off() {
            Some((us, ratio)) => write!(f, "\n{:<26} {us:>9.2} with nothing hidden: the mask costs {ratio:.3}x", ""),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use treespark_benches::Samples;

    use super::*;

    #[test]
    fn a_line_says_what_was_reached() {
        let shape = "mla16:B32:L8192:N16".parse().unwrap();
        let [samples, off] = [vec![200.0], vec![160.0]].map(Samples::of);
        let measured = Measured { error: 0.001, samples, off: Some(off), kernel: "latent_attention".into() };
        let gpu = Gpu { name: "X".into(), driver: "CUDA 13.0".into(), bandwidth: 4e12 };
        let text = Line::new(&shape, &measured, &gpu).to_string();
        let (line, mask) = text.split_once('\n').unwrap();
        // 302.6 MB and 146.3 billion operations: 80 us with queries and outputs, and 244 us.
        let columns: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(columns[4..], ["80.10", "243.86", "0.82", "1.51", "731.6", "0.0010", "latent_attention"], "{text}");
        assert_eq!(line.split("latent").next().unwrap().len(), header().split("kernel").next().unwrap().len());
        assert!(mask.ends_with("1.250x"), "{mask}");
    }
}
