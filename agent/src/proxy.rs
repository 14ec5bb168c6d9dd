//! stub
pub struct Route; pub struct Proxy; impl Proxy { pub fn new(_r: tokio::sync::watch::Receiver<Route>)->Self{Self} }
