//! What the cases so far were about: how many of each class.

use std::collections::BTreeMap;

use treespark::Sampling;
use treespark_verify_tests::arb::Case;
use treespark_verify_tests::decoding::{Decoding, Seen};
use treespark_verify_tests::shared::Shared;
use treespark_verify_tests::tiny_model::{ExpertSizes, LatentSizes, Sizes};

use super::case::Sight;

/// Upper ends of classes of sizes.
const NODES: [usize; 6] = [1, 8, 16, 33, 65, 256];
const PREFIXES: [usize; 8] = [0, 1, 16, 64, 128, 416, 1024, 4096];

#[derive(Debug, Default)]
pub struct Coverage {
    /// Of every kind of class, cases by class.
    kinds: BTreeMap<&'static str, BTreeMap<String, u64>>,
}

impl Coverage {
    pub fn add(&mut self, property: &str, sight: Sight) {
        match sight {
            Sight::Case(case) => self.add_case(property, case),
            Sight::Decoding(decoding) => self.add_decoding(property, decoding),
            Sight::Decoded(seen) => self.add_seen(seen),
        }
    }

    /// What was run on a backend that is given up.
    pub fn add_runs(&mut self, backend: &Shared) {
        backend.runs().into_iter().for_each(|(op, runs)| self.count_many("runs of an op", op.to_string(), runs));
    }

    fn add_sizes(&mut self, property: &str, s: &Sizes) {
        self.count("property", property.to_string());
        self.count("head size", s.head_dim.to_string());
        self.count("query heads a key head", s.group.to_string());
        self.count("weights", format!("{:?}", s.weights));
        let compressed =
            |latent: LatentSizes| ["latents", "latents, compressed queries"][usize::from(latent.compressed > 0)];
        self.count("attention to", s.latent.map_or("keys", compressed).to_string());
        let router = |experts: ExpertSizes| ["softmax", "sigmoid"][usize::from(experts.is_v3)];
        self.count("router", s.experts.map_or("none", router).to_string());
        self.count("page", s.page_size.to_string());
    }

    fn add_case(&mut self, property: &str, case: &Case) {
        self.add_sizes(property, &case.model.sizes);
        self.count("cache", format!("{:?}", case.model.sizes.cache));
        self.count("requests", case.batch.members.len().to_string());
        for member in &case.batch.members {
            self.count("nodes up to", class(member.tree.nodes(), &NODES));
            self.count("prefix up to", class(member.prefix.len(), &PREFIXES));
            let depth = (0..member.tree.nodes()).map(|node| member.tree.depth(node)).max().unwrap_or(0);
            let shape = match (member.tree.nodes(), depth) {
                (1, _) => "root",
                (nodes, depth) if depth + 1 == nodes => "chain",
                (_, 1) => "star",
                _ => "bushy",
            };
            self.count("shape", shape.to_string());
            self.count("draws", drawn(&member.sampling));
        }
    }

    fn add_decoding(&mut self, property: &str, decoding: &Decoding) {
        self.add_sizes(property, &decoding.sizes);
        self.count("requests", decoding.asks.len().to_string());
        self.count("way", decoding.way.name().to_string());
        let chosen = || format!("chosen, up to {}", decoding.max_nodes);
        let shape =
            decoding.shape.as_ref().map_or_else(chosen, |shape| format!("given, up to {}", class(shape.len(), &NODES)));
        self.count("trees of nodes", shape);
        for ask in &decoding.asks {
            self.count("language", ask.language.unwrap_or("anything").to_string());
            self.count("draws", drawn(&ask.sampling));
            self.count("penalty", (ask.sampling.repetition_penalty != 1.0).to_string());
        }
    }

    fn add_seen(&mut self, seen: &Seen) {
        seen.ends.iter().for_each(|end| self.count("ends", format!("{end:?}")));
        for (what, n) in [
            ("rounds", seen.rounds),
            ("drafts accepted", seen.accepted),
            ("near-ties", seen.near_ties),
            ("without a page", seen.exhausted),
            ("preempted", seen.preempted),
            ("prompt tokens shared", seen.shared),
        ] {
            self.count_many("seen", what.to_string(), n as u64);
        }
    }

    fn count(&mut self, kind: &'static str, class: String) {
        self.count_many(kind, class, 1);
    }

    fn count_many(&mut self, kind: &'static str, class: String, n: u64) {
        *self.kinds.entry(kind).or_default().entry(class).or_default() += n;
    }

    pub fn merge(&mut self, other: Coverage) {
        for (kind, classes) in other.kinds {
            for (class, n) in classes {
                self.count_many(kind, class, n);
            }
        }
    }

    /// A line a kind, a property a line.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (kind, classes) in &self.kinds {
            let mut classes: Vec<_> = classes.iter().collect();
            classes.sort_by_key(|(class, _)| (class.len(), *class));
            if *kind == "property" {
                classes.iter().for_each(|(class, n)| text += &format!("{n:>9}  {class}\n"));
            } else {
                let counts: Vec<String> = classes.iter().map(|(class, n)| format!("{class}: {n}")).collect();
                text += &format!("{kind:>24}  {}\n", counts.join(", "));
            }
        }
        text
    }
}

fn drawn(sampling: &Sampling) -> String {
    if sampling.temperature == 0.0 { "greedy".into() } else { "sampled".into() }
}

fn class(size: usize, ends: &[usize]) -> String {
    ends.iter().find(|&&end| size <= end).map_or("more".to_string(), usize::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_fall_into_the_first_class_that_holds_them() {
        assert_eq!([1, 2, 8, 9, 256].map(|n| class(n, &NODES)), ["1", "8", "8", "16", "256"]);
        assert_eq!(class(1000, &NODES), "more");
    }
}
