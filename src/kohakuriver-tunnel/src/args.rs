//! The command line, and the environment that stands in for it.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;

use crate::agent::{Agent, SshServer};
use crate::handshake::RunnerUrl;
use crate::log::Level;
use crate::offer::Offer;
use crate::outwards::Outwards;
use crate::settings::Settings;
use crate::token::{Place, Secret};

/// The variable that may hold an agent's token. What an agent starts gets its environment without it.
pub const TOKEN: &str = "KOHAKURIVER_TOKEN";

/// The variable that may hold who signed a runner's certificate. A command has no use for it either.
pub const AUTHORITIES: &str = "KOHAKURIVER_TUNNEL_CA";

/// What `--help` prints.
pub const HELP: &str = "\
Carries this container's ports to its runner.

Usage: tunnel-client [OPTIONS] [run [-- COMMAND...]]
       tunnel-client [OPTIONS] agent [AGENT-OPTIONS] [-- COMMAND...]

  run [-- COMMAND...]     start COMMAND, be its init (signals, orphans, exit code) and keep the
                          tunnel up beside it; without COMMAND stay until told to stop

  agent [-- COMMAND...]   without a runner: connect to a host, which makes a task of wherever this runs. COMMAND is
                          started once the host has taken it in, or can't be reached; with it the task ends

Options:
  -r, --runner-url URL    where the runner is, http://…, https://… or unix:/PATH [RUNNER_URL, KOHAKURIVER_TUNNEL_URL];
                          who signed its certificate is, as PEM, in KOHAKURIVER_TUNNEL_CA, else the system's authorities
  -c, --container-id ID   this container's id   [CONTAINER_ID, KOHAKURIVER_CONTAINER_ID]
  --token-file FILE       holds its token       [KOHAKURIVER_TUNNEL_TOKEN_FILE]
  --take-token FILE       the same; the file is removed once it is read [KOHAKURIVER_TUNNEL_TAKE_TOKEN]
  --token-fd N            the first token is read from this open descriptor, a newer one from such a file
  --reconnect-delay SECS  what the pause between attempts grows to, at random below it [RECONNECT_DELAY, 5]
  --max-reconnect N       give up after N failures in a row, 0 for never [MAX_RECONNECT, 0]
  --offer LIST            which ports are carried, with commas: all; own, those of this user's processes;
                          numbers, whosever they are [KOHAKURIVER_OFFER, all]
  --open-stdin            give COMMAND an input that stays open and empty, where a shell or an interpreter waits
  --log-level LEVEL       error, warn, info or debug [LOG_LEVEL, info]
  --version, --help

Agent options:
  --host URL              the host, or several with commas between [KOHAKURIVER_HOST]
  --name NAME             what the task is called       [KOHAKURIVER_AGENT_NAME]
  --token-file FILE       a token of its user, or of `token create --agent` [KOHAKURIVER_TOKEN has the token itself]
  --token-fd N            the same, read from an open descriptor
  --ca-file FILE          who signed the host's certificate [KOHAKURIVER_CA_FILE, the system's authorities]
  --ports LIST            what is carried beside what this user's processes listen on: ports, or all
  --via LOGIN             go out by `ssh -W` through this machine
  --ssh-port PORT, --ssh-host-key LINE, --ssh-host-key-ecdsa LINE
                          an SSH server that listens here on loopback

Windows and times, bytes and seconds, from the environment: KOHAKURIVER_WINDOW_FIRST,
KOHAKURIVER_WINDOW_MAX, KOHAKURIVER_WINDOW_BUDGET, KOHAKURIVER_KEEP_BUDGET, KOHAKURIVER_DETACHED_BUDGET,
KOHAKURIVER_DETACHED_STREAMS and KOHAKURIVER_TERMINALS (numbers), KOHAKURIVER_UDP_IDLE, KOHAKURIVER_LINGER.
LOG_LEVEL, RECONNECT_DELAY and MAX_RECONNECT may be another program's: what makes no sense in them is ignored.
";

/// What the process is to do.
#[derive(Debug)]
pub struct Options {
    /// The runner.
    pub url: RunnerUrl,
    /// This container's id.
    pub container: String,
    /// Where the container's token is.
    pub token: Option<Place>,
    /// The descriptor from which the first one is read.
    pub token_fd: Option<RawFd>,
    /// The longest pause between attempts.
    pub reconnect_delay: Duration,
    /// Failures in a row to give up after.
    pub max_reconnect: Option<u32>,
    /// How much to log.
    pub log_level: Level,
    /// What streams may hold, and how long they wait.
    pub settings: Settings,
    /// Whether the command's input stays open and empty.
    pub open_stdin: bool,
    /// `run`, with its command, which may be empty.
    pub run: Option<Vec<OsString>>,
    /// How a runner is reached that is spoken to over TLS.
    pub over_tls: Option<Outwards>,
    /// Of an agent, what it wants of its hosts.
    pub agent: Option<Agent>,
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Request {
    /// To work.
    Work(Box<Options>),
    /// To print this text.
    Print(String),
}

/// Reads arguments (the first is the program's name) and environment; an error is one sentence.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Request, String> {
    let mut parser = lexopt::Parser::from_iter(args);
    let mut url = env("RUNNER_URL").or_else(|| env("KOHAKURIVER_TUNNEL_URL"));
    let mut container = env("CONTAINER_ID").or_else(|| env("KOHAKURIVER_CONTAINER_ID"));
    let mut token = place(&env);
    let mut token_fd = None;
    // Names that others use too, with values of their own: those are ignored.
    let mut delay = word(&env, "RECONNECT_DELAY")
        .filter(|delay| Duration::try_from_secs_f64(*delay).is_ok())
        .unwrap_or(5.0);
    let mut max_reconnect = word(&env, "MAX_RECONNECT").unwrap_or(0);
    let mut log_level = word(&env, "LOG_LEVEL").unwrap_or(Level::Info);
    let mut open_stdin = false;
    let mut offer = None;
    let mut run = None;
    let mut asked = None;
    while let Some(argument) = parser.next().map_err(text)? {
        match argument {
            Short('r') | Long("runner-url") => url = Some(value(&mut parser)?),
            Short('c') | Long("container-id") => container = Some(value(&mut parser)?),
            Long("token-file") => token = Some(Place::File(file(&mut parser)?)),
            Long("take-token") => token = Some(Place::Taken(file(&mut parser)?)),
            Long("token-fd") => token_fd = Some(descriptor(&mut parser)?),
            Long("reconnect-delay") => delay = number(&mut parser)?,
            Long("max-reconnect") => max_reconnect = number(&mut parser)?,
            Long("log-level") => {
                log_level = value(&mut parser)?
                    .parse()
                    .map_err(|()| "--log-level is error, warn, info or debug")?;
            }
            Long("offer") => offer = Some(Offer::parse(&value(&mut parser)?)?),
            Long("open-stdin") => open_stdin = true,
            Short('h') | Long("help") => return Ok(Request::Print(HELP.into())),
            Short('V') | Long("version") => {
                return Ok(Request::Print(
                    concat!("tunnel-client ", env!("CARGO_PKG_VERSION"), "\n").into(),
                ));
            }
            Value(word) if word == "run" => run = Some(command(&mut parser)?),
            Value(word) if word == "agent" => asked = Some(AgentOptions::read(&mut parser, &env)?),
            other => return Err(text(other.unexpected())),
        }
    }
    if let Some(mut asked) = asked {
        asked.token_fd = asked.token_fd.or(token_fd);
        if run.is_some() {
            return Err("run and agent don't go together".into());
        }
        let settings = Settings::from_env(&env)?;
        return asked.options(settings, offer, delay, log_level, open_stdin);
    }
    let container = container.ok_or("no container id: give --container-id or set CONTAINER_ID")?;
    check_container(&container)?;
    let settings = Settings::from_env(&env)?;
    let url: RunnerUrl = url
        .ok_or("no runner: give --runner-url or set RUNNER_URL")?
        .parse()?;
    let authorities = env(AUTHORITIES);
    let over_tls = url
        .is_tls()
        .then(|| Outwards::to_runner(authorities.as_deref()))
        .transpose()?;
    Ok(Request::Work(Box::new(Options {
        url,
        container,
        token,
        token_fd,
        reconnect_delay: Duration::try_from_secs_f64(delay)
            .map_err(|_| "--reconnect-delay is a number of seconds")?,
        max_reconnect: (max_reconnect > 0).then_some(max_reconnect),
        log_level,
        settings: Settings {
            offer: offer.unwrap_or(settings.offer.clone()),
            ..settings
        },
        open_stdin,
        run,
        over_tls,
        agent: None,
    })))
}

/// What stands behind `agent`, and in the environment for it.
#[derive(Default)]
struct AgentOptions {
    hosts: Option<String>,
    name: Option<String>,
    token: Option<Place>,
    token_fd: Option<RawFd>,
    ca_file: Option<PathBuf>,
    ports: Option<String>,
    via: Option<String>,
    ssh: SshServer,
    command: Vec<OsString>,
}

impl AgentOptions {
    fn read(
        parser: &mut lexopt::Parser,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let given = env(TOKEN).map(|token| Place::Given(Secret(token.trim().to_owned())));
        let mut read = Self {
            hosts: env("KOHAKURIVER_HOST"),
            name: env("KOHAKURIVER_AGENT_NAME"),
            token: given,
            ca_file: env("KOHAKURIVER_CA_FILE").map(PathBuf::from),
            ..Self::default()
        };
        while let Some(argument) = next_option(parser)? {
            match argument {
                Long("host") => read.hosts = Some(value(parser)?),
                Long("name") => read.name = Some(value(parser)?),
                Long("token-file") => read.token = Some(Place::File(file(parser)?)),
                Long("token-fd") => read.token_fd = Some(descriptor(parser)?),
                Long("ca-file") => read.ca_file = Some(file(parser)?),
                Long("ports") => read.ports = Some(value(parser)?),
                Long("via") => read.via = Some(value(parser)?),
                Long("ssh-port") => read.ssh.port = Some(number(parser)?),
                Long("ssh-host-key") => read.ssh.host_key = Some(value(parser)?),
                Long("ssh-host-key-ecdsa") => read.ssh.host_key_ecdsa = Some(value(parser)?),
                other => return Err(text(other.unexpected())),
            }
        }
        read.command = parser.raw_args().map_err(text)?.collect();
        if read.command.first().is_some_and(|word| word == "--") {
            read.command.remove(0);
        }
        Ok(read)
    }

    fn options(
        self,
        settings: Settings,
        offer: Option<Offer>,
        delay: f64,
        log_level: Level,
        open_stdin: bool,
    ) -> Result<Request, String> {
        let named = self
            .hosts
            .ok_or("no host: give --host or set KOHAKURIVER_HOST")?;
        let hosts = named
            .split([',', ' '])
            .filter(|each| !each.is_empty())
            .map(RunnerUrl::of_host)
            .collect::<Result<Vec<_>, _>>()?;
        let first = hosts.first().cloned().ok_or("no host: --host is empty")?;
        if self.via.as_deref().is_some_and(|via| via.starts_with('-')) {
            return Err("--via is the name of a machine, as ssh takes it".into());
        }
        let offer = offered(self.ports, offer, &settings)?;
        let tls = hosts.iter().any(RunnerUrl::is_tls);
        let outwards = Outwards::new(tls, self.ca_file.as_deref(), self.via)?;
        if self.token.is_none() && self.token_fd.is_none() {
            return Err("no token: set KOHAKURIVER_TOKEN or give --token-file".into());
        }
        Ok(Request::Work(Box::new(Options {
            url: first,
            container: "this agent".into(),
            token: self.token,
            token_fd: self.token_fd,
            reconnect_delay: Duration::try_from_secs_f64(delay)
                .map_err(|_| "--reconnect-delay is a number of seconds")?,
            max_reconnect: None,
            log_level,
            settings: Settings { offer, ..settings },
            open_stdin,
            run: Some(self.command),
            over_tls: None,
            agent: Some(Agent::new(hosts, self.name, self.ssh, outwards)),
        })))
    }
}

/// Which ports an agent carries: its user's own and those that are named, unless something else was said.
fn offered(
    ports: Option<String>,
    said: Option<Offer>,
    settings: &Settings,
) -> Result<Offer, String> {
    let set = Some(settings.offer.clone()).filter(|offer| *offer != Offer::default());
    match (ports, said.or(set)) {
        (None, Some(said)) => Ok(said),
        (None, None) => Offer::parse("own"),
        (Some(more), _) if more.split(',').any(|each| each.trim() == "all") => Ok(Offer::default()),
        (Some(more), _) => Offer::parse(&format!("own,{more}")),
    }
}

/// The next option; none where the command begins, of which nothing is read.
fn next_option<'a>(parser: &'a mut lexopt::Parser) -> Result<Option<lexopt::Arg<'a>>, String> {
    let ends = match parser.try_raw_args() {
        Some(rest) => rest
            .peek()
            .is_none_or(|word| word == "--" || !word.to_string_lossy().starts_with('-')),
        None => false,
    };
    if ends {
        return Ok(None);
    }
    parser.next().map_err(text)
}

fn place(env: impl Fn(&str) -> Option<String>) -> Option<Place> {
    let taken = env("KOHAKURIVER_TUNNEL_TAKE_TOKEN").map(|path| Place::Taken(path.into()));
    taken.or_else(|| env("KOHAKURIVER_TUNNEL_TOKEN_FILE").map(|path| Place::File(path.into())))
}

fn file(parser: &mut lexopt::Parser) -> Result<PathBuf, String> {
    parser.value().map(PathBuf::from).map_err(text)
}

fn word<T: std::str::FromStr>(env: impl Fn(&str) -> Option<String>, name: &str) -> Option<T> {
    env(name)?.trim().parse().ok()
}

/// All that follows `run` and an optional `--`.
fn command(parser: &mut lexopt::Parser) -> Result<Vec<OsString>, String> {
    let mut words: Vec<OsString> = parser.raw_args().map_err(text)?.collect();
    match words.first().and_then(|word| word.to_str()) {
        Some("--") => drop(words.remove(0)),
        Some(word) if word.starts_with('-') => {
            return Err(format!("{word} belongs in front of run, or behind run --"));
        }
        _ => {}
    }
    Ok(words)
}

fn check_container(id: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if id.is_empty() || !id.bytes().all(plain) {
        return Err(format!("{id:?} is not a container id"));
    }
    Ok(())
}

fn value(parser: &mut lexopt::Parser) -> Result<String, String> {
    parser
        .value()
        .and_then(|value| value.string())
        .map_err(text)
}

fn number<T: std::str::FromStr>(parser: &mut lexopt::Parser) -> Result<T, String> {
    let word = value(parser)?;
    word.parse()
        .map_err(|_| format!("{word:?} is not a number that fits"))
}

/// One that is no program's input or output.
fn descriptor(parser: &mut lexopt::Parser) -> Result<RawFd, String> {
    let number: RawFd = number(parser)?;
    let free = (number > 2).then_some(number);
    free.ok_or_else(|| "--token-fd is the number of an open descriptor, from 3 up".into())
}

fn text(error: lexopt::Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(words: &[&str], env: &[(&str, &str)]) -> Result<Options, String> {
        let args = [&["tunnel-client"], words].concat();
        let get = |name: &str| {
            env.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        match parse(args.iter().map(OsString::from), get)? {
            Request::Work(options) => Ok(*options),
            Request::Print(text) => Err(text),
        }
    }

    const BASE: [&str; 4] = ["--runner-url", "http://h:1", "--container-id", "vm-1"];

    #[test]
    fn the_command_line_stands_above_the_environment() {
        let env = [("RUNNER_URL", "http://other:2"), ("CONTAINER_ID", "vm-2")];
        assert_eq!(work(&BASE, &env).unwrap().container, "vm-1");
        assert_eq!(work(&[], &env).unwrap().container, "vm-2");
        let new = [
            ("KOHAKURIVER_TUNNEL_URL", "ws://h:1"),
            ("KOHAKURIVER_CONTAINER_ID", "vm-3"),
        ];
        assert_eq!(work(&[], &new).unwrap().container, "vm-3");
    }

    #[test]
    fn the_options_and_variables_of_earlier_tunnel_clients_count() {
        let env = [
            ("RECONNECT_DELAY", "7"),
            ("MAX_RECONNECT", "3"),
            ("LOG_LEVEL", "WARNING"),
        ];
        let options = work(&["-r", "http://h:1", "-c", "vm-1"], &env).unwrap();
        assert_eq!(options.container, "vm-1");
        assert_eq!(options.reconnect_delay, Duration::from_secs(7));
        assert_eq!(
            (options.max_reconnect, options.log_level),
            (Some(3), Level::Warn)
        );
        let options = work(&[&BASE[..], &["--max-reconnect", "0"]].concat(), &env).unwrap();
        assert_eq!(options.max_reconnect, None);
    }

    #[test]
    fn variables_that_another_program_means_are_ignored() {
        let env = [
            ("RECONNECT_DELAY", "-1"),
            ("MAX_RECONNECT", "never"),
            ("LOG_LEVEL", "20"),
        ];
        let options = work(&BASE, &env).unwrap();
        assert_eq!(options.reconnect_delay, Duration::from_secs(5));
        assert_eq!(
            (options.max_reconnect, options.log_level),
            (None, Level::Info)
        );
    }

    #[test]
    fn what_is_offered_is_all_unless_it_is_said() {
        let own = [("KOHAKURIVER_OFFER", "own")];
        let offer = |words: &[&str], env| {
            let options = work(&[&BASE[..], words].concat(), env);
            options.unwrap().settings.offer
        };
        assert_eq!(offer(&[], &[]), Offer::default());
        assert_eq!(offer(&[], &own), Offer::parse("own").unwrap());
        let named = Offer::parse("80").unwrap();
        assert_eq!(offer(&["--offer", "80"], &own), named);
    }

    #[test]
    fn all_behind_run_is_the_command() {
        let run = |words: &[&str]| work(&[&BASE[..], words].concat(), &[]).unwrap().run;
        assert_eq!(run(&[]), None);
        assert_eq!(run(&["run"]), Some(vec![]));
        assert_eq!(
            run(&["run", "--", "sh", "--help"]),
            Some(vec!["sh".into(), "--help".into()])
        );
        assert_eq!(run(&["run", "sh", "--", "x"]).unwrap().len(), 3);
    }

    #[test]
    fn an_agent_needs_a_host_and_a_token_and_offers_what_is_its_users() {
        let env = [("KOHAKURIVER_HOST", "a,https://b"), (TOKEN, "kr_1\n")];
        let options = work(&["agent", "--name", "lab", "--", "sh", "--x"], &env).unwrap();
        assert_eq!(options.run, Some(vec!["sh".into(), "--x".into()]));
        assert_eq!(options.token, Some(Place::Given(Secret("kr_1".into()))));
        assert_eq!(options.settings.offer, Offer::parse("own").unwrap());
        let agent = options.agent.unwrap();
        assert!(agent.target().starts_with("/ws/agent?name=lab"));
        let offer = |words: &[&str]| {
            let words = [&["agent"], words].concat();
            work(&words, &env).unwrap().settings.offer
        };
        assert_eq!(
            offer(&["--ports", "80,90", "true"]),
            Offer::parse("own,80,90").unwrap()
        );
        assert_eq!(offer(&["--ports", "all"]), Offer::default());
        let by_descriptor = work(&["agent", "--token-fd", "3"], &env[..1]).unwrap();
        assert_eq!(
            (by_descriptor.token, by_descriptor.token_fd),
            (None, Some(3))
        );
        assert!(work(&["agent"], &env[..1]).is_err() && work(&["agent"], &env[1..]).is_err());
    }

    #[test]
    fn a_bad_command_line_is_told_in_one_sentence() {
        for words in [
            &["--no-such"][..],
            &["--reconnect-delay", "-1"],
            &["--reconnect-delay", "soon"],
            &["--max-reconnect", "-1"],
            &["--log-level", "loud"],
            &["--token-fd", "2"],
            &["--offer", "some"],
            &["walk"],
            &["run", "--log-level", "debug"],
            &["--container-id", "a/b"],
            &["--runner-url", "https://h:port"],
            &["agent", "--no-such"],
            &["agent", "--host", "ftp://h"],
            &["agent", "--host", "h", "--via", "-oProxyCommand=x"],
            &["agent", "--host", "h", "--ports", "some"],
            &["agent", "--host", "https://h", "--ca-file", "/no/such/file"],
        ] {
            let error = work(&[&BASE[..], words].concat(), &[]).unwrap_err();
            assert!(
                !error.contains('\n') && !error.is_empty(),
                "{words:?}: {error:?}"
            );
        }
        assert!(work(&[], &[]).is_err());
    }
}
