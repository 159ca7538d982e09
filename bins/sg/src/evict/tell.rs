//! `sg cancel` and `sg limit`: one word to each VMM.

use anyhow::Result;
use vmms::{ControlSocket, Vmm};

use super::args::{CancelArgs, LimitArgs};
use super::sockets::Sockets;

/// `sg cancel`.
pub fn cancel(args: &CancelArgs) -> Result<u8> {
    each(&args.vmms, "called off", |vmm| vmm.cancel())
}

/// `sg limit`.
pub fn limit(args: &LimitArgs) -> Result<u8> {
    each(&args.vmms, "limited", |vmm| vmm.limit(args.scatter, args.gather))
}

/// Tells all of them, whatever one says.
fn each(sockets: &Sockets, done: &str, tell: impl Fn(&mut dyn Vmm) -> Result<()>) -> Result<u8> {
    let mut code = 0;
    for path in sockets.find()? {
        match tell(&mut ControlSocket::new(&path)) {
            Ok(()) => println!("{}: {done}", path.display()),
            Err(error) => {
                code = 1;
                eprintln!("sg: {}: {error:#}", path.display());
            }
        }
    }
    Ok(code)
}
