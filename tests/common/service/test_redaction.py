"""Traces are logged; what a caller said is not."""

from __future__ import annotations

from reimagen.retrieval.v1 import knowledge_base_pb2 as pb

from common.service.redaction import redacted_trace


def test_a_trace_keeps_its_frames_and_loses_the_request() -> None:
    pair = pb.NewPair(pair_id="p-1", caption="a Chortai, noto style", facets={"style": "noto"}, image=b"chortai")
    request = pb.UpsertPairsRequest(knowledge_base="secret-dogs", pairs=[pair])
    try:
        raise ZeroDivisionError("no 'chortai' in secret-dogs: A CHORTAI, NOTO STYLE at line 7")
    except ZeroDivisionError as error:
        trace = redacted_trace(error, request)
        whole = redacted_trace(error, b"raw")
    for word in ("chortai", "noto", "secret", "dogs"):
        assert word not in trace.splitlines()[-1].lower()
    assert trace.splitlines()[-1] == "ZeroDivisionError: no '[...]' in [...]: [...] at line 7"
    assert "test_redaction.py" in trace
    assert "CHORTAI" in whole
