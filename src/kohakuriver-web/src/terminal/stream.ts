/** One terminal of a task over one WebSocket: a stream of the tunnel, as `kohakuriver connect --session` has it. */

import { connect, frame, Frames, limitIn, message, parse, resize, STREAM, Tag, Type, Windows } from "./wire";

const TUNNEL_V2 = "kohakuriver.tunnel.v2";
const SCREEN = 128 * 1024;
/** Whoever presses Ctrl-C waits for all that is on its way to the screen. */
const ACK_MS = 500;
const HOLD_SECONDS = 60;
const LARGEST = 16 * 1024;

export type End =
  | { why: "exit"; code: number }
  | { why: "taken" }
  | { why: "failed"; message: string }
  | { why: "refused"; code: string; message: string }
  | { why: "ended"; message: string }
  | { why: "lost"; opened: boolean };

/** What can be done with a terminal, whichever way it is carried. */
export interface Carried {
  input: (data: Uint8Array) => void;
  resize: (rows: number, cols: number) => void;
  leave: () => void;
}

export interface Told {
  started: () => void;
  /** `done` is to be called when the output has been shown: more comes only then. */
  output: (data: Uint8Array, done: () => void) => void;
  lost: (bytes: number) => void;
  notice: (sentence: string) => void;
  end: (how: End) => void;
}

export function socketUrl(path: string): string {
  const url = new URL(path, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  return url.href;
}

export class TerminalStream implements Carried {
  private readonly socket: WebSocket;
  private readonly windows = new Windows(SCREEN);
  private readonly frames: Frames;
  private waiting: Uint8Array[] = [];
  private connected = false;
  private opened = false;
  private over = false;
  private owing = 0;
  private readonly text = new TextDecoder();

  constructor(
    task: number,
    private readonly start: Uint8Array,
    private readonly told: Told,
  ) {
    this.frames = new Frames((tag, payload) => this.frame(tag, payload));
    this.socket = new WebSocket(socketUrl(`/ws/forward/${task}/terminal?proto=tcp`), [TUNNEL_V2]);
    this.socket.binaryType = "arraybuffer";
    this.socket.addEventListener("message", ({ data }) => this.arrived(data as string | ArrayBuffer));
    this.socket.addEventListener("close", (event) => this.closed(event));
  }

  /** What was typed. */
  input(data: Uint8Array): void {
    for (let at = 0; at < data.length; at += LARGEST) this.put(frame(Tag.INPUT, data.subarray(at, at + LARGEST)));
  }

  resize(rows: number, cols: number): void {
    this.put(resize(rows, cols));
  }

  /** Leave it: a terminal with a name stays. */
  leave(): void {
    this.finish({ why: "lost", opened: this.opened }, false);
  }

  private put(data: Uint8Array): void {
    if (this.over) return;
    this.waiting.push(data);
    this.flush();
  }

  private flush(): void {
    while (this.connected && this.waiting.length) {
      const next = this.waiting[0]!;
      if (next.length > this.windows.room) return;
      this.waiting.shift();
      this.windows.sent += next.length;
      this.send(message(Type.DATA, STREAM, next));
    }
  }

  private send(data: Uint8Array<ArrayBuffer>): void {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  private arrived(data: string | ArrayBuffer): void {
    if (this.over) return;
    if (typeof data === "string") {
      this.opened = true;
      if (data === "CONNECTED") this.send(connect(SCREEN, HOLD_SECONDS, this.start));
      return;
    }
    const came = parse(data);
    if (came === null) return;
    if (came.type === Type.PING) this.send(message(Type.PONG, came.id, came.payload));
    else if (came.type === Type.NOTICE) this.told.notice(this.text.decode(came.payload));
    else if (came.type === Type.GOAWAY) this.finish({ why: "lost", opened: true });
    else if (came.id === STREAM) this.ofStream(came.type, came.payload);
  }

  private ofStream(type: number, payload: Uint8Array): void {
    switch (type) {
      case Type.CONNECTED:
      case Type.WINDOW: {
        const limit = limitIn(payload);
        if (limit !== null) this.windows.raise(limit);
        this.connected = true;
        this.flush();
        break;
      }
      case Type.DATA:
        this.windows.received += payload.length;
        this.owing ||= window.setTimeout(() => this.acknowledge(), ACK_MS);
        this.read(payload);
        break;
      case Type.ERROR: {
        const [, code = "", sentence = ""] = /^(?:(E[A-Z0-9]+): )?(.*)$/s.exec(this.text.decode(payload)) ?? [];
        this.finish({ why: "refused", code, message: sentence });
        break;
      }
      case Type.EOF:
      case Type.CLOSE:
        this.finish({ why: "ended", message: "The terminal has ended." });
    }
  }

  private acknowledge(): void {
    this.owing = 0;
    const payload = this.windows.owed();
    if (payload) this.send(message(Type.ACK, STREAM, payload));
  }

  private read(payload: Uint8Array): void {
    let output = 0;
    this.outputs = (length) => (output += length);
    try {
      this.frames.add(payload);
    } catch (error) {
      this.finish({ why: "failed", message: String(error) });
      return;
    }
    this.consumed(payload.length - output);
  }

  private outputs: (length: number) => void = () => undefined;

  private consumed(count: number): void {
    const payload = this.windows.consume(count);
    if (payload && !this.over) this.send(message(Type.WINDOW, STREAM, payload));
  }

  private frame(tag: number, payload: Uint8Array): void {
    const view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength);
    if (tag === Tag.STARTED) this.told.started();
    else if (tag === Tag.OUTPUT) {
      this.outputs(payload.length);
      this.told.output(payload, () => this.consumed(payload.length));
    } else if (tag === Tag.EXIT && payload.length === 4) this.finish({ why: "exit", code: view.getUint32(0) });
    else if (tag === Tag.LOST && payload.length === 8) this.told.lost(Number(view.getBigUint64(0)));
    else if (tag === Tag.FAILED) this.finish({ why: "failed", message: this.text.decode(payload) });
    else if (tag === Tag.TAKEN) this.finish({ why: "taken" });
  }

  private closed({ code, reason }: CloseEvent): void {
    if (code === 1008) this.finish({ why: "ended", message: `This terminal was ended: ${reason}.` });
    else if (code === 4001) this.finish({ why: "ended", message: `The host has ended this terminal: ${reason}.` });
    else this.finish({ why: "lost", opened: this.opened });
  }

  private finish(how: End, tell = true): void {
    if (this.over) return;
    this.over = true;
    window.clearTimeout(this.owing);
    this.send(message(Type.CLOSE, STREAM));
    this.socket.close(1000);
    if (tell) this.told.end(how);
  }
}

const TERMINAL_V2 = "kohakuriver.terminal.v2";

/** A terminal that is a WebSocket of its own, for tasks without a tunnel client: it ends with its link. */
export class PlainTerminal implements Carried {
  private readonly socket: WebSocket;
  private opened = false;
  private over = false;

  constructor(
    task: number,
    rows: number,
    cols: number,
    private readonly told: Told,
  ) {
    this.socket = new WebSocket(socketUrl(`/ws/task/${task}/terminal?start=1`), [TERMINAL_V2]);
    this.socket.binaryType = "arraybuffer";
    this.socket.addEventListener("open", () => {
      this.opened = true;
      this.say({ type: "start", rows, cols, env: { TERM: "xterm-256color", COLORTERM: "truecolor" } });
      told.started();
    });
    this.socket.addEventListener("message", ({ data }) => this.arrived(data as string | ArrayBuffer));
    this.socket.addEventListener("close", () => this.finish({ why: "lost", opened: this.opened }));
  }

  input(data: Uint8Array): void {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(new Uint8Array(data));
  }

  resize(rows: number, cols: number): void {
    this.say({ type: "resize", rows, cols });
  }

  leave(): void {
    this.over = true;
    this.socket.close(1000);
  }

  private say(what: object): void {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(what));
  }

  private arrived(data: string | ArrayBuffer): void {
    if (data instanceof ArrayBuffer) {
      this.told.output(new Uint8Array(data), () => undefined);
      return;
    }
    const came = JSON.parse(data) as { type?: string; code?: number; data?: string };
    if (came.type === "exit") this.finish({ why: "exit", code: came.code ?? 0 });
    else if (came.type === "error") this.finish({ why: "ended", message: came.data || "The terminal was lost." });
  }

  private finish(how: End): void {
    if (this.over) return;
    this.over = true;
    this.told.end(how);
    this.socket.close(1000);
  }
}
