//! Which Rust the agent has, and whether it is the one that the tree asks for.
//!
//! Without rustup, as in a slim image, nobody looks at a toolchain file: a build would silently use another compiler than at
//! home. Asks `rustc` once for each content of the file.

use rrun_protocol::{Digest, Manifest, TreePath};

use crate::{layout::Layout, recipe, shared::Shared};

/// Names of a toolchain file, the one that rustup prefers first.
const FILES: [&str; 2] = ["rust-toolchain", "rust-toolchain.toml"];

/// What was found last.
#[derive(Default)]
pub(crate) struct Toolchain {
    checked: Option<(Option<Digest>, Result<(), Mismatch>)>,
}

/// The tree asks for another Rust than the agent has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// A lower-case fragment.
    pub reason: String,
    /// What to do next.
    pub hint: String,
}

impl Toolchain {
    /// Checks the toolchain file that counts for a build in `directory` of the tree.
    pub(crate) async fn check(
        &mut self,
        shared: &Shared,
        manifest: &Manifest,
        directory: Option<&TreePath>,
    ) -> Result<(), Mismatch> {
        let file = file_for(manifest, directory);
        let digest = file.as_ref().map(|(_, digest)| *digest);
        if let Some((known, result)) = &self.checked
            && *known == digest
        {
            return result.clone();
        }
        let result = ask(shared, directory, file.map(|(path, _)| path)).await;
        self.checked = Some((digest, result.clone()));
        result
    }
}

/// The innermost toolchain file at or above `directory`.
fn file_for(manifest: &Manifest, directory: Option<&TreePath>) -> Option<(String, Digest)> {
    let folders = directory
        .into_iter()
        .flat_map(|directory| std::iter::once(directory.as_str()).chain(directory.ancestors()));
    let folders = folders.map(|folder| format!("{folder}/"));
    folders.chain([String::new()]).find_map(|folder| {
        FILES.into_iter().find_map(|name| {
            let path = format!("{folder}{name}");
            let digest = manifest.get(&path)?.digest;
            Some((path, digest))
        })
    })
}

async fn ask(
    shared: &Shared,
    directory: Option<&TreePath>,
    file: Option<String>,
) -> Result<(), Mismatch> {
    let hint = "change the toolchain file, or build the agent's image anew with that Rust";
    let hint = hint.to_owned();
    let version = match recipe::toolchain(&shared.layout, directory).output().await {
        Ok(output) => String::from_utf8_lossy(&output).trim().to_owned(),
        Err(error) => {
            let reason = format!("the agent has no Rust for this tree: {error}");
            return Err(Mismatch { reason, hint });
        }
    };
    shared.update(|status| status.toolchain = Some(version.clone()));
    let Some(file) = file else { return Ok(()) };
    let wanted = channel(&shared.layout, &file);
    match wanted.filter(|wanted| !is_of_channel(&version, wanted)) {
        None => Ok(()),
        Some(wanted) => {
            let reason = format!("`{file}` asks for Rust {wanted}, the agent has {version}");
            Err(Mismatch { reason, hint })
        }
    }
}

/// The channel that a toolchain file names: TOML, or the bare name as in its older form.
fn channel(layout: &Layout, file: &str) -> Option<String> {
    let text = std::fs::read_to_string(layout.tree().join(file)).ok()?;
    match text.parse::<toml_edit::DocumentMut>() {
        Ok(document) => {
            let channel = document.get("toolchain")?.get("channel")?;
            Some(channel.as_str()?.to_owned())
        }
        Err(_) => text.lines().next().map(|line| line.trim().to_owned()),
    }
}

/// Whether `rustc --version` says what a channel asks for. Dates and hosts in a channel's name are not compared.
fn is_of_channel(version: &str, channel: &str) -> bool {
    let Some(version) = version.strip_prefix("rustc ") else {
        return true;
    };
    let version = version.split(' ').next().unwrap_or_default();
    let channel = channel.split('-').next().unwrap_or_default();
    match channel {
        "stable" => !version.contains('-'),
        "beta" | "nightly" => version.contains(channel),
        number if number.starts_with(|first: char| first.is_ascii_digit()) => {
            version == number || version.starts_with(&format!("{number}."))
        }
        // A toolchain of somebody's own name: only they know.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rrun_protocol::{Entry, Kind};

    #[test]
    fn a_channel_is_compared_as_rustup_means_it() {
        let stable = "rustc 1.95.0 (59807616e 2026-04-14)";
        let nightly = "rustc 1.97.0-nightly (abc 2026-05-01)";
        for (version, channel, fits) in [
            (stable, "1.95.0", true),
            (stable, "1.95", true),
            (stable, "1.9", false),
            (stable, "1.80.0", false),
            (stable, "stable", true),
            (stable, "stable-x86_64-unknown-linux-gnu", true),
            (stable, "nightly-2026-05-01", false),
            (nightly, "nightly-2026-05-01", true),
            (nightly, "stable", false),
            (stable, "our-fork", true),
        ] {
            assert_eq!(is_of_channel(version, channel), fits, "{version} {channel}");
        }
    }

    #[test]
    fn the_innermost_file_counts() {
        let path = |text: &str| TreePath::new(text).unwrap();
        let entry = |content: &str| Entry::of(Kind::File, content.as_bytes());
        let manifest = Manifest::new([
            (path("rust-toolchain.toml"), entry("outer")),
            (path("a/b/rust-toolchain"), entry("inner")),
        ]);
        let manifest = manifest.unwrap();
        let file = |folder: &str| file_for(&manifest, Some(&path(folder))).unwrap().0;
        assert_eq!(
            (file("a/b"), file("a/b/c")),
            ("a/b/rust-toolchain".into(), "a/b/rust-toolchain".into())
        );
        assert_eq!(file("a"), "rust-toolchain.toml");
        assert_eq!(file_for(&manifest, None).unwrap().0, "rust-toolchain.toml");
    }
}
