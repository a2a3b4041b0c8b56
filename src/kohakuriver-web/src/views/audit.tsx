import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { get } from "../api";
import { moment } from "../format";
import { complain, Field, Table, typed } from "../parts";
import type { AuditPage as Page } from "../types";

const NAMED = ["time", "event", "user", "task", "name", "node", "from", "via"];
const MOST = 500;

function text(value: unknown): string {
  return typeof value === "string" ? value : value === null || value === undefined ? "" : JSON.stringify(value);
}

interface Asked {
  hours: number;
  user: string;
  task: string;
}

/** The newest of what was done in so many hours; the host tells the oldest first. */
async function read({ hours, user, task }: Asked, wanted: () => boolean): Promise<Page["events"]> {
  const since = new Date(Date.now() - hours * 3_600_000).toISOString();
  let found: Page["events"] = [];
  let after: string | null = null;
  for (;;) {
    const query: URLSearchParams = new URLSearchParams(after === null ? { since } : { since, after });
    if (user) query.set("user", user);
    if (task) query.set("task", task);
    const page: Page = await get<Page>(`/api/audit?${query.toString()}`);
    found = [...found, ...page.events].slice(-MOST);
    after = page.after;
    if (!page.more || !wanted()) return found.reverse();
  }
}

export default function AuditPage(): JSX.Element {
  const [asked, setAsked] = useState<Asked>({ hours: 24, user: "", task: "" });
  const [events, setEvents] = useState<Page["events"] | null>(null);
  useEffect(() => {
    let wanted = true;
    setEvents(null);
    read(asked, () => wanted).then((found) => wanted && setEvents(found), complain);
    return () => {
      wanted = false;
    };
  }, [asked]);
  return (
    <>
      <h1>Audit log</h1>
      <form
        class="fields"
        onSubmit={(event) => {
          event.preventDefault();
          const field = typed(event.target as HTMLFormElement);
          setAsked({ hours: Number(field("hours")), user: field("user"), task: field("task") });
        }}
      >
        <div class="field">
          <label for="field-hours">Of the last</label>
          <select id="field-hours" name="hours">
            <option value="1">hour</option>
            <option value="24" selected>
              day
            </option>
            <option value="168">week</option>
          </select>
        </div>
        <Field label="User" name="user" />
        <Field label="Task" name="task" />
        <div class="field end">
          <button class="primary">Show</button>
        </div>
      </form>
      {!events && <p class="hint">Reading…</p>}
      {events?.length === 0 && <p>Nothing was done.</p>}
      {events && events.length > 0 && (
        <Table label="Events">
          <thead>
            <tr>
              <th scope="col">When</th>
              <th scope="col">What</th>
              <th scope="col">Who</th>
              <th scope="col">Task</th>
              <th scope="col">From</th>
              <th scope="col">More</th>
            </tr>
          </thead>
          <tbody>
            {events.map((event, at) => (
              <tr key={at}>
                <td>{moment(text(event["time"]))}</td>
                <th scope="row">{text(event["event"])}</th>
                <td>{text(event["user"])}</td>
                <td>{text(event["name"] ?? event["task"])}</td>
                <td>
                  {text(event["from"])}
                  {event["via"] ? `, ${text(event["via"])}` : ""}
                </td>
                <td class="wrap long hint">
                  {Object.entries(event)
                    .filter(([name, value]) => !NAMED.includes(name) && value !== null && value !== "")
                    .map(([name, value]) => `${name}: ${text(value)}`)
                    .join(", ")}
                </td>
              </tr>
            ))}
          </tbody>
        </Table>
      )}
    </>
  );
}
