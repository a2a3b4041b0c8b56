"""Slurm's own programs, and nothing else of it: what they are asked for, and what they say."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence

from kohakuriver.errors import KohakuRiverError, NotFoundError, UnavailableError, UsageError
from kohakuriver.runner.backends.slurm.jobs import FIELDS, Job, parsed
from kohakuriver.runner.backends.slurm.programs import Leash, as_whom, end, start
from kohakuriver.runner.backends.slurm.users import ClusterUser
from kohakuriver.runtime import cancel_all
from kohakuriver.web.background import in_background

__all__ = ["PROGRAMS", "Slurm"]

PROGRAMS = ("sbatch", "squeue", "scancel", "srun", "scontrol")

SECONDS = 30.0
"""How long one of them may take: a controller that is busy lets callers wait."""

LATE_SECONDS = 300.0
"""How long a submission may take that nobody waits for any more: the controller may have the job already."""

CLOSE_SECONDS = 5.0
"""How long such ones are waited for when the runner ends."""

_SOME = 5
"""How many elements of an array are named."""

_MARK = re.compile(r"^(?:\w+: (?:error: )?)?(?:\w+ error: )?(?:Batch job submission failed: )?")
_STDOUT = re.compile(r" StdOut=(.*?) (?:Power|[A-Z]\w+)=")
_UNKNOWN_JOB = "Invalid job id"


class Slurm:
    """Runs Slurm's programs. Every method may raise UnavailableError "no_slurm" where Slurm does not answer."""

    def __init__(self) -> None:
        self._late: set[asyncio.Task[None]] = set()

    @property
    def missing(self) -> str | None:
        """A program that is not there."""
        return next((name for name in PROGRAMS if shutil.which(name) is None), None)

    async def submit(self, who: ClusterUser, options: Sequence[str], script: str) -> str:
        """Have a script run as a job of that user; the job's id. Raises KohakuRiverError where Slurm takes it not.

        Where that takes too long, or is cancelled, it goes on by itself, and the job that comes of it is cancelled.
        """
        words = ["sbatch", "--parsable", "--propagate=NONE", *options]
        submitting = asyncio.ensure_future(self._run(words, script, who, LATE_SECONDS))
        try:
            code, out, err = await asyncio.wait_for(asyncio.shield(submitting), SECONDS)
        except (asyncio.TimeoutError, asyncio.CancelledError) as error:
            late = in_background(self._withdraw(who, submitting), "cancelling a job that was submitted too late")
            self._late.add(late)
            late.add_done_callback(self._late.discard)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise _no_answer(SECONDS) from None
        if code != 0:
            raise KohakuRiverError(f"Slurm does not take the job: {_why(err)}.", code="slurm_refused", status=409)
        return _job_id(out)

    async def _withdraw(self, who: ClusterUser, submitting: asyncio.Future[tuple[int, str, str]]) -> None:
        code, out, _ = await submitting
        if code == 0:
            await self.cancel(who, _job_id(out), LATE_SECONDS)

    async def close(self) -> None:
        """Wait for submissions that nobody waits for, but not for long."""
        if self._late:
            await asyncio.wait(self._late, timeout=CLOSE_SECONDS)
            await cancel_all(list(self._late))

    async def jobs(self, ids: Iterable[str]) -> dict[str, Job]:
        """The jobs of these ids that Slurm knows, by id, in one question."""
        asked = ",".join(ids)
        form = ",".join(f"{name}:|" for name in FIELDS)
        words = ["squeue", "--noheader", "--states=all", f"--jobs={asked}", f"--Format={form}"]
        code, out, err = await self._run(["env", "SLURM_TIME_FORMAT=%s", *words])
        if code != 0 and _UNKNOWN_JOB not in err:
            raise UnavailableError(f"Slurm does not say how its jobs are: {_why(err)}.", code="no_slurm")
        found = (parsed(line) for line in out.splitlines())
        return {job.id: job for job in found if job is not None}

    async def job(self, job_id: str) -> Job:
        """One job, of an array one element. Raises NotFoundError where Slurm does not know it, UsageError for all of an
        array.
        """
        found = await self.jobs([job_id])
        if not found:
            raise NotFoundError(f"Slurm knows no job {job_id}; `squeue --me` shows yours.")
        elements = [each.id for each in found.values() if each.element and each.runs]
        if len(found) > 1 and elements:
            some = ", ".join(elements[:_SOME]) + (", …" if len(elements) > _SOME else "")
            raise UsageError(f"Job {job_id} is an array; name one of its elements that run: {some}.")
        return next(iter(found.values()))

    async def prints_into(self, job_id: str) -> str:
        """The file that a job prints into; empty where Slurm does not say."""
        _, out, _ = await self._run(["scontrol", "--oneliner", "show", "job", job_id])
        found = _STDOUT.search(f"{out.strip()} X=")
        return found[1] if found else ""

    async def cancel(self, who: ClusterUser, job_id: str, seconds: float = SECONDS) -> None:
        """End a job, or with `JOB.STEP` one step of it; nothing where it has ended."""
        code, _, err = await self._run(["scancel", job_id], who=who, seconds=seconds)
        if code != 0 and _UNKNOWN_JOB not in err and "already" not in err:
            raise UnavailableError(f"Slurm does not end job {job_id}: {_why(err)}.", code="no_slurm")

    async def step(self, job_id: str, name: str) -> str | None:
        """The step of that name in a job, as `JOB.STEP`; None where there is none."""
        words = ["squeue", "--noheader", "--steps", f"--jobs={job_id}", "--Format=StepID:|,StepName:|"]
        _, out, _ = await self._run(words)
        steps = (line.split("|", 1) for line in out.splitlines() if "|" in line)
        return next((step for step, its in steps if its.rstrip("|") == name), None)

    def beside(self, who: ClusterUser, job: Job, name: str, script: str, output: int) -> subprocess.Popen[bytes]:
        """Start a script beside what runs in a job, as the step `name`; srun(1), which ends with it.

        It prints into the descriptor `output`. It outlives the runner, and so is none of the event loop's processes,
        which that kills when it lets go of them. Raises OSError.
        """
        words = ["srun", f"--jobid={job.number}", "--overlap", "--nodes=1", "--ntasks=1", f"--job-name={name}"]
        words += ["--propagate=NONE", "--quiet", "--mpi=none", "--chdir=/"]
        words += [*([f"--nodelist={job.host}"] if job.host else []), "sh", "-s"]
        with _file_with(script) as text:
            return subprocess.Popen(
                **as_whom(words, who), stdin=text, stdout=output, stderr=output, start_new_session=True
            )

    async def _run(
        self, words: Sequence[str], text: str = "", who: ClusterUser | None = None, seconds: float = SECONDS
    ) -> tuple[int, str, str]:
        """Exit code, output and errors of a program that gets `text`. Raises UnavailableError."""
        leash = None
        try:
            leash = Leash(who)
            with _file_with(text) as given:
                process = await start(words, who, given, leash)
        except OSError as error:
            if leash is not None:
                leash.let_go()
            raise UnavailableError(f"The node can't run {words[0]}: {error.strerror}.", code="no_slurm") from None
        try:
            out, err = await asyncio.wait_for(process.communicate(), seconds)
        except asyncio.TimeoutError:
            raise _no_answer(seconds) from None
        finally:
            await end(process, leash)
        return process.returncode or 0, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


@contextlib.contextmanager
def _file_with(text: str) -> Iterator[int]:
    """A descriptor to read a text from, of a file that has no name: the text may hold a token."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file.fileno()


def _job_id(out: str) -> str:
    """What sbatch(1) prints with --parsable: the job, and a cluster where there are several."""
    return out.strip().partition(";")[0]


def _no_answer(seconds: float) -> UnavailableError:
    return UnavailableError(f"Slurm's controller does not answer within {seconds:g} s.", code="no_slurm")


def _why(err: str) -> str:
    """What a program complains of, as a clause."""
    lines = [_MARK.sub("", line.strip()) for line in err.splitlines() if line.strip()]
    return (lines[-1] if lines else "it says nothing of why").rstrip(".")
