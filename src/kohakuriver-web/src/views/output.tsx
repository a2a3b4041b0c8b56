import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError, follow, taskPath } from "../api";
import { plain } from "../format";
import type { LogLine, Task } from "../types";

const SHOWN = 500;
const MOST = 2000;

interface Line {
  key: number;
  kind: string;
  text: string;
}

/** Whether somebody sees this window: one that nobody sees holds no connection, of which a browser has few to a host. */
function useSeen(): boolean {
  const [seen, setSeen] = useState(document.visibilityState === "visible");
  useEffect(() => {
    const look = (): void => setSeen(document.visibilityState === "visible");
    document.addEventListener("visibilitychange", look);
    return () => document.removeEventListener("visibilitychange", look);
  }, []);
  return seen;
}

/** What the task prints, as it does: the last lines, shown without what a terminal would obey. */
export function Output({ task }: { task: Task }): JSX.Element {
  const [lines, setLines] = useState<Line[]>([]);
  const [why, setWhy] = useState("");
  const box = useRef<HTMLDivElement>(null);
  const atEnd = useRef(true);
  const seen = useSeen();
  const alive = task.status === "running" || task.status === "starting";

  useEffect(() => {
    if (!seen) return;
    const ended = new AbortController();
    let key = 0;
    let fresh: Line[] = [];
    let drawing = 0;
    const draw = (): void => {
      drawing = 0;
      const come = fresh;
      fresh = [];
      setLines((before) => [...before, ...come].slice(-MOST));
    };
    setLines([]);
    setWhy("");
    const take = (line: LogLine): void => {
      fresh.push({ key: (key += 1), kind: line.stream, text: plain(line.text.replace(/\r?\n$/, "")) });
      if (fresh.length > MOST) fresh = fresh.slice(-MOST);
      drawing ||= requestAnimationFrame(draw);
    };
    const path = taskPath(task, `/logs?follow=${alive}&tail=${SHOWN}`);
    follow(path, (line) => take(line as LogLine), ended.signal).catch((error: unknown) => {
      if (!ended.signal.aborted) setWhy(error instanceof ApiError ? error.message : String(error));
    });
    return () => {
      ended.abort();
      cancelAnimationFrame(drawing);
    };
  }, [task.task_id, alive, seen]);

  useEffect(() => {
    if (atEnd.current && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [lines]);

  return (
    <>
      <div
        class="output"
        ref={box}
        tabIndex={0}
        role="log"
        aria-label="What the task prints"
        onScroll={(event) => {
          const { scrollTop, scrollHeight, clientHeight } = event.currentTarget;
          atEnd.current = scrollHeight - scrollTop - clientHeight < 8;
        }}
      >
        {lines.map((line) => (
          <div key={line.key} class={line.kind}>
            {line.text || " "}
          </div>
        ))}
        {!lines.length && !why && <div class="note">Nothing yet.</div>}
      </div>
      {why && <p class="hint">{why}</p>}
    </>
  );
}
