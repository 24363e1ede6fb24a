//! The frontier as SVG: tokens a second of all users together against those of one, a line a policy.

use std::path::Path;

use plotters::prelude::*;

use super::report::{Entry, user};
use super::{Error, Load, Report};

const SIZE: (u32, u32) = (800, 560);
/// Above the largest number there is room for its label.
const ROOM: f64 = 1.12;

pub fn write(path: &Path, report: &Report) -> Result<(), Error> {
    draw(path, report).map_err(|error| Error::Plot(format!("{}: {error}", path.display())))
}

fn draw(path: &Path, report: &Report) -> Result<(), Box<dyn std::error::Error>> {
    let place = |entry: &Entry| Some((user(&entry.figures)?, entry.figures.tokens_per_second));
    let places: Vec<(f64, f64)> = report.entries().iter().filter_map(place).collect();
    let most = |of: fn(&(f64, f64)) -> f64| ROOM * places.iter().map(of).fold(1.0, f64::max);
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(&report.model, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most(|place| place.0), 0.0..most(|place| place.1))?;
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT).x_desc("tokens/s of one user").y_desc("tokens/s of all").draw()?;
    for (index, policy) in report.policies.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let entries = || report.entries().iter().filter(|entry| entry.policy == *policy);
        let name = policy.0.as_deref().unwrap_or("the server's own policy");
        chart
            .draw_series(LineSeries::new(entries().filter_map(place), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
        chart.draw_series(entries().filter_map(|entry| {
            let label = Text::new(label(entry.load), (6, -14), ("sans-serif", 12).into_font().color(&colour));
            Some(EmptyElement::at(place(entry)?) + Circle::new((0, 0), 3, colour.filled()) + label)
        }))?;
    }
    // No policy is worth a point near the origin.
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::LowerLeft).background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}

fn label(load: Load) -> String {
    match load {
        Load::Streams(streams) => streams.to_string(),
        Load::Rate(rate) => format!("{rate}/s"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn every_policy_has_a_line_and_every_load_a_label() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frontier.svg");
        write(&path, &report()).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        let labels = |text: &str| svg.lines().filter(|line| line.trim() == text).count();
        assert_eq!((labels("off"), labels("fixed:1"), svg.matches("<circle").count()), (1, 1, 4), "{svg}");
        let error = write(&folder.path().join("no/such/folder.svg"), &report()).unwrap_err();
        assert!(error.to_string().contains("folder.svg"), "{error}");
    }
}
