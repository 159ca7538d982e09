//! Files that a kernel unpacks before it runs the first program (cpio, "newc").

use std::path::Path;

use anyhow::{Context as _, Result};

/// An archive that grows, with what a guest has in it.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    files: u32,
}

/// A character device that root writes.
const CONSOLE: u32 = 0o020_600;
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
/// Where the kernel's console is.
const CONSOLE_NUMBER: (u32, u32) = (5, 1);
const LAST: &str = "TRAILER!!!";

impl Initramfs {
    /// `/init`, and the console that it writes to.
    #[must_use]
    pub fn new(init: &[u8]) -> Self {
        let mut all = Self::default();
        all.entry("dev", DIRECTORY, (0, 0), &[]);
        all.entry("dev/console", CONSOLE, CONSOLE_NUMBER, &[]);
        all.entry("init", PROGRAM, (0, 0), init);
        all
    }

    /// A file, which may be run, and the directories above it.
    pub fn file(&mut self, path: &str, bytes: &[u8]) {
        let above = path.match_indices('/').map(|(at, _)| &path[..at]);
        above.for_each(|directory| self.entry(directory, DIRECTORY, (0, 0), &[]));
        self.entry(path, PROGRAM, (0, 0), bytes);
    }

    /// The files of a directory, the first program (`init`) among them.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn of_directory(root: &Path) -> Result<Self> {
        let read =
            |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let mut all = Self::new(&read(&root.join("init"))?);
        let mut left = vec![root.to_owned()];
        while let Some(directory) = left.pop() {
            let listed = std::fs::read_dir(&directory)
                .with_context(|| format!("cannot read {}", directory.display()))?;
            for entry in listed {
                let path = entry?.path();
                if path.is_dir() {
                    left.push(path);
                } else if path != root.join("init") {
                    let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
                    all.file(&name, &read(&path)?);
                }
            }
        }
        Ok(all)
    }

    /// The archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(LAST, 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), bytes: &[u8]) {
        use std::io::Write as _;
        self.files += 1;
        let (inode, size, name) = (self.files, bytes.len(), path.len() + 1);
        let links = 1;
        // Inode, mode, user, group, links, time, size, the archive's device, the file's, length of the name, checksum.
        let head = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}{0:08x}{0:08x}{major:08x}{minor:08x}\
             {name:08x}{0:08x}{path}\0",
            0
        );
        let _ = self.bytes.write_all(head.as_bytes());
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    /// Heads and files begin at multiples of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// The names and bytes of an archive.
    fn entries(mut archive: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            let (head, rest) = archive.split_at(110);
            assert_eq!(&head[..6], b"070701");
            let field = |at: usize| {
                let digits = std::str::from_utf8(&head[6 + at * 8..][..8]).expect("digits");
                usize::from_str_radix(digits, 16).expect("a number")
            };
            let (size, name) = (field(6), field(11));
            let path = String::from_utf8(rest[..name - 1].to_vec()).expect("a path");
            if path == LAST {
                return found;
            }
            let at = (110 + name).next_multiple_of(4);
            found.push((path, archive[at..at + size].to_vec()));
            archive = &archive[(at + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn files_have_their_bytes_and_come_behind_their_directories() {
        let mut all = Initramfs::new(b"first");
        all.file("lib/a/x.ko", b"module");
        let all = entries(&all.finish());
        let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "init", "lib", "lib/a", "lib/a/x.ko"]);
        assert_eq!((all[2].1.as_slice(), all[5].1.as_slice()), (&b"first"[..], &b"module"[..]));
    }

    #[test]
    fn a_directory_has_its_files_and_its_first_program_once() {
        let root = tempfile::tempdir().expect("creates");
        let write = |path: &str, bytes: &[u8]| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("below the root")).expect("creates");
            std::fs::write(path, bytes).expect("writes");
        };
        write("init", b"first");
        write("lib/a/x.so", b"library");
        let all = entries(&Initramfs::of_directory(root.path()).expect("packed").finish());
        let files: Vec<_> = all.iter().filter(|(_, bytes)| !bytes.is_empty()).collect();
        let (init, library) =
            (("init".to_owned(), b"first".to_vec()), ("lib/a/x.so".to_owned(), b"library".to_vec()));
        assert_eq!(files, [&init, &library]);
        let empty = tempfile::tempdir().expect("creates");
        let refused = Initramfs::of_directory(empty.path()).expect_err("nothing to begin with");
        assert!(refused.to_string().ends_with("/init"), "{refused}");
    }
}
