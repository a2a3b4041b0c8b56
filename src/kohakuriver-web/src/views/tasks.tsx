import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { rate, since } from "../format";
import { nodes, rates, state, tasks, traffic } from "../feed";
import { me } from "../me";
import { StatusMark, Table } from "../parts";
import { href } from "../route";
import type { Task } from "../types";
import { NewTask } from "./newtask";

export function TasksPage(): JSX.Element {
  const [making, setMaking] = useState(false);
  const [only, setOnly] = useState("");
  const all = [...tasks.value.values()].sort((a, b) => b.created_at.localeCompare(a.created_at) || b.task_id - a.task_id);
  const wanted = only.toLowerCase();
  const shown = all.filter((task) => [task.name, task.owner, task.node, task.status].some((each) => each.includes(wanted)));
  return (
    <>
      <div class="heading">
        <h1>Tasks</h1>
        <button type="button" class="primary" onClick={() => setMaking(true)}>
          New task
        </button>
      </div>
      {all.length > 5 && (
        <div class="field narrow">
          <label for="find">Find</label>
          <input id="find" type="search" value={only} onInput={(event) => setOnly(event.currentTarget.value)} />
        </div>
      )}
      {all.length === 0 && <Nothing />}
      {all.length > 0 && shown.length === 0 && <p>No task has that in its name, owner, node or status.</p>}
      {shown.length > 0 && (
        <Table label="Tasks">
          <thead>
            <tr>
              <th scope="col">Task</th>
              <th scope="col">Status</th>
              <th scope="col">Node</th>
              <th scope="col">Owner</th>
              <th scope="col">Made</th>
              <th scope="col" class="number">
                Connected
              </th>
              <th scope="col" class="number">
                In
              </th>
              <th scope="col" class="number">
                Out
              </th>
            </tr>
          </thead>
          <tbody>
            {shown.map((task) => (
              <Row key={task.task_id} task={task} />
            ))}
          </tbody>
        </Table>
      )}
      {making && <NewTask close={() => setMaking(false)} />}
    </>
  );
}

function Nothing(): JSX.Element {
  if (state.value !== "live") return <p class="hint">{state.value || "Loading…"}</p>;
  if (!nodes.value.size) {
    return (
      <p>
        There is no task yet, nor a node that could run one: <code>kohakuriver runner</code>, on a machine for tasks, makes it one.
      </p>
    );
  }
  return (
    <p>
      There is no task yet. <em>New task</em> makes one, and so does <code>kohakuriver vps create</code>.
    </p>
  );
}

function Row({ task }: { task: Task }): JSX.Element {
  const key = String(task.task_id);
  const [into = 0, out = 0] = rates.value.get(key) ?? [];
  return (
    <tr>
      <th scope="row">
        <a href={href("tasks", task.name)}>{task.name}</a>
      </th>
      <td>
        <StatusMark status={task.status} />
      </td>
      <td>{task.node}</td>
      <td>{task.owner === me.value?.user ? "you" : task.owner}</td>
      <td title={task.created_at}>{since(task.created_at)}</td>
      <td class="number">{traffic.value.get(key)?.sessions ?? 0}</td>
      <td class="number">{rate(into)}</td>
      <td class="number">{rate(out)}</td>
    </tr>
  );
}
