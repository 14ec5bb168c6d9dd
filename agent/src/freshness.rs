//! The guard against stale binaries: what cargo called up to date although a file of it was touched.
//!
//! Cargo compares times. The agent gives touched files times that cargo has to notice; this checks that it did. The dep-info
//! beside the executable names every source of the executable and of the path dependencies in it, and a build script's
//! output names what that depends on. Whose a file is follows from the folder that it lies in.
//!
//! Decides nothing: who asks cleans the packages that are named here.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use cargo_metadata::{Artifact, BuildScript};
use rrun_protocol::TreePath;

use crate::tree::TouchedFiles;

/// How far file times may lie beside the clock's: kernels stamp by a clock that ticks every 1 to 10 ms.
const TICK: Duration = Duration::from_millis(20);

/// What cargo said of each unit of a build.
pub(crate) struct Units {
    /// When cargo was started.
    started: SystemTime,
    /// What was compiled or found up to date.
    pub artifacts: Vec<Artifact>,
    /// Build scripts that ran, or did not have to.
    pub scripts: Vec<BuildScript>,
}

impl Units {
    /// Nothing said yet, by a cargo that is started now.
    pub(crate) fn new() -> Self {
        Self {
            started: SystemTime::now(),
            artifacts: Vec::new(),
            scripts: Vec::new(),
        }
    }

    /// Names of the units that were compiled or run.
    pub(crate) fn made(&self) -> impl Iterator<Item = String> {
        let compiled = self
            .artifacts
            .iter()
            .filter(|artifact| !artifact.fresh)
            .map(unit);
        let ran = self
            .scripts
            .iter()
            .filter(|script| self.ran(script))
            .map(script_unit);
        compiled.chain(ran)
    }

    /// Packages that cargo calls fresh although one of their files was touched since, each with such a file.
    ///
    /// # Errors
    ///
    /// The dep-info beside `executable` cannot be read.
    pub(crate) fn stale(
        &self,
        tree: &Path,
        executable: &Path,
        touched: &TouchedFiles,
    ) -> io::Result<BTreeSet<(String, TreePath)>> {
        let mut stale = BTreeSet::new();
        if touched.is_empty() {
            return Ok(stale);
        }
        let inputs = inputs(&fs::read_to_string(executable.with_extension("d"))?);
        let product = self
            .artifacts
            .iter()
            .rfind(|artifact| artifact.executable.is_some());
        let product = product.filter(|product| product.fresh);
        for (path, made_since) in touched {
            let file = tree.join(path);
            let owner = self.owner(&file);
            let mut suspects = Vec::new();
            if inputs.contains(&file) {
                let owner = owner.filter(|owner| self.is_fresh(owner));
                let units = owner.into_iter().chain(product);
                suspects.extend(units.map(|artifact| (&artifact.package_id, unit(artifact))));
            }
            for script in self.scripts.iter().filter(|script| !self.ran(script)) {
                if self.depends_on(script, &file, owner) {
                    suspects.push((&script.package_id, script_unit(script)));
                }
            }
            let unexcused = suspects
                .into_iter()
                .filter(|(_, unit)| !made_since.contains(unit));
            stale.extend(unexcused.map(|(package, _)| (package.repr.clone(), path.clone())));
        }
        Ok(stale)
    }

    /// An artifact of the package whose folder holds `file`, the innermost if packages lie in each other.
    fn owner(&self, file: &Path) -> Option<&Artifact> {
        self.artifacts
            .iter()
            .filter(|artifact| folder(artifact).is_some_and(|folder| file.starts_with(folder)))
            .max_by_key(|artifact| artifact.manifest_path.as_str().len())
    }

    /// Whether cargo compiled nothing of the artifact's package.
    fn is_fresh(&self, owner: &Artifact) -> bool {
        let of_package = |artifact: &&Artifact| artifact.package_id == owner.package_id;
        self.artifacts
            .iter()
            .filter(of_package)
            .all(|artifact| artifact.fresh)
    }

    /// Whether a build script ran in this build: what it printed was written between cargo's start and now.
    fn ran(&self, script: &BuildScript) -> bool {
        let written = output(script).and_then(|output| fs::metadata(output).ok()?.modified().ok());
        written.is_some_and(|written| {
            written + TICK >= self.started && written <= SystemTime::now() + TICK
        })
    }

    /// Whether a build script has to run again when `file` changes: it says so, or it says nothing and the file is of its
    /// package.
    fn depends_on(&self, script: &BuildScript, file: &Path, owner: Option<&Artifact>) -> bool {
        let package = self
            .artifacts
            .iter()
            .find(|artifact| artifact.package_id == script.package_id);
        let Some(folder) = package.and_then(folder) else {
            return false;
        };
        let Some(said) = output(script).and_then(|output| fs::read(output).ok()) else {
            return false;
        };
        let said = String::from_utf8_lossy(&said);
        let mut named = said.lines().filter_map(|line| {
            let instruction = line
                .strip_prefix("cargo::")
                .or_else(|| line.strip_prefix("cargo:"))?;
            instruction.strip_prefix("rerun-if-changed=")
        });
        let says_nothing = !said.lines().any(|line| line.contains("rerun-if-"));
        let is_own = owner.is_some_and(|owner| owner.package_id == script.package_id);
        named.any(|path| file.starts_with(folder.join(path))) || (says_nothing && is_own)
    }
}

fn folder(artifact: &Artifact) -> Option<&Path> {
    artifact
        .manifest_path
        .parent()
        .map(|folder| folder.as_std_path())
}

/// Names what an artifact is: the executable, or something of its package.
fn unit(artifact: &Artifact) -> String {
    match &artifact.executable {
        Some(executable) => executable.to_string(),
        None => artifact.package_id.repr.clone(),
    }
}

fn script_unit(script: &BuildScript) -> String {
    format!("build script of {}", script.package_id.repr)
}

/// Where cargo keeps what a build script printed: beside the folder that it writes to.
fn output(script: &BuildScript) -> Option<PathBuf> {
    Some(script.out_dir.parent()?.as_std_path().join("output"))
}

/// The files on the right side of a dep-info's rules, which has make's form with `\ ` for a space.
fn inputs(dep_info: &str) -> BTreeSet<PathBuf> {
    let mut inputs = BTreeSet::new();
    for line in dep_info.lines() {
        let Some((_, files)) = line.split_once(": ") else {
            continue;
        };
        let mut file = String::new();
        let mut letters = files.chars();
        loop {
            match letters.next() {
                Some('\\') => file.extend(letters.next()),
                Some(letter) if letter != ' ' => file.push(letter),
                end => {
                    if !file.is_empty() {
                        inputs.insert(PathBuf::from(std::mem::take(&mut file)));
                    }
                    if end.is_none() {
                        break;
                    }
                }
            }
        }
    }
    inputs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dep_info_is_read_with_spaces_and_several_rules() {
        let text = "/t/debug/app: /w/a\\ b/main.rs /w/lib.rs\n\n/t/debug/other: /w/x.rs\n";
        let expected = ["/w/a b/main.rs", "/w/lib.rs", "/w/x.rs"].map(PathBuf::from);
        assert_eq!(inputs(text), BTreeSet::from(expected));
    }
}
