//! `[package.metadata.rrun]` and `[workspace.metadata.rrun]`, and the plan that follows from them.
//!
//! Pure functions of what `cargo metadata --no-deps` prints. Keys of the package win over those of the workspace.

use std::{collections::BTreeMap, path::Path, time::Duration};

use cargo_metadata::{Metadata, Package};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::{
    path::{PathError, TreePath},
    plan::{BuildPlan, Plan, RunPlan, SwapMode, WrongPlan},
};

/// The settings of a project, each as its own documentation says. All may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Settings {
    /// Package to build. Default: the pushed folder's, or the only one with a binary.
    pub package: Option<String>,
    /// Binary to run. Default: the package's `default-run`, or its only one.
    pub bin: Option<String>,
    /// Features to switch on. Default: none besides the default features.
    pub features: Vec<String>,
    /// Cargo profile. Default: `dev`.
    pub profile: Option<String>,
    /// Arguments of the app, `$PORT` expanded. Default: none.
    pub args: Vec<String>,
    /// Environment of the app, `$PORT` expanded. Default: what the container has, without `RRUN_*`, and `PORT`.
    pub env: BTreeMap<String, String>,
    /// Environment of the build on top of a fixed allow-list. Default: none.
    pub build_env: BTreeMap<String, String>,
    /// Folder, relative to the manifest with the setting, that the app's working directory stands for. Default: that manifest's folder.
    pub working_directory: Option<String>,
    /// Files and folders inside the working directory that the app reads at run time. Default: none.
    pub assets: Vec<String>,
    /// Files and folders, relative to the manifest with the setting, that are sent besides the packages' folders. Default: none.
    pub include: Vec<String>,
    /// Patterns, as in `.gitignore`, of files that are sent although they look like credentials. Default: none.
    pub allow: Vec<String>,
    /// Path that has to answer below 500 before a version counts as ready. Default: listening is enough.
    pub ready_path: Option<String>,
    /// How long a version may take until it is ready, as `"90s"` or `"5m"`. Default: 60 s.
    #[serde(deserialize_with = "duration")]
    pub ready_timeout: Option<Duration>,
    /// How long requests under way in the old version may take. Default: 30 s.
    #[serde(deserialize_with = "duration")]
    pub drain_limit: Option<Duration>,
    /// The same for WebSockets and event streams. Default: 5 min.
    #[serde(deserialize_with = "duration")]
    pub stream_drain_limit: Option<Duration>,
    /// `hot`, `restart` or `exec`. Default: `hot`.
    pub swap: Option<SwapMode>,
}

/// All keys, for naming the nearest right one.
const KEYS: [&str; 16] = [
    "package",
    "bin",
    "features",
    "profile",
    "args",
    "env",
    "build-env",
    "working-directory",
    "assets",
    "include",
    "allow",
    "ready-path",
    "ready-timeout",
    "drain-limit",
    "stream-drain-limit",
    "swap",
];

/// What the command line asks for; wins over the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// `-p`.
    pub package: Option<String>,
    /// `--bin`.
    pub bin: Option<String>,
    /// `--features`, added to those of the settings.
    pub features: Vec<String>,
    /// `--release`.
    pub release: bool,
    /// `--swap`.
    pub swap: Option<SwapMode>,
}

/// A project as its metadata, settings and the command line describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    /// What to build and how to run it.
    pub plan: Plan,
    /// The merged settings, for `include` and `allow`.
    pub settings: Settings,
    /// Folder, relative to the tree's root, that the settings' `include` and `allow` start from; `None` is the root.
    pub settings_folder: Option<TreePath>,
}

/// Why no plan follows from the project.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A key that does not exist.
    #[error("unknown setting `{key}` in {place}")]
    UnknownKey {
        /// As written.
        key: String,
        /// Which table.
        place: String,
        /// The nearest key that exists.
        nearest: Option<&'static str>,
    },
    /// A value of the wrong form.
    #[error("wrong setting in {place}: {why}")]
    Value {
        /// Which table.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// No package of that name.
    #[error("there is no package `{name}` in this workspace")]
    NoPackage {
        /// As asked for.
        name: String,
        /// The packages with a binary.
        candidates: Vec<String>,
    },
    /// Several packages, and nothing says which.
    #[error("several packages have a binary, and nothing says which to push")]
    ManyPackages {
        /// Their names.
        candidates: Vec<String>,
    },
    /// Nothing that could run.
    #[error("no package of this workspace has a binary")]
    NoBinary,
    /// The package that was asked for cannot run.
    #[error("package `{0}` has no binary")]
    NoBinaryIn(String),
    /// No such binary in the package.
    #[error("package `{package}` has no binary `{bin}`")]
    NoSuchBinary {
        /// The package.
        package: String,
        /// As asked for.
        bin: String,
        /// The binaries it has.
        candidates: Vec<String>,
    },
    /// Several binaries, and nothing says which.
    #[error("package `{package}` has several binaries, and nothing says which to run")]
    ManyBinaries {
        /// The package.
        package: String,
        /// Their names.
        candidates: Vec<String>,
    },
    /// A path in the settings that leads out of the tree.
    #[error("setting `{key}`: {source}")]
    Path {
        /// The setting.
        key: &'static str,
        /// What is wrong with its value.
        source: PathError,
    },
    /// An asset that the app would not find.
    #[error("setting `assets`: `{0}` does not lie in the working directory")]
    AssetOutside(TreePath),
    /// A folder of the workspace that is not part of the tree.
    #[error("`{0}` does not lie in the tree")]
    OutsideTree(String),
    /// A value that would mean something else to cargo or the app.
    #[error(transparent)]
    Wrong(#[from] WrongPlan),
}

impl PlanError {
    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKey {
                nearest: Some(nearest),
                ..
            } => Some(format!("did you mean `{nearest}`?")),
            Self::UnknownKey { nearest: None, .. } => {
                Some(format!("the settings are: {}", KEYS.join(", ")))
            }
            Self::NoPackage { candidates, .. } | Self::ManyPackages { candidates } => {
                Some(format!(
                    "choose one with `-p` or the setting `package`: {}",
                    candidates.join(", ")
                ))
            }
            Self::NoSuchBinary { candidates, .. } | Self::ManyBinaries { candidates, .. } => {
                Some(format!(
                    "choose one with `--bin` or the setting `bin`: {}",
                    candidates.join(", ")
                ))
            }
            Self::AssetOutside(_) => {
                Some("set `working-directory` to a folder that holds all assets".to_owned())
            }
            _ => None,
        }
    }
}

impl Project {
    /// Resolves what to push.
    ///
    /// `root` is the folder that stands for the tree's root, `folder` the one that was asked for (its package is preferred);
    /// both as absolute paths in the form that `metadata` uses.
    pub fn resolve(
        metadata: &Metadata,
        root: &Path,
        folder: &Path,
        selection: &Selection,
    ) -> Result<Self, PlanError> {
        let workspace_table = metadata.workspace_metadata.get("rrun");
        let workspace = read_table(workspace_table, "[workspace.metadata.rrun]")?;
        let package = choose_package(
            metadata,
            folder,
            selection.package.as_ref().or(workspace.package.as_ref()),
        )?;
        let package_place = format!("[package.metadata.rrun] of `{}`", package.name);
        let package_table = package.metadata.get("rrun");
        let own = read_table(package_table, &package_place)?;
        let bin = choose_bin(
            package,
            selection
                .bin
                .as_ref()
                .or(own.bin.as_ref())
                .or(workspace.bin.as_ref()),
        )?;
        let settings = read_table(Some(&merge(workspace_table, package_table)), &package_place)?;

        let workspace_folder = tree_folder(metadata.workspace_root.as_std_path(), root)?;
        let package_folder = package
            .manifest_path
            .parent()
            .map_or(root, |parent| parent.as_std_path());
        let package_folder = tree_folder(package_folder, root)?;
        let settings_folder = if package_table.is_some() || workspace_table.is_none() {
            package_folder
        } else {
            workspace_folder.clone()
        };

        let inside = |key: &'static str, text: &str| {
            join(settings_folder.as_ref(), text).map_err(|source| PlanError::Path { key, source })
        };
        let working_directory = match &settings.working_directory {
            Some(text) => inside("working-directory", text)?,
            None => settings_folder.clone(),
        };
        let mut assets = Vec::new();
        for text in &settings.assets {
            let empty = PlanError::Path {
                key: "assets",
                source: PathError::Empty,
            };
            let asset = inside("assets", text)?.ok_or(empty)?;
            if asset.strip_prefix(working_directory.as_ref()).is_none() {
                return Err(PlanError::AssetOutside(asset));
            }
            assets.push(asset);
        }
        let mut features = settings.features.clone();
        features.extend(selection.features.iter().cloned());
        let defaults = RunPlan::default();
        let plan = Plan {
            build: BuildPlan {
                directory: workspace_folder,
                package: package.name.to_string(),
                bin,
                profile: match (selection.release, &settings.profile) {
                    (true, _) => "release".to_owned(),
                    (false, Some(profile)) => profile.clone(),
                    (false, None) => "dev".to_owned(),
                },
                features,
                no_default_features: false,
                environment: settings.build_env.clone(),
            },
            run: RunPlan {
                args: settings.args.clone(),
                environment: settings.env.clone(),
                working_directory,
                assets,
                ready_path: settings.ready_path.clone(),
                ready_timeout: settings.ready_timeout.unwrap_or(defaults.ready_timeout),
                drain_limit: settings.drain_limit.unwrap_or(defaults.drain_limit),
                stream_drain_limit: settings
                    .stream_drain_limit
                    .unwrap_or(defaults.stream_drain_limit),
                swap: selection.swap.or(settings.swap).unwrap_or_default(),
            },
        };
        plan.check()?;
        Ok(Self {
            plan,
            settings,
            settings_folder,
        })
    }
}

/// Reads one table and refuses keys that do not exist.
fn read_table(table: Option<&Value>, place: &str) -> Result<Settings, PlanError> {
    let Some(table) = table else {
        return Ok(Settings::default());
    };
    let mut unknown = None;
    let settings = serde_ignored::deserialize(table, |path| {
        unknown.get_or_insert(path.to_string());
    })
    .map_err(|error: serde_json::Error| PlanError::Value {
        place: place.to_owned(),
        why: error.to_string(),
    })?;
    match unknown {
        Some(key) => Err(PlanError::UnknownKey {
            nearest: nearest(&key),
            key,
            place: place.to_owned(),
        }),
        None => Ok(settings),
    }
}

fn nearest(key: &str) -> Option<&'static str> {
    /// Below this similarity a suggestion confuses more than it helps.
    const SIMILAR: f64 = 0.7;
    KEYS.into_iter()
        .map(|candidate| (strsim::jaro_winkler(key, candidate), candidate))
        .filter(|(similarity, _)| *similarity > SIMILAR)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate)
}

/// The workspace's keys under the package's.
fn merge(workspace: Option<&Value>, package: Option<&Value>) -> Value {
    let mut merged = Map::new();
    for table in [workspace, package]
        .into_iter()
        .flatten()
        .filter_map(Value::as_object)
    {
        merged.extend(
            table
                .iter()
                .map(|(key, value)| (key.clone(), value.clone())),
        );
    }
    Value::Object(merged)
}

fn binaries(package: &Package) -> Vec<String> {
    package
        .targets
        .iter()
        .filter(|target| target.is_bin())
        .map(|target| target.name.clone())
        .collect()
}

fn choose_package<'m>(
    metadata: &'m Metadata,
    folder: &Path,
    asked: Option<&String>,
) -> Result<&'m Package, PlanError> {
    let runnable: Vec<&Package> = metadata
        .workspace_packages()
        .into_iter()
        .filter(|package| !binaries(package).is_empty())
        .collect();
    let names = || {
        runnable
            .iter()
            .map(|package| package.name.to_string())
            .collect()
    };
    if let Some(name) = asked {
        let found = metadata
            .workspace_packages()
            .into_iter()
            .find(|package| package.name == *name);
        return found.ok_or_else(|| PlanError::NoPackage {
            name: name.clone(),
            candidates: names(),
        });
    }
    let lies_in_folder = |package: &&&Package| {
        package
            .manifest_path
            .parent()
            .is_some_and(|parent| parent.as_std_path() == folder)
    };
    if let Some(package) = runnable.iter().find(lies_in_folder) {
        return Ok(package);
    }
    let with_settings: Vec<_> = runnable
        .iter()
        .filter(|package| package.metadata.get("rrun").is_some())
        .collect();
    match (with_settings.as_slice(), runnable.as_slice()) {
        ([package], _) => Ok(package),
        (_, [package]) => Ok(package),
        (_, []) => Err(PlanError::NoBinary),
        _ => Err(PlanError::ManyPackages {
            candidates: names(),
        }),
    }
}

fn choose_bin(package: &Package, asked: Option<&String>) -> Result<String, PlanError> {
    let candidates = binaries(package);
    let package_name = package.name.to_string();
    if let Some(bin) = asked.or(package.default_run.as_ref()) {
        return if candidates.contains(bin) {
            Ok(bin.clone())
        } else {
            Err(PlanError::NoSuchBinary {
                package: package_name,
                bin: bin.clone(),
                candidates,
            })
        };
    }
    match candidates.as_slice() {
        [bin] => Ok(bin.clone()),
        [] => Err(PlanError::NoBinaryIn(package_name)),
        _ => Err(PlanError::ManyBinaries {
            package: package_name,
            candidates,
        }),
    }
}

/// `folder` as a path in the tree, `None` for its root.
fn tree_folder(folder: &Path, root: &Path) -> Result<Option<TreePath>, PlanError> {
    let outside = || PlanError::OutsideTree(folder.display().to_string());
    let relative = folder.strip_prefix(root).map_err(|_| outside())?;
    let components: Option<Vec<&str>> = relative
        .components()
        .map(|component| component.as_os_str().to_str())
        .collect();
    let text = components.ok_or_else(outside)?.join("/");
    if text.is_empty() {
        Ok(None)
    } else {
        TreePath::new(text).map(Some).map_err(|_| outside())
    }
}

/// Joins a path of the settings to the folder that it starts from; `.` and `..` are resolved, and may not leave the tree.
fn join(folder: Option<&TreePath>, text: &str) -> Result<Option<TreePath>, PathError> {
    let mut components: Vec<&str> = folder
        .map(|folder| folder.as_str().split('/').collect())
        .unwrap_or_default();
    if text.starts_with('/') {
        return Err(PathError::Absolute(text.to_owned()));
    }
    for component in text.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components
                    .pop()
                    .ok_or_else(|| PathError::Outside(text.to_owned()))?;
            }
            component => components.push(component),
        }
    }
    if components.is_empty() {
        Ok(None)
    } else {
        TreePath::new(components.join("/")).map(Some)
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text)
        .map(Some)
        .map_err(|error| serde::de::Error::custom(format!("`{text}`: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn metadata(workspace: Value, packages: &[(&str, &str, &[&str], Value)]) -> Metadata {
        let packages: Vec<Value> = packages
            .iter()
            .map(|(name, folder, bins, settings)| {
                let targets: Vec<Value> = bins
                    .iter()
                    .map(|bin| {
                        json!({"name": bin, "kind": ["bin"], "crate_types": ["bin"],
                               "src_path": format!("/w/{folder}/main.rs"), "edition": "2024"})
                    })
                    .collect();
                json!({"name": name, "version": "0.1.0", "id": format!("path+file:///w/{folder}#{name}@0.1.0"),
                       "dependencies": [], "targets": targets, "features": {}, "edition": "2024",
                       "manifest_path": format!("/w/{folder}/Cargo.toml"), "metadata": settings})
            })
            .collect();
        let members: Vec<&Value> = packages.iter().map(|package| &package["id"]).collect();
        let value = json!({"packages": packages, "workspace_members": members, "workspace_root": "/w",
                           "target_directory": "/w/target", "version": 1, "metadata": workspace});
        serde_json::from_value(value).unwrap()
    }

    fn resolve(
        metadata: &Metadata,
        folder: &str,
        selection: &Selection,
    ) -> Result<Project, PlanError> {
        Project::resolve(metadata, Path::new("/w"), Path::new(folder), selection)
    }

    #[test]
    fn one_package_with_one_binary_needs_no_settings() {
        let metadata = metadata(
            json!(null),
            &[
                ("app", "app", &["app"], json!(null)),
                ("lib", "lib", &[], json!(null)),
            ],
        );
        let plan = resolve(&metadata, "/w", &Selection::default())
            .unwrap()
            .plan;
        assert_eq!(
            (
                plan.build.package.as_str(),
                plan.build.bin.as_str(),
                plan.build.profile.as_str()
            ),
            ("app", "app", "dev")
        );
        assert_eq!(
            plan.run.working_directory,
            Some(TreePath::new("app").unwrap())
        );
    }

    #[test]
    fn the_command_line_wins_over_the_package_over_the_workspace() {
        let workspace =
            json!({"rrun": {"package": "one", "profile": "fast", "ready-timeout": "90s"}});
        let one = json!({"rrun": {"profile": "own", "assets": ["templates", "../one/static"]}});
        let metadata = metadata(
            workspace,
            &[
                ("one", "one", &["one"], one),
                ("two", "two", &["a", "b"], json!(null)),
            ],
        );
        let plan = resolve(&metadata, "/w", &Selection::default())
            .unwrap()
            .plan;
        assert_eq!(
            (plan.build.package.as_str(), plan.build.profile.as_str()),
            ("one", "own")
        );
        assert_eq!(plan.run.ready_timeout, Duration::from_secs(90));
        assert_eq!(
            plan.run.assets,
            ["one/templates", "one/static"].map(|path| TreePath::new(path).unwrap())
        );
        let selection = Selection {
            package: Some("two".into()),
            release: true,
            ..Selection::default()
        };
        assert!(matches!(
            resolve(&metadata, "/w", &selection),
            Err(PlanError::ManyBinaries { .. })
        ));
        let selection = Selection {
            bin: Some("b".into()),
            ..selection
        };
        let plan = resolve(&metadata, "/w", &selection).unwrap().plan;
        assert_eq!(
            (plan.build.bin.as_str(), plan.build.profile.as_str()),
            ("b", "release")
        );
    }

    #[test]
    fn mistakes_are_named_with_the_next_step() {
        let typo = metadata(
            json!(null),
            &[("app", "app", &["app"], json!({"rrun": {"asets": ["x"]}}))],
        );
        let error = resolve(&typo, "/w", &Selection::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown setting `asets` in [package.metadata.rrun] of `app`"
        );
        assert_eq!(error.hint().unwrap(), "did you mean `assets`?");
        for (settings, part) in [
            (json!({"ready-timeout": "soon"}), "`soon`"),
            (json!({"swap": "warm"}), "warm"),
            (json!({"assets": ["../../etc"]}), "leads out of the tree"),
            (json!({"assets": ["../other"]}), "working directory"),
            (json!({"working-directory": "/etc"}), "absolute"),
            (json!({"bin": "nope"}), "no binary `nope`"),
            (json!({"profile": "--config=x"}), "profile \"--config=x\""),
            (json!({"ready-path": "healthz"}), "ready path \"healthz\""),
            (json!({"env": {"RRUN_X": "1"}}), "environment \"RRUN_X\""),
        ] {
            let metadata = metadata(
                json!(null),
                &[("app", "app", &["app"], json!({"rrun": settings}))],
            );
            let error = resolve(&metadata, "/w", &Selection::default())
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{error}");
        }
        let two = metadata(
            json!(null),
            &[
                ("one", "one", &["x"], json!(null)),
                ("two", "two", &["y"], json!(null)),
            ],
        );
        let error = resolve(&two, "/w", &Selection::default()).unwrap_err();
        assert!(error.hint().unwrap().contains("one, two"));
        assert_eq!(
            resolve(&two, "/w/two", &Selection::default())
                .unwrap()
                .plan
                .build
                .package,
            "two"
        );
    }
}
