//! stub
use std::{ffi::OsString,path::PathBuf};
#[derive(Clone)] pub struct AppSpec { pub generation: u64, pub directory: PathBuf, pub executable: PathBuf, pub run: rrun_protocol::RunPlan, pub environment: Vec<(OsString,OsString)> }
impl AppSpec { pub fn exec(&self, _p:u16)->std::io::Error { std::io::Error::other("x") } }
