//! `tunnel-client agent`: wherever it runs is a task of its user (docs/protocol.md, Agents). Which host is asked, and for
//! what.

use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::handshake::{RunnerUrl, Said};
use crate::init::Ender;
use crate::log;
use crate::outwards::Outwards;
use crate::sys;

/// The SSH server beside an agent, as users' programs know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshServer {
    /// Where it listens, on loopback.
    pub port: Option<u16>,
    /// Its keys, as lines of a public key's file: Ed25519, and ECDSA on P-256.
    pub host_key: Option<String>,
    #[allow(missing_docs)]
    pub host_key_ecdsa: Option<String>,
}

/// What an agent wants of its hosts.
#[derive(Debug)]
pub struct Agent {
    hosts: Vec<RunnerUrl>,
    name: Option<String>,
    /// Where it runs, for people.
    machine: Option<String>,
    ssh: SshServer,
    /// How the hosts are reached.
    pub outwards: Outwards,
    /// What it was started for, once that is there.
    pub ender: Arc<Ender>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Which of the hosts is asked.
    host: usize,
    /// The task's id, once a host has told it.
    task: Option<String>,
    /// What the host said when it refused.
    refused: Option<Said>,
    /// Whether there is a link.
    linked: bool,
    /// Whether none will be any more.
    over: bool,
}

/// How often it is looked whether there is a link.
const MOMENT: Duration = Duration::from_millis(20);

impl Agent {
    /// For a task of this name, or any; `hosts` are asked in turn, until one answers.
    pub fn new(
        hosts: Vec<RunnerUrl>,
        name: Option<String>,
        ssh: SshServer,
        outwards: Outwards,
    ) -> Self {
        Self {
            hosts,
            name,
            machine: sys::machine(),
            ssh,
            outwards,
            ender: Arc::default(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host to ask now.
    pub fn host(&self) -> &RunnerUrl {
        &self.hosts[self.state().host % self.hosts.len()]
    }

    /// That one gave no answer: the next is asked.
    pub fn failed(&self) {
        let mut state = self.state();
        state.host = (state.host + 1) % self.hosts.len();
    }

    /// Path and query of the request.
    pub fn target(&self) -> String {
        let mut query = Vec::new();
        let task = self.state().task.clone();
        let port = self.ssh.port.map(|port| port.to_string());
        for (key, value) in [
            ("task", &task),
            ("name", &self.name),
            ("machine", &self.machine),
            ("ssh_port", &port),
            ("ssh_host_key", &self.ssh.host_key),
            ("ssh_host_key_ecdsa", &self.ssh.host_key_ecdsa),
        ] {
            if let Some(value) = value {
                query.push(format!("{key}={}", escaped(value)));
            }
        }
        format!("/ws/agent?{}", query.join("&"))
    }

    /// The host has told which task this is: its id and its name.
    pub fn is_task(&self, told: Option<&str>) {
        let (id, name) = told
            .and_then(|told| told.split_once(' '))
            .unwrap_or_default();
        log!(Info, "this is task {name} ({id})");
        if !id.is_empty() {
            self.state().task = Some(id.to_owned());
        }
    }

    /// Whether any host has taken this in.
    pub fn was_taken_in(&self) -> bool {
        self.state().task.is_some()
    }

    /// There is a link, or none.
    pub fn is_linked(&self, linked: bool) {
        self.state().linked = linked;
    }

    /// There will be no link any more: the task is not this agent's.
    pub fn is_over(&self) {
        self.state().over = true;
    }

    /// Waits until a host can be told something, for so long at most; not for one that has never answered.
    pub fn wait_linked(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while self.may_be_linked() && Instant::now() < until {
            thread::sleep(MOMENT);
        }
    }

    fn may_be_linked(&self) -> bool {
        let state = self.state();
        state.task.is_some() && !state.linked && !state.over
    }

    /// Notes why a host refused, for whoever has to tell.
    pub fn was_refused(&self, said: Said) {
        self.state().refused = Some(said);
    }

    /// That, once.
    pub fn refusal(&self) -> Option<Said> {
        self.state().refused.take()
    }
}

/// A value as it stands in a query (RFC 3986 §2.1).
fn escaped(value: &str) -> String {
    let mut out = String::new();
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte.into());
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(hosts: &[&str]) -> Agent {
        let hosts = hosts
            .iter()
            .map(|host| RunnerUrl::of_host(host).unwrap())
            .collect();
        let ssh = SshServer {
            port: Some(2222),
            host_key: Some("ssh-ed25519 AA+/= me".into()),
            host_key_ecdsa: None,
        };
        Agent::new(hosts, Some("lab".into()), ssh, Outwards::default())
    }

    #[test]
    fn a_host_is_asked_for_a_task_and_later_for_that_one() {
        let mut agent = agent(&["h"]);
        agent.machine = Some("gpu17".into());
        let asked =
            "name=lab&machine=gpu17&ssh_port=2222&ssh_host_key=ssh-ed25519%20AA%2B%2F%3D%20me";
        assert_eq!(agent.target(), format!("/ws/agent?{asked}"));
        assert!(!agent.was_taken_in());
        agent.is_task(Some("17 lab"));
        assert!(agent.was_taken_in());
        assert_eq!(agent.target(), format!("/ws/agent?task=17&{asked}"));
    }

    #[test]
    fn hosts_are_asked_in_turn_while_none_answers() {
        let agent = agent(&["a", "b"]);
        let first = agent.host().clone();
        agent.failed();
        assert_ne!(agent.host(), &first);
        agent.failed();
        assert_eq!(agent.host(), &first);
    }
}
