//! The tunnel client: the endpoint inside a task's container.
//!
//! One WebSocket to the runner (a *link*) carries many *streams*; each is a TCP connection or a UDP
//! peer to a service in the container. `docs/protocol.md` is the authority for every byte.
//!
//! Everything runs on one thread around one `epoll`: bytes go from the link's receive buffer
//! straight into a service's socket, and from a service's socket through one shared frame buffer
//! straight into the link. Streams outlive the link: what is on its way is kept until it has arrived.

pub mod args;
pub mod backoff;
pub mod children;
pub mod context;
pub mod errors;
pub mod event_loop;
pub mod files;
pub mod flow;
pub mod frame;
pub mod handshake;
pub mod init;
pub mod keepalive;
pub mod kept;
pub mod link;
pub mod listeners;
pub mod log;
pub mod message;
pub mod net;
pub mod offer;
pub mod ports;
pub mod protocol;
pub mod queue;
pub mod registry;
pub mod retained;
pub mod session;
pub mod settings;
pub mod streams;
pub mod sys;
pub mod tcp;
pub mod terminal;
pub mod token;
pub mod tunnel;
pub mod udp;
