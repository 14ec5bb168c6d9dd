//! `rrun-agent warm`: builds the tree that lies in the workspace with the recipe of a push, while an image is built.
//!
//! What it leaves is what a push would have left: the first push into a fresh container is incremental, and the image's own
//! build serves until then. Starts nothing.

use std::{collections::BTreeSet, io::Write as _};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use rrun_protocol::{EventKind, Project, Selection};
use tokio_util::sync::CancellationToken;

use crate::{
    Workspace,
    authorize::seconds_since_1970,
    compile::{Build, BuildLog, CompileError},
    layout::Layout,
    publish::{Generation, Generations},
    recipe,
    tree::Tree,
};

/// What `warm` is told.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    workspace: Workspace,
    /// Folder of the cargo workspace in the tree, if it is not the tree's root
    #[arg(long, value_name = "DIR", default_value = ".")]
    directory: String,
    /// Package to build
    #[arg(short, long, value_name = "PACKAGE")]
    package: Option<String>,
    /// Binary to build
    #[arg(long, value_name = "BIN")]
    bin: Option<String>,
    /// Features to switch on
    #[arg(long, value_delimiter = ',', value_name = "FEATURES")]
    features: Vec<String>,
    /// Build with the release profile
    #[arg(long)]
    release: bool,
}

pub(crate) async fn warm(arguments: Arguments) -> anyhow::Result<()> {
    let layout = Layout::create(&arguments.workspace.folder)?;
    let mut tree = Tree::open(&layout)?;
    tree.adopt()?;
    ensure!(
        !tree.manifest().is_empty(),
        "there is no source in `{}`",
        layout.tree().display()
    );
    let plan = {
        let Arguments {
            directory,
            package,
            bin,
            features,
            release,
            ..
        } = arguments;
        let folder = layout.tree().join(directory);
        let output = recipe::metadata(&folder)
            .output()
            .await
            .context("cargo cannot read the tree")?;
        let metadata = serde_json::from_slice(&output)
            .context("cannot understand what `cargo metadata` prints")?;
        let selection = Selection {
            package,
            bin,
            features,
            release,
            swap: None,
        };
        Project::resolve(&metadata, &layout.tree(), &folder, &selection)?.plan
    };
    let build_plan = plan.build.digest();
    let touched = tree.touched(&build_plan);
    let build = Build {
        layout: &layout,
        plan: &plan.build,
        touched: &touched,
        after_interruption: tree.build_begins(),
        log: &StandardError,
        cancel: &CancellationToken::new(),
    };
    let built = build.compile(&mut BTreeSet::new()).await;
    tree.build_ended(true);
    let built = match built {
        Ok(built) => built,
        Err(CompileError::Failed { error, .. }) => bail!("the tree does not compile: {error}"),
        Err(error) => return Err(error.into()),
    };
    tree.built(build_plan);
    let mut generations = Generations::open(&layout)?;
    let digest = tree.digest();
    let generation =
        generations.publish(&built.executable, tree.manifest(), |number| Generation {
            number,
            tree: digest,
            plan,
            by: String::new(),
            push: None,
            time: seconds_since_1970(),
        })?;
    generations.set_serving(generation.number)
}

/// Where the log goes while an image is built.
struct StandardError;

impl BuildLog for StandardError {
    fn tell(&self, event: EventKind) {
        if let EventKind::Log { text } | EventKind::Warning { text, .. } = event {
            // Nobody is there to tell if standard error is closed.
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }
}
