//! The page: one HTML file with everything in it, to be sent to anybody. No script, nothing that is fetched.

use std::fmt::Write as _;

use super::figure::{Figure, Kind};
use super::reduce::{Dot, Line, Reduced};

/// What is said once, above all figures.
pub struct Heading {
    /// Scale, runs, how far it is, machine: name and value.
    pub facts: Vec<(&'static str, String)>,
}

/// A figure with its values, drawn; of the table there is no drawing.
pub struct Shown<'a> {
    /// What it is.
    pub figure: &'a Figure,
    /// Its values.
    pub values: &'a Reduced,
    /// Its drawing.
    pub svg: Option<String>,
}

const STYLE: &str = "
body { font: 16px/1.5 sans-serif; color: #111; max-width: 960px; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 2.5em } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 14px; margin: 1em 0 }
th, td { border-bottom: 1px solid #ccc; padding: 2px 10px; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #666 }
.none { color: #666; text-align: left } dt { font-weight: bold; float: left; clear: left; width: 9em }
dd { margin-left: 9.5em } code { font-size: 12px; overflow-wrap: anywhere }
";

/// The page.
pub fn page(heading: &Heading, figures: &[Shown]) -> String {
    let mut html = String::from("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    let _ = write!(
        html,
        "<meta name=\"viewport\" content=\"width=device-width\">\n<title>Scatter-gather live migration: the paper's \
         figures</title>\n<style>{STYLE}</style></head><body>\n<h1>Scatter-gather live migration: the paper's figures, \
         measured here</h1>\n{}\n",
        introduction()
    );
    html.push_str("<dl>\n");
    for (name, value) in &heading.facts {
        let _ = writeln!(html, "<dt>{}</dt><dd>{}</dd>", escaped(name), escaped(value));
    }
    html.push_str("</dl>\n<p>");
    for shown in figures {
        let _ = write!(html, "<a href=\"#{0}\">{0}</a> ", shown.figure.name);
    }
    html.push_str("</p>\n");
    for shown in figures {
        section(&mut html, shown);
    }
    html.push_str("</body></html>\n");
    html
}

fn introduction() -> &'static str {
    "<p>The paper: “Scatter-Gather Live Migration of Virtual Machines”, Umesh Deshpande, Danny Chan, Steven Chan, \
     Kartik Gopalan, Nilton Bila, IEEE Transactions on Cloud Computing 6(1), 2018. Its columns below are its own \
     numbers where it prints them (table 1, the evictions of figure 12), else they are read off its curves, to a \
     second.</p>\n<p>Here VMs and hosts have less memory at the same link rates, so that times shrink with the \
     memory; the column <i>at 5 GB</i> is ours multiplied back. Error bars are standard deviations. The bound is the \
     time that the VM's pages take at the rate that the source's link carried in the same run, measured by plain TCP: \
     no eviction is shorter. All hosts are network namespaces of one machine and share its processors. A busy VM \
     writes 10,000 random pages a second, where the paper has TunkRank or Redis. The two VMs that the paper runs at \
     the destination are two processes that rank a graph in as much memory, at the lowest priority.</p>"
}

fn section(html: &mut String, shown: &Shown) {
    let figure = shown.figure;
    let _ = write!(
        html,
        "<h2 id=\"{}\">{}</h2>\n<p>{}</p>\n<p><i>Here:</i> {}</p>\n",
        figure.name,
        escaped(figure.title),
        escaped(figure.shows),
        escaped(figure.differs)
    );
    if let Some(svg) = &shown.svg {
        // A namespace is no address to fetch from, but inline it is not needed either.
        html.push_str(&svg.replace(" xmlns=\"http://www.w3.org/2000/svg\"", ""));
        html.push('\n');
    }
    table(html, figure, shown.values);
    html.push_str("<details><summary>Commands, one for each point</summary>\n");
    for experiment in figure.experiments() {
        let _ = writeln!(html, "<code>sg-bench migrate {}</code><br>", escaped(&experiment.0));
    }
    html.push_str("</details>\n");
}

/// The paper's values beside ours.
fn table(html: &mut String, figure: &Figure, values: &Reduced) {
    let x =
        if figure.kind == Kind::Timeline { String::new() } else { format!("<th>{}</th>", escaped(figure.x)) };
    let _ = write!(
        html,
        "<table><thead><tr><th></th>{x}<th>paper</th><th>here</th><th>runs</th><th>at 5 GB</th>\
         <th>bound</th><th>here / bound</th></tr></thead>\n<tbody>\n"
    );
    let mut not_here: Vec<String> = Vec::new();
    for line in &values.series {
        let nothing = |dot: &Dot| dot.here.is_none() && dot.paper.is_none();
        if let Some(why) = line.points.first().and_then(|dot| dot.why_not.as_ref())
            && line.points.iter().all(nothing)
        {
            // Neither the paper nor we have anything: a sentence says it.
            not_here.push(format!("{}: {why}", line.name));
            continue;
        }
        for dot in &line.points {
            row(html, figure, line, dot);
        }
    }
    html.push_str("</tbody></table>\n");
    if !not_here.is_empty() {
        let _ = writeln!(html, "<p class=\"none\">Left out: {}.</p>", escaped(&not_here.join("; ")));
    }
}

fn row(html: &mut String, figure: &Figure, line: &Line, dot: &Dot) {
    let _ = write!(html, "<tr><td>{}</td>", escaped(&line.name));
    if figure.kind != Kind::Timeline {
        let _ = write!(html, "<td>{}</td>", dot.x);
    }
    let unit = line.measure.unit;
    let _ = write!(html, "<td>{}</td>", number(dot.paper, unit));
    let Some(here) = &dot.here else {
        let why = dot.why_not.as_deref().unwrap_or("not told");
        let _ = writeln!(html, "<td colspan=\"5\" class=\"none\">{}</td></tr>", escaped(why));
        return;
    };
    let over = dot.bound.map(|bound| format!("{:.2}", here.mean / bound)).unwrap_or_default();
    let _ = writeln!(
        html,
        "<td>{} ± {}</td><td>{}</td><td>{}</td><td>{}</td><td>{over}</td></tr>",
        number(Some(here.mean), ""),
        number(Some(here.deviation), unit),
        here.values.len(),
        number(dot.at_the_papers_size, unit),
        number(dot.bound, unit),
    );
}

/// Three digits and a unit, or a dash.
fn number(value: Option<f64>, unit: &str) -> String {
    let Some(value) = value else { return "–".to_owned() };
    let digits = match value.abs() {
        large if large >= 100.0 => 0,
        middle if middle >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}").trim_end().to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn text_is_no_markup() {
        assert_eq!(escaped("a<b & \"c\">"), "a&lt;b &amp; &quot;c&quot;&gt;");
        let numbers = [Some(328.0), Some(49.26), Some(9.04), Some(0.0), None].map(|value| number(value, "s"));
        assert_eq!(numbers, ["328 s", "49.3 s", "9.04 s", "0.00 s", "–"]);
        assert_eq!(number(Some(0.5), ""), "0.50");
    }
}
