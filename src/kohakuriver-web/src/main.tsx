import { render } from "preact";
import { App } from "./app";
import * as feed from "./feed";
import { whenLoggedOut } from "./api";
import { check, load, used } from "./me";
import { leaveNotice } from "./parts";
import * as route from "./route";

const WAY_BACK = "kohakuriver-way-back";

/** Who has to log in again is back where they were. */
whenLoggedOut(() => {
  sessionStorage.setItem(WAY_BACK, location.hash);
  location.assign("/login");
});
const back = sessionStorage.getItem(WAY_BACK);
sessionStorage.removeItem(WAY_BACK);
if (back && !location.hash) history.replaceState(null, "", back);
route.read();

route.begin(() => {
  leaveNotice();
  window.scrollTo(0, 0);
  document.querySelector<HTMLElement>("main")?.focus({ preventScroll: true });
});
window.addEventListener("keydown", used, { passive: true });
window.addEventListener("pointerdown", used, { passive: true });
render(<App />, document.getElementById("app")!);
load().then(() => feed.begin(() => void check().catch(() => undefined)), (error: unknown) => {
  feed.state.value = error instanceof Error ? error.message : String(error);
  window.setTimeout(() => location.reload(), 5000);
});
