//! Where rrun keeps its files: the user's configuration, cache and state folders.
//!
//! `XDG_*` is respected on every Unix. Nothing is ever kept inside a project. Folders are named here, and made by who
//! writes into them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use etcetera::BaseStrategy as _;
use rrun_protocol::Digest;

use crate::problem::Problem;

/// Letters of a project's id: enough that no two projects of one user meet.
const ID_LETTERS: usize = 16;

/// The three folders, each already rrun's own.
#[derive(Clone, Debug)]
pub(crate) struct Folders {
    pub(crate) configuration: PathBuf,
    pub(crate) cache: PathBuf,
    pub(crate) state: PathBuf,
}

/// Names a project on this machine: a short hash of its folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProjectId(String);

impl Folders {
    /// Reads the environment.
    pub(crate) fn find() -> Result<Self, Problem> {
        let base = etcetera::choose_base_strategy().map_err(|error| {
            Problem::usage(error).hint("set HOME, or the XDG_* variables".to_owned())
        })?;
        Ok(Self {
            configuration: base.config_dir().join("rrun"),
            cache: base.cache_dir().join("rrun"),
            state: base
                .state_dir()
                .unwrap_or_else(|| base.data_dir())
                .join("rrun"),
        })
    }

    /// The private key, unless told otherwise.
    pub(crate) fn key_file(&self) -> PathBuf {
        self.configuration.join("key.pem")
    }

    /// What is remembered of a project's files.
    pub(crate) fn project_cache(&self, project: &ProjectId) -> PathBuf {
        self.cache.join(&project.0)
    }

    /// Where the local agent of a project works.
    pub(crate) fn agent_workspace(&self, project: &ProjectId) -> PathBuf {
        self.project_cache(project).join("agent")
    }

    /// What is remembered of services, whichever project they run.
    pub(crate) fn services(&self) -> PathBuf {
        self.cache.join("services")
    }

    /// State of a project: its checkout's id, its local agent.
    pub(crate) fn project_state(&self, project: &ProjectId) -> PathBuf {
        self.state.join(&project.0)
    }
}

impl ProjectId {
    /// `folder` is canonical, so that one project has one id however it was named.
    pub(crate) fn of(folder: &Path) -> Self {
        let digest = Digest::of(folder.as_os_str().as_encoded_bytes()).to_string();
        Self(digest[..ID_LETTERS].to_owned())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Makes a folder that only its owner can look into, and those above it.
pub(crate) fn make_private(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt as _;
        builder.mode(0o700);
    }
    builder.create(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_project_folder_has_an_id_of_its_own() {
        let id = ProjectId::of(Path::new("/home/ann/app"));
        assert_eq!(id, ProjectId::of(Path::new("/home/ann/app")));
        assert_ne!(id, ProjectId::of(Path::new("/home/ann/app2")));
        assert_eq!(id.as_str().len(), ID_LETTERS);
    }
}
