"""Only what a trusted key signed counts: not what is unsigned, changed, signed by another or for another."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from control_plane.artifacts import ArtifactStore
from control_plane.errors import NotFound
from control_plane.launcher.preflight import find_problems
from control_plane.settings import Settings
from control_plane.signatures import Signer, SigningError, TrustedKeys, UntrustedArtifact
from tests.unit.control_plane.registry.conftest import sealed
from triton_backend.version_folder import digest

pytestmark = pytest.mark.unit


CURVES = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1(), "k1": ec.SECP256K1()}


def write_private(path: Path, key: PrivateKeyTypes, password: bytes | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return path


def trust(key: Path, public: Path) -> None:
    """Write the public key of a private one."""
    public.parent.mkdir(exist_ok=True)
    found = load_pem_private_key(key.read_bytes(), None).public_key()
    public.write_bytes(found.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def make_key(folder: Path, name: str, trusted: Path | None = None, curve: str = "p256") -> Path:
    """A private key; its public key is put into ``trusted``."""
    key = write_private(folder / f"{name}.pem", ec.generate_private_key(CURVES[curve]))
    if trusted is not None:
        trust(key, trusted / f"{name}.pem")
    return key


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """ours.pem, of which the public key is trusted, and theirs.pem, of which it is not."""
    make_key(tmp_path / "private", "ours", tmp_path / "trusted")
    make_key(tmp_path / "private", "theirs")
    return tmp_path / "private"


@pytest.fixture
def trusted(tmp_path: Path, keys: Path) -> TrustedKeys:
    return TrustedKeys(tmp_path / "trusted")


@pytest.fixture(params=["disk", "memory"])
def url(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "disk" else f"memory://{uuid.uuid4().hex}"


def test_a_signed_artifact_is_trusted_wherever_it_is_stored(url, keys, trusted, tmp_path):
    store = ArtifactStore(url, keys / "ours.pem")
    wanted = store.put(sealed(tmp_path / "a", "a"))
    store.check(wanted, trusted)
    assert store.digests() == [wanted], "a signature is no artifact"
    store.get(wanted, tmp_path / "copy")
    store.delete(wanted)
    with pytest.raises(NotFound):
        store.check(wanted, trusted)
    assert store._signatures(wanted) == []


def test_an_unsigned_artifact_is_not_until_it_is_stored_again_with_a_key(url, keys, trusted, tmp_path):
    wanted = ArtifactStore(url).put(sealed(tmp_path / "a", "a"))
    with pytest.raises(UntrustedArtifact, match="is not signed, and LLMOS_TRUSTED_KEYS is set; set LLMOS_SIGNING_KEY"):
        ArtifactStore(url).check(wanted, trusted)
    ArtifactStore(url, keys / "ours.pem").put(tmp_path / "a")
    ArtifactStore(url).check(wanted, trusted)


def test_another_key_counts_once_it_is_trusted_and_beside_others(url, keys, trusted, tmp_path):
    wanted = ArtifactStore(url, keys / "theirs.pem").put(sealed(tmp_path / "a", "a"))
    with pytest.raises(UntrustedArtifact, match=r"1 signature\(s\), none of them made for it by one of the 1 key"):
        ArtifactStore(url).check(wanted, trusted)
    ArtifactStore(url, keys / "ours.pem").put(tmp_path / "a")
    ArtifactStore(url).check(wanted, trusted)
    (tmp_path / "trusted" / "ours.pem").unlink()
    trust(keys / "theirs.pem", tmp_path / "trusted" / "theirs.pub")
    ArtifactStore(url).check(wanted, trusted)


def test_a_signature_is_for_one_artifact_only(url, keys, trusted, tmp_path):
    store = ArtifactStore(url, keys / "ours.pem")
    signed = store.put(sealed(tmp_path / "a", "a"))
    other = ArtifactStore(url).put(sealed(tmp_path / "b", "b"))
    (path,) = store._signatures(signed)
    store._write_file(path.replace(signed, other), store._files.cat_file(path))
    with pytest.raises(UntrustedArtifact, match="signed by somebody else, or it or its signature was changed"):
        store.check(other, trusted)


@pytest.mark.parametrize("damage", ["empty", "rubbish", "payload", "signature", "no signatures"])
def test_a_changed_signature_proves_nothing(keys, trusted, tmp_path, damage):
    manifest = (sealed(tmp_path / "a", "a") / "manifest.json").read_bytes()
    wanted = digest(tmp_path / "a")
    good = Signer(keys / "ours.pem").sign(wanted, manifest)
    trusted.check(wanted, manifest, [good])
    bundle = json.loads(good)
    envelope = bundle["dsseEnvelope"]
    other = json.loads(Signer(keys / "ours.pem").sign(wanted, manifest + b" "))["dsseEnvelope"]
    if damage == "payload":
        envelope["payload"] = other["payload"]
    elif damage == "signature":
        envelope["signatures"] = other["signatures"]
    elif damage == "no signatures":
        envelope["signatures"] = []
    bad = {"empty": b"", "rubbish": b"\xff{"}.get(damage, json.dumps(bundle).encode())
    with pytest.raises(UntrustedArtifact):
        trusted.check(wanted, manifest, [bad])
    trusted.check(wanted, manifest, [bad, good])


def test_a_changed_manifest_is_not_what_was_signed(keys, trusted, tmp_path):
    manifest = (sealed(tmp_path / "a", "a") / "manifest.json").read_bytes()
    wanted = digest(tmp_path / "a")
    signature = Signer(keys / "ours.pem").sign(wanted, manifest)
    with pytest.raises(UntrustedArtifact):
        trusted.check(wanted, manifest.replace(b"1", b"2"), [signature])


@pytest.mark.parametrize("curve", ["p384", "p521"])
def test_larger_curves_can_be_used(tmp_path, curve):
    key = make_key(tmp_path / "private", "large", tmp_path / "trusted", curve)
    TrustedKeys(tmp_path / "trusted").check("d" * 64, b"{}", [Signer(key).sign("d" * 64, b"{}")])


def test_keys_that_cannot_be_used_are_named_before_anything_starts(tmp_path):
    write_private(rsa := tmp_path / "rsa.pem", generate_rsa(65537, 2048))
    write_private(locked := tmp_path / "locked.pem", ec.generate_private_key(CURVES["p256"]), b"password")
    (odd := tmp_path / "odd.pem").write_text("no key")
    for key in (rsa, odd, locked, make_key(tmp_path, "k1", curve="k1"), tmp_path, tmp_path / "none"):
        with pytest.raises(SigningError, match=rf"LLMOS_SIGNING_KEY {key}: .*; expected an unencrypted PEM file"):
            Signer(key)
    for folder in (tmp_path / "none", tmp_path / "private"):
        with pytest.raises(SigningError, match="holds no public keys; expected a folder"):
            TrustedKeys(folder).check("d" * 64, b"{}", [b"{}"])
    with pytest.raises(SigningError, match=r"k1\.pem is no public key that can be used"):
        TrustedKeys(tmp_path).keys()
    environment = {"LLMOS_HOME": str(tmp_path / "home"), "LLMOS_SIGNING_KEY": str(rsa)}
    problems = find_problems(Settings.from_environment(environment))
    assert [problem for problem in problems if "cannot sign with LLMOS_SIGNING_KEY" in problem.what]
