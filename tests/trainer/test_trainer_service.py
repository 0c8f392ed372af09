"""TrainerService over sockets, as a process of its own, with real trainings of the tiny preset."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from reimagen.trainer.v1 import trainer_pb2 as pb
from reimagen.trainer.v1 import trainer_pb2_grpc as pb_grpc

from client.errors import reason, violations
from client.trainer import Export, Figures, Run, SampleGrid, TrainerClient, TrainingFailed
from common.checkpoint import load_stage, publish_stage
from common.unet.unet import UNet
from tests.trainer.training_service import (
    START_S,
    TrainerProcess,
    free_port,
    has_trained,
    over,
    slow,
    tiny,
    training,
    until,
)
from trainer.presets import preset

Served = tuple[TrainerProcess, TrainerClient]
STEPS = 16  # of the whole tiny preset


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def data(prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared corpora: one that is whole, and one that lacks its neighbors."""
    folder = tmp_path_factory.mktemp("corpora")
    shutil.copytree(prepared_folder, folder / "shapes")
    shutil.copytree(prepared_folder, folder / "mended")
    (folder / "mended" / "knn").rename(folder / "mended" / "away")
    return folder


@pytest.fixture(scope="module")
def served(data: Path, tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("trainer")
    with training(folder, data, f"--metrics-port={metrics_port}") as running:
        yield running


@pytest.fixture(scope="module")
def failed(served: Served) -> Run:
    """A run that could not begin."""
    _, client = served
    client.start(tiny(data="mended", log_every_s=0.001, evaluate_every_steps=6), name="mended")
    return over(client, "mended")


@pytest.fixture(scope="module")
def told(served: Served, failed: Run, data: Path) -> list[Any]:
    """What the same run says when its data is mended and it is started again, until it is over."""
    _, client = served
    (data / "mended" / "away").rename(data / "mended" / "knn")
    client.start(failed.spec, name="mended")
    return list(client.watch("mended"))


def test_a_failed_run_says_how_it_ended(failed: Run) -> None:
    assert (failed.state, failed.attempt) == ("failed", 1)
    assert failed.error.startswith("ended with status 2\n") and "knn" in failed.error
    assert failed.started_at and failed.ended_at and failed.progress is None


def test_started_again_it_goes_on_and_is_watched_to_its_end(told: list[Any]) -> None:
    states = [(event.state, event.attempt) for event in told if isinstance(event, Run)]
    assert states[0] in (("queued", 2), ("running", 2)) and states[-1] == ("succeeded", 2)
    steps = [event.step for event in told if isinstance(event, Figures) and event.kind == "train"]
    assert steps and steps == sorted(set(steps))
    lines = [event for event in told if isinstance(event, Figures)]
    assert {"loss", "gradient_norm", "learning_rate", "examples_per_s"} <= set(lines[0].values)
    held_out = [line for line in lines if line.kind == "held_out"]
    assert [line.step for line in held_out] == [6, 12, STEPS]
    assert {"full", "text_only", "wrong_neighbors"} <= set(held_out[0].values)
    end = told[-1]
    assert end.progress.examples == end.progress.total_examples == 128 and end.progress.loss > 0
    assert (end.error, end.status) == ("", "")


def test_its_sample_grids_come_in_their_places(told: list[Any]) -> None:
    grids = [event for event in told if isinstance(event, SampleGrid)]
    assert [(grid.step, grid.examples) for grid in grids] == [(6, 48), (12, 96), (STEPS, 128)]
    with Image.open(io.BytesIO(grids[0].png)) as picture:
        assert picture.format == "PNG" and picture.width > 64
    places = [event.step for event in told if not isinstance(event, Run)]
    assert places == sorted(places)


def test_a_watch_begins_at_any_step(served: Served, told: list[Any]) -> None:
    _, client = served
    again = list(client.watch("mended", from_step=12))
    expected = [event for event in told if not isinstance(event, Run) and event.step >= 12]
    assert [event for event in again if not isinstance(event, Run)] == expected
    assert isinstance(again[0], Run) and again[0].state == "succeeded"
    assert not [event for event in client.watch("mended", samples=False) if isinstance(event, SampleGrid)]
    assert [type(event) for event in client.watch("mended", from_step=STEPS + 1)] == [Run, Run]


def test_a_complete_run_is_not_started_again(served: Served, told: list[Any]) -> None:
    _, client = served
    with pytest.raises(TrainingFailed) as refused:
        client.start(tiny(data="mended"), name="mended")
    assert (refused.value.code, refused.value.reason) == ("ALREADY_EXISTS", "RUN_IS_COMPLETE")
    with pytest.raises(TrainingFailed) as refused:
        client.cancel("mended")
    assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "RUN_IS_OVER")


def test_export_writes_weights_that_load_and_says_so(served: Served, told: list[Any]) -> None:
    service, client = served
    said: list[Any] = []
    request_id = str(uuid.uuid4())
    row = preset("tiny-64")
    seen = {"preset": "tiny-64", "step": 1, "examples": 10**6}
    publish_stage(service.weights / "models" / "first", 64, row.unet, UNet(row.unet).state_dict(), seen)
    with pytest.raises(TrainingFailed, match=r"status 2\n.*saw 1,000,000 examples.*say --replace") as refused:
        client.export("mended", "models/first")
    assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "EXPORT_FAILED")
    keepers: list[bytes] = []

    def kill_once(export: Export) -> None:
        """The service, as soon as the export is told to go on."""
        said.append(export)
        if export.done and not keepers:
            keepers.append(_keeper(service))
            service.end(signal.SIGKILL)
            service.start().close()

    exported = client.export("mended", "models/first", on_progress=kill_once, request_id=request_id, replace=True)
    assert keepers == [_keeper(service)], "it went on, and was not begun again"
    assert (exported.state, exported.status) == ("succeeded", "models/first/unet_64.safetensors")
    assert any(export.total and export.status for export in said), "its steps are told"
    loaded = load_stage(service.weights / "models" / "first", 64)
    assert (loaded.trained["preset"], loaded.trained["step"]) == ("tiny-64", STEPS)
    assert client.get("mended").export == exported
    again = client.export("mended", "models/first", request_id=request_id, replace=True)
    assert again == exported, "not made again"
    with pytest.raises(TrainingFailed) as refused:
        client.export("mended", "models/second", request_id=request_id)
    assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED")


def _keeper(service: TrainerProcess) -> bytes:
    return (service.runs / "mended" / "service" / "export" / "process.json").read_bytes()


def test_metrics_tell_runs_by_state_and_presets_alone(served: Served, metrics_port: int, told: list[Any]) -> None:
    said = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10).read().decode()
    counted = dict(re.findall(r'^reimagen_trainer_runs\{state="(\w+)"\} (\S+)$', said, re.MULTILINE))
    assert float(counted["succeeded"]) >= 1 and set(counted) == {
        "queued",
        "running",
        "succeeded",
        "failed",
        "cancelled",
    }
    assert 'reimagen_build_info{revision="unknown",service="trainer"' in said
    assert "mended" not in said


def test_health_and_reflection_answer(served: Served) -> None:
    service, client = served
    assert [health.status for health in client.health()] == ["SERVING"]
    with grpc.insecure_channel(service.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        found = pool.FindServiceByName("reimagen.trainer.v1.TrainerService")
        assert {method.name for method in found.methods} >= {"StartRun", "WatchRun", "ExportRun"}


SPEC: dict[str, Any] = {"preset": "tiny-64", "data": "shapes"}
BAD = [
    ({"spec": {**SPEC, "preset": "tiny-65"}}, "spec.preset", "'tiny-65' is not one of demo-1024"),
    ({"spec": {**SPEC, "data": "nowhere"}}, "spec.data", "'nowhere' holds no prepared corpus"),
    ({"spec": {**SPEC, "data": ""}}, "spec.data", "is missing"),
    ({"spec": {**SPEC, "data": "../corpora/shapes"}}, "spec.data", "not a folder under the service's data folder"),
    ({"spec": {**SPEC, "data": "a/" + "b" * 256}}, "spec.data", "is longer than the 255 bytes of a folder's name"),
    ({"spec": {**SPEC, "start_from": "\u00e9" * 128}}, "spec.start_from", "is longer than the 255 bytes"),
    ({"spec": {**SPEC, "data": "/etc"}}, "spec.data", "'/etc' is not a folder under"),
    ({"spec": {**SPEC, "start_from": "nowhere"}}, "spec.start_from", "holds no weights"),
    ({"spec": {**SPEC, "examples": 129}}, "spec.examples", "129 is more than the preset's 128"),
    ({"spec": {**SPEC, "limit": {"seconds": -1}}}, "spec.limit", "-1 s is not a positive time"),
    ({"spec": {**SPEC, "limit": {"seconds": 2**63 - 1}}}, "spec.limit", "9.22337e+18 s is more than 315576000000 s"),
    ({"spec": {**SPEC, "evaluate_every": {}}}, "spec.evaluate_every", "0 s is not a positive time"),
    ({"spec": {**SPEC, "ranks": 5}}, "spec.ranks", "5 ranks x 1 parts are more than the 4 neighbor sets"),
    ({"spec": {**SPEC, "threads": 1025}}, "spec.threads", "1025 is more than 1024"),
    ({"spec": {**SPEC, "side": 7}}, "spec.side", "7 is not a multiple of"),
    ({"spec": {**SPEC, "side": 128}}, "spec.side", "up to 64"),
    ({"spec": {**SPEC, "executor": 9}}, "spec.executor", "9 is no executor"),
    ({"spec": {**SPEC, "parallel": 1}}, "spec.parallel", "there is one rank"),
    ({"spec": {**SPEC, "pod": {"gpus": 1}}}, "spec.pod", "the run is local"),
    ({"spec": SPEC, "run": "a/b"}, "run", "'a/b' is not 1 to 40 of a-z"),
    ({"spec": SPEC, "run": ".."}, "run", "'..' is not"),
    ({"spec": SPEC, "run": "a" * 41}, "run", "is not 1 to 40"),
    ({"spec": SPEC, "run": "demo-"}, "run", "is not 1 to 40"),
    ({"spec": SPEC, "request_id": "seven"}, "request_id", "'seven' is not a UUID"),
]


@pytest.mark.parametrize(("request_", "field", "description"), BAD)
def test_what_cannot_be_is_refused_by_its_field(
    served: Served, request_: dict[str, Any], field: str, description: str
) -> None:
    service, client = served
    before = {run.name for run in client.list()}
    with grpc.insecure_channel(service.address) as channel, pytest.raises(grpc.RpcError) as refused:
        pb_grpc.TrainerServiceStub(channel).StartRun(pb.StartRunRequest(**request_))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    (violation,) = violations(refused.value)
    assert violation.field == field and description in violation.description
    assert str(service.folder) not in violation.description
    assert {run.name for run in client.list()} == before


def test_what_is_not_there_is_not_found(served: Served) -> None:
    _, client = served
    asks = (client.get, client.cancel, client.delete, lambda name: client.export(name, "w"))
    for ask in (*asks, lambda name: next(client.watch(name))):
        with pytest.raises(TrainingFailed) as refused:
            ask("nobody")
        assert (refused.value.code, refused.value.reason) == ("NOT_FOUND", "RUN_NOT_FOUND")


def test_a_cluster_that_is_not_configured_is_a_failed_precondition(served: Served) -> None:
    _, client = served
    with pytest.raises(TrainingFailed) as refused:
        client.start(tiny(executor="kubernetes_job"))
    assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "EXECUTOR_NOT_CONFIGURED")


def test_a_queue_survives_kill_9_of_the_service_and_so_does_what_runs(data: Path, tmp_path: Path) -> None:
    """One after the other: queue, request ids, pages, a killed service, adoption, cancelling, going on."""
    with training(tmp_path, data) as (service, client):
        request_id = str(uuid.uuid4())
        first = client.start(slow(), name="first", request_id=request_id)
        _check_requests(client, first, request_id)
        for name in ("second", "third"):
            client.start(tiny(), name=name)
        assert [client.get(name).queue_position for name in ("second", "third")] == [1, 2]
        _check_pages(service, client)
        cancelled = client.cancel("second")
        assert (cancelled.state, cancelled.cancelling, cancelled.started_at) == ("cancelled", False, "")
        assert client.cancel("second") == cancelled, "again: nothing"

        before = until(client, "first", has_trained(1))
        watching = client.watch("first", samples=False)
        seen = [next(watching), next(watching)]
        service.end(signal.SIGKILL)
        with service.start() as client:
            after = client.get("first")
            assert (after.state, after.place, after.attempt) == ("running", before.place, 1)
            assert client.start(slow(), name="first", request_id=request_id).attempt == 1
            assert client.get("third").queue_position == 1
            until(client, "first", has_trained(before.progress.step + 2))  # type: ignore[union-attr]

            assert client.cancel("third").state == "cancelled"
            asked = client.cancel("first")
            assert (asked.state, asked.cancelling) == ("running", True)
            ended = over(client, "first")
            assert ended.state == "cancelled" and 0 < ended.progress.examples < 128  # type: ignore[union-attr]
            seen += list(watching)
            _check_nothing_twice(seen)

            client.start(tiny(examples=ended.progress.examples + 16), name="first")  # type: ignore[union-attr]
            events = list(client.watch("first", from_step=ended.progress.step))  # type: ignore[union-attr]
            assert (events[-1].state, events[-1].attempt) == ("succeeded", 2)
            starts = json.loads((service.runs / "first" / "run.json").read_text())["starts"]
            assert [start["from_step"] for start in starts] == [0, ended.progress.step]  # type: ignore[union-attr]
        assert service.end() == 0


def _check_requests(client: TrainerClient, first: Run, request_id: str) -> None:
    again = client.start(slow(), name="first", request_id=request_id)
    assert (again.name, again.created_at, again.attempt) == (first.name, first.created_at, 1)
    for change, code, why in (
        ({"spec": slow(threads=2), "request_id": request_id}, "INVALID_ARGUMENT", "REQUEST_ID_REUSED"),
        ({"spec": slow(), "request_id": ""}, "ALREADY_EXISTS", "RUN_IS_ACTIVE"),
    ):
        with pytest.raises(TrainingFailed) as refused:
            client.start(name="first", **change)
        assert (refused.value.code, refused.value.reason) == (code, why)


def _check_pages(service: TrainerProcess, client: TrainerClient) -> None:
    assert [run.name for run in client.list(page_size=1)] == ["first", "second", "third"]
    assert [run.name for run in client.list(states=["queued"])][-2:] == ["second", "third"]
    with grpc.insecure_channel(service.address) as channel:
        stub = pb_grpc.TrainerServiceStub(channel)
        page = stub.ListRuns(pb.ListRunsRequest(page_size=2))
        assert [run.name for run in page.runs] == ["first", "second"] and page.next_page_token
        rest = stub.ListRuns(pb.ListRunsRequest(page_size=2, page_token=page.next_page_token))
        assert [run.name for run in rest.runs] == ["third"] and not rest.next_page_token
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListRuns(pb.ListRunsRequest(page_size=1001))
        assert violations(refused.value)[0].field == "page_size" and reason(refused.value) == "FIELD_INVALID"


def _check_nothing_twice(seen: list[Any]) -> None:
    """A watch that outlived the service tells every line once."""
    lines = [event for event in seen if isinstance(event, Figures)]
    steps = [line.step for line in lines if line.kind == "held_out"]
    assert steps == sorted(steps) and steps[0] == 1
    assert len({(line.kind, line.step, line.time) for line in lines}) == len(lines)
    assert seen[-1].state == "cancelled"


def test_a_run_that_does_not_end_is_killed(data: Path, tmp_path: Path) -> None:
    with training(tmp_path, data, "--cancel-grace-s=1") as (_, client):
        client.start(slow(), name="stuck")
        run = until(client, "stuck", lambda run: run.place)
        waiting = int(run.place.removeprefix("process "))
        until(client, "stuck", lambda run: _children(waiting))
        (child,) = _children(waiting)
        os.kill(child, signal.SIGSTOP)
        client.cancel("stuck")
        assert over(client, "stuck").state == "cancelled"
        assert not Path(f"/proc/{child}").exists()


def test_two_ranks_train_together(served: Served) -> None:
    service, client = served
    client.start(tiny(ranks=2, parallel="ddp", examples=16), name="pair")
    ended = list(client.watch("pair"))[-1]
    assert ended.state == "succeeded", ended.error
    assert (ended.progress.examples, ended.progress.total_examples) == (16, 16)
    (start,) = json.loads((service.runs / "pair" / "run.json").read_text())["starts"]
    assert (start["ranks"], start["parallel"]) == (2, "ddp")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_a_second_service_over_the_same_runs_does_not_start(served: Served, data: Path, tmp_path: Path) -> None:
    """Begun as the trainer's command, which hands over to it."""
    service, _ = served
    second = TrainerProcess(tmp_path, data)
    second.program, second.runs = ("trainer", "serve"), service.runs
    with pytest.raises(AssertionError, match="is the folder of another service"):
        second.start()
    assert second._process is not None and second._process.wait(START_S) == 2
    second._process = None


def test_nothing_is_exported_before_a_state_is_saved(served: Served) -> None:
    service, client = served
    (service.runs / "empty").mkdir(exist_ok=True)
    client.start(tiny(), name="empty")
    with pytest.raises(TrainingFailed) as refused:
        client.export("empty", "models/none")
    assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "NOTHING_TO_EXPORT")
    for weights in ("../models", "b" * 256):
        with pytest.raises(TrainingFailed) as refused:
            client.export("empty", weights)
        assert [violation.field for violation in refused.value.violations] == ["weights"]
    with pytest.raises(TrainingFailed) as refused:
        client.delete("empty")
    assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "RUN_IS_ACTIVE")
    client.cancel("empty")
    over(client, "empty")
    client.delete("empty")
    assert not (service.runs / "empty").exists() and "empty" not in {run.name for run in client.list()}
    client.delete("empty", missing_ok=True)
    with pytest.raises(TrainingFailed, match="there is no run 'empty'"):
        client.delete("empty")
