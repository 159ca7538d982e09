//! `sg-bench link`: builds the lab, measures its links, removes it. Tells whether this machine is fit for experiments.

use anyhow::Result;

use crate::cli::LabArgs;
use crate::lab::{Lab, Node};
use crate::{interrupt, stream};

/// Prints what each link carries and how fast a page comes over it.
pub fn run(args: &LabArgs) -> Result<()> {
    let start = std::time::Instant::now();
    let lab = Lab::create(&args.spec(None))?;
    println!("set up in {:.2} s", start.elapsed().as_secs_f64());
    for &node in lab.nodes() {
        if node == Node::Source {
            continue;
        }
        interrupt::check()?;
        let mbps = stream::link_mbps(&lab, Node::Source, node)?;
        let idle_us = stream::idle_round_trip_us(&lab, node, Node::Source)?;
        println!("source -> {node}: {mbps:.1} Mb/s; a page on request in {idle_us:.1} us");
    }
    Ok(())
}
