/** Requests to the host's HTTP API, which the cookie of this browser opens for pages of the host alone. */

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string,
  ) {
    super(message);
  }
}

/** Where nobody is logged in any more there is nothing to show but the way in. */
let onLoggedOut = (): void => undefined;

export function whenLoggedOut(act: () => void): void {
  onLoggedOut = act;
}

async function failure(answer: Response): Promise<ApiError> {
  let code = "failed";
  let message = `The host answered ${answer.status}.`;
  try {
    const told = (await answer.json()) as { error?: unknown; message?: unknown };
    if (typeof told.message === "string") message = told.message;
    if (typeof told.error === "string") code = told.error;
  } catch {
    // something between answered in the host's place
  }
  if (answer.status === 401) onLoggedOut();
  return new ApiError(message, answer.status, code);
}

async function request(path: string, init: RequestInit): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(path, { credentials: "same-origin", redirect: "error", ...init });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError("The host can't be reached just now.", 0, "host_unreachable");
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

/** The JSON answer. Throws ApiError. */
export async function ask<T>(method: string, path: string, body?: unknown): Promise<T> {
  const init: RequestInit = { method };
  if (body !== undefined) {
    init.headers = { "Content-Type": "application/json" };
    init.body = JSON.stringify(body);
  }
  return (await (await request(path, init)).json()) as T;
}

export function get<T>(path: string): Promise<T> {
  return ask<T>("GET", path);
}

/** Splits pieces of text into whole lines; empty ones mean nothing (docs/protocol.md §4) and are left out. */
export class Lines {
  private rest = "";

  add(piece: string): string[] {
    const lines = (this.rest + piece).split("\n");
    this.rest = lines.pop() ?? "";
    return lines.filter((line) => line !== "");
  }
}

const LOST_MS = 45_000;

/** Calls `take` with each line of an answer that goes on, until it ends. Throws ApiError, also when it falls silent. */
export async function follow(path: string, take: (line: unknown) => void, signal: AbortSignal): Promise<void> {
  const ends = new AbortController();
  const end = (): void => ends.abort();
  signal.addEventListener("abort", end);
  let silent = window.setTimeout(end, LOST_MS);
  try {
    const answer = await request(path, { method: "GET", signal: ends.signal });
    const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
    const lines = new Lines();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      window.clearTimeout(silent);
      silent = window.setTimeout(end, LOST_MS);
      for (const line of lines.add(value)) {
        const told = JSON.parse(line) as { error?: string; message?: string; status?: number };
        if (typeof told.error === "string" && typeof told.status === "number") {
          if (told.status === 401) onLoggedOut();
          throw new ApiError(told.message ?? "It was ended.", told.status, told.error);
        }
        take(told);
      }
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError("The connection to the host was lost.", 0, "host_unreachable");
  } finally {
    window.clearTimeout(silent);
    signal.removeEventListener("abort", end);
    ends.abort();
  }
}

export function taskPath(task: { task_id: number }, rest = ""): string {
  return `/api/tasks/${task.task_id}${rest}`;
}
