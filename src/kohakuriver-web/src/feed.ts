/** What the host tells as it changes: one stream of events for the page, read while the page is seen. */

import { signal, type Signal } from "@preact/signals";
import { ApiError, follow } from "./api";
import type { News, Node, PortsOfTask, Rate, Session, Task, Traffic } from "./types";

type Part<T> = Signal<ReadonlyMap<string, T>>;

function part<T>(): Part<T> {
  return signal<ReadonlyMap<string, T>>(new Map());
}

export const tasks = part<Task>();
export const traffic = part<Traffic>();
export const nodes = part<Node>();
export const sessions = part<Session>();
export const rates = part<Rate>();
export const ports = part<PortsOfTask>();

/** "": nothing has come yet; "live"; else why nothing comes. */
export const state = signal<string>("");

const PARTS = { tasks, traffic, nodes, sessions, rates, ports };

/** A part with what is new, and without what is gone. */
export function merged<T>(before: ReadonlyMap<string, T>, fresh: Record<string, T>, gone: string[]): Map<string, T> {
  const after = new Map(before);
  for (const [key, value] of Object.entries(fresh)) after.set(key, value);
  for (const key of gone) after.delete(key);
  return after;
}

export function take(news: News, first: boolean): void {
  for (const [name, part] of Object.entries(PARTS)) {
    const held = part as Part<unknown>;
    const fresh: Record<string, unknown> | undefined = news[name as keyof typeof PARTS];
    const gone = news.gone?.[name];
    if (first || fresh || gone) held.value = merged(first ? new Map() : held.value, fresh ?? {}, gone ?? []);
  }
  state.value = "live";
}

let wanted = "";
let begun = false;
let onBegunAgain = (): void => undefined;
let running: AbortController | null = null;

/** Have the host tell of the ports of a task, too, "" for none. */
export function watchPorts(task: string): void {
  if (task === wanted) return;
  wanted = task;
  restart();
}

/** Read again, from the beginning; a page that nobody sees reads nothing. */
export function restart(): void {
  running?.abort();
  running = null;
  if (document.visibilityState === "hidden") return;
  running = new AbortController();
  void keep(running.signal);
}

const SOON_MS = 300;
const LATEST_MS = 10_000;

async function keep(ended: AbortSignal): Promise<void> {
  for (let wait = SOON_MS; !ended.aborted; wait = Math.min(wait * 2, LATEST_MS)) {
    let first = true;
    try {
      const query = wanted ? `?ports=${encodeURIComponent(wanted)}` : "";
      await follow(
        `/api/events${query}`,
        (line) => {
          take(line as News, first);
          if (first && begun) onBegunAgain();
          begun = true;
          first = false;
          wait = SOON_MS;
        },
        ended,
      );
    } catch (error) {
      if (ended.aborted) return;
      state.value = error instanceof ApiError ? error.message : String(error);
      if (error instanceof ApiError && error.status === 404 && wanted) wanted = "";
    }
    await new Promise((done) => setTimeout(done, wait));
  }
}

/** `again`: called when all is told once more. */
export function begin(again: () => void): void {
  onBegunAgain = again;
  document.addEventListener("visibilitychange", restart);
  restart();
}
