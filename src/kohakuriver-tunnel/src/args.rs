//! The command line, and the environment that stands in for it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;

use crate::handshake::RunnerUrl;
use crate::log::Level;
use crate::offer::Offer;
use crate::settings::Settings;
use crate::token::Place;

/// What `--help` prints.
pub const HELP: &str = "\
Carries this container's ports to its runner.

Usage: tunnel-client [OPTIONS] [run [-- COMMAND...]]

  run [-- COMMAND...]     start COMMAND, be its init (signals, orphans, exit code) and keep the
                          tunnel up beside it; without COMMAND stay until told to stop

Options:
  -r, --runner-url URL    where the runner is, http://… or unix:/PATH [RUNNER_URL, KOHAKURIVER_TUNNEL_URL]
  -c, --container-id ID   this container's id   [CONTAINER_ID, KOHAKURIVER_CONTAINER_ID]
  --token-file FILE       holds its token       [KOHAKURIVER_TUNNEL_TOKEN_FILE]
  --take-token FILE       the same; the file is removed once it is read [KOHAKURIVER_TUNNEL_TAKE_TOKEN]
  --reconnect-delay SECS  what the pause between attempts grows to, at random below it [RECONNECT_DELAY, 5]
  --max-reconnect N       give up after N failures in a row, 0 for never [MAX_RECONNECT, 0]
  --offer LIST            which ports are carried, with commas: all; own, those of this user's processes;
                          numbers, whosever they are [KOHAKURIVER_OFFER, all]
  --open-stdin            give COMMAND an input that stays open and empty, where a shell or an interpreter waits
  --log-level LEVEL       error, warn, info or debug [LOG_LEVEL, info]
  --version, --help

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
    // Names that others use too, with values of their own: those are ignored.
    let mut delay = word(&env, "RECONNECT_DELAY")
        .filter(|delay| Duration::try_from_secs_f64(*delay).is_ok())
        .unwrap_or(5.0);
    let mut max_reconnect = word(&env, "MAX_RECONNECT").unwrap_or(0);
    let mut log_level = word(&env, "LOG_LEVEL").unwrap_or(Level::Info);
    let mut open_stdin = false;
    let mut offer = None;
    let mut run = None;
    while let Some(argument) = parser.next().map_err(text)? {
        match argument {
            Short('r') | Long("runner-url") => url = Some(value(&mut parser)?),
            Short('c') | Long("container-id") => container = Some(value(&mut parser)?),
            Long("token-file") => token = Some(Place::File(file(&mut parser)?)),
            Long("take-token") => token = Some(Place::Taken(file(&mut parser)?)),
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
            other => return Err(text(other.unexpected())),
        }
    }
    let container = container.ok_or("no container id: give --container-id or set CONTAINER_ID")?;
    check_container(&container)?;
    let settings = Settings::from_env(&env)?;
    Ok(Request::Work(Box::new(Options {
        url: url
            .ok_or("no runner: give --runner-url or set RUNNER_URL")?
            .parse()?,
        container,
        token,
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
    })))
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
    fn a_bad_command_line_is_told_in_one_sentence() {
        for words in [
            &["--no-such"][..],
            &["--reconnect-delay", "-1"],
            &["--reconnect-delay", "soon"],
            &["--max-reconnect", "-1"],
            &["--log-level", "loud"],
            &["--offer", "some"],
            &["walk"],
            &["run", "--log-level", "debug"],
            &["--container-id", "a/b"],
            &["--runner-url", "https://h"],
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
