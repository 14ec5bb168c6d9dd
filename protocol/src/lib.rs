//! What crosses the wire between `rrun` on the laptop and `rrun-agent` in the container.
//!
//! Everything here is a value or a pure function: paths, manifests, the tree digest, the push body, events and outcomes,
//! signatures, and the plan that says what to build and how to run it. Both sides link this crate, so that what one
//! writes is by construction what the other reads.
//!
//! It does not open files or sockets, knows no clock and no async runtime, and decides nothing about when things happen.

mod archive;
mod digest;
mod event;
mod id;
mod limits;
mod manifest;
mod outcome;
mod path;
mod plan;
mod push;
mod settings;
mod signature;
mod status;
mod upload;

pub use archive::{ArchiveError, ArchiveRules, Content, read_tar, write_tar};
pub use digest::{Digest, DigestError, TreeDigest};
pub use event::{Event, EventKind, Stream, Timings};
pub use id::{BootId, CheckoutId, IdError, KeyId, Nonce, PushId};
pub use limits::*;
pub use manifest::{Entry, Kind, Manifest, ManifestError};
pub use outcome::{ExitCode, Outcome, Report};
pub use path::{PathError, TreePath};
pub use plan::{BuildPlan, Plan, RunPlan, SwapMode, WrongPlan};
pub use push::{Preamble, PushError, Replaced, Unpacked, compress, decompress};
pub use settings::{PlanError, Project, Selection, Settings};
pub use signature::{
    Authorization, KeyError, PrivateKey, PublicKey, SignatureError, SignedRequest,
};
pub use status::{HistoryEntry, Refusal, Status};
pub use upload::{Arrived, part_path, parts, push_path, upload_path};

/// Version of the protocol; both sides name theirs when they differ.
pub const PROTOCOL_VERSION: u32 = 1;

/// Everything under this raw path prefix belongs to the agent, everything else to the app.
pub const CONTROL_PREFIX: &str = "/_rrun/";

/// Header that carries a request's [`Authorization`]. `Authorization` itself stays free for the app.
pub const SIGNATURE_HEADER: &str = "rrun-signature";

/// Header of every answer under [`CONTROL_PREFIX`], with the agent's [`BootId`]: an app that answers there has none.
pub const BOOT_HEADER: &str = "rrun-boot";
