/** Rates over the last minutes, drawn as they come. */

import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { rate } from "./format";

const SECONDS = 180;
const HEIGHT = 180;

function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function clock(seconds: number): string {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

function options(width: number): uPlot.Options {
  const axis = { stroke: () => colour("--faint"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false } };
  return {
    width,
    height: HEIGHT,
    cursor: { y: false, drag: { x: false, y: false } },
    legend: { show: false },
    scales: { x: { time: true }, y: { range: (_plot, _low, high) => [0, Math.max(high * 1.1, 1024)] } },
    axes: [
      { ...axis, space: 90, size: 32, values: (_plot, times) => times.map(clock) },
      { ...axis, size: 78, values: (_plot, values) => values.map(rate) },
    ],
    series: [
      {},
      { label: "into the task", stroke: () => colour("--plot-in"), width: 2, points: { show: false } },
      { label: "out of it", stroke: () => colour("--plot-out"), width: 2, dash: [6, 4], points: { show: false } },
    ],
  };
}

export default function Plot({ into, out }: { into: number; out: number }): JSX.Element {
  const element = useRef<HTMLDivElement>(null);
  const held = useRef<[number[], number[], number[]]>([[], [], []]);
  const latest = useRef<[number, number]>([into, out]);
  latest.current = [into, out];

  useEffect(() => {
    const box = element.current!;
    const made = new uPlot(options(box.clientWidth), held.current, box);
    const sized = new ResizeObserver(() => made.setSize({ width: box.clientWidth, height: HEIGHT }));
    sized.observe(box);
    const scheme = window.matchMedia("(prefers-color-scheme: dark)");
    const redraw = (): void => made.redraw(false, true);
    scheme.addEventListener("change", redraw);
    // What does not change is not told: a second without news is one like the last.
    const beat = window.setInterval(() => {
      const [times, ins, outs] = held.current;
      const now = Date.now() / 1000;
      times.push(now);
      ins.push(latest.current[0]);
      outs.push(latest.current[1]);
      while (times[0]! < now - SECONDS) for (const each of held.current) each.shift();
      made.setData(held.current, false);
      made.setScale("x", { min: now - SECONDS, max: now });
    }, 1000);
    return () => {
      window.clearInterval(beat);
      scheme.removeEventListener("change", redraw);
      sized.disconnect();
      made.destroy();
    };
  }, []);
  return <div class="plot" ref={element} role="img" aria-label="Bytes a second over the last three minutes, into the task and out of it" />;
}
