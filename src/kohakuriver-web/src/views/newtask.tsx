import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { ask } from "../api";
import { nodes, state } from "../feed";
import { me } from "../me";
import { Choice, Field, FormDialog, tell } from "../parts";
import { go, href } from "../route";
import type { Task } from "../types";
import { wish } from "../wish";

export const KEEP_PREFIX = "Ask programs by their whole path";
export const KEEP_PREFIX_HINT =
  "For those that were started with it, as Jupyter, Grafana or Vite: it is $KOHAKURIVER_WEB_PREFIX, a slash, and the port. All others are asked without it.";

export function NewTask({ close }: { close: () => void }): JSX.Element {
  const offered = new Set([...nodes.value.values()].filter((node) => node.status === "online").flatMap((node) => node.backends));
  const [chosen, setKind] = useState("");
  // Which nodes there are may not have been told yet when this is opened.
  const kind = chosen || (offered.has("docker") || !offered.has("process") ? "docker" : "process");

  async function make(field: (name: string) => string): Promise<void> {
    const made = await ask<Task>("POST", "/api/tasks", wish(field, kind));
    tell(`Task ${made.name} was made.`, href("tasks", made.name));
    close();
    go("tasks", made.name);
  }

  return (
    <FormDialog title="New task" close={close} send={make} submit="Make it" sending="Making it…">
      <fieldset class="choice">
        <legend>What it is</legend>
        {[
          ["docker", "A container"],
          ["process", "A process of the node"],
        ].map(([value, label]) => (
          <label key={value}>
            <input type="radio" name="kind" value={value} checked={kind === value} onChange={() => setKind(value!)} /> {label}
          </label>
        ))}
      </fieldset>
      {state.value === "live" && !offered.has(kind) && <p class="wrong">{offered.size ? "No node that is online offers that." : "No node is online: nothing can be started just now."}</p>}
      <div class="fields">
        <Field label="Name" name="name" hint="Small letters, digits, dots and dashes; one is made up if empty." />
        {kind === "docker" && <Field label="Image" name="image" placeholder="python:3.12-slim" required />}
      </div>
      <Field
        label="Command"
        name="command"
        placeholder="python3 -m http.server 8888"
        hint={
          kind === "docker"
            ? "As in a shell. Empty for the image's own."
            : "As in a shell, though none runs it: for pipes write sh -c '…'."
        }
        required={kind === "process"}
      />
      <details>
        <summary>Limits and more</summary>
        <div class="fields">
          <div class="field">
            <label for="field-node">Node</label>
            <select id="field-node" name="node">
              <option value="">the least loaded</option>
              {[...nodes.value.keys()].sort().map((name) => (
                <option key={name}>{name}</option>
              ))}
            </select>
          </div>
          <div class="field">
            <label for="field-restart">Runs again</label>
            <select id="field-restart" name="restart">
              <option value="">never</option>
              <option value="on-failure">on failure</option>
              <option value="unless-stopped">unless stopped</option>
              <option value="always">always</option>
            </select>
          </div>
          {kind === "docker" && (
            <>
              <Field label="Memory" name="memory" placeholder="2g" />
              <Field label="Processors" name="cpus" placeholder="1.5" />
              <Field label="GPUs" name="gpus" placeholder="1, all or 0,1" />
              <Field label="/dev/shm" name="shm_size" placeholder="64m" />
            </>
          )}
          <Field label="Stopped after" name="ttl" placeholder="8h" />
          <Field label="Stopped when unused for" name="idle_stop" placeholder="30m" />
        </div>
        <Field label="Variables" name="env" rows={2} placeholder="NAME=VALUE" hint="One a line." />
        {kind === "docker" && (
          <>
            <Field label="Volumes" name="volumes" rows={2} placeholder="work:/work" hint="NAME:/TARGET, one a line. Yours under that name on the node; made where it is not there, and kept when the task is gone." />
            <Field label="Mounts" name="mounts" rows={2} placeholder="/data:/data:ro" hint="SOURCE:/TARGET, one a line." />
          </>
        )}
        {me.value?.apps_prefix && <Choice name="keep_prefix" label={KEEP_PREFIX} hint={KEEP_PREFIX_HINT} />}
        <Field label="SSH keys" name="ssh_keys" rows={2} placeholder="ssh-ed25519 AAAA…" hint="With public keys, one a line, the task gets an SSH server." />
      </details>
    </FormDialog>
  );
}
