//! Which hosts gain by files, and that a page is taken by one, against a model.

use proptest::prelude::*;

use super::*;

fn range(first: u32, pages: u32) -> PageRange {
    PageRange::new(PageIndex(first), pages)
}

#[test]
fn hosts_that_gain_by_files_are_told_apart() {
    assert!(!has_large_folios("always within_size advise [never] deny force\n"));
    assert!(!has_large_folios("always within_size [advise] never deny force\n"), "a write has no advice");
    assert!(has_large_folios("always [within_size] advise never deny force\n"));
    assert!(has_large_folios("[always] within_size advise never deny force\n"));
    assert!(!has_large_folios(""));
    let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
    assert!(!has_swap("") && !has_swap(head));
    assert!(has_swap(&format!("{head}/swapfile file 1048572 0 -2\n")));
}

#[derive(Clone, Copy, Debug)]
enum Call {
    Take,
    Settle,
    GiveBack,
    Forget,
}

proptest! {
    /// Beside a list of what each page is: free, taken, there.
    #[test]
    fn a_page_is_taken_by_one_and_never_when_it_is_there(
        calls in prop::collection::vec(
            (
                prop::sample::select(vec![Call::Take, Call::Take, Call::Settle, Call::GiveBack, Call::Forget]),
                0_u32..200,
                1_u32..150,
            ),
            1..60,
        ),
    ) {
        const FIRST: u32 = 1000;
        const PAGES: u32 = 200;
        let book = Book::new(range(FIRST, PAGES));
        let (mut taken, mut there) = ([false; PAGES as usize], [false; PAGES as usize]);
        for (call, at, pages) in calls {
            let pages = pages.min(PAGES - at);
            let part = at as usize..(at + pages) as usize;
            let of = range(FIRST + at, pages);
            match call {
                Call::Take => {
                    let free = taken[part.clone()].iter().take_while(|taken| !**taken).count();
                    let want = match free {
                        0 if there[part.start] => Taken::There,
                        0 => Taken::Busy,
                        free => Taken::Run(free as u32),
                    };
                    prop_assert_eq!(book.take(of), want);
                    taken[part.start..part.start + free].fill(true);
                }
                // Of what somebody has taken, as those who do it have.
                Call::Settle | Call::GiveBack => {
                    for page in part.filter(|page| taken[*page] && !there[*page]).collect::<Vec<_>>() {
                        let of = range(FIRST + page as u32, 1);
                        if matches!(call, Call::Settle) {
                            book.settle(of);
                            there[page] = true;
                        } else {
                            book.give_back(of);
                            taken[page] = false;
                        }
                    }
                }
                Call::Forget => {
                    book.forget(of);
                    for page in part.filter(|page| there[*page]).collect::<Vec<_>>() {
                        (taken[page], there[page]) = (false, false);
                    }
                }
            }
            for (page, there) in there.iter().enumerate() {
                prop_assert_eq!(book.is_there(PageIndex(FIRST + page as u32)), *there);
            }
        }
    }
}

#[test]
fn a_part_that_was_done_is_kept_and_the_rest_given_back() {
    let book = Book::new(range(0, 128));
    for (step, there, next) in [
        (Step::Done(3 * PAGE_BYTES), 3, Taken::Run(97)),
        (Step::Present, 1, Taken::Run(96)),
        (Step::Again, 0, Taken::Run(96)),
        (Step::Failed(io::ErrorKind::OutOfMemory.into()), 0, Taken::Run(96)),
    ] {
        let first = (0..128).find(|page| !book.is_there(PageIndex(*page))).expect("some");
        let all = range(first, 100 - first);
        assert_eq!(book.take(all), Taken::Run(all.pages));
        assert_eq!(book.take(all), Taken::Busy);
        book.after(all, &step);
        let behind = range(first + there, all.pages - there);
        assert_eq!(book.take(behind), next, "{step:?}");
        book.give_back(behind);
    }
    assert_eq!(book.take(range(0, 9)), Taken::There);
}

#[test]
fn regions_without_files_have_no_book() {
    let landing = Landing(vec![Book::new(range(10, 5)), Book::new(range(20, 1))]);
    for (page, has) in [(9, false), (10, true), (14, true), (15, false), (20, true), (21, false)] {
        assert_eq!(landing.of(PageIndex(page)).is_some(), has, "{page}");
    }
}
