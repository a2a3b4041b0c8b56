import type { ComponentChildren, JSX } from "preact";
import { lazy, Suspense } from "preact/compat";
import { useEffect } from "preact/hooks";
import { state } from "./feed";
import { isAdmin, me } from "./me";
import { Notice } from "./parts";
import { href, route } from "./route";
import { TaskPage } from "./views/task";
import { TasksPage } from "./views/tasks";

const Terminal = lazy(() => import("./terminal/page"));
const Nodes = lazy(() => import("./views/nodes"));
const Sessions = lazy(() => import("./views/sessions"));
const Users = lazy(() => import("./views/users"));
const Tokens = lazy(() => import("./views/tokens"));
const Audit = lazy(() => import("./views/audit"));

interface Place {
  title: string;
  page: () => JSX.Element;
  admins?: boolean;
}

const PLACES: Record<string, Place> = {
  tasks: { title: "Tasks", page: () => <TasksPage /> },
  sessions: { title: "Sessions", page: () => <Sessions /> },
  nodes: { title: "Nodes", page: () => <Nodes /> },
  tokens: { title: "Tokens", page: () => <Tokens /> },
  users: { title: "Users", page: () => <Users />, admins: true },
  audit: { title: "Audit", page: () => <Audit />, admins: true },
};

function place(): { here: string; title: string; page: JSX.Element; wide: boolean } {
  const [where = "tasks", task, what, name] = route.value;
  if (where === "tasks" && task && what === "terminal") {
    return { here: "tasks", title: `Terminal in ${task}`, page: <Terminal task={task} name={name ?? ""} />, wide: true };
  }
  if (where === "tasks" && task) {
    return { here: "tasks", title: task, page: <TaskPage key={task} reference={task} />, wide: false };
  }
  const found = PLACES[where];
  if (!found || (found.admins && !isAdmin())) {
    return { here: "", title: "Not here", page: <p>There is no such page here, or it is for admins.</p>, wide: false };
  }
  return { here: where, title: found.title, page: found.page(), wide: false };
}

function Live(): JSX.Element {
  const told = state.value;
  if (told === "live") return <span class="live" title="What you see is as it is now" role="img" aria-label="Live" />;
  return <span class="live off">{told || "Loading…"}</span>;
}

function Bar({ here }: { here: string }): JSX.Element {
  const shown = Object.entries(PLACES).filter(([, each]) => !each.admins || isAdmin());
  return (
    <header class="bar">
      <a class="brand" href={href("tasks")}>
        <img src={new URL("./icon.svg", import.meta.url).href} alt="" width="22" height="22" />
        <span>KohakuRiver</span>
      </a>
      <nav aria-label="Pages">
        {shown.map(([name, each]) => (
          <a key={name} href={href(name)} aria-current={name === here ? "page" : undefined}>
            {each.title}
          </a>
        ))}
      </nav>
      <div class="who">
        <Live />
        {me.value && (
          <form method="post" action="/logout">
            <span class="name">{me.value.user}</span>
            <button class="small">Log out</button>
          </form>
        )}
      </div>
    </header>
  );
}

function Waiting({ children }: { children: ComponentChildren }): JSX.Element {
  return <Suspense fallback={<p class="hint">Loading…</p>}>{children}</Suspense>;
}

export function App(): JSX.Element {
  const { here, title, page, wide } = place();
  useEffect(() => {
    document.title = `${title} - KohakuRiver`;
  }, [title]);
  return (
    <>
      <a class="skip" href="#content" onClick={(event) => (event.preventDefault(), document.getElementById("content")?.focus())}>
        To the content
      </a>
      <Bar here={here} />
      <main id="content" tabIndex={-1} class={wide ? "wide" : ""}>
        {me.value ? <Waiting>{page}</Waiting> : <p class="hint">{state.value || "Loading…"}</p>}
      </main>
      <Notice />
    </>
  );
}
