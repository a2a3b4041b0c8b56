/** Where in the page one is: what stands behind the # of the address. */

import { signal } from "@preact/signals";

export const route = signal<string[]>(parts());

function parts(): string[] {
  return location.hash
    .replace(/^#\/?/, "")
    .split("/")
    .filter((each) => each !== "")
    .map(decoded);
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export function href(...to: (string | number)[]): string {
  return `#/${to.map((each) => encodeURIComponent(String(each))).join("/")}`;
}

export function go(...to: (string | number)[]): void {
  location.hash = href(...to);
}

/** Look where one is. */
export function read(): void {
  route.value = parts();
}

export function begin(moved: () => void): void {
  window.addEventListener("hashchange", () => {
    read();
    moved();
  });
}
