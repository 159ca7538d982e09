//! The pool of hosts that this VMM hears: whom a VM's memory goes to is chosen among them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libsg::discovery::Hears;
use libsg::discovery::meter::Meter;
use libsg::discovery::select::{Need, Selection, Verdict, ZoneRule, replacement, select};
use libsg::ids::{NodeId, random_bytes};
use libsg::migrate::{PoolSecret, Replacements, Vacancy};
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use libsg::{Error, ErrorKind, Result};
use pools::Meeting;
use serde_json::{Value, json};

/// How this VMM takes part in a pool.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Where the hosts of the pool announce themselves.
    pub meeting: Meeting,
    /// The zone of this host.
    pub zone: Option<String>,
    /// What its link carries, in bytes a second; what the interface says where it is not said.
    pub link_bytes_per_s: Option<u64>,
}

/// Hears who is there, and says that VMs leave this host while one does.
pub struct PoolView {
    announcer: Box<dyn Hears>,
    leaving: Arc<AtomicBool>,
    own: IpAddr,
    zone: Option<String>,
    link_bytes_per_s: u64,
}

/// Whom a VM's memory goes to, and why.
pub struct Choice {
    /// The intermediaries.
    pub addresses: Vec<SocketAddr>,
    /// What an operator is told.
    pub told: Value,
    /// What the VM needs, for those who are chosen later.
    need: Need,
}

/// Chooses others in the place of those that die on the way.
struct Others {
    pool: Arc<PoolView>,
    need: Need,
}

impl Replacements for Others {
    fn replacement(&self, vacancy: &Vacancy<'_>) -> Option<SocketAddr> {
        let mut hosts = self.pool.announcer.hosts();
        // Those that died may be announced for a while yet.
        hosts.retain(|host| {
            let is_gone = vacancy.gone.iter().any(|member| member.node == host.node);
            !is_gone && !vacancy.tried.contains(&host.address)
        });
        let living: Vec<NodeId> = vacancy.living.iter().map(|member| member.node.clone()).collect();
        let at = replacement(&hosts, &self.need, &living, &vacancy.dead.node)?;
        Some(hosts[at].address)
    }
}

impl PoolView {
    /// Joins the pool, under the VM's name.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the pool cannot be joined.
    pub fn join(membership: &Membership, secret: &PoolSecret, vm: &str) -> Result<Self> {
        let own = membership.meeting.own_address()?;
        let interface = match own {
            IpAddr::V4(own) => own,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let mut meter = Meter::new(interface, membership.link_bytes_per_s);
        let link_bytes_per_s = meter.measure().link.bytes_per_s;
        let mut name: String = format!("vmm {vm}");
        while name.len() > libsg::limits::NODE_NAME_BYTES_MAX {
            name.pop();
        }
        let node = NodeId { name, incarnation: u64::from_le_bytes(random_bytes()?) };
        let leaving = Arc::new(AtomicBool::new(false));
        let (source, zone) = (Arc::clone(&leaving), membership.zone.clone());
        // It lends nothing: nobody takes it for an intermediary.
        let describe = move || Announcement {
            node: node.clone(),
            address: SocketAddr::new(own, 0),
            zone: zone.clone(),
            duty: if source.load(Ordering::Relaxed) { Duty::Source } else { Duty::Lends },
            transports: Transports::TCP,
            memory: MemoryRoom::default(),
            link: LinkRoom::default(),
            cpu_idle_permille: 0,
            connections_free: 0,
            volumes_free: 0,
        };
        let announcer = membership.meeting.join(secret, Box::new(describe))?;
        Ok(Self { announcer, leaving, own, zone: membership.zone.clone(), link_bytes_per_s })
    }

    /// Says whether a VM is leaving this host. Others then take no node of it.
    pub fn set_leaving(&self, leaving: bool) {
        self.leaving.store(leaving, Ordering::Relaxed);
        self.announcer.announce();
    }

    /// Chooses for a VM of so many bytes, in so many copies, that goes to that host, or to none yet.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no random bytes.
    pub fn choose(
        &self,
        (bytes, copies): (u64, u8),
        to: Option<SocketAddr>,
        evacuate: bool,
    ) -> Result<Choice> {
        let hosts = self.announcer.hosts();
        let there = || hosts.iter().filter(|host| to.is_some_and(|to| host.address.ip() == to.ip()));
        // A VMM that waits there says in which zone, one that lends memory also what the link has free.
        let link = there().map(|host| &host.link).find(|link| link.bytes_per_s > 0);
        let takes = link.map_or(self.link_bytes_per_s, |link| link.free_in_bytes_per_s);
        let need = Need {
            source_zone: self.zone.clone(),
            destination_zone: there().find_map(|host| host.zone.clone()),
            zones: if evacuate { ZoneRule::Evacuate } else { ZoneRule::Prefer },
            never: to.iter().map(SocketAddr::ip).chain([self.own]).collect(),
            copies,
            ..Need::new(bytes, self.link_bytes_per_s, takes, u64::from_le_bytes(random_bytes()?))
        };
        let selection = select(&hosts, &need);
        let addresses = selection.members.iter().map(|at| hosts[*at].address).collect();
        Ok(Choice { addresses, told: told(&hosts, &selection), need })
    }

    /// Chooses others in the place of those of a choice that die.
    #[must_use]
    pub fn replacements(self: &Arc<Self>, choice: &Choice) -> Arc<dyn Replacements> {
        Arc::new(Others { pool: Arc::clone(self), need: choice.need.clone() })
    }
}

fn told(hosts: &[Announcement], selection: &Selection) -> Value {
    let host = |(host, verdict): (&Announcement, &Verdict)| {
        json!({
            "id": host.node.to_string(),
            "address": host.address.to_string(),
            "zone": host.zone,
            "taken": matches!(verdict, Verdict::Taken { .. }),
            "why": verdict.to_string(),
        })
    };
    // Other VMMs are there as well.
    let lending = hosts.iter().zip(&selection.verdicts).filter(|(host, _)| host.address.port() != 0);
    json!({
        "fits": selection.fits(),
        "lacks": selection.lacks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "eviction_s": selection.eviction.map(|time| time.as_secs_f64()),
        "total_migration_s": selection.total.map(|time| time.as_secs_f64()),
        "nodes": lending.map(host).collect::<Vec<_>>(),
    })
}

/// No pool was joined.
#[must_use]
pub fn none() -> Error {
    Error::new(
        ErrorKind::Input,
        "\"pool\" needs a VMM that was started with --pool multicast:GROUP or etcd://HOST/PREFIX",
    )
}
