import { describe, expect, it } from "vitest";
import { connect, frame, Frames, limitIn, listed, message, pair, parse, startNamed, Tag, Type, Windows } from "../src/terminal/wire";

const hex = (data: Uint8Array): string => [...data].map((byte) => byte.toString(16).padStart(2, "0")).join("");

describe("messages (docs/protocol.md §1, §3)", () => {
  it("has a header of eight bytes before what it carries", () => {
    expect(hex(message(Type.DATA, 1, new Uint8Array([0xab])))).toBe("0300000000010000ab");
    expect(parse(message(Type.PONG, 7, new Uint8Array([1, 2])).buffer)).toEqual({
      type: Type.PONG,
      id: 7,
      payload: new Uint8Array([1, 2]),
    });
    expect(parse(new ArrayBuffer(7))).toBeNull();
  });

  it("opens a kept stream of a terminal with limit, key, hold, flags, mark and start", () => {
    const made = connect(131_072, 60, startNamed("web", 40, 120));
    expect(hex(made.subarray(0, 8))).toBe("0102000000010000");
    expect(hex(made.subarray(8, 16))).toBe("0000000000020000");
    expect(hex(made.subarray(32, 37))).toBe("0000003c00");
    expect(hex(made.subarray(37, 53))).toBe("00".repeat(16));
    expect(hex(made.subarray(53, 58))).toBe("0300280078");
    expect(hex(made.slice(-7))).toBe("00000003776562");
    expect(hex(connect(1, 1, new Uint8Array()).subarray(16, 32))).not.toBe(hex(connect(1, 1, new Uint8Array()).subarray(16, 32)));
  });

  it("reads a limit where there is one", () => {
    expect(limitIn(pair(5_000_000_000, 1))).toBe(5_000_000_000);
    expect(limitIn(new Uint8Array(8))).toBeNull();
  });
});

describe("frames (docs/protocol.md §6)", () => {
  const all = [frame(Tag.STARTED, new Uint8Array()), frame(Tag.OUTPUT, new Uint8Array([104, 105])), frame(Tag.EXIT, new Uint8Array([0, 0, 0, 3]))];
  const bytes = new Uint8Array(all.flatMap((each) => [...each]));

  it.each([1, 2, 3, 7, 100])("are the same however the stream is cut, in pieces of %i", (size) => {
    let output = "";
    const others: [number, string][] = [];
    const frames = new Frames((tag, payload) => {
      if (tag === Tag.OUTPUT) output += String.fromCharCode(...payload);
      else others.push([tag, hex(payload)]);
    });
    for (let at = 0; at < bytes.length; at += size) frames.add(bytes.subarray(at, at + size));
    expect(output).toBe("hi");
    expect(others).toEqual([
      [Tag.STARTED, ""],
      [Tag.EXIT, "00000003"],
    ]);
  });

  it("of more than 16 MiB are none", () => {
    expect(() => new Frames(() => undefined).add(new Uint8Array([0x11, 0xff, 0xff, 0xff, 0xff]))).toThrow();
  });
});

describe("windows", () => {
  it("tell of room once a quarter was consumed, and with it what has come", () => {
    const windows = new Windows(100);
    windows.received = 30;
    expect(windows.consume(20)).toBeNull();
    expect(windows.consume(5)).toEqual(pair(125, 30));
    expect(windows.owed()).toBeNull();
    windows.received = 40;
    expect(windows.owed()).not.toBeNull();
    expect(windows.owed()).toBeNull();
  });

  it("of a sender are never taken back", () => {
    const windows = new Windows(1);
    windows.raise(1);
    expect(windows.room).toBe(65_536);
    windows.raise(100_000);
    windows.sent = 99_000;
    expect(windows.room).toBe(1000);
  });
});

it("takes of a list of terminals only what is one", () => {
  expect(listed("web attached 12\n<b> attached 1\nother detached 3\nx y z\n")).toEqual([
    { name: "web", attached: true, seconds: 12 },
    { name: "other", attached: false, seconds: 3 },
  ]);
});
