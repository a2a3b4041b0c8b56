/** The bytes of a terminal's stream, and of the session that it is in (docs/protocol.md §1, §3, §6). No I/O. */

export const Type = {
  CONNECT: 0x01,
  CONNECTED: 0x02,
  DATA: 0x03,
  CLOSE: 0x04,
  ERROR: 0x05,
  PING: 0x06,
  PONG: 0x07,
  WINDOW: 0x08,
  EOF: 0x09,
  ACK: 0x0c,
  GOAWAY: 0x0f,
  NOTICE: 0x12,
} as const;

export const Tag = {
  INPUT: 0x01,
  RESIZE: 0x03,
  STARTED: 0x10,
  OUTPUT: 0x11,
  EXIT: 0x13,
  LOST: 0x14,
  FAILED: 0x15,
  TAKEN: 0x16,
} as const;

const PROTO_TERMINAL = 0x02;
const HEADER = 8;
const KEY = 16;
const MARK = 16;

export const STREAM = 1;
/** Of a session: the stream's number. There is one. */

export interface Message {
  type: number;
  id: number;
  payload: Uint8Array;
}

export function message(type: number, id: number, payload: Uint8Array = new Uint8Array(), proto = 0): Uint8Array<ArrayBuffer> {
  const made = new Uint8Array(HEADER + payload.length);
  const view = new DataView(made.buffer);
  view.setUint8(0, type);
  view.setUint8(1, proto);
  view.setUint32(2, id);
  made.set(payload, HEADER);
  return made;
}

/** Null for what is shorter than a header. */
export function parse(data: ArrayBuffer): Message | null {
  if (data.byteLength < HEADER) return null;
  const view = new DataView(data);
  return { type: view.getUint8(0), id: view.getUint32(2), payload: new Uint8Array(data, HEADER) };
}

export function pair(first: number, second: number): Uint8Array {
  const made = new DataView(new ArrayBuffer(16));
  made.setBigUint64(0, BigInt(first));
  made.setBigUint64(8, BigInt(second));
  return new Uint8Array(made.buffer);
}

/** The first of the numbers of CONNECTED and WINDOW; null where they are of another length. */
export function limitIn(payload: Uint8Array): number | null {
  if (payload.length !== 16) return null;
  return Number(new DataView(payload.buffer, payload.byteOffset).getBigUint64(0));
}

export function single(value: number): Uint8Array {
  const made = new DataView(new ArrayBuffer(8));
  made.setBigUint64(0, BigInt(value));
  return new Uint8Array(made.buffer);
}

class Writer {
  private parts: Uint8Array[] = [];
  private readonly encoder = new TextEncoder();

  raw(part: Uint8Array): this {
    this.parts.push(part);
    return this;
  }

  number(value: number, size: 1 | 2 | 4): this {
    const made = new DataView(new ArrayBuffer(size));
    if (size === 1) made.setUint8(0, value);
    else if (size === 2) made.setUint16(0, value);
    else made.setUint32(0, value);
    return this.raw(new Uint8Array(made.buffer));
  }

  text(text: string): this {
    const data = this.encoder.encode(text);
    return this.number(data.length, 4).raw(data);
  }

  texts(texts: string[]): this {
    this.number(texts.length, 4);
    for (const text of texts) this.text(text);
    return this;
  }

  done(): Uint8Array {
    const made = new Uint8Array(this.parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of this.parts) {
      made.set(part, at);
      at += part.length;
    }
    return made;
  }
}

const ON_TERMINAL = 1;
const NAMED = 2;
const LIST = 4;

/** The start of the best shell, on a terminal with a name, which stays when it is left. */
export function startNamed(name: string, rows: number, cols: number): Uint8Array {
  return new Writer()
    .number(ON_TERMINAL | NAMED, 1)
    .number(rows, 2)
    .number(cols, 2)
    .text("")
    .text("")
    .texts([])
    .texts(["TERM=xterm-256color", "COLORTERM=truecolor"])
    .text(name)
    .done();
}

/** The start that asks which terminals with names the user has. */
export function startList(): Uint8Array {
  return new Writer().number(LIST, 1).number(1, 2).number(1, 2).text("").text("").texts([]).texts([]).done();
}

/** CONNECT of a terminal's stream: it is held for so many seconds where the session is lost. */
export function connect(limit: number, hold: number, start: Uint8Array): Uint8Array<ArrayBuffer> {
  const key = crypto.getRandomValues(new Uint8Array(KEY));
  const payload = new Writer()
    .raw(single(limit))
    .raw(key)
    .number(hold, 4)
    .number(0, 1)
    .raw(new Uint8Array(MARK))
    .raw(start)
    .done();
  return message(Type.CONNECT, STREAM, payload, PROTO_TERMINAL);
}

const FRAME = 5;

export function frame(tag: number, payload: Uint8Array): Uint8Array {
  const made = new Uint8Array(FRAME + payload.length);
  const view = new DataView(made.buffer);
  view.setUint8(0, tag);
  view.setUint32(1, payload.length);
  made.set(payload, FRAME);
  return made;
}

export function resize(rows: number, cols: number): Uint8Array {
  return frame(Tag.RESIZE, new Writer().number(rows, 2).number(cols, 2).done());
}

const LONGEST = 1 << 24;

/** Cuts the bytes of a stream into frames; long ones of output are handed on in pieces, as they come. */
export class Frames {
  private head: number[] = [];
  private left = 0;
  private tag = 0;
  private held: Uint8Array[] = [];

  constructor(private readonly take: (tag: number, payload: Uint8Array) => void) {}

  /** Throws Error for what is no frame of a terminal. */
  add(data: Uint8Array): void {
    let at = 0;
    while (at < data.length) {
      if (this.head.length < FRAME) {
        this.head.push(data[at]!);
        at += 1;
        if (this.head.length === FRAME) this.begin();
        continue;
      }
      const piece = data.subarray(at, at + this.left);
      at += piece.length;
      this.left -= piece.length;
      if (this.tag === Tag.OUTPUT) this.take(this.tag, piece);
      else this.held.push(piece.slice());
      if (!this.left) this.end();
    }
  }

  private begin(): void {
    const [tag, a, b, c, d] = this.head as [number, number, number, number, number];
    this.tag = tag;
    this.left = ((a << 24) | (b << 16) | (c << 8) | d) >>> 0;
    if (this.left > LONGEST) throw new Error("What came is no terminal.");
    if (!this.left) this.end();
  }

  private end(): void {
    if (this.tag !== Tag.OUTPUT) {
      const whole = new Writer();
      for (const piece of this.held) whole.raw(piece);
      this.take(this.tag, whole.done());
    }
    this.head = [];
    this.held = [];
  }
}

export interface NamedSession {
  name: string;
  attached: boolean;
  seconds: number;
}

/** The list of a user's terminals, of which whoever is in the container may say anything. */
export function listed(text: string): NamedSession[] {
  const found: NamedSession[] = [];
  for (const line of text.split("\n")) {
    const parts = /^([A-Za-z0-9._-]{1,64}) (attached|detached) (\d{1,12})$/.exec(line);
    if (parts) found.push({ name: parts[1]!, attached: parts[2] === "attached", seconds: Number(parts[3]) });
  }
  return found;
}

/** What limits a sender and a receiver of one stream (docs/protocol.md §3, "Windows, exactly"), as of a kept one. */
export class Windows {
  sent = 0;
  limit = 65_536;
  received = 0;
  consumed = 0;
  told = 0;
  granted: number;

  constructor(readonly window: number) {
    this.granted = window;
  }

  /** How many bytes may be sent now. */
  get room(): number {
    return this.limit - this.sent;
  }

  raise(limit: number): void {
    this.limit = Math.max(this.limit, limit);
  }

  /** More was consumed: the payload of WINDOW, where it is due. */
  consume(count: number): Uint8Array | null {
    this.consumed += count;
    if (this.consumed + this.window - this.granted < this.window / 4) return null;
    this.granted = this.consumed + this.window;
    this.told = this.received;
    return pair(this.granted, this.received);
  }

  /** The payload of ACK, where something came of which the peer was not told. */
  owed(): Uint8Array | null {
    if (this.told === this.received) return null;
    this.told = this.received;
    return single(this.received);
  }
}
