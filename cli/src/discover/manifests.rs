//! Reads manifests: which workspace a package belongs to, and which folders it depends on by path.
//!
//! Exists because cargo tells this only as part of the full dependency graph, which needs the network on a laptop that never built the
//! project. It follows every path that cargo could follow, and checks nothing that cargo checks anyway.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

use toml_edit::{DocumentMut, Item};

use super::{DiscoverError, inputs::Inputs};

const DEPENDENCIES: [&str; 5] = [
    "dependencies",
    "dev-dependencies",
    "dev_dependencies",
    "build-dependencies",
    "build_dependencies",
];

/// A manifest that was read.
pub(crate) struct ManifestFile {
    /// The folder that holds it.
    pub(crate) folder: PathBuf,
    document: DocumentMut,
}

impl ManifestFile {
    /// Reads `folder`'s manifest, if it has one.
    pub(crate) fn read(folder: &Path, inputs: &Inputs) -> Result<Option<Self>, DiscoverError> {
        let file = folder.join("Cargo.toml");
        let text = inputs.read(&file).map_err(|source| DiscoverError::Read {
            path: file.clone(),
            source,
        })?;
        let Some(text) = text else {
            return Ok(None);
        };
        let document =
            text.parse()
                .map_err(|error: toml_edit::TomlError| DiscoverError::Manifest {
                    path: file,
                    why: error.to_string().trim_end().to_owned(),
                })?;
        Ok(Some(Self {
            folder: folder.to_owned(),
            document,
        }))
    }

    /// The workspace's own table, if this is a root manifest.
    fn workspace(&self) -> Option<&Item> {
        self.document.get("workspace")
    }

    /// The root manifest of the workspace that this package belongs to; `None` if it is its own.
    pub(crate) fn workspace_root(&self, inputs: &Inputs) -> Result<Option<Self>, DiscoverError> {
        if self.workspace().is_some() {
            return Ok(None);
        }
        let package = self.document.get("package");
        if let Some(pointer) = package.and_then(|table| table.get("workspace")?.as_str()) {
            return Self::read(&plain(&self.folder.join(pointer)), inputs);
        }
        for folder in self.folder.ancestors().skip(1) {
            match Self::read(folder, inputs) {
                Ok(Some(manifest)) if manifest.takes_in(&self.folder) => return Ok(Some(manifest)),
                // A broken manifest further up is cargo's to report, if it matters at all.
                _ => {}
            }
        }
        Ok(None)
    }

    /// Whether this root manifest does not exclude `folder`.
    fn takes_in(&self, folder: &Path) -> bool {
        let Some(workspace) = self.workspace() else {
            return false;
        };
        let is_listed = |key| {
            list(workspace.get(key)).any(|path| folder.starts_with(plain(&self.folder.join(path))))
        };
        !is_listed("exclude") || is_listed("members")
    }

    /// Takes into account which folders the members' patterns fit, so that a new member is noticed.
    pub(crate) fn watch_members(&self, inputs: &Inputs) {
        let folder = glob::Pattern::escape(&self.folder.to_string_lossy());
        for pattern in list(self.workspace().and_then(|table| table.get("members"))) {
            inputs.watch_pattern(&Path::new(&folder).join(pattern));
        }
    }

    /// Name and folder of each dependency by path; those that it inherits are looked up in `root`.
    pub(crate) fn path_dependencies(&self, root: Option<&Self>) -> Vec<(String, PathBuf)> {
        let root = root.unwrap_or(self);
        let platforms = entries(self.document.get("target")).map(|(_, platform)| platform);
        let mut found = Vec::new();
        for table in platforms.chain([self.document.as_item()]) {
            for key in DEPENDENCIES {
                for (name, dependency) in entries(table.get(key)) {
                    let path = own_path(dependency)
                        .map(|path| self.folder.join(path))
                        .or_else(|| root.inherited_path(name, dependency));
                    found.extend(path.map(|path| (name.to_owned(), plain(&path))));
                }
            }
        }
        found
    }

    fn inherited_path(&self, name: &str, dependency: &Item) -> Option<PathBuf> {
        dependency
            .get("workspace")?
            .as_bool()
            .filter(|inherits| *inherits)?;
        let shared = self.workspace()?.get("dependencies")?.get(name)?;
        Some(self.folder.join(own_path(shared)?))
    }

    /// The target files without which cargo does not load this manifest's package. What they say does not matter, only that they exist.
    pub(crate) fn target_files(&self, inputs: &Inputs) -> Vec<PathBuf> {
        if self.document.get("package").is_none() {
            return Vec::new();
        }
        let mut files = vec!["src/lib.rs".to_owned(), "src/main.rs".to_owned()];
        let library = self.document.get("lib").and_then(own_path);
        files.extend(library.map(str::to_owned));
        let folders = [
            ("bin", "src/bin"),
            ("example", "examples"),
            ("test", "tests"),
            ("bench", "benches"),
        ];
        for (kind, folder) in folders {
            let declared = self.document.get(kind).and_then(Item::as_array_of_tables);
            for target in declared.into_iter().flatten() {
                files.extend(target.get("path").and_then(Item::as_str).map(str::to_owned));
                if let Some(name) = target.get("name").and_then(Item::as_str) {
                    files.push(format!("{folder}/{name}.rs"));
                    files.push(format!("{folder}/{name}/main.rs"));
                }
            }
        }
        let mut files: Vec<PathBuf> = files
            .iter()
            .map(|file| plain(&self.folder.join(file)))
            .filter(|file| inputs.exists(file))
            .collect();
        inputs.watch_names(&self.folder.join("src/bin"));
        let escaped = glob::Pattern::escape(&self.folder.to_string_lossy());
        for pattern in ["src/bin/*.rs", "src/bin/*/main.rs"] {
            let binaries = glob::glob(&format!("{escaped}/{pattern}"));
            files.extend(binaries.into_iter().flatten().flatten());
        }
        files
    }

    /// Name and folder of each `[patch]` and `[replace]` by path.
    pub(crate) fn patches(&self) -> Vec<(String, PathBuf)> {
        let registries = entries(self.document.get("patch")).map(|(_, patches)| patches);
        registries
            .chain(self.document.get("replace"))
            .flat_map(|patches| entries(Some(patches)))
            .filter_map(|(name, patch)| {
                let path = plain(&self.folder.join(own_path(patch)?));
                Some((name.to_owned(), path))
            })
            .collect()
    }
}

/// What path dependencies add to a project.
#[derive(Default)]
pub(crate) struct Followed {
    /// Their folders, with the name under which each was found.
    pub(crate) packages: BTreeMap<PathBuf, String>,
    /// Root manifests of other workspaces that they belong to, and what those need to load: without them the dependencies do not load.
    pub(crate) foreign_roots: BTreeSet<PathBuf>,
}

/// Follows path dependencies, those of the dependencies too, from the packages at `members`.
pub(crate) fn follow(
    project_folder: &Path,
    members: &BTreeSet<PathBuf>,
    more: Vec<(String, PathBuf)>,
    inputs: &Inputs,
) -> Result<Followed, DiscoverError> {
    let mut followed = Followed::default();
    let mut waiting = more;
    if let Some(root) = ManifestFile::read(project_folder, inputs)? {
        root.watch_members(inputs);
        waiting.extend(root.patches());
    }
    for member in members {
        if let Some(manifest) = ManifestFile::read(member, inputs)? {
            let root = manifest.workspace_root(inputs)?;
            waiting.extend(manifest.path_dependencies(root.as_ref()));
        }
    }
    while let Some((name, folder)) = waiting.pop() {
        let folder = plain(&folder);
        if members.contains(&folder) || followed.packages.contains_key(&folder) {
            continue;
        }
        // What does not exist is cargo's to report, if it turns out to be needed.
        let Some(manifest) = ManifestFile::read(&folder, inputs)? else {
            continue;
        };
        let root = manifest.workspace_root(inputs)?;
        waiting.extend(manifest.path_dependencies(root.as_ref()));
        if let Some(root) = root.filter(|root| root.folder != project_folder) {
            followed
                .foreign_roots
                .insert(root.folder.join("Cargo.toml"));
            followed.foreign_roots.extend(root.target_files(inputs));
        }
        followed.packages.insert(folder, name);
    }
    Ok(followed)
}

/// `path` without `.` and `..`, by its text alone, as cargo does it.
pub(crate) fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            component => plain.push(component),
        }
    }
    plain
}

fn own_path(dependency: &Item) -> Option<&str> {
    dependency.get("path")?.as_str()
}

fn entries(item: Option<&Item>) -> impl Iterator<Item = (&str, &Item)> {
    item.and_then(Item::as_table_like)
        .into_iter()
        .flat_map(|table| table.iter())
}

fn list(item: Option<&Item>) -> impl Iterator<Item = &str> {
    item.and_then(Item::as_array)
        .into_iter()
        .flat_map(|list| list.iter())
        .filter_map(toml_edit::Value::as_str)
}
