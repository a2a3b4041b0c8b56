import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { ask } from "../api";
import { since } from "../format";
import { nodes } from "../feed";
import { isAdmin } from "../me";
import { Act, Confirm, StatusMark, Table, tell } from "../parts";
import type { Node } from "../types";

function path(node: Node, rest = ""): string {
  return `/api/nodes/${encodeURIComponent(node.name)}${rest}`;
}

export default function NodesPage(): JSX.Element {
  const [leaving, setLeaving] = useState<Node | null>(null);
  const all = [...nodes.value.values()].sort((a, b) => a.name.localeCompare(b.name));
  return (
    <>
      <h1>Nodes</h1>
      {!all.length && <p>There is no node yet: <code>kohakuriver runner</code>, on a machine for tasks, makes it one.</p>}
      {all.length > 0 && (
        <Table label="Nodes">
          <thead>
            <tr>
              <th scope="col">Node</th>
              <th scope="col">Status</th>
              <th scope="col" class="number">
                Tasks
              </th>
              <th scope="col">Runs</th>
              <th scope="col">GPUs free</th>
              <th scope="col">Version</th>
              {isAdmin() && <th scope="col">Do</th>}
            </tr>
          </thead>
          <tbody>
            {all.map((node) => (
              <Row key={node.name} node={node} forget={() => setLeaving(node)} />
            ))}
          </tbody>
        </Table>
      )}
      {leaving && (
        <Confirm
          title={`Forget node ${leaving.name}?`}
          button="Forget it"
          close={() => setLeaving(null)}
          act={async () => (await ask("DELETE", path(leaving)), tell(`Node ${leaving.name} is forgotten.`))}
        >
          <p>It is back when its runner is started again. A node that has tasks is kept.</p>
        </Confirm>
      )}
    </>
  );
}

function Row({ node, forget }: { node: Node; forget: () => void }): JSX.Element {
  const lacking = Object.entries(node.unavailable).map(([name, why]) => `${name}: ${why}`);
  return (
    <tr>
      <th scope="row">{node.name}</th>
      <td>
        <StatusMark status={node.status} />
        {node.cordoned && <span class="status">cordoned</span>}
        {node.status === "offline" && <span class="hint"> {since(node.last_seen)}</span>}
        {node.reason && <div class="hint wrap">{node.reason}</div>}
      </td>
      <td class="number">{node.tasks}</td>
      <td>
        {node.backends.join(", ")}
        {lacking.map((why) => (
          <div key={why} class="hint wrap">
            {why}
          </div>
        ))}
      </td>
      <td>{node.gpus.length ? `${node.gpus_free.length} of ${node.gpus.length}` : "none"}</td>
      <td>{node.version}</td>
      {isAdmin() && (
        <td>
          <div class="buttons">
            <Act kind="small" label={`${node.cordoned ? "Uncordon" : "Cordon"} ${node.name}`} act={() => ask("POST", path(node, node.cordoned ? "/uncordon" : "/cordon"))}>
              {node.cordoned ? "Uncordon" : "Cordon"}
            </Act>
            {node.status === "offline" && (
              <button type="button" class="small danger" aria-label={`Forget ${node.name}`} onClick={forget}>
                Forget
              </button>
            )}
          </div>
        </td>
      )}
    </tr>
  );
}
