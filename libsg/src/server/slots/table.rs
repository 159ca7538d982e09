//! Slots by a hash of what lies in them, in shards that grow one at a time.
//!
//! One table for all would be copied as a whole each time it doubles: every hash looked up where its slot's contents
//! are, nobody answered meanwhile, and half as much memory again while it lasts.

use hashbrown::HashTable;

/// Bits of a hash by which [`HashTable`] chooses no place among the slots that there may be: it takes low ones and the
/// uppermost seven.
const SHARD_BITS: u32 = 5;
const SHARD_SHIFT: u32 = 40;

/// Which slot has the bytes of which hash.
pub(super) struct SlotTable {
    shards: Box<[HashTable<u32>; 1 << SHARD_BITS]>,
}

impl SlotTable {
    pub fn new() -> Self {
        Self { shards: Box::new([const { HashTable::new() }; 1 << SHARD_BITS]) }
    }

    /// The slot with this hash of which `is` says that it is the one.
    pub fn find(&self, hash: u64, is: impl FnMut(&u32) -> bool) -> Option<u32> {
        self.shards[shard(hash)].find(hash, is).copied()
    }

    /// Adds a slot; `hash_of` says the hash of any that is in the table.
    pub fn insert(&mut self, hash: u64, slot: u32, hash_of: impl Fn(u32) -> u64) {
        self.shards[shard(hash)].insert_unique(hash, slot, |slot| hash_of(*slot));
    }

    pub fn remove(&mut self, hash: u64, slot: u32) {
        if let Ok(entry) = self.shards[shard(hash)].find_entry(hash, |known| *known == slot) {
            entry.remove();
        }
    }
}

fn shard(hash: u64) -> usize {
    (hash >> SHARD_SHIFT) as usize % (1 << SHARD_BITS)
}

#[cfg(test)]
mod test {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Few enough to meet, in few enough shards.
    fn hashes() -> impl Strategy<Value = u64> {
        (0u64..3, 0u64..20).prop_map(|(shard, low)| shard << SHARD_SHIFT | low)
    }

    proptest! {
        #[test]
        fn holds_what_a_map_holds(
            changes in proptest::collection::vec((any::<bool>(), hashes()), 0..200),
        ) {
            let (mut table, mut model) = (SlotTable::new(), HashMap::new());
            let mut hash_of = Vec::new();
            for (adds, hash) in changes {
                match model.get(&hash) {
                    None if adds => {
                        let slot = hash_of.len() as u32;
                        hash_of.push(hash);
                        table.insert(hash, slot, |slot| hash_of[slot as usize]);
                        model.insert(hash, slot);
                    }
                    Some(slot) if !adds => {
                        table.remove(hash, *slot);
                        model.remove(&hash);
                    }
                    _ => {}
                }
                for (hash, slot) in &model {
                    prop_assert_eq!(table.find(*hash, |found| hash_of[*found as usize] == *hash), Some(*slot));
                }
                let held: usize = table.shards.iter().map(HashTable::len).sum();
                prop_assert_eq!(held, model.len());
            }
        }
    }
}
