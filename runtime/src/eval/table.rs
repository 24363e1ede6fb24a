//! A report as a table for people: columns that nothing fills are left out.

use super::Report;
use super::report::{Combination, Mean};
use super::tally::{DEPTHS, Figures};

/// Columns that are aligned to the left; numbers follow.
const NAMES: usize = 3;
/// Shown where there is no number.
pub(crate) const NOTHING: &str = "-";

/// Aligned lines: one for every entry, then the means, the lowest ratios and what is to be known about the figures.
pub fn render(report: &Report) -> String {
    let means = report.means();
    let mut rows = vec![head()];
    for entry in report.entries() {
        let different = entry.plain.as_ref().map(|_| entry.differences.len());
        let counts = [entry.tally.prompts, entry.tally.sums.new_tokens];
        rows.push(row(&entry.set, &entry.combination, counts, &entry.figures, different));
    }
    for mean in &means {
        let counts = [mean.prompts, mean.tokens];
        rows.push(row("mean over sets", &mean.combination, counts, &mean.figures, mean.different_prompts));
    }
    // Nothing but the head: ended before the first prompt was answered.
    let mut text = if rows.len() > 1 { align(&without_empty_columns(rows), NAMES) } else { String::new() };
    for mean in &means {
        text += &lowest(mean);
    }
    let too_long: Vec<String> = report.too_long().map(|(set, prompts)| format!("{prompts} of {set}")).collect();
    if !too_long.is_empty() {
        text += &format!("skipped, as a turn is too long for the context: {}\n", too_long.join(", "));
    }
    if let Some(reference) = &report.reference {
        text += &format!("reference: tokens per round by {}\n", reference.source);
    }
    if report.partial {
        text += "partial: ended before everything was measured\n";
    }
    text
}

fn head() -> Vec<String> {
    let mut head: Vec<String> = ["set", "drafter", "budget", "temp", "prompts", "tokens", "tokens/round", "reference"]
        .map(str::to_string)
        .to_vec();
    head.extend((1..=DEPTHS).map(|depth| format!("depth {depth}")));
    head.extend(["draft ms", "verify ms", "tokens/s", "plain", "times plain", "differ"].map(str::to_string));
    head
}

fn row(
    set: &str,
    combination: &Combination,
    counts: [usize; 2],
    figures: &Figures,
    different: Option<usize>,
) -> Vec<String> {
    let number = |value: f64, digits: usize| format!("{value:.digits$}");
    let some = |value: Option<f64>, digits| value.map_or(NOTHING.to_string(), |value| number(value, digits));
    let share = |value: &Option<f64>| value.map_or(NOTHING.to_string(), |value| format!("{:.0} %", 100.0 * value));
    let mut row = vec![set.to_string(), drafter(combination), combination.budget.clone()];
    row.push(combination.temperature.to_string());
    row.extend(counts.map(|count| count.to_string()));
    row.push(number(figures.tokens_per_round, 2));
    row.push(some(figures.reference_tokens_per_round, 2));
    row.extend(figures.accepted_at_depth.iter().map(share));
    row.push(number(figures.draft_ms_per_round, 2));
    row.push(number(figures.verify_ms_per_round, 2));
    row.push(number(figures.tokens_per_second, 1));
    row.push(some(figures.plain_tokens_per_second, 1));
    row.push(some(figures.times_plain, 2));
    row.push(different.map_or(NOTHING.to_string(), |different| different.to_string()));
    row
}

/// A path by its last part; with `auto`, what that came to.
fn drafter(combination: &Combination) -> String {
    let Combination { drafter, used, .. } = combination;
    match drafter.as_str() {
        "auto" => format!("auto ({used})"),
        path => path.trim_end_matches('/').rsplit('/').next().unwrap_or(path).to_string(),
    }
}

fn lowest(mean: &Mean) -> String {
    let Some((ratio, set)) = &mean.lowest_times_plain else { return String::new() };
    let Combination { budget, temperature, .. } = &mean.combination;
    let name = drafter(&mean.combination);
    format!("lowest of {name}, budget {budget}, temperature {temperature}: {ratio:.2} times plain, on {set}\n")
}

pub(crate) fn without_empty_columns(rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    let filled: Vec<bool> =
        (0..rows[0].len()).map(|column| rows[1..].iter().any(|row| row[column] != NOTHING)).collect();
    let keep = |row: Vec<String>| row.into_iter().zip(&filled).filter(|(_, filled)| **filled).map(|(cell, _)| cell);
    rows.into_iter().map(|row| keep(row).collect()).collect()
}

/// The first so many columns hold names, which are aligned to the left.
pub(crate) fn align(rows: &[Vec<String>], names: usize) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column < names { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn lines_are_aligned_and_end_in_means() {
        let mut report = report();
        report.partial = true;
        let text = render(&report);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + 12 + 6 + 4 + 1 + 1, "{text}");
        assert_eq!(
            lines[..3],
            [
                "set             drafter  budget  temp  prompts  tokens  tokens/round  depth 1  draft ms  verify ms  tokens/s  plain  times plain  differ",
                "first           none     -          0        2     100          1.00     50 %      0.00     100.00      10.0      -            -       -",
                "first           ngram    8          0        2     100          2.00     50 %      0.00     160.00      12.5   10.0         1.25       1",
            ],
            "{text}"
        );
        assert!(
            lines[14].starts_with("mean over sets  ngram    8          0        4     200          2.00"),
            "{text}"
        );
        assert_eq!(lines[19], "lowest of ngram, budget 8, temperature 0: 1.25 times plain, on first");
        assert_eq!(lines[23], "skipped, as a turn is too long for the context: 1 of first, 1 of second");
        assert_eq!(lines[24], "partial: ended before everything was measured");
    }

    #[test]
    fn nothing_measured_is_no_table() {
        let mut report = Report::default();
        report.partial = true;
        assert_eq!(render(&report), "partial: ended before everything was measured\n");
    }

    #[test]
    fn drafters_are_named_briefly() {
        let named = |asked: &str, used: &str| {
            let (budget, temperature) = (String::new(), 0.0);
            drafter(&Combination { drafter: asked.to_string(), used: used.to_string(), budget, temperature })
        };
        assert_eq!(named("auto", "dspark"), "auto (dspark)");
        assert_eq!(named("runs/of/mine/", "dspark"), "mine");
        assert_eq!(named("ngram", "ngram"), "ngram");
    }
}
