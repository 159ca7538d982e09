//! Which volume is served: one that is made, one's own that is found again, or one that others write.

use std::net::SocketAddr;

use anyhow::{Result, bail};
use libsg::ids::{Epoch, MemberIndex, Placement, Round, VolumeId};
use libsg::limits::{NAME_BYTES_MAX, VOLUME_PAGES_MAX};
use libsg::manifest::{Manifest, Region};
use libsg::page::{InstallUnit, PAGE_BYTES_U64, PageIndex, PageRange};
use libsg::transport::WAIT_MAX;
use libsg::vmd::{Role, Vmd, VmdClient, Volume};
use libsg::wire::message::{VolumeInfo, VolumeState};
use libsg::{Error, ErrorKind};

use super::books::Books;
use super::shared::worn;
use super::table::{Known, Table};
use crate::cli::WrongArguments;

/// In the manifest of a volume that is a disk: nobody else writes that.
const DISK: &[u8] = b"sg nbd 1";

/// Members of one volume that a thread can wait for, beside its client and its waker.
const MEMBERS_MAX: usize = WAIT_MAX - 2;

/// A volume of one's own, with its books.
pub struct Opened {
    /// The volume.
    pub volume: Box<dyn Volume>,
    /// Its books.
    pub books: Books,
}

/// What is known of a volume before it is opened.
pub struct Found {
    /// What its members say, by their index; `None` of one that cannot be reached.
    infos: Vec<Option<VolumeInfo>>,
    /// As the member knows it that knows most.
    pub info: VolumeInfo,
}

fn chain(error: Error) -> anyhow::Error {
    anyhow::anyhow!("{}", error.chain())
}

/// Makes a volume, all zero.
///
/// # Errors
/// The name is taken, the size makes no sense, or nobody takes it.
pub fn create(vmd: &VmdClient, name: &str, bytes: u64, intermediaries: &[SocketAddr]) -> Result<Opened> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        let what = format!("--create takes a name of 1 to {NAME_BYTES_MAX} bytes without control characters");
        return Err(WrongArguments(what).into());
    }
    if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES_U64) || bytes / PAGE_BYTES_U64 > VOLUME_PAGES_MAX {
        return Err(
            WrongArguments(format!("--size {bytes}: a multiple of 4096, and less than 16 TiB")).into()
        );
    }
    let taken = named(vmd, name, intermediaries)?;
    if let Some(id) = taken.first() {
        bail!(
            "there is a volume {name:?} already ({id}): `sg nbd --volume {name}` serves it, `sg dissolve {id}` ends it"
        );
    }
    let region =
        Region { name: "disk".into(), guest_address: None, length_bytes: bytes, unit: InstallUnit::Page };
    let manifest =
        Manifest { vm: name.into(), regions: vec![region], vm_config: DISK.to_vec(), sharing: None };
    let id = VolumeId::random().map_err(chain)?;
    let volume = vmd.create(id, Epoch::FIRST, &manifest, intermediaries).map_err(chain)?;
    let alive = volume.alive();
    check_members(alive.len())?;
    let mut books = Books::new(Table::new(manifest.pages(), alive.len()), alive, Round(1));
    books.tell_all();
    Ok(Opened { volume, books })
}

/// The volumes that are called so.
fn named(vmd: &VmdClient, name: &str, intermediaries: &[SocketAddr]) -> Result<Vec<VolumeId>> {
    let mut found = Vec::new();
    let mut failed = None;
    let mut answered = false;
    for address in intermediaries {
        match vmd.statistics(*address) {
            Ok(statistics) => {
                answered = true;
                found.extend(
                    statistics.volumes.iter().filter(|volume| volume.vm == name).map(|volume| volume.volume),
                );
            }
            Err(error) => {
                tracing::warn!(%address, error = error.chain(), "an intermediary does not say what it holds");
                failed = Some(error);
            }
        }
    }
    if let Some(error) = failed.filter(|_| !answered) {
        return Err(chain(error));
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Finds a volume by its name or number.
///
/// # Errors
/// There is none, there are several, or (unless `degraded`) not all of its members can be reached.
pub fn find(vmd: &VmdClient, name: &str, intermediaries: &[SocketAddr], degraded: bool) -> Result<Found> {
    let ids = named(vmd, name, intermediaries)?;
    let id = match (ids.as_slice(), name.parse::<VolumeId>()) {
        ([id], _) => *id,
        ([], Ok(id)) => id,
        ([], Err(_)) => {
            bail!("no intermediary that answered knows a volume {name:?}: `sg ls` shows those there are")
        }
        (several, _) => {
            let several: Vec<String> = several.iter().map(ToString::to_string).collect();
            bail!("several volumes are called {name:?}; say which by its number: {}", several.join(", "))
        }
    };
    let volume = vmd.open(id, Role::Reader, intermediaries).map_err(chain)?;
    check_members(volume.members().len())?;
    let answers = volume.describe();
    for (member, answer) in volume.members().iter().zip(&answers) {
        if let Err(error) = answer {
            let what = format!(
                "intermediary {} at {} cannot be reached: {}",
                member.node,
                member.address,
                error.chain()
            );
            if !degraded {
                bail!(
                    "{what}\nIts blocks would fail to be read, and what only it knows be missed; --degraded goes on without it"
                );
            }
            tracing::warn!("{what}: going on without it");
        }
    }
    let infos: Vec<Option<VolumeInfo>> = answers.into_iter().map(Result::ok).collect();
    let newest = infos.iter().flatten().max_by_key(|info| (info.epoch, info.members.len()));
    let Some(info) = newest.cloned() else { bail!("no intermediary of volume {id} can be reached") };
    if info.state == VolumeState::Dissolved {
        bail!("volume {id} was dissolved");
    }
    Ok(Found { infos, info })
}

fn check_members(members: usize) -> Result<()> {
    if members > MEMBERS_MAX {
        return Err(WrongArguments(format!("{members} intermediaries, more than {MEMBERS_MAX}")).into());
    }
    Ok(())
}

impl Found {
    /// Whether it was made by `--create`, and may be written.
    pub fn is_disk(&self) -> bool {
        self.info.manifest.vm_config == DISK
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        u64::from(self.info.manifest.pages()) * PAGE_BYTES_U64
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.info.members.iter().map(|member| member.address).collect()
    }

    /// Opens it to be read.
    ///
    /// # Errors
    /// It is gone.
    pub fn view(&self, vmd: &VmdClient) -> Result<Box<dyn Volume>> {
        vmd.open(self.info.volume, Role::Reader, &self.addresses()).map_err(chain)
    }

    /// Opens it to be written: whoever wrote it until now is refused from then on.
    ///
    /// # Errors
    /// Somebody else is faster, or its rounds are used up.
    pub fn own(&self, vmd: &VmdClient) -> Result<Opened> {
        let epoch = Epoch(self.info.epoch.0 + 1);
        let volume = vmd.open(self.info.volume, Role::Writer(epoch), &self.addresses()).map_err(chain)?;
        match volume.succeed(epoch) {
            Err(error) if error.kind == ErrorKind::Fenced => {
                bail!("somebody else has just opened the volume for writing: {}", error.chain())
            }
            other => other.map_err(chain)?,
        };
        let alive: Vec<bool> = self.infos.iter().map(Option::is_some).collect();
        let books = read_books(&*volume, self.info.manifest.pages(), alive)?;
        Ok(Opened { volume, books })
    }
}

/// Reads where every page is, after older writers are shut out.
fn read_books(volume: &dyn Volume, pages: u32, alive: Vec<bool>) -> Result<Books> {
    let mut table = Table::new(pages, alive.len());
    let (mut newest, mut next, mut lost) = (Round(0), 0, 0_u64);
    let away = |placement: &Placement| alive.get(placement.member.as_usize()) != Some(&true);
    let mut visit = |entry: &libsg::wire::IndexEntry| {
        newest = newest.max(entry.round);
        lost += lose(&mut table, next, entry.page.0);
        next = entry.page.0 + entry.run_pages;
        if let Some(placement) = entry.placement {
            lost += u64::from(away(&placement));
            table.set(entry.page, Known::At(placement, entry.checksum));
        }
        Ok(())
    };
    volume.scan(&mut visit).map_err(chain)?;
    lost += lose(&mut table, next, pages);
    if lost > 0 {
        tracing::warn!(
            lost_pages = lost,
            "blocks went with intermediaries: reading them fails until they are written"
        );
    }
    let round = newest.0.checked_add(1).ok_or_else(|| chain(worn()))?;
    let gone: Vec<usize> = (0..alive.len()).filter(|at| !alive[*at]).collect();
    let mut books = Books::new(table, alive, Round(round));
    gone.into_iter().for_each(|at| books.tell_of(MemberIndex(at as u16)));
    Ok(books)
}

/// Pages of which nobody knows anything, in a volume of which every page was told at first.
fn lose(table: &mut Table, first: u32, end: u32) -> u64 {
    let missing = PageRange::new(PageIndex(first), end.saturating_sub(first));
    for page in missing.iter() {
        table.set(page, Known::Lost);
    }
    u64::from(missing.pages)
}
