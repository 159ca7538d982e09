//! Over all three backings: numbering, presence, release.

use std::ptr::NonNull;

use proptest::prelude::*;
use test_support::{free_huge_pages, skipped};

use super::*;

/// Memory of three regions with 2 MiB units, or a reason why there is none.
fn memory(backing: Backing) -> Option<GuestMemory> {
    let region = |name: &str, units: u64| Region {
        name: name.into(),
        guest_address: None,
        length_bytes: units * InstallUnit::Huge2M.bytes() as u64,
        unit: InstallUnit::Huge2M,
    };
    let regions = vec![region("low", 1), region("high", 2), region("rom", 1)];
    let manifest = Manifest { vm: "vm".into(), regions, vm_config: Vec::new(), sharing: None };
    let allocate = || GuestMemory::allocate(&manifest, backing);
    if backing == Backing::Hugetlb2M { on_huge_pages(allocate) } else { Some(allocate().expect("memory")) }
}

/// Allocates from huge pages, of which it has the kernel reserve more when there are too few: other
/// tests run at the same time. Says by name what is left out when there are none.
pub(crate) fn on_huge_pages<T>(allocate: impl Fn() -> Result<T>) -> Option<T> {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    /// What one test needs at most, and again as much for what it gives back meanwhile.
    const SPARE: u64 = 16;
    let pool = || -> u64 { std::fs::read_to_string(POOL).unwrap_or_default().trim().parse().unwrap_or(0) };
    let mut refused = String::from("the pool is exhausted");
    for _ in 0..8 {
        if free_huge_pages() >= SPARE {
            match allocate() {
                Ok(memory) => return Some(memory),
                Err(error) => refused = error.chain(),
            }
        }
        if let Err(error) = std::fs::write(POOL, (pool() + SPARE).to_string()) {
            refused = error.to_string();
            break;
        }
    }
    skipped("hugetlb", format!("no 2 MiB huge pages to be had: {refused}"));
    None
}

fn every_backing(test: impl Fn(Backing, GuestMemory)) {
    for backing in [Backing::Anon, Backing::Memfd, Backing::Hugetlb2M] {
        if let Some(memory) = memory(backing) {
            test(backing, memory);
        }
    }
}

#[test]
fn pages_have_addresses_and_back() {
    every_backing(|_, memory| {
        assert_eq!(memory.pages(), 4 * 512);
        for page in [0, 511, 512, 1535, 1536, 2047].map(PageIndex) {
            let address = memory.host_address(page).expect("a page");
            assert_eq!(memory.page_at(address.addr() + 4095), Some(page));
        }
        assert_eq!(memory.host_address(PageIndex(2048)), None);
        assert_eq!(memory.run(PageIndex(500), 64), Some(PageRange::new(PageIndex(500), 12)));
        assert_eq!(memory.run(PageIndex(512), 64), Some(PageRange::new(PageIndex(512), 64)));
        assert_eq!(memory.run(PageIndex(2048), 1), None);
        assert_eq!(memory.unit(PageIndex(1030)), Some(PageRange::new(PageIndex(1024), 512)));
        assert!(memory.slice(PageRange::new(PageIndex(500), 13)).is_err());
        assert!(memory.slice(PageRange::new(PageIndex(2047), u32::MAX)).is_err());
    });
}

#[test]
fn bytes_go_in_and_out() {
    every_backing(|_, memory| {
        let range = PageRange::new(PageIndex(700), 2);
        let content: Vec<u8> = (0..2 * PAGE_BYTES).map(|at| (at % 253) as u8).collect();
        memory.copy_in(range, &content).expect("copied");
        let mut out = vec![0; content.len()];
        memory.copy_out(range, &mut out).expect("copied");
        assert_eq!(out, content);
        assert_eq!(memory.checksum(PageIndex(701)).expect("a page"), Checksum::of(&content[PAGE_BYTES..]));
        assert!(!memory.is_zero(PageIndex(700)).expect("a page"));
        assert!(memory.is_zero(PageIndex(699)).expect("a page"));
        assert!(memory.copy_in(range, &content[1..]).is_err());
    });
}

#[test]
fn presence_is_what_was_written_and_reads_nothing() {
    every_backing(|backing, memory| {
        let written = [3, 4, 600, 2047].map(PageIndex);
        for page in written {
            memory.copy_in(PageRange::new(page, 1), &[1; PAGE_BYTES]).expect("written");
        }
        let mut want = PresenceMap::new(memory.pages());
        for page in written {
            let huge = backing == Backing::Hugetlb2M;
            want.insert(if huge { memory.unit(page).expect("unit") } else { PageRange::new(page, 1) });
        }
        assert_eq!(memory.presence().expect("scanned"), want, "{backing:?}");
        assert_eq!(memory.presence().expect("scanned"), want, "{backing:?}: the first scan changed it");

        let unit = memory.unit(PageIndex(600)).expect("unit");
        memory.release(unit).expect("released");
        want.remove(unit);
        assert_eq!(memory.presence().expect("scanned"), want, "{backing:?}");
        assert!(memory.is_zero(PageIndex(600)).expect("a page"));
    });
}

/// Bytes of this process in swap (of its shared memory too).
fn swapped() -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps_rollup").expect("read");
    let line = smaps.lines().find_map(|line| line.strip_prefix("Swap:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[test]
fn pages_in_swap_are_present() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let memory = memory(backing).expect("memory");
        let written = PageRange::new(PageIndex(520), 300);
        memory.copy_in(written, &vec![1; 300 * PAGE_BYTES]).expect("written");
        let before = swapped();
        memory.regions()[1].mapping().page_out();
        let map = memory.presence().expect("scanned");
        assert_eq!(map.runs().collect::<Vec<_>>(), [written], "{backing:?}");
        if swapped() <= before {
            skipped(&format!("{backing:?}"), "no page went to swap: is there any?");
        }
    }
}

#[test]
fn presence_without_scan_request_is_the_same() {
    let memory = memory(Backing::Anon).expect("memory");
    for page in [0, 5, 6, 511, 1536] {
        memory.copy_in(PageRange::new(PageIndex(page), 1), &[1; PAGE_BYTES]).expect("written");
    }
    let map = memory.presence().expect("scanned");
    assert_eq!(presence::test::by_entry(&memory), map);
    assert_eq!(map.count(), 5);
}

#[test]
fn what_another_mapping_wrote_is_present() {
    for backing in [Backing::Memfd, Backing::Hugetlb2M] {
        let Some(memory) = memory(backing) else { continue };
        let other = memory.again().expect("mapped").expect("has files");
        other.copy_in(PageRange::new(PageIndex(1000), 1), &[7; PAGE_BYTES]).expect("written");
        let map = memory.presence().expect("scanned");
        assert!(map.contains(PageIndex(1000)), "{backing:?}");
        let pages = if backing == Backing::Memfd { 1 } else { 512 };
        assert_eq!(map.count(), pages, "{backing:?}");
        assert!(!memory.is_zero(PageIndex(1000)).expect("a page"));
    }
    assert!(memory(Backing::Anon).expect("memory").again().expect("asked").is_none());
}

#[test]
fn huge_pages_do_not_back_small_units() {
    let region =
        Region { name: "ram".into(), guest_address: None, length_bytes: 2 << 20, unit: InstallUnit::Page };
    if let Some(mapping) = on_huge_pages(|| Mapping::hugetlb("ram", 2 << 20)) {
        assert!(GuestMemory::from_mappings(vec![(region.clone(), mapping)]).is_err());
    }
    let short = Mapping::anonymous(4096).expect("memory");
    assert!(GuestMemory::from_mappings(vec![(region, short)]).is_err());
}

#[test]
fn borrowed_memory_is_given_back_untouched() {
    let own = Arc::new(Mapping::anonymous(8 * PAGE_BYTES).expect("memory"));
    let start = NonNull::new(own.as_ptr()).expect("not null");
    #[allow(unsafe_code)]
    // SAFETY: the clone keeps it mapped; nobody has a reference to it.
    let borrowed =
        unsafe { Mapping::borrowed(start, 8 * PAGE_BYTES, false, None, Box::new(Arc::clone(&own))) }
            .expect("aligned");
    let region = Region {
        name: "ram".into(),
        guest_address: Some(0),
        length_bytes: 8 * PAGE_BYTES as u64,
        unit: InstallUnit::Page,
    };
    let memory = GuestMemory::from_mappings(vec![(region, borrowed)]).expect("agrees");
    memory.copy_in(PageRange::new(PageIndex(2), 1), &[9; PAGE_BYTES]).expect("written");
    memory.exclude_from_dumps().expect("advised");
    assert_eq!(memory.presence().expect("scanned").count(), 1);
    drop(memory);
    assert_eq!(Arc::strong_count(&own), 1);
    assert!(!own.slice(2 * PAGE_BYTES, PAGE_BYTES).expect("inside").is_zero());
}

#[cfg(feature = "vm-memory")]
#[test]
fn vm_memory_is_borrowed_and_kept() {
    use ::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    let vmm = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), 16 * PAGE_BYTES),
        (GuestAddress(1 << 32), 8 * PAGE_BYTES),
    ])
    .expect("memory");
    vmm.write_obj(0x55_u64, GuestAddress((1 << 32) + PAGE_BYTES as u64)).expect("written");
    let memory = GuestMemory::from_vm_memory(&vmm).expect("borrowed");
    drop(vmm);
    assert_eq!(memory.pages(), 24);
    assert_eq!(memory.regions()[1].guest_address, Some(1 << 32));
    let map = memory.presence().expect("scanned");
    assert_eq!(map.runs().collect::<Vec<_>>(), [PageRange::new(PageIndex(17), 1)]);
    let mut page = [0; PAGE_BYTES];
    memory.copy_out(PageRange::new(PageIndex(17), 1), &mut page).expect("copied");
    assert_eq!(page[0], 0x55);
}

proptest! {
    #[test]
    fn presence_map_is_a_set(
        pages in 1_u32..300,
        changes in prop::collection::vec((any::<bool>(), 0_u32..320, 0_u32..100), 0..20),
    ) {
        let mut map = PresenceMap::new(pages);
        let mut model = vec![false; pages as usize];
        for (present, first, count) in changes {
            let range = PageRange::new(PageIndex(first), count);
            if present { map.insert(range) } else { map.remove(range) }
            for page in range.iter().filter(|page| page.0 < pages) {
                model[page.as_usize()] = present;
            }
        }
        for page in 0..pages + 70 {
            prop_assert_eq!(map.contains(PageIndex(page)), model.get(page as usize) == Some(&true));
        }
        prop_assert_eq!(map.count() as usize, model.iter().filter(|present| **present).count());
        let from_runs: Vec<_> = map.runs().flat_map(PageRange::iter).collect();
        let from_model = (0..pages).filter(|page| model[*page as usize]).map(PageIndex);
        prop_assert_eq!(from_runs, from_model.collect::<Vec<_>>());
    }
}
