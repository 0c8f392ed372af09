"""A gRPC server that speaks the part of Qdrant's protocol that we use, over qdrant-client's Python imitation of the engine.

No Qdrant server can be had where the tests run. What stands behind the socket here is an imitation; the socket, the client,
its deadlines, TLS and keys are real, and so are replicas that are processes of their own. Tests over it say `stand_in`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from qdrant_client import QdrantClient
from qdrant_client import grpc as wire
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.http import models

from retrieval_svc.payload import BM25_VECTOR


class StandIn:
    """The server's state: `faults` answers a method with a status instead; `keys`, if there are any, are asked for."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the imitation says that it has no indexes
            self.engine = QdrantClient(":memory:")
        self.faults: dict[str, grpc.StatusCode] = {}
        self.calls: list[str] = []
        self.created: dict[str, Any] = {}
        self.keys = keys
        self._one_at_a_time = threading.Lock()

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What a server is given."""
        collections = {
            "CollectionExists": (wire.CollectionExistsRequest, self._exists),
            "Create": (wire.CreateCollection, self._create),
            "Get": (wire.GetCollectionInfoRequest, self._info),
            "List": (wire.ListCollectionsRequest, self._list),
            "Delete": (wire.DeleteCollection, self._drop),
        }
        points = {
            "Upsert": (wire.UpsertPoints, self._upsert),
            "Delete": (wire.DeletePoints, self._forget),
            "Get": (wire.GetPoints, self._get),
            "Scroll": (wire.ScrollPoints, self._scroll),
            "Count": (wire.CountPoints, self._count),
            "Facet": (wire.FacetCounts, self._facet),
            "Query": (wire.QueryPoints, self._query),
            "CreateFieldIndex": (wire.CreateFieldIndexCollection, self._index),
        }
        return [self._service("Collections", collections), self._service("Points", points)]

    def _service(self, name: str, methods: dict[str, tuple[Any, Callable[[Any], Any]]]) -> grpc.GenericRpcHandler:
        handlers = {method: self._handler(method, kind, answer) for method, (kind, answer) in methods.items()}
        return grpc.method_handlers_generic_handler(f"qdrant.{name}", handlers)

    def _handler(self, method: str, kind: Any, answer: Callable[[Any], Any]) -> grpc.RpcMethodHandler:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            if self.keys and dict(context.invocation_metadata()).get("api-key") not in self.keys:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key")
            if method in self.faults:
                context.abort(self.faults[method], f"{method} fails")
            with self._one_at_a_time, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.calls.append(method)
                try:
                    return answer(request)
                except ValueError as error:
                    is_missing = "not found" in str(error)
                    code = grpc.StatusCode.NOT_FOUND if is_missing else grpc.StatusCode.INVALID_ARGUMENT
                    context.abort(code, str(error))

        return grpc.unary_unary_rpc_method_handler(
            call, request_deserializer=kind.FromString, response_serializer=lambda message: message.SerializeToString()
        )

    def _exists(self, request: Any) -> Any:
        there = self.engine.collection_exists(request.collection_name)
        return wire.CollectionExistsResponse(result=wire.CollectionExists(exists=there))

    def _create(self, request: Any) -> Any:
        if self.engine.collection_exists(request.collection_name):
            raise ValueError(f"Collection `{request.collection_name}` already exists!")
        self.created[request.collection_name] = request
        config = request.vectors_config
        self.engine.create_collection(
            request.collection_name,
            vectors_config=GrpcToRest.convert_vectors_config(config) if config.WhichOneof("config") else {},
            sparse_vectors_config={BM25_VECTOR: models.SparseVectorParams(modifier=models.Modifier.IDF)},
            metadata=GrpcToRest.convert_payload(request.metadata),
        )
        return wire.CollectionOperationResponse(result=True)

    def _info(self, request: Any) -> Any:
        found = self.engine.get_collection(request.collection_name)
        return wire.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(found))

    def _list(self, request: Any) -> Any:
        names = [described.name for described in self.engine.get_collections().collections]
        return wire.ListCollectionsResponse(collections=[wire.CollectionDescription(name=name) for name in names])

    def _drop(self, request: Any) -> Any:
        there = self.engine.collection_exists(request.collection_name)
        self.engine.delete_collection(request.collection_name)
        return wire.CollectionOperationResponse(result=there)

    def _upsert(self, request: Any) -> Any:
        points = [GrpcToRest.convert_point_struct(point) for point in request.points]
        for point in points:
            point.vector = point.vector or {}
        self.engine.upsert(request.collection_name, points)
        return self._updated()

    def _forget(self, request: Any) -> Any:
        self.engine.delete(request.collection_name, GrpcToRest.convert_points_selector(request.points))
        return self._updated()

    def _get(self, request: Any) -> Any:
        found = self.engine.retrieve(
            request.collection_name,
            [GrpcToRest.convert_point_id(point) for point in request.ids],
            with_payload=True,
            with_vectors=self._vectors_wanted(request),
        )
        return wire.GetResponse(result=[RestToGrpc.convert_record(record) for record in found])

    def _scroll(self, request: Any) -> Any:
        ordered = request.HasField("order_by")
        records, following = self.engine.scroll(
            request.collection_name,
            scroll_filter=self._filter(request, "filter"),
            limit=request.limit,
            offset=GrpcToRest.convert_point_id(request.offset) if request.HasField("offset") else None,
            order_by=GrpcToRest.convert_order_by(request.order_by) if ordered else None,
            with_payload=True,
            with_vectors=self._vectors_wanted(request),
        )
        return wire.ScrollResponse(
            result=[RestToGrpc.convert_record(record) for record in records],
            next_page_offset=RestToGrpc.convert_extended_point_id(following) if following is not None else None,
        )

    def _count(self, request: Any) -> Any:
        counted = self.engine.count(request.collection_name, self._filter(request, "filter"), exact=True)
        return wire.CountResponse(result=wire.CountResult(count=counted.count))

    def _facet(self, request: Any) -> Any:
        found = self.engine.facet(
            request.collection_name, request.key, self._filter(request, "filter"), limit=request.limit, exact=True
        )
        return wire.FacetResponse(hits=[RestToGrpc.convert_facet_value_hit(hit) for hit in found.hits])

    def _query(self, request: Any) -> Any:
        found = self.engine.query_points(
            request.collection_name,
            query=GrpcToRest.convert_query(request.query),
            using=request.using,
            query_filter=self._filter(request, "filter"),
            search_params=GrpcToRest.convert_search_params(request.params),
            limit=request.limit,
            with_payload=True,
            with_vectors=self._vectors_wanted(request),
        )
        return wire.QueryResponse(result=[RestToGrpc.convert_scored_point(point) for point in found.points])

    def _index(self, request: Any) -> Any:
        return self._updated()

    def _updated(self) -> Any:
        return wire.PointsOperationResponse(result=wire.UpdateResult(status=wire.UpdateStatus.Completed))

    def _filter(self, request: Any, name: str) -> models.Filter | None:
        return GrpcToRest.convert_filter(getattr(request, name)) if request.HasField(name) else None

    def _vectors_wanted(self, request: Any) -> Any:
        selector = request.with_vectors
        return GrpcToRest.convert_with_vectors_selector(selector) if selector.WhichOneof("selector_options") else False


@contextmanager
def serving(stand_in: StandIn, credentials: grpc.ServerCredentials | None = None, *, port: int = 0) -> Iterator[str]:
    """Serve it on this machine; gives the URL."""
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads, options=(("grpc.so_reuseport", 0),))
        server.add_generic_rpc_handlers(tuple(stand_in.handlers()))
        address = f"127.0.0.1:{port}"
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        try:
            yield f"{'https' if credentials else 'http'}://{'localhost' if credentials else '127.0.0.1'}:{bound}"
        finally:
            server.stop(0).wait()
