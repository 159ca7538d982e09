//! Socket and timer settings that pacing and urgency rest on.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsFd;

use socket2::{Domain, SockRef};

/// `SO_PRIORITY` of urgent connections: `TC_PRIO_INTERACTIVE`, band 0 of `pfifo_fast` and `prio`. Higher
/// ones need `CAP_NET_ADMIN`.
const PRIORITY_URGENT: u32 = 6;

/// `SO_PRIORITY` of bulk connections: `TC_PRIO_BULK`, the last band.
const PRIORITY_BULK: u32 = 2;

/// How far from its time a pacing thread's sleep may end; the kernel's default is 50 µs, a third of a slice.
const TIMER_SLACK_NS: u64 = 1_000;

/// Differentiated-services code points in use, as the upper six bits of the TOS / traffic-class byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dscp {
    /// Expedited forwarding: a page that a guest waits for.
    Expedited = 46,
    /// Class selector 1: background bulk.
    Background = 8,
}

/// Prepares a connection on which a guest's faults travel: no batching of small writes, ahead of bulk
/// wherever a queue on the way looks at priority or DSCP.
///
/// # Errors
/// The socket is not TCP.
pub fn mark_urgent(socket: impl AsFd) -> io::Result<()> {
    mark(SockRef::from(&socket), PRIORITY_URGENT, Dscp::Expedited)
}

/// Prepares a bulk connection: it is paced by us in whole slices, so nothing is gained by holding back a
/// short segment; behind everything else wherever a queue looks at priority or DSCP.
///
/// # Errors
/// The socket is not TCP.
pub fn mark_bulk(socket: impl AsFd) -> io::Result<()> {
    mark(SockRef::from(&socket), PRIORITY_BULK, Dscp::Background)
}

fn mark(socket: SockRef<'_>, priority: u32, dscp: Dscp) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let class = u32::from(dscp as u8) << 2;
    if socket.domain()? == Domain::IPV6 {
        socket.set_tclass_v6(class)?;
        // An IPv4 peer over a dual-stack socket; refused on a socket that is IPv6 only, where it is not needed.
        let _ = socket.set_tos_v4(class);
    } else {
        socket.set_tos_v4(class)?;
    }
    // After the TOS, which sets a priority of its own.
    socket.set_priority(priority)
}

/// Acknowledges what came at once. The kernel leaves this mode by itself: call it after each read of
/// bulk. A delayed acknowledgement looks like a queue to the sender.
///
/// # Errors
/// The socket is not TCP.
pub fn quick_ack(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket).set_tcp_quickack(true)
}

/// Chooses the congestion control by its kernel name (`cubic`, `bbr`).
///
/// # Errors
/// The kernel does not have it, or does not allow it to this process.
pub fn set_congestion(socket: impl AsFd, name: &str) -> io::Result<()> {
    SockRef::from(&socket).set_tcp_congestion(name.as_bytes())
}

/// Makes the calling thread's sleeps end on time: threads that pace, or that a guest waits for, call it
/// once when they start. They sleep nearly always; what they need is to run at once when they wake,
/// before threads that compute. Where the process may not raise its priority, or has a higher one, that part is left out.
///
/// # Errors
/// The kernel refuses precise timers; sleeps are then up to 50 µs late, and still right.
pub fn precise_timers() -> io::Result<()> {
    // Linux counts niceness by thread, whatever POSIX says: setpriority(2).
    let this = Some(rustix::thread::gettid());
    if rustix::process::getpriority_process(this).is_ok_and(|niceness| niceness > PROMPT_NICENESS) {
        let _ = rustix::process::setpriority_process(this, PROMPT_NICENESS);
    }
    Ok(rustix::thread::set_current_timer_slack(NonZeroU64::new(TIMER_SLACK_NS))?)
}

/// Niceness of threads that pace: before everything ordinary, behind what is really urgent to the system.
const PROMPT_NICENESS: i32 = -10;

#[cfg(test)]
mod test {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn marked(address: &str) {
        let listener = TcpListener::bind(address).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        mark_bulk(&stream).unwrap();
        assert_eq!(SockRef::from(&stream).priority().unwrap(), PRIORITY_BULK);
        mark_urgent(&stream).unwrap();
        let socket = SockRef::from(&stream);
        assert_eq!(socket.priority().unwrap(), PRIORITY_URGENT);
        assert!(stream.nodelay().unwrap());
        if socket.domain().unwrap() == Domain::IPV6 {
            assert_eq!(socket.tclass_v6().unwrap(), 46 << 2);
        } else {
            assert_eq!(socket.tos_v4().unwrap(), 46 << 2);
        }
        quick_ack(&stream).unwrap();
        set_congestion(&stream, "reno").unwrap();
        assert!(set_congestion(&stream, "no such").is_err());
    }

    #[test]
    fn a_thread_that_is_to_be_prompt_is_so_no_less_than_before() {
        let this = Some(rustix::thread::gettid());
        let niceness = || rustix::process::getpriority_process(this).unwrap();
        let (before, raised) = (niceness(), PROMPT_NICENESS - 5);
        precise_timers().unwrap();
        assert!(niceness() <= before);
        // Only who may raise it has a higher one.
        if rustix::process::setpriority_process(this, raised).is_ok() {
            precise_timers().unwrap();
            assert_eq!(niceness(), raised);
        }
    }

    #[test]
    fn connections_carry_their_marks() {
        marked("127.0.0.1:0");
        // A host may have IPv6 switched off; then there is nothing to mark.
        if TcpListener::bind("[::1]:0").is_ok() {
            marked("[::1]:0");
        }
    }
}
