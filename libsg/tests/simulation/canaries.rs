//! Bugs put in on purpose: each must be found within a thousand seeds.

use libsg::host::simulation::Bug;

use crate::seeds::find;

/// A test for each bug, with what it is found as.
macro_rules! canaries {
    ($($name:ident: $bug:ident, $($says:literal),+;)+) => {
        $(#[test]
        fn $name() {
            find(Bug::$bug, &[$($says),+]);
        })+
    };
}

canaries! {
    an_index_entry_is_awaited: IndexNotAwaited, "evicted means evicted", "a death is an event";
    an_index_entry_is_kept: IndexNotKept, "evicted means evicted", "a death is an event";
    evicted_is_not_told_early: EvictedEarly, "is not safe";
    a_checksum_is_compared: ChecksumIgnored, "each page is right";
    a_page_is_installed_once: InstalledTwice, "install once";
    stock_is_taken_of_a_paused_vm: StockBeforePause, "each page is right", "evicted means evicted";
    nothing_runs_without_commit: RunsWithoutCommit, "one owner";
    nothing_runs_again_after_commit: ResumesAfterCommit, "one owner";
    direct_goes_first: DirectLast, "direct first";
    faults_are_asked_for: FaultsWait, "faults overtake";
    a_death_is_an_event: DeathForgotten, "evicted means evicted", "a death is an event", "no tail";
    a_loss_is_told: LossNotTold, "each page is right", "faults overtake", "a death is an event";
    what_is_late_is_hedged: LateNotHedged, "no tail";
    what_was_in_flight_is_sent_again: FlightForgotten, "no tail", "a death is an event";
    a_newer_round_wins: OlderRoundWins, "each page is right", "evicted means evicted";
    what_is_out_of_date_is_taken_out: StaleKept, "each page is right";
    the_final_set_is_named: FinalSetUnnamed, "each page is right", "evicted means evicted";
    what_was_written_last_is_sent: WriteMissed, "each page is right", "evicted means evicted";
    what_was_torn_is_sent_again: TornKept, "each page is right", "evicted means evicted";
    a_unit_is_stored_whole: UnitHalfStored, "evicted means evicted";
    who_comes_later_gets_copies: JoinedInVain, "evicted means evicted", "a death is an event";
    who_is_added_is_known: MemberUnknown, "evicted means evicted";
    volumes_are_told_apart: VolumesMixed, "each page is right", "evicted means evicted", "a death is an event";
    a_copy_is_awaited: CopyNotAwaited, "evicted means evicted", "a death is an event";
    a_reference_has_copies: ReferenceAlone, "evicted means evicted", "a death is an event";
    a_limit_holds: LimitIgnored, "limits hold";
    strangers_stay_out: SecretIgnored, "strangers";
    a_vm_that_stays_runs_on: LeftPaused, "without COMMIT the VM does not run on";
    who_was_replaced_is_refused: EpochIgnored, "epochs";
    an_index_keeps_the_newest_round: OlderRoundIndexed, "rounds", "each page is right", "evicted means evicted";
    a_slot_is_used_again_under_a_new_generation: GenerationKept, "generations";
}
