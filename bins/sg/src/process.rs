//! What the daemon asks of the system for itself: it holds the memory of other hosts' VMs.

use libsg::discovery::meter::available_bytes;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// No core dumps, no other user's debugger, more descriptors, and a place in the queue of the
/// out-of-memory killer, if one is given. What is refused is logged; the daemon serves without it.
pub fn settle(oom_score_adj: Option<i16>) {
    // First: a process that is not dumpable may no longer write its own files in /proc.
    if let Some(oom_score_adj) = oom_score_adj
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", oom_score_adj.to_string())
    {
        tracing::warn!(%error, oom_score_adj, "the out-of-memory score stays as it is (CAP_SYS_RESOURCE lowers it)");
    }
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, no_core) {
        tracing::warn!(%error, "core dumps cannot be switched off");
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "the process stays dumpable");
    }
    let files = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: files.maximum, maximum: files.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, current = ?files.current, "the limit of open files stays as it is");
    }
}

/// Warns when more memory is offered than is free: pages of strangers must not push this host into swap.
pub fn check_memory(offered_bytes: u64) {
    match available_bytes(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()) {
        Some(available) if offered_bytes > available => tracing::warn!(
            offered_bytes,
            available_bytes = available,
            "--memory is more than what is free now: this host would swap before the limit holds"
        ),
        Some(_) => {}
        None => tracing::warn!("/proc/meminfo does not say how much memory is free"),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:        8000000 kB\nMemAvailable:    1234 kB\n";
        assert_eq!(available_bytes(text), Some(1234 * 1024));
        assert_eq!(available_bytes("MemAvailable: lots\n"), None);
        assert_eq!(available_bytes(""), None);
    }
}
