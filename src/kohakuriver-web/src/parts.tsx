/** Small things that several pages are made of. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { ComponentChildren, JSX } from "preact";
import { signal } from "@preact/signals";

/** What was last done, or went wrong: read out, and shown until the next, a click, or another page than `at`. */
export const notice = signal<{ text: string; bad: boolean; at: string } | null>(null);

/** Say what was done. `at`: the page that this leads to, where it leads to another one. */
export function tell(text: string, at = location.hash): void {
  notice.value = { text, bad: false, at };
}

export function complain(error: unknown): void {
  notice.value = { text: error instanceof Error ? error.message : String(error), bad: true, at: location.hash };
}

/** Whoever is at another page has seen what was said: it would cover what is there. */
export function leaveNotice(): void {
  if (notice.value && notice.value.at !== location.hash) notice.value = null;
}

export function Notice(): JSX.Element {
  const shown = notice.value;
  return (
    <div role="status" aria-live="polite" class="notices">
      {shown && (
        <div class={`notice ${shown.bad ? "bad" : ""}`}>
          <span>{shown.text}</span>
          <button type="button" class="quiet" onClick={() => (notice.value = null)} aria-label="Close this message">
            ✕
          </button>
        </div>
      )}
    </div>
  );
}

interface ButtonProps {
  act: () => Promise<unknown> | void;
  done?: string;
  kind?: string;
  disabled?: boolean;
  label?: string;
  children: ComponentChildren;
}

/** A button that can't be pressed again while what it does is under way. */
export function Act({ act, done, kind = "", disabled = false, label, children }: ButtonProps): JSX.Element {
  const [busy, setBusy] = useState(false);
  async function press(): Promise<void> {
    setBusy(true);
    try {
      await act();
      if (done) tell(done);
    } catch (error) {
      complain(error);
    } finally {
      setBusy(false);
    }
  }
  return (
    <button type="button" class={kind} disabled={disabled || busy} aria-busy={busy} aria-label={label} onClick={() => void press()}>
      {children}
    </button>
  );
}

/** A line to copy. */
export function Copy({ text, what }: { text: string; what: string }): JSX.Element {
  const [copied, setCopied] = useState(false);
  async function copy(): Promise<void> {
    try {
      await navigator.clipboard.writeText(text);
      setCopied(true);
      window.setTimeout(() => setCopied(false), 2000);
    } catch {
      complain(new Error("This browser lets no page copy here: select the line and copy it."));
    }
  }
  return (
    <span class="copy">
      <code tabIndex={0} role="group" aria-label={what}>
        {text}
      </code>
      <button type="button" class="small" onClick={() => void copy()} aria-label={`Copy ${what}`}>
        {copied ? "Copied" : "Copy"}
      </button>
    </span>
  );
}

interface DialogProps {
  title: string;
  close: () => void;
  children: ComponentChildren;
}

/** A dialog, which keeps the keyboard and gives it back. */
export function Dialog({ title, close, children }: DialogProps): JSX.Element {
  const element = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const dialog = element.current!;
    dialog.showModal();
    return () => dialog.close();
  }, []);
  return (
    <dialog ref={element} aria-label={title} onCancel={(event) => (event.preventDefault(), close())}>
      <h2>{title}</h2>
      {children}
    </dialog>
  );
}

interface FormDialogProps extends DialogProps {
  /** What is done with what was typed; an error that it throws is shown, and the dialog stays. */
  send: (field: (name: string) => string, form: HTMLFormElement) => Promise<unknown>;
  submit: string;
  /** What the button says while that is under way. */
  sending?: string;
  leave?: string;
  above?: ComponentChildren;
}

/** A dialog with fields. What is under way is not sent again. */
export function FormDialog({ title, close, send, submit, sending = submit, leave = "Cancel", above, children }: FormDialogProps): JSX.Element {
  const [wrong, setWrong] = useState("");
  const [busy, setBusy] = useState(false);
  async function sent(event: SubmitEvent): Promise<void> {
    event.preventDefault();
    const form = event.target as HTMLFormElement;
    setBusy(true);
    setWrong("");
    try {
      await send(typed(form), form);
    } catch (error) {
      setWrong(error instanceof Error ? error.message : String(error));
    } finally {
      setBusy(false);
    }
  }
  return (
    <Dialog title={title} close={close}>
      {above}
      <form onSubmit={(event) => void sent(event)}>
        {children}
        {wrong && (
          <p role="alert" class="wrong">
            {wrong}
          </p>
        )}
        <div class="buttons">
          <button type="button" onClick={close}>
            {leave}
          </button>
          <button class="primary" disabled={busy} aria-busy={busy}>
            {busy ? sending : submit}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

interface ConfirmProps {
  title: string;
  button: string;
  act: () => Promise<unknown>;
  close: () => void;
  children: ComponentChildren;
}

export function Confirm({ title, button, act, close, children }: ConfirmProps): JSX.Element {
  return (
    <Dialog title={title} close={close}>
      {children}
      <div class="buttons">
        <button type="button" onClick={close}>
          Cancel
        </button>
        <Act kind="danger" act={async () => (await act(), close())}>
          {button}
        </Act>
      </div>
    </Dialog>
  );
}

interface FieldProps {
  label: string;
  name: string;
  hint?: string;
  value?: string;
  type?: string;
  placeholder?: string;
  required?: boolean;
  rows?: number;
}

export function Field({ label, name, hint, rows, ...input }: FieldProps): JSX.Element {
  const described = hint ? { "aria-describedby": `${name}-hint` } : {};
  const common = { id: `field-${name}`, name, autocomplete: "off", spellcheck: false, ...described };
  return (
    <div class="field">
      <label for={`field-${name}`}>{label}</label>
      {rows ? <textarea rows={rows} {...common} {...input} /> : <input {...common} {...input} />}
      {hint && (
        <small id={`${name}-hint`} class="hint">
          {hint}
        </small>
      )}
    </div>
  );
}

interface ChoiceProps {
  label: string;
  hint: string;
  name: string;
  checked?: boolean;
  disabled?: boolean;
  change?: (wanted: boolean) => void;
}

/** A box to tick. */
export function Choice({ label, hint, name, change, ...input }: ChoiceProps): JSX.Element {
  return (
    <div class="tick">
      <label>
        <input type="checkbox" name={name} value="yes" aria-describedby={`${name}-hint`} onChange={change && ((event) => change(event.currentTarget.checked))} {...input} /> {label}
      </label>
      <small id={`${name}-hint`} class="hint">
        {hint}
      </small>
    </div>
  );
}

/** What was typed into a form, by the names of its fields. */
export function typed(form: HTMLFormElement): (name: string) => string {
  const data = new FormData(form);
  return (name) => String(data.get(name) ?? "").trim();
}

/** What an admin's page shows once it has come; `load` is called again by what changes it, and for something else (`what`). */
export function useLoaded<T>(load: () => Promise<T>, what: unknown = null): { value: T | null; reload: () => void } {
  const [value, setValue] = useState<T | null>(null);
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    let wanted = true;
    load().then((loaded) => wanted && setValue(loaded), complain);
    return () => {
      wanted = false;
    };
  }, [turn, what]);
  return { value, reload: () => setTurn((before) => before + 1) };
}

const ROLES: Record<string, string> = { THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TD: "cell" };

/** On a phone each row is a card, whose cells say what the column is called; it is a table all the same. */
function asCards(table: HTMLTableElement): void {
  const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent ?? "");
  for (const part of table.querySelectorAll("thead, tbody, tr, td, th")) {
    const head = part.getAttribute("scope") === "col" ? "columnheader" : "rowheader";
    part.setAttribute("role", ROLES[part.tagName] ?? head);
  }
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.children].forEach((cell, at) => cell.setAttribute("data-label", heads[at] ?? ""));
  }
}

/** A table that scrolls by itself where the window is narrow, also by keyboard; with `cards` it is a list on a phone. */
export function Table({ label, cards = true, children }: { label: string; cards?: boolean; children: ComponentChildren }): JSX.Element {
  const table = useRef<HTMLTableElement>(null);
  useEffect(() => {
    if (cards) asCards(table.current!);
  });
  return (
    <div class={cards ? "scroll cards" : "scroll"} role="region" aria-label={label} tabIndex={0}>
      <table ref={table} role={cards ? "table" : undefined}>
        {children}
      </table>
    </div>
  );
}

export function StatusMark({ status }: { status: string }): JSX.Element {
  return <span class={`status ${status}`}>{status}</span>;
}
