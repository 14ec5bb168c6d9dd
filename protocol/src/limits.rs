//! Bounds on everything that comes from outside, each with its reason.

use std::time::Duration;

/// Longest path in a tree. Linux takes 4096 including the workspace in front; a quarter leaves room for any workspace.
pub const MAX_PATH_BYTES: usize = 1024;
/// Longest component of a path: what Linux and macOS file systems store.
pub const MAX_PATH_COMPONENT_BYTES: usize = 255;
/// Most files in a tree. The largest public Rust workspaces have some 60 000.
pub const MAX_TREE_FILES: usize = 200_000;
/// Largest sum of the lengths of a tree's paths: 80 bytes for each of the most files. Names are kept in memory, and without
/// this bound the longest of them would take 200 MB.
pub const MAX_TREE_PATH_BYTES: usize = 16 << 20;
/// Largest single file in a tree: beyond it is data, not source.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// Largest sum of a tree's unpacked files: with it, a body that unpacks to more is a bomb or a mistake.
pub const MAX_TREE_BYTES: u64 = 256 << 20;
/// Longest target of a symbolic link.
pub const MAX_LINK_BYTES: u64 = MAX_PATH_BYTES as u64;

/// Largest body of one request; a larger push goes as an upload. Cloud Run refuses HTTP/1 bodies over 32 MiB; this leaves room
/// for its own headers.
pub const MAX_BODY_BYTES: u64 = 31 << 20;
/// Size of each part of an upload but the last, and what a broken connection can cost: 8 s at 1 Mbit/s. A push with a larger
/// payload goes in parts.
pub const UPLOAD_PART_BYTES: u64 = 1 << 20;
/// Largest upload: the largest tree, should nothing of it compress, and 32 MiB for the archive's own headers.
pub const MAX_UPLOAD_BYTES: u64 = MAX_TREE_BYTES + (32 << 20);
/// Largest sum of all parts that an agent keeps, in a container's memory: one upload of any size. An older one makes room.
pub const MAX_UPLOADS_BYTES: u64 = MAX_UPLOAD_BYTES;
/// How long parts are kept that nobody adds to: long enough to change from one network to another.
pub const UPLOAD_IDLE_LIMIT: Duration = Duration::from_secs(60 * 60);
/// Largest preamble: every path of the largest tree changed (3 bytes a position) with room for the plan.
pub const MAX_PREAMBLE_BYTES: usize = 1 << 20;
/// Largest file whose content is used as compression prefix and remembered for it.
pub const MAX_PREFIX_FILE_BYTES: u64 = 1 << 20;
/// Largest compression prefix; both sides hold it in memory twice.
pub const MAX_PREFIX_BYTES: u64 = 64 << 20;
/// Longest package, binary, profile or feature in a plan: what a file system stores as a name.
pub const MAX_PLAN_NAME_BYTES: usize = MAX_PATH_COMPONENT_BYTES;
/// Most assets in a plan: each is compared with every file of the tree.
pub const MAX_ASSETS: usize = 1000;
/// Decoder window as a power of two (128 MiB): covers the largest prefix, and no frame can ask for more memory.
pub const MAX_WINDOW_LOG: u32 = 27;
/// A body larger than this is preceded by a small request, so that no large one is sent in vain.
pub const UNASKED_BODY_BYTES: u64 = 64 << 10;
/// Unless told otherwise, `rrun push` stops before it sends more than this: 160 s at 1 Mbit/s.
pub const DEFAULT_MAX_UPLOAD_BYTES: u64 = 20 << 20;

/// How far a request's time may lie from the agent's clock, in both directions.
pub const MAX_CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// Nonces remembered at once; only verified requests add one, so 16 384 within 10 minutes is far beyond any use.
pub const MAX_NONCES: usize = 16_384;
/// Longest signature header that is looked at.
pub const MAX_SIGNATURE_HEADER_BYTES: usize = 512;
/// Longest comment of a public key: it names the person in messages.
pub const MAX_KEY_COMMENT_BYTES: usize = 128;

/// Longest silence in an event stream.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);
/// Events kept of one push for who takes the stream up again; older log lines beyond it are dropped and counted.
pub const MAX_EVENTS_KEPT: usize = 20_000;
/// Longest text in one event; longer build output lines are cut.
pub const MAX_EVENT_TEXT_BYTES: usize = 64 << 10;
/// Longest single event line a client reads.
pub const MAX_EVENT_LINE_BYTES: usize = 1 << 20;
