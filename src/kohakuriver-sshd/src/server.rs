//! Accepts clients, each in a thread of its own.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::connection::Connection;
use crate::log;
use crate::shared::Shared;

/// Before trying again where the system gives no more descriptors or threads.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves whoever connects, for ever.
pub fn serve(listener: &TcpListener, shared: &Arc<Shared>) -> ! {
    loop {
        let accepted = listener
            .accept()
            .and_then(|(stream, _)| admit(stream, shared));
        match accepted {
            Ok(()) => {}
            Err(error) if is_clients_own(&error) => {}
            Err(error) => {
                log!("can't take a connection: {error}");
                thread::sleep(PAUSE);
            }
        }
    }
}

fn is_clients_own(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, Interrupted, NotConnected, WouldBlock,
    };
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted | NotConnected | WouldBlock
    )
}

fn admit(stream: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    let stranger = shared.strangers.admit(&stream)?;
    let connection = Connection::new(stream, shared.clone(), stranger)?;
    thread::Builder::new()
        .name("client".into())
        .spawn(move || connection.run())
        .map(drop)
}
