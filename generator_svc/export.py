"""From published weights to a model repository that Triton serves; every version is written whole or not at all.

<repository>/unet_64/config.pbtxt        derived from `StageSpec` and the settings; names the version that is served
<repository>/unet_64/3/config.pbtxt      the same as it was published with version 3
<repository>/unet_64/3/model.py          the adapter
<repository>/unet_64/3/manifest.json     sha256 of weights and card, checked when they are loaded
<repository>/unet_64/3/card.json         what the weights are: stage, preset, data, evaluation
<repository>/unet_64/3/unet_64.safetensors
<repository>/text_encoder/1/...          likewise; the encoder's files stand in `encoder/`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.checkpoint import MANIFEST, CheckpointError, StageWeights, read_manifest
from common.files import replacing_folder, sha256_file, write_atomic, write_json
from common.service.config import ConfigError, setting
from common.stages import STAGES, StageSpec
from common.text import packaged_encoder
from generator_svc.compiled_unet import Compiler
from generator_svc.export_config import stage_config, text_encoder_config
from generator_svc.model_versions import CARD, CONFIG, numbers, served_version, version_policy
from generator_svc.served_stage import Dtype, StageParameters, load_weights, parse_batches
from generator_svc.served_texts import ENCODER
from generator_svc.stage_tensors import TEXT_ENCODER

ADAPTERS = Path(__file__).parent / "model_repository"
MODELS = (*(spec.name for spec in STAGES), TEXT_ENCODER)
MODEL = "model.py"
ENCODER_FILES = (".json", ".safetensors", ".txt", ".model")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What the export is told, by flags or by REIMAGEN_EXPORT_ variables."""

    weights: Path = setting(help="folder of the stages' weights, with their manifest.json")  # noqa: RUF009 (a field)
    repository: Path = setting(help="folder that Triton serves; made where there is none")  # noqa: RUF009
    models: str = setting(default=",".join(MODELS), help="which are published")
    text_encoder: Path | None = setting(default=None, help="folder of the text encoder; empty: the packaged one")  # noqa: RUF009
    evaluation: Path | None = setting(  # noqa: RUF009
        default=None, help="JSON file of figures measured on these weights, kept in the versions' cards; empty: none"
    )
    keep: int = setting(default=4, help="versions of a model that are kept, beside the served one")
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

    def chosen(self) -> set[str]:
        """The models that are published. Raises ConfigError for one that is none."""
        chosen = {name.strip() for name in self.models.split(",") if name.strip()}
        if not chosen or chosen - set(MODELS):
            raise ConfigError(f"--models: {self.models!r} names others than {', '.join(MODELS)}, or none")
        return chosen

    def figures(self) -> Mapping[str, Any]:
        """What `evaluation` holds. Raises ConfigError where it cannot be read."""
        if self.evaluation is None:
            return {}
        try:
            figures = json.loads(self.evaluation.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"--evaluation: {self.evaluation} cannot be read ({error})") from None
        if not isinstance(figures, dict):
            raise ConfigError(f"--evaluation: {self.evaluation} holds no figures by name")
        return figures

    def check(self) -> None:
        """Raises ConfigError for a value that cannot be, by the setting's name."""
        self.chosen()
        self.figures()
        name, _, index = self.device.partition(":")
        if name not in ("cpu", "cuda") or (index and not (name == "cuda" and index.isdigit())):
            raise ConfigError(f"--device: {self.device!r} is not cpu, cuda or cuda:N")
        for name in ("max_requests", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not positive")
        if self.compiler == "graphs" and self.device == "cpu":
            raise ConfigError("--compiler: graphs are CUDA's; --device is cpu")
        self.parameters(STAGES[0].size)


def export(settings: ExportSettings) -> dict[str, int]:
    """Publish stages and text encoder; gives each model's version, which is the one to be served.

    A model whose newest version holds the same files, served in the same way, gets no new one. Old versions are left for
    `prune`, once the new ones serve.

    Raises:
        CheckpointError: weights are missing, altered, or not their stage's; nothing of that model is written.
        ConfigError: a setting has a value that cannot be.
        OSError: the repository cannot be written.
    """
    settings.check()
    evaluation = settings.figures()
    chosen = settings.chosen()
    stages = [spec for spec in STAGES if spec.name in chosen]
    there = [spec.name for spec in stages if (settings.weights / f"{spec.name}.safetensors").is_file()]
    if there and len(there) < len(stages):  # before the first of them is released
        missing = ",".join(spec.name for spec in stages if spec.name not in there)
        raise ConfigError(
            f"--models: {settings.weights} holds no {missing}; --models {','.join(there)} is what it holds"
        )
    versions: dict[str, int] = {spec.name: _export_stage(settings, spec, evaluation) for spec in stages}
    if TEXT_ENCODER in chosen:
        versions[TEXT_ENCODER] = _export_text_encoder(settings)
    return versions


def _export_stage(settings: ExportSettings, spec: StageSpec, evaluation: Mapping[str, Any]) -> int:
    weights = load_weights(settings.weights, spec)
    config = stage_config(
        spec,
        settings.parameters(spec.size),
        device=settings.device,
        max_requests=settings.max_requests,
        reads_neighbors=weights.unet.config.uses_neighbors,
    )
    file = settings.weights / f"{spec.name}.safetensors"
    return publish(
        settings.repository / spec.name,
        {file.name: file},
        config,
        ADAPTERS / "unet",
        card=card_of(spec, weights, evaluation),
    )


def _export_text_encoder(settings: ExportSettings) -> int:
    encoder = settings.text_encoder or Path(packaged_encoder())
    config = text_encoder_config(device=settings.device, threads=settings.threads)
    files = {f"{ENCODER}/{p.name}": p for p in sorted(encoder.iterdir()) if p.suffix in ENCODER_FILES}
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"text encoder: {encoder} holds no safetensors")
    return publish(settings.repository / TEXT_ENCODER, files, config, ADAPTERS / TEXT_ENCODER)


def card_of(spec: StageSpec, weights: StageWeights, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's version is: its stage, its training (preset, steps, fingerprint of the data, held-out loss), figures."""
    return {
        "stage": asdict(spec),
        "weights_sha256": weights.sha256,
        "parameters": sum(parameter.numel() for parameter in weights.unet.parameters()),
        "trained": dict(weights.trained),
        "evaluation": dict(evaluation),
    }


def publish(
    model: Path, files: Mapping[str, Path], config: str, adapter: Path, *, card: Mapping[str, Any] | None = None
) -> int:
    """Write a model's next version, then the configuration by which it is served; gives the version.

    Args:
        model: its folder in the repository.
        files: what the version holds, by name inside it.
        config: its configuration, all but the version.
        adapter: folder of its model.py.
        card: what it is, for people and programs.

    Raises:
        OSError: it cannot be written; the version is then not there.
    """
    manifest = {name: {"sha256": sha256_file(p), "bytes": p.stat().st_size} for name, p in sorted(files.items())}
    newest = max(numbers(model), default=0)
    if not newest or not _holds(model / str(newest), manifest, config + version_policy(newest), adapter, card):
        newest += 1
        with replacing_folder(model / str(newest)) as folder:
            for name, path in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
            _check_copies(folder, manifest)
            shutil.copyfile(adapter / MODEL, folder / MODEL)
            if card is not None:
                write_json(folder / CARD, card)
                manifest[CARD] = {"sha256": sha256_file(folder / CARD), "bytes": (folder / CARD).stat().st_size}
            write_json(folder / MANIFEST, manifest)
            (folder / CONFIG).write_text(config + version_policy(newest))
    if served_version(model) != newest:  # Triton loads a model again whose files are new
        write_atomic(model / CONFIG, config + version_policy(newest))
    return newest


def _holds(
    version: Path, manifest: Mapping[str, object], config: str, adapter: Path, card: Mapping[str, Any] | None
) -> bool:
    try:
        there = {name: line for name, line in read_manifest(version).items() if name != CARD}
        same = there == manifest and (version / MODEL).read_bytes() == (adapter / MODEL).read_bytes()
        same = same and (version / CONFIG).read_text() == config
        same = same and (card is None or json.loads((version / CARD).read_text()) == json.loads(json.dumps(card)))
    except (CheckpointError, OSError, ValueError):
        return False
    return same and all((version / name).is_file() for name in manifest)


def _check_copies(folder: Path, manifest: Mapping[str, Mapping[str, object]]) -> None:
    for name, line in manifest.items():
        if sha256_file(folder / name) != line["sha256"]:
            raise CheckpointError(f"weights: {name} changed while it was published")
