"""The product from Python: `Client("host:port").generate("a guide dog")`. README.md shows it."""

from client.async_client import AsyncClient
from client.channel import Tls
from client.client import Client
from client.errors import ServiceFailed
from client.generation_messages import GenerationFailed
from client.generation_types import GenerationRequest, Reference, StageOverrides, StartFrom
from client.knowledge_base_calls import RetrievalFailed
from client.retry import NO_RETRY, RetryPolicy
from client.training_calls import TrainingFailed
from client.training_types import RunSpec

__all__ = [
    "NO_RETRY",
    "AsyncClient",
    "Client",
    "GenerationFailed",
    "GenerationRequest",
    "Reference",
    "RetrievalFailed",
    "RetryPolicy",
    "RunSpec",
    "ServiceFailed",
    "StageOverrides",
    "StartFrom",
    "Tls",
    "TrainingFailed",
]
