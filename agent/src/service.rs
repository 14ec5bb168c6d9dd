//! stub
use std::time::Duration; use tokio::sync::watch; use tokio_util::sync::CancellationToken; use crate::{app::AppSpec, output::*, proxy::Route};
pub struct Service; pub struct Replaced { pub ready: Duration, pub swap: Duration, pub warnings: Vec<(String, Option<String>)> }
#[derive(Clone,Default)] pub struct ServiceStatus { pub generation: Option<u64>, pub state: &'static str, pub process: Option<u32>, pub restarts: u32 }
#[derive(Debug, thiserror::Error)] pub enum ReplaceError { #[error("n")] NotReady{reason:String,hint:Option<String>,output:Vec<OutputLine>}, #[error("c")] Cancelled, #[error("s")] Start(std::io::Error) }
impl std::fmt::Debug for OutputLine { fn fmt(&self,f:&mut std::fmt::Formatter<'_>)->std::fmt::Result{f.write_str("x")} }
impl Service { pub fn new(_o:Output)->(Self,watch::Receiver<Route>){ (Self, watch::channel(Route).1) }
pub fn watch(&self)->watch::Receiver<ServiceStatus>{ watch::channel(ServiceStatus::default()).1 }
pub async fn replace(&mut self,_s:AppSpec,_c:&CancellationToken)->Result<Replaced,ReplaceError>{Err(ReplaceError::Cancelled)}
pub async fn hand_over(&mut self,_s:&AppSpec,_c:&CancellationToken)->Result<Replaced,ReplaceError>{Err(ReplaceError::Cancelled)}
pub async fn stop(&mut self,_w:&str){} pub async fn shutdown(self,_l:Duration){} pub fn status(&self)->ServiceStatus{ServiceStatus::default()} pub fn serving(&self)->Option<u64>{None} }
