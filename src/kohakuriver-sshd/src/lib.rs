//! `tunnel-sshd`: an SSH server in one static binary, for a task whose image has none.
//!
//! It runs inside of the task, as the user that starts it, and lets in the owners of authorized keys. Layers, innermost
//! first: [`wire`] and [`crypto`], [`keys`] and [`transport`] (no sockets), [`auth`], then [`channel`] and
//! [`connection`], one thread for each client, which relay between the client and descriptors: of programs
//! ([`session`]), of forwarded connections ([`forward`]) and of the servers of files ([`sftp`], [`scp`]).

pub mod agent;
pub mod algorithms;
pub mod args;
pub mod auth;
pub mod channel;
pub mod connection;
pub mod crypto;
pub mod forward;
pub mod keys;
pub mod log;
pub mod names;
pub mod scp;
pub mod server;
pub mod session;
pub mod sftp;
pub mod shared;
pub mod sys;
pub mod terminal;
pub mod transport;
pub mod user;
pub mod wire;
pub mod words;
