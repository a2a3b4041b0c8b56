/** Who is logged in. */

import { signal } from "@preact/signals";
import { get } from "./api";
import type { Whoami } from "./types";

export const me = signal<Whoami | null>(null);

export async function load(): Promise<void> {
  me.value = await get<Whoami>("/api/auth");
}

/** Ask again, for this browser may have been logged in as somebody else: what is shown then is theirs, from the beginning. */
export async function check(): Promise<void> {
  const before = me.value;
  await load();
  if (before && before.user !== me.value?.user) location.reload();
}

export function isAdmin(): boolean {
  return me.value?.role === "admin";
}

/** Whether the user may change a task. */
export function owns(task: { owner: string }): boolean {
  return isAdmin() || me.value?.user === task.owner;
}

const USED_MS = 10 * 60_000;
let told = Date.now();

/** Somebody uses the page: a browser stays logged in while it asks for something, and typing in a terminal asks nothing. */
export function used(): void {
  if (Date.now() - told < USED_MS) return;
  told = Date.now();
  check().catch(() => undefined);
}
