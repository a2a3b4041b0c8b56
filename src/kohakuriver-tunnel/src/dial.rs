//! Connecting over TCP, with patience for a peer that is about to be there.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::Poll;
use std::time::Duration;

use tokio::time;

use crate::handshake::{Refusal, wrong};

/// For a peer to be found, to answer, and to upgrade.
pub const OPENING: Duration = Duration::from_secs(10);
/// What is not answered for so long is asked again. A node drops what comes while its runner is away, and the kernel by
/// itself asks again after 1 s, 3 s, 7 s.
pub const KNOCK: Duration = Duration::from_millis(300);

/// Connects to the first of the runner's addresses that answers; none of them has all the time.
pub async fn dial(place: (&str, u16)) -> Result<tokio::net::TcpStream, Refusal> {
    let unknown = |error| wrong(format!("{}: {error}", place.0));
    let addresses: Vec<_> = tokio::net::lookup_host(place)
        .await
        .map_err(unknown)?
        .collect();
    let mut last = wrong(format!("{} has no address", place.0));
    for address in &addresses {
        let share = OPENING / addresses.len() as u32;
        last = match time::timeout(share, connect(*address)).await {
            Ok(Ok(sock)) => return Ok(sock),
            Ok(Err(error)) => wrong(format!("{address}: {error}")),
            Err(_) => wrong(format!("{address}: it didn't answer in time")),
        };
    }
    Err(last)
}

/// Connects. Where no answer comes soon, it asks again beside that: an answer may only be slow.
async fn connect(address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let ask = || Box::pin(tokio::net::TcpStream::connect(address));
    let mut asked = vec![ask()];
    loop {
        let first = poll_fn(|context| {
            let mut answers = asked.iter_mut().map(|one| one.as_mut().poll(context));
            answers.find(Poll::is_ready).unwrap_or(Poll::Pending)
        });
        match time::timeout(KNOCK, first).await {
            Ok(answer) => return answer,
            Err(_) => asked.push(ask()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpStream};
    use std::pin::pin;

    use socket2::{Domain, Socket, Type};
    use tokio::runtime::Builder;

    use super::*;

    /// How many sockets of this machine ask for a connection to a port, and have no answer.
    fn asking(port: u16) -> usize {
        let there = format!("0100007F:{port:04X}");
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let lines = table.lines().map(|line| line.split_whitespace());
        lines
            .filter(|line| {
                let words: Vec<_> = line.clone().collect();
                words[2] == there && words[3] == "02"
            })
            .count()
    }

    #[test]
    fn a_runner_that_does_not_answer_is_asked_again_before_the_kernel_does() {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        listener.listen(0).unwrap();
        let at = listener.local_addr().unwrap().as_socket().unwrap();
        // Its queue is full with this one: it drops what comes, as a node does whose runner is away.
        let _first = TcpStream::connect(at).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut dialled = pin!(dial(("127.0.0.1", at.port())));
            while asking(at.port()) < 2 {
                let moment = time::timeout(Duration::from_millis(10), &mut dialled);
                assert!(moment.await.is_err(), "nobody has answered");
            }
            listener.accept().unwrap();
            assert!(dialled.await.is_ok());
        });
    }
}
