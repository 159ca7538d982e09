//! Rules of who writes a volume when another did before.

use super::links::{at, control, describe, get, index, locate, put};
use super::{Bench, refused};
use crate::error::ErrorKind;
use crate::ids::Epoch;
use crate::wire::message::{VmdRequest, VolumeState};

pub(super) fn fencing(bench: &Bench<'_>) {
    let (node, volume, mut old) = bench.one();
    let place = put(&mut *old, [1], 0).expect("stored")[0];
    index(&mut *old, &[at(1, 0, place)]).expect("indexed");
    let mut owner = bench.link(&*node, volume, 2);
    refused(put(&mut *owner, [2], 0), ErrorKind::Volume);
    refused(control(&mut *owner, &VmdRequest::Claim { epoch: Epoch(1) }), ErrorKind::Fenced);
    control(&mut *owner, &VmdRequest::Claim { epoch: Epoch(2) }).expect("claimed");
    refused(control(&mut *owner, &VmdRequest::Claim { epoch: Epoch(2) }), ErrorKind::Fenced);
    refused(put(&mut *old, [2], 0), ErrorKind::Fenced);
    refused(get(&mut *old, &[(1, place)]), ErrorKind::Fenced);
    refused(index(&mut *old, &[at(1, 0, place)]), ErrorKind::Fenced);
    refused(locate(&mut *old, 0, 2), ErrorKind::Fenced);
    refused(control(&mut *old, &VmdRequest::Commit), ErrorKind::Fenced);
    refused(control(&mut *old, &VmdRequest::Seal), ErrorKind::Fenced);
    refused(control(&mut *old, &VmdRequest::Dissolve), ErrorKind::Fenced);
    let info = describe(&mut *old).expect("anyone may ask");
    assert_eq!((info.epoch, info.state, info.committed), (Epoch(2), VolumeState::Claimed, false));
    assert_eq!(locate(&mut *owner, 0, 2).expect("an answer"), [at(1, 0, place)]);
    assert!(get(&mut *owner, &[(1, place)]).expect("an answer")[0].is_some());
}

/// Another goes on in its place, under the same epoch.
pub(super) fn dead_writers(bench: &Bench<'_>) {
    let (node, volume, mut dead) = bench.one();
    let places = put(&mut *dead, [1, 2], 0).expect("stored");
    index(&mut *dead, &[at(1, 0, places[0])]).expect("indexed");
    let mut next = bench.link(&*node, volume, 1);
    refused(control(&mut *bench.link(&*node, volume, 2), &VmdRequest::Fence), ErrorKind::Volume);
    index(&mut *dead, &[at(2, 0, places[1])]).expect("nobody said that it is dead");
    for _ in 0..2 {
        control(&mut *next, &VmdRequest::Fence).expect("fenced");
    }
    let again = put(&mut *next, [2], 0).expect("stored");
    index(&mut *next, &[at(2, 0, again[0])]).expect("indexed");
    refused(index(&mut *dead, &[at(2, 0, places[1])]), ErrorKind::Fenced);
    assert_eq!(locate(&mut *next, 0, 3).expect("an answer"), [at(1, 0, places[0]), at(2, 0, again[0])]);
    let mut later = bench.link(&*node, volume, 1);
    index(&mut *later, &[at(1, 0, places[0])]).expect("it came behind that");
}
