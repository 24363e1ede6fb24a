//! Mixture of experts: which experts each row has, and products with the weights of those.

use super::acceptance::plain;
use super::tiling::{Matrix, Tiling};
use super::{Argument, Launch, Lowering, Source};
use crate::op::{GroupScore, Op, Scoring};
use crate::pass::Buf;
use crate::spec::KernelSpec;

impl Lowering<'_> {
    /// The logits, then what is chosen by them: many blocks share the product, and one sees all of a row.
    pub(super) fn route(&self) -> Vec<Launch> {
        let &Op::Route { eps, routing, x, norm, weight, bias, experts, weights, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let count = self.desc(weight).shape[0];
        let logits = Argument { source: Source::Workspace(self.pass.rows * count * 4), offset: 0 };
        let product = self.normed_product([x, norm, weight], eps, None, logits);
        let spec = KernelSpec::new("route")
            .size("EXPERTS", "e", count)
            .size("CHOSEN", "k", self.desc(experts).shape[1])
            .size("GROUPS", "g", routing.groups)
            .size("TOP_GROUPS", "top", routing.top_groups)
            .flag("TWO_LARGEST", "two", routing.group_score == GroupScore::TwoLargest)
            .flag("SOFTMAX", "softmax", routing.scoring == Scoring::Softmax)
            .flag("BIAS", "bias", bias.is_some())
            .flag("NORMALISE", "normed", routing.normalise)
            .with("SCALE", routing.scale);
        let arguments = vec![self.batch.requests.into(), logits, bias.into(), experts.into(), weights.into()];
        vec![product, plain(spec, arguments, [self.pass.rows, 1, 1], count.next_multiple_of(32))]
    }

    pub(super) fn group_rows(&self) -> Vec<Launch> {
        let &Op::GroupRows { experts, groups, .. } = self.op else { unreachable!("lowering another op") };
        let chosen = self.desc(experts).shape[1];
        let spec = KernelSpec::new("group_rows")
            .size("EXPERTS", "e", self.experts(groups, chosen))
            .size("CHOSEN", "k", chosen);
        let arguments = [self.batch.requests, experts, groups].map(Argument::from).to_vec();
        vec![plain(spec, arguments, [1, 1, 1], 1024)]
    }

    pub(super) fn expert_gate_up(&self) -> Vec<Launch> {
        let &Op::ExpertGateUp { eps, x, norm, weight, groups, out, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let &[_, chosen, width] = self.desc(out).shape.as_slice() else {
            unreachable!("Op::check refuses other shapes")
        };
        let spec = KernelSpec::new("expert_gate_up").size("WIDTH", "n", width).size("CHOSEN", "k", chosen);
        let arguments = [groups, x, norm, weight, out].map(Argument::from).to_vec();
        vec![self.of_experts(spec, weight, Some(eps), groups, chosen, arguments)]
    }

    pub(super) fn expert_down(&self) -> Vec<Launch> {
        let &Op::ExpertDown { x, weight, groups, out, .. } = self.op else { unreachable!("lowering another op") };
        let &[_, chosen, width] = self.desc(out).shape.as_slice() else {
            unreachable!("Op::check refuses other shapes")
        };
        let spec = KernelSpec::new("expert_down").size("WIDTH", "n", width);
        let arguments = [groups, x, weight, out].map(Argument::from).to_vec();
        vec![self.of_experts(spec, weight, None, groups, chosen, arguments)]
    }

    pub(super) fn combine(&self) -> Vec<Launch> {
        const THREADS: usize = 128;
        let &Op::Combine { x, weights, residual, .. } = self.op else { unreachable!("lowering another op") };
        let [width, chosen] = [residual, weights].map(|buf| self.desc(buf).shape[1]);
        let spec = KernelSpec::new("combine").size("WIDTH", "n", width).size("CHOSEN", "k", chosen);
        let arguments = [self.batch.requests, x, weights, residual].map(Argument::from).to_vec();
        vec![plain(spec, arguments, [width.div_ceil(4 * THREADS), self.pass.rows, 1], THREADS)]
    }

    /// A launch over tiles of an expert's weight rows, for as many experts as all rows may choose. A pass of one row reads the
    /// weights of those that it chose, which tiles are made for as if they were one matrix; a tile has tokens for twice as
    /// many rows as an expert has on average.
    fn of_experts(
        &self,
        spec: KernelSpec,
        weight: Buf,
        eps: Option<f32>,
        groups: Buf,
        chosen: usize,
        arguments: Vec<Argument>,
    ) -> Launch {
        let (experts, entries) = (self.experts(groups, chosen), self.pass.rows * chosen);
        let all = self.matrix(weight, eps);
        let of_expert = all.rows / experts;
        let matrix = Matrix { rows: of_expert * chosen, ..all };
        let tokens = self.pass.rows.min((2 * entries / experts).max(16));
        let tiling = Tiling::new(&matrix, tokens, self.device);
        let spec = spec.size("EXPERTS", "e", experts);
        // Each token's entry and, of another op, its row.
        let extra = 2 * 4 * tiling.tokens;
        let tiles = [of_expert.div_ceil(tiling.rows()), 1];
        let mut launch = self.matmul_of(spec, &matrix, tiling, tiles, extra, arguments);
        launch.grid[1] = experts.min(entries);
        launch
    }

    /// How many experts there are, by what lists their entries.
    fn experts(&self, groups: Buf, chosen: usize) -> usize {
        self.desc(groups).len() - 1 - self.max_rows() * chosen
    }

    /// That buffers have room for: a pass may have fewer.
    fn max_rows(&self) -> usize {
        self.desc(self.batch.rows).shape[0]
    }
}

#[cfg(test)]
mod tests {
    use crate::cuda::{Device, Launch, lower_pass};
    use crate::release::deepseek;
    use crate::spec::Value;

    const STEMS: [&str; 5] = ["normed_product", "latent_queries", "per_head", "expert_gate_up", "expert_down"];

    fn constant(launch: &Launch, name: &str) -> usize {
        match launch.spec.constants().iter().find(|(known, _)| *known == name) {
            Some((_, Value::U32(value))) => *value as usize,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn launches(rows: usize, device: &Device) -> Vec<Launch> {
        let mut launches = lower_pass(&deepseek::pass(rows), device).unwrap();
        launches.retain(|launch| STEMS.contains(&launch.spec.stem()));
        launches
    }

    #[test]
    fn the_order_of_sums_is_that_of_the_matrix() {
        let order = |launch: &Launch| {
            let is_alone = usize::from(constant(launch, "WARPS_M") == 1);
            [constant(launch, "CLUSTER"), constant(launch, "WARPS_K"), is_alone]
        };
        for device in [Device::H100, Device::A100, Device::RTX_4090] {
            let of = |rows| launches(rows, &device).iter().map(order).collect::<Vec<_>>();
            for rows in [4, 16, 33, 64, 256] {
                assert_eq!(of(1), of(rows), "{rows} rows, {device:?}");
            }
        }
    }

    #[test]
    fn there_are_blocks_for_as_many_experts_as_may_be_chosen() {
        for (rows, experts) in [(1, 6), (4, 24), (16, 64), (256, 64)] {
            for launch in launches(rows, &Device::H100).iter().filter(|launch| launch.spec.stem().starts_with("expert"))
            {
                let weight_rows: usize = if launch.spec.stem() == "expert_down" { 2048 } else { 2 * 1408 };
                let tile = 8 * constant(launch, "ROW_TILES") * constant(launch, "WARPS_M");
                let blocks = weight_rows.div_ceil(tile) * constant(launch, "CLUSTER");
                assert_eq!(launch.grid, [blocks, experts, 1], "{rows} rows");
                assert!(constant(launch, "TOKENS") >= rows.min(16) && constant(launch, "TOKEN_TILES") == 1);
            }
        }
    }
}
