"""Recordings that say, signed, that a model made them."""

import datetime
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")
pytest.importorskip("c2pa")

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lavatar_jax.errors import UserError
from lavatar_jax.serving.credentials import GENERATED, Credentials
from tests.serving.conftest import serving, wait_for
from tests.serving.test_parts import lengths


def pem(key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate(name: str, key, issuer: str, signer, *, ca: bool) -> bytes:
    def named(text: str) -> x509.Name:
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "A test")
        return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    unused = "content_commitment key_encipherment data_encipherment key_agreement crl_sign"
    usage = dict.fromkeys(f"{unused} encipher_only decipher_only".split(), False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(authority, critical=False)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=ca, **usage), critical=True)
    )
    if not ca:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture
def identity(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate chain of a local authority, and its key."""
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain, secret = tmp_path / "chain.pem", tmp_path / "key.pem"
    leaf = certificate("avatar", key, "authority", authority, ca=False)
    chain.write_bytes(leaf + certificate("authority", authority, "authority", authority, ca=True))
    secret.write_bytes(pem(key))
    return chain, secret


def test_a_finished_recording_is_signed(tmp_path: Path, identity: tuple[Path, Path]) -> None:
    chain, key = identity
    with serving(tmp_path, c2pa_certificate=chain, c2pa_key=key) as served:
        assert served.client.get("/v1/config").json()["provenance"]["c2pa"] is True
        session = served.open(options={"record": True})
        wait_for(lambda: session.room.recording.bytes)
        stopped = session.request("DELETE", "/recording").json()
        assert stopped["signed"] is True
        video = tmp_path / "got.mp4"
        video.write_bytes(session.request("GET", "/recording").content)
    with c2pa.Reader(str(video)) as reader:
        found = json.loads(reader.json())
    assertions = found["manifests"][found["active_manifest"]]["assertions"]
    assert GENERATED in json.dumps(assertions)
    assert {status["code"] for status in found["validation_status"]} == {"signingCredential.untrusted"}
    assert lengths(video)[0] == pytest.approx(25 * stopped["seconds"], abs=1)
    data = bytearray(video.read_bytes())
    data[-len(data) // 3] ^= 1
    video.write_bytes(data)
    with c2pa.Reader(str(video)) as reader:
        assert "mismatch" in reader.json()  # whoever changes it is found out


def test_what_cannot_sign(
    tmp_path: Path, identity: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, key = identity
    with pytest.raises(UserError, match="no private key"):
        Credentials(chain, chain)
    with pytest.raises(UserError, match="cannot sign"):
        Credentials(key, key)
    other, its_key = tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048)
    other.write_bytes(pem(its_key))
    with pytest.raises(UserError, match="is not for --c2pa-key"):
        Credentials(chain, other)
    chain_of_other = tmp_path / "rsa_chain.pem"
    chain_of_other.write_bytes(certificate("avatar", its_key, "avatar", its_key, ca=False))
    with pytest.raises(UserError, match="on the curve"):
        Credentials(chain_of_other, other)
    video = tmp_path / "no.mp4"
    video.write_bytes(b"this is no video")
    with pytest.raises(UserError, match="could not be signed"):
        Credentials(chain, key).sign(video)
    assert video.read_bytes() == b"this is no video"
    assert [path.name for path in tmp_path.glob(".*")] == []
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(UserError, match="not installed: pip install"):
        Credentials(chain, key)
