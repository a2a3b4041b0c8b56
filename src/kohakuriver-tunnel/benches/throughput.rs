//! The tunnel client alone beside one `socat`, in turns: bytes per second, and CPU per gigabyte of
//! the process that carries them. `cargo bench` prints one JSON object a line.
//!
//! `ROUNDS` (default 3) and `MEGABYTES` a run (default 2000) come from the environment.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kohakuriver_tunnel::protocol::{Header, TCP, kind};
use support::*;

const CHUNK: usize = 256 << 10;
const TURNS: usize = 3000;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn main() {
    let total = setting("MEGABYTES", 2000) * 1_000_000;
    for _ in 0..setting("ROUNDS", 3) {
        tunnel_down(total);
        socat("socat", total);
        tunnel_up(total);
        tunnel_turns();
        socat_turns();
    }
}

fn report(what: &str, direction: &str, bytes: usize, took: Duration, cpu: f64) {
    let gigabytes = bytes as f64 / 1e9;
    println!(
        "{{\"what\":\"{what}\",\"direction\":\"{direction}\",\"gbit_s\":{:.2},\"cpu_s_per_gb\":{:.3}}}",
        gigabytes * 8.0 / took.as_secs_f64(),
        cpu / gigabytes
    );
}

/// CPU seconds that a process has used.
fn cpu(child: &Child) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: f64 = fields[11..13]
        .iter()
        .map(|field| field.parse::<f64>().unwrap())
        .sum();
    ticks / 100.0
}

fn pour(mut sock: TcpStream, mut total: usize) {
    let bytes = vec![7; CHUNK];
    while total > 0 {
        let length = total.min(CHUNK);
        sock.write_all(&bytes[..length]).unwrap();
        total -= length;
    }
}

fn drain(mut sock: impl Read, total: usize) {
    let mut buffer = vec![0; CHUNK];
    let mut got = 0;
    while got < total {
        got += sock.read(&mut buffer).unwrap();
    }
}

fn tunnel_down(total: usize) {
    let runner = Runner::new();
    let client = Client::start(&runner);
    let mut wire = runner.accept();
    let (listener, port) = listener();
    wire.open(1, port, u64::MAX);
    let source = take(&listener);
    let (before, began) = (cpu(&client.child), Instant::now());
    let source = thread::spawn(move || pour(source, total));
    drain(wire.socket(), total);
    report(
        "tunnel-client",
        "to user",
        total,
        began.elapsed(),
        cpu(&client.child) - before,
    );
    drop(wire);
    source.join().unwrap();
}

fn tunnel_up(total: usize) {
    let runner = Runner::new();
    let client = Client::start(&runner);
    let mut wire = runner.accept();
    let (listener, port) = listener();
    wire.open(1, port, u64::MAX);
    let sink = take(&listener);
    let (before, began) = (cpu(&client.child), Instant::now());
    let mut writer = wire.socket().try_clone().unwrap();
    let limit = Arc::new((Mutex::new((wire.limits[&1], 0)), Condvar::new()));
    let raised = Arc::clone(&limit);
    thread::spawn(move || {
        while let Some((_, payload)) = wire.frame() {
            let mut state = raised.0.lock().unwrap();
            match payload[0] {
                kind::WINDOW => state.0 = u64::from_be_bytes(payload[8..].try_into().unwrap()),
                _ => state.1 += 1,
            }
            raised.1.notify_one();
        }
    });
    let sink = thread::spawn(move || drain(sink, total));
    let bytes = vec![7; CHUNK];
    let mut sent = 0;
    let mut window = 0;
    while sent < total {
        let mut state = limit.0.lock().unwrap();
        while state.0 == sent as u64 && state.1 == 0 {
            state = limit.1.wait(state).unwrap();
        }
        let (room, pings) = (state.0 as usize - sent, std::mem::take(&mut state.1));
        drop(state);
        window = window.max(room);
        for _ in 0..pings {
            writer
                .write_all(&message(Header::new(kind::PONG, TCP, 1), &[]))
                .unwrap();
        }
        let length = room.min(CHUNK).min(total - sent);
        if length > 0 {
            writer
                .write_all(&message(Header::new(kind::DATA, TCP, 1), &bytes[..length]))
                .unwrap();
        }
        sent += length;
    }
    sink.join().unwrap();
    report(
        "tunnel-client",
        "to container",
        total,
        began.elapsed(),
        cpu(&client.child) - before,
    );
    eprintln!("largest room seen: {window}");
}

fn start_socat(target: u16) -> (Child, TcpStream) {
    let (_, port) = listener();
    let child = Command::new("socat")
        .args([
            "-b",
            "262144",
            &format!("TCP-LISTEN:{port},bind=127.0.0.1,nodelay"),
            &format!("TCP:127.0.0.1:{target},nodelay"),
        ])
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))) {
            Ok(sock) => {
                sock.set_nodelay(true).unwrap();
                return (child, sock);
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn socat(what: &str, total: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut child, sock) = start_socat(listener.local_addr().unwrap().port());
    let source = take(&listener);
    let (before, began) = (cpu(&child), Instant::now());
    let source = thread::spawn(move || pour(source, total));
    drain(&sock, total);
    report(what, "either", total, began.elapsed(), cpu(&child) - before);
    drop(sock);
    source.join().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
}

fn report_turns(what: &str, mut took: Vec<Duration>) {
    took.sort();
    let micros = |part: usize| took[took.len() * part / 100].as_nanos() as f64 / 1e3;
    println!(
        "{{\"what\":\"{what}\",\"p50_us\":{:.1},\"p99_us\":{:.1}}}",
        micros(50),
        micros(99)
    );
}

fn tunnel_turns() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, echo_nodelay(), u64::MAX);
    let turn = || {
        let began = Instant::now();
        wire.data(1, &[7; 64]);
        wire.bytes(1, 64);
        began.elapsed()
    };
    report_turns(
        "tunnel-client",
        std::iter::repeat_with(turn).take(TURNS).collect(),
    );
}

fn socat_turns() {
    let (mut child, mut sock) = start_socat(echo_nodelay());
    let turn = || {
        let began = Instant::now();
        sock.write_all(&[7; 64]).unwrap();
        sock.read_exact(&mut [0; 64]).unwrap();
        began.elapsed()
    };
    report_turns("socat", std::iter::repeat_with(turn).take(TURNS).collect());
    child.kill().unwrap();
    child.wait().unwrap();
}

fn echo_nodelay() -> u16 {
    service(|mut sock| {
        sock.set_nodelay(true).unwrap();
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = sock.read(&mut buffer) {
            sock.write_all(&buffer[..length]).unwrap();
        }
    })
}
