"""What a tritonserver's log says of its end. The lines are those of Triton 2.51."""

from __future__ import annotations

from deploy.local.tritonserver import last_error

NO_GPU = '2026-11-24T18:15:34Z E 24657 server.cc:241] "CudaDriverHelper has not been initialized."'
CAUSE = "2026-11-24T18:15:54Z E 24657 model_lifecycle.cc:642] \"failed to load 'unet_64' version 1: Internal: a cause\""
LEFT = (
    '2026-11-24T18:15:55Z E 24657 infer_handler.h:840] "[INTERNAL] HandleCancellation called even when the context was not'
    ' cancelled for ModelStreamInferHandler, rpc_ok=1, context 0, 0 step COMPLETE"'
)
STARTED = '2026-11-24T18:06:33Z I 16904 grpc_server.cc:2558] "Started GRPCInferenceService at 127.0.0.1:58121"'


def test_the_last_error_is_the_cause_and_no_call_that_was_left() -> None:
    assert last_error("\n".join([NO_GPU, CAUSE, STARTED, LEFT, LEFT])) == CAUSE


def test_a_log_without_an_error_names_none() -> None:
    assert last_error("\n".join([NO_GPU, STARTED, LEFT])) == ""
