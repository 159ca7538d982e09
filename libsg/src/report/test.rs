//! Forms in JSON, and merging.

use super::*;
use crate::page::PageIndex;

#[test]
fn status_is_a_word_or_an_object() {
    let lost = Error::new(ErrorKind::Lost, "gone").about([PageRange::new(PageIndex(7), 2)]);
    for (status, json) in [
        (Status::Ok, r#""ok""#),
        (
            Status::from(&lost),
            r#"{"kind":"lost","message":"gone (pages 7-8)","lost":[{"first":7,"pages":2}]}"#,
        ),
    ] {
        assert_eq!(serde_json::to_string(&status).expect("encodes"), json);
        assert_eq!(serde_json::from_str::<Status>(json).expect("decodes"), status);
    }
}

#[test]
fn every_key_is_there_without_a_value() {
    let json = serde_json::to_value(Report::merged(None, None)).expect("encodes");
    for key in "schema status mode seed transport link_mbps line_rate_bound_s eviction_s \
                total_migration_s downtime_s pages bytes faults guest intermediaries cpu_s \
                migration_cpu_s peak_rss_bytes bookkeeping_bytes_per_page cpu_s_per_gib cotenants destination_memory \
                samples vms host rounds rounds_ended"
        .split_whitespace()
    {
        assert!(json.get(key).is_some(), "{key} is absent");
    }
    assert!(json["pages"]["staged"].is_null());
    assert!(json["cpu_s"]["source"].is_null());
}

#[test]
fn merging_takes_each_value_from_who_knows_it() {
    let source = SourceReport {
        eviction_s: Some(2.0),
        downtime_s: Some(0.01),
        pages: Pages { total: Some(10), staged: Some(6), direct: Some(4), ..Pages::default() },
        bytes: Bytes { direct: Some(400), staged: Some(600), wire_total: Some(1010), ..Bytes::default() },
        intermediaries: vec![Intermediary {
            id: "i1".into(),
            bytes_in: Some(600),
            ..Intermediary::default()
        }],
        cpu_s: Some(0.5),
        migration_cpu_s: Some(0.25),
        ..SourceReport::default()
    };
    let destination = DestinationReport {
        total_migration_s: Some(8.0),
        pages: Pages { faulted: Some(3), staged: Some(5), ..Pages::default() },
        bytes: Bytes { gathered: Some(600), wire_total: Some(620), ..Bytes::default() },
        intermediaries: vec![Intermediary {
            id: "i1".into(),
            bytes_out: Some(600),
            ..Intermediary::default()
        }],
        ..DestinationReport::default()
    };
    let report = Report::merged(Some(&source), Some(&destination));
    assert_eq!(report.eviction_s, Some(2.0));
    assert_eq!(report.total_migration_s, Some(8.0));
    assert_eq!((report.pages.staged, report.pages.faulted), (Some(6), Some(3)));
    assert_eq!((report.bytes.gathered, report.bytes.wire_total), (Some(600), Some(1630)));
    assert_eq!(
        (report.intermediaries[0].bytes_in, report.intermediaries[0].bytes_out),
        (Some(600), Some(600))
    );
    let mut timed = report.clone();
    timed.pages.present = Some(1000);
    timed.pages.zero = Some(500);
    timed.set_link(4.096);
    assert_eq!(timed.line_rate_bound_s.map(|s| (s * 1e6).round()), Some(4e6));
    assert_eq!(report.cpu_s, Ends { source: Some(0.5), destination: None });
    assert_eq!(report.migration_cpu_s, Ends { source: Some(0.25), destination: None });

    let lost = DestinationReport {
        status: Status::from(&Error::new(ErrorKind::Lost, "gone")),
        ..DestinationReport::default()
    };
    assert_eq!(Report::merged(Some(&source), Some(&lost)).status, lost.status);
}
