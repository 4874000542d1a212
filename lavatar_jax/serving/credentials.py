"""Signs recordings as made by a model: C2PA content credentials, with a certificate of one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lavatar_jax
from lavatar_jax.errors import UserError
from lavatar_jax.files import temporary_name

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MANIFEST = {
    "claim_generator_info": [{"name": "lavatar_jax", "version": lavatar_jax.__version__}],
    "title": "avatar.mp4",
    "format": "video/mp4",
    "assertions": [
        {
            "label": "c2pa.actions",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": GENERATED}]},
        }
    ],
}
ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class Credentials:
    """`certificate`: a PEM chain, the signing one first; `key`: its private key in PEM.

    Raises UserError when c2pa-python is not installed, or the two cannot sign.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        try:
            import c2pa
        except ImportError:
            raise UserError(
                "--c2pa-cert needs c2pa-python, which is not installed: pip install '.[c2pa]'"
            ) from None
        try:
            chain, secret = certificate.read_bytes(), key.read_bytes()
            info = c2pa.C2paSignerInfo(_algorithm(chain, secret).encode(), chain, secret, None)
            self._signer = c2pa.Signer.from_info(info)
        except UserError:
            raise
        except Exception:
            raise UserError(f"{certificate} and {key} cannot sign: give a PEM chain and its key") from None
        self._c2pa = c2pa

    def sign(self, path: Path) -> None:
        """Replaces a video by a signed copy; blocks. Raises UserError, and leaves the video as it was."""
        part = temporary_name(path)
        try:
            with (
                self._c2pa.Builder(json.dumps(MANIFEST)) as builder,
                open(path, "rb") as video,
                open(part, "w+b") as signed,
            ):
                builder.sign(self._signer, "video/mp4", video, signed)
            os.replace(part, path)
        except Exception:
            raise UserError("the recording could not be signed") from None
        finally:
            part.unlink(missing_ok=True)


def _algorithm(chain: bytes, key: bytes) -> str:
    """The name of the signature that a key makes. Raises UserError, also for another's certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(key, None)
    except (ValueError, TypeError):
        raise UserError("--c2pa-key: this is no private key in PEM without a password") from None
    if x509.load_pem_x509_certificates(chain)[0].public_key() != found.public_key():
        raise UserError("--c2pa-cert: its first certificate is not for --c2pa-key")
    if isinstance(found, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(found, ec.EllipticCurvePrivateKey) and found.curve.name in ALGORITHMS:
        return ALGORITHMS[found.curve.name]
    raise UserError("--c2pa-key: give a key on the curve P-256, P-384 or P-521, or of Ed25519")
