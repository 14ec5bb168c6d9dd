//! Where things lie in the agent's workspace, and how its small state files are written.
//!
//! One folder holds everything, on one file system, so that renames and hard links work:
//!
//! ```text
//! tree/          the pushed sources, where cargo runs
//! target/        cargo's target directory
//! generations/   what serves or can serve again, a numbered folder each
//! state/         manifest, journal, contents, what is being received
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Serialize, de::DeserializeOwned};

use crate::fault::fault_point;

/// The agent's workspace folder.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// Makes the folders that are missing. `folder` becomes absolute, as cargo writes it into its dep-info.
    pub(crate) fn create(folder: &Path) -> anyhow::Result<Self> {
        let make = |path: &Path| {
            fs::create_dir_all(path).with_context(|| format!("cannot make `{}`", path.display()))
        };
        make(folder)?;
        let folder = folder
            .canonicalize()
            .with_context(|| format!("cannot find `{}`", folder.display()))?;
        let layout = Self { folder };
        for path in [
            layout.tree(),
            layout.target(),
            layout.generations(),
            layout.contents(),
            layout.staging(),
        ] {
            make(&path)?;
        }
        Ok(layout)
    }

    /// The pushed sources.
    pub(crate) fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    /// Cargo's target directory.
    pub(crate) fn target(&self) -> PathBuf {
        self.folder.join("target")
    }

    /// One folder for each kept generation.
    pub(crate) fn generations(&self) -> PathBuf {
        self.folder.join("generations")
    }

    /// A pristine copy of each file of the tree, named by its digest.
    pub(crate) fn contents(&self) -> PathBuf {
        self.folder.join("state/contents")
    }

    /// What is being received or written; emptied when the agent starts.
    pub(crate) fn staging(&self) -> PathBuf {
        self.folder.join("state/staging")
    }

    /// A state file.
    pub(crate) fn state(&self, name: &str) -> PathBuf {
        self.folder.join("state").join(name)
    }

    /// Reads a state file; `None` if there is none. One that cannot be read back counts as none: what it says can be made again.
    pub(crate) fn load<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        postcard::from_bytes(&fs::read(self.state(name)).ok()?).ok()
    }

    /// Writes a state file by renaming it into place, so that it is there whole or not at all.
    pub(crate) fn store<T: Serialize>(&self, name: &str, value: &T) -> anyhow::Result<()> {
        let path = self.state(name);
        let write = || -> io::Result<()> {
            let bytes = postcard::to_stdvec(value).map_err(io::Error::other)?;
            let file = tempfile::NamedTempFile::new_in(self.staging())?;
            fs::write(file.path(), bytes)?;
            fault_point!("state written");
            file.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write `{}`", path.display()))
    }
}
