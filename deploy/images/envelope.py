"""Signed statements: DSSE envelopes (https://github.com/secure-systems-lab/dsse), Ed25519 or whatever the key is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # pyright: ignore[reportPrivateImportUsage]

PAYLOAD = "application/vnd.in-toto+json"


def sign(statement: dict[str, Any], key: bytes) -> dict[str, Any]:
    """The statement in an envelope with one signature.

    Args:
        key: private, PEM (PKCS #8), without a password.

    Raises:
        ValueError: the key cannot be read or used.
    """
    try:
        private = load_pem_private_key(key, password=None)
        signer = CryptoSigner(private, SSlibKey.from_crypto(private.public_key()))  # pyright: ignore
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"is no private key that signs: {error}") from None
    envelope = Envelope(json.dumps(statement, sort_keys=True, ensure_ascii=False).encode(), PAYLOAD, {})
    envelope.sign(signer)
    return envelope.to_dict()


def public_key(pem: bytes) -> SSlibKey:
    """The key that signatures are checked with, of its PEM.

    Raises:
        ValueError: it is no public key.
    """
    try:
        return SSlibKey.from_crypto(load_pem_public_key(pem))  # pyright: ignore
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"is no public key: {error}") from None


def verify(envelope: Any, key: SSlibKey) -> dict[str, Any]:
    """The statement of an envelope that the key's owner has signed.

    Raises:
        ValueError: nobody, or somebody else, has signed it, or what is signed is no statement of in-toto.
    """
    try:
        opened = Envelope.from_dict(envelope)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"is no signed envelope (DSSE): {type(error).__name__} {error}") from None
    try:
        opened.verify([key], threshold=1)
    except VerificationError:
        raise ValueError("no signature in it is this key's, or it was altered") from None
    if opened.payload_type != PAYLOAD:
        raise ValueError(f"payloadType is {opened.payload_type!r}, not {PAYLOAD}")
    return json.loads(opened.payload)


def verify_file(envelope: Any, key: SSlibKey, path: Path, sha256: str) -> dict[str, Any]:
    """`verify`, and that the statement is of this file.

    Raises:
        ValueError: as `verify`; or the statement is of something else.
    """
    statement = verify(envelope, key)
    subjects = {subject["digest"].get("sha256"): subject["name"] for subject in statement["subject"]}
    if sha256 not in subjects:
        raise ValueError(f"{path} is {sha256}, the statement is of {subjects}")
    return statement
