"""A real tritonserver as a child process: everything on 127.0.0.1, nothing of it left behind.

It comes from the wheel that `make triton` installs into build/triton. Models run in the Python of this environment: the
Python backend's stub ignores PYTHONPATH and takes the environment of the first `python3` on PATH.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.service.config import ConfigError
from common.service.server import die_with_parent
from deploy.local.children import ROOT, ChildFailed
from generator_svc.channel_tls import ChannelTls, fault_of
from generator_svc.triton_client import ADMIN_HEADER

INSTALLED = ROOT / "build" / "triton"
RESTRICTED = ("shared-memory", "model-repository", "model-config", "statistics", "trace", "logging")
SHM = Path("/dev/shm")
SHM_BYTES = 16 << 20  # of each model; grows by as much, and a 1024 picture takes 12 MiB on its way out
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
REFUSED_S = 2.0  # for which TLS fails with the same fault until that is believed: one that ends hangs up, too
NICE = 10  # how much the stack's Triton yields to its other services, which answer while networks run
STARTS = 2  # the Python backend aborts now and then while its stubs meet in shared memory (boost's lock_exception)
_NO_ERRORS = (  # that Triton logs as errors
    "HandleCancellation called",  # of a call that its caller has left
    "CudaDriverHelper has not been initialized",  # of a machine without a GPU
)
_SOON = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))
_LOCALHOST = (("grpc.default_authority", "localhost"),)  # which its certificate bears


@dataclass(frozen=True, kw_only=True)
class TritonTls:
    """TLS of a tritonserver's gRPC: a folder with `tls.crt`, `tls.key` and `ca.crt`, as Secrets of Kubernetes have them.

    Attributes:
        folder: read at the start alone; the certificate bears `localhost`, and serves as that of a caller, too.
        is_mutual: whether callers have to show a certificate of `ca.crt`, too.
    """

    folder: Path
    is_mutual: bool = True

    def arguments(self) -> list[str]:
        """What the server is told."""
        files = {"server-cert": "tls.crt", "server-key": "tls.key"} | (
            {"root-cert": "ca.crt"} if self.is_mutual else {}
        )
        said = ["--grpc-use-ssl=true", *(["--grpc-use-ssl-mutual=true"] if self.is_mutual else [])]
        return [*said, *(f"--grpc-{flag}={self.folder.absolute() / name}" for flag, name in files.items())]

    def credentials(self) -> grpc.ChannelCredentials:
        """What whoever started it asks it with: its own certificate. Raises ConfigError for files that cannot be used."""
        files = {name: self.folder / f"tls.{end}" for name, end in (("certificate", "crt"), ("key", "key"))}
        try:
            return ChannelTls("tls", ca=self.folder / "ca.crt", **files).credentials()
        except ConfigError as error:  # there is one flag for the three
            raise ConfigError(f"--tls: {str(error).partition(': ')[2]}") from None


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """How a tritonserver is started.

    Attributes:
        repository: folder of its models.
        log: file that gets what it and its models say.
        models: what is loaded at the start in explicit mode; in mode none it is everything, always.
        control: `none`: the models of the start, for ever; `explicit`: who has the admin key loads and unloads.
        exit_on_error: whether a model that cannot be loaded ends the start; without it the rest is served.
        admin_key: what `ADMIN_HEADER` must say for all but inference, metadata and health; drawn where it is empty.
        drain_s: seconds that live requests get once it is asked to end.
        grpc_port, metrics_port: 0: any free one.
        tls: None: gRPC is in the clear. Metrics always are.
        nice: how much it and its models yield to the other processes of the machine (`os.nice`, and `SCHED_BATCH`, which wakes
            after them): services that share the cores with its networks answer sooner, and under overload their refusals
            take time from the networks.
    """

    repository: Path
    log: Path
    models: tuple[str, ...] = ("*",)
    control: Literal["none", "explicit"] = "explicit"
    exit_on_error: bool = True
    admin_key: str = ""
    drain_s: int = 5
    grpc_port: int = 0
    metrics_port: int = 0
    tls: TritonTls | None = None
    nice: int = 0


class TritonServer:
    """A running tritonserver. The kernel ends it with us: our main thread must be what starts it."""

    def __init__(self, settings: TritonSettings, *, installed: Path = INSTALLED) -> None:
        """Start it.

        Raises:
            ChildFailed: it is not installed.
            ConfigError: a file of its TLS cannot be used.
        """
        home = installed / "pytriton" / "tritonserver"
        if not (home / "backends" / "python" / "triton_python_backend_stub").is_file():
            raise ChildFailed(f"tritonserver: {home} is not there or has no stub; run `make triton`")
        self.log = settings.log
        self._drain_s = settings.drain_s
        self._tls = settings.tls
        self._credentials = settings.tls.credentials() if settings.tls else None
        self._interpreters: dict[int, str] = {}  # models by process id, of all that were ever seen
        self._shm_prefix = f"reimagen-{settings.grpc_port or 'any'}-{secrets.token_hex(6)}"
        if settings.grpc_port:  # nobody else has the port: what a killed server left that had it is nobody's
            _remove_regions(f"reimagen-{settings.grpc_port}-")
        self.admin_key = settings.admin_key or secrets.token_urlsafe(16)
        self.address = f"127.0.0.1:{settings.grpc_port or _free_port()}"
        self.metrics_address = f"127.0.0.1:{settings.metrics_port or _free_port()}"
        with settings.log.open("wb") as stream:
            self._process = subprocess.Popen(
                [str(home / "bin" / "tritonserver"), *self._arguments(settings, home)],
                env=_environment(installed),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(_begin, os.getpid(), settings.nice),
            )

    @property
    def pid(self) -> int:
        """Of the server; its stubs are its children."""
        return self._process.pid

    def regions(self) -> set[Path]:
        """Its models' shared memory that lies in `SHM` now."""
        return set(SHM.glob(f"{self._shm_prefix}*"))

    def _arguments(self, settings: TritonSettings, home: Path) -> list[str]:
        key, header = self.admin_key, ADMIN_HEADER.removeprefix("triton-grpc-protocol-")
        flags = {
            "model-repository": settings.repository.absolute(),
            "backend-directory": home / "backends",
            "backend-config": f"python,shm-region-prefix-name={self._shm_prefix}",
            "model-control-mode": settings.control,
            "strict-readiness": "true",
            "exit-on-error": str(settings.exit_on_error).lower(),
            "exit-timeout-secs": settings.drain_s,
            "allow-http": "false",
            "grpc-address": "127.0.0.1",
            "grpc-port": self.address.rpartition(":")[2],
            "grpc-restricted-protocol": f"{','.join(RESTRICTED)}:{header}={key}",
            "metrics-address": "127.0.0.1",
            "metrics-port": self.metrics_address.rpartition(":")[2],
            "log-format": "ISO8601",
        }
        said = ["--disable-auto-complete-config", *(f"--{name}={value}" for name, value in flags.items())]
        said += [
            f"--backend-config=python,{name}={SHM_BYTES}" for name in ("shm-default-byte-size", "shm-growth-byte-size")
        ]
        said += settings.tls.arguments() if settings.tls else []
        if settings.control == "explicit":
            said += [f"--load-model={model}" for model in settings.models]
        return said

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until it and all its models are ready.

        Raises:
            ChildFailed: it ended, or is not ready in time; the message holds the error in its log. Or its certificate does not
                let it be asked.
        """
        give_up, refused_at = time.monotonic() + timeout_s, 0.0
        with self._channel() as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                self._note_interpreters()
                if self._process.poll() is not None:
                    raise ChildFailed(f"tritonserver: ended with status {self._process.returncode}; {self.explain()}")
                fault = ""
                try:
                    if _is_serving(health):
                        return
                except grpc.RpcError as error:
                    fault = fault_of((error.details() or "") if isinstance(error, grpc.Call) else "")
                now = time.monotonic()
                refused_at = (refused_at or now) if fault else 0.0
                if self._tls and fault and now > refused_at + REFUSED_S:
                    raise ChildFailed(f"tritonserver: asked as localhost with the files in {self._tls.folder}: {fault}")
                if now > give_up:
                    raise ChildFailed(f"tritonserver: not ready in {timeout_s:g} s; {self.explain()}")
                time.sleep(POLL_S)

    def _channel(self) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(self.address, options=_SOON)
        return grpc.secure_channel(self.address, self._credentials, options=(*_SOON, *_LOCALHOST))

    def explain(self) -> str:
        """The last error of its log."""
        error = last_error(self.log.read_text(errors="replace"))
        return f"its log says {error[:500]!r}" if error else "its log names no error"

    @property
    def has_aborted(self) -> bool:
        """Whether it has ended by its own assertion."""
        return self._process.poll() == -signal.SIGABRT

    def stubs(self) -> list[int]:
        """Process ids of its models' interpreters."""
        pids: set[int] = set()
        for children in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with suppress(OSError):
                pids.update(int(pid) for pid in children.read_text().split())
        return sorted(pids)

    def watch(self, poll_s: float = 0.5) -> str:
        """Wait until it ends, or a model's interpreter does, which it would not say itself; gives what has happened."""
        while self._process.poll() is None:
            self._note_interpreters()
            alive = {model for pid, model in self._interpreters.items() if _model_of(pid) == model}
            if gone := sorted(set(self._interpreters.values()) - alive):
                self._process.kill()  # asked to end, it would wait for the one that is gone, for half a minute
                return f"the interpreter of {', '.join(gone)} has ended"
            time.sleep(poll_s)
        return f"ended with status {self._process.returncode}; {self.explain()}"

    def _note_interpreters(self) -> None:
        # From the start on: one that is gone by the time that the server is ready would not be missed otherwise.
        self._interpreters |= {pid: model for pid in self.stubs() if (model := _model_of(pid))}

    def terminate(self) -> None:
        """Ask it to end: live requests get `drain_s`."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End it, by force where asking takes too long, with its stubs and what they left in shared memory."""
        stubs = {*self.stubs(), *self._interpreters}  # those of a server that was killed are its children no more
        self.terminate()
        try:
            self._process.wait(self._drain_s + STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in stubs:
            if _model_of(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _remove_regions(self._shm_prefix)


@contextmanager
def running_triton(settings: TritonSettings) -> Iterator[TritonServer]:
    """A tritonserver that is ready, for as long as the block lasts.

    Raises:
        ChildFailed: it is not installed, cannot start, or a model cannot be loaded.
    """
    server = _ready(settings)
    try:
        yield server
    finally:
        server.stop()


def _ready(settings: TritonSettings) -> TritonServer:
    for more in reversed(range(STARTS)):
        server = TritonServer(settings)
        try:
            server.wait_ready()
            return server
        except BaseException as error:
            server.stop()
            if not (more and isinstance(error, ChildFailed) and server.has_aborted):
                raise
    raise AssertionError("the last one is ready or raises")


def _begin(parent_pid: int, nice: int) -> None:
    die_with_parent(parent_pid)
    os.nice(nice)
    if nice:
        with suppress(OSError):  # a kernel without it: it yields by its priority alone
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def last_error(log: str) -> str:
    """The last error in what a tritonserver has logged; empty where there is none."""
    wrong = [line for line in log.splitlines() if " E " in line[:40] or "unrecognized option" in line]
    return next((line.strip() for line in reversed(wrong) if not any(each in line for each in _NO_ERRORS)), "")


def _remove_regions(prefix: str) -> None:
    for region in SHM.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def _is_serving(health: health_pb2_grpc.HealthStub) -> bool:
    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def _environment(installed: Path) -> dict[str, str]:
    library = sysconfig.get_config_var("LIBDIR") or ""
    libraries = [str(installed / "nvidia_pytriton.libs"), library, os.environ.get("LD_LIBRARY_PATH", "")]
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    # Four models share the cores. OpenMP's threads spin while they wait for one another by default, which takes the core
    # from the thread that is waited for: passes on two threads became ten and more times slower beside other work.
    # Each of the server's 160 threads would take an arena of its own for its pictures and give nothing of it back: 400 MiB
    # where 100 do. (A fixed MALLOC_MMAP_THRESHOLD_ would keep it smaller still, and double the time of a model's pass.)
    return (
        {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
        | os.environ
        | {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "PATH": os.pathsep.join(path),
            "TQDM_DISABLE": "1",
        }
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _model_of(pid: int) -> str:
    """The model whose interpreter a process is; empty for any other: a number may be another's by now."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    # Its first argument is .../MODEL/VERSION/model.py.
    is_stub = len(words) > 1 and words[0].endswith(b"triton_python_backend_stub")
    return Path(os.fsdecode(words[1])).parts[-3] if is_stub else ""
