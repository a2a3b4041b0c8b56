import type { JSX } from "preact";
import { lazy, Suspense } from "preact/compat";
import { useEffect, useState } from "preact/hooks";
import { ask, get, taskPath } from "../api";
import { bytes, moment, parseSpan, quoted, rate, since, span } from "../format";
import { ports, rates, sessions, state, tasks, traffic, watchPorts } from "../feed";
import { me, owns } from "../me";
import { Act, Choice, complain, Confirm, Copy, Field, FormDialog, StatusMark, Table, tell } from "../parts";
import { go, href } from "../route";
import type { Group, Port, Task } from "../types";
import { KEEP_PREFIX, KEEP_PREFIX_HINT } from "./newtask";
import { Output } from "./output";
import { SessionRows } from "./sessionrows";

const Plot = lazy(() => import("../plot"));

export function TaskPage({ reference }: { reference: string }): JSX.Element {
  const task = [...tasks.value.values()].find((each) => each.name === reference || String(each.task_id) === reference);
  const running = task?.status === "running";
  const id = task ? String(task.task_id) : "";
  useEffect(() => {
    watchPorts(running ? id : "");
    return () => watchPorts("");
  }, [id, running]);
  if (!task) return <Missing reference={reference} />;
  return (
    <>
      <div class="heading">
        <h1>
          {task.name} <StatusMark status={task.status} />
        </h1>
        <Buttons task={task} />
      </div>
      {task.message && <p class="wrong">{task.message}</p>}
      <div class="columns">
        <section aria-labelledby="ports-title">
          <h2 id="ports-title">Ports</h2>
          <Ports task={task} running={running} />
          {running && me.value?.apps && owns(task) && <Told task={task} />}
        </section>
        <section aria-labelledby="reach-title">
          <h2 id="reach-title">From your machine</h2>
          <Reach task={task} />
        </section>
      </div>
      <section aria-labelledby="rates-title">
        <h2 id="rates-title">Now</h2>
        <Rates task={task} />
      </section>
      <section aria-labelledby="sessions-title">
        <h2 id="sessions-title">Open sessions</h2>
        <SessionRows of={[...sessions.value.values()].filter((session) => session.task_id === task.task_id)} />
      </section>
      <section aria-labelledby="output-title">
        <h2 id="output-title">Output</h2>
        <Output task={task} />
      </section>
      <section aria-labelledby="about-title">
        <h2 id="about-title">About</h2>
        <About task={task} />
      </section>
    </>
  );
}

function Missing({ reference }: { reference: string }): JSX.Element {
  return state.value === "live" ? (
    <>
      <h1>{reference}</h1>
      <p>
        There is no such task, or it is not shared with you. <a href={href("tasks")}>All tasks</a>
      </p>
    </>
  ) : (
    <p class="hint">Loading…</p>
  );
}

function Buttons({ task }: { task: Task }): JSX.Element {
  const [open, setOpen] = useState<"" | "stop" | "remove" | "share" | "extend">("");
  const close = (): void => setOpen("");
  const active = task.status === "running" || task.status === "starting";
  const control = task.backend !== "address";
  return (
    <div class="buttons">
      {task.status === "running" && (
        <a class="button primary" href={href("tasks", task.name, "terminal")}>
          Terminal
        </a>
      )}
      {owns(task) && (
        <>
          <button type="button" onClick={() => setOpen("share")}>
            Share
          </button>
          {task.ends_at && (
            <button type="button" onClick={() => setOpen("extend")}>
              Extend
            </button>
          )}
          {control && (
            <Act act={() => ask("POST", taskPath(task, "/restart"))} done={`Task ${task.name} was started again.`}>
              {active ? "Restart" : "Start"}
            </Act>
          )}
          {control && active && (
            <button type="button" onClick={() => setOpen("stop")}>
              Stop
            </button>
          )}
          <button type="button" class="danger" onClick={() => setOpen("remove")}>
            Remove
          </button>
        </>
      )}
      {open === "share" && <Share task={task} close={close} />}
      {open === "extend" && <Extend task={task} close={close} />}
      {open === "stop" && (
        <Confirm
          title={`Stop ${task.name}?`}
          button="Stop it"
          close={close}
          act={async () => (await ask("POST", taskPath(task, "/stop")), tell(`Task ${task.name} was stopped.`))}
        >
          <p>Its programs end, and what is connected to them. It can be started again.</p>
        </Confirm>
      )}
      {open === "remove" && (
        <Confirm
          title={`Remove ${task.name}?`}
          button="Remove it"
          close={close}
          act={async () => (await ask("DELETE", taskPath(task)), tell(`Task ${task.name} was removed.`, href("tasks")), go("tasks"))}
        >
          <p>It ends, and what a container has written outside of its mounts is gone for good.</p>
        </Confirm>
      )}
    </div>
  );
}

function Share({ task, close }: { task: Task; close: () => void }): JSX.Element {
  const [groups, setGroups] = useState<Group[]>([]);
  useEffect(() => {
    get<Group[]>("/api/groups").then(setGroups, () => undefined);
  }, []);
  async function share(field: (name: string) => string, form: HTMLFormElement): Promise<void> {
    const whom = field("whom");
    await ask("POST", taskPath(task, "/shares"), whom.startsWith("@") ? { group: whom.slice(1) } : { user: whom });
    form.reset();
  }
  const above = (
    <>
      <p>Whom it is shared with may reach its ports and open terminals in it, and so do there what you can.</p>
      {task.shared_with.length > 0 && (
        <ul class="plainlist">
          {task.shared_with.map((whom) => (
            <li key={whom}>
              <span>{whom}</span>
              <Act kind="small" label={`Share no more with ${whom}`} act={() => ask("DELETE", taskPath(task, `/shares/${encodeURIComponent(whom)}`))}>
                Take back
              </Act>
            </li>
          ))}
        </ul>
      )}
    </>
  );
  return (
    <FormDialog title={`Share ${task.name}`} close={close} above={above} send={share} submit="Share" leave="Close">
      <Field label="With" name="whom" required hint={`A user's name${groups.length ? `, or a group: ${groups.map((each) => `@${each.name}`).join(", ")}` : ", or a group as @NAME"}.`} />
    </FormDialog>
  );
}

function Extend({ task, close }: { task: Task; close: () => void }): JSX.Element {
  async function extend(field: (name: string) => string): Promise<void> {
    await ask("POST", taskPath(task, "/extend"), { seconds: parseSpan(field("by")) });
    tell(`Task ${task.name} ends later.`);
    close();
  }
  return (
    <FormDialog title={`Extend ${task.name}`} close={close} send={extend} submit="Extend">
      <Field label="By" name="by" placeholder="4h" required />
    </FormDialog>
  );
}

function Ports({ task, running }: { task: Task; running: boolean }): JSX.Element {
  const found = ports.value.get(String(task.task_id));
  if (!running) return <p class="hint">The task does not run.</p>;
  if (!found) return <p class="hint">Looking…</p>;
  if (found.error) return <p class="hint">{found.error}</p>;
  const shown = once(found.ports);
  if (!shown.length) return <p class="hint">Nothing listens yet. A port is shown here as soon as a program opens it.</p>;
  return (
    <ul class="ports">
      {shown.map((port) => (
        <li key={`${port.port}/${port.proto}`}>
          <span class="port">
            <strong>{port.port}</strong>
            {port.proto === "udp" && " UDP"} {port.program && <span class="hint">{port.program}</span>}
          </span>
          <Open task={task} port={port} />
        </li>
      ))}
      {found.more && <li class="hint">And more that are not shown.</li>}
    </ul>
  );
}

/** Each port once, whatever the addresses on which it listens. */
function once(found: Port[]): Port[] {
  const by = new Map<string, Port>();
  for (const port of found) if (!by.has(`${port.port}/${port.proto}`)) by.set(`${port.port}/${port.proto}`, port);
  return [...by.values()];
}

function Open({ task, port }: { task: Task; port: Port }): JSX.Element {
  const command = port.proto === "udp" ? `kohakuriver forward ${task.name} ${port.port}/udp` : `kohakuriver open ${task.name} ${port.port}`;
  return (
    <>
      {port.proto === "tcp" && me.value?.apps && (
        <a class="button small" href={`/open/${encodeURIComponent(task.name)}/${port.port}`} target="_blank" rel="noopener">
          Open
        </a>
      )}
      <Copy text={command} what={`the command that opens port ${port.port}`} />
    </>
  );
}

/** What the services of a task are told when they are opened here, which counts from the next request on. */
function Told({ task }: { task: Task }): JSX.Element {
  const [asked, setAsked] = useState<{ name: string; wanted: boolean } | null>(null);
  async function change(name: string, wanted: boolean): Promise<void> {
    setAsked({ name, wanted });
    try {
      await ask("POST", taskPath(task, "/web"), { [name]: wanted });
    } catch (error) {
      complain(error);
    } finally {
      setAsked(null);
    }
  }
  const box = (name: "keep_prefix" | "preserve_host", label: string, hint: string): JSX.Element => (
    <Choice
      name={name}
      label={label}
      hint={hint}
      checked={asked?.name === name ? asked.wanted : task[name]}
      disabled={asked !== null}
      change={(wanted) => void change(name, wanted)}
    />
  );
  return (
    <details class="told">
      <summary>If a page does not work when it is opened here</summary>
      {me.value?.apps_prefix && box("keep_prefix", KEEP_PREFIX, KEEP_PREFIX_HINT)}
      {box("preserve_host", "Tell programs the browser's address", "For those that want to know it. Else they are told that the browser is beside them, at localhost, which suits most.")}
    </details>
  );
}

function Reach({ task }: { task: Task }): JSX.Element {
  return (
    <dl class="lines">
      <dt>All its ports</dt>
      <dd>
        <Copy text={`kohakuriver forward ${task.name} --all`} what="the command for all ports" />
      </dd>
      <dt>SSH</dt>
      <dd>
        {task.ssh_port || task.backend === "address" ? (
          <Copy text={`kohakuriver vps connect ${task.name}`} what="the SSH command" />
        ) : (
          <span class="hint">The task was made without an SSH server.</span>
        )}
      </dd>
      <dt>Terminal</dt>
      <dd>
        <Copy text={`kohakuriver connect ${task.name}`} what="the command for a terminal" />
      </dd>
      <dt>Files</dt>
      <dd>
        <Copy text={`kohakuriver cp -r ${task.name}:PATH .`} what="the command that copies files" />
      </dd>
    </dl>
  );
}

function Rates({ task }: { task: Task }): JSX.Element {
  const [into = 0, out = 0] = rates.value.get(String(task.task_id)) ?? [];
  const all = traffic.value.get(String(task.task_id));
  return (
    <>
      <dl class="figures">
        <div>
          <dt class="into">into the task</dt>
          <dd>{rate(into)}</dd>
        </div>
        <div>
          <dt class="out">out of it</dt>
          <dd>{rate(out)}</dd>
        </div>
        <div>
          <dt>connections</dt>
          <dd>{all?.streams ?? 0}</dd>
        </div>
        <div>
          <dt>so far</dt>
          <dd>
            {bytes(all?.bytes_to_container ?? 0)} in, {bytes(all?.bytes_to_user ?? 0)} out
          </dd>
        </div>
      </dl>
      <Suspense fallback={<div class="plot" />}>
        <Plot into={into} out={out} />
      </Suspense>
    </>
  );
}

function About({ task }: { task: Task }): JSX.Element {
  const rows: [string, JSX.Element | string | null][] = [
    ["Id", String(task.task_id)],
    ["Node", task.node],
    ["Owner", task.owner],
    ["Shared with", task.shared_with.join(", ") || null],
    ["Made", `${moment(task.created_at)} (${since(task.created_at)})`],
    ["Backend", task.backend],
    ["Image", task.image],
    ["Address", task.address],
    ["Command", task.command.length ? quoted(task.command) : null],
    ["Variables", task.env.join(", ") || null],
    ["Volumes", task.volumes.join(", ") || null],
    ["Mounts", task.mounts.join(", ") || null],
    ["Memory", task.memory ? bytes(task.memory) : null],
    ["Processors", task.cpus ? String(task.cpus) : null],
    ["GPUs", task.gpus],
    ["Runs again", task.restart],
    ["Ends", task.ends_at ? moment(task.ends_at) : null],
    ["Stopped when unused for", task.idle_stop ? span(task.idle_stop) : null],
    ["Exit code", task.exit_code === null ? null : String(task.exit_code)],
  ];
  const told = rows.filter(([, value]) => value !== null);
  return (
    <Table label="About the task" cards={false}>
      <tbody>
        {told.map(([name, value]) => (
          <tr key={name}>
            <th scope="row">{name}</th>
            <td class="wrap">{value}</td>
          </tr>
        ))}
      </tbody>
    </Table>
  );
}
