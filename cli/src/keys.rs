//! The user's key pair: one file with the private part, made on first use.
//!
//! The file is readable by its owner alone, or refused. The public part is never stored; it follows from the private one.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rrun_protocol::{KeyError, PrivateKey, PublicKey};

use crate::{folders::make_private, problem::Problem};

/// A key and where it lies.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) private: PrivateKey,
    /// Whether it was made just now.
    pub(crate) is_new: bool,
    pub(crate) file: PathBuf,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyFileError {
    #[error("others can read the private key `{}` (mode {mode:o})", file.display())]
    Exposed { file: PathBuf, mode: u32 },
    #[error("`{}`: {source}", file.display())]
    Form { file: PathBuf, source: KeyError },
    #[error("cannot {doing} the private key `{}`: {source}", file.display())]
    File {
        doing: &'static str,
        file: PathBuf,
        source: io::Error,
    },
}

impl From<KeyFileError> for Problem {
    fn from(error: KeyFileError) -> Self {
        let hint = match &error {
            KeyFileError::Exposed { file, .. } => Some(format!("chmod 600 {}", file.display())),
            KeyFileError::Form { .. } => Some(
                "move it away and a new one is made; agents have to know the new public key"
                    .to_owned(),
            ),
            KeyFileError::File { .. } => None,
        };
        Self::usage(error).hint(hint)
    }
}

impl Key {
    /// Reads the key in `file`, or makes one there if there is none.
    pub(crate) fn load_or_make(file: &Path) -> Result<Self, KeyFileError> {
        if let Some(private) = load(file)? {
            return Ok(Self {
                private,
                is_new: false,
                file: file.to_owned(),
            });
        }
        let is_new = make(file).map_err(|source| KeyFileError::File {
            doing: "write",
            file: file.to_owned(),
            source,
        })?;
        // Read back, as another rrun may have been faster.
        let private = load(file)?.ok_or_else(|| KeyFileError::File {
            doing: "read",
            file: file.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        Ok(Self {
            private,
            is_new,
            file: file.to_owned(),
        })
    }

    /// The half that agents know, with the user's name.
    pub(crate) fn public(&self) -> PublicKey {
        self.private.public_key(&owner())
    }
}

fn load(file: &Path) -> Result<Option<PrivateKey>, KeyFileError> {
    let fails = |source| KeyFileError::File {
        doing: "read",
        file: file.to_owned(),
        source,
    };
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fails(error)),
    };
    refuse_if_exposed(file, &fs::metadata(file).map_err(fails)?)?;
    PrivateKey::from_pem(&text)
        .map(Some)
        .map_err(|source| KeyFileError::Form {
            file: file.to_owned(),
            source,
        })
}

#[cfg(unix)]
fn refuse_if_exposed(file: &Path, metadata: &fs::Metadata) -> Result<(), KeyFileError> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    Err(KeyFileError::Exposed {
        file: file.to_owned(),
        mode,
    })
}

/// Elsewhere the user's folder is private by itself, and there is no mode to ask for.
#[cfg(not(unix))]
fn refuse_if_exposed(_: &Path, _: &fs::Metadata) -> Result<(), KeyFileError> {
    Ok(())
}

/// Writes a new key whole or not at all, and says whether it did: another rrun may have come first.
fn make(file: &Path) -> io::Result<bool> {
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    make_private(folder)?;
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    // Temporary files are made with mode 0600.
    let mut unfinished = tempfile::NamedTempFile::new_in(folder)?;
    unfinished.write_all(PrivateKey::from_seed(&seed).to_pem().as_bytes())?;
    unfinished.as_file().sync_all()?;
    match unfinished.persist_noclobber(file) {
        Ok(_) => Ok(true),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error.error),
    }
}

/// `user@host`, for the agent's messages.
fn owner() -> String {
    let user = ["USER", "LOGNAME", "USERNAME"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    format!("{}@{host}", user.as_deref().unwrap_or("someone"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("new/folder/key.pem");
        let first = Key::load_or_make(&file).unwrap();
        let second = Key::load_or_make(&file).unwrap();
        assert!(first.is_new && !second.is_new);
        assert_eq!(first.public(), second.public());
        assert!(first.public().comment().contains('@'));
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_can_read_is_refused_with_what_to_do() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key.pem");
        Key::load_or_make(&file).unwrap();
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let problem = Problem::from(Key::load_or_make(&file).unwrap_err());
        assert_eq!(problem.code, rrun_protocol::ExitCode::Usage);
        assert_eq!(
            problem.hint.unwrap(),
            format!("chmod 600 {}", file.display())
        );
    }

    #[test]
    fn a_file_that_is_no_key_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key.pem");
        make(&file).unwrap();
        fs::write(&file, "not a key").unwrap();
        let error = Key::load_or_make(&file).unwrap_err();
        assert!(error.to_string().contains("key.pem"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "not a key");
    }
}
