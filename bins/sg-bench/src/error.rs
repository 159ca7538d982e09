//! The library's errors among those of this program.

/// With all of its causes in one line.
pub fn chained(error: libsg::Error) -> anyhow::Error {
    anyhow::anyhow!("{}", error.chain())
}
