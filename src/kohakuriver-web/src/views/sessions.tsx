import type { JSX } from "preact";
import { sessions } from "../feed";
import { SessionRows } from "./sessionrows";

export default function SessionsPage(): JSX.Element {
  return (
    <>
      <h1>Open sessions</h1>
      <p class="hint">Yours, and those to your tasks, that go through this host.</p>
      <SessionRows of={[...sessions.value.values()]} named />
    </>
  );
}
