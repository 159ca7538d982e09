//! `sg serve`s that announce themselves, each a process that ends with the test, and what `sg` says of them.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Output, Stdio};

/// In the order in which they were started.
#[derive(Default)]
pub struct Daemons(pub Vec<Child>);

impl Drop for Daemons {
    fn drop(&mut self) {
        for daemon in &mut self.0 {
            // It fails only for one that ended already.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

impl Daemons {
    /// Starts one, with these arguments as well, and waits until it listens.
    pub fn serve(&mut self, name: &str, announce: &str, secret: &str, more: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sg"));
        command.args(["serve", "--memory", "64M", "--listen", "127.0.0.1:0", "--name", name]);
        command.args(["--announce", announce, "--link", "1gbit", "--zone", "rack7", "--secret", secret]);
        command.args(more).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("listening"), "{line}");
        self.0.push(child);
    }
}

/// What `sg` says of a pool, as JSON.
pub fn sg(arguments: &[&str], pool: &str, secret: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg"));
    command.args(arguments).args(["--pool", pool, "--secret", secret, "--json"]).output().unwrap()
}
