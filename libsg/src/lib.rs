//! libsg: scatter-gather live migration.
//!
//! Evicts running VMs from a host at the speed of its own link, however slow the destination is.
//! The modules are listed in the order in which a page meets them.
//!
//! ```text
//!   SOURCE                        INTERMEDIARIES                  DESTINATION
//!   guest memory                                                  guest memory (uffd)
//!     | source::PageSource                                          ^ sink::PageSink
//!   scatter ---- direct, and pages that the guest waits for ----> gather
//!     |                                                             ^
//!     +--------- vmd (over wire) --> server: content, index --------+
//!
//!   migrate: who calls what when;  pace: nobody sends more than the link carries without a queue
//! ```
//!
//! A VMM links it to both ends of a migration and starts at [`migrate`]; `examples/tiny_vmm.rs` is one
//! of under 200 lines. An intermediary is a [`server::Server`]. Tools that look at volumes, or keep pages
//! there for other reasons, use [`vmd::Vmd`]:
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use libsg::ids::{Checksum, Epoch, Round, VolumeId};
//! use libsg::manifest::{Manifest, Region};
//! use libsg::memory::PageSlice;
//! use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
//! use libsg::server::{Config, Server};
//! use libsg::transport::PoolSecret;
//! use libsg::vmd::{Fetched, PagePut, TcpConnector, Vmd, VmdClient};
//!
//! # fn main() -> libsg::Result<()> {
//! // An intermediary that lends 16 MiB.
//! let secret = PoolSecret::from_bytes(b"of this pool")?;
//! let config = Config::new(([127, 0, 0, 1], 0).into(), "i1", 16 << 20, secret.clone());
//! let server = Server::bind(config)?.spawn()?;
//!
//! // A volume of 4 MiB there, and a page on it.
//! let name = "ram".to_owned();
//! let ram = Region { name, guest_address: None, length_bytes: 4 << 20, unit: InstallUnit::Page };
//! let manifest = Manifest { vm: "vm".into(), regions: vec![ram], vm_config: vec![], sharing: None };
//! let vmd = VmdClient::new(Arc::new(TcpConnector::new(secret)), Duration::from_secs(5));
//! let volume = vmd.create(VolumeId::random()?, Epoch::FIRST, &manifest, &[server.address()])?;
//! let bytes = vec![7; PAGE_BYTES];
//! volume.put(
//!     &[PagePut {
//!         page: PageIndex(3),
//!         round: Round(0),
//!         checksum: Checksum::of(&bytes),
//!         bytes: PageSlice::owned(bytes.clone().into()),
//!     }],
//!     1,
//! )?;
//!
//! // Whoever knows the index finds it again.
//! let found = volume.locate(PageRange::new(PageIndex(0), 1024))?;
//! assert_eq!(volume.get(&found)?, [Fetched::Bytes(bytes.into())]);
//! volume.dissolve()?;
//! # Ok(())
//! # }
//! ```

pub mod page;
mod crc;
pub mod ids;
pub mod limits;
pub mod error;
pub mod content;
pub mod manifest;
pub mod latency;
pub mod event;
pub mod report;
pub mod usage;
pub mod host;
pub mod memory;
pub mod source;
pub mod sink;
pub mod dirty;
pub mod uffd;
pub mod units;
pub mod wire;
pub mod pace;
pub mod transport;
pub mod vmd;
pub mod scatter;
pub mod gather;
pub mod server;
pub mod discovery;
pub mod migrate;

pub use error::{Error, ErrorKind, Result};
