"""Tasks: making them on a node, their life, and waiting until one can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import structlog
from pydantic import BaseModel, TypeAdapter, ValidationError

from kohakuriver.backends import adopting, kind_of, known, making_images
from kohakuriver.changes import Changes
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotFoundError, UnavailableError, UsageError
from kohakuriver.host.schemas import AdoptRequest, Agent, Answers, CreateRequest, Ports, iso_time
from kohakuriver.host.services.audit import LONGEST_TEXT, NOWHERE, Audit, fingerprint
from kohakuriver.host.services.bounds import (
    BOUNDS,
    TIMES,
    give_bounds,
    give_times,
    offer_of,
    open_to,
    roomy,
    with_gpus,
)
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.mounts import mountable
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.runner_client import RunnerClient, makes_no_sense
from kohakuriver.host.services.volumes import UserVolumes, node_of
from kohakuriver.session.nodes import AWAY, NodeOfflineError
from kohakuriver.store import Accounts, Node, Store, Task, Together, Volumes, volume_names
from kohakuriver.task import (
    TaskOrder,
    TaskReport,
    TaskTraffic,
    TaskView,
    asked_for,
    is_engine_id,
    is_task_name,
    part_of,
    taken_from,
)

__all__ = ["AllTasks", "Tasks", "container_name", "new_task_id", "not_running"]

log = structlog.get_logger("kohakuriver.host")

_WEB = ("preserve_host", "keep_prefix")
"""What services are told as browsers have it."""

_OF_OTHERS = ("shared_with", "traffic", "pending_removal", "no_direct", *_WEB)
"""What of a view its record in the database does not have."""

_MORE = ("restart", "network")
_ACTIVE = ("starting", "running")
_ADOPT = "/api/tasks/adopt"

OF_CONTAINERS: Final = ("entrypoint", "workdir", "run_as", "pull", "gpus")
"""The fields of an order that are about a container and its image, None where nothing was said."""

OF_SCHEDULERS: Final = ("time_limit", "partition", "account", "qos")
"""Those of an order that a scheduler alone goes by."""

_TAKEN_BY_SCHEDULERS = ("memory", "cpus", "workdir", "gpus")

# A stop may take an engine its grace period. Users' programs wait a little longer than this for the host.
_RUNNER_SECONDS = 45.0
_LOOK_SECONDS = 10.0
_RENEWED_AT_ONCE = 20
_CLAIM_SECONDS = 3 * _RUNNER_SECONDS

Answer = TypeVar("Answer", bound=BaseModel)

# Another host on the same database hears of changes that this one does not, and nobody tells of a node's silence.
_CHANGES_SECONDS = 1.0


def new_task_id() -> int:
    """The id of a new task."""
    return 10**9 + secrets.randbelow(9 * 10**9)


def container_name(backend: str, task_id: int) -> str:
    """A task's id on the tunnel. Source: docs/protocol.md §4."""
    return kind_of(backend).container.format(task_id)


class AllTasks(NamedTuple):
    """Every task and its node, and with whom else each is shared, by its id."""

    found: list[tuple[Task, Node]]
    shares: dict[int, list[str]]


class Tasks:
    """What users do with tasks. Every method may raise KohakuRiverError with the reason.

    Who may do it was checked before (`host/access.py`). `user_mounts`: others than admins may mount what nodes have.
    `variables` are those that a task has of this host, by its id and name; what its user says goes before.

    Large because users do much with tasks: each method is one thing of that, and most are a question to its runner.
    """

    def __init__(
        self,
        store: Store,
        accounts: Accounts,
        nodes: Nodes,
        runners: RunnerClient,
        changes: Changes[int],
        *,
        user_mounts: bool = False,
        audit: Audit = NOWHERE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._accounts = accounts
        self._volumes = Volumes(store)
        self._user_volumes = UserVolumes(self._volumes, nodes, runners, audit)
        self._user_mounts = user_mounts
        self._audit = audit
        self._nodes = nodes
        self._runners = runners
        self._changes = changes
        self._clock = clock
        self._telling: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Thousands may wait for one task, and all look when something about it changes.
        self._waited_for: Together[int, tuple[Task, Node]] = Together(lambda task_id: store.task_and_node(str(task_id)))
        self.variables: Callable[[int, str | None], Mapping[str, str]] = lambda task_id, name: {}

    def view(self, task: Task, node: Node, shared_with: Sequence[str] = ()) -> TaskView:
        """A task as users see it: one on a node that is offline is lost until the node is back."""
        lost = task.status in _ACTIVE and not self._nodes.is_online(node)
        traffic = {} if lost else node.traffic.get("tasks", {}).get(str(task.task_id), {})
        lists = ("command", "mounts", "volumes", "devices", "labels", "gpu_ids", "env")  # of the variables the names
        ordered = {name: list(task.spec.get(name, ())) for name in lists}
        given = {name: task.spec.get(name) for name in (*BOUNDS, *TIMES, *OF_CONTAINERS, *OF_SCHEDULERS, *_MORE)}
        shown = part_of(task, TaskView, without=(*_OF_OTHERS, *ordered, *given)) | {
            **ordered,
            **given,
            "status": "lost" if lost else task.status,
            "tunnel": task.tunnel and not lost,
            "ends_at": None if task.ends_at is None or task.status not in _ACTIVE else iso_time(task.ends_at),
            "message": f"node {node.name} is offline" if lost else task.message,
            "created_at": iso_time(task.created_at),
            "no_direct": offer_of(node).no_direct,
            **{name: task.spec.get(name, False) for name in _WEB},
        }
        return TaskView(**shown, shared_with=list(shared_with), traffic=taken_from(traffic, TaskTraffic))

    async def views(self, caller: Caller) -> list[TaskView]:
        """All tasks that the caller may use, oldest first.

        Each user is told one after the other: the orders of all tasks are in memory meanwhile.
        """
        async with self._telling.setdefault(caller.name, asyncio.Lock()):
            return [view for _, _, view in await self.used_by(caller)]

    async def used_by(self, caller: Caller) -> list[tuple[Task, Node, TaskView]]:
        """The same tasks, with their nodes, and as the caller sees them."""
        return await self.of_these(await self.all(), caller)

    async def all(self) -> AllTasks:
        """Everybody's tasks, oldest first."""
        found = await self._store.tasks_and_nodes()
        return AllTasks(found, await self._accounts.shares(task.task_id for task, _ in found))

    async def of_these(self, tasks: AllTasks, caller: Caller) -> list[tuple[Task, Node, TaskView]]:
        """Those that the caller may use, with their nodes, and as the caller sees them."""
        found, shares = tasks
        if not caller.is_admin:
            names = await self._accounts.names_of(caller.name)
            found = [each for each in found if not names.isdisjoint((each[0].owner, *shares.get(each[0].task_id, ())))]
        return [(task, node, self.view(task, node, shares.get(task.task_id, []))) for task, node in found]

    async def get(self, task: Task, node: Node) -> TaskView:
        """One task, with who else may use it."""
        shares = await self._accounts.shares([task.task_id])
        return self.view(task, node, shares.get(task.task_id, []))

    async def create(self, request: CreateRequest, owner: Caller) -> TaskView:
        """Start a new task. One that can't be started leaves nothing behind."""
        backends = _fit_for(request)
        place = node_of(await self._volumes.places(owner.name, request.volumes), request.node)
        fitting = open_to(owner, await self._nodes.fitting(backends, place), backends)
        bound = bool(request.mounts) and not owner.is_admin and not self._user_mounts
        if bound:
            fitting = mountable(owner, fitting, request.mounts)
        if request.devices:
            owner.need_admin("Giving a task a device of its node")
        if request.labels:  # a proxy or an updater on the node may do what they say
            owner.need_admin("Giving a container labels")
        scheduled = all(kind_of(name).scheduled for name in backends)
        if request.gpus is not None and not scheduled:
            fitting = with_gpus(fitting, request.gpus, await self._store.gpus_in_use(self._clock()))
        node = fitting[0] if scheduled else roomy(fitting, request)
        order = _order(_offered(node, backends), request.name, vars(request))
        give_bounds(order, offer_of(node), owner.name, owner.quotas)
        give_times(order, owner.name, owner.quotas)
        order.mounts_for = owner.name if bound else None
        order.run_for = owner.name if scheduled else ""
        view = await self._begin(await self._add(order, node, owner.name), node)
        self._write("task_created", view, **_asked(order))
        return view

    async def adopt(self, request: AdoptRequest, owner: str) -> TaskView:
        """Make a task of what runs already. Adopting the same container or job once more gives the task that it is."""
        if request.job is not None:
            return await self._adopt_job(request.job, request, owner)
        if request.address is not None:
            node = await self._node_for_address(request.node)
            backend = _offered(node, adopting("address"))
            order = _order(backend, request.name, {"address": request.address, "adopted": True})
            view = await self._begin(await self._add(order, node, owner), node)
            self._write("task_adopted", view, address=request.address)
            return view
        nodes = await self._nodes.fitting(adopting("container"), request.node)
        name = request.name or await self._name_of(request.container or "")
        for node in nodes:
            what = {"engine_name": request.container, "adopted": True, "no_client": request.no_client}
            order = _order(_offered(node, adopting("container")), name, what)
            task = await self._add(order, node, owner)
            try:
                view = await self._begin(task, node)
                self._write("task_adopted", view, container=request.container)
                if request.name is not None and view.name != request.name:
                    raise _adopted_already(view)
                return view
            except NotFoundError:
                if node is nodes[-1]:
                    raise
        raise AssertionError("fitting() gives at least one node")

    async def _adopt_job(self, job: str, request: AdoptRequest, owner: str) -> TaskView:
        """Make a task of a job of the cluster's user who the owner is there; which that is, its node says."""
        nodes = await self._nodes.fitting(adopting("job"), request.node)
        name = request.name or await self._name_of(f"{_offered(nodes[0], adopting('job'))}-{job.replace('_', '-')}")
        for node in nodes:
            what = {"engine_name": job, "adopted": True, "run_for": owner}
            task = await self._add(_order(_offered(node, adopting("job")), name, what), node, owner)
            try:
                view = await self._begin(task, node)
            except NotFoundError:
                if node is nodes[-1]:
                    raise
            else:
                self._write("task_adopted", view, job=job)
                return view
        raise AssertionError("fitting() gives at least one node")

    async def _name_of(self, container: str) -> str | None:
        """A container's own name as that of its task, where it is free and would do for one."""
        if is_engine_id(container) or not is_task_name(container):
            return None
        try:
            await self._store.task_and_node(container)
        except NotFoundError:
            return container
        return None

    async def _node_for_address(self, name: str | None) -> Node:
        nodes = await self._nodes.fitting(adopting("address"), name)
        if len(nodes) > 1:
            raise UsageError("Several nodes are online; say with --node which one reaches the address.")
        return nodes[0]

    async def _add(self, order: TaskOrder, node: Node, owner: str) -> Task:
        task = Task.ordered(order, node=node.name, owner=owner, now=self._clock())
        await self._accounts.add_task(task)
        return task

    async def _begin(self, task: Task, node: Node) -> TaskView:
        try:
            report = await self._order(task, node)
        except KohakuRiverError as error:
            if error.code == "runner_timeout":
                raise  # it may yet have started: the next heartbeat says
            await self._undo(task)
            raise
        if report.task_id != task.task_id:
            await self._undo(task)
            if not task.adopted:  # only where something is adopted a node may name another one
                raise makes_no_sense(node)
            known, its_node = await self._store.task_and_node(str(report.task_id))
            # Containers are adopted by admins, who may see every task; jobs by their users.
            if kind_of(task.backend).scheduled and known.owner != task.owner:
                raise makes_no_sense(node)
            return await self._take_over(report, its_node, known)
        log.info("task started", task=task.task_id, name=task.name, node=node.name, backend=task.backend)
        return await self._take_over(report, node, task)

    async def _undo(self, task: Task) -> None:
        """Leave nothing of a task that was not started."""
        await self._store.forget_tasks([task.task_id])
        await self._user_volumes.undo(task.task_id)

    async def _order(self, task: Task, node: Node) -> TaskReport:
        path = _ADOPT if task.adopted else "/api/tasks"
        ordered = task.order()
        if not task.adopted:
            ordered.env = {**self.variables(task.task_id, task.name), **ordered.env}
        order = asked_for(ordered)
        answer = await self._runners.call(node, "POST", path, order, container=task.container, timeout=_RUNNER_SECONDS)
        return _report(answer, node)

    async def _take_over(self, report: TaskReport, node: Node, task: Task) -> TaskView:
        """The task as its node reports it after it did as it was told.

        Where the database fails, what was done stays done, and the node's heartbeats have it written down later.
        """
        try:
            changed = await self._store.change_task(task.task_id, report.changes())
        except KohakuRiverError as error:
            log.error("how a task is can't be written down yet", task=task.task_id, reason=error.message)
            task.change(report.changes(), self._clock())
            return await self.get(task, node)
        self._changes.notify([task.task_id])
        return await self.get(changed or task, node)

    async def stop(self, task: Task, node: Node, *, container: bool = False) -> TaskView:
        """Stop a task; one that does not run stays as it is. An adopted container is stopped only with `container`."""
        ran = task.status in _ACTIVE
        view = await self._control(task, node, "stop", container)
        if ran:  # else nothing was done; and who ends something needs no room for it in the audit log
            self._write("task_stopped", view)
        return view

    async def restart(self, task: Task, node: Node, *, container: bool = False) -> TaskView:
        """Stop a task if it runs, and start it again: where its node has forgotten it, as it was ordered once.

        An adopted container is restarted only with `container`. Raises "over_limit" where its owner can't have one more
        that runs.
        """
        if known(task.backend).dials_in:
            raise UsageError(
                f"Task {task.name} is where its agent runs: start `kohakuriver agent --name {task.name}` there again.",
                code="not_supported",
                status=409,
            )
        async with _claimed(self._accounts, task):
            try:
                view = await self._control(task, node, "restart", container)
            except NotFoundError:
                log.info("task made again", task=task.task_id, name=task.name, node=node.name)
                view = await self._take_over(await self._order(task, node), node, task)
        self._write("task_restarted", view)
        return view

    async def extend(self, task: Task, node: Node, seconds: int, caller: Caller) -> TaskView:
        """Have the time to live of a task that runs be over so many seconds later than it would.

        Who is no admin can have no more left than the owner's limit `ttl`. Raises what its runner says.
        """
        self._nodes.check_online(node)
        most = 0 if caller.is_admin else (await self._accounts.quotas(task.owner)).ttl
        path = f"/api/tasks/{task.container}/extend"
        body = {"seconds": seconds, "most": most}
        answer = await self._runners.call(node, "POST", path, body, container=task.container, timeout=_LOOK_SECONDS)
        view = await self._take_over(_report(answer, node), node, task)
        self._write("task_extended", view, seconds=seconds)
        return view

    async def serve_web(self, task: Task, node: Node, how: Mapping[str, bool]) -> TaskView:
        """Have the services of a task be told the addresses and paths that browsers have, or not, from now on."""
        changed = await self._store.change_order(task.task_id, how)
        self._changes.notify([task.task_id])
        view = await self.get(changed or task, node)
        self._write("task_changed", view, **how)
        return view

    async def _control(self, task: Task, node: Node, action: str, container: bool) -> TaskView:
        if task.adopted and kind_of(task.backend).controls:
            _check_adopted(task, action, container)
        self._nodes.check_online(node)
        path = f"/api/tasks/{task.container}/{action}"
        answer = await self._runners.call(node, "POST", path, container=task.container, timeout=_RUNNER_SECONDS)
        return await self._take_over(_report(answer, node), node, task)

    async def answers(self, task: Task, node: Node) -> Answers:
        """Whether an address task's machine answers its node, which looks now. Raises what its runner says."""
        self._nodes.check_online(node)
        path = f"/api/tasks/{task.container}/answers"
        answer = await self._runners.call(node, "GET", path, container=task.container, timeout=_LOOK_SECONDS)
        return _valid(Answers, answer, node)

    async def ports(self, task: Task, node: Node) -> Ports:
        """Which ports listen in a task, of which its tunnel client is asked now. Raises what its runner says."""
        view = self.view(task, node)
        if view.status != "running":
            raise not_running(task, view)
        path = f"/api/tasks/{task.container}/ports"
        answer = await self._runners.call(node, "GET", path, container=task.container, timeout=_LOOK_SECONDS)
        return _valid(Ports, answer, node)

    async def agent(self, task: Task, node: Node) -> Agent:
        """What a tunnel client in an address task's machine is started with. Raises what its runner says."""
        self._nodes.check_online(node)
        path = f"/api/tasks/{task.container}/agent"
        answer = await self._runners.call(node, "GET", path, container=task.container, timeout=_RUNNER_SECONDS)
        self._write("agent_token_shown", await self.get(task, node))
        return _valid(Agent, answer, node)

    async def renew_token(self, task: Task, node: Node) -> None:
        """Make the token worthless that the task's tunnel client has had so far; somebody may know it.

        A node that can't be asked now keeps it: it is of no use but where the task runs, and in its client's hands.
        """
        path = f"/api/tasks/{task.container}/token"
        try:
            self._nodes.check_online(node)
            await self._runners.call(node, "POST", path, container=task.container, timeout=_RUNNER_SECONDS)
        except KohakuRiverError as error:
            log.warning("a task's tunnel token is still the one it was", task=task.task_id, reason=error.message)

    async def renew_tokens(self, task_ids: Sequence[int]) -> None:
        """`renew_token` of several tasks; some may be gone."""
        for start in range(0, len(task_ids), _RENEWED_AT_ONCE):
            some = task_ids[start : start + _RENEWED_AT_ONCE]
            await asyncio.gather(*map(self._renew_token_of, some))

    async def _renew_token_of(self, task_id: int) -> None:
        with contextlib.suppress(NotFoundError):
            await self.renew_token(*await self._store.task_and_node(str(task_id)))

    async def remove(self, task: Task, node: Node) -> TaskView:
        """Remove a task, as it was. A node that can't be reached is told when it is back."""
        view = await self.get(task, node)
        # The wish is written down first: a database that fails then has destroyed nothing, and one that fails after
        # the task ended is told by the node's next heartbeats.
        await self._store.change_task(task.task_id, {"removed": True})
        try:
            self._nodes.check_online(node)
            await self._runners.call(
                node, "DELETE", f"/api/tasks/{task.container}", container=task.container, timeout=_RUNNER_SECONDS
            )
        except NotFoundError:
            await self._forget(task)
        except KohakuRiverError as error:
            if not isinstance(error, HostUnreachableError) and error.code not in AWAY:
                await self._store.change_task(task.task_id, {"removed": False})
                raise
            await self._store.remove_task(task.task_id)
            view = replace(view, pending_removal=True)
        else:
            await self._forget(task)
        self._changes.notify([task.task_id])
        log.info("task removed", task=task.task_id, name=task.name, node=node.name)
        self._write("task_removed", view)
        return view

    def _write(self, event: str, view: TaskView, **more: Any) -> None:
        """Write down what was done with a task."""
        about = {"task": view.task_id, "name": view.name, "owner": view.owner, "node": view.node}
        self._audit.write(event, **about, **more)

    async def _forget(self, task: Task) -> None:
        """Delete what ended. Where the database fails, the node's heartbeats have it deleted later."""
        try:
            await self._store.forget_tasks([task.task_id])
        except KohakuRiverError as error:
            log.error("a removed task can't be forgotten yet", task=task.task_id, reason=error.message)

    async def run(self) -> None:
        """Wake those who wait for a task that something else than this host has changed, until cancelled.

        However many wait, the database is asked once for all of them.
        """
        seen: dict[int, object] = {}
        while True:
            await asyncio.sleep(_CHANGES_SECONDS)
            with contextlib.suppress(KohakuRiverError):  # the database fails, as every request says that needs it
                seen = await self._look(seen)

    async def _look(self, before: dict[int, object]) -> dict[int, object]:
        """Tell of the tasks that are waited for and are not as they were before; how they are."""
        watched = self._changes.watched()
        found = await self._store.stamps(watched) if watched else {}
        stamps = {task_id: (changed_at, self._nodes.is_online(node)) for task_id, (changed_at, node) in found.items()}
        now: dict[int, object] = {task_id: stamps.get(task_id) for task_id in watched}
        self._changes.notify([task_id for task_id, how in now.items() if before.get(task_id, ...) != how])
        return now

    async def wait(self, task_id: int, timeout: float) -> TaskView:
        """The task once a forward to it would succeed; `timeout` is in seconds.

        Raises UnavailableError "task_not_running" (409), or "tunnel_not_connected" (504) when the time is up.
        """
        deadline = time.monotonic() + timeout
        with self._changes.watch(task_id) as changed:
            while True:
                changed.clear()
                task, node = await self._waited_for(task_id)
                view = self.view(task, node)
                if view.status == "running" and view.tunnel:
                    return await self.get(task, node)
                if view.status not in _ACTIVE:
                    raise not_running(task, view)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _too_slow(view, timeout)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), left)


@contextlib.asynccontextmanager
async def _claimed(accounts: Accounts, task: Task) -> AsyncIterator[None]:
    """Meanwhile the task counts as one that runs: two must not be started again where there is room for one."""
    await accounts.claim(task.task_id, _CLAIM_SECONDS)
    try:
        yield
    except KohakuRiverError as error:
        if error.code == "runner_timeout":
            raise  # it may yet have started
        await accounts.claim(task.task_id, 0)
        raise
    await accounts.claim(task.task_id, 0)


def _order(backend: str, name: str | None, more: dict[str, Any]) -> TaskOrder:
    """A new task with an id of its own; `more` are what else it has and may have fields that are not the node's."""
    task_id = new_task_id()
    identity = {"task_id": task_id, "container": container_name(backend, task_id), "backend": backend}
    return taken_from({**more, **identity, "name": name or f"vps-{task_id}"}, TaskOrder)


def _asked(order: TaskOrder) -> dict[str, Any]:
    """What the audit log has of an order: no variables, which may be secrets."""
    return {
        "backend": order.backend,
        "image": order.image,
        "command": shlex.join(order.command) if order.command else None,
        **{name: getattr(order, name) for name in (*OF_CONTAINERS, *OF_SCHEDULERS)},
        "mounts": [f"{mount}"[:LONGEST_TEXT] for mount in order.mounts] or None,
        "volumes": order.volumes or None,
        "restart": order.restart,
        "devices": order.devices or None,
        "labels": order.labels or None,
        "ssh_keys": [fingerprint(key) for key in order.ssh_keys] or None,
        **{name: getattr(order, name) for name in (*BOUNDS, *TIMES, "network")},
    }


_reports: TypeAdapter[TaskReport] = TypeAdapter(TaskReport)


def _valid(model: type[Answer], answer: dict[str, Any], node: Node) -> Answer:
    try:
        return model.model_validate(answer)
    except ValidationError as error:
        raise makes_no_sense(node) from error


def _report(answer: dict[str, Any], node: Node) -> TaskReport:
    try:
        return _reports.validate_python(answer)
    except ValidationError as error:
        raise makes_no_sense(node) from error


def _fit_for(request: CreateRequest) -> list[str]:
    """The backends that such a task can be made by. Raises UsageError where it asks for what can't go together."""
    if request.backend is None and request.image is None:
        raise UsageError("A task needs an image: name one with --image, or use --backend process.")
    backends = making_images() if request.backend is None else [request.backend]
    for kind in map(kind_of, backends):
        if kind.image and request.image is None:
            raise UsageError(f"A task of the {kind.name} backend needs an image; name one with --image.")
        if not kind.image and request.image is not None:
            raise UsageError(f"A task of the {kind.name} backend runs on the node itself and takes no --image.")
    if request.mounts and not any(kind_of(name).mounts for name in backends):
        raise UsageError("Only a task in a container takes --mount; a process sees the node's files as they are.")
    if request.volumes and not any(kind_of(name).mounts for name in backends):
        raise UsageError("Only a task in a container takes --volume; a process sees the node's files as they are.")
    if len(set(names := volume_names(request.volumes))) < len(names):
        raise UsageError("A task gets each of its volumes once; give --volume another name, or leave one out.")
    if request.network and not any(kind_of(name).network for name in backends):
        raise UsageError("Only a task in a container takes --network; a process has that of its node.")
    scheduled = all(kind_of(name).scheduled for name in backends)
    taken = _TAKEN_BY_SCHEDULERS if scheduled else ()
    bounds = [name for name in ("memory", "cpus", "pids", "shm_size") if _asks(request, name) and name not in taken]
    if bounds and not any(kind_of(name).bounded for name in backends):
        raise UsageError(f"Only a task in a container takes --{bounds[0].replace('_', '-')}; nothing bounds a process.")
    own = [name for name in OF_CONTAINERS if _asks(request, name) and name not in taken]
    own += [name for name in ("devices", "labels") if getattr(request, name)]
    if own and not any(kind_of(name).image for name in backends):
        raise UsageError(
            f"Only a task in a container takes --{_OPTIONS.get(own[0], own[0])}; name an image with --image."
        )
    _fit_for_scheduler(request, scheduled=scheduled)
    return backends


def _asks(request: CreateRequest, name: str) -> bool:
    return getattr(request, name) is not None


def _fit_for_scheduler(request: CreateRequest, *, scheduled: bool) -> None:
    """Raises UsageError for what only a scheduler takes, and for what none does."""
    asked = [name for name in OF_SCHEDULERS if _asks(request, name)]
    if asked and not scheduled:
        raise UsageError(
            f"Only a task of a scheduler takes --{_OPTIONS.get(asked[0], asked[0])}; give --backend slurm, or --ttl "
            "for a time to live."
        )
    if scheduled and request.gpus is not None and not request.gpus.isdigit():
        raise UsageError("Slurm chooses the GPUs of a job; say with --gpus how many it needs.")
    if scheduled and request.ssh_keys:
        raise UsageError(
            "A job in Slurm has no SSH server and takes no --ssh; `kohakuriver connect` opens terminals in it."
        )


_OPTIONS = {"run_as": "user", "time_limit": "time", "devices": "device", "labels": "label"}
"""What the command line calls a field that has another name here."""


def _offered(node: Node, backends: Sequence[str]) -> str:
    """The first of `backends` that a node offers which fits."""
    return next(name for name in backends if name in node.backends)


def _adopted_already(view: TaskView) -> UsageError:
    return UsageError(
        f"That container is task {view.name} already; for another name, end that task with "
        f"`kohakuriver vps rm {view.name}` and adopt the container again.",
        code="adopted",
        status=409,
    )


def _check_adopted(task: Task, action: str, container: bool) -> None:
    """Raises UsageError for what was there before its task, unless that itself is meant."""
    if kind_of(task.backend).scheduled and (action != "stop" or not container):
        raise UsageError(
            f"Task {task.name} is a job that was there before it, which only its scheduler starts; to cancel the job "
            f"use `kohakuriver vps stop --container {task.name}`, and to end its tunnel "
            f"alone use `kohakuriver vps rm {task.name}`.",
            code="adopted",
            status=409,
        )
    if not container:
        raise _somebody_elses(task, action)


def _somebody_elses(task: Task, action: str) -> UsageError:
    return UsageError(
        f"Task {task.name} is a container that was there before it; to {action} the container itself give --container, "
        f"and to end its tunnel alone use `kohakuriver vps rm {task.name}`.",
        code="adopted",
        status=409,
    )


def not_running(task: Task, view: TaskView) -> UnavailableError:
    """The error for a task that can't be reached because it does not run; says what became of it."""
    what = {"starting": "is still starting", "failed": "has failed"}.get(view.status, f"is {view.status}")
    why = f": {view.message}" if view.message else ""
    if view.status != task.status:  # its own is what its node said last
        return NodeOfflineError(f"Task {view.name} {what}{why}; it is back when its node is.", task.node)
    return UnavailableError(f"Task {view.name} {what}{why}{_way_back(task, view)}.", code="task_not_running")


def _way_back(task: Task, view: TaskView) -> str:
    """What its user can do, as a clause."""
    if view.status == "starting":
        return ""
    if known(task.backend).dials_in:
        return f"; `kohakuriver agent --name {view.name}` where it ran makes it run again"
    if not task.adopted:
        return f"; `kohakuriver vps restart {view.name}` starts it again"
    if view.status == "lost":  # its container is not there to be started
        return f"; `kohakuriver vps rm {view.name}` ends the task"
    return f"; `kohakuriver vps restart --container {view.name}` starts the container again"


def _too_slow(view: TaskView, timeout: float) -> UnavailableError:
    what = "did not start" if view.status == "starting" else "runs, but its tunnel did not connect"
    why = f": {view.message}" if view.message else ""
    return UnavailableError(
        f"Task {view.name} {what} within {timeout:g} s{why}.", code="tunnel_not_connected", status=504
    )
