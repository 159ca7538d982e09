//! Pages are had as they are, whatever their reader knows of them.

use super::links::{put, taken};
use super::{Bench, asked, batch, content, refused};
use crate::error::ErrorKind;
use crate::ids::Checksum;
use crate::page::PageIndex;
use crate::vmd::link::{Link, Reply, Request};
use crate::wire::GetEntry;

pub(super) fn known_pages(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let placements = put(&mut *link, 0..80, 0).expect("stored");
    let known_as = |link: &mut dyn Link, pages: std::ops::Range<u32>, checksum_of: fn(u32) -> u32| {
        let at = |page: u32| GetEntry { page: PageIndex(page), placement: placements[page as usize] };
        let wanted: Vec<GetEntry> = pages.clone().map(at).collect();
        let (mut known, _) = batch(pages.clone(), 0);
        for entry in &mut known {
            entry.checksum = Checksum::of(&content(checksum_of(entry.page.0), 0));
        }
        let found = asked(link, Request::GetKnown { wanted: &wanted, known: &known }, |reply| match reply {
            Reply::Pages { entries, bytes } => Some(taken(entries, bytes)),
            _ => None,
        });
        let right: Vec<Option<Vec<u8>>> = pages.map(|page| Some(content(page, 0))).collect();
        assert!(found.expect("an answer") == right);
    };
    for _ in 0..3 {
        known_as(&mut *link, 0..64, |page| page);
        known_as(&mut *link, 70..71, |page| page);
    }
    // It is not believed.
    known_as(&mut *link, 0..64, |page| if page == 40 { 41 } else { page });
    known_as(&mut *link, 71..72, |page| page + 1);
    let (known, _) = batch(0..2, 0);
    let wanted = [GetEntry { page: PageIndex(0), placement: placements[0] }];
    refused(link.submit(Request::GetKnown { wanted: &wanted, known: &known }), ErrorKind::Input);
    refused(link.submit(Request::GetKnown { wanted: &[], known: &[] }), ErrorKind::Input);
}
