/** Which terminals with names the user has in a task. */

import { TerminalStream } from "./stream";
import { listed, startList, type NamedSession } from "./wire";

const LONGEST = 64 * 1024;
const PATIENCE_MS = 5000;

/** None where they can't be asked for. */
export function namedSessions(task: number): Promise<NamedSession[]> {
  return new Promise((resolve) => {
    const text = new TextDecoder();
    let told = "";
    const stream = new TerminalStream(task, startList(), {
      started: () => undefined,
      output: (data, done) => {
        if (told.length < LONGEST) told += text.decode(data, { stream: true });
        done();
      },
      lost: () => undefined,
      notice: () => undefined,
      end: (how) => resolve(how.why === "exit" ? listed(told) : []),
    });
    window.setTimeout(() => (stream.leave(), resolve([])), PATIENCE_MS);
  });
}

/** A name for one more: "web", "web-2" and so on. */
export function freeName(taken: Iterable<string>): string {
  const known = new Set(taken);
  for (let count = 1; ; count += 1) {
    const name = count === 1 ? "web" : `web-${count}`;
    if (!known.has(name)) return name;
  }
}
