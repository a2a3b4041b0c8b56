"""What Slurm says of a job, and what that is for a task."""

from __future__ import annotations

from dataclasses import dataclass

from kohakuriver.task import describe_exit

__all__ = ["FIELDS", "Job", "parsed"]

FIELDS = (
    *("JobID", "ArrayJobID", "ArrayTaskID", "State", "UserID", "exit_code", "EndTime", "TimeLimit"),
    *("BatchHost", "NodeList", "Reason"),
)
"""What squeue(1) is asked for: names of `--Format`. None but the last can have a | in it."""

_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
_WORDS = {
    "TIMEOUT": "it was ended by Slurm at its time limit",
    "OUT_OF_MEMORY": "it was ended by Slurm, since it needed more memory than it had asked for",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "it was ended by Slurm for a more important job",
    "DEADLINE": "it was ended by Slurm at its deadline",
    "BOOT_FAIL": "its node did not start",
}
_DAY = 86_400


@dataclass(frozen=True)
class Job:
    """A job as Slurm has it: `end` in seconds since the epoch, None while nobody knows; `code` as a shell has it.

    `id` names it: of an array's element that is `ARRAY_INDEX`, for the whole array's `number` is that of one of them.
    `limit` is its time limit in seconds, None without one; `uid` whose it is, `host` where its script runs.
    """

    id: str
    state: str
    uid: int = -1
    code: int = 0
    end: float | None = None
    limit: float | None = None
    host: str = ""
    nodes: str = ""
    reason: str = ""
    number: str = ""

    @property
    def element(self) -> bool:
        """Whether it is one of an array, and no longer one of those that wait in it together."""
        return self.id != self.number

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        """Whether it has begun, and has not ended."""
        return self.state in _RUNNING

    def told(self) -> tuple[str, str, int | None]:
        """Status, message and exit code of its task."""
        if self.waits:
            return "starting", f"{self._state()}, Slurm job {self.id}", None
        if self.runs:
            state = "" if self.state in ("RUNNING", "COMPLETING") else f", {self._state()}"
            return "running", f"Slurm job {self.id} on {self.nodes or 'its node'}{state}", None
        return self._ended()

    def _ended(self) -> tuple[str, str, int]:
        about = f" (Slurm job {self.id}{f' on {self.nodes}' if self.nodes else ''})"
        if self.state in ("COMPLETED", "FAILED"):
            status, message = describe_exit(self.code)
            status = "failed" if self.state == "FAILED" else status
            return status, message + about, self.code
        if self.state == "CANCELLED":
            return "stopped", f"it was cancelled in Slurm{about}", self.code
        words = _WORDS.get(self.state, f"Slurm ended it as {self._state()}")
        return "failed", words + about, self.code

    def _state(self) -> str:
        told = self.reason if self.reason not in ("", "None") else ""
        return f"{self.state} ({told})" if told else self.state


def parsed(line: str) -> Job | None:
    """The job that a line of squeue(1) with FIELDS tells of; None where it tells of none."""
    words = line.split("|", len(FIELDS) - 1)
    if len(words) != len(FIELDS) or not words[0]:
        return None
    known = dict(zip(FIELDS, words, strict=True))
    index = known["ArrayTaskID"]  # of those that wait together `1-8%2`, of what is no array `N/A`
    return Job(
        f"{known['ArrayJobID']}_{index}" if index.isdigit() else known["JobID"],
        known["State"],
        uid=int(known["UserID"]) if known["UserID"].isdigit() else -1,
        code=_code(known["exit_code"]),
        end=float(known["EndTime"]) if known["EndTime"].isdigit() else None,
        limit=_seconds(known["TimeLimit"]),
        host=known["BatchHost"],
        nodes=known["NodeList"],
        reason=known["Reason"].strip().rstrip("|"),
        number=known["JobID"],
    )


def _code(word: str) -> int:
    """A status as wait(2) has it, as a shell tells it."""
    status = int(word) if word.isdigit() else 0
    return 128 + (status & 0x7F) if status & 0x7F else status >> 8


def _seconds(text: str) -> float | None:
    """What Slurm writes as [days-][hours:]minutes:seconds; None for UNLIMITED and the like."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or not (days or "0").isdigit():
        return None
    total = 0
    for part in parts:
        total = total * 60 + int(part)
    return float(total + int(days or 0) * _DAY)
