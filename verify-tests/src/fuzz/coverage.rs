//! What the cases so far were about: how many of each class.

use std::collections::BTreeMap;

use treespark_verify_tests::arb::Case;

/// Upper ends of classes of sizes.
const NODES: [usize; 6] = [1, 8, 16, 33, 65, 256];
const PREFIXES: [usize; 6] = [0, 1, 16, 64, 128, 416];

#[derive(Debug, Default)]
pub struct Coverage {
    /// Of every kind of class, cases by class.
    kinds: BTreeMap<&'static str, BTreeMap<String, u64>>,
}

impl Coverage {
    pub fn add(&mut self, property: &str, case: &Case) {
        let s = case.model.sizes;
        self.count("property", property.to_string());
        self.count("head size", s.head_dim.to_string());
        self.count("query heads a key head", s.group.to_string());
        self.count("weights", format!("{:?}", s.weights));
        self.count("cache", format!("{:?}", s.cache));
        self.count("page", s.page_size.to_string());
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
            let drawn = if member.sampling.temperature == 0.0 { "greedy" } else { "sampled" };
            self.count("draws", drawn.to_string());
        }
    }

    fn count(&mut self, kind: &'static str, class: String) {
        *self.kinds.entry(kind).or_default().entry(class).or_default() += 1;
    }

    pub fn merge(&mut self, other: Coverage) {
        for (kind, classes) in other.kinds {
            for (class, n) in classes {
                *self.kinds.entry(kind).or_default().entry(class).or_default() += n;
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
