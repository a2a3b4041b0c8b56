/** What the host's HTTP API tells; its description is /openapi.json of the host. */

export type Status = "starting" | "running" | "stopped" | "failed" | "lost";

export interface Traffic {
  sessions: number;
  streams: number;
  bytes_to_container: number;
  bytes_to_user: number;
  to_container_per_second: number;
  to_user_per_second: number;
}

export interface Task {
  task_id: number;
  name: string;
  node: string;
  backend: string;
  status: Status;
  tunnel: boolean;
  container: string;
  created_at: string;
  owner: string;
  shared_with: string[];
  image: string | null;
  address: string | null;
  command: string[];
  mounts: string[];
  volumes: string[];
  env: string[];
  memory: number | null;
  cpus: number | null;
  pids: number | null;
  ttl: number | null;
  idle_stop: number | null;
  ends_at: string | null;
  restart: string | null;
  gpus: string | null;
  message: string | null;
  exit_code: number | null;
  ssh_port: number | null;
  preserve_host: boolean;
  keep_prefix: boolean;
}

export interface Node {
  name: string;
  url: string;
  status: "online" | "unreachable" | "offline";
  reason: string | null;
  cordoned: boolean;
  last_seen: string;
  backends: string[];
  unavailable: Record<string, string>;
  tasks: number;
  version: string;
  gpus: string[];
  gpus_free: string[];
}

export interface Session {
  id: string;
  user: string;
  task_id: number;
  task: string;
  node: string;
  proto: string;
  port: number | null;
  via: string | null;
  source: string | null;
  began_at: string;
  bytes_to_container: number;
  bytes_to_user: number;
  to_container_per_second: number;
  to_user_per_second: number;
}

export interface Port {
  port: number;
  proto: "tcp" | "udp";
  address: string;
  program: string | null;
}

export interface PortsOfTask {
  ports: Port[];
  more: boolean;
  error: string | null;
}

/** [to the container, to its users] in bytes a second. */
export type Rate = [number, number];

/** A line of /api/events: what is new in each part, by its key, and which keys are gone. */
export interface News {
  tasks?: Record<string, Task>;
  traffic?: Record<string, Traffic>;
  nodes?: Record<string, Node>;
  sessions?: Record<string, Session>;
  rates?: Record<string, Rate>;
  ports?: Record<string, PortsOfTask>;
  gone?: Record<string, string[]>;
  error?: string;
  message?: string;
  status?: number;
}

export interface Token {
  id: string;
  kind: "user" | "node" | "browser";
  name: string;
  user: string | null;
  node: string | null;
  status: "valid" | "expired" | "revoked";
  created_at: string;
  expires_at: string | null;
}

export interface TokenMade extends Token {
  token: string;
}

export interface Limit {
  limit: number | null;
  used: number | null;
  own: boolean;
}

export interface Whoami {
  user: string;
  role: "admin" | "user";
  token: Token;
  limits: Record<string, Limit>;
  /** Whether ports of tasks have addresses at this host, by the name by which the page is at it. */
  apps: boolean;
  /** Whether these are all under one origin, each with a prefix. */
  apps_prefix: boolean;
}

export interface User {
  name: string;
  role: "admin" | "user";
  created_at: string;
  limits: Record<string, number>;
}

export interface Group {
  name: string;
  members: string[];
  created_at: string;
}

export interface AuditPage {
  events: Record<string, unknown>[];
  after: string;
  more: boolean;
}

export interface LogLine {
  text: string;
  stream: "stdout" | "stderr" | "note";
  time: number | null;
  error?: string;
  message?: string;
}
