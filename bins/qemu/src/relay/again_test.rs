//! A relay in the place of one that died: the source is played.

use std::sync::mpsc::channel;

use libsg::source::Outcome;
use qemu_stream::{AnswerItem, Configuration, END_OF_STREAM, Records};

use super::recovery_test::{Driven, Told, goes_on, pages, received, set};
use super::test::{HUGE, PATIENCE, RAM, Source, all, blocks, byte_of, failure};
use super::*;

fn again(is_spent: bool) -> Relay {
    let layout = Layout::new(blocks());
    let configuration = Configuration::new("pc-q35-7.2");
    let manifest = layout.manifest("web", (&configuration, 2), &Devices::default()).expect("a manifest");
    Relay::again(&manifest, Limits::of_window(256 << 20), is_spent).expect("of a QEMU")
}

#[test]
fn what_is_safe_does_not_come_and_the_rest_does() {
    let relay = again(false);
    assert_eq!(relay.presence().expect("no failure").count(), 16 + 1024);
    relay.outcome(pages(0, 6), Outcome::Safe);
    relay.outcome(pages(16, 512), Outcome::Safe);
    // The guest waits for pages, some of them of no interest by then.
    for page in [2, 9] {
        relay.want(PageIndex(page)).expect("nobody is asked yet");
    }
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let ((told, heard), (next, given)) = (channel(), channel());
    next.send(theirs).expect("taken");
    relay.flow(Box::new(Driven { told, next: given })).expect("flows");
    let mut source = Source { connection: ours, records: Records::new(2), blocks: blocks() };
    assert_eq!(set(&received(&mut source, RAM)), (0..6).collect::<Vec<_>>());
    assert_eq!(set(&received(&mut source, HUGE)), (0..512).collect::<Vec<_>>());
    assert!(heard.iter().any(|told| told == Told::Resume));
    goes_on(&mut source);
    let AnswerItem::Answer(Answer::RequestPages { block, span }) = source.answers(1)[0] else {
        panic!("the guest waits");
    };
    assert_eq!((block, span.start_bytes), (RAM, 9 << 12));
    source.pages(RAM, (6..16).map(|page| (page, (page != 7).then_some(page as u8))), false);
    source.pages(HUGE, (512..1024).map(|page| (page, Some(3))), true);
    source.say(&[END_OF_STREAM]);
    let told: u32 = all(&relay).iter().map(|run| run.pages).sum();
    assert_eq!(told, 10 + 512);
    assert_eq!([6, 7, 15, 16 + 600].map(|page| byte_of(&relay, page)), [6, 0, 15, 3]);
    assert!(relay.slice(pages(0, 1)).is_err(), "it is elsewhere");
    assert_eq!(relay.resumed(), 1);
    relay.release(PATIENCE).expect("let go");
}

#[test]
fn a_source_that_does_not_go_on_keeps_what_is_not_safe() {
    let relay = again(false);
    let ((told, _heard), (_next, given)) = (channel(), channel());
    relay.flow(Box::new(Driven { told, next: given })).expect("tries");
    let failed = failure(&relay);
    assert!(failed.message.contains("do not end it"), "{failed}");
}

/// It has said everything: all is safe, or it is lost.
#[test]
fn a_source_that_has_said_everything_is_asked_for_nothing() {
    for all_safe in [true, false] {
        let relay = again(true);
        relay.outcome(pages(0, 16), Outcome::Safe);
        relay.outcome(pages(16, if all_safe { 1024 } else { 1000 }), Outcome::Safe);
        let ((told, heard), (_next, given)) = (channel(), channel());
        let flows = relay.flow(Box::new(Driven { told, next: given }));
        assert!(heard.try_recv().is_err(), "it is not driven");
        if all_safe {
            flows.expect("nothing is to come");
            assert_eq!(all(&relay), []);
        } else {
            assert_eq!(flows.expect_err("they are gone").kind, ErrorKind::Lost);
            assert_eq!(failure(&relay).kind, ErrorKind::Lost);
        }
    }
}
