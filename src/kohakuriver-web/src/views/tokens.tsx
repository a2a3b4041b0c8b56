import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { ask, get } from "../api";
import { moment, parseSpan } from "../format";
import { isAdmin, me } from "../me";
import { Confirm, Copy, Dialog, Field, FormDialog, StatusMark, Table, tell, useLoaded } from "../parts";
import type { Token, TokenMade } from "../types";

export default function TokensPage(): JSX.Element {
  const [all, setAll] = useState(false);
  const choice = isAdmin() && (
    <label class="switch">
      <input type="checkbox" checked={all} onChange={(event) => setAll(event.currentTarget.checked)} /> Of all users and nodes
    </label>
  );
  return <Tokens all={all} choice={choice} />;
}

function Tokens({ all, choice }: { all: boolean; choice: JSX.Element | false }): JSX.Element {
  const { value, reload } = useLoaded(() => get<Token[]>(all ? "/api/tokens?all=true" : "/api/tokens"), all);
  const [making, setMaking] = useState(false);
  const [ending, setEnding] = useState<Token | null>(null);
  return (
    <>
      <div class="heading">
        <h1>Tokens and browsers</h1>
        <button type="button" class="primary" onClick={() => setMaking(true)}>
          New token
        </button>
      </div>
      <p class="hint">
        With a token, the command line and scripts do what this page does, by the <a href="/docs">HTTP API</a>. Browsers that are logged in are listed, too.
      </p>
      {choice}
      {value && (
        <Table label="Tokens and browsers">
          <thead>
            <tr>
              <th scope="col">Name</th>
              <th scope="col">Kind</th>
              {all && <th scope="col">Of</th>}
              <th scope="col">Status</th>
              <th scope="col">Made</th>
              <th scope="col">Until</th>
              <th scope="col">Do</th>
            </tr>
          </thead>
          <tbody>
            {value.map((token) => (
              <tr key={token.id}>
                <th scope="row">
                  {token.name} {token.id === me.value?.token.id && <span class="hint">(this browser)</span>}
                </th>
                <td>{token.kind === "user" ? "token" : token.kind}</td>
                {all && <td>{token.user ?? token.node}</td>}
                <td>
                  <StatusMark status={token.status} />
                </td>
                <td>{moment(token.created_at)}</td>
                <td>{token.expires_at ? moment(token.expires_at) : "it is revoked"}</td>
                <td>
                  {token.status === "valid" && (
                    <button type="button" class="small danger" aria-label={`Revoke ${token.name}`} onClick={() => setEnding(token)}>
                      Revoke
                    </button>
                  )}
                </td>
              </tr>
            ))}
          </tbody>
        </Table>
      )}
      {making && <NewToken close={() => (setMaking(false), reload())} />}
      {ending && (
        <Confirm
          title={`Revoke ${ending.name}?`}
          button="Revoke it"
          close={() => setEnding(null)}
          act={async () => {
            await ask("DELETE", `/api/tokens/${ending.id}`);
            tell(`${ending.name} is worth nothing any more.`);
            reload();
          }}
        >
          <p>What was opened with it ends, and so do the browsers that it let in.</p>
        </Confirm>
      )}
    </>
  );
}

function NewToken({ close }: { close: () => void }): JSX.Element {
  const [made, setMade] = useState<TokenMade | null>(null);
  async function make(field: (name: string) => string): Promise<void> {
    const asked: Record<string, unknown> = {};
    if (field("name")) asked["name"] = field("name");
    if (field("user")) asked["user"] = field("user");
    if (field("node")) asked["node"] = field("node");
    if (field("expires")) asked["expires_in"] = parseSpan(field("expires"));
    setMade(await ask<TokenMade>("POST", "/api/tokens", asked));
  }
  if (made) {
    return (
      <Dialog title="Your new token" close={close}>
        <p>This is the one time that it is shown.</p>
        <Copy text={made.token} what="the token" />
        <div class="buttons">
          <button type="button" class="primary" onClick={close}>
            Done
          </button>
        </div>
      </Dialog>
    );
  }
  return (
    <FormDialog title="New token" close={close} send={make} submit="Make it">
      <Field label="Name" name="name" hint="One is made up if empty." />
      <Field label="Good for" name="expires" placeholder="90d" hint="Until it is revoked if empty. One made in a browser ends with the browser's login at the latest." />
      {isAdmin() && (
        <div class="fields">
          <Field label="For another user" name="user" />
          <Field label="Or for a node" name="node" />
        </div>
      )}
    </FormDialog>
  );
}
