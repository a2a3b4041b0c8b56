import { describe, expect, it } from "vitest";
import { limitOf, limitText } from "../src/views/users";

describe("limits of a user", () => {
  it("takes 0 of what is counted for none at all, and says so", () => {
    expect(limitOf("gpus", "0")).toBe(-1);
    expect(limitText("gpus", -1)).toBe("0");
  });
  it("takes none for no limit, whatever it is of", () => {
    for (const name of ["gpus", "memory", "ttl", "cpus"]) expect(limitOf(name, "none")).toBe(0);
  });
  it("refuses 0 of what no task can do without, and what is no number", () => {
    for (const [name, text] of [["memory", "0"], ["ttl", "0"], ["cpus", "0"], ["tasks", "-1"], ["tasks", "x"]]) {
      expect(() => limitOf(name!, text!)).toThrow();
    }
  });
});
