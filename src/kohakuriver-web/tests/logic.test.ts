import { describe, expect, it } from "vitest";
import { Lines } from "../src/api";
import { merged } from "../src/feed";
import { bytes, parseBytes, parseSpan, plain, quoted, span, variables, words } from "../src/format";
import { freeName } from "../src/terminal/sessions";
import { wish } from "../src/wish";

describe("what people type", () => {
  it.each([
    ["python3 -m http.server 8888", ["python3", "-m", "http.server", "8888"]],
    [`sh -c 'echo "a b" | cat'`, ["sh", "-c", 'echo "a b" | cat']],
    [`a "b \\" c" d\\ e ''`, ["a", 'b " c', "d e", ""]],
    ["  ", []],
  ])("is split as a shell splits %s", (line, expected) => {
    expect(words(line)).toEqual(expected);
  });

  it("is split into what it was quoted of", () => {
    const command = ["sh", "-c", "it's | $x", "", "a b", "-o=1"];
    expect(words(quoted(command))).toEqual(command);
  });

  it("says that a quote does not end", () => {
    expect(() => words("'a")).toThrow("quote");
  });

  it("is sizes and times", () => {
    expect(parseBytes("512m")).toBe(512 * 2 ** 20);
    expect(parseBytes("1.5 GiB")).toBe(1.5 * 2 ** 30);
    expect(parseBytes("64")).toBe(64);
    expect(parseSpan("1d12h")).toBe(129_600);
    expect(parseSpan("90s")).toBe(90);
    expect(() => parseBytes("much")).toThrow("512m");
    expect(() => parseSpan("8")).toThrow("8h");
    expect(() => parseSpan("8h later")).toThrow("8h");
  });

  it("is variables, whose values may have anything in them", () => {
    expect(variables("A=1\n\nB=x=y ")).toEqual({ A: "1", B: "x=y " });
    expect(() => variables("=x")).toThrow("NAME=VALUE");
  });
});

it("shows sizes and times as people say them", () => {
  expect([0, 1023, 1024, 150 * 2 ** 20].map(bytes)).toEqual(["0 B", "1023 B", "1.0 KiB", "150 MiB"]);
  expect([5, 90, 7260, 90_000].map(span)).toEqual(["5 s", "1 min", "2 h 1 min", "1 d 1 h"]);
});

it("shows nothing of output that a terminal would obey, nor what turns text around", () => {
  expect(plain("\x1b[31mred\x1b[0m \x1b]0;title\x07a\tb\x00\u202e")).toBe("red a\tb");
});

it("cuts an answer into its lines, however it comes", () => {
  const lines = new Lines();
  expect([...lines.add('{"a'), ...lines.add('":1}\n\n{"b":2}'), ...lines.add("\n")]).toEqual(['{"a":1}', '{"b":2}']);
});

it("takes what is new and forgets what is gone", () => {
  const before = new Map([
    ["1", "a"],
    ["2", "b"],
  ]);
  expect([...merged(before, { "2": "c", "3": "d" }, ["1"])]).toEqual([
    ["2", "c"],
    ["3", "d"],
  ]);
  expect([...before.keys()]).toEqual(["1", "2"]);
});

it("names terminals so that none is taken over", () => {
  expect(freeName([])).toBe("web");
  expect(freeName(["web", "web-2", "train"])).toBe("web-3");
});

it("asks for a task by the API's own fields, and for nothing that was left empty", () => {
  const typed: Record<string, string> = { name: "lab", image: "python", command: "sh -c 'sleep 9'", memory: "1g", ttl: "8h", env: "A=b", mounts: "/a:/a\n", volumes: "work:/work\n\n data:/data:ro " };
  const field = (name: string): string => typed[name] ?? "";
  expect(wish(field, "docker")).toEqual({
    name: "lab",
    image: "python",
    command: ["sh", "-c", "sleep 9"],
    memory: 2 ** 30,
    ttl: 28_800,
    env: { A: "b" },
    mounts: ["/a:/a"],
    volumes: ["work:/work", "data:/data:ro"],
  });
  expect(wish((name) => (name === "command" ? "sleep 9" : ""), "process")).toEqual({ backend: "process", command: ["sleep", "9"] });
  expect(wish((name) => (name === "keep_prefix" ? "yes" : ""), "process")).toEqual({ backend: "process", keep_prefix: true });
});
