//! Plots, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// Sorted p-values against what a right law gives, a straight line; logarithmic, since the small ones matter.
pub fn p_values(path: &Path, sorted: &[f64], threshold: f64) -> Result<()> {
    draw(path, sorted, threshold).map_err(|error| anyhow!("{error}"))
}

fn draw(path: &Path, sorted: &[f64], threshold: f64) -> Result<(), Box<dyn std::error::Error>> {
    let size = |p: f64| -p.max(1e-12).log10();
    let expected = |i: usize| size((i as f64 + 0.5) / sorted.len() as f64);
    let most = size(threshold).max(sorted.first().copied().map_or(0.0, size)) + 0.5;
    let root = SVGBackend::new(path, (640, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("p-values of {} tests", sorted.len()), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..most, 0.0..most)?;
    chart.configure_mesh().x_desc("-log10 p, if the law is right").y_desc("-log10 p, measured").draw()?;
    chart.draw_series(LineSeries::new([(0.0, 0.0), (most, most)], &BLACK))?;
    let limit = size(threshold);
    chart
        .draw_series(LineSeries::new([(0.0, limit), (most, limit)], &RED))?
        .label(format!("rejected above (p < {threshold:.1e})"))
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], RED));
    let points = sorted.iter().enumerate().map(|(i, &p)| Circle::new((expected(i), size(p)), 2, BLUE.filled()));
    chart.draw_series(points)?;
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}
