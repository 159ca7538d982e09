//! How a VM that is to leave is driven.

use std::path::{Path, PathBuf};

use vmms::{ControlSocket, Vmm};

use super::qemu::Leaver;

/// What drives a VM.
#[derive(Clone)]
pub enum Driven {
    /// Its VMM does, which is told by its control socket.
    Control(PathBuf),
    /// This process does, with a stock QEMU.
    Qemu(Leaver),
}

impl Driven {
    /// The socket by which it is known.
    pub fn socket(&self) -> &Path {
        match self {
            Self::Control(path) => path,
            Self::Qemu(leaver) => leaver.socket(),
        }
    }

    /// Who is told. Each has a connection of its own, where one is needed.
    pub fn vmm(&self) -> Box<dyn Vmm> {
        match self {
            Self::Control(path) => Box::new(ControlSocket::new(path)),
            Self::Qemu(leaver) => Box::new(leaver.clone()),
        }
    }

    /// It is a QEMU's.
    pub fn qemu(&self) -> Option<&Leaver> {
        match self {
            Self::Control(_) => None,
            Self::Qemu(leaver) => Some(leaver),
        }
    }
}
