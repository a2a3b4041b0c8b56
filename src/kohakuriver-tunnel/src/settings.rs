//! What a stream may hold and how long it may wait, with the environment that changes it
//! (docs/guide/tuning.md). The names are those of the other endpoint's settings.

use std::time::Duration;

use crate::offer::Offer;

/// No window is set smaller than this, in bytes.
pub const MIN_WINDOW: u64 = 4 << 10;
/// Hops hold no more than this for one session, in bytes.
const MOST: u64 = 64 << 20;
/// The most streams that can be allowed to be detached.
const MOST_DETACHED: u64 = 1 << 20;
/// The longest time that can be set, in seconds.
const LONGEST: f64 = 86_400.0;

/// The settings of one tunnel.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// A stream's first window, in bytes.
    pub first_window: u64,
    /// What a stream's window may grow to, in bytes.
    pub max_window: u64,
    /// What all streams' windows may come to together, in bytes.
    pub budget: u64,
    /// What all streams may keep until it is acknowledged, in bytes.
    pub keep: u64,
    /// What all detached streams may hold together, in bytes.
    pub detached_bytes: u64,
    /// How many streams may be detached.
    pub detached: usize,
    /// How many terminals there may be at the same time.
    pub terminals: usize,
    /// How long a v1 stream waits for data after the service's end-of-file.
    pub linger: Duration,
    /// After how long without a datagram a UDP stream is closed.
    pub udp_idle: Duration,
    /// Which ports are carried.
    pub offer: Offer,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            first_window: 256 << 10,
            max_window: 16 << 20,
            budget: 64 << 20,
            keep: 64 << 20,
            // What may be kept and what windows may bring: a lost link alone ends no stream.
            detached_bytes: 128 << 20,
            detached: 16_384,
            terminals: 64,
            // Less than at the user's end: a service that ends its sending has mostly ended.
            linger: Duration::from_millis(200),
            udp_idle: Duration::from_secs(60),
            offer: Offer::default(),
        }
    }
}

impl Settings {
    /// Reads the environment; an error is one sentence.
    pub fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let default = Self::default();
        let settings = Self {
            first_window: bytes(&env, "KOHAKURIVER_WINDOW_FIRST", default.first_window)?,
            max_window: bytes(&env, "KOHAKURIVER_WINDOW_MAX", default.max_window)?,
            budget: bytes(&env, "KOHAKURIVER_WINDOW_BUDGET", default.budget)?,
            keep: bytes(&env, "KOHAKURIVER_KEEP_BUDGET", default.keep)?,
            detached_bytes: number(
                &env,
                "KOHAKURIVER_DETACHED_BUDGET",
                default.detached_bytes,
                [MIN_WINDOW, 4 * MOST],
                "a number of bytes",
            )?,
            detached: number(
                &env,
                "KOHAKURIVER_DETACHED_STREAMS",
                default.detached as u64,
                [0, MOST_DETACHED],
                "a number",
            )? as usize,
            terminals: number(
                &env,
                "KOHAKURIVER_TERMINALS",
                default.terminals as u64,
                [1, MOST_DETACHED],
                "a number",
            )? as usize,
            linger: seconds(&env, "KOHAKURIVER_LINGER", default.linger)?,
            udp_idle: seconds(&env, "KOHAKURIVER_UDP_IDLE", default.udp_idle)?,
            offer: offer(&env)?,
        };
        // A smaller whole bounds its parts, unless they are set themselves.
        let max_window = settings.max_window.min(settings.budget);
        Ok(Self {
            first_window: settings.first_window.min(max_window),
            max_window,
            ..settings
        })
    }
}

fn bytes(env: impl Fn(&str) -> Option<String>, name: &str, default: u64) -> Result<u64, String> {
    number(env, name, default, [MIN_WINDOW, MOST], "a number of bytes")
}

fn number(
    env: impl Fn(&str) -> Option<String>,
    name: &str,
    default: u64,
    [least, most]: [u64; 2],
    what: &str,
) -> Result<u64, String> {
    let Some(text) = env(name) else {
        return Ok(default);
    };
    text.parse()
        .ok()
        .filter(|value| (least..=most).contains(value))
        .ok_or_else(|| format!("{name} is {what} from {least} to {most}, not {text:?}"))
}

fn offer(env: impl Fn(&str) -> Option<String>) -> Result<Offer, String> {
    let name = "KOHAKURIVER_OFFER";
    let said = env(name).map(|text| Offer::parse(&text)).transpose();
    said.map(Option::unwrap_or_default)
        .map_err(|error| format!("{name}: {error}"))
}

fn seconds(
    env: impl Fn(&str) -> Option<String>,
    name: &str,
    default: Duration,
) -> Result<Duration, String> {
    let Some(text) = env(name) else {
        return Ok(default);
    };
    text.parse()
        .ok()
        .filter(|value| *value > 0.0 && *value <= LONGEST)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("{name} is a number of seconds up to {LONGEST}, not {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Result<Settings, String> {
        let get = |name: &str| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        Settings::from_env(get)
    }

    #[test]
    fn nothing_set_is_the_default() {
        assert_eq!(from(&[]).unwrap(), Settings::default());
    }

    #[test]
    fn each_setting_has_its_variable() {
        let settings = from(&[
            ("KOHAKURIVER_WINDOW_FIRST", "4096"),
            ("KOHAKURIVER_WINDOW_MAX", "65536"),
            ("KOHAKURIVER_WINDOW_BUDGET", "1048576"),
            ("KOHAKURIVER_KEEP_BUDGET", "2097152"),
            ("KOHAKURIVER_DETACHED_BUDGET", "134217728"),
            ("KOHAKURIVER_DETACHED_STREAMS", "0"),
            ("KOHAKURIVER_TERMINALS", "5"),
            ("KOHAKURIVER_LINGER", "0.5"),
            ("KOHAKURIVER_UDP_IDLE", "7"),
            ("KOHAKURIVER_OFFER", "own,8888"),
        ]);
        let expected = Settings {
            first_window: 4096,
            max_window: 65_536,
            budget: 1 << 20,
            keep: 2 << 20,
            detached_bytes: 128 << 20,
            detached: 0,
            terminals: 5,
            linger: Duration::from_millis(500),
            udp_idle: Duration::from_secs(7),
            offer: Offer::parse("own,8888").unwrap(),
        };
        assert_eq!(settings.unwrap(), expected);
    }

    #[test]
    fn a_smaller_whole_bounds_its_parts() {
        let settings = from(&[("KOHAKURIVER_WINDOW_BUDGET", "65536")]).unwrap();
        assert_eq!(
            (settings.first_window, settings.max_window),
            (65_536, 65_536)
        );
    }

    #[test]
    fn what_makes_no_sense_is_told_with_its_name() {
        for (name, text) in [
            ("KOHAKURIVER_WINDOW_FIRST", "4095"),
            ("KOHAKURIVER_WINDOW_MAX", "99999999999999999999"),
            ("KOHAKURIVER_WINDOW_BUDGET", "64M"),
            ("KOHAKURIVER_DETACHED_STREAMS", "all"),
            ("KOHAKURIVER_LINGER", "0"),
            ("KOHAKURIVER_UDP_IDLE", "NaN"),
            ("KOHAKURIVER_UDP_IDLE", "inf"),
            ("KOHAKURIVER_OFFER", "mine"),
        ] {
            let error = from(&[(name, text)]).unwrap_err();
            assert!(error.starts_with(name) && error.contains(text), "{error:?}");
        }
    }
}
