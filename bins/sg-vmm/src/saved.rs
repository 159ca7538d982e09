//! The VM's state as bytes: opaque to libsg, checked from end to end before anything is used.

use libsg::ids::Checksum;
use libsg::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::clock::Instants;
use crate::vcpu::SavedVcpu;

/// "SGVM", then the version of what follows.
const MAGIC: [u8; 8] = *b"SGVM\x01\0\0\0";
/// Magic and checksum.
const HEAD_BYTES: usize = 12;

/// Writes the checksum of what is behind the head into it.
fn seal(bytes: &mut [u8]) {
    let sum = Checksum::of(&bytes[HEAD_BYTES..]).0;
    bytes[MAGIC.len()..HEAD_BYTES].copy_from_slice(&sum.to_le_bytes());
}

/// Since when rate and longest pause are measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// `CLOCK_MONOTONIC`; 0 = not begun.
    pub since_ns: u64,
    /// Operations before it.
    pub ops: u64,
}

/// Everything of a VM beside its memory.
#[derive(Serialize, Deserialize)]
pub struct SavedVm {
    /// Each vCPU.
    pub vcpus: Vec<SavedVcpu>,
    /// The window at that time.
    pub window: Window,
    /// Pages filled before the first start.
    pub fill_pages: u64,
    /// Mismatches that VMMs found.
    pub host_mismatches: u64,
    /// When the state was taken: what its times are relative to.
    pub taken: Instants,
}

impl SavedVm {
    /// A state taken now.
    #[must_use]
    pub fn new(vcpus: Vec<SavedVcpu>, window: Window, fill_pages: u64, host_mismatches: u64) -> Self {
        Self { vcpus, window, fill_pages, host_mismatches, taken: Instants::now() }
    }

    /// As bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when the state is larger than libsg carries.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[0; HEAD_BYTES - MAGIC.len()]);
        let mut bytes = postcard::to_extend(self, bytes)
            .map_err(|e| Error::new(ErrorKind::Vm, "the VM's state cannot be encoded").because(e))?;
        seal(&mut bytes);
        if bytes.len() > libsg::limits::STATE_BYTES_MAX {
            return Err(Error::new(ErrorKind::Vm, "the VM's state is too large"));
        }
        Ok(bytes)
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when they are not a whole, unharmed state of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let refuse = |why: &str| Error::new(ErrorKind::Vm, format!("the VM's state cannot be loaded: {why}"));
        let (head, body) = bytes.split_at_checked(HEAD_BYTES).ok_or_else(|| refuse("too short"))?;
        let (magic, sum) = head.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(refuse("not a state of this version of sg-vmm"));
        }
        if sum != Checksum::of(body).0.to_le_bytes() {
            return Err(refuse("its checksum differs"));
        }
        match postcard::take_from_bytes(body) {
            Ok((saved, [])) => Ok(saved),
            Ok(_) => Err(refuse("bytes are left over")),
            Err(error) => Err(refuse("malformed").because(error)),
        }
    }
}

#[cfg(test)]
pub mod test {
    //! A state comes from a peer: whatever its bytes are, they are a state or refused.

    use proptest::prelude::*;

    use super::*;

    /// These bytes behind a head that is right.
    pub fn sealed(body: &[u8]) -> Vec<u8> {
        let mut bytes = [&MAGIC[..], &[0; HEAD_BYTES - MAGIC.len()], body].concat();
        seal(&mut bytes);
        bytes
    }

    /// What a state is behind its head.
    pub fn body(state: &[u8]) -> &[u8] {
        &state[HEAD_BYTES..]
    }

    /// Refused, or a state that is the same when it is written again.
    fn decoded(bytes: &[u8]) {
        match SavedVm::decode(bytes) {
            Ok(saved) => {
                let again = saved.encode().expect("it was one");
                let saved = SavedVm::decode(&again).expect("it is one");
                assert_eq!(saved.encode().expect("it was one"), again);
            }
            Err(error) => assert_eq!(error.kind, ErrorKind::Vm),
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(SavedVm::decode(&bytes).is_err());
        }

        #[test]
        fn garbage_under_a_right_checksum_is_a_state_or_refused(body in prop::collection::vec(any::<u8>(), 0..4096)) {
            decoded(&sealed(&body));
        }

        // The first byte of a body is how many vCPUs there are.
        #[test]
        fn no_number_of_vcpus_is_believed(count in prop::collection::vec(0x80_u8..=0xff, 1..9), rest in any::<[u8; 64]>()) {
            let body = [&count[..], &[1], &rest].concat();
            prop_assert!(SavedVm::decode(&sealed(&body)).is_err());
        }
    }
}
