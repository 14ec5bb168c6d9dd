//! Cargo's configuration files: what of them may travel, and which other places they point to.
//!
//! Exists because `.cargo/config.toml` mixes what belongs to the project (aliases, flags, patches) with what belongs to one laptop (a linker,
//! a wrapper, registry tokens). The latter is taken out by name, deterministically and with all other text kept. It reads no
//! files, and does not judge whether the rest works on the agent.

use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, TableLike};

/// Settings that hold for one machine: `*` stands for any one key. Their values never leave the laptop.
const LAPTOP_ONLY: [&[&str]; 23] = [
    &["build", "rustc"],
    &["build", "rustc-wrapper"],
    &["build", "rustc-workspace-wrapper"],
    &["build", "rustdoc"],
    &["build", "target"],
    &["build", "target-dir"],
    &["build", "build-dir"],
    &["target", "*", "linker"],
    &["target", "*", "runner"],
    &["host", "linker"],
    &["host", "runner"],
    &["host", "*", "linker"],
    &["host", "*", "runner"],
    &["registry", "token"],
    &["registry", "secret-key"],
    &["registry", "credential-provider"],
    &["registry", "global-credential-providers"],
    &["registries", "*", "token"],
    &["registries", "*", "secret-key"],
    &["registries", "*", "credential-provider"],
    &["credential-alias"],
    &["http", "proxy"],
    &["http", "cainfo"],
];

/// Whether cargo would read a file of this path as its configuration.
pub(crate) fn is_cargo_config(path: &str) -> bool {
    [".cargo/config.toml", ".cargo/config"]
        .into_iter()
        .any(|name| {
            path.strip_suffix(name)
                .is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
        })
}

/// A configuration without what belongs to one laptop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Portable {
    /// The file's text; the original one if nothing was left out.
    pub(crate) text: String,
    /// Dotted names of what was left out.
    pub(crate) left_out: Vec<String>,
    /// Whether any setting remains.
    pub(crate) says_anything: bool,
}

/// Takes out what belongs to one laptop.
pub(crate) fn portable(text: &str) -> Result<Portable, toml_edit::TomlError> {
    let mut document: DocumentMut = text.parse()?;
    let mut left_out = Vec::new();
    for keys in LAPTOP_ONLY {
        take_out(document.as_table_mut(), keys, "", &mut left_out);
    }
    let says_anything = document.iter().any(|(_, item)| holds_value(item));
    let text = if left_out.is_empty() {
        text.to_owned()
    } else {
        document.to_string()
    };
    Ok(Portable {
        text,
        left_out,
        says_anything,
    })
}

fn take_out(table: &mut dyn TableLike, keys: &[&str], prefix: &str, left_out: &mut Vec<String>) {
    let Some((first, rest)) = keys.split_first() else {
        return;
    };
    let matching: Vec<String> = table
        .iter()
        .map(|(key, _)| key.to_owned())
        .filter(|key| *first == "*" || key == first)
        .collect();
    for key in matching {
        let name = format!("{prefix}{key}");
        if rest.is_empty() {
            table.remove(&key);
            left_out.push(name);
        } else if let Some(below) = table.get_mut(&key).and_then(Item::as_table_like_mut) {
            take_out(below, rest, &format!("{name}."), left_out);
        }
    }
}

fn holds_value(item: &Item) -> bool {
    match item.as_table_like() {
        Some(table) => table.iter().any(|(_, item)| holds_value(item)),
        None => !item.is_none(),
    }
}

/// Places that a configuration makes cargo read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pointers {
    /// More configuration files.
    pub(crate) configurations: Vec<PathBuf>,
    /// Folders of packages: patches and path overrides.
    pub(crate) packages: Vec<PathBuf>,
    /// Folders with vendored crates.
    pub(crate) vendored: Vec<PathBuf>,
}

/// What the configuration at `file` points to. A text that is not TOML points nowhere.
pub(crate) fn pointers(file: &Path, text: &str) -> Pointers {
    let mut found = Pointers::default();
    let (Ok(document), Some(beside)) = (text.parse::<DocumentMut>(), file.parent()) else {
        return found;
    };
    // Cargo resolves `include` from the file, and all other paths from the folder that holds `.cargo`.
    let base = beside.parent().unwrap_or(beside);
    for path in texts(document.get("include")) {
        found.configurations.push(beside.join(path));
    }
    for path in texts(document.get("paths")) {
        found.packages.push(base.join(path));
    }
    for (_, registry) in entries(document.get("patch")) {
        for (_, patch) in entries(Some(registry)) {
            let path = patch.get("path").and_then(Item::as_str);
            found.packages.extend(path.map(|path| base.join(path)));
        }
    }
    for (_, source) in entries(document.get("source")) {
        for key in ["directory", "local-registry"] {
            let path = source.get(key).and_then(Item::as_str);
            found.vendored.extend(path.map(|path| base.join(path)));
        }
    }
    found
}

/// A text, or the texts of a list; a table counts as the text of its `path`.
fn texts(item: Option<&Item>) -> Vec<String> {
    let Some(item) = item else {
        return Vec::new();
    };
    if let Some(text) = item.as_str() {
        return vec![text.to_owned()];
    }
    let of_value = |value: &toml_edit::Value| {
        let table = value.as_inline_table();
        let value = table.map_or(Some(value), |table| table.get("path"));
        value?.as_str().map(str::to_owned)
    };
    match item.as_array() {
        Some(list) => list.iter().filter_map(of_value).collect(),
        None => Vec::new(),
    }
}

fn entries(item: Option<&Item>) -> impl Iterator<Item = (&str, &Item)> {
    item.and_then(Item::as_table_like)
        .into_iter()
        .flat_map(|table| table.iter())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_one_laptop_is_left_out_and_the_rest_kept_with_its_comments() {
        let text = "# ours\n[build]\nrustc-wrapper = \"sccache\"\ntarget = \"x\"\n# keep\nrustflags = [\"--cfg\", \"x\"] # why\n\n\
                    [target.x86_64-unknown-linux-gnu]\nlinker = \"mold\"\nrunner = \"qemu\"\n\n\
                    [target.'cfg(unix)']\nrunner = [\"sudo\"]\n\n[registries]\nours = { index = \"sparse+https://x\", token = \"secret\" }\n\n\
                    [credential-alias]\na = [\"b\"]\n\n[alias]\nb = \"build\"\n";
        let portable = portable(text).unwrap();
        assert_eq!(
            portable.left_out,
            [
                "build.rustc-wrapper",
                "build.target",
                "target.x86_64-unknown-linux-gnu.linker",
                "target.x86_64-unknown-linux-gnu.runner",
                "target.cfg(unix).runner",
                "registries.ours.token",
                "credential-alias"
            ]
        );
        for gone in ["sccache", "mold", "qemu", "sudo", "secret"] {
            assert!(!portable.text.contains(gone), "{gone}");
        }
        for kept in [
            "# ours",
            "# keep",
            "# why",
            "--cfg",
            "sparse+https://x",
            "b = \"build\"",
        ] {
            assert!(portable.text.contains(kept), "{kept}: {}", portable.text);
        }
        assert!(portable.says_anything);
        let again = super::portable(&portable.text).unwrap();
        assert_eq!((again.text, again.left_out.len()), (portable.text, 0));
    }

    #[test]
    fn a_text_without_laptop_settings_keeps_every_byte() {
        let text = "[alias]\r\nx   =  'run'\r\n";
        assert_eq!(portable(text).unwrap().text, text);
        let only = portable("[build]\ntarget-dir = \"/x\"\n").unwrap();
        assert!(!only.says_anything);
        assert!(portable("[build").is_err());
    }

    #[test]
    fn paths_start_from_where_cargo_starts_them() {
        let text = "include = [\"more.toml\", { path = \"even.toml\", optional = true }]\npaths = [\"over\"]\n\
                    [patch.crates-io]\na = { path = \"patched\" }\n[source.vendored-sources]\ndirectory = \"vendor\"\n";
        let found = pointers(Path::new("/w/.cargo/config.toml"), text);
        assert_eq!(
            found.configurations,
            ["/w/.cargo/more.toml", "/w/.cargo/even.toml"].map(PathBuf::from)
        );
        assert_eq!(found.packages, ["/w/over", "/w/patched"].map(PathBuf::from));
        assert_eq!(found.vendored, [PathBuf::from("/w/vendor")]);
    }

    #[test]
    fn configurations_are_known_by_their_place() {
        assert!(is_cargo_config(".cargo/config.toml") && is_cargo_config("a/.cargo/config"));
        assert!(!is_cargo_config("x.cargo/config") && !is_cargo_config("config.toml"));
    }
}
