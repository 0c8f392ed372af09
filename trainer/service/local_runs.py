"""Runs as processes of this machine, which go on while the service is away."""

from __future__ import annotations

from trainer.service.bounded_log import MAX_BYTES
from trainer.service.commands import fit_arguments, local_command
from trainer.service.executor import ExecutorAway, Observed, Phase
from trainer.service.local_process import Ending, LocalProcess
from trainer.service.run_record import FOLDER, RunRecord
from trainer.service.spec_rules import Folders


class LocalRuns:
    """At most `max_runs` at once; 0: any number. The ranks of one get `grace_s` to save their state.

    Of what a run says `log_bytes` are kept.
    """

    def __init__(self, folders: Folders, *, max_runs: int, grace_s: float, log_bytes: int = MAX_BYTES) -> None:
        self._log_bytes = log_bytes
        self.max_runs = max_runs
        self._grace_s = grace_s
        self._folders = folders
        self._processes: dict[str, tuple[str, LocalProcess]] = {}  # of each run the newest attempt's token, and it

    def launch(self, record: RunRecord) -> None:
        """See `Executor`."""
        arguments = fit_arguments(record.name, record.spec, self._folders)
        command = local_command(arguments, record.spec.num_ranks, grace_s=self._grace_s)
        try:
            self._process(record).launch(command)
        except OSError as error:
            raise ExecutorAway(f"no process can be started: {error.strerror}") from None

    def observe(self, record: RunRecord) -> Observed:
        """See `Executor`."""
        process = self._process(record)
        seen, itself = process.look(), process.process()
        place = f"process {itself.pid}" if itself else ""
        if seen == "absent":
            return Observed(phase=Phase.ABSENT)
        if not isinstance(seen, Ending):
            return Observed(phase=Phase.RUNNING, place=place)
        said = process.tail()
        return Observed(
            phase=Phase.OVER,
            place=place,
            succeeded=seen.code == 0,
            asked_to_end=seen.asked,
            error=f"{seen}\n{said}" if said else str(seen),
            exit_code=seen.code,
            ended_s=seen.time_s,
        )

    def stop(self, record: RunRecord) -> bool:
        """See `Executor`."""
        return self._process(record).terminate()

    def kill(self, record: RunRecord) -> None:
        """See `Executor`."""
        self._process(record).kill()

    def remove(self, record: RunRecord) -> None:
        """See `Executor`."""
        self._processes.pop(record.name, None)  # all else is in the run's folder

    def _process(self, record: RunRecord) -> LocalProcess:
        token, process = self._processes.get(record.name, ("", None))
        if process is None or token != record.token:
            process = LocalProcess(self._folders.run(record.name) / FOLDER, record.token, log_bytes=self._log_bytes)
            self._processes[record.name] = record.token, process
        return process
