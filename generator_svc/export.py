"""From published weights to a model repository that Triton serves; every version is written whole or not at all.

<repository>/unet_64/config.pbtxt        derived from `StageSpec` and the settings; the same for all versions
<repository>/unet_64/3/model.py          the adapter
<repository>/unet_64/3/manifest.json     sha256 of the weights, checked when they are loaded
<repository>/unet_64/3/unet_64.safetensors
<repository>/text_encoder/1/...          likewise; the encoder's files stand in `encoder/`
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import MANIFEST, CheckpointError, read_manifest
from common.files import replacing_folder, sha256_file, write_atomic, write_json
from common.service.config import ConfigError, setting
from common.stages import STAGES
from common.text import packaged_encoder
from generator_svc.compiled_unet import Compiler
from generator_svc.export_config import stage_config, text_encoder_config
from generator_svc.served_stage import Dtype, StageParameters, load_weights, parse_batches
from generator_svc.served_texts import ENCODER
from generator_svc.stage_tensors import TEXT_ENCODER

ADAPTERS = Path(__file__).parent / "model_repository"
MODEL, CONFIG = "model.py", "config.pbtxt"
ENCODER_FILES = (".json", ".safetensors", ".txt", ".model")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What the export is told, by flags or by REIMAGEN_EXPORT_ variables."""

    weights: Path = setting(help="folder of the stages' weights, with their manifest.json")  # noqa: RUF009 (a field)
    repository: Path = setting(help="folder that Triton serves; made where there is none")  # noqa: RUF009
    text_encoder: Path | None = setting(default=None, help="folder of the text encoder; empty: the packaged one")  # noqa: RUF009
    device: str = setting(default="cpu", help="where the networks run: cpu, cuda or cuda:N")
    dtype: Dtype | None = setting(default=None, help="of the U-Nets; empty: float32 on a CPU, bfloat16 on a GPU")  # noqa: RUF009
    compiler: Compiler = setting(default="none", help="of the U-Nets: none, inductor or graphs (GPU)")  # noqa: RUF009
    threads: int = setting(default=0, help="CPU threads of one network pass; 0: one for each core")
    max_batch: int = setting(default=8, help="trajectories that share one network pass")
    batches: str = setting(default="1,2,4,8", help="batch sizes that are run before a stage is ready")
    max_requests: int = setting(default=32, help="live requests of a stage; more wait")
    max_live_bytes: int = setting(
        default=1 << 30, help="bytes that live requests may keep in a stage; past it: refused"
    )
    idle_s: float = setting(default=60.0, help="seconds without a turn after which a request's state is let go")

    def parameters(self, size: int) -> StageParameters:
        """How the stage of this size is served.

        Raises:
            ConfigError: a setting has a value that cannot be.
        """
        try:
            return StageParameters(
                size=size,
                dtype=self.dtype or ("float32" if self.device == "cpu" else "bfloat16"),
                max_batch=self.max_batch,
                batches=parse_batches(self.batches),
                max_live_bytes=self.max_live_bytes,
                idle_s=self.idle_s,
                threads=self.threads,
                compiler=self.compiler,
            )
        except ValueError as error:
            name, _, why = str(error).partition(":")
            raise ConfigError(f"--{name.replace('_', '-')}:{why}") from None

    def check(self) -> None:
        """Raises ConfigError for a value that cannot be, by the setting's name."""
        name, _, index = self.device.partition(":")
        if name not in ("cpu", "cuda") or (index and not (name == "cuda" and index.isdigit())):
            raise ConfigError(f"--device: {self.device!r} is not cpu, cuda or cuda:N")
        if self.max_requests < 1:
            raise ConfigError(f"--max-requests: {self.max_requests} is not positive")
        if self.compiler == "graphs" and self.device == "cpu":
            raise ConfigError("--compiler: graphs are CUDA's; --device is cpu")
        self.parameters(STAGES[0].size)


def export(settings: ExportSettings) -> dict[str, int]:
    """Publish all stages and the text encoder; gives each model's version.

    A model whose newest version holds the same files already gets no new one.

    Raises:
        CheckpointError: weights are missing, altered, or not their stage's; nothing of that model is written.
        ConfigError: a setting has a value that cannot be.
        OSError: the repository cannot be written.
    """
    settings.check()
    versions: dict[str, int] = {}
    for spec in STAGES:
        load_weights(settings.weights, spec)
        parameters = settings.parameters(spec.size)
        config = stage_config(spec, parameters, device=settings.device, max_requests=settings.max_requests)
        file = settings.weights / f"{spec.name}.safetensors"
        versions[spec.name] = publish(settings.repository / spec.name, {file.name: file}, config, ADAPTERS / "unet")
    encoder = settings.text_encoder or Path(packaged_encoder())
    config = text_encoder_config(device=settings.device, threads=settings.threads)
    files = {f"{ENCODER}/{p.name}": p for p in sorted(encoder.iterdir()) if p.suffix in ENCODER_FILES}
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"text encoder: {encoder} holds no safetensors")
    versions[TEXT_ENCODER] = publish(settings.repository / TEXT_ENCODER, files, config, ADAPTERS / TEXT_ENCODER)
    return versions


def publish(model: Path, files: Mapping[str, Path], config: str, adapter: Path) -> int:
    """Write a model's next version, then its configuration; gives the version.

    Args:
        model: its folder in the repository.
        files: what the version holds, by name inside it.
        adapter: folder of its model.py.

    Raises:
        OSError: it cannot be written; the version is then not there.
    """
    manifest = {name: {"sha256": sha256_file(p), "bytes": p.stat().st_size} for name, p in sorted(files.items())}
    newest = max((int(p.name) for p in model.glob("*") if p.name.isdigit()), default=0)
    if not newest or not _holds(model / str(newest), manifest, adapter):
        newest += 1
        with replacing_folder(model / str(newest)) as folder:
            for name, path in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
            shutil.copyfile(adapter / MODEL, folder / MODEL)
            write_json(folder / MANIFEST, manifest)
            _check_copies(folder, manifest)
    write_atomic(model / CONFIG, config)
    return newest


def _holds(version: Path, manifest: Mapping[str, object], adapter: Path) -> bool:
    try:
        same = read_manifest(version) == manifest and (version / MODEL).read_bytes() == (adapter / MODEL).read_bytes()
    except (CheckpointError, OSError):
        return False
    return same and all((version / name).is_file() for name in manifest)


def _check_copies(folder: Path, manifest: Mapping[str, Mapping[str, object]]) -> None:
    for name, line in manifest.items():
        if sha256_file(folder / name) != line["sha256"]:
            raise CheckpointError(f"weights: {name} changed while it was published")
