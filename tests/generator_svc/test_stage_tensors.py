"""The contract of served stages: what goes in comes out, what is wrong is named, and every field has its place."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from common.service.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)
from common.stages import STAGES
from generator_svc.export import ExportSettings
from generator_svc.export_config import stage_config, text_encoder_config
from generator_svc.stage_inputs import StageInputs
from generator_svc.stage_tensors import (
    INPUT_KINDS,
    NUMPY_TYPES,
    TEXT_INPUTS,
    TEXT_OUTPUTS,
    UNET_OUTPUTS,
    ModelCard,
    StageRequest,
    StageResponse,
    pack_error,
    pack_request,
    pack_response,
    unpack_error,
    unpack_request,
    unpack_response,
)
from tests.generator_svc.test_triton_conformance import ORDERS, START, plans, text_inputs
from tests.generator_svc.tiny_stack import TINY_64


def same(first: StageInputs, second: StageInputs) -> bool:
    """Bit for bit, types included."""
    for each in fields(StageInputs):
        a, b = getattr(first, each.name), getattr(second, each.name)
        if (a is None) != (b is None) or (a is not None and (a.dtype != b.dtype or a.tobytes() != b.tobytes())):
            return False
    return True


def test_every_field_of_the_inputs_travels() -> None:
    assert set(INPUT_KINDS) == {each.name for each in fields(StageInputs)}
    low_res = np.random.default_rng(1).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    whole = text_inputs(1, 2, negative=3, low_res=low_res, start=START)
    assert all(getattr(whole, each.name) is not None for each in fields(StageInputs)), "a new field: fill it here"
    for order, inputs in ((plans(64, 1, 3, 2), whole), *ORDERS[64], *ORDERS[256]):
        request = StageRequest(plans=order, inputs=inputs, preview_every=3)
        tensors = pack_request(request)
        assert all(array.shape[0] == 1 and array.flags.c_contiguous for array in tensors.values())
        back = unpack_request(tensors)
        assert back.plans == order and back.preview_every == 3
        assert back.inputs is not None and same(back.inputs, inputs)


def test_responses_come_back_as_they_were() -> None:
    x0 = np.random.default_rng(2).uniform(-1, 1, (3, 8, 8)).astype(np.float32)
    card = ModelCard(
        stage=64,
        unet=TINY_64,
        sha256="a" * 64,
        version="7",
        parameters=3,
        trained={"examples": 1},
        max_live_bytes=5,
        element_bytes=4,
        pass_s=0.1,
    )
    sent = StageResponse(steps=(3, 2), previews={1: x0}, pictures=np.stack([x0, x0]), model=card)
    tensors = pack_response(sent)
    assert {name for name in tensors} == set(UNET_OUTPUTS)
    assert all(array.dtype == NUMPY_TYPES[UNET_OUTPUTS[name].data_type] for name, array in tensors.items())
    back = unpack_response(tensors)
    assert back.steps == (3, 2) and back.model == card
    assert np.abs(back.previews[1] - x0).max() <= 1 / 255 + 1e-6
    assert back.pictures is not None and (back.pictures == sent.pictures).all()
    assert pack_response(StageResponse()) == {} and unpack_response({}) == StageResponse()


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("plans[0].steps", "0 is: not in [1, 1000]"),
        ResourceExhausted("no room", retry_after_s=5.0),
        ResourceExhausted("never", reason="TOO_LARGE"),
        Unavailable("stopping"),
        DeadlineExceeded("past [it] 3"),
        FailedPrecondition("a\nb"),
    ],
)
def test_errors_come_back_as_they_were(error: ServiceError) -> None:
    back = unpack_error(f"in ensemble: {pack_error(error)}")
    assert type(back) is type(error) and vars(back) == vars(error)


def test_an_error_of_another_is_none_of_ours() -> None:
    assert unpack_error("Failed to process the request(s) for model instance 'unet_64_0_0', message: x") is None
    assert unpack_error("RuntimeError[X] y") is None


@given(st.dictionaries(st.sampled_from(["plans", "preview_every", *INPUT_KINDS]), st.binary(max_size=40)))
def test_whatever_comes_is_read_or_refused_by_name(content: dict[str, bytes]) -> None:
    tensors = pack_request(StageRequest(plans=plans(64, 1, 2), inputs=text_inputs(1, 1)))
    tensors |= {name: np.frombuffer(value, np.uint8)[None] for name, value in content.items()}
    named = set()
    try:
        unpack_request(tensors)
    except InvalidArgument as error:
        named = {field.partition("[")[0] for field, _ in error.violations}
    assert named <= {"plans", "preview_every", *INPUT_KINDS}


@pytest.mark.parametrize("reads_neighbors", [True, False])
@pytest.mark.parametrize("spec", STAGES, ids=lambda spec: spec.name)
def test_the_configuration_is_the_stages(spec, reads_neighbors, tmp_path) -> None:
    settings = ExportSettings(weights=tmp_path, repository=tmp_path, device="cuda:1", max_requests=12, idle_s=30)
    config = model_config_pb2.ModelConfig()
    parameters = settings.parameters(spec.size)
    said = stage_config(spec, parameters, device="cuda:1", max_requests=12, reads_neighbors=reads_neighbors)
    text_format.Parse(said, config)
    assert config.name == spec.name and config.backend == "python" and config.max_batch_size == 12
    inputs = {each.name: each for each in config.input}
    assert set(inputs) == {"plans", "preview_every", *INPUT_KINDS} - (set() if spec.low_res_size else {"low_res"})
    assert list(inputs["start"].dims) == [-1, 3, spec.size, spec.size]
    assert list(inputs["neighbors"].dims) == ([-1, spec.size, spec.size, 3] if reads_neighbors else [-1, -1, -1, 3])
    if spec.low_res_size:
        assert list(inputs["low_res"].dims) == [-1, 3, spec.low_res_size, spec.low_res_size]
    assert all(each.allow_ragged_batch for each in config.input)
    assert {each.name for each in config.output} == set(UNET_OUTPUTS)
    assert config.model_transaction_policy.decoupled and config.sequence_batching.iterative_sequence
    assert config.sequence_batching.oldest.max_candidate_sequences == 12
    assert config.sequence_batching.max_sequence_idle_microseconds > 30e6
    assert list(config.instance_group[0].gpus) == [1]
    assert config.parameters["dtype"].string_value == "bfloat16"


def test_the_text_encoders_configuration_is_its_contract() -> None:
    config = model_config_pb2.ModelConfig()
    text_format.Parse(text_encoder_config(device="cpu", threads=2), config)
    assert config.HasField("dynamic_batching") and not config.model_transaction_policy.decoupled
    for said, kinds in ((config.input, TEXT_INPUTS), (config.output, TEXT_OUTPUTS)):
        told = {each.name: (model_config_pb2.DataType.Name(each.data_type), tuple(each.dims)) for each in said}
        assert told == {name: (f"TYPE_{kind.data_type}", kind.dims) for name, kind in kinds.items()}
