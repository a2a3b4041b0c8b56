import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { state as feedState, tasks } from "../feed";
import { go, href } from "../route";
import type { Task } from "../types";
import { Screen, type State } from "./screen";
import { freeName, namedSessions } from "./sessions";

export default function TerminalPage({ task: reference, name }: { task: string; name: string }): JSX.Element {
  const found = [...tasks.value.values()].find((task) => task.name === reference || String(task.task_id) === reference);
  // What is told of a task changes all the time; its terminal stays.
  const held = useRef<Task | null>(null);
  if (found && held.current?.task_id !== found.task_id) held.current = found;
  if (!held.current) {
    return <p>{feedState.value === "live" ? "There is no such task, or it is not shared with you." : "Loading…"}</p>;
  }
  return <Joined key={`${held.current.task_id}/${name}`} task={held.current} name={name || "web"} />;
}

const KEYS: [string, string][] = [
  ["Esc", "\x1b"],
  ["Tab", "\t"],
  ["^C", "\x03"],
  ["^D", "\x04"],
  ["↑", "\x1b[A"],
  ["↓", "\x1b[B"],
  ["←", "\x1b[D"],
  ["→", "\x1b[C"],
];
const SAID: Record<string, string> = { "^C": "Control C", "^D": "Control D", "↑": "Up", "↓": "Down", "←": "Left", "→": "Right" };

function Joined({ task, name }: { task: Task; name: string }): JSX.Element {
  const box = useRef<HTMLDivElement>(null);
  const screen = useRef<Screen | null>(null);
  const [state, setState] = useState<State>({ is: "opening" });
  const [reader, setReader] = useState(false);
  const [others, setOthers] = useState<string[]>([]);

  useEffect(() => {
    const made = new Screen(task, name, box.current!, setState);
    screen.current = made;
    made.terminal.focus();
    return () => made.dispose();
  }, [task.task_id, name]);

  useEffect(() => {
    if (state.is !== "open") return;
    let wanted = true;
    void namedSessions(task.task_id).then((all) => wanted && setOthers(all.map((each) => each.name)));
    return () => {
      wanted = false;
    };
  }, [task.task_id, name, state.is]);

  useEffect(() => {
    if (screen.current) screen.current.terminal.options.screenReaderMode = reader;
  }, [reader]);

  const names = [...new Set([name, ...others])].sort();
  return (
    <div class="terminal-page">
      <div class="terminal-bar">
        <h1>
          <a href={href("tasks", task.name)} aria-label={`Task ${task.name}`}>
            ‹ {task.name}
          </a>
        </h1>
        <nav aria-label="Your terminals in this task">
          {names.map((each) => (
            <a key={each} href={href("tasks", task.name, "terminal", each)} aria-current={each === name ? "page" : undefined}>
              {each}
            </a>
          ))}
        </nav>
        <button type="button" id="leave-terminal" class="small" onClick={() => go("tasks", task.name, "terminal", freeName(names))}>
          New terminal
        </button>
        <button type="button" class="small" aria-pressed={reader} onClick={() => setReader(!reader)}>
          Screen reader
        </button>
      </div>
      <div class="screen" ref={box} />
      <div class="keys" role="group" aria-label="Keys that a phone has not">
        {KEYS.map(([label, text]) => (
          <button key={label} type="button" class="small" aria-label={SAID[label] ?? label} onClick={() => screen.current?.type(text)}>
            {label}
          </button>
        ))}
      </div>
      <div class="terminal-state" role="status">
        {state.is === "opening" && "Opening…"}
        {state.is === "open" && (
          <span>{state.why ?? (state.lasts ? "It goes on when you leave the page." : "It ends when you leave the page.")}</span>
        )}
        {state.is === "open" && <span class="by-key">Shift+Esc leaves the terminal with the keyboard.</span>}
        {state.is === "again" && state.why}
        {state.is === "over" && (
          <>
            <span>{state.why}</span>
            <button type="button" class="primary" onClick={() => (setState({ is: "opening" }), screen.current?.again())}>
              {state.button}
            </button>
          </>
        )}
      </div>
    </div>
  );
}
