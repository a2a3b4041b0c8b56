import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { ask, get } from "../api";
import { bytes, moment, parseBytes, parseSpan, span } from "../format";
import { me } from "../me";
import { Confirm, Field, FormDialog, Table, tell, useLoaded } from "../parts";
import type { Limit, User } from "../types";

const SIZES = new Set(["memory", "log"]);
const SPANS = new Set(["ttl", "idle_stop"]);

/** Of these 0 is none at all; of the others it makes no sense. */
const COUNTED = new Set(["tasks", "running", "tokens", "gpus"]);
/** As the API has it: none at all, where 0 is no limit. */
const NOTHING = -1;
const NO_LIMIT = "none";

export function limitText(name: string, value: number): string {
  if (value === NOTHING) return "0";
  return SIZES.has(name) ? bytes(value) : SPANS.has(name) ? span(value) : String(value);
}

export function limitOf(name: string, text: string): number {
  if (text === NO_LIMIT) return 0;
  const value = SIZES.has(name) ? parseBytes(text) : SPANS.has(name) ? (text === "0" ? 0 : parseSpan(text)) : Number(text);
  if (!Number.isFinite(value) || value < 0) throw new Error(`${text} is no number.`);
  if (value) return value;
  if (COUNTED.has(name)) return NOTHING;
  throw new Error(`The limit ${name} can't be 0; write ${NO_LIMIT} for no limit.`);
}

export default function UsersPage(): JSX.Element {
  const { value, reload } = useLoaded(() => get<User[]>("/api/users"));
  const [adding, setAdding] = useState(false);
  const [removing, setRemoving] = useState<User | null>(null);
  const [limiting, setLimiting] = useState<User | null>(null);
  return (
    <>
      <div class="heading">
        <h1>Users</h1>
        <button type="button" class="primary" onClick={() => setAdding(true)}>
          New user
        </button>
      </div>
      {value && (
        <Table label="Users">
          <thead>
            <tr>
              <th scope="col">Name</th>
              <th scope="col">Role</th>
              <th scope="col">Made</th>
              <th scope="col">Own limits</th>
              <th scope="col">Do</th>
            </tr>
          </thead>
          <tbody>
            {value.map((user) => (
              <tr key={user.name}>
                <th scope="row">{user.name}</th>
                <td>{user.role}</td>
                <td>{moment(user.created_at)}</td>
                <td class="wrap">
                  {Object.entries(user.limits)
                    .map(([name, most]) => `${name} ${most ? limitText(name, most) : "no limit"}`)
                    .join(", ")}
                </td>
                <td>
                  <div class="buttons">
                    <button type="button" class="small" aria-label={`Limits of ${user.name}`} onClick={() => setLimiting(user)}>
                      Limits
                    </button>
                    {user.name !== me.value?.user && (
                      <button type="button" class="small danger" aria-label={`Remove ${user.name}`} onClick={() => setRemoving(user)}>
                        Remove
                      </button>
                    )}
                  </div>
                </td>
              </tr>
            ))}
          </tbody>
        </Table>
      )}
      {adding && <NewUser close={() => (setAdding(false), reload())} />}
      {limiting && <Limits user={limiting} close={() => (setLimiting(null), reload())} />}
      {removing && (
        <Confirm
          title={`Remove ${removing.name}?`}
          button="Remove"
          close={() => setRemoving(null)}
          act={async () => {
            await ask("DELETE", `/api/users/${encodeURIComponent(removing.name)}`);
            tell(`${removing.name} was removed.`);
            reload();
          }}
        >
          <p>Tokens and sessions of {removing.name} end; tasks become yours.</p>
        </Confirm>
      )}
    </>
  );
}

function NewUser({ close }: { close: () => void }): JSX.Element {
  async function make(field: (name: string) => string): Promise<void> {
    await ask("POST", "/api/users", { name: field("name"), role: field("role") });
    tell(`${field("name")} was added; a token made on the page of tokens lets them in.`);
    close();
  }
  return (
    <FormDialog title="New user" close={close} send={make} submit="Add">
      <Field label="Name" name="name" required />
      <div class="field">
        <label for="field-role">Role</label>
        <select id="field-role" name="role">
          <option value="user">user</option>
          <option value="admin">admin</option>
        </select>
      </div>
    </FormDialog>
  );
}

function Limits({ user, close }: { user: User; close: () => void }): JSX.Element {
  const path = `/api/users/${encodeURIComponent(user.name)}/limits`;
  const { value } = useLoaded(() => get<{ limits: Record<string, Limit> }>(path));
  async function set(field: (name: string) => string): Promise<void> {
    const changes: Record<string, number | null> = {};
    for (const [name, now] of Object.entries(value!.limits)) {
      if (field(name)) changes[name] = limitOf(name, field(name));
      else if (now.own) changes[name] = null;
    }
    await ask("PATCH", path, changes);
    tell(`The limits of ${user.name} are set.`);
    close();
  }
  return (
    <FormDialog title={`Limits of ${user.name}`} close={close} send={set} submit="Set">
      <div class="fields">
        {value &&
          Object.entries(value.limits).map(([name, now]) => (
            <Field
              key={name}
              label={name.replace("_", " ")}
              name={name}
              value={now.own ? plainLimit(name, now.limit) : ""}
              placeholder={now.limit === null ? "no limit" : limitText(name, now.limit)}
              {...(now.used === null ? {} : { hint: `${limitText(name, now.used)} used` })}
            />
          ))}
      </div>
      <p class="hint">Empty is what this host gives everybody, {NO_LIMIT} no limit.</p>
    </FormDialog>
  );
}

/** As it can be read again, and nothing is lost. */
function plainLimit(name: string, value: number | null): string {
  if (value === null) return NO_LIMIT;
  return SPANS.has(name) && value ? `${value}s` : String(value);
}
