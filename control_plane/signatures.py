"""Signatures of artifacts: who says that a version may be served here.

What is signed is ``manifest.json``, in the form of OpenSSF Model Signing (a Sigstore bundle). Its sha256 is the
artifact's digest and it lists the sha256 of every other file, so it stands for all of them. Keys are PEM files of the
curves P-256, P-384 and P-521:

    openssl ecparam -name prime256v1 -genkey -noout -out signing.pem
    openssl ec -in signing.pem -pubout -out trusted/release.pem

The library is the extra ``signing``. It knows neither the store nor the registry.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from control_plane.errors import ControlPlaneError
from triton_backend.version_folder import MANIFEST_JSON

KEY_SUFFIXES = (".pem", ".pub")
CURVES = "an unencrypted PEM file of curve P-256, P-384 or P-521 (openssl ecparam -name prime256v1 -genkey -noout)"


class SigningError(ControlPlaneError):
    """A key, or the folder of keys, cannot be used, or the extra is not installed."""

    code = "signing_failed"


class UntrustedArtifact(ControlPlaneError):
    """No trusted key signed it."""

    status = 409
    code = "untrusted_artifact"


class Signer:
    """Signs with one private key. Raises SigningError if that cannot be used."""

    def __init__(self, key: Path) -> None:
        config = _model_signing().signing.Config()
        try:
            self._config = config.use_elliptic_key_signer(private_key=key)
            self.key_id = _key_id(key)
        except Exception as error:
            # Every kind of file and key has an exception of its own, down to AttributeError for RSA.
            raise SigningError(f"cannot sign with LLMOS_SIGNING_KEY {key}: {error}; expected {CURVES}") from error

    def sign(self, digest: str, manifest: bytes) -> bytes:
        with _folder_of(digest, manifest) as folder:
            bundle = folder.with_name("signature.json")
            self._config.sign(folder, bundle)
            return bundle.read_bytes()


class TrustedKeys:
    """Public keys in a folder, read at every check: a key that is added or removed counts from then on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, digest: str, manifest: bytes, signatures: Sequence[bytes]) -> None:
        """Raises UntrustedArtifact unless one of the keys made one of the ``signatures`` for exactly this manifest."""
        keys = self.keys()
        if not signatures:
            raise UntrustedArtifact(
                f"artifact {digest} is not signed, and LLMOS_TRUSTED_KEYS is set; set LLMOS_SIGNING_KEY and store it "
                "again, by publishing it"
            )
        with _folder_of(digest, manifest) as folder:
            for number, signature in enumerate(signatures):
                bundle = folder.with_name(f"signature-{number}.json")
                bundle.write_bytes(signature)
                if any(_verifies(key, folder, bundle) for key in keys.values()):
                    return
        raise UntrustedArtifact(
            f"artifact {digest} has {len(signatures)} signature(s), none of them made for it by one of the {len(keys)} "
            f"key(s) in {self._folder}: it was signed by somebody else, or it or its signature was changed"
        )

    def keys(self) -> dict[str, Any]:
        """Verifiers by the name of their file; raises SigningError if there is none, or one that is no key."""
        found = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        paths = [path for path in found if path.suffix in KEY_SUFFIXES]
        if not paths:
            raise SigningError(
                f"LLMOS_TRUSTED_KEYS {self._folder} holds no public keys; expected a folder with files "
                f"*{' or *'.join(KEY_SUFFIXES)}"
            )
        return {path.name: _verifier(path) for path in paths}


def _verifier(key: Path) -> Any:
    config = _model_signing().verifying.Config()
    try:
        return config.use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise SigningError(
            f"{key} is no public key that can be used: {error}; expected a PEM file of curve P-256, P-384 or P-521 "
            "(openssl ec -in PRIVATE -pubout); remove or replace it"
        ) from error


def _verifies(verifier: Any, folder: Path, bundle: Path) -> bool:
    try:
        verifier.verify(folder, bundle)
    except Exception:
        # Bundles come from outside, and each way of being wrong has another exception.
        return False
    return True


@contextmanager
def _folder_of(digest: str, manifest: bytes) -> Iterator[Path]:
    """A folder named after the digest that holds the manifest alone, with room beside it."""
    with tempfile.TemporaryDirectory(prefix="llmos-signature-") as spare:
        folder = Path(spare, digest)
        folder.mkdir()
        (folder / MANIFEST_JSON).write_bytes(manifest)
        yield folder


def _key_id(private_key: Path) -> str:
    """Of its public key; tells the signatures of several keys apart."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(private_key.read_bytes(), None).public_key()
    public = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public).hexdigest()[:16]


def _model_signing() -> Any:
    """Imported when it is needed: half a second, and an extra that not everybody has."""
    try:
        import model_signing
    except ImportError as error:
        raise SigningError(
            f"signatures need the extra 'signing' ({error}): pip install -c constraints.txt -e '.[signing]'"
        ) from error
    return model_signing
