/** The screen: xterm.js, and what keeps it joined to a terminal in the task. */

import { FitAddon } from "@xterm/addon-fit";
import { Unicode11Addon } from "@xterm/addon-unicode11";
import { WebLinksAddon } from "@xterm/addon-web-links";
import { Terminal, type ITheme } from "@xterm/xterm";
import "@xterm/xterm/css/xterm.css";
import { ApiError, get, taskPath } from "../api";
import type { Task } from "../types";
import { PlainTerminal, TerminalStream, type Carried, type End } from "./stream";
import { styledDocument } from "./styles";
import { startNamed } from "./wire";

export type State =
  | { is: "opening" | "again"; why?: string }
  | { is: "open"; lasts: boolean; why?: string }
  | { is: "over"; why: string; button: string };

const DARK: ITheme = {
  background: "#0f1518",
  foreground: "#e6edf0",
  cursor: "#e6edf0",
  selectionBackground: "#33576b",
  black: "#273238",
  red: "#ff8a80",
  green: "#7fd18c",
  yellow: "#e5c07b",
  blue: "#82b1ff",
  magenta: "#d7a6ff",
  cyan: "#6fd3d3",
  white: "#cfd8dc",
  brightBlack: "#8a9aa3",
  brightRed: "#ffab9f",
  brightGreen: "#a5e6af",
  brightYellow: "#ffe08a",
  brightBlue: "#a8caff",
  brightMagenta: "#e7c8ff",
  brightCyan: "#a0ebeb",
  brightWhite: "#ffffff",
};

const LIGHT: ITheme = {
  background: "#fbfcfc",
  foreground: "#1b2529",
  cursor: "#1b2529",
  selectionBackground: "#bcd9ea",
  black: "#1b2529",
  red: "#b3261e",
  green: "#1b6e2d",
  yellow: "#7a5a00",
  blue: "#1f4fb0",
  magenta: "#8a2a9e",
  cyan: "#00666b",
  white: "#5d6b72",
  brightBlack: "#5d6b72",
  brightRed: "#c5392f",
  brightGreen: "#1f7a35",
  brightYellow: "#805f00",
  brightBlue: "#2a5fc9",
  brightMagenta: "#9c37b1",
  brightCyan: "#007278",
  brightWhite: "#37454b",
};

const MAC = navigator.platform.startsWith("Mac");
const SOON_MS = 500;
const LATEST_MS = 10_000;
/** After a terminal is taken up again, what it said before is said once more; after so long without more it has been. */
const QUIET_MS = 400;

/** So long a terminal that lasts is tried, before one that ends with its connection is: a tunnel has come back by then. */
const PLAIN_AFTER_MS = 12_000;
/** And so often at least meanwhile. */
const LATEST_BEFORE_PLAIN_MS = 2000;

export class Screen {
  readonly terminal: Terminal;
  private readonly fit = new FitAddon();
  private readonly styles = styledDocument();
  private readonly dark = window.matchMedia("(prefers-color-scheme: dark)");
  private readonly sized: ResizeObserver;
  private readonly encoder = new TextEncoder();
  private carried: Carried | null = null;
  private open = false;
  private ended = false;
  private lasting = true;
  /** It has been a terminal that lasts: then it is in the task still, and no other shell is to take its place. */
  private lasted = false;
  /** When it could not be opened for the first time since it was last open, 0 where it could. */
  private failing = 0;
  private wait = SOON_MS;
  private retrying = 0;
  private repeating = 0;
  private typedSince = true;

  constructor(
    private readonly task: Task,
    private readonly name: string,
    box: HTMLElement,
    private readonly told: (state: State) => void,
  ) {
    this.terminal = new Terminal({
      allowProposedApi: true,
      cursorBlink: true,
      documentOverride: this.styles.document,
      fontFamily: 'ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace',
      fontSize: 14,
      minimumContrastRatio: 4.5,
      scrollback: 10_000,
      theme: this.dark.matches ? DARK : LIGHT,
    });
    this.terminal.loadAddon(this.fit);
    this.terminal.loadAddon(new Unicode11Addon());
    this.terminal.unicode.activeVersion = "11";
    this.terminal.loadAddon(new WebLinksAddon((_event, uri) => window.open(uri, "_blank", "noopener")));
    this.terminal.open(box);
    this.fit.fit();
    this.terminal.onData((data) => this.typed(data));
    this.terminal.onBinary((data) => this.typed(data, (each) => Uint8Array.from(each, (one) => one.charCodeAt(0))));
    this.terminal.onResize(({ rows, cols }) => this.carried?.resize(rows, cols));
    this.terminal.attachCustomKeyEventHandler((event) => this.key(event));
    for (const kind of ["keydown", "paste", "compositionstart", "pointerdown"]) {
      box.addEventListener(kind, () => (this.typedSince = true), { capture: true });
    }
    this.sized = new ResizeObserver(() => this.fit.fit());
    this.sized.observe(box);
    this.dark.addEventListener("change", this.recolour);
    document.addEventListener("visibilitychange", this.look);
    window.addEventListener("online", this.look);
    this.join();
  }

  /** What a key of the page's own types, or a paste. */
  type(text: string): void {
    this.typedSince = true;
    const arrow = /^\x1b\[[A-D]$/.test(text) && this.terminal.modes.applicationCursorKeysMode;
    this.terminal.input(arrow ? text.replace("[", "O") : text);
    this.terminal.focus();
  }

  dispose(): void {
    this.ended = true;
    window.clearTimeout(this.retrying);
    window.clearTimeout(this.repeating);
    this.carried?.leave();
    this.sized.disconnect();
    this.dark.removeEventListener("change", this.recolour);
    document.removeEventListener("visibilitychange", this.look);
    window.removeEventListener("online", this.look);
    this.terminal.dispose();
    this.styles.dispose();
  }

  /** Open it anew, or take it back. */
  again(): void {
    this.wait = SOON_MS;
    this.join();
    this.terminal.focus();
  }

  private readonly recolour = (): void => {
    this.terminal.options.theme = this.dark.matches ? DARK : LIGHT;
  };

  /** Somebody looks again, or there is a network: it is tried at once. */
  private readonly look = (): void => {
    if (this.retrying && document.visibilityState === "visible") {
      window.clearTimeout(this.retrying);
      this.join();
    }
  };

  private typed(data: string, encoded: (data: string) => Uint8Array = (text) => this.encoder.encode(text)): void {
    // A program's old questions to the terminal are answered once more when what it said is repeated: to nobody.
    if (this.open && this.typedSince) this.carried?.input(encoded(data));
  }

  private key(event: KeyboardEvent): boolean {
    if (event.type !== "keydown") return true;
    if (event.key === "Escape" && event.shiftKey) {
      document.getElementById("leave-terminal")?.focus();
      return false;
    }
    const copies = event.key.toLowerCase() === "c" && event.ctrlKey && !event.altKey;
    if (copies && (event.shiftKey || this.terminal.hasSelection())) {
      const text = this.terminal.getSelection();
      if (text) void navigator.clipboard?.writeText(text).catch(() => undefined);
      this.terminal.clearSelection();
      event.preventDefault();
      return false;
    }
    // Left to the browser, which pastes; on a Mac that is Cmd+V, and Ctrl+V is a key like any other.
    return !(event.key.toLowerCase() === "v" && event.ctrlKey && !event.altKey && (event.shiftKey || !MAC));
  }

  private join(): void {
    this.retrying = 0;
    if (this.ended) return;
    this.open = false;
    const { rows, cols } = this.terminal;
    const told = {
      started: () => this.started(),
      output: (data: Uint8Array, done: () => void) => this.output(data, done),
      lost: (bytes: number) => this.terminal.write(`\r\n[${bytes} bytes of output were lost meanwhile]\r\n`),
      notice: (sentence: string) => this.told({ is: "open", lasts: this.lasting, why: sentence }),
      end: (how: End) => this.over(how),
    };
    this.carried = this.lasting
      ? new TerminalStream(this.task.task_id, startNamed(this.name, rows, cols), told)
      : new PlainTerminal(this.task.task_id, rows, cols, told);
  }

  private started(): void {
    this.lasted ||= this.lasting;
    this.terminal.reset();
    this.open = true;
    this.failing = 0;
    this.wait = SOON_MS;
    this.typedSince = !this.lasting;
    this.repeat();
    this.told({ is: "open", lasts: this.lasting });
    const { rows, cols } = this.terminal;
    this.carried?.resize(rows, cols);
  }

  private repeat(): void {
    window.clearTimeout(this.repeating);
    this.repeating = window.setTimeout(() => (this.typedSince = true), QUIET_MS);
  }

  private output(data: Uint8Array, done: () => void): void {
    if (!this.typedSince) this.repeat();
    this.terminal.write(data, done);
  }

  private over(how: End): void {
    this.open = false;
    this.carried = null;
    if (this.ended) return;
    if (how.why === "exit") {
      const code = how.code ? ` with code ${how.code}` : "";
      this.told({ is: "over", why: `The shell has ended${code}.`, button: "Open another" });
    } else if (how.why === "taken") {
      this.told({ is: "over", why: "This terminal was opened elsewhere.", button: "Take it back" });
    } else if (how.why === "refused" && (how.code === "EPROTONOSUPPORT" || how.code === "EACCES") && this.lasting) {
      if (this.lasted) return void this.retry(false);
      this.lasting = false;
      this.join();
    } else if (how.why === "lost") {
      if (!how.opened) this.failing ||= performance.now();
      void this.retry(how.opened);
    } else {
      this.told({ is: "over", why: how.message || "The terminal has ended.", button: "Open it again" });
    }
  }

  /** Why a WebSocket could not be opened no browser tells: the API does. */
  private async retry(opened: boolean): Promise<void> {
    if (opened && !this.lasting) {
      this.told({ is: "over", why: "The connection was lost, and with it this terminal.", button: "Open another" });
      return;
    }
    this.told({ is: "again", why: "The connection was lost. What runs goes on; trying again…" });
    try {
      const task = await get<Task>(taskPath(this.task));
      if (task.status !== "running" && task.status !== "lost") {
        this.told({ is: "over", why: `The task is ${task.status}.`, button: "Try again" });
        return;
      }
      // Where a tunnel is away, or its node, is not told: where neither kind opens, both are tried in turn.
      const patient = this.lasted || !this.failing || performance.now() - this.failing < PLAIN_AFTER_MS;
      this.lasting = patient || !this.lasting;
    } catch (error) {
      if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) {
        this.told({ is: "over", why: error.message, button: "Try again" });
        return;
      }
    }
    if (this.ended) return;
    this.retrying = window.setTimeout(() => this.join(), this.wait);
    this.wait = Math.min(this.wait * 2, this.lasted ? LATEST_MS : LATEST_BEFORE_PLAIN_MS);
  }
}
