import type { JSX } from "preact";
import { bytes, rate, since } from "../format";
import { Table } from "../parts";
import { href } from "../route";
import type { Session } from "../types";

export function what(session: Session): string {
  const kind = session.proto === "logs" ? "output" : session.proto;
  const port = session.port ? ` ${session.port}` : "";
  return `${kind}${port}${session.via === "browser" ? ", browser" : ""}`;
}

export function SessionRows({ of, named = false }: { of: Session[]; named?: boolean }): JSX.Element {
  if (!of.length) return <p class="hint">Nobody is connected that you may see.</p>;
  const shown = [...of].sort((a, b) => b.began_at.localeCompare(a.began_at) || a.id.localeCompare(b.id));
  return (
    <Table label="Sessions">
      <thead>
        <tr>
          <th scope="col">User</th>
          {named && <th scope="col">Task</th>}
          <th scope="col">What</th>
          <th scope="col">From</th>
          <th scope="col">Began</th>
          <th scope="col" class="number">
            In
          </th>
          <th scope="col" class="number">
            Out
          </th>
          <th scope="col" class="number">
            So far
          </th>
        </tr>
      </thead>
      <tbody>
        {shown.map((session) => (
          <tr key={session.id}>
            <th scope="row">{session.user}</th>
            {named && (
              <td>
                <a href={href("tasks", session.task)}>{session.task}</a>
              </td>
            )}
            <td>{what(session)}</td>
            <td>{session.source ?? ""}</td>
            <td>{since(session.began_at)}</td>
            <td class="number">{rate(session.to_container_per_second)}</td>
            <td class="number">{rate(session.to_user_per_second)}</td>
            <td class="number">{bytes(session.bytes_to_container + session.bytes_to_user)}</td>
          </tr>
        ))}
      </tbody>
    </Table>
  );
}
