"""The process in which the CLIP model lives: `python -m retrieval_svc.clip_worker`, started by `worker_embedder.py`.

A process of its own, because torch takes seconds to import and hundreds of megabytes: a service without CLIP never pays
for it, one with CLIP serves BM25 while it loads, and the model's work does not hold the service's interpreter lock.
Standard input is the socket to the service; when the service ends, it ends.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from collections.abc import Sequence

import torch

from retrieval_svc.clip import ClipEmbedder, packaged_clip
from retrieval_svc.embedding_loop import answer_all
from retrieval_svc.frames import Frame, send_frame

PACKAGED = "packaged"


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the model, say what it is, and answer until the service has gone; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m retrieval_svc.clip_worker", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of the model; packaged: the one of this package")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of one pass; 0: one for each core")
    flags = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to everybody; the service says when it is over
    if flags.threads:
        torch.set_num_threads(flags.threads)
    with socket.socket(fileno=sys.stdin.fileno()) as service:
        try:
            embedder = ClipEmbedder(packaged_clip() if flags.model == PACKAGED else flags.model, device=flags.device)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            send_frame(service, Frame(said={"failed": reason}))
            return 2
        hello = {"name": embedder.name, "size": embedder.size, "image_side": embedder.image_side}
        send_frame(service, Frame(said={"hello": hello}))
        answer_all(service, embedder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
