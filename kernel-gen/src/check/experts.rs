//! Mixture of experts: a router, and products with the weights that it chose.

use super::Check;
use crate::op::{GroupScore, MAX_CHOSEN, MAX_EXPERTS, Op, Routing};
use crate::pass::{Buf, DType, PassError};

impl Check<'_> {
    pub(super) fn experts(&self, max_rows: usize) -> Result<(), PassError> {
        match self.op {
            Op::Route { routing, x, norm, weight, bias, experts, weights, .. } => {
                let hidden = self.normed("x", *x, *norm, max_rows)?;
                self.weight("weight", *weight)?;
                let all = self.dims(*weight)[0];
                self.weight_shape("weight", *weight, &[all, hidden])?;
                if let Some(bias) = bias {
                    self.shape("bias", *bias, DType::F32, &[all])?;
                }
                self.rank("experts", *experts, 2)?;
                let chosen = self.dims(*experts)[1];
                self.shape("experts", *experts, DType::U32, &[max_rows, chosen])?;
                self.shape("weights", *weights, DType::F32, &[max_rows, chosen])?;
                self.routing(routing, all, chosen)
            }
            Op::GroupRows { experts, groups, .. } => {
                self.rank("experts", *experts, 2)?;
                let chosen = self.dims(*experts)[1];
                self.shape("experts", *experts, DType::U32, &[max_rows, chosen])?;
                self.groups(*groups, max_rows, chosen).map(drop)
            }
            Op::ExpertGateUp { x, norm, weight, groups, out, .. } => {
                let hidden = self.normed("x", *x, *norm, max_rows)?;
                let [chosen, ffn] = self.of_chosen("out", *out, max_rows)?;
                let experts = self.groups(*groups, max_rows, chosen)?;
                self.weight_shape("weight", *weight, &[experts * 2 * ffn, hidden])
            }
            Op::ExpertDown { x, weight, groups, out, .. } => {
                let [chosen, ffn] = self.of_chosen("x", *x, max_rows)?;
                let hidden = self.of_chosen("out", *out, max_rows)?[1];
                self.shape("out", *out, DType::F32, &[max_rows, chosen, hidden])?;
                let experts = self.groups(*groups, max_rows, chosen)?;
                self.weight_shape("weight", *weight, &[experts * hidden, ffn])
            }
            Op::Combine { x, weights, residual, .. } => {
                let [chosen, hidden] = self.of_chosen("x", *x, max_rows)?;
                self.shape("weights", *weights, DType::F32, &[max_rows, chosen])?;
                self.shape("residual", *residual, DType::F32, &[max_rows, hidden])
            }
            _ => unreachable!("{} is no op of experts", self.op.name()),
        }
    }

    fn routing(&self, routing: &Routing, experts: usize, chosen: usize) -> Result<(), PassError> {
        let &Routing { groups, top_groups, group_score, scale, .. } = routing;
        let problem = |problem| Err(self.error("routing", problem));
        if experts > MAX_EXPERTS || chosen == 0 || chosen > MAX_CHOSEN.min(experts) {
            return problem(format!(
                "chooses {chosen} of {experts}, expected 1 to {MAX_CHOSEN} of up to {MAX_EXPERTS}"
            ));
        }
        if groups == 0 || !experts.is_multiple_of(groups) || top_groups == 0 || top_groups > groups {
            return problem(format!("takes {top_groups} of {groups} groups of {experts} experts"));
        }
        let of_group = experts / groups;
        if top_groups * of_group < chosen || (group_score == GroupScore::TwoLargest && of_group < 2) {
            return problem(format!("chooses {chosen} experts in {top_groups} groups of {of_group}"));
        }
        if scale.is_finite() && scale > 0.0 { Ok(()) } else { problem(format!("has scale {scale}")) }
    }

    /// F32 `[R, k, width]`; returns k and the width.
    fn of_chosen(&self, field: &'static str, buf: Buf, max_rows: usize) -> Result<[usize; 2], PassError> {
        self.rank(field, buf, 3)?;
        let [chosen, width] = [self.dims(buf)[1], self.dims(buf)[2]];
        self.shape(field, buf, DType::F32, &[max_rows, chosen, width])?;
        Ok([chosen, width])
    }

    /// Returns how many experts there are.
    fn groups(&self, groups: Buf, max_rows: usize, chosen: usize) -> Result<usize, PassError> {
        self.rank("groups", groups, 1)?;
        let (words, entries) = (self.dims(groups)[0], max_rows * chosen);
        match words.checked_sub(entries + 1) {
            None | Some(0) => {
                Err(self.error("groups", format!("has {words} words for {entries} entries and their experts")))
            }
            Some(experts) => self.shape("groups", groups, DType::U32, &[experts + 1 + entries]).map(|()| experts),
        }
    }
}
