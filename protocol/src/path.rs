//! Paths inside the pushed tree.
//!
//! A [`TreePath`] can only be a relative path that stays inside its tree, so that no later stage has to ask. Whether a
//! symbolic link on the way leads outside is not visible in a path; [`crate::Manifest`] and the agent's file access check that.

use std::{borrow::Borrow, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

use crate::limits::{MAX_PATH_BYTES, MAX_PATH_COMPONENT_BYTES};

/// A checked path relative to the tree's root: UTF-8, `/` between components, no `.`, `..`, `.git` or control character.
///
/// Ordered by its bytes, which is the order of manifests and archives.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TreePath(String);

/// Why a text is not a [`TreePath`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Nothing to name a file by.
    #[error("a path in the tree is empty")]
    Empty,
    /// Starts at the file system's root.
    #[error("`{0}` is absolute")]
    Absolute(String),
    /// Holds `..`, which could lead out of the tree.
    #[error("`{0}` leads out of the tree")]
    Outside(String),
    /// Holds `.`, `//` or ends with `/`, so that two texts would name one file.
    #[error("`{0}` is not in its shortest form")]
    NotNormal(String),
    /// Lies in a git directory, whose hooks and settings run commands.
    #[error("`{0}` lies in a git directory")]
    Git(String),
    /// Holds a control character, which could hide in a terminal.
    #[error("{0:?} holds a control character")]
    Control(String),
    /// Longer than [`MAX_PATH_BYTES`], or a component longer than [`MAX_PATH_COMPONENT_BYTES`].
    #[error("`{}…` is too long ({} bytes)", .0.chars().take(40).collect::<String>(), .0.len())]
    TooLong(String),
    /// Not UTF-8.
    #[error("`{0}` is not UTF-8")]
    NotUtf8(String),
}

impl TreePath {
    /// Checks `text` and takes it.
    pub fn new(text: impl Into<String>) -> Result<Self, PathError> {
        let text = text.into();
        if text.is_empty() {
            return Err(PathError::Empty);
        }
        if text.len() > MAX_PATH_BYTES {
            return Err(PathError::TooLong(text));
        }
        if text.starts_with('/') {
            return Err(PathError::Absolute(text));
        }
        if text.chars().any(char::is_control) {
            return Err(PathError::Control(text));
        }
        for component in text.split('/') {
            match component {
                "" | "." => return Err(PathError::NotNormal(text)),
                ".." => return Err(PathError::Outside(text)),
                _ if component.eq_ignore_ascii_case(".git") => return Err(PathError::Git(text)),
                _ if component.len() > MAX_PATH_COMPONENT_BYTES => {
                    return Err(PathError::TooLong(text));
                }
                _ => {}
            }
        }
        Ok(Self(text))
    }

    /// Checks bytes that came from an archive.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PathError> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::new(text),
            Err(_) => Err(PathError::NotUtf8(
                String::from_utf8_lossy(bytes).into_owned(),
            )),
        }
    }

    /// The path as text, `/` between components.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The folder that holds this path, or `None` at the tree's root.
    pub fn parent(&self) -> Option<Self> {
        self.0
            .rsplit_once('/')
            .map(|(folder, _)| Self(folder.to_owned()))
    }

    /// The last component.
    pub fn file_name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&self.0, |(_, name)| name)
    }

    /// All folders above this path, the innermost first.
    pub fn ancestors(&self) -> impl Iterator<Item = &str> {
        self.0.rmatch_indices('/').map(|(end, _)| &self.0[..end])
    }

    /// This path with `folder` in front.
    pub fn under(&self, folder: Option<&TreePath>) -> Result<Self, PathError> {
        match folder {
            Some(folder) => Self::new(format!("{folder}/{self}")),
            None => Ok(self.clone()),
        }
    }

    /// What follows `folder/`, or `None` if this path does not lie in it. `None` as folder is the root.
    pub fn strip_prefix(&self, folder: Option<&TreePath>) -> Option<&str> {
        match folder {
            Some(folder) => self.0.strip_prefix(folder.as_str())?.strip_prefix('/'),
            None => Some(&self.0),
        }
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for TreePath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        Self::new(text)
    }
}

impl Borrow<str> for TreePath {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<std::path::Path> for TreePath {
    fn as_ref(&self) -> &std::path::Path {
        std::path::Path::new(&self.0)
    }
}

impl<'de> Deserialize<'de> for TreePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_ordinary_and_unusual_names() {
        for text in [
            "src/main.rs",
            ".cargo/config.toml",
            "a b/ü.rs",
            "e\u{301}.rs",
            "...",
            ".gitignore",
            "back\\slash",
        ] {
            assert_eq!(TreePath::new(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn refuses_what_could_leave_the_tree_or_mislead() {
        use PathError as E;
        let long = "a/".repeat(MAX_PATH_BYTES);
        type Case<'t> = (&'t str, fn(String) -> PathError);
        let cases: [Case<'_>; 11] = [
            ("/etc/passwd", E::Absolute),
            ("../x", E::Outside),
            ("a/../../x", E::Outside),
            ("a//b", E::NotNormal),
            ("./a", E::NotNormal),
            ("a/", E::NotNormal),
            (".git/hooks/post-checkout", E::Git),
            ("a/.GIT/config", E::Git),
            ("a\u{1b}[2Jb", E::Control),
            ("a\0b", E::Control),
            (&long, E::TooLong),
        ];
        for (text, error) in cases {
            assert_eq!(TreePath::new(text), Err(error(text.to_owned())));
        }
        assert_eq!(TreePath::new(""), Err(E::Empty));
        assert!(matches!(TreePath::from_bytes(b"a\xff"), Err(E::NotUtf8(_))));
    }

    #[test]
    fn knows_its_folders() {
        let path = TreePath::new("a/b/c").unwrap();
        assert_eq!(path.ancestors().collect::<Vec<_>>(), ["a/b", "a"]);
        assert_eq!(
            path.strip_prefix(Some(&TreePath::new("a").unwrap())),
            Some("b/c")
        );
        assert_eq!(
            path.strip_prefix(Some(&TreePath::new("a/bb").unwrap())),
            None
        );
    }
}
