//! What this process has used so far, as the kernel counts it.

use std::fs;

/// User and system time of this process, in seconds. `None` where the kernel does not tell.
#[must_use]
pub fn cpu_s() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // proc(5): the name in parentheses may hold anything; utime and stime are fields 14 and 15.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Largest resident set of this process, in bytes. `None` where the kernel does not tell.
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod test {
    #[test]
    fn the_kernel_tells() {
        assert!(super::cpu_s().expect("told") >= 0.0);
        assert!(super::peak_rss_bytes().expect("told") > 100_000);
    }
}
