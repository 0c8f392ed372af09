"""Tensors in one file: written atomically, verified on reading."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint import CheckpointError
from common.files import sync_folder


class DamagedStateError(CheckpointError):
    """A state was cut, altered, or is none; the one before it may be whole."""


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write contiguous tensors on the host and a header, to which their sha256 is added: the whole file, or nothing.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        save_file(tensors, temporary, metadata={**header, "sha256": digest_of(tensors)})
        os.close(handle)
        handle = os.open(temporary, os.O_RDONLY)
        os.fsync(handle)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        Path(temporary).unlink(missing_ok=True)
        told = re.search(r"os error (\d+)", str(error))  # as safetensors words what the system said
        number = int(told[1]) if told else getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"{os.strerror(number)}; what was saved before is whole", str(path)) from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    sync_folder(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file that `write_tensors` wrote.

    Raises:
        DamagedStateError: it is cut, altered, or none.
        OSError: it cannot be opened now, which says nothing of what is in it.
    """
    path.open("rb").close()  # safetensors calls a missing file whatever the system refuses
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedStateError(f"state: {path} cannot be read ({error!r})") from None
    except (OSError, RuntimeError) as error:  # the second is how torch says that it could not map the file
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"there, but it cannot be opened now ({error})", str(path)) from None
    if "sha256" in header and header["sha256"] != digest_of(tensors):  # states of before it was written have none
        raise DamagedStateError(f"state: {path} is altered")
    return tensors, header


def digest_of(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bytes, as hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).numpy().data)
    return digest.hexdigest()
