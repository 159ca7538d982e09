//! What is known of a source's stream: how far it is, how it flows, and how its connection stands.

use std::fmt;
use std::sync::Arc;

use libsg::{Error, ErrorKind, Result};
use qemu_stream::Configuration;

use super::pages::Pages;
use super::stream::Unread;
use crate::layout::Layout;

/// What is known once the memory's transfer has begun.
#[derive(Clone)]
pub(super) struct Begun {
    pub layout: Arc<Layout>,
    pub configuration: Configuration,
    pub section: u32,
}

/// How the memory comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Flow {
    /// As slowly as it was begun, behind the package: what comes is read.
    #[default]
    Still,
    /// As fast as there is room for it, while the VM runs, and not to the end.
    Live,
    /// As fast as it is read.
    Free,
    /// As it is asked for.
    Asked,
}

/// How a stream that was broken off stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Line {
    #[default]
    Up,
    /// It is down, by our doing.
    Broken,
    /// The source has asked for what has come. Whether something was lost since.
    Resuming { again: bool },
    /// Nobody wants it any more.
    HungUp,
}

#[derive(Default)]
pub(super) struct Books {
    pub begun: Option<Begun>,
    /// The switch, as it was said: what a destination is to be told before the package.
    pub switchover: bool,
    pub package: Option<Arc<[u8]>>,
    pub pages: Option<Pages>,
    pub flow: Flow,
    pub line: Line,
    /// How often it was resumed.
    pub resumed: u32,
    /// Pages were lost before the switch: it is broken off as soon as it can be resumed.
    pub owes: bool,
    /// The source is held up, while its VM runs: it has little more.
    pub held: bool,
    pub unread: Unread,
    /// The last pages may come.
    pub all: bool,
    pub over: bool,
    pub failure: Option<(ErrorKind, String)>,
}

impl fmt::Debug for Books {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stands = self.pages.as_ref().map(Pages::stands);
        let Self { flow, line, resumed, held, all, over, .. } = self;
        write!(f, "{stands:?}, {flow:?}, {line:?}, resumed {resumed}, held {held}, all {all}, over {over}")
    }
}

impl Books {
    pub fn check(&self) -> Result<()> {
        match &self.failure {
            Some((kind, message)) => Err(Error::new(*kind, message.clone())),
            None => Ok(()),
        }
    }

    /// Whether the stream is to rest: the source may be through with the next page, and others are not safe. One that is through
    /// cannot be held any more: guests wait for the last pages, too, and have them.
    pub fn is_to_rest(&self) -> bool {
        let nearly =
            |pages: &Pages| (1..=pages.limits().least_pages).contains(&pages.to_come()) && !pages.is_idle();
        self.flow == Flow::Asked && !self.all && !self.over && self.pages.as_ref().is_some_and(nearly)
    }

    /// As it flows by itself, or as it is asked for: whether it may be through before it can be held.
    pub fn next_flow(&self) -> Flow {
        let nearly = |pages: &Pages| pages.to_come() <= pages.limits().narrowed_pages;
        if self.pages.as_ref().is_some_and(nearly) || self.all { Flow::Asked } else { Flow::Free }
    }

    /// How many pages can be read, so that the source is not through behind them: makes its buffer smaller where it has few left.
    pub fn beyond(&mut self) -> u32 {
        let Some(pages) = &self.pages else { return 0 };
        let left = if self.flow == Flow::Live { pages.unseen() } else { pages.to_come() };
        let limits = pages.limits();
        self.unread.narrow(&limits, left);
        left.saturating_sub(self.unread.pages(&limits))
    }
}
