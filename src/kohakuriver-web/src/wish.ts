/** A new task, as the form has it and as the API takes it. */

import { parseBytes, parseSpan, variables, words } from "./format";

/** What is asked of the API, by what was typed. Throws Error. */
export function wish(field: (name: string) => string, kind: string): Record<string, unknown> {
  const asked: Record<string, unknown> = {};
  const set = (name: string, value: unknown, there: unknown): void => {
    if (there) asked[name] = value;
  };
  set("name", field("name"), field("name"));
  set("node", field("node"), field("node"));
  if (kind === "process") asked["backend"] = "process";
  else asked["image"] = field("image");
  const command = words(field("command"));
  set("command", command, command.length);
  const env = variables(field("env"));
  set("env", env, Object.keys(env).length);
  for (const name of ["memory", "shm_size"]) if (field(name)) asked[name] = parseBytes(field(name));
  for (const name of ["ttl", "idle_stop"]) if (field(name)) asked[name] = parseSpan(field(name));
  if (field("cpus")) asked["cpus"] = numberOf(field("cpus"), "processors");
  set("gpus", field("gpus"), field("gpus"));
  set("restart", field("restart"), field("restart"));
  for (const name of ["mounts", "volumes"]) {
    const paths = lines(field(name));
    set(name, paths, paths.length);
  }
  set("keep_prefix", true, field("keep_prefix"));
  const keys = lines(field("ssh_keys"));
  set("ssh_keys", keys, keys.length);
  return asked;
}

function lines(text: string): string[] {
  return text.split("\n").map((line) => line.trim()).filter((line) => line !== "");
}

function numberOf(text: string, what: string): number {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new Error(`${text} is no number of ${what}.`);
  return value;
}
