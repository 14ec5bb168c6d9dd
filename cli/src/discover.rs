//! Finds out what a project consists of: its plan, its root, and the folders and files that a build on the agent needs.
//!
//! Exists because "the current folder" is neither enough (path dependencies, configuration further up) nor what is wanted (a monorepo beside
//! it). It asks `cargo metadata --no-deps`, which needs no network, and remembers the answer under everything that it depends on, so that an
//! unchanged project runs no cargo at all. It reads no sources and applies no ignore rules; that is the scan's part.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use cargo_metadata::{Metadata, MetadataCommand};
use rrun_protocol::{Digest, PlanError, Project, Selection};
use serde::{Deserialize, Serialize};

use crate::{
    cache::Cache,
    cargo_config::{pointers, portable},
};

mod inputs;
mod manifests;

use inputs::{Account, Inputs};
use manifests::{ManifestFile, follow, plain};

/// A project as it lies on the laptop.
#[derive(Debug)]
pub(crate) struct Checkout {
    /// Folder that stands for the tree's root: the common folder of everything that is sent.
    pub(crate) root: PathBuf,
    /// Folder of the cargo workspace; names the project.
    pub(crate) project_folder: PathBuf,
    /// What to build and how to run it, and the settings.
    pub(crate) project: Project,
    /// What to scan.
    pub(crate) sources: Sources,
    /// What is left out, for people to know.
    pub(crate) notes: Vec<Note>,
}

/// Something that a person should know, though nothing fails by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    /// What it is: a lower-case fragment.
    pub(crate) text: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
}

/// The places that a scan looks at; all paths absolute.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sources {
    /// Folders that are walked.
    pub(crate) folders: Vec<Source>,
    /// Single files, sent whatever ignore rules say, if they exist.
    pub(crate) files: Vec<Source>,
    /// Cargo's configuration files among them.
    pub(crate) configurations: Vec<PathBuf>,
    /// Folders that are never entered: the target directory and what is like it.
    pub(crate) never: Vec<PathBuf>,
}

/// One place, with the reason why it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Source {
    /// Where.
    pub(crate) path: PathBuf,
    /// Why.
    pub(crate) why: String,
}

impl Source {
    fn new(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            why: why.into(),
        }
    }
}

/// Why a folder is no project that can be pushed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiscoverError {
    /// No manifest here or further up.
    #[error("no `Cargo.toml` in `{}` or a folder above it", .0.display())]
    NoManifest(PathBuf),
    /// Something could not be read.
    #[error("cannot read `{}`: {source}", .path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A manifest is not TOML.
    #[error("cannot read `{}`: {why}", .path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Cargo could not be started.
    #[error("cannot run cargo: {0}")]
    NoCargo(#[source] io::Error),
    /// Cargo refuses the project.
    #[error("cargo cannot load `{}`: {why}", .path.display())]
    Cargo {
        /// The manifest that it was asked for.
        path: PathBuf,
        /// What it says.
        why: String,
    },
    /// Project or settings give no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// `include` names what does not exist.
    #[error("setting `include`: there is no `{}`", .0.display())]
    NothingToInclude(PathBuf),
    /// The places to send have no folder in common.
    #[error("`{}` and `{}` have no folder in common", .0.display(), .1.display())]
    NoCommonFolder(PathBuf, PathBuf),
    /// The cache folder is not usable.
    #[error("cannot use the cache folder: {0}")]
    Cache(#[source] io::Error),
}

impl DiscoverError {
    /// What to do next.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::NoManifest(_) => Some("name the project's folder, as in `rrun push DIR`".into()),
            Self::NoCargo(_) => Some("install Rust from https://rustup.rs".into()),
            Self::Plan(error) => error.hint(),
            Self::NothingToInclude(_) => {
                Some("paths start from the folder of the manifest with the setting".into())
            }
            Self::Cache(_) => Some("set XDG_CACHE_HOME to a folder that you can write to".into()),
            _ => None,
        }
    }
}

/// Finds the project that `folder` lies in. `open_cache` is given the workspace's folder.
pub(crate) fn discover(
    folder: &Path,
    selection: &Selection,
    open_cache: impl FnOnce(&Path) -> io::Result<Cache>,
) -> Result<(Checkout, Cache), DiscoverError> {
    discover_in(folder, selection, open_cache, &Surroundings::of_process())
}

/// The folder that names the project which `folder` lies in, for commands that need nothing else of it.
pub(crate) fn project_folder(folder: &Path) -> Result<PathBuf, DiscoverError> {
    let folder = absolute(folder)?;
    let inputs = Inputs::default();
    let manifest = nearest_manifest(&folder, &inputs)?;
    let workspace = manifest.workspace_root(&inputs)?;
    Ok(workspace.map_or(manifest.folder, |root| root.folder))
}

fn discover_in(
    folder: &Path,
    selection: &Selection,
    open_cache: impl FnOnce(&Path) -> io::Result<Cache>,
    surroundings: &Surroundings,
) -> Result<(Checkout, Cache), DiscoverError> {
    let folder = absolute(folder)?;
    let inputs = Inputs::default();
    let manifest = nearest_manifest(&folder, &inputs)?;
    let workspace = manifest.workspace_root(&inputs)?;
    let cache = open_cache(
        workspace
            .as_ref()
            .map_or(&manifest.folder, |root| &root.folder),
    )
    .map_err(DiscoverError::Cache)?;
    let layout = Layout::remembered(&manifest.folder, surroundings, &cache, inputs)?;
    let metadata = layout.metadata(&manifest.folder)?;
    let checkout = checkout(&metadata, layout.sources, &folder, selection)?;
    Ok((checkout, cache))
}

/// The environment that changes what cargo says about a project.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Surroundings {
    variables: BTreeMap<String, OsString>,
    home: Option<PathBuf>,
}

impl Surroundings {
    const VARIABLES: [&str; 6] = [
        "CARGO",
        "CARGO_BUILD_BUILD_DIR",
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_HOME",
        "CARGO_TARGET_DIR",
        "RUSTUP_TOOLCHAIN",
    ];

    fn of_process() -> Self {
        let variables = Self::VARIABLES
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), env::var_os(name)?)));
        Self {
            variables: variables.collect(),
            home: env::home_dir(),
        }
    }

    /// The user's own cargo folders, whose configuration stays on the laptop.
    fn own_cargo_folders(&self) -> Vec<PathBuf> {
        let of_home = self.home.as_ref().map(|home| home.join(".cargo"));
        let named = self.variables.get("CARGO_HOME").map(PathBuf::from);
        of_home.into_iter().chain(named).collect()
    }
}

/// What is found without regard to the selection, and remembered.
#[derive(Serialize, Deserialize)]
struct Layout {
    /// Cargo's answer, as JSON: its types do not fit a compact format.
    metadata: String,
    sources: Sources,
}

#[derive(Serialize, Deserialize)]
struct Memory {
    manifest_folder: PathBuf,
    surroundings: Surroundings,
    account: Account,
    layout: Layout,
}

impl Layout {
    /// Takes the layout from the cache if nothing changed, or finds it out and stores it there.
    fn remembered(
        folder: &Path,
        surroundings: &Surroundings,
        cache: &Cache,
        inputs: Inputs,
    ) -> Result<Self, DiscoverError> {
        let digest = Digest::of(folder.as_os_str().as_encoded_bytes()).to_string();
        let name = format!("project-{}", &digest[..8]);
        if let Some(memory) = cache.load_compact::<Memory>(&name)
            && memory.manifest_folder == folder
            && memory.surroundings == *surroundings
            && memory.account.holds()
        {
            return Ok(memory.layout);
        }
        let started = SystemTime::now();
        let layout = Self::find(folder, surroundings, &inputs)?;
        let Some(account) = inputs.settled(started) else {
            return Ok(layout);
        };
        let memory = Memory {
            manifest_folder: folder.to_owned(),
            surroundings: surroundings.clone(),
            account,
            layout,
        };
        // A push works without the memory; a full disk will be reported where it matters.
        let _ = cache.store_compact(&name, &memory);
        Ok(memory.layout)
    }

    fn find(
        folder: &Path,
        surroundings: &Surroundings,
        inputs: &Inputs,
    ) -> Result<Self, DiscoverError> {
        let metadata = ask_cargo(folder, surroundings)?;
        let json = serde_json::to_string(&metadata).map_err(|error| DiscoverError::Cargo {
            path: folder.join("Cargo.toml"),
            why: error.to_string(),
        })?;
        Ok(Self {
            metadata: json,
            sources: find_sources(&metadata, surroundings, inputs)?,
        })
    }

    fn metadata(&self, folder: &Path) -> Result<Metadata, DiscoverError> {
        serde_json::from_str(&self.metadata).map_err(|error| DiscoverError::Cargo {
            path: folder.join("Cargo.toml"),
            why: error.to_string(),
        })
    }
}

/// On Unix links are resolved, so that one folder has one name. Windows would answer with a form that cargo does not print.
fn absolute(folder: &Path) -> Result<PathBuf, DiscoverError> {
    let absolute = if cfg!(windows) {
        std::path::absolute(folder)
    } else {
        fs::canonicalize(folder)
    };
    absolute.map_err(|source| DiscoverError::Read {
        path: folder.to_owned(),
        source,
    })
}

fn nearest_manifest(folder: &Path, inputs: &Inputs) -> Result<ManifestFile, DiscoverError> {
    for folder in folder.ancestors() {
        if let Some(manifest) = ManifestFile::read(folder, inputs)? {
            return Ok(manifest);
        }
    }
    Err(DiscoverError::NoManifest(folder.to_owned()))
}

fn ask_cargo(folder: &Path, surroundings: &Surroundings) -> Result<Metadata, DiscoverError> {
    let manifest = folder.join("Cargo.toml");
    let mut command = MetadataCommand::new();
    command
        .manifest_path(&manifest)
        .current_dir(folder)
        .no_deps();
    for name in Surroundings::VARIABLES {
        match surroundings.variables.get(name) {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    if let Some(cargo) = surroundings.variables.get("CARGO") {
        command.cargo_path(cargo);
    }
    command.exec().map_err(|error| match error {
        cargo_metadata::Error::Io(source) => DiscoverError::NoCargo(source),
        cargo_metadata::Error::CargoMetadata { stderr } => DiscoverError::Cargo {
            path: manifest,
            why: stderr.trim().trim_start_matches("error: ").to_owned(),
        },
        other => DiscoverError::Cargo {
            path: manifest,
            why: other.to_string(),
        },
    })
}

/// Everything that is sent whatever is selected.
fn find_sources(
    metadata: &Metadata,
    surroundings: &Surroundings,
    inputs: &Inputs,
) -> Result<Sources, DiscoverError> {
    let project_folder = metadata.workspace_root.as_std_path();
    let mut sources = Sources::default();
    let mut members = BTreeSet::new();
    for package in metadata.workspace_packages() {
        let Some(folder) = package.manifest_path.parent() else {
            continue;
        };
        watch_targets(folder.as_std_path(), inputs);
        members.insert(folder.as_std_path().to_owned());
        let why = format!("folder of package `{}`", package.name);
        sources.folders.push(Source::new(folder, why));
        for target in &package.targets {
            if !target.src_path.starts_with(folder) {
                let why = format!("target `{}` of package `{}`", target.name, package.name);
                sources.files.push(Source::new(&target.src_path, why));
            }
        }
    }
    sources.files.push(Source::new(
        project_folder.join("Cargo.toml"),
        "the workspace's manifest",
    ));
    sources.files.push(Source::new(
        project_folder.join("Cargo.lock"),
        "the workspace's lock file",
    ));
    sources.never.push(metadata.target_directory.clone().into());
    sources
        .never
        .extend(metadata.build_directory.clone().map(PathBuf::from));

    let configuration = find_configuration(project_folder, surroundings, inputs, &mut sources)?;
    let followed = follow(project_folder, &members, configuration, inputs)?;
    for (folder, name) in followed.packages {
        let why = format!("path dependency `{name}`");
        sources.folders.push(Source::new(folder, why));
    }
    for file in followed.foreign_roots {
        let why = "a path dependency's workspace needs it to load";
        sources.files.push(Source::new(file, why));
    }
    find_toolchain(project_folder, &mut sources, inputs)?;
    Ok(sources)
}

/// A new file can be a new binary.
fn watch_targets(package: &Path, inputs: &Inputs) {
    inputs.exists(&package.join("src/main.rs"));
    inputs.exists(&package.join("src/lib.rs"));
    inputs.watch_names(&package.join("src/bin"));
}

/// Adds cargo's configuration files from `project_folder` up, and what they point to; returns the packages that they name.
fn find_configuration(
    project_folder: &Path,
    surroundings: &Surroundings,
    inputs: &Inputs,
    sources: &mut Sources,
) -> Result<Vec<(String, PathBuf)>, DiscoverError> {
    let own = surroundings.own_cargo_folders();
    let mut waiting = Vec::new();
    for folder in project_folder.ancestors() {
        let folder = folder.join(".cargo");
        let older = folder.join("config");
        // Of two, cargo reads the one without an ending; both count for the memory.
        let newer = folder.join("config.toml");
        let is_own = own.contains(&folder);
        for file in [&older, &newer] {
            read(file, inputs)?;
        }
        let file = if older.is_file() { older } else { newer };
        if !is_own {
            waiting.push(file);
        }
    }
    for folder in own {
        read(&folder.join("config.toml"), inputs)?;
        read(&folder.join("config"), inputs)?;
    }

    let mut packages = Vec::new();
    let mut done = BTreeSet::new();
    while let Some(file) = waiting.pop() {
        let file = plain(&file);
        let Some(text) = read(&file, inputs)? else {
            continue;
        };
        if !done.insert(file.clone()) {
            continue;
        }
        let found = pointers(&file, &text);
        waiting.extend(found.configurations);
        packages.extend(
            found
                .packages
                .into_iter()
                .map(|folder| ("of cargo's configuration".to_owned(), folder)),
        );
        for folder in found.vendored.iter().filter(|folder| inputs.exists(folder)) {
            sources
                .folders
                .push(Source::new(plain(folder), "vendored crates"));
        }
        // One that says nothing but for this laptop would only make the tree's root a folder further up.
        if portable(&text).is_ok_and(|portable| !portable.says_anything) {
            sources.configurations.push(file);
            continue;
        }
        sources
            .files
            .push(Source::new(&file, "cargo's configuration"));
        sources.configurations.push(file);
    }
    Ok(packages)
}

/// Adds the toolchain file of the project, or the nearest one above it inside of what is sent anyway.
fn find_toolchain(
    project_folder: &Path,
    sources: &mut Sources,
    inputs: &Inputs,
) -> Result<(), DiscoverError> {
    let root = common_folder(sources)?;
    let mut found = None;
    for folder in project_folder.ancestors() {
        for name in ["rust-toolchain", "rust-toolchain.toml"] {
            let file = folder.join(name);
            if read(&file, inputs)?.is_some() && folder.starts_with(&root) {
                found.get_or_insert(file);
            }
        }
    }
    sources
        .files
        .extend(found.map(|file| Source::new(file, "toolchain file")));
    Ok(())
}

fn read(file: &Path, inputs: &Inputs) -> Result<Option<String>, DiscoverError> {
    inputs.read(file).map_err(|source| DiscoverError::Read {
        path: file.to_owned(),
        source,
    })
}

/// Completes the sources by what the settings name, and resolves the plan for the root that follows.
fn checkout(
    metadata: &Metadata,
    mut sources: Sources,
    folder: &Path,
    selection: &Selection,
) -> Result<Checkout, DiscoverError> {
    let project_folder = metadata.workspace_root.as_std_path();
    // The settings can name places outside of all packages, which moves the root; so they are resolved from the very top first.
    let top = project_folder.ancestors().last().unwrap_or(project_folder);
    let project = Project::resolve(metadata, top, folder, selection)?;
    let mut notes = Vec::new();
    add_included(top, &project, &mut sources)?;
    add_assets(top, &project, &mut sources, &mut notes);
    tidy(&mut sources);
    let root = common_folder(&sources)?;
    Ok(Checkout {
        project: Project::resolve(metadata, &root, folder, selection)?,
        root,
        project_folder: project_folder.to_owned(),
        sources,
        notes,
    })
}

fn add_included(top: &Path, project: &Project, sources: &mut Sources) -> Result<(), DiscoverError> {
    let settings_folder = match &project.settings_folder {
        Some(folder) => top.join(folder),
        None => top.to_owned(),
    };
    for text in &project.settings.include {
        let path = plain(&settings_folder.join(text));
        let metadata = fs::symlink_metadata(&path)
            .map_err(|_| DiscoverError::NothingToInclude(path.clone()))?;
        sources.add(path, metadata.is_dir(), "setting `include`");
    }
    Ok(())
}

/// The app reads its assets at run time, so they are sent even where no package lies; the build may make some of them.
fn add_assets(top: &Path, project: &Project, sources: &mut Sources, notes: &mut Vec<Note>) {
    for asset in &project.plan.run.assets {
        let path = top.join(asset);
        match fs::symlink_metadata(&path) {
            Ok(metadata) => sources.add(path, metadata.is_dir(), "setting `assets`"),
            Err(_) => notes.push(Note {
                text: format!("setting `assets`: there is no `{}` yet", path.display()),
                hint: Some("leave it out of the settings unless the build makes it".to_owned()),
            }),
        }
    }
}

impl Sources {
    fn add(&mut self, path: PathBuf, is_folder: bool, why: &str) {
        let places = if is_folder {
            &mut self.folders
        } else {
            &mut self.files
        };
        places.push(Source::new(path, why));
    }
}

/// Each place once, in order; the first reason counts.
fn tidy(sources: &mut Sources) {
    for places in [&mut sources.folders, &mut sources.files] {
        places.sort_by(|left, right| left.path.cmp(&right.path));
        places.dedup_by(|later, earlier| later.path == earlier.path);
    }
}

/// The innermost folder that holds all that exists.
fn common_folder(sources: &Sources) -> Result<PathBuf, DiscoverError> {
    let files = sources.files.iter().filter_map(|file| file.path.parent());
    let folders = sources.folders.iter().map(|folder| folder.path.as_path());
    let mut places = folders.chain(files);
    let first = places.next().unwrap_or(Path::new("/"));
    let mut common = first.to_owned();
    for place in places {
        while !place.starts_with(&common) {
            if !common.pop() {
                return Err(DiscoverError::NoCommonFolder(
                    first.to_owned(),
                    place.to_owned(),
                ));
            }
        }
    }
    Ok(common)
}

#[cfg(test)]
mod tests;
