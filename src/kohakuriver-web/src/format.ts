/** Numbers, times and command lines, as people write and read them. */

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count: number): string {
  let at = 0;
  let value = count;
  while (value >= 1024 && at < UNITS.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${at === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[at]}`;
}

export function rate(count: number): string {
  return `${bytes(count)}/s`;
}

const SIZES: Record<string, number> = { "": 1, k: 2 ** 10, m: 2 ** 20, g: 2 ** 30, t: 2 ** 40 };

/** Bytes, from `512m`, `2g`, `1.5 GiB`. Throws Error. */
export function parseBytes(text: string): number {
  const found = /^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*$/i.exec(text);
  const unit = SIZES[found?.[2]?.toLowerCase() ?? "?"];
  if (!found || unit === undefined) throw new Error(`${text} is no size: write it like 512m or 2g.`);
  return Math.round(Number(found[1]) * unit);
}

const SPANS: Record<string, number> = { s: 1, m: 60, h: 3600, d: 86400 };

/** Seconds, from `90s`, `30m`, `8h`, `1d12h`. Throws Error. */
export function parseSpan(text: string): number {
  const parts = [...text.replace(/\s+/g, "").matchAll(/(\d+)([smhd])/gy)];
  const read = parts.map((each) => each[0]).join("");
  if (!parts.length || read !== text.replace(/\s+/g, "")) {
    throw new Error(`${text} is no time: write it like 30m, 8h or 1d.`);
  }
  return parts.reduce((sum, each) => sum + Number(each[1]) * SPANS[each[2] as string]!, 0);
}

export function span(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export function since(iso: string, now = Date.now()): string {
  return `${span((now - Date.parse(iso)) / 1000)} ago`;
}

export function moment(iso: string): string {
  const date = new Date(iso);
  return Number.isNaN(date.getTime()) ? iso : date.toLocaleString();
}

/** The words of a command line, quoted as in a shell. Throws Error where a quote does not end. */
export function words(line: string): string[] {
  const found: string[] = [];
  let word: string | null = null;
  let quote = "";
  for (let at = 0; at < line.length; at += 1) {
    const character = line[at]!;
    if (quote === "'") {
      if (character === "'") quote = "";
      else word += character;
    } else if (character === "\\" && at + 1 < line.length && (!quote || '"\\$`'.includes(line[at + 1]!))) {
      at += 1;
      word = (word ?? "") + line[at]!;
    } else if (quote) {
      if (character === quote) quote = "";
      else word += character;
    } else if (character === "'" || character === '"') {
      quote = character;
      word ??= "";
    } else if (/\s/.test(character)) {
      if (word !== null) found.push(word);
      word = null;
    } else {
      word = (word ?? "") + character;
    }
  }
  if (quote) throw new Error("A quote in the command does not end.");
  if (word !== null) found.push(word);
  return found;
}

/** A command as it would be typed. */
export function quoted(command: string[]): string {
  return command.map((word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`)).join(" ");
}

/** Variables, one `NAME=VALUE` a line. Throws Error. */
export function variables(text: string): Record<string, string> {
  const found: Record<string, string> = {};
  for (const line of text.split("\n")) {
    if (!line.trim()) continue;
    const at = line.indexOf("=");
    if (at < 1) throw new Error(`${line.trim()} is no variable: write NAME=VALUE, one a line.`);
    found[line.slice(0, at).trim()] = line.slice(at + 1);
  }
  return found;
}

/** What a task printed, without what a terminal would obey: escape sequences and control characters but tabs. */
export function plain(text: string): string {
  return text
    .replace(/\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])/g, "")
    .replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, "");
}
