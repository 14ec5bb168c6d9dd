//! How rrun was called, so that hints can be typed as they stand.

use std::path::Path;

/// Commands in hints, starting the way this process was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call(String);

impl Call {
    /// Looks at the process's own environment and arguments.
    pub(crate) fn of_this_process() -> Self {
        let by_cargo = std::env::var_os("CARGO").is_some()
            && std::env::var_os("CARGO_PKG_NAME").is_some_and(|name| name == "rrun");
        let program = std::env::args_os().next();
        Self::new(
            by_cargo,
            cfg!(debug_assertions),
            &program.unwrap_or_else(|| "rrun".into()).to_string_lossy(),
        )
    }

    fn new(by_cargo: bool, debug: bool, program: &str) -> Self {
        Self(match (by_cargo, debug) {
            (true, true) => "cargo run -p rrun --".to_owned(),
            (true, false) => "cargo run --release -p rrun --".to_owned(),
            (false, _) => quote(program),
        })
    }

    /// A command to type: `rrun <command> <folder>`, the folder left out where it is the current one.
    pub(crate) fn command(&self, command: &str, folder: &Path) -> String {
        if folder == Path::new(".") {
            format!("`{} {command}`", self.0)
        } else {
            format!(
                "`{} {command} {}`",
                self.0,
                quote(&folder.to_string_lossy())
            )
        }
    }
}

/// A word as a shell takes it.
fn quote(word: &str) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || "-_./:\\~+=,@".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_repeat_the_way_rrun_was_called() {
        let stop = |call: Call| call.command("stop --local", Path::new("sample-app"));
        assert_eq!(
            stop(Call::new(true, false, "target/release/rrun")),
            "`cargo run --release -p rrun -- stop --local sample-app`"
        );
        assert_eq!(
            stop(Call::new(true, true, "target/debug/rrun")),
            "`cargo run -p rrun -- stop --local sample-app`"
        );
        let typed = Call::new(false, false, "/opt/my tools/rrun");
        assert_eq!(
            typed.command("stop --local", Path::new(".")),
            "`'/opt/my tools/rrun' stop --local`"
        );
    }
}
