//! A real project in a temporary folder, for the tests of the stages.
//!
//! Exists so that tests speak of files and packages and not of plumbing. It simulates nothing: cargo and the file system are the real ones.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tempfile::TempDir;

use crate::cache::Cache;

/// A folder with files, and a cache beside it.
pub(crate) struct Fixture {
    folder: TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("work")).unwrap();
        Self { folder }
    }

    /// A package `app` in the folder `app`.
    pub(crate) fn with_app() -> Self {
        let fixture = Self::new();
        fixture.binary("app", "app", "");
        fixture
    }

    /// The folder that the paths of the other functions start from.
    pub(crate) fn root(&self) -> PathBuf {
        let root = self.folder.path().join("work");
        // As discovery does it, and for its reasons.
        if cfg!(windows) {
            root
        } else {
            fs::canonicalize(root).unwrap()
        }
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    pub(crate) fn cache(&self) -> Cache {
        Cache::open(self.folder.path().join("cache")).unwrap()
    }

    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let file = self.path(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    pub(crate) fn binary(&self, folder: &str, name: &str, more: &str) {
        self.manifest(folder, name, more);
        self.write(&format!("{folder}/src/main.rs"), "fn main() {}\n");
    }

    pub(crate) fn library(&self, folder: &str, name: &str, more: &str) {
        self.manifest(folder, name, more);
        self.write(&format!("{folder}/src/lib.rs"), "\n");
    }

    fn manifest(&self, folder: &str, name: &str, more: &str) {
        let text = format!(
            "[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2021\"\n{more}\n"
        );
        self.write(&format!("{folder}/Cargo.toml"), text);
    }

    /// Makes everything look as if it had lain there for an hour.
    pub(crate) fn age(&self) {
        age(&self.root(), SystemTime::now() - Duration::from_secs(3600));
    }
}

fn age(path: &Path, time: SystemTime) {
    if path.is_symlink() {
        return;
    }
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            age(&entry.unwrap().path(), time);
        }
    }
    // Windows sets no times through a handle to a folder, and needs none there.
    if cfg!(unix) || path.is_file() {
        let file = if path.is_dir() {
            File::open(path).unwrap()
        } else {
            File::options().append(true).open(path).unwrap()
        };
        file.set_modified(time).unwrap();
    }
}
