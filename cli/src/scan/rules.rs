//! Which files ignore rules keep out: `.rrunignore` first, then git's own in git's order.
//!
//! Exists because the rules have to say not only whether but also why (`--dry-run` names the line), and because a repository's border counts: what a
//! home folder's `.gitignore` says is nothing to a repository inside. Patterns are matched by the `ignore` crate. It walks no folders.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use ignore::{
    Match,
    gitignore::{Gitignore, GitignoreBuilder, Glob},
};

use crate::discover::Note;

/// Our own ignore file; its rules win over git's.
pub(super) const OWN_FILE: &str = ".rrunignore";
const GIT_FILE: &str = ".gitignore";

/// The rules of one folder, linked to those of the folder above.
#[derive(Debug)]
pub(super) struct Level {
    above: Option<Arc<Level>>,
    place: Place,
    own: Gitignore,
    git: Gitignore,
    git_exclude: Gitignore,
    /// Whether a git repository begins here: git's rules from above end.
    is_border: bool,
    /// Starts of the paths that our own file brings back, as far as they are literal.
    brought_back: Vec<BroughtBack>,
}

/// How a path in the tree becomes one that starts at the level's folder.
#[derive(Debug)]
enum Place {
    /// The folder lies in the tree: so many bytes are left out.
    Inside(usize),
    /// The folder lies above the tree's root: this goes in front.
    Above(String),
}

#[derive(Debug)]
struct BroughtBack {
    literal: String,
    has_wildcard: bool,
}

/// What the rules say of a path.
pub(super) enum Verdict<'r> {
    /// No rule fits.
    Nothing,
    /// Kept out by git's rules, which our own can overrule for what lies below.
    KeptOutByGit(&'r Glob),
    /// Kept out by our own.
    KeptOut(&'r Glob),
    /// Brought back by a rule with `!`.
    BroughtBack(&'r Glob),
}

impl Level {
    /// The rules inside `folder`, whose path in the tree is `relative`: those from `above`, and its own if it has any.
    pub(super) fn enter(
        above: Option<&Arc<Self>>,
        folder: &Path,
        place: impl FnOnce() -> (usize, Option<String>),
        names: &BTreeSet<&OsStr>,
        notes: &mut Vec<Note>,
    ) -> Arc<Self> {
        let has = |name: &str| names.contains(OsStr::new(name));
        let is_border = has(".git");
        if let Some(above) = above
            && !is_border
            && !has(OWN_FILE)
            && !has(GIT_FILE)
        {
            return above.clone();
        }
        let mut rules_of = |name: &str| {
            if has(name) {
                read_rules(&folder.join(name), notes)
            } else {
                Gitignore::empty()
            }
        };
        let own = rules_of(OWN_FILE);
        let git = rules_of(GIT_FILE);
        let git_exclude = match exclude_file(folder).filter(|_| is_border) {
            Some(file) => read_rules(&file, notes),
            None => Gitignore::empty(),
        };
        let brought_back = if own.num_whitelists() > 0 {
            brought_back(&folder.join(OWN_FILE))
        } else {
            Vec::new()
        };
        let place = match place() {
            (_, Some(prefix)) => Place::Above(prefix),
            (skipped, None) => Place::Inside(skipped),
        };
        Arc::new(Self {
            above: above.cloned(),
            place,
            own,
            git,
            git_exclude,
            is_border,
            brought_back,
        })
    }

    fn candidate<'p>(&self, path: &'p str) -> Cow<'p, str> {
        match &self.place {
            Place::Inside(skipped) => Cow::Borrowed(&path[*skipped..]),
            Place::Above(prefix) => Cow::Owned(format!("{prefix}{path}")),
        }
    }

    fn chain(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |level| level.above.as_deref())
    }

    /// The levels of the repository that this one lies in.
    fn repository(&self) -> impl Iterator<Item = &Self> {
        let mut inside = true;
        self.chain()
            .take_while(move |level| std::mem::replace(&mut inside, !level.is_border))
    }

    /// What our own rules say.
    pub(super) fn own_verdict(&self, path: &str, is_folder: bool) -> Verdict<'_> {
        let found = first(
            self.chain().map(|level| (level, &level.own)),
            path,
            is_folder,
        );
        match found {
            Match::None => Verdict::Nothing,
            Match::Ignore(rule) => Verdict::KeptOut(rule),
            Match::Whitelist(rule) => Verdict::BroughtBack(rule),
        }
    }

    /// What all rules say; `global` are those of the user's git configuration.
    pub(super) fn verdict<'r>(
        &'r self,
        global: &'r Gitignore,
        path: &str,
        is_folder: bool,
    ) -> Verdict<'r> {
        let own = self.own_verdict(path, is_folder);
        if !matches!(own, Verdict::Nothing) {
            return own;
        }
        let found = first(
            self.repository().map(|level| (level, &level.git)),
            path,
            is_folder,
        )
        .or_else(|| {
            let excludes = self.repository().map(|level| (level, &level.git_exclude));
            first(excludes, path, is_folder)
        })
        .or_else(|| {
            let top = self.repository().last().map(|level| (level, global));
            first(top.into_iter(), path, is_folder)
        });
        match found {
            Match::None => Verdict::Nothing,
            Match::Ignore(rule) => Verdict::KeptOutByGit(rule),
            Match::Whitelist(rule) => Verdict::BroughtBack(rule),
        }
    }

    /// Whether our own rules name something below `folder` that they bring back.
    pub(super) fn brings_back_below(&self, folder: &str) -> bool {
        self.chain().any(|level| {
            if level.brought_back.is_empty() {
                return false;
            }
            let inside = format!("{}/", level.candidate(folder));
            level.brought_back.iter().any(|back| {
                back.literal.starts_with(&inside)
                    || (back.has_wildcard && inside.starts_with(&back.literal))
            })
        })
    }
}

fn first<'r>(
    rules: impl Iterator<Item = (&'r Level, &'r Gitignore)>,
    path: &str,
    is_folder: bool,
) -> Match<&'r Glob> {
    rules
        .filter(|(_, rules)| !rules.is_empty())
        .map(|(level, rules)| rules.matched(&*level.candidate(path), is_folder))
        .find(|found| !found.is_none())
        .unwrap_or(Match::None)
}

trait OrElse: Sized {
    fn or_else(self, other: impl FnOnce() -> Self) -> Self;
}

impl<T> OrElse for Match<T> {
    fn or_else(self, other: impl FnOnce() -> Self) -> Self {
        if self.is_none() { other() } else { self }
    }
}

/// The rules above the folders that a scan starts from.
pub(super) struct Above<'s> {
    root: &'s Path,
    levels: HashMap<PathBuf, Arc<Level>>,
}

impl<'s> Above<'s> {
    pub(super) fn new(root: &'s Path) -> Self {
        Self {
            root,
            levels: HashMap::new(),
        }
    }

    /// The rules that hold around `folder`, from its repository or the tree's root down; without its own.
    pub(super) fn around(&mut self, folder: &Path, notes: &mut Vec<Note>) -> Option<Arc<Level>> {
        let repository = folder
            .ancestors()
            .find(|folder| folder.join(".git").exists());
        let top = match repository {
            Some(repository) if self.root.starts_with(repository) => repository,
            _ => self.root,
        };
        if folder == top {
            return None;
        }
        folder
            .parent()
            .map(|parent| self.inside(parent, top, notes))
    }

    fn inside(&mut self, folder: &Path, top: &Path, notes: &mut Vec<Note>) -> Arc<Level> {
        if let Some(level) = self.levels.get(folder) {
            return level.clone();
        }
        let above = match folder.parent() {
            Some(parent) if folder != top => Some(self.inside(parent, top, notes)),
            _ => None,
        };
        let present: Vec<&OsStr> = [OWN_FILE, GIT_FILE, ".git"]
            .into_iter()
            .map(OsStr::new)
            .filter(|name| folder.join(name).exists())
            .collect();
        let level = Level::enter(
            above.as_ref(),
            folder,
            || place(self.root, folder),
            &present.into_iter().collect(),
            notes,
        );
        self.levels.insert(folder.to_owned(), level.clone());
        level
    }
}

/// How paths in the tree start at `folder`, which lies below or above `root`.
fn place(root: &Path, folder: &Path) -> (usize, Option<String>) {
    if let Ok(below) = folder.strip_prefix(root) {
        let text = slashed(below);
        return (if text.is_empty() { 0 } else { text.len() + 1 }, None);
    }
    let above = root.strip_prefix(folder).map(slashed).unwrap_or_default();
    (0, Some(format!("{above}/")))
}

/// `path` with `/` between its components.
pub(super) fn slashed(path: &Path) -> String {
    let components: Vec<Cow<'_, str>> = path
        .components()
        .map(|component| component.as_os_str().to_string_lossy())
        .collect();
    components.join("/")
}

/// Reads a file of rules. Lines that are no pattern are named, and count for nothing, as in git.
pub(super) fn read_rules(file: &Path, notes: &mut Vec<Note>) -> Gitignore {
    if !file.is_file() {
        return Gitignore::empty();
    }
    let mut builder = GitignoreBuilder::new("");
    let mut problem = builder.add(file);
    let rules = builder.build().unwrap_or_else(|error| {
        problem.get_or_insert(error);
        Gitignore::empty()
    });
    notes.extend(problem.map(|error| Note {
        text: format!("a rule of `{}` has no effect: {error}", file.display()),
        hint: None,
    }));
    rules
}

/// Where git keeps the rules of one clone: `info/exclude` in the directory that all its work trees share.
fn exclude_file(folder: &Path) -> Option<PathBuf> {
    let git = folder.join(".git");
    if git.is_dir() {
        return Some(git.join("info/exclude"));
    }
    let pointer = fs::read_to_string(&git).ok()?;
    let directory = folder.join(pointer.strip_prefix("gitdir:")?.trim());
    let shared = fs::read_to_string(directory.join("commondir"))
        .map_or(directory.clone(), |shared| directory.join(shared.trim()));
    Some(shared.join("info/exclude"))
}

/// The places named by lines with `!` that hold a slash; the others fit anywhere, and name no folder to look into.
fn brought_back(file: &Path) -> Vec<BroughtBack> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let patterns = text
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix('!'));
    patterns
        .map(|pattern| pattern.trim_end_matches('/'))
        .filter(|pattern| pattern.contains('/'))
        .map(|pattern| {
            let pattern = pattern.trim_start_matches('/');
            let literal = pattern.find(['*', '?', '[', '\\']);
            BroughtBack {
                literal: pattern[..literal.unwrap_or(pattern.len())].to_owned(),
                has_wildcard: literal.is_some(),
            }
        })
        .collect()
}

/// The rule with its place, as in `.gitignore:3: *.log`.
pub(super) fn describe(rule: &Glob, root: &Path) -> String {
    let Some(file) = rule.from() else {
        return rule.original().to_owned();
    };
    let line = fs::read_to_string(file).ok().and_then(|text| {
        let is_rule = |(_, line): &(usize, &str)| line.trim_end() == rule.original().trim_end();
        let (at, _) = text.lines().enumerate().filter(is_rule).last()?;
        Some(format!("{}:", at + 1))
    });
    let place = file
        .strip_prefix(root)
        .map_or_else(|_| file.display().to_string(), slashed);
    format!("{place}:{} {}", line.unwrap_or_default(), rule.original())
}
