//! What a server does that leaves, or makes copies again, and whose pages go to one that does not keep to the protocol: another
//! gets them. And what one does that is told nonsense by somebody who says that it leaves.

use std::time::Duration;

use libsg::ErrorKind;
use libsg::ids::{Checksum, Epoch, Round, VolumeId};
use libsg::page::{PageIndex, PageRange};
use libsg::server::{DrainOptions, ServerHandle};
use libsg::transport::{Channel, Inbox, Outbox};
use libsg::vmd::link::ask;
use libsg::vmd::{Reply, Request};
use libsg::wire::handover::Inheritance;
use libsg::wire::mending::Mending;
use libsg::wire::message::{Member, VmdReply, VmdRequest, VolumeInfo, VolumeState, encode};
use libsg::wire::parking::Parking;
use libsg::wire::{GetEntry, Header, IndexEntry, Kind, Status};

use super::copiers::{Stranger, next};
use super::support::{Client, PATIENCE, content, eventually, manifest, serve};

fn answer(channel: &Channel, header: Header, body: &[u8]) {
    let mut outbox = Outbox::new();
    outbox.push_frame(header, body, []).unwrap();
    // Whoever has hung up hears nothing.
    let _ = outbox.flush(channel, usize::MAX);
}

/// A member that takes a volume over, and then answers to pages with what `lie` makes of an answer.
fn liar(lie: fn(Header) -> Option<Header>) -> Stranger {
    Stranger::new("liar", move |channel: &Channel| {
        let mut inbox = Inbox::new();
        let done = encode(&VmdReply::Done).unwrap();
        let mut asked = 0;
        while let Some(header) = next(channel, &mut inbox) {
            match header.kind {
                // It has not heard of the volume.
                Kind::Vmd if asked == 0 => {
                    let status = Status::NoVolume;
                    answer(channel, Header { status, ..header.answer(Kind::VmdReply) }, &done);
                }
                Kind::Vmd => answer(channel, header.answer(Kind::VmdReply), &done),
                _ => match lie(header.answer(Kind::HandReply)) {
                    Some(lie) => answer(channel, lie, &[]),
                    None => return,
                },
            }
            asked += 1;
        }
    })
}

/// The first leaves, and somebody who lies is a member beside it; the pages are at the second then.
fn leaves_beside(liar: &Stranger) {
    let (leaves, takes) = (serve(|_| {}), serve(|config| config.name = "i2".into()));
    let mut client = Client::connect(&leaves, 5, 1);
    let members =
        vec![Member { node: leaves.node().clone(), address: leaves.address() }, liar.member.clone()];
    client.control(&VmdRequest::Create { manifest: manifest(1000), members }).unwrap();
    let placements = client.put(0..200).unwrap();
    let entry = |(page, at): (u32, Option<libsg::ids::Placement>)| {
        let checksum = Checksum::of(&content(VolumeId(5), page));
        IndexEntry::at(PageIndex(page), Round(0), at.unwrap(), checksum)
    };
    let entries: Vec<_> = (0..200).zip(placements).map(entry).collect();
    ask(&mut *client.link, Request::PutIndex(&entries), PATIENCE, |_| Ok(())).unwrap();
    client.control(&VmdRequest::Commit).unwrap();
    drop(client);
    let others = || vec![takes.address()];
    leaves.drain(&DrainOptions { timeout: PATIENCE, others: &others }).unwrap();
    leaves.shutdown();
    holds(&takes);
}

fn holds(server: &ServerHandle) {
    let mut client = Client::connect(server, 5, 1);
    let located = Request::Locate(PageRange::new(PageIndex(0), 200));
    let entries: Vec<IndexEntry> = ask(&mut *client.link, located, PATIENCE, |reply| match reply {
        Reply::Located(entries) => Ok(entries.to_vec()),
        other => panic!("{other:?}"),
    })
    .unwrap();
    let wanted: Vec<GetEntry> = entries
        .iter()
        .map(|entry| GetEntry { page: entry.page, placement: entry.placement.unwrap() })
        .collect();
    assert_eq!(wanted.len(), 200);
    for (get, got) in wanted.iter().zip(client.get(&wanted).unwrap()) {
        assert_eq!(got.unwrap(), content(VolumeId(5), get.page.0), "{}", get.page);
    }
}

#[test]
fn who_takes_over_and_lies_is_given_nothing_and_another_has_the_pages() {
    let lies: [fn(Header) -> Option<Header>; 6] = [
        // Of no page it says where it is.
        Some,
        |answer| Some(Header { kind: Kind::PutReply, ..answer }),
        |answer| Some(Header { sequence: libsg::ids::Sequence(answer.sequence.0 + 1), ..answer }),
        |answer| Some(Header { kind: Kind::Refused, status: Status::Busy, ..answer }),
        |answer| Some(Header { status: Status::Full, ..answer }),
        |_| None,
    ];
    for lie in lies {
        leaves_beside(&liar(lie));
    }
}

fn said(server: &ServerHandle) -> Inheritance {
    Inheritance {
        manifest: manifest(1000),
        members: vec![Member { node: server.node().clone(), address: server.address() }],
        committed: true,
        state: VolumeState::Parked,
        parking: Some(Parking { name: "web".into(), keeper: server.node().clone(), term: 1, arbiter: None }),
        owner: None,
        blob: None,
        copies: 1,
    }
}

#[test]
fn what_is_inherited_fits_what_is_known() {
    let server = serve(|_| {});
    let inherit = |volume: u128, epoch: u64, said: Inheritance| {
        Client::connect(&server, volume, epoch).control(&VmdRequest::Inherit(Box::new(said)))
    };
    inherit(1, 2, said(&server)).unwrap();
    inherit(1, 2, said(&server)).unwrap();
    let refused = |said| inherit(1, 2, said).unwrap_err().kind;
    assert_eq!(refused(Inheritance { manifest: manifest(999), ..said(&server) }), ErrorKind::Volume);
    assert_eq!(refused(Inheritance { members: Vec::new(), ..said(&server) }), ErrorKind::Volume);
    assert_eq!(refused(Inheritance { blob: Some((5, 6)), ..said(&server) }), ErrorKind::Protocol);
    // Pages and index entries of no volume, and beyond one.
    let mut client = Client::connect(&server, 1, 2);
    assert_eq!(client.put(0..1).unwrap().len(), 1, "its writer is at epoch 2");
    assert!(Client::connect(&server, 9, 1).put(0..1).is_err());
    client.control(&VmdRequest::Dissolve).unwrap();
    assert_eq!(
        inherit(1, 2, said(&server)).unwrap_err().kind,
        ErrorKind::Volume,
        "it does not come to life again"
    );
}

#[test]
fn one_that_leaves_and_nobody_to_take_over_takes_pages_again() {
    let server = serve(|_| {});
    let mut client = Client::create(&server, 1, 1000);
    client.check(0..10);
    client.control(&VmdRequest::Commit).unwrap();
    let nobody = Vec::new;
    let options = DrainOptions { timeout: Duration::from_millis(200), others: &nobody };
    assert!(server.drain(&options).is_err());
    client.check(10..20);
}

/// A member that knows a volume as `info` says, and answers to anything but control requests with what `lie` makes of it.
fn knows_and_lies(info: VolumeInfo, lie: fn(&Header) -> Option<Header>) -> Stranger {
    Stranger::new("liar", move |channel: &Channel| {
        let mut inbox = Inbox::new();
        let known = encode(&VmdReply::Volume(Box::new(info.clone()))).unwrap();
        while let Some(header) = next(channel, &mut inbox) {
            match header.kind {
                Kind::Vmd => answer(channel, header.answer(Kind::VmdReply), &known),
                _ => match lie(&header) {
                    Some(lie) => answer(channel, lie, &[]),
                    None => return,
                },
            }
        }
    })
}

/// Of three other members one is dead and one lies: the third gets a copy of every page.
fn mends_beside(lie: fn(&Header) -> Option<Header>) {
    let (mends, takes) = (serve(|_| {}), serve(|config| config.name = "i2".into()));
    let dead = serve(|config| config.name = "i3".into());
    let own = |server: &ServerHandle| Member { node: server.node().clone(), address: server.address() };
    let mut client = Client::connect(&mends, 5, 1);
    // What is said of it counts as it is, whoever the members are.
    client.control(&VmdRequest::Create { manifest: manifest(1000), members: vec![own(&mends)] }).unwrap();
    let Ok(VmdReply::Volume(info)) = client.control(&VmdRequest::Describe) else { panic!("it is known") };
    let mending = Mending::whole(2);
    let liar = knows_and_lies(
        VolumeInfo { members: vec![own(&mends); 4], committed: true, has_state: true, mending, ..*info },
        lie,
    );
    let members = vec![own(&mends), liar.member.clone(), own(&dead), own(&takes)];
    for server in [&mends, &takes] {
        let mut client = Client::connect(server, 5, 1);
        client.control(&VmdRequest::Create { manifest: manifest(1000), members: members.clone() }).unwrap();
        client.control(&VmdRequest::Copies(2)).unwrap();
        client.control(&VmdRequest::Commit).unwrap();
    }
    client.put(0..200).unwrap();
    drop((client, dead));
    eventually("copied", || takes.statistics().volumes[0].stored_pages == 200);
}

#[test]
fn who_lies_of_what_it_has_or_takes_is_passed_over_when_copies_are_made() {
    let lies: [fn(&Header) -> Option<Header>; 5] = [
        |_| None,
        |asked| Some(Header { kind: Kind::Refused, status: Status::Busy, ..asked.answer(Kind::Refused) }),
        |asked| Some(Header { count: 3, ..asked.answer(Kind::LocateReply) }),
        // It has nothing, and says of no page where it is.
        |asked| {
            Some(asked.answer(if asked.kind == Kind::Locate { Kind::LocateReply } else { Kind::HandReply }))
        },
        |asked| (asked.kind == Kind::Locate).then(|| asked.answer(Kind::LocateReply)),
    ];
    std::thread::scope(|scope| {
        for lie in lies {
            scope.spawn(move || mends_beside(lie));
        }
    });
}

#[test]
fn so_many_copies_as_there_can_be_are_asked_for_by_who_writes() {
    let server = serve(|_| {});
    let mut client = Client::create(&server, 1, 1000);
    client.control(&VmdRequest::Copies(8)).unwrap();
    for out_of_bounds in [0, 9, 255] {
        let mut client = Client::connect(&server, 1, 1);
        let refused = client.control(&VmdRequest::Copies(out_of_bounds)).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Protocol, "{refused:?}");
    }
    client.control(&VmdRequest::Claim { epoch: Epoch(2) }).unwrap();
    let refused = client.control(&VmdRequest::Copies(1)).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Fenced, "{refused:?}");
    let Ok(VmdReply::Volume(info)) = client.control(&VmdRequest::Describe) else { panic!("it is known") };
    assert_eq!(info.mending, Mending::whole(8));
}
