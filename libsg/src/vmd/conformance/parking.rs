//! Rules of a volume that is parked: who may have it, once.

use super::{Bench, asked, batch, refused};
use crate::error::ErrorKind;
use crate::ids::{Epoch, MemberSet, NodeId};
use crate::vmd::link::{Link, Reply, Request};
use crate::wire::message::{VmdReply, VmdRequest, VolumeInfo, VolumeState};
use crate::wire::parking::{Claim, Parking, Verdict};

fn node(name: &str) -> NodeId {
    NodeId { name: name.into(), incarnation: 3 }
}

fn claim(by: &str, epoch: u64, force: bool) -> Claim {
    Claim { epoch: Epoch(epoch), by: node(by), force }
}

fn said(link: &mut dyn Link, request: &VmdRequest) -> crate::error::Result<VmdReply> {
    asked(link, Request::Control(request), |reply| match reply {
        Reply::Control(reply) => Some(reply),
        _ => None,
    })
}

fn verdict(link: &mut dyn Link, claim: Claim) -> Verdict {
    match said(link, &VmdRequest::ClaimParked(claim)).expect("an answer") {
        VmdReply::Verdict(verdict) => verdict,
        other => panic!("no verdict: {other:?}"),
    }
}

fn stands(link: &mut dyn Link) -> VolumeInfo {
    match said(link, &VmdRequest::Describe).expect("an answer") {
        VmdReply::Volume(info) => *info,
        other => panic!("no volume: {other:?}"),
    }
}

/// Where an engine decides, a keeper does what those say who were told by it.
pub(super) fn grants_nothing_itself(bench: &Bench<'_>) {
    let (at, id, mut writer) = bench.one();
    let arbiter = Some("etcd://10.0.0.1/sg".into());
    let parking = Parking { name: "web".into(), keeper: writer.member().node.clone(), term: 0, arbiter };
    asked(&mut *writer, Request::PutState(b"the vcpus"), |_| Some(())).expect("stored");
    said(&mut *writer, &VmdRequest::Park(parking.clone())).expect("parked");
    assert_eq!(stands(&mut *writer).parking, Some(parking));
    let mut owner = bench.link(&*at, id, 2);
    assert_eq!(verdict(&mut *owner, claim("a", 2, false)), Verdict::Elsewhere);
    assert_eq!(verdict(&mut *owner, claim("a", 2, true)), Verdict::Granted);
    said(&mut *owner, &VmdRequest::Run).expect("it runs");
    assert_eq!(verdict(&mut *owner, claim("b", 3, true)), Verdict::Runs { by: node("a") });
}

pub(super) fn has_one_owner(bench: &Bench<'_>) {
    let (at, id, mut writer) = bench.one();
    let parking =
        Parking { name: "web".into(), keeper: writer.member().node.clone(), term: 0, arbiter: None };
    let park = VmdRequest::Park(parking.clone());
    assert_eq!(verdict(&mut *writer, claim("a", 2, true)), Verdict::NotParked);
    refused(said(&mut *writer, &park), ErrorKind::Volume);
    asked(&mut *writer, Request::PutState(b"the vcpus"), |_| Some(())).expect("stored");
    let mut early = bench.link(&*at, id, 2);
    refused(said(&mut *early, &park), ErrorKind::Volume);
    for _ in 0..2 {
        said(&mut *writer, &park).expect("parked");
    }
    let info = stands(&mut *writer);
    assert_eq!((info.state, info.committed, info.owner), (VolumeState::Parked, true, None));
    assert_eq!(info.parking, Some(parking));
    // Its writer may mend it, nobody gets around the claim.
    let (entries, slices) = batch([5], 0);
    let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
    asked(&mut *writer, put, |_| Some(())).expect("stored");
    refused(said(&mut *early, &VmdRequest::Claim { epoch: Epoch(5) }), ErrorKind::Volume);
    refused(said(&mut *writer, &VmdRequest::Seal), ErrorKind::Volume);

    assert_eq!(verdict(&mut *early, claim("a", 1, false)), Verdict::Newer(Epoch(1)));
    for _ in 0..2 {
        assert_eq!(verdict(&mut *early, claim("a", 2, false)), Verdict::Granted);
    }
    assert!(
        matches!(verdict(&mut *early, claim("b", 3, false)), Verdict::Claimed { by, .. } if by == node("a"))
    );
    refused(asked(&mut *writer, put, |_| Some(())), ErrorKind::Fenced);
    refused(said(&mut *writer, &park), ErrorKind::Fenced);
    assert_eq!(stands(&mut *early).owner, Some(node("a")));

    assert_eq!(verdict(&mut *early, claim("b", 3, true)), Verdict::Granted);
    refused(said(&mut *early, &VmdRequest::Run), ErrorKind::Fenced);
    let mut late = bench.link(&*at, id, 4);
    refused(said(&mut *late, &VmdRequest::Run), ErrorKind::Volume);
    let mut owner = bench.link(&*at, id, 3);
    for _ in 0..2 {
        said(&mut *owner, &VmdRequest::Run).expect("it runs");
    }
    assert_eq!(verdict(&mut *late, claim("c", 9, true)), Verdict::Runs { by: node("b") });
    assert_eq!(stands(&mut *late).state, VolumeState::Running);
    refused(said(&mut *early, &VmdRequest::Dissolve), ErrorKind::Fenced);
    // Its owner goes on in another process, and is one still.
    assert_eq!(verdict(&mut *owner, claim("b", 3, true)), Verdict::Runs { by: node("b") });
    let mut next = bench.link(&*at, id, 4);
    assert_eq!(verdict(&mut *next, claim("b", 4, true)), Verdict::Granted);
    assert_eq!(stands(&mut *next).state, VolumeState::Running);
    assert_eq!(verdict(&mut *late, claim("c", 9, true)), Verdict::Runs { by: node("b") });
    refused(said(&mut *owner, &VmdRequest::Dissolve), ErrorKind::Fenced);
    said(&mut *next, &VmdRequest::Dissolve).expect("dissolved");
    refused(said(&mut *late, &VmdRequest::ClaimParked(claim("c", 9, true))), ErrorKind::Volume);
}
