//! Draws a reduced figure, once for SVG and once for PNG: lines with error bars, bounds dotted, the legend beside
//! them so that it hides nothing. The font comes with the program: nothing is asked of the system.

use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::figure::{Look, Marker};
use super::reduce::{Line, Reduced, evicted_at};

/// Size of a figure; a PNG has twice as many pixels each way.
const SIZE: (u32, u32) = (940, 450);
/// What the title takes above.
const TITLE: i32 = 40;
const PNG_TIMES: u32 = 2;
/// What the legend takes on the right.
const LEGEND: i32 = 290;
/// The physical bound is dotted; what adds up below it, long dashes.
const BOUND_DASHES: [(i32, i32); 2] = [(2, 4), (12, 4)];
const FONT: &str = "sans-serif";
const GREY: RGBColor = RGBColor(0x70, 0x70, 0x70);

/// A figure as SVG.
///
/// # Errors
/// The library refuses.
pub fn svg(figure: &Reduced) -> Result<String> {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
    chart(&area, figure, 1)?;
    drop(area);
    Ok(text)
}

/// A figure as PNG.
///
/// # Errors
/// The library refuses.
pub fn png(figure: &Reduced) -> Result<Vec<u8>> {
    let (width, height) = (SIZE.0 * PNG_TIMES, SIZE.1 * PNG_TIMES);
    let mut pixels = vec![0; (width * height * 3) as usize];
    let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    chart(&area, figure, PNG_TIMES as i32)?;
    drop(area);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(bytes)
}

type Area<'a, DB> = DrawingArea<DB, Shift>;
type Chart<'a, DB> = ChartContext<'a, DB, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Where lines go, in pixels that are `times` as small.
struct Pen<'a, DB: DrawingBackend> {
    area: &'a Area<'a, DB>,
    times: i32,
}

fn chart<DB: DrawingBackend>(area: &Area<'_, DB>, figure: &Reduced, times: i32) -> Result<()>
where
    DB::ErrorType: 'static,
{
    have_font()?;
    area.fill(&WHITE)?;
    let timeline = figure.series.iter().any(|line| !line.over_time.is_empty());
    // A run too short for a rate has no place on a timeline.
    let known = |line: &&Line| line.drawn && line.over_time.is_empty() != timeline && !dots(line).is_empty();
    let lines: Vec<&Line> = figure.series.iter().filter(known).collect();
    let (x, y) = ranges(&lines, figure);
    let title = (FONT, 18 * times).into_font().color(&BLACK);
    area.draw_text(figure.title, &title, (14 * times, 12 * times))?;
    let (_, below) = area.split_vertically(TITLE * times);
    let (plot, _) = below.split_horizontally((SIZE.0 as i32 - LEGEND) * times);
    let mut chart = ChartBuilder::on(&plot)
        .margin(14 * times)
        .x_label_area_size(44 * times)
        .y_label_area_size(66 * times)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
    let digits = if y.1 < 0.5 {
        2
    } else if y.1 < 5.0 {
        1
    } else {
        0
    };
    let few = if x.1 - x.0 < 9.0 { 1 } else { 0 };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(RGBColor(0xd8, 0xd8, 0xd8))
        .light_line_style(TRANSPARENT)
        .axis_style(ShapeStyle::from(&GREY).stroke_width(times as u32))
        .label_style((FONT, 14 * times))
        .axis_desc_style((FONT, 15 * times))
        .x_desc(figure.x)
        .y_desc(match lines.first().map(|line| line.measure.unit) {
            _ if timeline => "guest operations a second",
            Some("s") | None => "seconds",
            Some(unit) => unit,
        })
        .x_labels(if timeline { 10 } else { 5 })
        .y_labels(7)
        .x_label_formatter(&|x| if timeline { format!("{x:.few$}") } else { format!("{x:.0}") })
        .y_label_formatter(&|y| format!("{y:.digits$}"))
        .draw()?;
    let pen = Pen { area, times };
    for (bound, dash) in figure.bounds.iter().zip(BOUND_DASHES) {
        pen.path(&on_paper(&chart, bound.points.iter().copied()), &BLACK, 2, Some(dash))?;
    }
    for line in &lines {
        pen.series(&chart, line)?;
    }
    pen.legend(figure, &lines)
}

/// The library's own fonts are the system's; this one is in the program.
fn have_font() -> Result<()> {
    static DONE: OnceLock<bool> = OnceLock::new();
    let done = DONE.get_or_init(|| register_font(FONT, FontStyle::Normal, dejavu::sans::regular()).is_ok());
    if *done { Ok(()) } else { Err(anyhow!("the font in the program is no font")) }
}

/// The points of a line that are known: where, mean, deviation.
fn dots(line: &Line) -> Vec<(f64, f64, f64)> {
    if !line.over_time.is_empty() {
        return line.over_time.iter().map(|(t_s, stat)| (*t_s, stat.mean, stat.deviation)).collect();
    }
    let known = line.points.iter().filter_map(|dot| Some((dot.x, dot.here.as_ref()?)));
    known.map(|(x, stat)| (x, stat.mean, stat.deviation)).collect()
}

/// What the axes show: everything, from zero up. The x axis of curves is as wide as the paper's, however few points
/// are known.
fn ranges(lines: &[&Line], figure: &Reduced) -> ((f64, f64), (f64, f64)) {
    let timeline = lines.iter().any(|line| !line.over_time.is_empty());
    let known: Vec<(f64, f64, f64)> = lines.iter().flat_map(|line| dots(line)).collect();
    let tops = known.iter().map(|(_, mean, deviation)| mean + deviation);
    let bounds = figure.bounds.iter().flat_map(|bound| bound.points.iter().map(|(_, y)| *y));
    let top = tops.chain(bounds).fold(0.0, f64::max);
    let y = (0.0, if top > 0.0 { top * 1.07 } else { 1.0 });
    if timeline {
        let ends = lines.iter().filter_map(|line| evicted_at(line)).chain(known.iter().map(|dot| dot.0));
        return ((0.0, ends.fold(1.0, f64::max) * 1.02), y);
    }
    let xs = || figure.series.iter().flat_map(|line| &line.points).map(|dot| dot.x);
    let (least, most) = (xs().fold(f64::MAX, f64::min), xs().fold(f64::MIN, f64::max));
    let pad = ((most - least) * 0.05).max(0.1);
    ((least - pad, most + pad), y)
}

fn on_paper<DB: DrawingBackend>(
    chart: &Chart<'_, DB>,
    points: impl Iterator<Item = (f64, f64)>,
) -> Vec<(i32, i32)> {
    points.map(|point| chart.backend_coord(&point)).collect()
}

impl<DB: DrawingBackend> Pen<'_, DB>
where
    DB::ErrorType: 'static,
{
    /// A line with its error bars and markers; of a timeline the line alone, and when the source had evicted.
    fn series(&self, chart: &Chart<'_, DB>, line: &Line) -> Result<()> {
        let (colour, timeline) = (colour(line.look), !line.over_time.is_empty());
        let dots = dots(line);
        let path = on_paper(chart, dots.iter().map(|(x, mean, _)| (*x, *mean)));
        self.path(&path, &colour, 2, line.look.dashed.then_some((7, 5)))?;
        for (x, mean, deviation) in dots.into_iter().filter(|dot| dot.2 > 0.0) {
            // Nothing takes less than no time.
            let ends = [(x, (mean - deviation).max(0.0)), (x, mean + deviation)];
            let bar = on_paper(chart, ends.into_iter());
            self.path(&bar, &colour.mix(if timeline { 0.35 } else { 1.0 }), 1, None)?;
            for (x, y) in bar.into_iter().filter(|_| !timeline) {
                let half = 4 * self.times;
                self.path(&[(x - half, y), (x + half, y)], &colour, 1, None)?;
            }
        }
        if !timeline {
            return path.iter().try_for_each(|at| self.marker(*at, line.look));
        }
        if let Some(at) = evicted_at(line) {
            let ends = on_paper(chart, [(at, 0.0), (at, chart.y_range().end)].into_iter());
            self.path(&ends, &colour, 2, Some((7, 5)))?;
            if let Some(top) = ends.last() {
                self.marker(*top, line.look)?;
            }
        }
        Ok(())
    }

    fn path(
        &self,
        points: &[(i32, i32)],
        colour: &impl Color,
        width: i32,
        dash: Option<(i32, i32)>,
    ) -> Result<()> {
        let style = colour.stroke_width((width * self.times) as u32);
        match dash {
            _ if points.len() < 2 => {}
            Some((on, off)) => {
                let points = points.to_vec();
                let (on, off) = (on * self.times, off * self.times);
                self.area.draw(&DashedPathElement::new(points, on, off, style))?;
            }
            None => self.area.draw(&PathElement::new(points.to_vec(), style))?,
        }
        Ok(())
    }

    fn marker(&self, (x, y): (i32, i32), look: Look) -> Result<()> {
        let (r, colour) = (5 * self.times, colour(look));
        let outline = match look.marker {
            Marker::Circle => {
                let inside = if look.dashed { WHITE } else { colour };
                self.area.draw(&Circle::new((x, y), r, inside.filled()))?;
                let edge = colour.stroke_width((2 * self.times) as u32);
                return Ok(self.area.draw(&Circle::new((x, y), r, edge))?);
            }
            Marker::Cross => {
                self.path(&[(x - r, y - r), (x + r, y + r)], &colour, 2, None)?;
                return self.path(&[(x - r, y + r), (x + r, y - r)], &colour, 2, None);
            }
            Marker::Triangle => vec![(x, y - r), (x + r, y + r), (x - r, y + r), (x, y - r)],
            Marker::Square => {
                vec![(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r), (x - r, y - r)]
            }
        };
        let inside = if look.dashed { WHITE } else { colour };
        self.area.draw(&Polygon::new(outline.clone(), inside.filled()))?;
        self.path(&outline, &colour, 2, None)
    }

    /// One line each, on the right.
    fn legend(&self, figure: &Reduced, lines: &[&Line]) -> Result<()> {
        let left = (SIZE.0 as i32 - LEGEND + 10) * self.times;
        let middle = Pos::new(HPos::Left, VPos::Center);
        let style = (FONT, 14 * self.times).into_font().color(&BLACK).pos(middle);
        let mut y = (TITLE + 24) * self.times;
        let say = |text: &str, y: i32| self.area.draw_text(text, &style, (left + 44 * self.times, y));
        for line in lines {
            let ends = [(left, y), (left + 34 * self.times, y)];
            self.path(&ends, &colour(line.look), 2, line.look.dashed.then_some((7, 5)))?;
            self.marker((left + 17 * self.times, y), line.look)?;
            let at = evicted_at(line).filter(|_| !line.over_time.is_empty());
            let evicted = at.map_or(String::new(), |s| format!(", evicted at {s:.1} s"));
            say(&format!("{}{evicted}", line.name), y)?;
            y += 24 * self.times;
        }
        let bounds = figure.bounds.iter().zip(BOUND_DASHES);
        for (bound, dash) in bounds.filter(|(bound, _)| !bound.points.is_empty()) {
            self.path(&[(left, y), (left + 34 * self.times, y)], &BLACK, 2, Some(dash))?;
            for part in bound.name.split(": ") {
                say(part, y)?;
                y += 20 * self.times;
            }
            y += 4 * self.times;
        }
        Ok(())
    }
}

fn colour(look: Look) -> RGBColor {
    RGBColor(look.colour.0, look.colour.1, look.colour.2)
}
