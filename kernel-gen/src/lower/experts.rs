//! Experts as WGSL calls: the router and its lists, and products whose weights may lie in several banks.

use super::weights::{Bank, MAX_ROW_TILE};
use super::{Access, Axis, Binding, Grid, KernelCall, LowerError, Lowering, Source};
use crate::op::{GroupScore, Op, Routing, Scoring};
use crate::pass::Buf;
use crate::spec::KernelSpec;

/// Threads of a workgroup where one makes a row, as in `combine.wgsl`.
const COMBINE_THREADS: usize = 64;

impl Lowering<'_> {
    /// The logits first, as partial results.
    pub(super) fn route(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Route { eps, ref routing, x, norm, weight, bias, experts, weights, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let &Routing { scoring, groups, top_groups, group_score, normalise, scale } = routing;
        let mut calls = self.normed_product(eps, [x, norm, weight], &self.partial_rows(weight, Access::Write));
        calls.push(KernelCall {
            spec: KernelSpec::new("route")
                .size("EXPERTS", "e", self.desc(weight).shape[0])
                .size("CHOSEN", "k", self.desc(experts).shape[1])
                .flag("SIGMOID", "sigmoid", scoring == Scoring::Sigmoid)
                .size("GROUPS", "g", groups)
                .size("TOP_GROUPS", "t", top_groups)
                .with("TWO_LARGEST", group_score == GroupScore::TwoLargest)
                .with("NORMALISE", normalise)
                .with("SCALE", scale)
                .flag("BIAS", "bias", bias.is_some()),
            bindings: vec![
                self.read(self.batch.requests),
                self.partial_rows(weight, Access::Read),
                // A model without it: any number stands in, and is not read.
                self.read(bias.unwrap_or(norm)),
                self.rows(experts, Access::Write),
                self.rows(weights, Access::Write),
            ],
            grid: Grid([Axis::Rows(1), Axis::Fixed(1), Axis::Fixed(1)]),
        });
        Ok(calls)
    }

    pub(super) fn group_rows(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::GroupRows { experts, groups, .. } = self.op else { unreachable!("lowering another op") };
        Ok(vec![KernelCall {
            spec: KernelSpec::new("group_rows")
                .size("EXPERTS", "e", self.desc(groups).len() - 1 - self.desc(experts).len())
                .size("CHOSEN", "k", self.desc(experts).shape[1]),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(experts, Access::Read),
                self.whole(groups, Access::Write),
            ],
            grid: Grid([Axis::Fixed(1); 3]),
        }])
    }

    /// Banks cut experts anywhere, so the gate and the up row of an output may lie in different ones. Counted through all
    /// experts, both only ever move on to later banks: one call for each run of outputs that lies in one of each.
    pub(super) fn expert_gate_up(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::ExpertGateUp { eps, x, norm, weight, groups, out, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let &[_, chosen, width] = self.desc(out).shape.as_slice() else { unreachable!("checked") };
        let outputs = self.desc(weight).shape[0] / 2;
        let banks = self.weight_banks(weight);
        // Of the half's row of an output: its bank, and the first output that lies in a later one.
        let bank_of = |half: usize, output: usize| {
            let first_row = half * width + output / width * 2 * width;
            let bank = banks.iter().rfind(|b| b.first_row <= first_row + output % width).expect("banks begin at row 0");
            let end = bank.first_row + bank.rows;
            // Rows of this half in whole experts before the bank's end, and in the one that it cuts.
            let cut = (end % (2 * width)).saturating_sub(half * width).min(width);
            (bank, end / (2 * width) * width + cut)
        };
        let experts = outputs / width;
        let mut calls = Vec::new();
        let mut begin = 0;
        while begin < outputs {
            let ((gate, gate_end), (up, up_end)) = (bank_of(0, begin), bank_of(1, begin));
            let end = gate_end.min(up_end);
            calls.push(KernelCall {
                spec: self
                    .expert_product("expert_gate_up", weight, experts, chosen)
                    .with("CHOSEN", chosen)
                    .with("WIDTH", width)
                    .with("EPS", eps)
                    .with("GATE_FIRST", gate.first_row)
                    .with("UP_FIRST", up.first_row)
                    .bank(begin, end - begin),
                bindings: vec![
                    self.read(groups),
                    self.rows(x, Access::Read),
                    self.read(norm),
                    self.bank_binding(weight, gate),
                    self.bank_binding(weight, up),
                    self.rows(out, Access::Write),
                ],
                grid: self.expert_grid(width, experts, chosen),
            });
            begin = end;
        }
        Ok(calls)
    }

    pub(super) fn expert_down(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::ExpertDown { x, weight, groups, out, .. } = self.op else { unreachable!("lowering another op") };
        let &[_, chosen, width] = self.desc(out).shape.as_slice() else { unreachable!("checked") };
        let experts = self.desc(weight).shape[0] / width;
        let call = |bank: Bank| KernelCall {
            spec: self
                .expert_product("expert_down", weight, experts, chosen)
                .with("WIDTH", width)
                .bank(bank.first_row, bank.rows),
            bindings: vec![
                self.read(groups),
                self.rows(x, Access::Read),
                self.bank_binding(weight, &bank),
                self.rows(out, Access::Write),
            ],
            grid: self.expert_grid(width, experts, chosen),
        };
        Ok(self.weight_banks(weight).into_iter().map(call).collect())
    }

    pub(super) fn combine(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::Combine { x, weights, residual, .. } = self.op else { unreachable!("lowering another op") };
        let width = self.desc(residual).shape[1];
        Ok(vec![KernelCall {
            spec: KernelSpec::new("combine").size("CHOSEN", "k", self.desc(weights).shape[1]).size("WIDTH", "o", width),
            bindings: vec![
                self.read(self.batch.requests),
                self.rows(x, Access::Read),
                self.rows(weights, Access::Read),
                self.rows(residual, Access::Write),
            ],
            grid: Grid([Axis::Fixed(width.div_ceil(COMBINE_THREADS)), Axis::Rows(1), Axis::Fixed(1)]),
        }])
    }

    fn expert_product(&self, stem: &'static str, weight: Buf, experts: usize, chosen: usize) -> KernelSpec {
        let tile = self.entry_tile(experts, chosen);
        self.product(stem, weight, tile).size("EXPERTS", "e", experts).with("GROUPS", groups(tile))
    }

    fn expert_grid(&self, width: usize, experts: usize, chosen: usize) -> Grid {
        let groups = groups(self.entry_tile(experts, chosen));
        Grid([Axis::Fixed(width.div_ceil(groups)), Axis::PerRow(chosen), Axis::Fixed(1)])
    }

    /// Entries that share a weight's load: as many as an expert has if all are chosen alike, rounded up.
    fn entry_tile(&self, experts: usize, chosen: usize) -> usize {
        (self.pass.rows * chosen).div_ceil(experts).next_power_of_two().min(MAX_ROW_TILE)
    }

    /// A row for each weight row, for every row of the pass, between two calls of the op.
    pub(super) fn partial_rows(&self, weight: Buf, access: Access) -> Binding {
        let bytes = self.pass.rows * self.desc(weight).shape[0] * 4;
        Binding { source: Source::Partials, access, bytes: 0..bytes }
    }
}

/// Groups of lanes in a workgroup: more where many workgroups find nothing to do.
fn groups(entry_tile: usize) -> usize {
    if entry_tile == 1 { 1 } else { 4 }
}
